// What the drivers of the kernel products share: packed, centred rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/tickets.h"
#include "mkmmd/kernel_products.h"
#include "mkmmd/kernel_products_kernel.h"

namespace padkern {

inline int64_t blocks_of(int64_t rows) { return (rows + kProductRows - 1) / kProductRows; }

// What all rows are shifted by: the first of them and, relative to it, their mean. Differences to
// the first row are exactly zero when all rows are identical.
template <class T>
struct Centre {
  std::vector<double> origin, mean;

  Centre(const KernelMatrix& rows, int64_t dim) : origin(dim), mean(dim, 0.0) {
    const T* data = static_cast<const T*>(rows.data);
    for (int64_t d = 0; d < dim; ++d) {
      origin[d] = static_cast<double>(data[d * rows.column_stride]);
    }
    constexpr int64_t kRows = 1024;  // rows of one ticket: the sums have the same order always
    const int64_t parts = (rows.rows + kRows - 1) / kRows;
    std::vector<double> sums(parts * dim, 0.0);
    const double work = static_cast<double>(rows.rows) * static_cast<double>(dim);
    run_tickets(parts, useful_workers(work, parts), [&](int64_t, int64_t part) {
      double* sum = sums.data() + part * dim;
      for (int64_t i = part * kRows; i < std::min(rows.rows, (part + 1) * kRows); ++i) {
        const T* row = data + i * rows.row_stride;
        for (int64_t d = 0; d < dim; ++d) {
          sum[d] += static_cast<double>(row[d * rows.column_stride]) - origin[d];
        }
      }
    });
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t d = 0; d < dim; ++d) mean[d] += sums[part * dim + d];
    }
    for (double& value : mean) value /= static_cast<double>(rows.rows);
  }
};

// Packed blocks of rows first .. first + capacity of a matrix.
template <class T>
class Packed {
 public:
  Packed(const ProductKernels<T>& kernels, int64_t dim, int64_t capacity)
      : kernels_(kernels),
        dim_(dim),
        panels_(blocks_of(capacity) * kProductRows * dim),
        squares_(blocks_of(capacity) * kProductRows) {}

  void pack(const KernelMatrix& m, const Centre<T>& centre, int64_t first, int64_t b) {
    const int64_t row = first + b * kProductRows;
    kernels_.pack(static_cast<const T*>(m.data) + row * m.row_stride,
                  std::min<int64_t>(kProductRows, m.rows - row), m.row_stride, m.column_stride,
                  dim_, centre.origin.data(), centre.mean.data(),
                  panels_.get() + b * kProductRows * dim_, squares_.get() + b * kProductRows);
  }
  ProductBlock<T> block(int64_t b, int64_t rows) const {
    return {rows, panels_.get() + b * kProductRows * dim_, squares_.get() + b * kProductRows};
  }
  const T* squares() const { return squares_.get(); }

 private:
  const ProductKernels<T>& kernels_;
  int64_t dim_;
  Buffer<T> panels_, squares_;
};

inline double beta_sum(const KernelSum& sum, bool magnitude) {
  double total = 0.0;
  for (int64_t u = 0; u < sum.count; ++u) {
    const double beta = sum.betas == nullptr ? 1.0 : sum.betas[u];
    total += magnitude ? std::fabs(beta) : beta;
  }
  return total;
}

inline bool has_bandwidth(const KernelSum& sum) { return sum.kernel != MkmmdKernel::kEnergy; }

}  // namespace padkern
