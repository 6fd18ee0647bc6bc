// Bindings of the batch plan: raw pointers in, (error text, numbers) out.
#include "bindings.h"

#include "batch_plan/batch_plan.h"

namespace padkern {
namespace {

// values, offsets, own_values, own_offsets, candidates, cumulative, bins; rows, items, max_len,
// candidates' number
using SourceTuple = std::tuple<std::vector<uintptr_t>, std::vector<int64_t>>;
// users, batch, negatives, sampling, key
using RequestTuple = std::tuple<uintptr_t, int64_t, int64_t, int, uint64_t>;

PlanSource plan_source(const SourceTuple& in) {
  const auto& [at, size] = in;
  PlanSource out;
  out.values = pointer<const int64_t*>(at[0]);
  out.offsets = pointer<const int64_t*>(at[1]);
  out.own_values = pointer<const int64_t*>(at[2]);
  out.own_offsets = pointer<const int64_t*>(at[3]);
  out.candidates = pointer<const int64_t*>(at[4]);
  out.cumulative = pointer<const double*>(at[5]);
  out.bins = pointer<const int64_t*>(at[6]);
  out.rows = size[0];
  out.items = size[1];
  out.max_len = size[2];
  out.num_candidates = size[3];
  return out;
}

PlanRequest plan_request(const RequestTuple& in) {
  PlanRequest out;
  int sampling;
  uintptr_t users;
  std::tie(users, out.batch, out.negatives, sampling, out.key) = in;
  out.users = pointer<const int64_t*>(users);
  out.sampling = static_cast<NegativeSampling>(sampling);
  return out;
}

std::tuple<std::string, int64_t, int64_t> sizes(const SourceTuple& source,
                                                const RequestTuple& request) {
  int64_t tokens, width;
  const Status status = plan_sizes(plan_source(source), plan_request(request), &tokens, &width);
  return {text(status), tokens, width};
}

// outputs: the arrays of PlanOutput in their order.
std::tuple<std::string, int64_t> plan(const SourceTuple& source, const RequestTuple& request,
                                      int64_t width, const std::vector<uintptr_t>& outputs) {
  PlanOutput out;
  int64_t** const arrays[] = {&out.offsets, &out.inputs,    &out.positions, &out.grid,
                              &out.targets, &out.negatives, &out.unique,    &out.rows,
                              &out.starts,  &out.slots,     &out.bins,      &out.counts,
                              &out.mark};
  for (size_t i = 0; i < outputs.size(); ++i) *arrays[i] = pointer<int64_t*>(outputs[i]);
  const PlanSource from = plan_source(source);
  const PlanRequest what = plan_request(request);
  py::gil_scoped_release release;
  const Status status = batch_plan(from, what, width, &out);
  return {text(status), out.num_unique};
}

}  // namespace

void bind_batch_plan(py::module_& m) {
  m.def("batch_plan_sizes", &sizes);
  m.def("batch_plan", &plan);
}

}  // namespace padkern
