// Register-tiled matrix products for the per-instruction-set objects. Included only by sources that
// CMake compiles once per instruction set.
#pragma once

#include "common/simd.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {

#define PADKERN_INLINE inline __attribute__((always_inline))

// Register tile: kTileRows x kTileVecs accumulators, kTileVecs loads and one broadcast must fit the
// registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8;
constexpr int kTileVecs = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 4;
constexpr int kTileVecs = 3;
#else
constexpr int kTileRows = 4;
constexpr int kTileVecs = 2;
#endif

// Values in the widest tile row.
template <class T>
constexpr int kTileWidth = kTileVecs * Simd<T>::kLanes;

// Two places that later products will read, fetched while this one computes: `step` and `also_step`
// bytes per unit of depth, spread over all tiles of the product. Operands come from the last-level
// cache otherwise, one demand miss at a time.
struct Ahead {
  const char* next = nullptr;
  int64_t step = 0;
  const char* also = nullptr;
  int64_t also_step = 0;
};

// c[i, :] (+)= sum_k a[i * ROW_STEP + k * DEPTH_STEP] b[k * ldb, :]. The sum is taken on its own
// and added to c last, so that rounding grows with the depth of one call, not with what c holds.
template <class T, int ROWS, int VECS, int ROW_STEP, int DEPTH_STEP, bool ACCUMULATE>
PADKERN_INLINE void tile(int64_t depth, const T* a, const T* b, int64_t ldb, T* c, int64_t ldc,
                         Ahead* ahead) {
  constexpr int kLanes = Simd<T>::kLanes;
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v) __builtin_prefetch(c + i * ldc + v * kLanes, 1);
  }
  const char* fetch = ahead->next;
  const char* also = ahead->also;
  Vec<T> sum[ROWS][VECS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[VECS];
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const T left = a[i * ROW_STEP];
#pragma GCC unroll 3
      for (int v = 0; v < VECS; ++v) sum[i][v] += left * right[v];
    }
    __builtin_prefetch(fetch, 0, 2);
    fetch += ahead->step;
    __builtin_prefetch(also, 0, 2);
    also += ahead->also_step;
    a += DEPTH_STEP;
    b += ldb;
  }
  ahead->next = fetch;
  ahead->also = also;
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v) {
      T* out = c + i * ldc + v * kLanes;
      store(out, ACCUMULATE ? load(out) + sum[i][v] : sum[i][v]);
    }
  }
}

// Runs tile() over all rows, with a shorter tile for the remainder.
template <class T, int VECS, int ROW_STEP, int DEPTH_STEP, bool ACCUMULATE>
__attribute__((noinline)) void tile_rows(int64_t rows, int64_t depth, const T* a, const T* b,
                                         int64_t ldb, T* c, int64_t ldc, Ahead ahead) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    tile<T, kTileRows, VECS, ROW_STEP, DEPTH_STEP, ACCUMULATE>(depth, a + i * ROW_STEP, b, ldb,
                                                               c + i * ldc, ldc, &ahead);
  }
  if (kTileRows == 8 && i + 4 <= rows) {
    tile<T, 4, VECS, ROW_STEP, DEPTH_STEP, ACCUMULATE>(depth, a + i * ROW_STEP, b, ldb, c + i * ldc,
                                                       ldc, &ahead);
    i += 4;
  }
  for (; i < rows; ++i) {
    tile<T, 1, VECS, ROW_STEP, DEPTH_STEP, ACCUMULATE>(depth, a + i * ROW_STEP, b, ldb, c + i * ldc,
                                                       ldc, &ahead);
  }
}

// c[rows, vectors * lanes] (+)= a x b for 1 <= vectors <= kTileVecs.
template <class T, int ROW_STEP, int DEPTH_STEP, bool ACCUMULATE>
PADKERN_INLINE void tile_columns(int vectors, int64_t rows, int64_t depth, const T* a, const T* b,
                                 int64_t ldb, T* c, int64_t ldc, Ahead ahead = {}) {
  switch (vectors) {
    case 1:
      tile_rows<T, 1, ROW_STEP, DEPTH_STEP, ACCUMULATE>(rows, depth, a, b, ldb, c, ldc, ahead);
      break;
    case 2:
      tile_rows<T, 2, ROW_STEP, DEPTH_STEP, ACCUMULATE>(rows, depth, a, b, ldb, c, ldc, ahead);
      break;
    default:
      tile_rows<T, kTileVecs, ROW_STEP, DEPTH_STEP, ACCUMULATE>(rows, depth, a, b, ldb, c, ldc,
                                                                ahead);
  }
}

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
