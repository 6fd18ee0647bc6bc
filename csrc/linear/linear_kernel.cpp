// Compiled once per instruction set (CMake: padkern_add_isa_kernel). No standard library, no static
// objects: the linker must have nothing here that a narrower CPU could be handed.
#include "linear/linear_kernel.h"

#include "common/gemm_tile.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {
namespace {

// What becomes of a tile's sums.
template <class T>
struct Finish {
  bool add;       // to what c holds
  const T* bias;  // or null
  bool relu;
};

// c[ROWS, VECS * lanes] = finish(sum_k a(i, k) b[k, :]), a(i, k) = a[i * stride + k], or
// a[k * stride + i] when DEPTH_FIRST.
template <class T, int ROWS, int VECS, bool DEPTH_FIRST>
PADKERN_INLINE void strided_tile(int64_t depth, const T* a, int64_t stride, const T* b, int64_t ldb,
                                 T* c, int64_t ldc, const Finish<T>& finish) {
  constexpr int kLanes = Simd<T>::kLanes;
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v) __builtin_prefetch(c + i * ldc + v * kLanes, 1);
  }
  Vec<T> sum[ROWS][VECS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[VECS];
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const T left = DEPTH_FIRST ? a[i] : a[i * stride];
#pragma GCC unroll 3
      for (int v = 0; v < VECS; ++v) sum[i][v] += left * right[v];
    }
    a += DEPTH_FIRST ? stride : 1;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < VECS; ++v) {
      T* out = c + i * ldc + v * kLanes;
      Vec<T> x = sum[i][v];
      if (finish.add) x += load(out);
      if (finish.bias != nullptr) x += load(finish.bias + v * kLanes);
      store(out, finish.relu ? positive_part<T>(x) : x);
    }
  }
}

template <class T, int VECS, bool DEPTH_FIRST>
__attribute__((noinline)) void strided_rows(int64_t rows, int64_t depth, const T* a, int64_t stride,
                                            const T* b, int64_t ldb, T* c, int64_t ldc,
                                            const Finish<T>& finish) {
  const int64_t step = DEPTH_FIRST ? 1 : stride;
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) {
    strided_tile<T, kTileRows, VECS, DEPTH_FIRST>(depth, a + i * step, stride, b, ldb, c + i * ldc,
                                                  ldc, finish);
  }
  if (kTileRows == 8 && i + 4 <= rows) {
    strided_tile<T, 4, VECS, DEPTH_FIRST>(depth, a + i * step, stride, b, ldb, c + i * ldc, ldc,
                                          finish);
    i += 4;
  }
  for (; i < rows; ++i) {
    strided_tile<T, 1, VECS, DEPTH_FIRST>(depth, a + i * step, stride, b, ldb, c + i * ldc, ldc,
                                          finish);
  }
}

template <class T, bool DEPTH_FIRST>
PADKERN_INLINE void strided_columns(int vectors, int64_t rows, int64_t depth, const T* a,
                                    int64_t stride, const T* b, int64_t ldb, T* c, int64_t ldc,
                                    const Finish<T>& finish) {
  switch (vectors) {
    case 1:
      strided_rows<T, 1, DEPTH_FIRST>(rows, depth, a, stride, b, ldb, c, ldc, finish);
      break;
    case 2:
      strided_rows<T, 2, DEPTH_FIRST>(rows, depth, a, stride, b, ldb, c, ldc, finish);
      break;
    default:
      strided_rows<T, kTileVecs, DEPTH_FIRST>(rows, depth, a, stride, b, ldb, c, ldc, finish);
  }
}

template <class T>
void pack(const T* matrix, int64_t stride, int64_t depth, int64_t columns, bool transposed,
          T* panels) {
  constexpr int64_t kWidth = kTileWidth<T>;
  for (int64_t c = 0; c < columns; c += kWidth) {
    T* panel = panels + c * depth;
    const int64_t some = columns - c < kWidth ? columns - c : kWidth;
    if (!transposed) {
      for (int64_t k = 0; k < depth; ++k) {
        const T* from = matrix + k * stride + c;
        for (int64_t j = 0; j < kWidth; ++j) panel[k * kWidth + j] = j < some ? from[j] : T(0);
      }
      continue;
    }
    int64_t j = 0;
    for (; j + 4 <= some; j += 4) {
      const T* from = matrix + (c + j) * stride;
      int64_t k = 0;
      for (; k + 4 <= depth; k += 4) {
        transpose4<T>(from + k, stride, panel + k * kWidth + j, kWidth);
      }
      for (; k < depth; ++k) {
        for (int i = 0; i < 4; ++i) panel[k * kWidth + j + i] = from[i * stride + k];
      }
    }
    for (; j < kWidth; ++j) {
      for (int64_t k = 0; k < depth; ++k) {
        panel[k * kWidth + j] = j < some ? matrix[(c + j) * stride + k] : T(0);
      }
    }
  }
}

