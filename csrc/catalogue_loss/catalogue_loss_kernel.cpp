// Compiled once per instruction set (CMake: padkern_add_isa_kernel). No standard library, no static
// objects: the linker must have nothing here that a narrower CPU could be handed.
#include "catalogue_loss/catalogue_loss_kernel.h"

#include "common/gemm_tile.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {
namespace {

constexpr int64_t kLd = kCatalogueTokens;
// Terms of a logit that are rounded together: where columns are equal, all in the same direction.
constexpr int64_t kSumDepth = 68;

// What is subtracted from logits: their maximum, 0 where they are all -Inf.
template <class T>
PADKERN_INLINE Vec<T> finite_top(Vec<T> top) {
  const Vec<T> zero = {};
  return top == T(-__builtin_inf()) ? zero : top;
}

template <class T>
void pack_rows(const T* rows, int64_t stride, const int64_t* ids, int64_t first, int64_t count,
               int64_t dim, int64_t capacity, T* out) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  constexpr int64_t kRow = kCatalogueRow<T>;
  const int64_t parts = row_parts(dim, kRow);
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t left = dim - p * kRow, used = left < kRow ? left : kRow;
    const int64_t padded = (used + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = 0; i < capacity; ++i) {
      T* to = out + (p * capacity + i) * kRow;
      int64_t d = 0;
      if (i < count) {
        const T* from = rows + (ids == nullptr ? first + i : ids[first + i]) * stride + p * kRow;
        for (; d + kLanes <= used; d += kLanes) store(to + d, load(from + d));
        for (; d < used; ++d) to[d] = from[d];
      }
      for (; d < padded; ++d) to[d] = T(0);
    }
  }
}

template <class T>
void pack_panels(const T* packed, int64_t dim, T* panels) {
  constexpr int64_t kWidth = kTileWidth<T>;
  constexpr int64_t kRow = kCatalogueRow<T>;
  static_assert(kCatalogueTokens % kWidth == 0 && kWidth % 4 == 0, "panels cover the tokens");
  for (int64_t t = 0; t < kCatalogueTokens; t += 4) {
    T* panel = panels + t / kWidth * kWidth * dim + t % kWidth;
    for (int64_t p = 0; p * kRow < dim; ++p) {
      const T* in = packed + (p * kCatalogueTokens + t) * kRow;
      const int64_t left = dim - p * kRow, used = left < kRow ? left : kRow;
      T* out = panel + p * kRow * kWidth;
      int64_t d = 0;
      for (; d + 4 <= used; d += 4) transpose4<T>(in + d, kRow, out + d * kWidth, kWidth);
      for (; d < used; ++d) {
        for (int i = 0; i < 4; ++i) out[d * kWidth + i] = in[i * kRow + d];
      }
    }
  }
}

template <class T>
void logits(const T* items, int64_t count, const T* panels, int64_t vectors, int64_t dim,
            const T* bias, const int64_t* ids, int64_t first, T* tile) {
  constexpr int64_t kWidth = kTileWidth<T>;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  constexpr int64_t kRow = kCatalogueRow<T>;
  for (int64_t v = 0; v < vectors; v += kTileVecs) {
    const int some = static_cast<int>(vectors - v < kTileVecs ? vectors - v : kTileVecs);
    const T* b = panels + v * kLanes * dim;
    T* c = tile + v * kLanes;
    if (dim == 0) tile_columns<T, kRow, 1, false>(some, count, 0, items, b, kWidth, c, kLd);
    for (int64_t d = 0, depth; d < dim; d += depth) {
      const int64_t part = d / kRow, within = d % kRow;
      const int64_t end = (part + 1) * kRow < dim ? (part + 1) * kRow : dim;
      depth = end - d < kSumDepth ? end - d : kSumDepth;
      const T* a = items + part * kCatalogueItems * kRow + within;
      if (d == 0) {
        tile_columns<T, kRow, 1, false>(some, count, depth, a, b, kWidth, c, kLd);
      } else {
        tile_columns<T, kRow, 1, true>(some, count, depth, a, b + d * kWidth, kWidth, c, kLd);
      }
    }
  }
  if (bias == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    const T b = bias[ids == nullptr ? first + i : ids[first + i]];
    T* row = tile + i * kLd;
    for (int64_t v = 0; v < vectors; ++v) store(row + v * kLanes, load(row + v * kLanes) + b);
  }
}

