// Reading rows of any element type, and packing them into the layouts of the pair kernel. Included
// only by sources that CMake compiles once per instruction set.
#pragma once

#include "common/gemm_tile.h"
#include "mkmmd/mkmmd_kernel.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {

// Even groups of columns: group g of `vectors` vectors starts at vector first_vector(g).
struct Groups {
  int64_t vectors;
  int64_t count;

  explicit Groups(int64_t vectors_in)
      : vectors(vectors_in), count((vectors_in + kTileVecs - 1) / kTileVecs) {}
  int64_t first_vector(int64_t g) const { return vectors * g / count; }
};

inline __attribute__((always_inline)) float half_to_float(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  // Scaling by 2^112 moves the exponent's bias and makes subnormal numbers normal.
  float value = __builtin_bit_cast(float, magnitude) * 5.192296858534828e33f;
  uint32_t bits = __builtin_bit_cast(uint32_t, value);
  bits |= magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0u;
  bits |= static_cast<uint32_t>(half & 0x8000u) << 16;
  return __builtin_bit_cast(float, bits);
}

inline __attribute__((always_inline)) float bfloat_to_float(uint16_t half) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(half) << 16);
}

// One row in the compute type, contiguous: the caller's own memory where it is that already.
template <class T>
inline const T* read_row(const MkmmdRows& source, int64_t index, int64_t dim, T* row) {
  const int64_t first = index * source.row_stride;
  const int64_t step = source.column_stride;
  switch (source.dtype) {
    case MkmmdDtype::kFloat32: {
      const float* in = static_cast<const float*>(source.data) + first;
      if (sizeof(T) == sizeof(float) && step == 1) return reinterpret_cast<const T*>(in);
      for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<T>(in[d * step]);
      break;
    }
    case MkmmdDtype::kFloat64: {
      const double* in = static_cast<const double*>(source.data) + first;
      if (sizeof(T) == sizeof(double) && step == 1) return reinterpret_cast<const T*>(in);
      for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<T>(in[d * step]);
      break;
    }
    case MkmmdDtype::kBFloat16: {
      const uint16_t* in = static_cast<const uint16_t*>(source.data) + first;
      if (step == 1) {
        for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<T>(bfloat_to_float(in[d]));
      } else {
        for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<T>(bfloat_to_float(in[d * step]));
      }
      break;
    }
    default: {
      const uint16_t* in = static_cast<const uint16_t*>(source.data) + first;
      if (step == 1) {
        for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<T>(half_to_float(in[d]));
      } else {
        for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<T>(half_to_float(in[d * step]));
      }
    }
  }
  return row;
}

inline void read_double(const MkmmdRows& source, int64_t index, int64_t dim, double* row) {
  const double* in = read_row<double>(source, index, dim, row);
  if (in == row) return;
  for (int64_t d = 0; d < dim; ++d) row[d] = in[d];
}

template <class T>
void column_sums(const MkmmdRows& source, const T* weights, int64_t dim, const double* origin,
                 T* row, double* sums) {
  for (int64_t d = 0; d < dim; ++d) sums[d] = 0.0;
  for (int64_t i = 0; i < source.rows; ++i) {
    const double weight = static_cast<double>(weights[i]);
    if (weight == 0.0) continue;
    const T* in = read_row<T>(source, i, dim, row);
    for (int64_t d = 0; d < dim; ++d) sums[d] += weight * (static_cast<double>(in[d]) - origin[d]);
  }
}

// panels[p][d][i] = point d of row p * kTileWidth + i, zero beyond the rows.
template <class T>
void transpose_panels(const T* points, int64_t rows, int64_t dim, int64_t point_stride, T* panels) {
  constexpr int kWidth = kTileWidth<T>;
  constexpr int kLanes = Simd<T>::kLanes;
  const Groups groups(point_stride / kLanes);
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t column = groups.first_vector(g) * kLanes;
    const int64_t width = groups.first_vector(g + 1) * kLanes - column;
    const int64_t used = width < dim - column ? width : dim - column;
    const T* group = points + column * rows;
    for (int64_t base = 0; base < rows; base += 4) {
      T* panel = panels + base / kWidth * kWidth * dim + column * kWidth + base % kWidth;
      const T* in = group + base * width;
      if (base + 4 <= rows) {
        int64_t d = 0;
        for (; d + 4 <= used; d += 4) transpose4<T>(in + d, width, panel + d * kWidth, kWidth);
        for (; d < used; ++d) {
          for (int i = 0; i < 4; ++i) panel[d * kWidth + i] = in[i * width + d];
        }
      } else {
        for (int64_t d = 0; d < used; ++d) {
          for (int64_t i = 0; i < 4; ++i) {
            panel[d * kWidth + i] = base + i < rows ? in[i * width + d] : T(0);
          }
        }
      }
    }
  }
  const int64_t covered = (rows + 3) / 4 * 4;
  const int64_t padded = (rows + kWidth - 1) / kWidth * kWidth;
  if (covered == padded) return;
  T* panel = panels + covered / kWidth * kWidth * dim;
  for (int64_t d = 0; d < dim; ++d) {
    for (int64_t i = covered % kWidth; i < kWidth; ++i) panel[d * kWidth + i] = T(0);
  }
}

