// What the per-instruction-set objects offer to the driver in catalogue_loss_run.h.
#pragma once

#include <cstdint>

namespace padkern {

// A tile of logits holds kCatalogueItems rows, one per item, of kCatalogueTokens columns, one per
// token: statistics of a token then are columns, which vectors of tokens take without crossing
// lanes.
constexpr int64_t kCatalogueTokens = 96;  // a multiple of every tile width
constexpr int64_t kCatalogueItems = 128;

// Row of packed states and item vectors: an odd number of cache lines, so that equal columns of
// neighbouring rows never share a cache set. Longer rows are cut into parts of this length.
template <class T>
constexpr int64_t kCatalogueRow = 17 * 64 / static_cast<int64_t>(sizeof(T));

inline int64_t row_parts(int64_t dim, int64_t row) { return dim == 0 ? 1 : (dim + row - 1) / row; }

// Packed rows: part p of row i starts at (p * capacity + i) * kCatalogueRow, zero beyond `dim`.
template <class T>
struct CatalogueKernels {
  int lanes;
  // Rows first .. first + count of `rows`, or those of the ids at `ids + first`; the others up to
  // capacity are zero.
  void (*pack_rows)(const T* rows, int64_t stride, const int64_t* ids, int64_t first, int64_t count,
                    int64_t dim, int64_t capacity, T* out);
  // Transposes packed states for logits().
  void (*pack_panels)(const T* packed, int64_t dim, T* panels);
  // Logits of `count` packed items and the tokens of `vectors` vectors, with bias[ids[i]] added
  // where bias is given (bias[first + i] without ids).
  void (*logits)(const T* items, int64_t count, const T* panels, int64_t vectors, int64_t dim,
                 const T* bias, const int64_t* ids, int64_t first, T* tile);
  // Logits become exp(logit - top), with `top` raised to their maximum and `mass` rescaled and
  // added to. factor: what sums under the former top have to be multiplied with. Whether any
  // factor differs from 1.
  bool (*exponentials)(T* tile, int64_t count, int64_t vectors, T* top, double* mass, T* factor);
  // sums[t, :] = sums[t, :] factor[t] + sum_i tile[i, t] item_i, or without the first term.
  void (*state_sums)(const T* tile, int64_t count, const T* items, int64_t tokens, int64_t dim,
                     bool fresh, const T* factor, T* sums, int64_t sums_stride);
  // out = exp(block_top - top) weight of the tokens of `vectors` vectors.
  void (*scales)(const T* block_top, const T* top, const T* weight, int64_t vectors, T* out);
  // tile[i, t] *= scale[t]; with `top`, tile[i, t] = exp(tile[i, t] - top[t]) scale[t]. row_sum,
  // where given, gets the sum of every row over `tokens` columns added.
  void (*residuals)(T* tile, int64_t count, int64_t vectors, const T* top, const T* scale,
                    double* row_sum);
  // sums[i, :] (+)= sum_t tile[i, t] state_t over packed states.
  void (*item_sums)(const T* tile, int64_t count, const T* states, int64_t tokens, int64_t dim,
                    bool fresh, T* sums, int64_t sums_stride);
  // out[0, dim) (+)= in.
  void (*add_row)(const T* in, int64_t dim, bool fresh, T* out);
  // out[d] = sum_s factor[s] sums[s * stride + d] - weight row[d].
  void (*merge)(const T* sums, int64_t stride, const T* factor, int64_t count, const T* row,
                T weight, int64_t dim, T* out);
};

namespace baseline {
const CatalogueKernels<float>& catalogue_kernels_f32();
const CatalogueKernels<double>& catalogue_kernels_f64();
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
const CatalogueKernels<float>& catalogue_kernels_f32();
const CatalogueKernels<double>& catalogue_kernels_f64();
}  // namespace avx2
namespace avx512 {
const CatalogueKernels<float>& catalogue_kernels_f32();
const CatalogueKernels<double>& catalogue_kernels_f64();
}  // namespace avx512
#endif

}  // namespace padkern
