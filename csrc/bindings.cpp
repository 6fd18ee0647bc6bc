// padkern._C: raw pointers, sizes and strides in, ValueError text out; nothing else lives here.
// A new op adds a bindings.cpp to its folder and a line to bindings.h.
#include "bindings.h"

#include "common/isa.h"
#include "common/parallel.h"
#include "mkmmd/kernel_products.h"
#include "mkmmd/mkmmd.h"
#include "mkmmd/mkmmd_batched.h"
#include "mkmmd/mkmmd_weights.h"
#include "triple_expert/gated_bce.h"

namespace {

namespace py = pybind11;
using padkern::pointer;
using padkern::text;

void set_parallel(uintptr_t parallel_for, uintptr_t num_threads) {
  padkern::set_parallel(pointer<padkern::ParallelForFn>(parallel_for),
                        pointer<padkern::NumThreadsFn>(num_threads));
}

py::dict isa() {
  padkern::Isa chosen;
  const char* error;
  const bool ok = padkern::chosen_isa(&chosen, &error);
  py::dict out;
  out["detected"] = padkern::isa_name(padkern::detected_isa());
  out["chosen"] = ok ? py::object(py::str(padkern::isa_name(chosen))) : py::object(py::none());
  out["error"] = ok ? "" : error;
  return out;
}

// A sample is (data, dtype, weight, weight_dtype, rows, row_stride, column_stride, weight_stride,
// gradient, gradient_stride).
using SampleTuple = std::tuple<uintptr_t, int, uintptr_t, int, int64_t, int64_t, int64_t, int64_t,
                               uintptr_t, int64_t>;

padkern::MkmmdSample sample(const SampleTuple& in) {
  padkern::MkmmdSample out;
  out.data = pointer<const void*>(std::get<0>(in));
  out.dtype = static_cast<padkern::MkmmdDtype>(std::get<1>(in));
  out.weight = pointer<const void*>(std::get<2>(in));
  out.weight_dtype = static_cast<padkern::MkmmdDtype>(std::get<3>(in));
  out.rows = std::get<4>(in);
  out.row_stride = std::get<5>(in);
  out.column_stride = std::get<6>(in);
  out.weight_stride = std::get<7>(in);
  out.gradient = pointer<void*>(std::get<8>(in));
  out.gradient_stride = std::get<9>(in);
  return out;
}

int64_t mkmmd_workspace_bytes(int dtype, int source_dtype, int target_dtype, int64_t n, int64_t m,
                              int64_t dim, int64_t gradient_stride) {
  padkern::MkmmdParams params;
  params.dtype = static_cast<padkern::MkmmdDtype>(dtype);
  params.source.dtype = static_cast<padkern::MkmmdDtype>(source_dtype);
  params.target.dtype = static_cast<padkern::MkmmdDtype>(target_dtype);
  params.source.rows = n;
  params.target.rows = m;
  params.dim = dim;
  params.want_gradient = gradient_stride > 0;
  params.source.gradient_stride = params.target.gradient_stride = gradient_stride;
  return padkern::mkmmd_workspace_bytes(params);
}

// options: dtype, estimator, kernel. outputs: value, d_sigma, d_alphas, d_betas (0: not wanted).
std::string mkmmd_cpu(const std::tuple<int, int, int>& options, const SampleTuple& source,
                      const SampleTuple& target, int64_t dim, const std::vector<double>& alphas,
                      const std::vector<double>& betas, uintptr_t sigma_sq, int sigma_dtype,
                      bool want_gradient,
                      const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>& outputs,
                      uintptr_t workspace, int64_t workspace_bytes) {
  if (!betas.empty() && betas.size() != alphas.size()) return "betas must be as many as alphas";
  padkern::MkmmdParams params;
  params.dtype = static_cast<padkern::MkmmdDtype>(std::get<0>(options));
  params.estimator = static_cast<padkern::MkmmdEstimator>(std::get<1>(options));
  params.kernel = static_cast<padkern::MkmmdKernel>(std::get<2>(options));
  params.source = sample(source);
  params.target = sample(target);
  params.dim = dim;
  params.alphas = alphas.data();
  params.betas = betas.empty() ? nullptr : betas.data();
  params.num_alphas = static_cast<int64_t>(alphas.size());
  double bandwidth = 0.0;
  if (sigma_sq != 0) {
    padkern::MkmmdSample one;
    one.weight = pointer<const void*>(sigma_sq);
    one.weight_dtype = static_cast<padkern::MkmmdDtype>(sigma_dtype);
    bandwidth = padkern::read_weight(one, 0);
    params.sigma_sq = &bandwidth;
  }
  params.want_gradient = want_gradient;
  params.value = pointer<void*>(std::get<0>(outputs));
  params.sigma_gradient = pointer<double*>(std::get<1>(outputs));
  params.alphas_gradient = pointer<double*>(std::get<2>(outputs));
  params.betas_gradient = pointer<double*>(std::get<3>(outputs));
  params.workspace = pointer<void*>(workspace);
  params.workspace_bytes = workspace_bytes;
  py::gil_scoped_release release;
  return text(padkern::mkmmd_cpu(params));
}

// A batched sample is (data, dtype, problem, row and column stride), (weight, dtype, problem and
// row stride), (offsets or 0, bytes of one, total rows, rows of a problem), gradient.
using BatchedSampleTuple = std::tuple<std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>,
                                      std::tuple<uintptr_t, int, int64_t, int64_t>,
                                      std::tuple<uintptr_t, int64_t, int64_t, int64_t>, uintptr_t>;
// dtype, estimator, kernel, problems, dim
using BatchedOptionsTuple = std::tuple<int, int, int, int64_t, int64_t>;
// sigma_sq, value, d_sigma
using BatchedVectorsTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t>;

padkern::MkmmdBatchedSample batched_sample(const BatchedSampleTuple& in) {
  const auto& [data, weight, cut, gradient] = in;
  padkern::MkmmdBatchedSample out;
  out.data = pointer<const void*>(std::get<0>(data));
  out.dtype = static_cast<padkern::MkmmdDtype>(std::get<1>(data));
  out.problem_stride = std::get<2>(data);
  out.row_stride = std::get<3>(data);
  out.column_stride = std::get<4>(data);
  out.weight = pointer<const void*>(std::get<0>(weight));
  out.weight_dtype = static_cast<padkern::MkmmdDtype>(std::get<1>(weight));
  out.weight_problem_stride = std::get<2>(weight);
  out.weight_stride = std::get<3>(weight);
  out.offsets = pointer<const void*>(std::get<0>(cut));
  out.offset_bytes = std::get<1>(cut);
  out.total_rows = std::get<2>(cut);
  out.rows_per_problem = std::get<3>(cut);
  out.gradient = pointer<void*>(gradient);
  return out;
}

padkern::MkmmdBatchedParams batched_params(const BatchedOptionsTuple& options,
                                           const BatchedSampleTuple& source,
                                           const BatchedSampleTuple& target,
                                           const std::vector<double>& alphas,
                                           const BatchedVectorsTuple& vectors, bool want_gradient) {
  padkern::MkmmdBatchedParams params;
  params.dtype = static_cast<padkern::MkmmdDtype>(std::get<0>(options));
  params.estimator = static_cast<padkern::MkmmdEstimator>(std::get<1>(options));
  params.kernel = static_cast<padkern::MkmmdKernel>(std::get<2>(options));
  params.problems = std::get<3>(options);
  params.dim = std::get<4>(options);
  params.source = batched_sample(source);
  params.target = batched_sample(target);
  params.alphas = alphas.data();
  params.num_alphas = static_cast<int64_t>(alphas.size());
  params.sigma_sq = pointer<const double*>(std::get<0>(vectors));
  params.value = pointer<void*>(std::get<1>(vectors));
  params.sigma_gradient = pointer<double*>(std::get<2>(vectors));
  params.want_gradient = want_gradient;
  return params;
}

int64_t mkmmd_batched_workspace_bytes(const BatchedOptionsTuple& options,
                                      const BatchedSampleTuple& source,
                                      const BatchedSampleTuple& target,
                                      const std::vector<double>& alphas,
                                      const BatchedVectorsTuple& vectors, bool want_gradient) {
  return padkern::mkmmd_batched_workspace_bytes(
      batched_params(options, source, target, alphas, vectors, want_gradient));
}

std::string mkmmd_batched_cpu(const BatchedOptionsTuple& options, const BatchedSampleTuple& source,
                              const BatchedSampleTuple& target, const std::vector<double>& alphas,
                              const BatchedVectorsTuple& vectors, bool want_gradient,
                              uintptr_t workspace, int64_t workspace_bytes) {
  padkern::MkmmdBatchedParams params =
      batched_params(options, source, target, alphas, vectors, want_gradient);
  params.workspace = pointer<void*>(workspace);
  params.workspace_bytes = workspace_bytes;
  py::gil_scoped_release release;
  return text(padkern::mkmmd_batched_cpu(params));
}

// A sum of kernels is (kernel, alphas, betas or 0, sigma_sq), a matrix (data, rows, row stride,
// column stride), a membership (data, columns, row stride, column stride).
using KernelSumTuple = std::tuple<int, std::vector<double>, uintptr_t, uintptr_t>;
using MatrixTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

padkern::KernelSum kernel_sum(const KernelSumTuple& in) {
  padkern::KernelSum out;
  out.kernel = static_cast<padkern::MkmmdKernel>(std::get<0>(in));
  out.alphas = std::get<1>(in).data();
  out.count = static_cast<int64_t>(std::get<1>(in).size());
  out.betas = pointer<const double*>(std::get<2>(in));
  out.sigma_sq = pointer<const double*>(std::get<3>(in));
  return out;
}

padkern::KernelMatrix matrix(const MatrixTuple& in) {
  padkern::KernelMatrix out;
  out.data = pointer<const void*>(std::get<0>(in));
  out.rows = std::get<1>(in);
  out.row_stride = std::get<2>(in);
  out.column_stride = std::get<3>(in);
  return out;
}

// outputs: quadratic, linear, row sums.
std::string kernel_quadratic_cpu(int dtype, const KernelSumTuple& sum, const MatrixTuple& rows,
                                 int64_t dim, const MatrixTuple& membership,
                                 const std::tuple<uintptr_t, uintptr_t, uintptr_t>& outputs) {
  padkern::KernelQuadraticParams params;
  params.dtype = static_cast<padkern::MkmmdDtype>(dtype);
  params.sum = kernel_sum(sum);
  params.rows = matrix(rows);
  params.dim = dim;
  params.membership = pointer<const uint8_t*>(std::get<0>(membership));
  params.columns = std::get<1>(membership);
  params.membership_row_stride = std::get<2>(membership);
  params.membership_column_stride = std::get<3>(membership);
  params.quadratic = pointer<double*>(std::get<0>(outputs));
  params.linear = pointer<double*>(std::get<1>(outputs));
  params.row_sums = pointer<double*>(std::get<2>(outputs));
  py::gil_scoped_release release;
  return text(padkern::kernel_quadratic_cpu(params));
}

// options: part, power, skip_diagonal. sizes: dim, columns.
std::string kernel_apply_cpu(int dtype, const KernelSumTuple& sum,
                             const std::tuple<int, int, bool>& options, const MatrixTuple& query,
                             const MatrixTuple& rows, const MatrixTuple& vectors,
                             const std::tuple<int64_t, int64_t>& sizes, uintptr_t out) {
  padkern::KernelApplyParams params;
  params.dtype = static_cast<padkern::MkmmdDtype>(dtype);
  params.sum = kernel_sum(sum);
  params.part = static_cast<padkern::KernelPart>(std::get<0>(options));
  params.power = std::get<1>(options);
  params.skip_diagonal = std::get<2>(options);
  params.query = matrix(query);
  params.rows = matrix(rows);
  params.vectors = matrix(vectors);
  std::tie(params.dim, params.columns) = sizes;
  params.out = pointer<double*>(out);
  py::gil_scoped_release release;
  return text(padkern::kernel_apply_cpu(params));
}

std::string draw_memberships_cpu(uintptr_t seeds, int64_t count, int64_t rows, int64_t chosen,
                                 uintptr_t out) {
  padkern::DrawMembershipsParams params;
  params.seeds = pointer<const int64_t*>(seeds);
  params.count = count;
  params.rows = rows;
  params.chosen = chosen;
  params.out = pointer<uint8_t*>(out);
  py::gil_scoped_release release;
  return text(padkern::draw_memberships_cpu(params));
}

// sizes: tokens, experts, dim, rows, bins, negatives. users and tables are (data, outer stride,
// inner stride), ids (positives, negatives, valid), outputs (value, d_users, d_tables, d_gate).
using StridedTuple = std::tuple<uintptr_t, int64_t, int64_t>;
using IdsTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t>;
using OutputsTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

std::string gated_bce_cpu(
    int dtype, const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>& sizes,
    const StridedTuple& users, const StridedTuple& tables, uintptr_t gate, uintptr_t item_bins,
    const IdsTuple& ids, double positive_weight, bool want_gradient, const OutputsTuple& outputs) {
  padkern::GatedBceParams params;
  params.dtype = padkern::float_dtype<padkern::GatedBceDtype>(dtype);
  std::tie(params.tokens, params.experts, params.dim, params.rows, params.bins, params.negatives) =
      sizes;
  params.users = pointer<const void*>(std::get<0>(users));
  params.user_token_stride = std::get<1>(users);
  params.user_expert_stride = std::get<2>(users);
  params.tables = pointer<const void*>(std::get<0>(tables));
  params.table_expert_stride = std::get<1>(tables);
  params.table_row_stride = std::get<2>(tables);
  params.gate = pointer<const void*>(gate);
  params.item_bins = pointer<const int64_t*>(item_bins);
  params.positive_ids = pointer<const int64_t*>(std::get<0>(ids));
  params.negative_ids = pointer<const int64_t*>(std::get<1>(ids));
  params.valid = pointer<const uint8_t*>(std::get<2>(ids));
  params.positive_weight = positive_weight;
  params.want_gradient = want_gradient;
  params.value = pointer<void*>(std::get<0>(outputs));
  params.d_users = pointer<void*>(std::get<1>(outputs));
  params.d_tables = pointer<void*>(std::get<2>(outputs));
  params.d_gate = pointer<void*>(std::get<3>(outputs));
  py::gil_scoped_release release;
  return text(padkern::gated_bce_cpu(params));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "padkern's CPU kernels; called through the launchers in padkern.ops";
  m.attr("__version__") = PADKERN_VERSION;
  m.def("set_parallel", &set_parallel);
  m.def("num_threads", &padkern::num_threads);
  m.def("isa", &isa);
  m.def("mkmmd_workspace_bytes", &mkmmd_workspace_bytes);
  m.def("mkmmd_cpu", &mkmmd_cpu);
  m.def("mkmmd_batched_workspace_bytes", &mkmmd_batched_workspace_bytes);
  m.def("mkmmd_batched_cpu", &mkmmd_batched_cpu);
  m.def("gated_bce_cpu", &gated_bce_cpu);
  m.def("kernel_quadratic_cpu", &kernel_quadratic_cpu);
  m.def("kernel_apply_cpu", &kernel_apply_cpu);
  m.def("draw_memberships_cpu", &draw_memberships_cpu);
  padkern::bind_batch_plan(m);
  padkern::bind_catalogue_loss(m);
  padkern::bind_encoder(m);
  padkern::bind_linear(m);
  padkern::bind_ranking(m);
  padkern::bind_segments(m);
}
