// Compiled once per instruction set (CMake: padkern_add_isa_kernel). No standard library, no static
// objects: the linker must have nothing here that a narrower CPU could be handed.
#include "ranking/ranking_kernel.h"

#include "common/gemm_tile.h"
#include "common/simd.h"
#include "ranking/ranking_rows.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {
namespace {

// Rows whose scores are computed before they are counted: few, so that the tile stays in L1.
constexpr int64_t kStripRows = 64;
// Users whose targets are scored together, to hide the latency of the sums.
constexpr int kTogether = 8;

template <class T>
void pack_items(const T* matrix, int64_t stride, const int64_t* order, int64_t count, int64_t dim,
                int64_t first, int64_t last, T* panels) {
  constexpr int64_t kWidth = kTileWidth<T>;
  for (int64_t p = first; p < last; ++p) {
    T* panel = panels + p * kWidth * dim;
    for (int64_t base = 0; base < kWidth; base += 4) {
      const int64_t position = p * kWidth + base;
      T* out = panel + base;
      int64_t id[4];
      bool plain = position + 4 <= count;
      for (int i = 0; i < 4; ++i) {
        const int64_t place = position + i < count ? position + i : count - 1;
        id[i] = order != nullptr ? order[place] : place + 1;
        plain = plain && id[i] == id[0] + i;
      }
      int64_t d = 0;
      if (plain) {
        const T* in = matrix + id[0] * stride;
        for (; d + 4 <= dim; d += 4) transpose4<T>(in + d, stride, out + d * kWidth, kWidth);
      }
      for (; d < dim; ++d) {
        for (int i = 0; i < 4; ++i) {
          out[d * kWidth + i] = position + i < count ? matrix[id[i] * stride + d] : T(0);
        }
      }
    }
  }
}

template <class T>
void pack_users(const T* states, int64_t stride, const int64_t* users, int64_t rows, int64_t dim,
                T* points) {
  const RankDepths depths(dim);
  for (int64_t i = 0; i < rows; ++i) {
    const T* in = states + users[i] * stride;
    for (int64_t g = 0; g < depths.count; ++g) {
      T* out = points + (g * rows + i) * kRankDepth;
      const int64_t begin = depths.first(g), size = depths.first(g + 1) - begin;
      for (int64_t d = 0; d < size; ++d) out[d] = in[begin + d];
    }
  }
}

template <class T>
T largest(const T* values, int64_t count) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  Vec<T> most = {}, nan = {};  // an infinity times 0 is NaN too
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec<T> value = load(values + i);
    const Vec<T> size = value < T(0) ? -value : value;
    most = size > most ? size : most;
    nan += value * T(0);
  }
  T result = T(0);
  bool odd = false;
  for (int l = 0; l < kLanes; ++l) {
    if (most[l] > result) result = most[l];
    odd = odd || nan[l] != nan[l];
  }
  for (; i < count; ++i) {
    const T size = values[i] < T(0) ? -values[i] : values[i];
    if (size > result) result = size;
    odd = odd || values[i] * T(0) != T(0);
  }
  return odd ? static_cast<T>(__builtin_nan("")) : result;
}

// sum + a b, rounded as in the tiles: once where the instruction set can. Left to the compiler, a
// loop over columns may be vectorised into products and a chain of additions, which round twice.
PADKERN_INLINE float add_product(float sum, float a, float b) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, sum);
#else
  return sum + a * b;
#endif
}

PADKERN_INLINE double add_product(double sum, double a, double b) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, sum);
#else
  return sum + a * b;
#endif
}

// Every score is a sum of its groups' sums, each of which is added up column by column: here, in
// every lane of every tile, and for any number of rows. Equal vectors so have equal scores.
template <class T>
void target_scores(const T* states, int64_t state_stride, const T* matrix, int64_t matrix_stride,
                   const int64_t* targets, int64_t dim, int64_t first, int64_t last, T* scores) {
  const RankDepths depths(dim);
  for (int64_t user = first; user < last; user += kTogether) {
    const T *left[kTogether], *right[kTogether];
    for (int64_t j = 0; j < kTogether; ++j) {
      const int64_t own = user + j < last ? user + j : last - 1;
      left[j] = states + own * state_stride;
      right[j] = matrix + targets[own] * matrix_stride;
    }
    T total[kTogether];
    for (int64_t g = 0; g < depths.count; ++g) {
      T sum[kTogether] = {};
      for (int64_t d = depths.first(g); d < depths.first(g + 1); ++d) {
#pragma GCC unroll 8
        for (int j = 0; j < kTogether; ++j) sum[j] = add_product(sum[j], left[j][d], right[j][d]);
      }
      for (int j = 0; j < kTogether; ++j) total[j] = g == 0 ? sum[j] : total[j] + sum[j];
    }
    for (int64_t j = 0; j < kTogether && user + j < last; ++j) scores[user + j] = total[j];
  }
}

