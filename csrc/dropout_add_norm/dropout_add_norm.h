// Residual sum with keyed dropout, and its layer normalisation, on the CPU. The derivation is in
// padkern/ops/dropout_add_norm/README.md.
#pragma once

#include <cstdint>

#include "common/dropout.h"
#include "common/status.h"

namespace padkern {

enum class DropoutAddNormDtype : int { kFloat32 = 0, kFloat64 = 1 };

// Forward: sum = residual + drop(x + bias), out = (sum - mean) / sqrt(var + eps) * weight + shift.
// Backward: from d_out (or null) and d_sum (or null) to d_x, d_residual and the three channel sums.
struct DropoutAddNormParams {
  DropoutAddNormDtype dtype = DropoutAddNormDtype::kFloat32;
  int64_t rows = 0;
  int64_t dim = 0;
  double eps = 0.0;  // forward only: backward reads the saved deviations
  DropoutParams dropout;
  const int64_t* token_ids = nullptr;  // [rows], or null for 0, 1, 2, ...
  const void* weight = nullptr;        // [dim], dense; null: no normalisation
  // Forward. Row strides count elements; rows are dense.
  const void* x = nullptr;
  int64_t x_stride = 0;
  const void* residual = nullptr;  // or null
  int64_t residual_stride = 0;
  const void* bias = nullptr;   // [dim] or null
  const void* shift = nullptr;  // [dim], with weight
  void* sum = nullptr;          // [rows, dim] or null when nobody wants it
  void* out = nullptr;          // [rows, dim], with weight
  void* stats = nullptr;        // [rows, 2] mean and reciprocal deviation, or null
  // Backward, which reads sum and stats.
  const void* d_out = nullptr;
  int64_t d_out_stride = 0;
  const void* d_sum = nullptr;
  int64_t d_sum_stride = 0;
  void* d_x = nullptr;         // [rows, dim], or null when it would equal d_residual
  void* d_residual = nullptr;  // [rows, dim]
  void* d_bias = nullptr;      // [dim] or null
  void* d_weight = nullptr;    // [dim], with weight
  void* d_shift = nullptr;     // [dim], with weight
};

Status dropout_add_norm_cpu(const DropoutAddNormParams& params);
Status dropout_add_norm_backward_cpu(const DropoutAddNormParams& params);

}  // namespace padkern
