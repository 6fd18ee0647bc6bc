// Entry point of the catalogue loss: checks, then the driver of the chosen instruction set.
#include <algorithm>
#include <new>
#include <vector>

#include "catalogue_loss/catalogue_loss.h"
#include "catalogue_loss/catalogue_loss_run.h"
#include "common/checks.h"
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

Status check(const CatalogueLossParams& p) {
  if (p.tokens < 1 || p.items < 1 || p.dim < 0 || p.excluded_count < 0) {
    return error_status("catalogue_loss: a size is out of range");
  }
  const bool has_rows = p.dim > 0;
  if (p.value == nullptr || p.targets == nullptr ||
      (has_rows && (p.users == nullptr || p.item_rows == nullptr)) ||
      (p.candidates != nullptr && p.candidate_count < 1) ||
      (p.excluded_offsets != nullptr && p.excluded_count > 0 && p.excluded_values == nullptr) ||
      (p.want_users && has_rows && p.d_users == nullptr) ||
      (p.want_items && has_rows && p.d_items == nullptr)) {
    return error_status("catalogue_loss: a pointer is null");
  }
  Status status = check_ids("targets", p.targets, p.tokens, 0, p.items - 1);
  if (status.ok && p.candidates != nullptr) {
    status = check_ids("candidates", p.candidates, p.candidate_count, 0, p.items - 1);
    for (int64_t i = 1; status.ok && i < p.candidate_count; ++i) {
      if (p.candidates[i] <= p.candidates[i - 1]) {
        status = error_status("candidates must ascend, got %lld after %lld", shown(p.candidates[i]),
                              shown(p.candidates[i - 1]));
      }
    }
  }
  if (!status.ok || p.excluded_offsets == nullptr) return status;
  const int64_t place = bad_offset(p.excluded_offsets, p.tokens, p.excluded_count);
  if (place >= 0) {
    return error_status("excluded_offsets must ascend from 0 to %lld, got %lld at position %lld",
                        shown(p.excluded_count), shown(p.excluded_offsets[place]), shown(place));
  }
  return check_ids("excluded_values", p.excluded_values, p.excluded_count, 0, p.items - 1);
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
                          shown(p.targets[t]));
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
                        shown(params.tokens), shown(params.items));
  }
  return {};
}

}  // namespace padkern
