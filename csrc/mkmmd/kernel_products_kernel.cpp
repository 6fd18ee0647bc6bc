// Compiled once per instruction set (CMake: padkern_add_isa_kernel). No standard library, no static
// objects: the linker must have nothing here that a narrower CPU could be handed.
#include "mkmmd/kernel_products_kernel.h"

#include "common/gemm_tile.h"
#include "common/simd.h"
#include "mkmmd/kernel_terms.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {
namespace {

constexpr int kN = kProductRows;
// Depth of one step of the Gram product: two panels of this depth stay near the core, and no more
// terms than this are rounded together (equal columns are rounded in the same direction).
constexpr int64_t kDepth = 32;
// Vectors of columns whose subset sums fit a lane, and what they are flushed after.
constexpr int kLaneVectors = 21;

template <class T>
using Bits = typename Simd<T>::Bits;

// A vector in memory that belongs to an array of words.
template <class T>
PADKERN_INLINE Bits<T> load_bits(const Word<T>* p) {
  typedef Word<T> Unaligned
      __attribute__((vector_size(sizeof(Bits<T>)), aligned(sizeof(Word<T>)), may_alias));
  return *reinterpret_cast<const Unaligned*>(p);
}

template <class T>
PADKERN_INLINE void store_bits(Word<T>* p, Bits<T> v) {
  typedef Word<T> Unaligned
      __attribute__((vector_size(sizeof(Bits<T>)), aligned(sizeof(Word<T>)), may_alias));
  *reinterpret_cast<Unaligned*>(p) = v;
}

// out[i, j] = a_i . b_j for rows [first_row, first_row + rows) of one block's panels and `vectors`
// vectors of another's. Every product is a sum over the same steps of depth in the same order,
// wherever its rows stand: equal rows have equal products.
template <class T>
void gram_part(const T* a, int64_t first_row, int64_t rows, const T* b, int64_t first_column,
               int vectors, int64_t dim, T* out) {
  constexpr int kWidth = kTileWidth<T>;
  const T* left = a + first_row / kWidth * kWidth * dim + first_row % kWidth;
  const T* right = b + first_column / kWidth * kWidth * dim + first_column % kWidth;
  const int64_t depth = dim < kDepth ? dim : kDepth;
  tile_columns<T, 1, kWidth, false>(vectors, rows, depth, left, right, kWidth, out, kN);
  for (int64_t d = kDepth; d < dim; d += kDepth) {
    tile_columns<T, 1, kWidth, true>(vectors, rows, dim - d < kDepth ? dim - d : kDepth,
                                     left + d * kWidth, right + d * kWidth, kWidth, out, kN);
  }
}

template <class T>
void gram(const ProductBlock<T>& a, const ProductBlock<T>& b, int64_t dim, T* out) {
  constexpr int kWidth = kTileWidth<T>;
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t j = 0; j < b.rows; j += kWidth) {
    const int64_t left = (b.rows - j + kLanes - 1) / kLanes;
    const int vectors = static_cast<int>(left < kTileVecs ? left : kTileVecs);
    for (int64_t i = 0; i < a.rows; i += kWidth) {
      const int64_t rows = a.rows - i < kWidth ? a.rows - i : kWidth;
      gram_part(a.panels, i, rows, b.panels, j, vectors, dim, out + i * kN + j);
    }
  }
}

template <class T>
void pack(const T* data, int64_t rows, int64_t row_stride, int64_t column_stride, int64_t dim,
          const double* origin, const double* mean, T* panels, T* squares) {
  constexpr int kWidth = kTileWidth<T>;
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t i = 0; i < kN; ++i) {
    T* panel = panels + i / kWidth * kWidth * dim + i % kWidth;
    const T* row = data + i * row_stride;
    for (int64_t d = 0; d < dim; ++d) {
      panel[d * kWidth] =
          i < rows
              ? static_cast<T>((static_cast<double>(row[d * column_stride]) - origin[d]) - mean[d])
              : T(0);
    }
  }
  // Norms are products like any other, so that equal rows have the distance 0 exactly. Four times
  // the largest norm, which bounds a distance, must be finite.
  const T limit = (sizeof(T) == 4 ? T(3.4028234663852886e38) : T(1.7976931348623157e308)) / T(8);
  alignas(64) T products[kLanes * kN];
  for (int64_t i = 0; i < kN; ++i) squares[i] = T(0);
  for (int64_t first = 0; first < rows; first += kLanes) {
    const int64_t count = rows - first < kLanes ? rows - first : kLanes;
    gram_part(panels, first, count, panels, first, 1, dim, products);
    for (int64_t l = 0; l < count; ++l) {
      const T square = products[l * kN + l];
      squares[first + l] = square <= limit ? square : static_cast<T>(__builtin_nan(""));
    }
  }
}

