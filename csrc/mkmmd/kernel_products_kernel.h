// What the per-instruction-set objects offer to the driver in kernel_products_cpu.cpp.
#pragma once

#include <cstdint>

#include "mkmmd/kernel_products.h"
#include "mkmmd/mkmmd_terms.h"

namespace padkern {

// A block holds 48 rows: a multiple of every panel width and vector width, and eight groups of six.
constexpr int kProductRows = 48;
constexpr int kSubsetBits = 6;
constexpr int kSubsetGroups = kProductRows / kSubsetBits;
constexpr int kProductTile = kProductRows * kProductRows;
constexpr int kStripTiles = 7;       // tiles whose subset sums fit one 32-bit lane
constexpr int kMemberPanel = 1024;   // columns whose lanes are summed while they stay in cache
constexpr int kDrawPanel = 64;       // columns drawn together
constexpr int kMaxVectorBytes = 64;  // of any instruction set
constexpr int kSubsetTableBytes = kSubsetGroups * (1 << kSubsetBits) * kMaxVectorBytes;

// Bits of a fixed-point kernel value. 7 tiles of 48 x 48 values in 16 lanes are 1008 summands of a
// 32-bit lane.
constexpr int kFixedBits = 21;
constexpr int kFixedBitsWide = 46;

// Integers as wide as T.
template <class T>
struct FixedPoint;
template <>
struct FixedPoint<float> {
  using Word = uint32_t;
  using Signed = int32_t;
};
template <>
struct FixedPoint<double> {
  using Word = uint64_t;
  using Signed = int64_t;
};
template <class T>
using Word = typename FixedPoint<T>::Word;
template <class T>
using SignedWord = typename FixedPoint<T>::Signed;

// Centred points of at most kProductRows rows.
template <class T>
struct ProductBlock {
  int64_t rows;
  const T* panels;   // [48 / panel][dim][panel]: transposed, zero padded
  const T* squares;  // [48]: squared norms, zero on padding, NaN where a row is out of range
};

template <class T>
struct ProductKernels {
  int lanes;  // values in one vector

  // Centres and packs one block of rows.
  void (*pack)(const T* data, int64_t rows, int64_t row_stride, int64_t column_stride, int64_t dim,
               const double* origin, const double* mean, T* panels, T* squares);
  // tile[48, 48] = part(k(a_i, b_j)); rows beyond a.rows are not written.
  void (*tile)(const ProductBlock<T>& a, const ProductBlock<T>& b, int64_t dim,
               const MkmmdTerms<T>& terms, KernelPart part, int power, T* tile);
  // fixed[48, 48] = tile * scale rounded, zero outside [rows, columns] and, for `upper`, where
  // j <= i. Writes the sums of rows and columns and returns the largest magnitude of the tile.
  T (*fix)(const T* tile, int64_t rows, int64_t columns, bool upper, T scale, Word<T>* fixed,
           int64_t* row_sums, int64_t* column_sums);
  // sums[p] = sum over tiles t and their i, j of a_pi b_tpj fixed_t[i, j]. Bit i of a word is row
  // i. table: kSubsetTableBytes; lanes: [count, lanes].
  void (*subsets)(const Word<T>* fixed, int64_t tiles, const uint64_t* a, const uint64_t* b,
                  int64_t b_stride, int64_t count, Word<T>* table, Word<T>* lanes, int64_t* sums);
  // out[rows, columns] += tile[rows, depth] x vectors[depth, columns], columns padded to lanes.
  void (*product)(const T* tile, int64_t rows, int64_t depth, const T* vectors, int64_t columns,
                  T* scratch, double* out);
  // words[p] bit i = member of row i in column p.
  void (*words)(const uint8_t* membership, int64_t rows, int64_t row_stride, int64_t column_stride,
                int64_t count, uint64_t* words);
  // out[i, p] = row i is in the subset of seeds[p], for count <= kDrawPanel columns.
  void (*draw)(const int64_t* seeds, int64_t count, int64_t rows, int64_t chosen, int64_t stride,
               uint8_t* out);
};

#define PADKERN_DECLARE_PRODUCT_KERNELS(isa)           \
  namespace isa {                                      \
  const ProductKernels<float>& product_kernels_f32();  \
  const ProductKernels<double>& product_kernels_f64(); \
  }
PADKERN_DECLARE_PRODUCT_KERNELS(baseline)
#if defined(__x86_64__)
PADKERN_DECLARE_PRODUCT_KERNELS(avx2)
PADKERN_DECLARE_PRODUCT_KERNELS(avx512)
#endif
#undef PADKERN_DECLARE_PRODUCT_KERNELS

}  // namespace padkern
