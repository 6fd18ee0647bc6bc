// Compiled once per instruction set (CMake: padkern_add_isa_kernel). No standard library, no static
// objects: the linker must have nothing here that a narrower CPU could be handed.
#include "mkmmd/mkmmd_kernel.h"

#include "common/gemm_tile.h"
#include "mkmmd/kernel_terms.h"
#include "mkmmd/mkmmd_rows.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {
namespace {

constexpr int kStrip = 48;  // rows whose Gram tile is turned into coefficients while in L1
// Columns up to which all panels of a block stay in the second-level cache while strips pass by.
constexpr int64_t kStripColumns = 256;

// Gram rows [first, first + rows) of block a, read from its points, against all rows of block b,
// read from its panels. The depth is taken in the groups of columns of the points: no more terms
// than a group has are rounded together, which matters where columns are equal, since each of their
// terms is rounded in the same direction.
template <class T>
PADKERN_INLINE void gram_strip(const MkmmdBlock<T>& a, const T* b_panels, int64_t b_rows,
                               int64_t first, int64_t rows, int64_t dim, int64_t point_stride,
                               T* strip) {
  constexpr int kWidth = kTileWidth<T>;
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr int kLd = kMkmmdTileStride<T>;
  const Groups groups(point_stride / kLanes);
  const int64_t panels = (b_rows + kWidth - 1) / kWidth;
  const int64_t steps = panels * groups.count;
  // With few columns a panel after the other, so that its tile stays in L1; with many a group after
  // the other, so that every operand is read once.
  const bool by_panel = dim <= kStripColumns;
  const auto panel_of = [&](int64_t step) {
    return by_panel ? step / groups.count : step % panels;
  };
  const auto group_of = [&](int64_t step) {
    return by_panel ? step % groups.count : step / panels;
  };
  const auto right_of = [&](int64_t step) {
    return b_panels + panel_of(step) * kWidth * dim +
           groups.first_vector(group_of(step)) * kLanes * kWidth;
  };
  // While a step runs, the next one's panel is fetched, and over all panels of a group the rows
  // that follow: those of the next group, or of the next strip.
  constexpr int64_t kTileBytes = kTileRows * static_cast<int64_t>(sizeof(T));
  const int64_t right_bytes = (kWidth * kTileBytes + rows - 1) / rows;
  const int64_t left_bytes = kTileBytes / panels;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t panel = panel_of(step), g = group_of(step);
    const int64_t column = groups.first_vector(g) * kLanes;
    const int group_vectors = static_cast<int>(groups.first_vector(g + 1) - groups.first_vector(g));
    const int64_t width = group_vectors * kLanes;
    const int64_t depth = width < dim - column ? width : dim - column;
    const int64_t j = panel * kWidth;
    const int64_t left = (b_rows - j + kLanes - 1) / kLanes;
    const int vectors = static_cast<int>(left < kTileVecs ? left : kTileVecs);
    const T* left_points = a.points + column * a.rows + first * width;
    const T* right = right_of(step);
    const T* next = step + 1 < steps ? right_of(step + 1) : b_panels;
    const T* later = left_points + rows * width + panel * (rows * width / panels);
    const Ahead ahead = {reinterpret_cast<const char*>(next), right_bytes,
                         reinterpret_cast<const char*>(later), left_bytes};
    T* c = strip + j;
#define PADKERN_GRAM(row_vectors)                                                               \
  if (group_vectors == row_vectors) {                                                           \
    if (g == 0) {                                                                               \
      tile_columns<T, row_vectors * kLanes, 1, false>(vectors, rows, depth, left_points, right, \
                                                      kWidth, c, kLd, ahead);                   \
    } else {                                                                                    \
      tile_columns<T, row_vectors * kLanes, 1, true>(vectors, rows, depth, left_points, right,  \
                                                     kWidth, c, kLd, ahead);                    \
    }                                                                                           \
  }
    PADKERN_GRAM(1)
    PADKERN_GRAM(2)
    if constexpr (kTileVecs == 3) PADKERN_GRAM(3)
#undef PADKERN_GRAM
  }
}

// One tile of pairs on its way from Gram products to coefficients.
template <class T>
struct Coefficients {
  const MkmmdBlock<T>& a;
  const MkmmdBlock<T>& b;
  const MkmmdTerms<T>& terms;
  const T* weights;  // of b, padded
  T factor;
  T* column_sum;  // null: not wanted
  MkmmdPairSums* sums;
};

