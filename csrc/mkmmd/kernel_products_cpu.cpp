// Entry points of the kernel products: checks, then the driver of the chosen instruction set.
#include <cmath>
#include <new>

#include "common/isa.h"
#include "mkmmd/kernel_apply_run.h"
#include "mkmmd/kernel_products.h"
#include "mkmmd/kernel_quadratic_run.h"

namespace padkern {
namespace {

template <class T>
const ProductKernels<T>& kernels_for(Isa isa);

template <>
const ProductKernels<float>& kernels_for<float>(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::product_kernels_f32();
  if (isa == Isa::kAvx2) return avx2::product_kernels_f32();
#endif
  (void)isa;
  return baseline::product_kernels_f32();
}

template <>
const ProductKernels<double>& kernels_for<double>(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::product_kernels_f64();
  if (isa == Isa::kAvx2) return avx2::product_kernels_f64();
#endif
  (void)isa;
  return baseline::product_kernels_f64();
}

bool sizes_fit(int64_t rows, int64_t columns) {
  const int64_t limit = int64_t{1} << 40;
  return rows > 0 && columns > 0 && rows < limit && columns < limit / rows;
}

long long print(int64_t value) { return static_cast<long long>(value); }

Status check_matrix(const char* name, const KernelMatrix& m, int64_t columns) {
  if (!sizes_fit(m.rows, columns)) {
    return error_status("%s must have positive sizes below 2^40 elements, got [%lld, %lld]", name,
                        print(m.rows), print(columns));
  }
  if (m.data == nullptr) return error_status("null pointer for %s", name);
  return Status();
}

Status check_sum(MkmmdDtype dtype, const KernelSum& sum) {
  if (dtype != MkmmdDtype::kFloat32 && dtype != MkmmdDtype::kFloat64) {
    return error_status("the compute type must be float32 or float64");
  }
  if (sum.count < 1 || sum.count > kMkmmdMaxKernels || sum.alphas == nullptr) {
    return error_status("alphas must hold 1 to %d values, got %lld", kMkmmdMaxKernels,
                        print(sum.count));
  }
  for (int64_t u = 0; u < sum.count; ++u) {
    if (!(sum.alphas[u] > 0.0) || !std::isfinite(sum.alphas[u])) {
      return error_status("alphas must be positive and finite, got %g", sum.alphas[u]);
    }
  }
  if (sum.sigma_sq == nullptr) return error_status("null pointer for sigma_sq");
  return Status();
}

// Runs call with the instruction set; running out of memory becomes a status.
template <class Call>
Status guarded(const char* name, const Call& call) {
  Isa isa;
  const char* error;
  if (!chosen_isa(&isa, &error)) return error_status("%s", error);
  try {
    call(isa);
  } catch (const std::bad_alloc&) {
    return error_status("%s: out of memory", name);
  }
  return Status();
}

}  // namespace

Status kernel_quadratic_cpu(const KernelQuadraticParams& params) {
  Status status = check_sum(params.dtype, params.sum);
  if (status.ok) status = check_matrix("rows", params.rows, params.dim);
  if (!status.ok) return status;
  if (!sizes_fit(params.rows.rows, params.columns)) {
    return error_status("membership must have positive sizes below 2^40 elements, got [%lld, %lld]",
                        print(params.rows.rows), print(params.columns));
  }
  if (params.membership == nullptr || params.quadratic == nullptr || params.linear == nullptr ||
      params.row_sums == nullptr) {
    return error_status("null pointer for membership or an output");
  }
  return guarded("kernel_quadratic", [&](Isa isa) {
    if (params.dtype == MkmmdDtype::kFloat32) {
      Quadratic<float>(params, kernels_for<float>(isa)).run();
    } else {
      Quadratic<double>(params, kernels_for<double>(isa)).run();
    }
  });
}

Status kernel_apply_cpu(const KernelApplyParams& params) {
  Status status = check_sum(params.dtype, params.sum);
  if (status.ok) status = check_matrix("query", params.query, params.dim);
  if (status.ok) status = check_matrix("rows", params.rows, params.dim);
  if (status.ok) status = check_matrix("vectors", params.vectors, params.columns);
  if (!status.ok) return status;
  if (!sizes_fit(params.query.rows, params.columns) || params.out == nullptr) {
    return error_status("null pointer or size out of range for the output");
  }
  if (params.vectors.rows != params.rows.rows) {
    return error_status("vectors must have %lld rows, got %lld", print(params.rows.rows),
                        print(params.vectors.rows));
  }
  if (params.skip_diagonal && params.query.rows != params.rows.rows) {
    return error_status("skip_diagonal needs as many queries as rows, got %lld and %lld",
                        print(params.query.rows), print(params.rows.rows));
  }
  if (params.power != 1 && params.power != 2) {
    return error_status("power must be 1 or 2, got %d", params.power);
  }
  return guarded("kernel_apply", [&](Isa isa) {
    if (params.dtype == MkmmdDtype::kFloat32) {
      Apply<float>(params, kernels_for<float>(isa)).run();
    } else {
      Apply<double>(params, kernels_for<double>(isa)).run();
    }
  });
}

Status draw_memberships_cpu(const DrawMembershipsParams& params) {
  if (params.count < 0 || params.chosen < 0 || params.chosen > params.rows ||
      !sizes_fit(params.rows, params.count + 1)) {
    return error_status("memberships of %lld of %lld rows in %lld draws are out of range",
                        print(params.chosen), print(params.rows), print(params.count));
  }
  if (params.out == nullptr || (params.seeds == nullptr && params.count > 0)) {
    return error_status("null pointer for seeds or the memberships");
  }
  return guarded("draw_memberships", [&](Isa isa) {
    const ProductKernels<float>& kernels = kernels_for<float>(isa);
    const int64_t stride = params.count + 1;
    for (int64_t i = 0; i < params.rows; ++i) params.out[i * stride] = i < params.chosen;
    const int64_t panels = (params.count + kDrawPanel - 1) / kDrawPanel;
    const double work = 4.0 * static_cast<double>(params.rows) * static_cast<double>(params.count);
    run_tickets(panels, useful_workers(work, panels), [&](int64_t, int64_t panel) {
      const int64_t first = panel * kDrawPanel;
      kernels.draw(params.seeds + first, std::min<int64_t>(kDrawPanel, params.count - first),
                   params.rows, params.chosen, stride, params.out + 1 + first);
    });
  });
}

}  // namespace padkern
