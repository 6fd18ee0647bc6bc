// MK-MMD on the CPU: value and gradient in one pass over unique pairs, O(N D) memory.
// The derivation is in padkern/ops/mkmmd/README.md.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace padkern {

enum class MkmmdDtype : int { kFloat32 = 0, kFloat64 = 1 };
enum class MkmmdEstimator : int { kUnbiased = 0, kBiased = 1, kTllib = 2 };

constexpr int kMkmmdMaxKernels = 64;

struct MkmmdSample {
  const void* data = nullptr;    // [rows, dim] of dtype
  const void* weight = nullptr;  // [rows] of dtype, or null for ones
  int64_t rows = 0;
  int64_t row_stride = 0;  // strides count elements
  int64_t column_stride = 0;
  int64_t weight_stride = 0;
  void* gradient = nullptr;  // [rows, dim] of dtype, contiguous; null when no gradient is wanted
};

struct MkmmdParams {
  MkmmdDtype dtype = MkmmdDtype::kFloat32;
  MkmmdEstimator estimator = MkmmdEstimator::kUnbiased;
  MkmmdSample source;
  MkmmdSample target;
  int64_t dim = 0;
  const double* alphas = nullptr;
  int64_t num_alphas = 0;
  const double* sigma_sq = nullptr;  // null: mean pairwise squared distance
  bool want_gradient = false;
  void* value = nullptr;             // scalar of dtype
  double* sigma_gradient = nullptr;  // scalar; written when want_gradient
  void* workspace = nullptr;         // at least mkmmd_workspace_bytes, aligned to 64
  int64_t workspace_bytes = 0;
};

// Returns 0 when sizes are not positive or the instruction set cannot be chosen.
int64_t mkmmd_workspace_bytes(MkmmdDtype dtype, int64_t source_rows, int64_t target_rows,
                              int64_t dim, bool want_gradient);

Status mkmmd_cpu(const MkmmdParams& params);

}  // namespace padkern