template <class T, int VECS>
void finish(const RankTask<T>& in, int64_t first, int64_t last, int64_t start, int64_t width) {
  if (in.targets == nullptr) {
    finish_rows<T, VECS, false, true>(in, first, last, start, width);
  } else if (in.tops == nullptr) {
    finish_rows<T, VECS, true, false>(in, first, last, start, width);
  } else {
    finish_rows<T, VECS, true, true>(in, first, last, start, width);
  }
}

template <class T>
void run(const RankTask<T>& task) {
  constexpr int64_t kWidth = kTileWidth<T>;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  using Bits = typename Simd<T>::Bits;
  Bits* counters = static_cast<Bits*>(task.counters);
  for (int64_t i = 0; i < task.rows; ++i) counters[i] = Bits{};
  for (int64_t i = 0; i < task.rows; ++i) task.greater[i] = task.equal[i] = task.nans[i] = 0;
  const RankDepths depths(task.items.dim);
  const int64_t panel_size = kWidth * task.items.dim;
  // While a panel is multiplied, the next one comes nearer.
  const int64_t fetch = (kWidth * static_cast<int64_t>(sizeof(T)) * kTileRows + task.rows - 1) /
                        (task.rows > 0 ? task.rows : 1);
  for (int64_t p = task.first_panel; p < task.last_panel; ++p) {
    const T* panel = task.items.panels + p * panel_size;
    const T* next = p + 1 < task.last_panel ? panel + panel_size : panel;
    const int64_t start = p * kWidth;
    const int64_t left = task.items.count - start;
    const int64_t width = left < kWidth ? left : kWidth;
    const int vectors = static_cast<int>((width + kLanes - 1) / kLanes);
    for (int64_t first = 0; first < task.rows; first += kStripRows) {
      const int64_t last = first + kStripRows < task.rows ? first + kStripRows : task.rows;
      T* tile = task.tile + first * kWidth;
      for (int64_t g = 0; g < depths.count; ++g) {
        const int64_t begin = depths.first(g), depth = depths.first(g + 1) - begin;
        const T* points = task.points + (g * task.rows + first) * kRankDepth;
        const char* ahead = reinterpret_cast<const char*>(next + begin * kWidth) +
                            first / kTileRows * depth * fetch;
        if (g == 0) {
          tile_columns<T, kRankDepth, 1, false>(vectors, last - first, depth, points,
                                                panel + begin * kWidth, kWidth, tile, kWidth,
                                                {ahead, fetch});
        } else {
          tile_columns<T, kRankDepth, 1, true>(vectors, last - first, depth, points,
                                               panel + begin * kWidth, kWidth, tile, kWidth,
                                               {ahead, fetch});
        }
      }
      if (vectors == 1) finish<T, 1>(task, first, last, start, width);
      if (vectors == 2) finish<T, 2>(task, first, last, start, width);
      if constexpr (kTileVecs == 3) {
        if (vectors == 3) finish<T, 3>(task, first, last, start, width);
      }
    }
  }
  for (int64_t i = 0; i < task.rows; ++i) {
    for (int l = 0; l < kLanes; ++l) task.greater[i] += static_cast<int64_t>(counters[i][l]);
  }
}

template <class T>
constexpr RankKernels<T> kKernels = {
    Simd<T>::kLanes, kTileWidth<T>,    pack_items<T>, pack_users<T>,
    largest<T>,      target_scores<T>, run<T>,
};

}  // namespace

const RankKernels<float>& rank_kernels_f32() { return kKernels<float>; }
const RankKernels<double>& rank_kernels_f64() { return kKernels<double>; }

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
