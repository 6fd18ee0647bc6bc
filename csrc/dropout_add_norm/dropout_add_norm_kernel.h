// Boundary between the driver and the per-instruction-set objects.
#pragma once

#include <cstdint>

namespace padkern {

template <class T>
struct DropoutAddNormView {
  int64_t dim;
  double eps;
  bool drops;
  uint64_t seed;
  uint32_t step;
  uint32_t threshold;
  T keep_scale;
  const int64_t* token_ids;
  const T* weight;
  const T* x;
  int64_t x_stride;
  const T* residual;
  int64_t residual_stride;
  const T* bias;
  const T* shift;
  T* sum;
  T* out;
  T* stats;
  const T* d_out;
  int64_t d_out_stride;
  const T* d_sum;
  int64_t d_sum_stride;
  T* d_x;
  T* d_residual;
  bool want_bias;
};

template <class T>
struct DropoutAddNormKernels {
  // Elements of scratch that one worker needs.
  int64_t (*scratch_size)(int64_t dim);
  // Rows [first, last).
  void (*forward)(const DropoutAddNormView<T>& view, int64_t first, int64_t last, T* scratch);
  // The same; sums holds d_bias, d_weight and d_shift of these rows, [3, dim], every element
  // written.
  void (*backward)(const DropoutAddNormView<T>& view, int64_t first, int64_t last, T* scratch,
                   T* sums);
};

#define PADKERN_DECLARE_DROPOUT_ADD_NORM_KERNELS(isa)                  \
  namespace isa {                                                      \
  const DropoutAddNormKernels<float>& dropout_add_norm_kernels_f32();  \
  const DropoutAddNormKernels<double>& dropout_add_norm_kernels_f64(); \
  }
PADKERN_DECLARE_DROPOUT_ADD_NORM_KERNELS(baseline)
#if defined(__x86_64__)
PADKERN_DECLARE_DROPOUT_ADD_NORM_KERNELS(avx2)
PADKERN_DECLARE_DROPOUT_ADD_NORM_KERNELS(avx512)
#endif
#undef PADKERN_DECLARE_DROPOUT_ADD_NORM_KERNELS

}  // namespace padkern