// VECS vectors of tokens side by side, from one pass for the maximum and one for the exponentials.
template <class T, int VECS>
PADKERN_INLINE bool exponentials_of(T* tile, int64_t count, T* top, double* mass, T* factor) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  Vec<T> high[VECS], sum[VECS] = {};
#pragma GCC unroll 4
  for (int v = 0; v < VECS; ++v) high[v] = load(top + v * kLanes);
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      const Vec<T> z = load(tile + i * kLd + v * kLanes);
      high[v] = z > high[v] ? z : high[v];  // a NaN is passed over here and shows in the sum
    }
  }
  Vec<T> shift[VECS];
#pragma GCC unroll 4
  for (int v = 0; v < VECS; ++v) {
    shift[v] = finite_top<T>(high[v]);
    store(factor + v * kLanes, exp_or_zero<T>(load(top + v * kLanes) - shift[v]));
    store(top + v * kLanes, high[v]);
  }
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      T* at = tile + i * kLd + v * kLanes;
      const Vec<T> e = exp_or_zero<T>(load(at) - shift[v]);
      store(at, e);
      sum[v] += e;
    }
  }
  bool changed = false;
  for (int v = 0; v < VECS; ++v) {
    T sums[kLanes];
    store(sums, sum[v]);
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t t = v * kLanes + l;
      mass[t] = mass[t] * static_cast<double>(factor[t]) + static_cast<double>(sums[l]);
      changed |= factor[t] != T(1);
    }
  }
  return changed;
}

template <class T>
bool exponentials(T* tile, int64_t count, int64_t vectors, T* top, double* mass, T* factor) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  bool changed = false;
  int64_t v = 0;
  for (; v + 3 <= vectors; v += 3) {
    const int64_t t = v * kLanes;
    changed |= exponentials_of<T, 3>(tile + t, count, top + t, mass + t, factor + t);
  }
  for (; v < vectors; ++v) {
    const int64_t t = v * kLanes;
    changed |= exponentials_of<T, 1>(tile + t, count, top + t, mass + t, factor + t);
  }
  return changed;
}

// c (+)= a x b for all columns of packed rows b.
template <class T, int ROW_STEP, int DEPTH_STEP, bool ACCUMULATE>
PADKERN_INLINE void times_packed(int64_t rows, int64_t depth, const T* a, const T* packed,
                                 int64_t capacity, int64_t dim, T* c, int64_t ldc) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  constexpr int64_t kRow = kCatalogueRow<T>;
  for (int64_t p = 0; p * kRow < dim; ++p) {
    const int64_t left = dim - p * kRow, used = left < kRow ? left : kRow;
    const int64_t vectors = (used + kLanes - 1) / kLanes;
    const int64_t groups = (vectors + kTileVecs - 1) / kTileVecs;
    for (int64_t g = 0; g < groups; ++g) {
      // Even groups: a last one of a single vector would run at a third of the rate.
      const int64_t v = vectors * g / groups, next = vectors * (g + 1) / groups;
      tile_columns<T, ROW_STEP, DEPTH_STEP, ACCUMULATE>(static_cast<int>(next - v), rows, depth, a,
                                                        packed + p * capacity * kRow + v * kLanes,
                                                        kRow, c + p * kRow + v * kLanes, ldc);
    }
  }
}

