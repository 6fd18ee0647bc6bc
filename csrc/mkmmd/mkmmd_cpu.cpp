// Entry of the CPU kernels: checks, and the choice of instruction set and compute type.
#include <cmath>

#include "common/isa.h"
#include "mkmmd/mkmmd.h"
#include "mkmmd/mkmmd_run.h"

namespace padkern {
namespace {

template <class T>
const MkmmdKernels<T>& kernels_for(Isa isa);

template <>
const MkmmdKernels<float>& kernels_for<float>(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::mkmmd_kernels_f32();
  if (isa == Isa::kAvx2) return avx2::mkmmd_kernels_f32();
#endif
  (void)isa;
  return baseline::mkmmd_kernels_f32();
}

template <>
const MkmmdKernels<double>& kernels_for<double>(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::mkmmd_kernels_f64();
  if (isa == Isa::kAvx2) return avx2::mkmmd_kernels_f64();
#endif
  (void)isa;
  return baseline::mkmmd_kernels_f64();
}

bool sizes_fit(int64_t source_rows, int64_t target_rows, int64_t dim) {
  const int64_t limit = int64_t{1} << 40;
  return source_rows > 0 && target_rows > 0 && dim > 0 && source_rows < limit &&
         target_rows < limit && dim < limit && (source_rows + target_rows) < limit / dim;
}

Status check(const MkmmdParams& params) {
  if (!sizes_fit(params.source.rows, params.target.rows, params.dim)) {
    return error_status(
        "sizes must be positive and below 2^40 elements, got %lld, %lld rows of %lld",
        static_cast<long long>(params.source.rows), static_cast<long long>(params.target.rows),
        static_cast<long long>(params.dim));
  }
  if (params.num_alphas < 1 || params.num_alphas > kMkmmdMaxKernels || params.alphas == nullptr) {
    return error_status("alphas must hold 1 to %d values, got %lld", kMkmmdMaxKernels,
                        static_cast<long long>(params.num_alphas));
  }
  if (params.dtype != MkmmdDtype::kFloat32 && params.dtype != MkmmdDtype::kFloat64) {
    return error_status("the compute type must be float32 or float64");
  }
  for (int64_t u = 0; u < params.num_alphas; ++u) {
    if (!(params.alphas[u] > 0.0) || !std::isfinite(params.alphas[u])) {
      return error_status("alphas must be positive and finite, got %g", params.alphas[u]);
    }
  }
  const bool pairs_only =
      params.estimator == MkmmdEstimator::kUnbiased || params.estimator == MkmmdEstimator::kTllib;
  for (const MkmmdSample* s : {&params.source, &params.target}) {
    if (s->dtype == MkmmdDtype::kBool ||
        (s->dtype == MkmmdDtype::kFloat64 && params.dtype != MkmmdDtype::kFloat64)) {
      return error_status("%s has a type that the compute type cannot hold",
                          s == &params.source ? "source" : "target");
    }
    if (s->data == nullptr || (params.want_gradient && s->gradient == nullptr)) {
      return error_status("null pointer for %s", s == &params.source ? "source" : "target");
    }
    if (params.want_gradient && s->gradient_stride < params.dim) {
      return error_status("gradient stride of %s must be at least the width %lld, got %lld",
                          s == &params.source ? "source" : "target",
                          static_cast<long long>(params.dim),
                          static_cast<long long>(s->gradient_stride));
    }
    if (pairs_only && s->rows < 2) {
      return error_status("%s needs at least 2 rows for this estimator, got %lld",
                          s == &params.source ? "source" : "target",
                          static_cast<long long>(s->rows));
    }
  }
  if (params.estimator == MkmmdEstimator::kTllib && params.source.rows != params.target.rows) {
    return error_status("the tllib estimator needs equal sizes, got %lld and %lld",
                        static_cast<long long>(params.source.rows),
                        static_cast<long long>(params.target.rows));
  }
  if (params.value == nullptr || (params.want_gradient && params.sigma_gradient == nullptr)) {
    return error_status("null pointer for an output");
  }
  const int64_t needed = mkmmd_workspace_bytes(params);
  if (params.workspace == nullptr || params.workspace_bytes < needed) {
    return error_status("workspace of %lld bytes is smaller than the %lld needed",
                        static_cast<long long>(params.workspace_bytes),
                        static_cast<long long>(needed));
  }
  if (reinterpret_cast<uintptr_t>(params.workspace) % 64 != 0) {
    return error_status("workspace must be aligned to 64 bytes");
  }
  return Status();
}

}  // namespace

int64_t mkmmd_workspace_bytes(const MkmmdParams& params) {
  Isa isa;
  const char* error;
  if (!chosen_isa(&isa, &error)) return 0;
  if (!sizes_fit(params.source.rows, params.target.rows, params.dim)) return 0;
  MkmmdParams sizes = params;
  sizes.workspace = nullptr;
  if (params.dtype == MkmmdDtype::kFloat32) {
    return MkmmdRun<float>(sizes, kernels_for<float>(isa)).workspace_bytes();
  }
  return MkmmdRun<double>(sizes, kernels_for<double>(isa)).workspace_bytes();
}

Status mkmmd_cpu(const MkmmdParams& params) {
  Isa isa;
  const char* error;
  if (!chosen_isa(&isa, &error)) return error_status("%s", error);
  Status status = check(params);
  if (!status.ok) return status;
  if (params.dtype == MkmmdDtype::kFloat32) {
    return MkmmdRun<float>(params, kernels_for<float>(isa)).run();
  }
  return MkmmdRun<double>(params, kernels_for<double>(isa)).run();
}

}  // namespace padkern
