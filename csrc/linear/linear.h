// Linear maps of many short rows on the CPU: y = act(x W^T + b) and its gradients. A row's result
// does not depend on the other rows of a call, and no bit on the number of threads. The derivation
// is in padkern/ops/linear/README.md.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace padkern {

enum class LinearDtype : int { kFloat32 = 0, kFloat64 = 1 };

// Strides count elements; the last dimension of x, weight and d_y is dense, y and the gradients are
// dense altogether.
struct LinearParams {
  LinearDtype dtype = LinearDtype::kFloat32;
  int64_t rows = 0;
  int64_t in = 0;
  int64_t out = 0;
  bool relu = false;
  const void* x = nullptr;  // [rows, in]
  int64_t x_stride = 0;
  const void* weight = nullptr;  // [out, in]
  int64_t weight_stride = 0;
  const void* bias = nullptr;  // [out], or null
  void* y = nullptr;           // [rows, out]; read by the gradient when relu
  // The gradient alone. Each output may be null: it is then not computed.
  const void* d_y = nullptr;  // [rows, out]
  int64_t d_y_stride = 0;
  void* d_x = nullptr;       // [rows, in]
  void* d_weight = nullptr;  // [out, in]
  void* d_bias = nullptr;    // [out]
};

Status linear_cpu(const LinearParams& params);
Status linear_backward_cpu(const LinearParams& params);

}  // namespace padkern
