// MK-MMD on the CPU: value and gradient in one pass over unique pairs, O(N D) memory.
// The derivation is in padkern/ops/mkmmd/README.md.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace padkern {

// The first two are also compute types; kBool is for weights only.
enum class MkmmdDtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kBool = 4 };
// kCross: sum_ij w_i w_j k(s_i, t_j), neither normalised nor subtracted from anything.
enum class MkmmdEstimator : int { kUnbiased = 0, kBiased = 1, kTllib = 2, kCross = 3 };
// With d the squared distance and s = 2 alpha sigma_sq: exp(-d/s), exp(-sqrt(2d/s)),
// (1 + d/s)^(-1/2), 1/(1 + d/s), -sqrt(d).
enum class MkmmdKernel : int {
  kGaussian = 0,
  kLaplacian = 1,
  kInverseMultiquadric = 2,
  kRationalQuadratic = 3,
  kEnergy = 4
};

constexpr int kMkmmdMaxKernels = 64;

struct MkmmdSample {
  const void* data = nullptr;  // [rows, dim] of dtype
  MkmmdDtype dtype = MkmmdDtype::kFloat32;
  const void* weight = nullptr;  // [rows] of weight_dtype, or null for ones
  MkmmdDtype weight_dtype = MkmmdDtype::kFloat32;
  int64_t rows = 0;
  int64_t row_stride = 0;  // strides count elements
  int64_t column_stride = 0;
  int64_t weight_stride = 0;
  // [rows, dim] of compute type, rows gradient_stride apart; null when not wanted. A stride that is
  // a multiple of 16 spares the padded buffer that other widths need.
  void* gradient = nullptr;
  int64_t gradient_stride = 0;
};

struct MkmmdParams {
  MkmmdDtype dtype = MkmmdDtype::kFloat32;  // compute type, that of value and gradients
  MkmmdEstimator estimator = MkmmdEstimator::kUnbiased;
  MkmmdKernel kernel = MkmmdKernel::kGaussian;
  MkmmdSample source;
  MkmmdSample target;
  int64_t dim = 0;
  const double* alphas = nullptr;
  const double* betas = nullptr;  // weights of the kernels, or null for ones
  int64_t num_alphas = 0;
  const double* sigma_sq = nullptr;  // null: mean pairwise squared distance
  bool want_gradient = false;
  void* value = nullptr;              // scalar of dtype
  double* sigma_gradient = nullptr;   // scalar; written when want_gradient
  double* alphas_gradient = nullptr;  // [num_alphas] each, or null; need want_gradient
  double* betas_gradient = nullptr;
  void* workspace = nullptr;  // at least mkmmd_workspace_bytes, aligned to 64
  int64_t workspace_bytes = 0;
};

// Reads sizes, types and want_gradient only. Returns 0 when sizes are not positive or the
// instruction set cannot be chosen.
int64_t mkmmd_workspace_bytes(const MkmmdParams& params);

Status mkmmd_cpu(const MkmmdParams& params);

}  // namespace padkern
