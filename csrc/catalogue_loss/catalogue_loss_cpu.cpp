// Entry point of the catalogue loss: checks, then the driver of the chosen instruction set.
#include <algorithm>
#include <new>
#include <vector>

#include "catalogue_loss/catalogue_loss.h"
#include "catalogue_loss/catalogue_loss_run.h"
#include "common/isa.h"

namespace padkern {
namespace {

const CatalogueKernels<float>& kernels_of(Isa isa, float) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::catalogue_kernels_f32();
  if (isa == Isa::kAvx2) return avx2::catalogue_kernels_f32();
#endif
  (void)isa;
  return baseline::catalogue_kernels_f32();
}

const CatalogueKernels<double>& kernels_of(Isa isa, double) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::catalogue_kernels_f64();
  if (isa == Isa::kAvx2) return avx2::catalogue_kernels_f64();
#endif
  (void)isa;
  return baseline::catalogue_kernels_f64();
}

long long print(int64_t value) { return static_cast<long long>(value); }

Status check_ids(const char* name, const int64_t* ids, int64_t count, int64_t items) {
  for (int64_t i = 0; i < count; ++i) {
    if (static_cast<uint64_t>(ids[i]) >= static_cast<uint64_t>(items)) {
      return error_status("%s must lie in 0..%lld, got %lld at position %lld", name,
                          print(items - 1), print(ids[i]), print(i));
    }
  }
  return {};
}

Status check(const CatalogueLossParams& p) {
  if (p.tokens < 1 || p.items < 1 || p.dim < 0) {
    return error_status("catalogue_loss: a size is out of range");
  }
  const bool has_rows = p.dim > 0;
  if (p.value == nullptr || p.targets == nullptr ||
      (has_rows && (p.users == nullptr || p.item_rows == nullptr)) ||
      (p.candidates != nullptr && p.candidate_count < 1) ||
      (p.excluded_offsets != nullptr && p.excluded_count > 0 && p.excluded_values == nullptr) ||
      (p.want_gradient && has_rows && (p.d_users == nullptr || p.d_items == nullptr))) {
    return error_status("catalogue_loss: a pointer is null");
  }
  Status status = check_ids("targets", p.targets, p.tokens, p.items);
  if (status.ok && p.candidates != nullptr) {
    status = check_ids("candidates", p.candidates, p.candidate_count, p.items);
    for (int64_t i = 1; status.ok && i < p.candidate_count; ++i) {
      if (p.candidates[i] <= p.candidates[i - 1]) {
        status = error_status("candidates must ascend, got %lld after %lld", print(p.candidates[i]),
                              print(p.candidates[i - 1]));
      }
    }
  }
  if (!status.ok || p.excluded_offsets == nullptr) return status;
  const int64_t* offsets = p.excluded_offsets;
  for (int64_t t = 0; t <= p.tokens; ++t) {
    if (offsets[t] < (t == 0 ? 0 : offsets[t - 1]) || (t == 0 && offsets[t] != 0) ||
        (t == p.tokens && offsets[t] != p.excluded_count)) {
      return error_status("excluded_offsets must ascend from 0 to %lld, got %lld at position %lld",
                          print(p.excluded_count), print(offsets[t]), print(t));
    }
  }
  return check_ids("excluded_values", p.excluded_values, p.excluded_count, p.items);
}

// The columns of the logits that the targets are.
Status find_targets(const CatalogueLossParams& p, std::vector<int64_t>* columns) {
  columns->assign(p.targets, p.targets + p.tokens);
  if (p.candidates == nullptr) return {};
  const int64_t* end = p.candidates + p.candidate_count;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const int64_t* at = std::lower_bound(p.candidates, end, p.targets[t]);
    if (at == end || *at != p.targets[t]) {
      return error_status("targets must be among the candidates, got item %lld",
                          print(p.targets[t]));
    }
    (*columns)[t] = at - p.candidates;
  }
  return {};
}

}  // namespace

Status catalogue_loss_cpu(const CatalogueLossParams& params) {
  Status status = check(params);
  if (!status.ok) return status;
  Isa isa;
  const char* error;
  if (!chosen_isa(&isa, &error)) return error_status("%s", error);
  try {
    std::vector<int64_t> columns;
    status = find_targets(params, &columns);
    if (!status.ok) return status;
    if (params.dtype == CatalogueDtype::kFloat64) {
      CatalogueRun<double>(params, kernels_of(isa, double()), columns).run();
    } else {
      CatalogueRun<float>(params, kernels_of(isa, float()), columns).run();
    }
  } catch (const std::bad_alloc&) {
    return error_status("catalogue_loss: out of memory for %lld tokens and %lld items",
                        print(params.tokens), print(params.items));
  }
  return {};
}

}  // namespace padkern