template <class T>
void rows(const T* a, int64_t a_stride, int64_t count, int64_t depth, const T* panels,
          int64_t columns, const T* bias, bool relu, T* out, int64_t out_stride, T* scratch) {
  constexpr int64_t kWidth = kTileWidth<T>;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int64_t some = columns - c < kWidth ? columns - c : kWidth;
    const int vectors = static_cast<int>((some + kLanes - 1) / kLanes);
    // A last vector that reaches beyond the row is written aside.
    const bool whole = some == vectors * kLanes;
    T* to = whole ? out + c : scratch;
    const int64_t ldc = whole ? out_stride : kWidth;
    int64_t k = 0;
    do {  // once even without depth: the bias is there
      const int64_t terms = depth - k < kLinearDepth ? depth - k : kLinearDepth;
      const bool last = k + terms == depth;
      const Finish<T> finish = {k > 0, last && bias != nullptr ? bias + c : nullptr, last && relu};
      strided_columns<T, false>(vectors, count, terms, a + k, a_stride,
                                panels + c * depth + k * kWidth, kWidth, to, ldc, finish);
      k += terms;
    } while (k < depth);
    if (whole) continue;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < some; ++j) out[i * out_stride + c + j] = scratch[i * kWidth + j];
    }
  }
}

template <class T>
void product(const T* a, int64_t a_stride, int64_t a_columns, const T* b, int64_t b_stride,
             int64_t b_columns, int64_t count, T* out, int64_t out_stride, T* scratch) {
  constexpr int64_t kWidth = kTileWidth<T>;
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const int vectors = static_cast<int>((b_columns + kLanes - 1) / kLanes);
  const bool whole = b_columns == vectors * kLanes;
  for (int64_t k = 0; k < count; k += kLinearDepth) {
    const int64_t terms = count - k < kLinearDepth ? count - k : kLinearDepth;
    const T* right = b + k * b_stride;
    if (!whole) {
      for (int64_t i = 0; i < terms; ++i) {
        for (int64_t j = 0; j < vectors * kLanes; ++j) {
          scratch[i * kWidth + j] = j < b_columns ? right[i * b_stride + j] : T(0);
        }
      }
      right = scratch;
    }
    const Finish<T> finish = {k > 0, nullptr, false};
    strided_columns<T, true>(vectors, a_columns, terms, a + k * a_stride, a_stride, right,
                             whole ? b_stride : kWidth, out, out_stride, finish);
  }
}

template <class T>
void mask(const T* d_y, int64_t d_y_stride, const T* y, int64_t count, int64_t columns, T* out) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  for (int64_t i = 0; i < count; ++i) {
    const T* from = d_y + i * d_y_stride;
    const T* sign = y + i * columns;
    T* to = out + i * columns;
    int64_t j = 0;
    const Vec<T> zero = {};
    // The comparison this way round passes on the gradient where y is NaN.
    for (; j + kLanes <= columns; j += kLanes) {
      store(to + j, load(sign + j) <= T(0) ? zero : load(from + j));
    }
    for (; j < columns; ++j) to[j] = sign[j] <= T(0) ? T(0) : from[j];
  }
}

template <class T>
void column_sums(const T* a, int64_t stride, int64_t count, int64_t columns, double* sums) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    for (int64_t k = 0; k < count; k += kLinearDepth) {
      const int64_t end = count - k < kLinearDepth ? count : k + kLinearDepth;
      Vec<T> sum = {};
      for (int64_t i = k; i < end; ++i) sum += load(a + i * stride + j);
      for (int l = 0; l < kLanes; ++l) sums[j + l] += static_cast<double>(sum[l]);
    }
  }
  for (; j < columns; ++j) {
    for (int64_t i = 0; i < count; ++i) sums[j] += static_cast<double>(a[i * stride + j]);
  }
}

template <class T>
void merge(const T* in, int64_t step, int64_t parts, int64_t count, T* out) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vec<T> sum = load(in + i);
    for (int64_t p = 1; p < parts; ++p) sum += load(in + p * step + i);
    store(out + i, sum);
  }
  for (; i < count; ++i) {
    T sum = in[i];
    for (int64_t p = 1; p < parts; ++p) sum += in[p * step + i];
    out[i] = sum;
  }
}

constexpr LinearKernels<float> kFloat = {Simd<float>::kLanes, kTileWidth<float>, pack<float>,
                                         rows<float>,         product<float>,    mask<float>,
                                         column_sums<float>,  merge<float>};
constexpr LinearKernels<double> kDouble = {Simd<double>::kLanes, kTileWidth<double>, pack<double>,
                                           rows<double>,         product<double>,    mask<double>,
                                           column_sums<double>,  merge<double>};

}  // namespace

const LinearKernels<float>& linear_kernels_f32() { return kFloat; }
const LinearKernels<double>& linear_kernels_f64() { return kDouble; }

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
