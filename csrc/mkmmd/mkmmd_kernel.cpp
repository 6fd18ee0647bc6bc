// Compiled once per instruction set (CMake: padkern_add_isa_kernel). No standard library, no static
// objects: the linker must have nothing here that a narrower CPU could be handed.
#include "mkmmd/mkmmd_kernel.h"

#include "common/simd.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {
namespace {

#define PADKERN_INLINE inline __attribute__((always_inline))

// Register tile: kRows x kVecs accumulators, kVecs loads and one broadcast must fit the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
constexpr int kVecs = 3;
#elif defined(__AVX2__)
constexpr int kRows = 4;
constexpr int kVecs = 3;
#else
constexpr int kRows = 4;
constexpr int kVecs = 2;
#endif
constexpr int kLd = kMkmmdBlockRows;  // leading dimension of a coefficient tile
constexpr int kStrip = 48;            // rows of a coefficient tile, so that it stays in L1

template <class T>
constexpr int kPanel = kVecs * Simd<T>::kLanes;

// c[i, :] (+)= sum_k a[i * row_step + k * depth_step] b[k * ldb, :]
template <class T, int ROWS, int VECS, int ROW_STEP, int DEPTH_STEP, bool ACCUMULATE>
PADKERN_INLINE void tile(int64_t depth, const T* a, const T* b, int64_t ldb, T* c, int64_t ldc) {
  constexpr int kLanes = Simd<T>::kLanes;
  Vec<T> sum[ROWS][VECS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v) {
      sum[i][v] = ACCUMULATE ? load(c + i * ldc + v * kLanes) : Vec<T>{};
    }
  }
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
    a += DEPTH_STEP;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v) store(c + i * ldc + v * kLanes, sum[i][v]);
  }
}

// Runs tile() over all rows, with a shorter tile for the remainder.
template <class T, int VECS, int ROW_STEP, int DEPTH_STEP, bool ACCUMULATE>
__attribute__((noinline)) void tile_rows(int64_t rows, int64_t depth, const T* a, const T* b,
                                         int64_t ldb, T* c, int64_t ldc) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    tile<T, kRows, VECS, ROW_STEP, DEPTH_STEP, ACCUMULATE>(depth, a + i * ROW_STEP, b, ldb,
                                                           c + i * ldc, ldc);
  }
  if (kRows == 8 && i + 4 <= rows) {
    tile<T, 4, VECS, ROW_STEP, DEPTH_STEP, ACCUMULATE>(depth, a + i * ROW_STEP, b, ldb, c + i * ldc,
                                                       ldc);
    i += 4;
  }
  for (; i < rows; ++i) {
    tile<T, 1, VECS, ROW_STEP, DEPTH_STEP, ACCUMULATE>(depth, a + i * ROW_STEP, b, ldb, c + i * ldc,
                                                       ldc);
  }
}

template <class T, int ROW_STEP, int DEPTH_STEP, bool ACCUMULATE>
PADKERN_INLINE void tile_columns(int vectors, int64_t rows, int64_t depth, const T* a, const T* b,
                                 int64_t ldb, T* c, int64_t ldc) {
  switch (vectors) {
    case 1:
      tile_rows<T, 1, ROW_STEP, DEPTH_STEP, ACCUMULATE>(rows, depth, a, b, ldb, c, ldc);
      break;
    case 2:
      tile_rows<T, 2, ROW_STEP, DEPTH_STEP, ACCUMULATE>(rows, depth, a, b, ldb, c, ldc);
      break;
    default:
      tile_rows<T, kVecs, ROW_STEP, DEPTH_STEP, ACCUMULATE>(rows, depth, a, b, ldb, c, ldc);
  }
}

// products[rows, dim] += coefficients x points[depth, dim], the columns cut into even groups.
template <class T, int ROW_STEP, int DEPTH_STEP>
PADKERN_INLINE void add_product(int64_t rows, int64_t depth, int64_t vectors, const T* coefficients,
                                const T* points, int64_t point_stride, T* products,
                                int64_t product_stride) {
  const int64_t groups = (vectors + kVecs - 1) / kVecs;
  int64_t first = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t last = vectors * (g + 1) / groups;
    const int64_t column = first * Simd<T>::kLanes;
    tile_columns<T, ROW_STEP, DEPTH_STEP, true>(static_cast<int>(last - first), rows, depth,
                                                coefficients, points + column, point_stride,
                                                products + column, product_stride);
    first = last;
  }
}

// Kernel sum and, with GRADIENT, slope-weighted sum at squared distance d.
// COUNT > 0: a ladder of COUNT terms; COUNT == 0: any terms.
template <class T, int COUNT, bool GRADIENT>
PADKERN_INLINE void kernel_terms(const MkmmdTerms<T>& terms, Vec<T> d, Vec<T>* kernel,
                                 Vec<T>* slope) {
  Vec<T> e = exp_nonpositive(d * terms.rate[0]);
  *kernel = e;
  if (GRADIENT) *slope = e;
  if (COUNT > 0) {
#pragma GCC unroll 8
    for (int u = 1; u < COUNT; ++u) {
      e = e * e;
      *kernel += e;
      if (GRADIENT) *slope += e * static_cast<T>(1 << u);
    }
    return;
  }
  for (int u = 1; u < terms.count; ++u) {
    if (terms.squarings[u] < 0) {
      e = exp_nonpositive(d * terms.rate[u]);
    } else {
      for (int s = 0; s < terms.squarings[u]; ++s) e = e * e;
    }
    *kernel += e;
    if (GRADIENT) *slope += e * terms.slope[u];
  }
}