// ROWS rows of the Gram tile, the first of them `row` of block a, become coefficients in place.
template <class T, TermPath PATH, bool GRADIENT, bool PER_TERM, int ROWS>
PADKERN_INLINE void coefficient_rows(const Coefficients<T>& in, int64_t row, T* gram) {
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr int kLd = kMkmmdTileStride<T>;
  const MkmmdTerms<T>& terms = in.terms;
  const int64_t vectors = (in.b.rows + kLanes - 1) / kLanes;
  const bool root = PATH == TermPath::kOther && is_root_kernel(terms.kernel);
  // Copies, because the stores below could change what a reference leads to.
  const T rate = -terms.inverse_scale[0];
  const T factor = in.factor;
  const T* b_squares = in.b.squares;
  const T* b_weights = in.weights;
  T* column_sum = in.column_sum;
  T row_square[ROWS], row_weight[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    row_square[i] = in.a.squares[row + i];
    row_weight[i] = in.a.weights[row + i];
  }
  Vec<T> kernel_sum = {};
  Vec<T> spread = {};
  Vec<T> row_sum[ROWS] = {};
  Vec<T> term_kernel[PER_TERM ? kMkmmdMaxKernels : 1];
  Vec<T> term_spread[PER_TERM ? kMkmmdMaxKernels : 1];
  if (PER_TERM) {
    for (int u = 0; u < terms.count; ++u) term_kernel[u] = term_spread[u] = Vec<T>{};
  }
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t j = v * kLanes;
    const Vec<T> squares = load(b_squares + j);
    const Vec<T> weights = load(b_weights + j);
    Vec<T> down = {};
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      T* line = gram + i * kLd + j;
      const Vec<T> d = squared_distance<T>(squares + row_square[i], load(line), root);
      // The factor may be too small for the type; the kernel's own sum goes without it.
      const Vec<T> w = weights * row_weight[i];
      Vec<T> kernel, slope;
      kernel_terms<T, PATH, GRADIENT>(terms, rate, d, &kernel, &slope);
      kernel_sum += kernel * w;
      if (GRADIENT) {
        const Vec<T> c = slope * (w * factor);
        store(line, c);
        row_sum[i] += c;
        spread += c * d;
        down += c;
      }
      if (PER_TERM) {
        each_term<T>(terms, d, [&](int u, Vec<T> value, Vec<T> h) {
          term_kernel[u] += value * w;
          term_spread[u] += h * (w * d);
        });
      }
    }
    if (GRADIENT && column_sum != nullptr) {
      store(column_sum + j, load(column_sum + j) + down);
    }
  }
  in.sums->kernel += lane_sum<T>(kernel_sum);
  if (GRADIENT) {
    for (int i = 0; i < ROWS; ++i) in.a.row_sum[row + i] += lane_sum<T>(row_sum[i]);
    in.sums->spread += lane_sum<T>(spread);
  }
  if (PER_TERM) {
    for (int u = 0; u < terms.count; ++u) {
      in.sums->terms_kernel[u] += static_cast<double>(in.factor) * lane_sum<T>(term_kernel[u]);
      in.sums->terms_spread[u] += static_cast<double>(in.factor) *
                                  static_cast<double>(terms.slope[u]) * lane_sum<T>(term_spread[u]);
    }
  }
}

// Turns Gram rows [first, first + rows) of block a against block b into coefficients, in place.
template <class T, TermPath PATH, bool GRADIENT, bool PER_TERM>
__attribute__((noinline)) void coefficients(const MkmmdBlock<T>& a, const MkmmdBlock<T>& b,
                                            bool diagonal, int64_t first, int64_t rows,
                                            const MkmmdTerms<T>& terms, T factor, T* gram,
                                            T* column_sum, MkmmdPairSums* sums) {
  constexpr int kLd = kMkmmdTileStride<T>;
  int64_t i = 0;
  if (diagonal) {
    // A row is no pair with itself; its kernel value is known and added analytically.
    alignas(64) T weights[kMkmmdBlockRows];
    for (int64_t j = 0; j < (b.rows + Simd<T>::kLanes - 1) / Simd<T>::kLanes * Simd<T>::kLanes; ++j)
      weights[j] = b.weights[j];
    for (; i < rows; ++i) {
      weights[first + i] = T(0);
      coefficient_rows<T, PATH, GRADIENT, PER_TERM, 1>(
          {a, b, terms, weights, factor, nullptr, sums}, first + i, gram + i * kLd);
      weights[first + i] = b.weights[first + i];
    }
    return;
  }
  const Coefficients<T> in = {a, b, terms, b.weights, factor, column_sum, sums};
  if (!PER_TERM && PATH != TermPath::kOther) {
    for (; i + 4 <= rows; i += 4) {
      coefficient_rows<T, PATH, GRADIENT, false, 4>(in, first + i, gram + i * kLd);
    }
  }
  for (; i < rows; ++i) {
    coefficient_rows<T, PATH, GRADIENT, PER_TERM, 1>(in, first + i, gram + i * kLd);
  }
}