template <class T>
double pack(const MkmmdRows& source, int64_t dim, int64_t point_stride, const double* origin,
            const double* mean, const MkmmdScratch<T>& scratch, const MkmmdBlock<T>& block) {
  T* row = scratch.row;
  constexpr int kWidth = kTileWidth<T>;
  constexpr int kLanes = Simd<T>::kLanes;
  const Groups groups(point_stride / kLanes);
  const int64_t padded = (block.rows + kWidth - 1) / kWidth * kWidth;
  double moment = 0.0;
  for (int64_t i = 0; i < block.rows; ++i) {
    if (block.weights[i] == T(0)) {
      // Selected away, not multiplied away: a masked row may hold NaN.
      for (int64_t d = 0; d < point_stride; ++d) row[d] = T(0);
    } else {
      const T* in = read_row<T>(source, i, dim, row);
      for (int64_t d = 0; d < dim; ++d) {
        row[d] = static_cast<T>((static_cast<double>(in[d]) - origin[d]) - mean[d]);
      }
      for (int64_t d = dim; d < point_stride; ++d) row[d] = T(0);
    }
    // Four independent chains: the compiler may not reorder a double sum on its own.
    double part[4] = {0.0, 0.0, 0.0, 0.0};
    int64_t d = 0;
    for (; d + 4 <= point_stride; d += 4) {
      for (int l = 0; l < 4; ++l) {
        const double value = static_cast<double>(row[d + l]);
        part[l] += value * value;
      }
    }
    for (; d < point_stride; ++d) {
      part[0] += static_cast<double>(row[d]) * static_cast<double>(row[d]);
    }
    const double square = (part[0] + part[1]) + (part[2] + part[3]);
    moment += static_cast<double>(block.weights[i]) * square;
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t first = groups.first_vector(g), last = groups.first_vector(g + 1);
      T* out = block.points + first * kLanes * block.rows + i * (last - first) * kLanes;
      for (int64_t v = first; v < last; ++v, out += kLanes) store(out, load(row + v * kLanes));
    }
  }
  T* panels = block.panels != nullptr ? block.panels : scratch.panels;
  transpose_panels<T>(block.points, block.rows, dim, point_stride, panels);
  // Norms added up as the Gram product adds: identical rows are then at distance 0 exactly.
  for (int64_t i = 0; i < padded; i += kLanes) {
    const T* in = panels + i / kWidth * kWidth * dim + i % kWidth;
    Vec<T> square = {};
    int64_t d = 0;
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t last = groups.first_vector(g + 1) * kLanes;
      const int64_t end = last < dim ? last : dim;
      Vec<T> step = {};
      for (; d < end; ++d, in += kWidth) step += load(in) * load(in);
      square = g == 0 ? step : square + step;
    }
    store(block.squares + i, square);
  }
  return moment;
}

template <class T>
void finish(const MkmmdBlock<T>& block, int64_t dim, int64_t point_stride, double scale,
            const MkmmdScratch<T>& scratch, T* gradient, int64_t gradient_stride) {
  constexpr int kLanes = Simd<T>::kLanes;
  const Groups groups(point_stride / kLanes);
  const T* products = block.products;
  if (products == gradient) {
    const int64_t size = block.rows * point_stride;
    for (int64_t k = 0; k < size; ++k) scratch.products[k] = products[k];
    products = scratch.products;
  }
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t column = groups.first_vector(g) * kLanes;
    const int64_t width = groups.first_vector(g + 1) * kLanes - column;
    const int64_t used = width < dim - column ? width : dim - column;
    const T* points = block.points + column * block.rows;
    const T* product = products + column * block.rows;
    for (int64_t i = 0; i < block.rows; ++i) {
      const double row_sum = block.row_sum[i];
      T* out = gradient + i * gradient_stride + column;
      for (int64_t d = 0; d < used; ++d) {
        out[d] = static_cast<T>(scale * (static_cast<double>(points[i * width + d]) * row_sum -
                                         static_cast<double>(product[i * width + d])));
      }
    }
  }
}

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
