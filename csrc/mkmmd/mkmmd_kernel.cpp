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

// Gram rows [first, first + rows) of block a against all rows of block b.
template <class T>
PADKERN_INLINE void gram_strip(const T* a_panels, const T* b_panels, int64_t b_rows, int64_t first,
                               int64_t rows, int64_t dim, T* tile_rows_out) {
  constexpr int kWidth = kTileWidth<T>;
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr int kLd = kMkmmdTileStride<T>;
  // Each column panel is fetched while the one before it is used by rows / kTileRows tiles.
  const int64_t step = (kWidth * static_cast<int64_t>(sizeof(T)) * kTileRows + rows - 1) / rows;
  for (int64_t k = 0; k < dim; k += kGramDepth) {
    const int64_t depth = dim - k < kGramDepth ? dim - k : kGramDepth;
    for (int64_t j = 0; j < b_rows; j += kWidth) {
      const int64_t left = (b_rows - j + kLanes - 1) / kLanes;
      const int vectors = static_cast<int>(left < kTileVecs ? left : kTileVecs);
      const T* b = b_panels + j * dim + k * kWidth;
      const T* next = j + kWidth < b_rows ? b + kWidth * dim : b_panels + (k + depth) * kWidth;
      for (int64_t i = 0; i < rows; i += kWidth) {
        const int64_t count = rows - i < kWidth ? rows - i : kWidth;
        const T* a = a_panels + (first + i) * dim + k * kWidth;
        T* c = tile_rows_out + i * kLd + j;
        const Ahead ahead = {reinterpret_cast<const char*>(next) + i / kTileRows * depth * step,
                             step};
        if (k == 0) {
          tile_columns<T, 1, kWidth, false>(vectors, count, depth, a, b, kWidth, c, kLd, ahead);
        } else {
          tile_columns<T, 1, kWidth, true>(vectors, count, depth, a, b, kWidth, c, kLd, ahead);
        }
      }
    }
  }
}

// Turns Gram rows [first, first + rows) of block a against block b into coefficients, in place.
template <class T, TermPath PATH, bool GRADIENT, bool PER_TERM>
__attribute__((noinline)) void coefficients(const MkmmdBlock<T>& a, const MkmmdBlock<T>& b,
                                            bool diagonal, int64_t first, int64_t rows,
                                            const MkmmdTerms<T>& terms, T factor, T* gram,
                                            T* column_sum, MkmmdPairSums* sums) {
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr int kLd = kMkmmdTileStride<T>;
  const int64_t vectors = (b.rows + kLanes - 1) / kLanes;
  const bool root = PATH == TermPath::kOther && is_root_kernel(terms.kernel);
  alignas(64) T weights[kMkmmdBlockRows];
  Vec<T> term_kernel[PER_TERM ? kMkmmdMaxKernels : 1];
  Vec<T> term_spread[PER_TERM ? kMkmmdMaxKernels : 1];
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
    if (PER_TERM) {
      for (int u = 0; u < terms.count; ++u) term_kernel[u] = term_spread[u] = Vec<T>{};
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t j = v * kLanes;
      const Vec<T> d = squared_distance<T>(load(b.squares + j) + square, load(line + j), root);
      const Vec<T> w = load(weights + j);
      Vec<T> kernel, slope;
      kernel_terms<T, PATH, GRADIENT>(terms, d, &kernel, &slope);
      kernel_sum += kernel * w;
      if (GRADIENT) {
        const Vec<T> c = slope * (w * scale);
        store(line + j, c);
        row_sum += c;
        spread += c * d;
        if (!diagonal) store(column_sum + j, load(column_sum + j) + c);
      }
      if (PER_TERM) {
        each_term<T>(terms, d, [&](int u, Vec<T> value, Vec<T> h) {
          term_kernel[u] += value * w;
          term_spread[u] += h * (w * d);
        });
      }
    }
    if (diagonal) weights[row] = weight;
    sums->kernel += static_cast<double>(weight) * lane_sum<T>(kernel_sum);
    if (GRADIENT) {
      a.row_sum[row] += lane_sum<T>(row_sum);
      sums->spread += lane_sum<T>(spread);
    }
    if (PER_TERM) {
      for (int u = 0; u < terms.count; ++u) {
        sums->terms_kernel[u] += static_cast<double>(scale) * lane_sum<T>(term_kernel[u]);
        sums->terms_spread[u] += static_cast<double>(scale) * static_cast<double>(terms.slope[u]) *
                                 lane_sum<T>(term_spread[u]);
      }
    }
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
  const T* a_panels = a.panels;
  const T* b_panels = b.panels;
  if (a_panels == nullptr) {
    transpose_panels<T>(a.points, a.rows, dim, point_stride, scratch.panels[0]);
    a_panels = b_panels = scratch.panels[0];
    if (!diagonal) {
      transpose_panels<T>(b.points, b.rows, dim, point_stride, scratch.panels[1]);
      b_panels = scratch.panels[1];
    }
  }
  for (int64_t first = 0; first < a.rows; first += kStrip) {
    const int64_t rows = a.rows - first < kStrip ? a.rows - first : kStrip;
    T* strip = scratch.tile + (gradient ? first * kLd : 0);
    gram_strip<T>(a_panels, b_panels, b.rows, first, rows, dim, strip);
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