// Turns Gram rows [first, first + rows) of block a against block b into coefficients, in place.
template <class T, int COUNT, bool GRADIENT>
__attribute__((noinline)) void coefficients(const MkmmdBlock<T>& a, const MkmmdBlock<T>& b,
                                            bool diagonal, int64_t first, int64_t rows,
                                            const MkmmdTerms<T>& terms, T factor, T* gram,
                                            T* column_sum, MkmmdPairSums* sums) {
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t vectors = (b.rows + kLanes - 1) / kLanes;
  alignas(64) T weights[kMkmmdBlockRows];
  for (int64_t j = 0; j < vectors * kLanes; ++j) weights[j] = b.weights[j];
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = first + i;
    T* line = gram + i * kLd;
    const T square = a.squares[row];
    const T weight = a.weights[row];
    const T scale = weight * factor;
    // A row is no pair with itself; its kernel value is known and added analytically.
    if (diagonal) weights[row] = T(0);
    Vec<T> kernel_sum = {};
    Vec<T> row_sum = {};
    Vec<T> spread = {};
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t j = v * kLanes;
      Vec<T> d = (load(b.squares + j) + square) - T(2) * load(line + j);
      const Vec<T> zero = {};
      d = d < zero ? zero : d;
      Vec<T> kernel, slope;
      kernel_terms<T, COUNT, GRADIENT>(terms, d, &kernel, &slope);
      const Vec<T> w = load(weights + j);
      kernel_sum += kernel * w;
      if (GRADIENT) {
        const Vec<T> c = slope * (w * scale);
        store(line + j, c);
        row_sum += c;
        spread += c * d;
        if (!diagonal) store(column_sum + j, load(column_sum + j) + c);
      }
    }
    if (diagonal) weights[row] = weight;
    sums->kernel += static_cast<double>(weight) * lane_sum<T>(kernel_sum);
    if (GRADIENT) {
      a.row_sum[row] += lane_sum<T>(row_sum);
      sums->spread += lane_sum<T>(spread);
    }
  }
}

template <class T, bool GRADIENT>
PADKERN_INLINE void coefficients_any(const MkmmdBlock<T>& a, const MkmmdBlock<T>& b, bool diagonal,
                                     int64_t first, int64_t rows, const MkmmdTerms<T>& terms,
                                     T factor, T* gram, T* column_sum, MkmmdPairSums* sums) {
  if (terms.ladder && terms.count == 5) {
    coefficients<T, 5, GRADIENT>(a, b, diagonal, first, rows, terms, factor, gram, column_sum,
                                 sums);
  } else if (terms.count == 1) {
    coefficients<T, 1, GRADIENT>(a, b, diagonal, first, rows, terms, factor, gram, column_sum,
                                 sums);
  } else {
    coefficients<T, 0, GRADIENT>(a, b, diagonal, first, rows, terms, factor, gram, column_sum,
                                 sums);
  }
}

template <class T>
void pair(const MkmmdBlock<T>& a, const MkmmdBlock<T>& b, bool diagonal, int64_t dim,
          int64_t point_stride, int64_t product_stride, const MkmmdTerms<T>& terms, T factor,
          bool gradient, MkmmdPairSums* sums) {
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr int kWidth = kPanel<T>;
  const int64_t vectors = (dim + kLanes - 1) / kLanes;
  alignas(64) T gram[kStrip * kLd];
  alignas(64) T column_sum[kMkmmdBlockRows] = {};
  sums->kernel = 0.0;
  sums->spread = 0.0;
  for (int64_t first = 0; first < a.rows; first += kStrip) {
    const int64_t rows = a.rows - first < kStrip ? a.rows - first : kStrip;
    for (int64_t j = 0; j < b.rows; j += kWidth) {
      const int64_t left = (b.rows - j + kLanes - 1) / kLanes;
      const int width = static_cast<int>(left < kVecs ? left : kVecs);
      // Panels of a start at multiples of kWidth; the rows of a strip may span several.
      for (int64_t i = 0; i < rows;) {
        const int64_t row = first + i;
        const int64_t inside = row % kWidth;
        int64_t count = kWidth - inside;
        if (count > rows - i) count = rows - i;
        tile_columns<T, 1, kWidth, false>(width, count, dim,
                                          a.panels + (row - inside) * dim + inside,
                                          b.panels + j * dim, kWidth, gram + i * kLd + j, kLd);
        i += count;
      }
    }
    if (!gradient) {
      coefficients_any<T, false>(a, b, diagonal, first, rows, terms, factor, gram, column_sum,
                                 sums);
      continue;
    }
    coefficients_any<T, true>(a, b, diagonal, first, rows, terms, factor, gram, column_sum, sums);
    add_product<T, kLd, 1>(rows, b.rows, vectors, gram, b.points, point_stride,
                           a.products + first * product_stride, product_stride);
    if (!diagonal) {
      add_product<T, 1, kLd>(b.rows, rows, vectors, gram, a.points + first * point_stride,
                             point_stride, b.products, product_stride);
    }
  }
  if (gradient && !diagonal) {
    for (int64_t j = 0; j < b.rows; ++j) b.row_sum[j] += static_cast<double>(column_sum[j]);
  }
}

