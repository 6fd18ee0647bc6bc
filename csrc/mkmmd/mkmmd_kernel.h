// What the per-instruction-set objects offer to the driver in mkmmd_cpu.cpp.
#pragma once

#include <cstdint>

namespace padkern {

constexpr int kMkmmdMaxTerms = 64;
constexpr int kMkmmdBlockRows = 96;  // most rows of a block; a multiple of every panel width

// sum_u exp(rate_u * d) in descending order of bandwidth. A term is the previous one squared
// squarings[u] times, or a new exponential when squarings[u] is -1.
template <class T>
struct MkmmdTerms {
  int count;
  bool ladder;  // every term after the first is the square of the one before it
  int squarings[kMkmmdMaxTerms];
  T rate[kMkmmdMaxTerms];
  T slope[kMkmmdMaxTerms];  // rate_u / rate_0
};

// Rows that are processed together; all pointers are into the workspace or the outputs.
template <class T>
struct MkmmdBlock {
  int64_t rows;
  T* panels;        // [ceil(rows / panel)][dim][panel]: centred points, transposed, zero padded
  T* points;        // [rows, point_stride]: centred points
  T* squares;       // [padded rows]: squared norms
  T* weights;       // [padded rows], zero on padding
  T* products;      // [rows, product_stride]: sum_j C_ij z_j
  double* row_sum;  // [rows]: sum_j C_ij
};

struct MkmmdPairSums {
  double kernel;  // sum over pairs of w_i w_j sum_u k_u
  double spread;  // sum over pairs of C_ij d_ij
};

template <class T>
struct MkmmdSource {
  const T* data;
  int64_t rows;
  int64_t row_stride;
  int64_t column_stride;
  const T* weights;  // packed weights of these rows
};

template <class T>
struct MkmmdKernels {
  int lanes;  // values in one vector
  int panel;  // rows of one panel

  // sums[d] = sum_i w_i (x_id - origin_d), rows of weight 0 skipped.
  void (*column_sums)(const MkmmdSource<T>& source, int64_t dim, const double* origin,
                      double* sums);
  // Centres and packs one block; returns sum_i w_i |z_i|^2.
  double (*pack)(const MkmmdSource<T>& source, int64_t dim, int64_t point_stride,
                 const double* origin, const double* mean, const MkmmdBlock<T>& block);
  // All pairs of two blocks, or the ordered pairs i != j of one (diagonal). With gradient, adds
  // C_ij = factor w_i w_j sum_u slope_u k_u to row_sum and C z to products, on both sides.
  void (*pair)(const MkmmdBlock<T>& a, const MkmmdBlock<T>& b, bool diagonal, int64_t dim,
               int64_t point_stride, int64_t product_stride, const MkmmdTerms<T>& terms, T factor,
               bool gradient, MkmmdPairSums* sums);
  // gradient = scale (z_i row_sum_i - products_i)
  void (*finish)(const MkmmdBlock<T>& block, int64_t dim, int64_t point_stride,
                 int64_t product_stride, double scale, T* gradient);
};

#define PADKERN_DECLARE_MKMMD_KERNELS(isa)         \
  namespace isa {                                  \
  const MkmmdKernels<float>& mkmmd_kernels_f32();  \
  const MkmmdKernels<double>& mkmmd_kernels_f64(); \
  }
PADKERN_DECLARE_MKMMD_KERNELS(baseline)
#if defined(__x86_64__)
PADKERN_DECLARE_MKMMD_KERNELS(avx2)
PADKERN_DECLARE_MKMMD_KERNELS(avx512)
#endif
#undef PADKERN_DECLARE_MKMMD_KERNELS

}  // namespace padkern