template <class T, TermPath PATH, bool SLOPE>
__attribute__((noinline)) void terms_in_place(const ProductBlock<T>& a, const ProductBlock<T>& b,
                                              const MkmmdTerms<T>& terms, bool spread, int power,
                                              T* tile) {
  constexpr int kLanes = Simd<T>::kLanes;
  const bool root = PATH == TermPath::kOther && is_root_kernel(terms.kernel);
  const T rate = -terms.inverse_scale[0];
  for (int64_t i = 0; i < a.rows; ++i) {
    const T square = a.squares[i];
    T* line = tile + i * kN;
    for (int64_t j = 0; j < b.rows; j += kLanes) {
      const Vec<T> squares = load(b.squares + j) + square;
      const Vec<T> d = squared_distance<T>(squares, load(line + j), root);
      Vec<T> kernel, slope;
      kernel_terms<T, PATH, SLOPE>(terms, rate, d, &kernel, &slope);
      if (SLOPE) {
        Vec<T> out = slope * rate;
        if (power == 2) out *= T(2) * kernel;
        store(line + j, spread ? out * d : out);
      } else {
        store(line + j, power == 2 ? kernel * kernel : kernel);
      }
    }
  }
}

template <class T, bool SLOPE>
void terms_any(const ProductBlock<T>& a, const ProductBlock<T>& b, const MkmmdTerms<T>& terms,
               bool spread, int power, T* tile) {
  switch (term_path<T>(terms)) {
    case TermPath::kLadder5:
      return terms_in_place<T, TermPath::kLadder5, SLOPE>(a, b, terms, spread, power, tile);
    case TermPath::kSingle:
      return terms_in_place<T, TermPath::kSingle, SLOPE>(a, b, terms, spread, power, tile);
    case TermPath::kGaussian:
      return terms_in_place<T, TermPath::kGaussian, SLOPE>(a, b, terms, spread, power, tile);
    default:
      return terms_in_place<T, TermPath::kOther, SLOPE>(a, b, terms, spread, power, tile);
  }
}

template <class T>
void kernel_tile(const ProductBlock<T>& a, const ProductBlock<T>& b, int64_t dim,
                 const MkmmdTerms<T>& terms, KernelPart part, int power, T* tile) {
  gram(a, b, dim, tile);
  if (part == KernelPart::kValue) {
    terms_any<T, false>(a, b, terms, false, power, tile);
  } else {
    terms_any<T, true>(a, b, terms, part == KernelPart::kSpread, power, tile);
  }
}

