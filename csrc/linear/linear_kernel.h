// Boundary between the driver and the per-instruction-set objects.
#pragma once

#include <cstdint>

namespace padkern {

// Rows that one task computes.
constexpr int64_t kLinearRows = 64;
// Terms that are rounded together; their sums are added to what is there.
constexpr int64_t kLinearDepth = 128;

template <class T>
struct LinearKernels {
  int64_t lanes;
  int64_t width;  // columns of a panel
  // Panels [ceil(columns / width), depth, width] of a matrix [depth, columns], or, transposed, of
  // [columns, depth]; columns beyond the last are 0.
  void (*pack)(const T* matrix, int64_t stride, int64_t depth, int64_t columns, bool transposed,
               T* panels);
  // out[rows, columns] = act(a[rows, depth] x panels + bias); bias (or null) reaches to the end of
  // the last panel. scratch: kLinearRows * width.
  void (*rows)(const T* a, int64_t a_stride, int64_t rows, int64_t depth, const T* panels,
               int64_t columns, const T* bias, bool relu, T* out, int64_t out_stride, T* scratch);
  // out[a_columns, b_columns] = a[rows, a_columns]^T x b[rows, b_columns], for at most width
  // columns of b; out and b_columns are rounded up to whole vectors. scratch: kLinearDepth * width.
  void (*product)(const T* a, int64_t a_stride, int64_t a_columns, const T* b, int64_t b_stride,
                  int64_t b_columns, int64_t rows, T* out, int64_t out_stride, T* scratch);
  // out = d_y where y > 0, else 0. Dense but for d_y's stride.
  void (*mask)(const T* d_y, int64_t d_y_stride, const T* y, int64_t rows, int64_t columns, T* out);
  // sums[c] += sum over rows of a[:, c].
  void (*column_sums)(const T* a, int64_t stride, int64_t rows, int64_t columns, double* sums);
  // out[i] = sum over parts of in[part * step + i].
  void (*merge)(const T* in, int64_t step, int64_t parts, int64_t count, T* out);
};

#define PADKERN_DECLARE_LINEAR_KERNELS(isa)          \
  namespace isa {                                    \
  const LinearKernels<float>& linear_kernels_f32();  \
  const LinearKernels<double>& linear_kernels_f64(); \
  }
PADKERN_DECLARE_LINEAR_KERNELS(baseline)
#if defined(__x86_64__)
PADKERN_DECLARE_LINEAR_KERNELS(avx2)
PADKERN_DECLARE_LINEAR_KERNELS(avx512)
#endif
#undef PADKERN_DECLARE_LINEAR_KERNELS

}  // namespace padkern
