// What the per-instruction-set objects offer to the driver.
#pragma once

#include <cstdint>

#include "mkmmd/mkmmd.h"
#include "mkmmd/mkmmd_terms.h"

namespace padkern {

constexpr int kMkmmdBlockRows = 192;  // most rows of a block; a multiple of every panel width

// Rows of a block in the compute type at most, and leading dimension of a tile of coefficients. The
// latter is an odd number of cache lines, so that a column of the tile spreads over the cache.
template <class T>
constexpr int kMkmmdTileRows = sizeof(T) == 4 ? kMkmmdBlockRows : kMkmmdBlockRows / 2;
template <class T>
constexpr int kMkmmdTileStride = kMkmmdTileRows<T> + 16;

// Rows that are processed together; all pointers are into the workspace or the outputs. Points and
// products are cut into groups of columns, each [rows, width] contiguous (MkmmdKernels::groups).
template <class T>
struct MkmmdBlock {
  int64_t rows;
  T* panels;    // [ceil(rows / panel)][dim][panel]: points, transposed, zero padded; may be null
  T* points;    // centred points
  T* squares;   // [padded rows]: squared norms
  T* weights;   // [padded rows], zero on padding
  T* products;  // sum_j C_ij z_j
  double* row_sum;  // [rows]: sum_j C_ij
};

struct MkmmdPairSums {
  double kernel;  // sum over pairs of w_i w_j sum_u beta_u k_u
  double spread;  // sum over pairs of C_ij d_ij
  // Per term, with the pair's factor: sums of k_u and of slope_u h_u d. Null: not wanted.
  double* terms_kernel;
  double* terms_spread;
};

struct MkmmdRows {
  const void* data;  // of dtype
  MkmmdDtype dtype;
  int64_t rows;
  int64_t row_stride;
  int64_t column_stride;
};

// What one worker needs for itself.
template <class T>
struct MkmmdScratch {
  T* tile;      // [kMkmmdTileRows, kMkmmdTileStride]
  T* row;       // [point_stride]
  T* panels;    // [padded rows, dim], used when blocks have no panels
  T* products;  // [block rows, point_stride]
};

template <class T>
struct MkmmdKernels {
  int lanes;  // values in one vector
  int panel;  // rows of one panel

  // One row in double precision.
  void (*read)(const MkmmdRows& source, int64_t index, int64_t dim, double* row);
  // sums[d] = sum_i w_i (x_id - origin_d), rows of weight 0 skipped.
  void (*column_sums)(const MkmmdRows& source, const T* weights, int64_t dim, const double* origin,
                      T* row, double* sums);
  // Centres and packs one block; returns sum_i w_i |z_i|^2.
  double (*pack)(const MkmmdRows& source, int64_t dim, int64_t point_stride, const double* origin,
                 const double* mean, const MkmmdScratch<T>& scratch, const MkmmdBlock<T>& block);
  // All pairs of two blocks, or the ordered pairs i != j of one (diagonal). With gradient, adds
  // C_ij = factor w_i w_j sum_u slope_u h_u to row_sum and C z to products, on both sides.
  void (*pair)(const MkmmdBlock<T>& a, const MkmmdBlock<T>& b, bool diagonal, int64_t dim,
               int64_t point_stride, const MkmmdTerms<T>& terms, T factor, bool gradient,
               const MkmmdScratch<T>& scratch, MkmmdPairSums* sums);
  // gradient = scale (z_i row_sum_i - products_i), row-major; gradient may be where products are.
  void (*finish)(const MkmmdBlock<T>& block, int64_t dim, int64_t point_stride, double scale,
                 const MkmmdScratch<T>& scratch, T* gradient, int64_t gradient_stride);
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