template <class T, bool GRADIENT>
PADKERN_INLINE void coefficients_any(const MkmmdBlock<T>& a, const MkmmdBlock<T>& b, bool diagonal,
                                     int64_t first, int64_t rows, const MkmmdTerms<T>& terms,
                                     T factor, T* gram, T* column_sum, MkmmdPairSums* sums) {
#define PADKERN_COEFFICIENTS(path, per_term)                                                  \
  coefficients<T, path, GRADIENT, per_term>(a, b, diagonal, first, rows, terms, factor, gram, \
                                            column_sum, sums)
  if (GRADIENT && sums->terms_kernel != nullptr) {
    PADKERN_COEFFICIENTS(TermPath::kOther, GRADIENT);  // evaluates Gaussian terms as well
    return;
  }
  switch (term_path<T>(terms)) {
    case TermPath::kLadder5:
      PADKERN_COEFFICIENTS(TermPath::kLadder5, false);
      break;
    case TermPath::kSingle:
      PADKERN_COEFFICIENTS(TermPath::kSingle, false);
      break;
    case TermPath::kGaussian:
      PADKERN_COEFFICIENTS(TermPath::kGaussian, false);
      break;
    default:
      PADKERN_COEFFICIENTS(TermPath::kOther, false);
  }
#undef PADKERN_COEFFICIENTS
}

template <class T>
void pair(const MkmmdBlock<T>& a, const MkmmdBlock<T>& b, bool diagonal, int64_t dim,
          int64_t point_stride, const MkmmdTerms<T>& terms, T factor, bool gradient,
          const MkmmdScratch<T>& scratch, MkmmdPairSums* sums) {
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr int kLd = kMkmmdTileStride<T>;
  alignas(64) T column_sum[kMkmmdBlockRows] = {};
  const T* b_panels = b.panels;
  if (b_panels == nullptr) {
    transpose_panels<T>(b.points, b.rows, dim, point_stride, scratch.panels);
    b_panels = scratch.panels;
  }
  const int64_t strip_rows = dim <= kStripColumns || !gradient ? kStrip : a.rows;
  for (int64_t first = 0; first < a.rows; first += strip_rows) {
    const int64_t rows = a.rows - first < strip_rows ? a.rows - first : strip_rows;
    T* strip = scratch.tile + (gradient ? first * kLd : 0);
    gram_strip<T>(a, b_panels, b.rows, first, rows, dim, point_stride, strip);
    if (gradient) {
      coefficients_any<T, true>(a, b, diagonal, first, rows, terms, factor, strip, column_sum,
                                sums);
    } else {
      coefficients_any<T, false>(a, b, diagonal, first, rows, terms, factor, strip, column_sum,
                                 sums);
    }
  }
  if (!gradient) return;
  const Groups groups(point_stride / kLanes);
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t column = groups.first_vector(g) * kLanes;
    const int vectors = static_cast<int>(groups.first_vector(g + 1) - groups.first_vector(g));
    const int64_t width = vectors * kLanes;
    const T* left = a.points + column * a.rows;
    const T* right = b.points + column * b.rows;
    const int64_t step = width * static_cast<int64_t>(sizeof(T)) * kTileRows / a.rows + 1;
    const T* next = b.points + (column + width) * b.rows;
    tile_columns<T, kLd, 1, true>(vectors, a.rows, b.rows, scratch.tile, right, width,
                                  a.products + column * a.rows, width,
                                  {reinterpret_cast<const char*>(diagonal ? next : left), step});
    if (!diagonal) {
      tile_columns<T, 1, kLd, true>(vectors, b.rows, a.rows, scratch.tile, left, width,
                                    b.products + column * b.rows, width,
                                    {reinterpret_cast<const char*>(next), step});
    }
  }
  if (diagonal) return;
  for (int64_t j = 0; j < b.rows; ++j) b.row_sum[j] += static_cast<double>(column_sum[j]);
}

template <class T>
constexpr MkmmdKernels<T> kKernels = {
    Simd<T>::kLanes, kTileWidth<T>, read_double, column_sums<T>, pack<T>, pair<T>, finish<T>,
};

}  // namespace

const MkmmdKernels<float>& mkmmd_kernels_f32() { return kKernels<float>; }
const MkmmdKernels<double>& mkmmd_kernels_f64() { return kKernels<double>; }

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