template <class T>
void column_sums(const MkmmdSource<T>& source, int64_t dim, const double* origin, double* sums) {
  for (int64_t d = 0; d < dim; ++d) sums[d] = 0.0;
  for (int64_t i = 0; i < source.rows; ++i) {
    const double weight = static_cast<double>(source.weights[i]);
    if (weight == 0.0) continue;
    const T* row = source.data + i * source.row_stride;
    if (source.column_stride == 1) {
      for (int64_t d = 0; d < dim; ++d) {
        sums[d] += weight * (static_cast<double>(row[d]) - origin[d]);
      }
    } else {
      for (int64_t d = 0; d < dim; ++d) {
        sums[d] += weight * (static_cast<double>(row[d * source.column_stride]) - origin[d]);
      }
    }
  }
}

template <class T>
double pack(const MkmmdSource<T>& source, int64_t dim, int64_t point_stride, const double* origin,
            const double* mean, const MkmmdBlock<T>& block) {
  constexpr int kWidth = kPanel<T>;
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t padded = (block.rows + kWidth - 1) / kWidth * kWidth;
  double moment = 0.0;
  for (int64_t i = 0; i < block.rows; ++i) {
    T* point = block.points + i * point_stride;
    const T* row = source.data + i * source.row_stride;
    if (source.weights[i] == T(0)) {
      // Selected away, not multiplied away: a masked row may hold NaN.
      for (int64_t d = 0; d < point_stride; ++d) point[d] = T(0);
      block.squares[i] = T(0);
      continue;
    }
    if (source.column_stride == 1) {
      for (int64_t d = 0; d < dim; ++d) {
        point[d] = static_cast<T>((static_cast<double>(row[d]) - origin[d]) - mean[d]);
      }
    } else {
      for (int64_t d = 0; d < dim; ++d) {
        point[d] = static_cast<T>((static_cast<double>(row[d * source.column_stride]) - origin[d]) -
                                  mean[d]);
      }
    }
    for (int64_t d = dim; d < point_stride; ++d) point[d] = T(0);
    // Four independent chains: the compiler may not reorder a double sum on its own.
    double part[4] = {0.0, 0.0, 0.0, 0.0};
    int64_t d = 0;
    for (; d + 4 <= point_stride; d += 4) {
      for (int l = 0; l < 4; ++l) {
        const double value = static_cast<double>(point[d + l]);
        part[l] += value * value;
      }
    }
    for (; d < point_stride; ++d) {
      part[0] += static_cast<double>(point[d]) * static_cast<double>(point[d]);
    }
    const double square = (part[0] + part[1]) + (part[2] + part[3]);
    block.squares[i] = static_cast<T>(square);
    moment += static_cast<double>(source.weights[i]) * square;
  }
  for (int64_t i = block.rows; i < padded; ++i) block.squares[i] = T(0);
  // Transpose in squares of one vector width so that reads and writes both stay in cache.
  for (int64_t base = 0; base < padded; base += kWidth) {
    T* panel = block.panels + base * dim;
    for (int64_t d0 = 0; d0 < dim; d0 += kLanes) {
      const int64_t d1 = d0 + kLanes < dim ? d0 + kLanes : dim;
      for (int64_t i = 0; i < kWidth; ++i) {
        const bool inside = base + i < block.rows;
        const T* point = block.points + (inside ? base + i : 0) * point_stride;
        for (int64_t d = d0; d < d1; ++d) panel[d * kWidth + i] = inside ? point[d] : T(0);
      }
    }
  }
  return moment;
}

template <class T>
void finish(const MkmmdBlock<T>& block, int64_t dim, int64_t point_stride, int64_t product_stride,
            double scale, T* gradient) {
  for (int64_t i = 0; i < block.rows; ++i) {
    const double row_sum = block.row_sum[i];
    const T* point = block.points + i * point_stride;
    const T* product = block.products + i * product_stride;
    T* out = gradient + i * dim;  // may be the same memory as product, row by row
    for (int64_t d = 0; d < dim; ++d) {
      out[d] = static_cast<T>(
          scale * (static_cast<double>(point[d]) * row_sum - static_cast<double>(product[d])));
    }
  }
}

template <class T>
constexpr MkmmdKernels<T> kKernels = {
    Simd<T>::kLanes, kPanel<T>, column_sums<T>, pack<T>, pair<T>, finish<T>,
};

}  // namespace

const MkmmdKernels<float>& mkmmd_kernels_f32() { return kKernels<float>; }
const MkmmdKernels<double>& mkmmd_kernels_f64() { return kKernels<double>; }

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
