// One call of kernel_apply_cpu: strips of rows are packed, every block of queries runs over them.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "mkmmd/kernel_products_rows.h"

namespace padkern {

template <class T>
class Apply {
 public:
  Apply(const KernelApplyParams& params, const ProductKernels<T>& kernels)
      : params_(params),
        kernels_(kernels),
        width_((params.columns + kernels.lanes - 1) / kernels.lanes * kernels.lanes),
        strip_rows_(std::min(params.rows.rows, kStripBlocks * kProductRows)),
        query_blocks_(blocks_of(params.query.rows)),
        // A cut by the shape alone, so that sums have the same order for any thread count.
        parts_(std::min(blocks_of(strip_rows_), std::max<int64_t>(1, 64 / query_blocks_))),
        packed_(kernels, params.dim, strip_rows_),
        vectors_(blocks_of(strip_rows_) * kProductRows * width_) {}

  void run() {
    const int64_t size = params_.query.rows * params_.columns;
    std::fill(params_.out, params_.out + size, 0.0);
    const double sigma_sq = has_bandwidth(params_.sum) ? *params_.sum.sigma_sq : 1.0;
    if (!(sigma_sq >= 0.0)) return std::fill(params_.out, params_.out + size, std::nan(""));
    if (sigma_sq == 0.0) return fill_constant();
    make_terms<T>(params_.sum.kernel, params_.sum.alphas, params_.sum.betas, params_.sum.count,
                  sigma_sq, &terms_);
    const Centre<T> centre(params_.rows, params_.dim);
    const double work = static_cast<double>(params_.query.rows) * static_cast<double>(strip_rows_) *
                        static_cast<double>(params_.dim + params_.columns + 16);
    const int64_t workers = useful_workers(work, query_blocks_ * parts_);
    std::vector<Worker> scratch;
    scratch.reserve(workers);
    for (int64_t w = 0; w < workers; ++w) scratch.emplace_back(params_.dim, width_);
    const int64_t padded = query_blocks_ * kProductRows;
    Buffer<double> partial(parts_ > 1 ? parts_ * padded * params_.columns : 0);
    for (int64_t first = 0; first < params_.rows.rows; first += strip_rows_) {
      const int64_t rows = std::min(strip_rows_, params_.rows.rows - first);
      const int64_t blocks = blocks_of(rows);
      run_tickets(blocks, std::min(workers, blocks), [&](int64_t, int64_t b) {
        packed_.pack(params_.rows, centre, first, b);
        pack_vectors(first, b);
      });
      run_tickets(query_blocks_ * parts_, workers, [&](int64_t w, int64_t ticket) {
        const int64_t a = ticket / parts_, part = ticket % parts_;
        Worker& worker = scratch[w];
        sum_blocks(a, first, rows, blocks * part / parts_, blocks * (part + 1) / parts_, centre,
                   worker);
        double* out = parts_ > 1 ? partial.get() + part * padded * params_.columns : params_.out;
        out += a * kProductRows * params_.columns;
        for (int64_t i = 0; i < query_rows(a); ++i) {
          for (int64_t v = 0; v < params_.columns; ++v) {
            const double value = worker.sums.get()[i * width_ + v];
            double& cell = out[i * params_.columns + v];
            cell = parts_ > 1 ? value : cell + value;
          }
        }
      });
      for (int64_t part = 0; parts_ > 1 && part < parts_; ++part) {
        const double* in = partial.get() + part * padded * params_.columns;
        for (int64_t k = 0; k < size; ++k) params_.out[k] += in[k];
      }
    }
  }

 private:
  static constexpr int64_t kStripBlocks = 64;

  struct Worker {
    Buffer<T> panels, squares, tile, scratch;
    Buffer<double> sums;

    Worker(int64_t dim, int64_t width)
        : panels(kProductRows * dim),
          squares(kProductRows),
          tile(kProductTile),
          scratch(kProductRows * width),
          sums(kProductRows * width) {}
  };

  int64_t query_rows(int64_t a) const {
    return std::min<int64_t>(kProductRows, params_.query.rows - a * kProductRows);
  }

  T vector(int64_t row, int64_t column) const {
    return static_cast<const T*>(params_.vectors.data)[row * params_.vectors.row_stride +
                                                       column * params_.vectors.column_stride];
  }

  // Zero beyond the rows and the columns.
  void pack_vectors(int64_t first, int64_t b) {
    for (int64_t i = 0; i < kProductRows; ++i) {
      const int64_t row = first + b * kProductRows + i;
      T* out = vectors_.get() + (b * kProductRows + i) * width_;
      for (int64_t v = 0; v < width_; ++v) {
        out[v] = row < params_.rows.rows && v < params_.columns ? vector(row, v) : T(0);
      }
    }
  }

  // worker.sums = query block a times blocks [begin, end) of the strip that starts at row first.
  void sum_blocks(int64_t a, int64_t first, int64_t rows, int64_t begin, int64_t end,
                  const Centre<T>& centre, Worker& worker) {
    const KernelMatrix& query = params_.query;
    kernels_.pack(static_cast<const T*>(query.data) + a * kProductRows * query.row_stride,
                  query_rows(a), query.row_stride, query.column_stride, params_.dim,
                  centre.origin.data(), centre.mean.data(), worker.panels.get(),
                  worker.squares.get());
    const ProductBlock<T> left{query_rows(a), worker.panels.get(), worker.squares.get()};
    std::fill(worker.sums.get(), worker.sums.get() + kProductRows * width_, 0.0);
    for (int64_t b = begin; b < end; ++b) {
      const ProductBlock<T> right =
          packed_.block(b, std::min<int64_t>(kProductRows, rows - b * kProductRows));
      kernels_.tile(left, right, params_.dim, terms_, params_.part, params_.power,
                    worker.tile.get());
      if (params_.skip_diagonal && first / kProductRows + b == a) {
        for (int64_t i = 0; i < left.rows; ++i) worker.tile.get()[i * (kProductRows + 1)] = T(0);
      }
      kernels_.product(worker.tile.get(), left.rows, right.rows,
                       vectors_.get() + b * kProductRows * width_, width_, worker.scratch.get(),
                       worker.sums.get());
    }
  }

  // Bandwidth 0: every kernel is 1 and nothing changes it.
  void fill_constant() {
    if (params_.part != KernelPart::kValue) return;
    const double value = std::pow(beta_sum(params_.sum, false), params_.power);
    std::vector<double> totals(params_.columns, 0.0);
    for (int64_t j = 0; j < params_.rows.rows; ++j) {
      for (int64_t v = 0; v < params_.columns; ++v) {
        totals[v] += static_cast<double>(vector(j, v));
      }
    }
    for (int64_t i = 0; i < params_.query.rows; ++i) {
      for (int64_t v = 0; v < params_.columns; ++v) {
        const double own = params_.skip_diagonal ? static_cast<double>(vector(i, v)) : 0.0;
        params_.out[i * params_.columns + v] = value * (totals[v] - own);
      }
    }
  }

  const KernelApplyParams& params_;
  const ProductKernels<T>& kernels_;
  const int64_t width_;       // columns, padded
  const int64_t strip_rows_;  // rows that are packed at once
  const int64_t query_blocks_;
  const int64_t parts_;  // of a strip, summed by different tickets
  Packed<T> packed_;
  Buffer<T> vectors_;
  MkmmdTerms<T> terms_;
};

}  // namespace padkern