template <class T>
T fix(const T* tile, int64_t rows, int64_t columns, bool upper, T scale, Word<T>* fixed,
      int64_t* row_sums, int64_t* column_sums) {
  constexpr int kLanes = Simd<T>::kLanes;
  using Lane = decltype(Vec<T>{} < Vec<T>{});  // signed integers
  // Adding 1.5 x 2^(mantissa bits) leaves the rounded value in the low bits.
  const T magic = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);
  const Vec<T> magics = Vec<T>{} + magic;
  const Bits<T> magic_bits = reinterpret_cast<Bits<T>>(magics);
  Lane lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  const Lane end = Lane{} + static_cast<SignedWord<T>>(columns);
  Bits<T> down[kN / 2] = {};  // kN / kLanes vectors; two lanes are the fewest
  Vec<T> largest = {};
  for (int64_t i = 0; i < kN; ++i) {
    Word<T>* line = fixed + i * kN;
    const Lane begin = Lane{} + static_cast<SignedWord<T>>(upper ? i + 1 : 0);
    Bits<T> across = {};
    for (int64_t v = 0; v < kN / kLanes; ++v) {
      Bits<T> value = {};
      if (i < rows) {
        const Lane j = lane + static_cast<SignedWord<T>>(v * kLanes);
        const Lane kept = (j >= begin) & (j < end);
        const Vec<T> zero = {};
        const Vec<T> k = kept ? load(tile + i * kN + v * kLanes) : zero;
        const Vec<T> magnitude = k < zero ? -k : k;
        largest = magnitude > largest ? magnitude : largest;
        value = reinterpret_cast<Bits<T>>(k * scale + magic) - magic_bits;
      }
      store_bits<T>(line + v * kLanes, value);
      across += value;
      down[v] += value;
    }
    // A row of 48 values cannot leave the range of a lane.
    Word<T> sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += across[l];
    row_sums[i] = static_cast<SignedWord<T>>(sum);
  }
  for (int64_t j = 0; j < kN; ++j) {
    const Word<T> sum = down[j / kLanes][j % kLanes];
    column_sums[j] = static_cast<SignedWord<T>>(sum);
  }
  T most = T(0);
  for (int l = 0; l < kLanes; ++l) most = largest[l] > most ? largest[l] : most;
  return most;
}

// table[g][s] = sum of the rows of group g whose bit is set in s, for one vector of columns.
template <class T>
PADKERN_INLINE void build_table(const Word<T>* fixed, Word<T>* table) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int g = 0; g < kSubsetGroups; ++g) {
    Word<T>* entry = table + g * (1 << kSubsetBits) * kLanes;
    store_bits<T>(entry, Bits<T>{});
    for (int bit = 0; bit < kSubsetBits; ++bit) {
      const Bits<T> row = load_bits<T>(fixed + (g * kSubsetBits + bit) * kN);
      const int half = 1 << bit;
      for (int s = 0; s < half; ++s) {
        store_bits<T>(entry + (half + s) * kLanes, load_bits<T>(entry + s * kLanes) + row);
      }
    }
  }
}

template <class T>
__attribute__((noinline)) void look_up(const Word<T>* table, const uint64_t* a, const uint64_t* b,
                                       int shift, int64_t count, Word<T>* lanes) {
  constexpr int kLanes = Simd<T>::kLanes;
  constexpr uint64_t kMask = (1 << kSubsetBits) - 1;
  Bits<T> lane_bit;
  for (int l = 0; l < kLanes; ++l) lane_bit[l] = Word<T>(1) << l;
  const Bits<T> zero = {};
  for (int64_t p = 0; p < count; ++p) {
    const uint64_t rows = a[p];
    Bits<T> even = {}, odd = {};
#pragma GCC unroll 8
    for (int g = 0; g < kSubsetGroups; ++g) {
      const uint64_t subset = (rows >> (g * kSubsetBits)) & kMask;
      const Bits<T> sum = load_bits<T>(table + ((g << kSubsetBits) + subset) * kLanes);
      if (g % 2 == 0) {
        even += sum;
      } else {
        odd += sum;
      }
    }
    const Word<T> columns = static_cast<Word<T>>(b[p] >> shift);
    const Bits<T> sum = (lane_bit & columns) != zero ? even + odd : zero;
    store_bits<T>(lanes + p * kLanes, load_bits<T>(lanes + p * kLanes) + sum);
  }
}

template <class T>
void subsets(const Word<T>* fixed, int64_t tiles, const uint64_t* a, const uint64_t* b,
             int64_t b_stride, int64_t count, Word<T>* table, Word<T>* lanes, int64_t* sums) {
  constexpr int kLanes = Simd<T>::kLanes;
  const auto flush = [&] {
    for (int64_t p = 0; p < count; ++p) {
      int64_t sum = 0;
      for (int l = 0; l < kLanes; ++l) {
        sum += static_cast<SignedWord<T>>(lanes[p * kLanes + l]);
        lanes[p * kLanes + l] = 0;
      }
      sums[p] += sum;
    }
  };
  for (int64_t p = 0; p < count; ++p) sums[p] = 0;
  for (int64_t k = 0; k < count * kLanes; ++k) lanes[k] = 0;
  int pending = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    for (int v = 0; v < kN / kLanes; ++v) {
      if (pending == kLaneVectors) {
        flush();
        pending = 0;
      }
      build_table<T>(fixed + t * kProductTile + v * kLanes, table);
      look_up<T>(table, a, b + t * b_stride, v * kLanes, count, lanes);
      ++pending;
    }
  }
  flush();
}

