// Products with the matrix of kernel sums on the CPU, tile by tile: quadratic forms of 0/1 columns
// and matrix products. The derivation is in padkern/ops/kernel_products/README.md.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "mkmmd/mkmmd.h"

namespace padkern {

// k^power, its derivative by the squared distance d, or d times that derivative.
enum class KernelPart : int { kValue = 0, kSlope = 1, kSpread = 2 };

struct KernelSum {
  MkmmdKernel kernel = MkmmdKernel::kGaussian;
  const double* alphas = nullptr;
  const double* betas = nullptr;  // null: ones
  int64_t count = 0;
  const double* sigma_sq = nullptr;
};

struct KernelMatrix {
  const void* data = nullptr;  // [rows, columns] of the compute type
  int64_t rows = 0;
  int64_t row_stride = 0;  // strides count elements
  int64_t column_stride = 0;
};

// With x_p the columns of membership and k_ij without its diagonal: quadratic_p = x_p' k x_p,
// linear_p = x_p' k 1, row_sums = k 1.
struct KernelQuadraticParams {
  MkmmdDtype dtype = MkmmdDtype::kFloat32;  // kFloat32 or kFloat64
  KernelSum sum;
  KernelMatrix rows;  // of dim columns
  int64_t dim = 0;
  const uint8_t* membership = nullptr;  // [rows, columns], not 0 means member
  int64_t columns = 0;
  int64_t membership_row_stride = 0;
  int64_t membership_column_stride = 0;
  double* quadratic = nullptr;  // [columns]
  double* linear = nullptr;     // [columns]
  double* row_sums = nullptr;   // [rows]
};

// out = part(k(query, rows)) vectors.
struct KernelApplyParams {
  MkmmdDtype dtype = MkmmdDtype::kFloat32;
  KernelSum sum;
  KernelPart part = KernelPart::kValue;
  int power = 1;               // of the kernel sum: 1 or 2
  bool skip_diagonal = false;  // query and rows are the same points: leave pairs (i, i) out
  KernelMatrix query;
  KernelMatrix rows;
  KernelMatrix vectors;  // [rows, columns]
  int64_t dim = 0;
  int64_t columns = 0;
  double* out = nullptr;  // [query rows, columns], contiguous
};

// Column 0 holds the first `chosen` rows; column 1 + p a subset of that size drawn from seeds[p].
struct DrawMembershipsParams {
  const int64_t* seeds = nullptr;  // [count], contiguous
  int64_t count = 0;
  int64_t rows = 0;
  int64_t chosen = 0;
  uint8_t* out = nullptr;  // [rows, 1 + count], contiguous, of 0 and 1
};

Status kernel_quadratic_cpu(const KernelQuadraticParams& params);
Status kernel_apply_cpu(const KernelApplyParams& params);
Status draw_memberships_cpu(const DrawMembershipsParams& params);

}  // namespace padkern