template <class T>
void state_sums(const T* tile, int64_t count, const T* items, int64_t tokens, int64_t dim,
                bool fresh, const T* factor, T* sums, int64_t sums_stride) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  if (fresh) {
    times_packed<T, 1, kLd, false>(tokens, count, tile, items, kCatalogueItems, dim, sums,
                                   sums_stride);
    return;
  }
  if (factor != nullptr) {
    for (int64_t t = 0; t < tokens; ++t) {
      if (factor[t] == T(1)) continue;
      T* row = sums + t * sums_stride;
      for (int64_t d = 0; d < sums_stride; d += kLanes) store(row + d, load(row + d) * factor[t]);
    }
  }
  times_packed<T, 1, kLd, true>(tokens, count, tile, items, kCatalogueItems, dim, sums,
                                sums_stride);
}

template <class T>
void scales(const T* block_top, const T* top, const T* weight, int64_t vectors, T* out) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  for (int64_t t = 0; t < vectors * kLanes; t += kLanes) {
    store(out + t, exp_or_zero<T>(load(block_top + t) - load(top + t)) * load(weight + t));
  }
}

template <class T>
PADKERN_INLINE Vec<T> without_subnormal(Vec<T> x) {
  const Vec<T> zero = {};
  return x < T(sizeof(T) == 4 ? 1.2e-38 : 2.3e-308) ? zero : x;
}

template <class T>
void residuals(T* tile, int64_t count, int64_t vectors, const T* top, const T* scale,
               double* row_sum) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  for (int64_t i = 0; i < count; ++i) {
    T* row = tile + i * kLd;
    Vec<T> sum = {};
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t t = v * kLanes;
      Vec<T> e = load(row + t);
      if (top != nullptr) e = exp_or_zero<T>(e - load(top + t));
      e = without_subnormal<T>(e * load(scale + t));
      store(row + t, e);
      sum += e;
    }
    if (row_sum != nullptr) row_sum[i] += lane_sum<T>(sum);
  }
}

template <class T>
void item_sums(const T* tile, int64_t count, const T* states, int64_t tokens, int64_t dim,
               bool fresh, T* sums, int64_t sums_stride) {
  if (fresh) {
    times_packed<T, kLd, 1, false>(count, tokens, tile, states, kCatalogueTokens, dim, sums,
                                   sums_stride);
  } else {
    times_packed<T, kLd, 1, true>(count, tokens, tile, states, kCatalogueTokens, dim, sums,
                                  sums_stride);
  }
}

template <class T>
void add_row(const T* in, int64_t dim, bool fresh, T* out) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t d = 0;
  if (fresh) {
    for (; d + kLanes <= dim; d += kLanes) store(out + d, load(in + d));
    for (; d < dim; ++d) out[d] = in[d];
    return;
  }
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load(out + d) + load(in + d));
  for (; d < dim; ++d) out[d] += in[d];
}

template <class T>
void merge(const T* sums, int64_t stride, const T* factor, int64_t count, const T* row, T weight,
           int64_t dim, T* out) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    Vec<T> sum = {};
    for (int64_t s = 0; s < count; ++s) sum += load(sums + s * stride + d) * factor[s];
    store(out + d, sum - load(row + d) * weight);
  }
  for (; d < dim; ++d) {
    T sum = T(0);
    for (int64_t s = 0; s < count; ++s) sum += sums[s * stride + d] * factor[s];
    out[d] = sum - row[d] * weight;
  }
}

template <class T>
constexpr CatalogueKernels<T> kKernels = {
    Simd<T>::kLanes, pack_rows<T>, pack_panels<T>, logits<T>,  exponentials<T>, state_sums<T>,
    scales<T>,       residuals<T>, item_sums<T>,   add_row<T>, merge<T>,
};

}  // namespace

const CatalogueKernels<float>& catalogue_kernels_f32() { return kKernels<float>; }
const CatalogueKernels<double>& catalogue_kernels_f64() { return kKernels<double>; }

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