template <class T>
void product(const T* tile, int64_t rows, int64_t depth, const T* vectors, int64_t columns,
             T* scratch, double* out) {
  constexpr int kLanes = Simd<T>::kLanes;
  for (int64_t c = 0; c < columns; c += kTileWidth<T>) {
    const int64_t left = (columns - c) / kLanes;
    tile_columns<T, kN, 1, false>(static_cast<int>(left < kTileVecs ? left : kTileVecs), rows,
                                  depth, tile, vectors + c, columns, scratch + c, columns);
  }
  for (int64_t k = 0; k < rows * columns; ++k) out[k] += static_cast<double>(scratch[k]);
}

void words(const uint8_t* membership, int64_t rows, int64_t row_stride, int64_t column_stride,
           int64_t count, uint64_t* out) {
  for (int64_t p = 0; p < count; ++p) out[p] = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const uint8_t* row = membership + i * row_stride;
    if (column_stride == 1) {
      for (int64_t p = 0; p < count; ++p) out[p] |= static_cast<uint64_t>(row[p] != 0) << i;
    } else {
      for (int64_t p = 0; p < count; ++p) {
        out[p] |= static_cast<uint64_t>(row[p * column_stride] != 0) << i;
      }
    }
  }
}

// Selection sampling: row i is taken with probability (still to choose) / (rows still to come). The
// numbers are those of the SplitMix64 generator, one stream per subset.
void draw(const int64_t* seeds, int64_t count, int64_t rows, int64_t chosen, int64_t stride,
          uint8_t* out) {
  constexpr int kLanes = Simd<double>::kLanes;
  using Lanes = Bits<double>;
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  alignas(64) uint64_t state[kDrawPanel];
  alignas(64) double open[kDrawPanel];  // still to choose
  alignas(64) uint8_t taken[kDrawPanel];
  for (int p = 0; p < kDrawPanel; ++p) {
    state[p] = p < count ? static_cast<uint64_t>(seeds[p]) : 0;
    open[p] = static_cast<double>(chosen);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const double to_come = static_cast<double>(rows - i);
    for (int p = 0; p < kDrawPanel; p += kLanes) {
      const Lanes z0 = load_bits<double>(state + p) + uint64_t(0x9E3779B97F4A7C15);
      store_bits<double>(state + p, z0);
      const Lanes z1 = (z0 ^ (z0 >> 30)) * uint64_t(0xBF58476D1CE4E5B9);
      const Lanes z2 = (z1 ^ (z1 >> 27)) * uint64_t(0x94D049BB133111EB);
      const Lanes z = z2 ^ (z2 >> 31);
      // 52 bits as a double in [1, 2).
      const Vec<double> unit =
          reinterpret_cast<Vec<double>>((z >> 12) | uint64_t(0x3FF0000000000000)) - 1.0;
      const Vec<double> left = load(open + p);
      const auto take = unit * to_come < left;
      const Vec<double> zero = {};
      const Vec<double> one = zero + 1.0;
      store(open + p, left - (take ? one : zero));
      const Bytes bytes = __builtin_convertvector(reinterpret_cast<Lanes>(take) & 1, Bytes);
      __builtin_memcpy(taken + p, &bytes, sizeof(bytes));
    }
    __builtin_memcpy(out + i * stride, taken, static_cast<size_t>(count));
  }
}

template <class T>
constexpr ProductKernels<T> kKernels = {
    Simd<T>::kLanes, pack<T>, kernel_tile<T>, fix<T>, subsets<T>, product<T>, words, draw,
};

}  // namespace

const ProductKernels<float>& product_kernels_f32() { return kKernels<float>; }
const ProductKernels<double>& product_kernels_f64() { return kKernels<double>; }

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
