// What the per-instruction-set objects offer to the driver in ranking_run.h.
#pragma once

#include <cstdint>

namespace padkern {

// A user's dot products are added up over groups of at most so many columns; also the distance of
// packed user rows.
constexpr int64_t kRankDepth = 192;

// The cut of the columns into groups, even, and by their number alone.
struct RankDepths {
  int64_t dim;
  int64_t count;

  explicit RankDepths(int64_t dim_in)
      : dim(dim_in), count(dim_in > 0 ? (dim_in + kRankDepth - 1) / kRankDepth : 1) {}
  int64_t first(int64_t group) const { return dim * group / count; }
};

// Ends every list of masked positions.
constexpr int32_t kRankNoPosition = 0x7fffffff;

template <class T>
struct RankItems {
  const T* panels;       // [panels, dim, width], zeros beyond the last item
  const int64_t* order;  // item id of every position; null: position + 1
  int64_t count;         // items, and so positions
  int64_t dim;
};

// The best items of a user so far: a heap whose root is the worst of them.
template <class T>
struct RankTop {
  T* scores;
  int32_t* ids;
  int64_t size;
};

// Some users against some panels. Arrays hold one entry per row.
template <class T>
struct RankTask {
  RankItems<T> items;
  int64_t first_panel;
  int64_t last_panel;
  int64_t rows;
  const T* points;         // [groups, rows, kRankDepth]
  const T* targets;        // scores of the targets; null: nothing is counted
  const int32_t** masked;  // next masked position of the row: ascending, without repeats
  const int32_t* own;      // masked for the counts only; -1: no such position
  bool count_nans;         // whether a score may be NaN
  int64_t* greater;        // written, like the next two
  int64_t* equal;
  int64_t* nans;
  RankTop<T>** tops;  // null: no best items
  int64_t top_k;
  T* tile;         // [rows, width] scratch
  void* counters;  // [rows, vector] scratch
};

template <class T>
struct RankKernels {
  int64_t lanes;
  int64_t width;  // items in a panel
  // Panels [first, last) from the item matrix.
  void (*pack_items)(const T* matrix, int64_t stride, const int64_t* order, int64_t count,
                     int64_t dim, int64_t first, int64_t last, T* panels);
  // The states of `rows` users into points.
  void (*pack_users)(const T* states, int64_t stride, const int64_t* users, int64_t rows,
                     int64_t dim, T* points);
  // Largest absolute value; NaN if one is not finite.
  T (*largest)(const T* values, int64_t count);
  // Scores of users [first, last) for their targets, added up as in run.
  void (*target_scores)(const T* states, int64_t state_stride, const T* matrix,
                        int64_t matrix_stride, const int64_t* targets, int64_t dim, int64_t first,
                        int64_t last, T* scores);
  void (*run)(const RankTask<T>& task);
};

#define PADKERN_DECLARE_RANK_KERNELS(isa)        \
  namespace isa {                                \
  const RankKernels<float>& rank_kernels_f32();  \
  const RankKernels<double>& rank_kernels_f64(); \
  }
PADKERN_DECLARE_RANK_KERNELS(baseline)
#if defined(__x86_64__)
PADKERN_DECLARE_RANK_KERNELS(avx2)
PADKERN_DECLARE_RANK_KERNELS(avx512)
#endif
#undef PADKERN_DECLARE_RANK_KERNELS

}  // namespace padkern
