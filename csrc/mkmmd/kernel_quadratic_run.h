// One call of kernel_quadratic_cpu. Kernel values are rounded to a fixed point once per pair; all
// sums after that are sums of integers, exact and the same in any order.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "mkmmd/kernel_products_rows.h"

namespace padkern {

using Wide = __int128;

template <class T>
class Quadratic {
 public:
  Quadratic(const KernelQuadraticParams& params, const ProductKernels<T>& kernels)
      : params_(params),
        kernels_(kernels),
        rows_(params.rows.rows),
        blocks_(blocks_of(rows_)),
        panels_((params.columns + kMemberPanel - 1) / kMemberPanel),
        packed_(kernels, params.dim, rows_),
        words_(blocks_ * params.columns),
        sums_(rows_),
        totals_(params.columns) {}

  void run() {
    pack();
    const double sigma_sq = has_bandwidth(params_.sum) ? *params_.sum.sigma_sq : 1.0;
    double bound = beta_sum(params_.sum, true);  // of a kernel value's magnitude
    double most_square = 0.0;
    bool regular = std::isfinite(bound);
    for (int64_t i = 0; i < rows_; ++i) {
      const double square = static_cast<double>(packed_.squares()[i]);
      regular = regular && std::isfinite(square);
      most_square = std::max(most_square, square);
    }
    if (!has_bandwidth(params_.sum)) bound *= 2.0 * std::sqrt(most_square);
    if (!regular || !(sigma_sq >= 0.0)) return fill_constant(std::nan(""));
    if (sigma_sq == 0.0) return fill_constant(beta_sum(params_.sum, false));
    if (bound == 0.0) return fill_constant(0.0);
    make_terms<T>(params_.sum.kernel, params_.sum.alphas, params_.sum.betas, params_.sum.count,
                  sigma_sq, &terms_);
    // A scale from a sample of the values; where it was far off, once more with the right one.
    const double sampled = 4.0 * sample_largest();
    if (sampled > 0.0) bound = std::min(bound, sampled);
    const double largest = pass(bound);
    if (largest > bound || (largest > 0.0 && largest < bound / 16.0)) pass(largest);
    finish();
  }

 private:
  struct Worker {
    Buffer<T> tile{kProductTile};
    Buffer<Word<T>> fixed{kStripTiles * kProductTile};
    Buffer<Word<T>> table{kSubsetTableBytes / static_cast<int64_t>(sizeof(Word<T>))};
    Buffer<Word<T>> lanes;
    std::vector<int64_t> sums;
    std::vector<Wide> totals;
    int64_t across[kProductRows], down[kProductRows];  // row and column sums of a tile
    double largest = 0.0;

    Worker(int64_t columns, int lane_count)
        : lanes(std::min<int64_t>(columns, kMemberPanel) * lane_count),
          sums(std::min<int64_t>(columns, kMemberPanel)),
          totals(columns, 0) {}
  };

  ProductBlock<T> block(int64_t b) const {
    return packed_.block(b, std::min<int64_t>(kProductRows, rows_ - b * kProductRows));
  }

  void pack() {
    const Centre<T> centre(params_.rows, params_.dim);
    const double work =
        static_cast<double>(rows_) * static_cast<double>(params_.dim + params_.columns);
    run_tickets(blocks_, useful_workers(work, blocks_), [&](int64_t, int64_t b) {
      packed_.pack(params_.rows, centre, 0, b);
      kernels_.words(params_.membership + b * kProductRows * params_.membership_row_stride,
                     block(b).rows, params_.membership_row_stride, params_.membership_column_stride,
                     params_.columns, words_.get() + b * params_.columns);
    });
  }

  // Every kernel value is the same.
  void fill_constant(double value) {
    const double others = static_cast<double>(rows_ - 1);
    std::fill(params_.row_sums, params_.row_sums + rows_, value * others);
    for (int64_t p = 0; p < params_.columns; ++p) {
      double members = 0.0;
      for (int64_t b = 0; b < blocks_; ++b) {
        members += __builtin_popcountll(words_.get()[b * params_.columns + p]);
      }
      params_.quadratic[p] = value * members * (members - 1.0);
      params_.linear[p] = value * members * others;
    }
  }

  // Largest magnitude within at most eight blocks.
  double sample_largest() const {
    const int64_t count = std::min<int64_t>(blocks_, 8);
    Worker worker(1, kernels_.lanes);
    for (int64_t s = 0; s < count; ++s) {
      const int64_t b = s * blocks_ / count;
      fix_tile(b, b, 0, worker);
    }
    return worker.largest;
  }

  // Fixed-point bits that a value of magnitude `bound` gets: sums over all rows stay in 56 bits.
  void set_scale(double bound) {
    bound_ = bound;
    int bits = sizeof(T) == 4 ? kFixedBits : kFixedBitsWide;
    while (rows_ > int64_t{1} << (56 - bits)) --bits;
    int exponent;
    std::frexp(bound, &exponent);  // bound <= 2^exponent
    exponent = std::max(exponent, sizeof(T) == 4 ? -100 : -900);
    scale_ = std::ldexp(1.0, bits - exponent);
  }

  // All pairs once. A ticket is a strip: one block against up to kStripTiles others, for some of
  // the column panels. Everything added up is an integer, so the order changes no bit.
  double pass(double bound) {
    set_scale(bound);
    for (int64_t i = 0; i < rows_; ++i) sums_.get()[i].store(0, std::memory_order_relaxed);
    std::fill(totals_.begin(), totals_.end(), 0);
    std::vector<int64_t> first_strip(blocks_ + 1, 0);
    for (int64_t a = 0; a < blocks_; ++a) {
      first_strip[a + 1] = first_strip[a] + (blocks_ - a + kStripTiles - 1) / kStripTiles;
    }
    const int64_t strips = first_strip[blocks_];
    // Few strips: split the columns too, at the price of computing the tiles again.
    const int64_t splits = std::min(panels_, std::max<int64_t>(1, 64 / strips));
    const double n = static_cast<double>(rows_);
    const double work =
        n * n * 0.5 *
        (static_cast<double>(params_.dim) + 16.0 + static_cast<double>(params_.columns) / 4.0);
    const int64_t workers = useful_workers(work, strips * splits);
    std::vector<Worker> scratch;
    scratch.reserve(workers);
    for (int64_t w = 0; w < workers; ++w) scratch.emplace_back(params_.columns, kernels_.lanes);
    run_tickets(strips * splits, workers, [&](int64_t w, int64_t ticket) {
      const int64_t strip = ticket / splits, split = ticket % splits;
      const int64_t a =
          std::upper_bound(first_strip.begin(), first_strip.end(), strip) - first_strip.begin() - 1;
      const int64_t b = a + (strip - first_strip[a]) * kStripTiles;
      do_strip(a, b, std::min<int64_t>(kStripTiles, blocks_ - b), panels_ * split / splits,
               panels_ * (split + 1) / splits, split == 0, scratch[w]);
    });
    double largest = 0.0;
    for (const Worker& worker : scratch) {
      largest = std::max(largest, worker.largest);
      for (int64_t p = 0; p < params_.columns; ++p) totals_[p] += worker.totals[p];
    }
    return largest;
  }

  // worker.fixed[t] = the kernel values of two blocks, each pair of rows once, with their sums.
  void fix_tile(int64_t a, int64_t b, int64_t t, Worker& worker) const {
    const ProductBlock<T> left = block(a), right = block(b);
    kernels_.tile(left, right, params_.dim, terms_, KernelPart::kValue, 1, worker.tile.get());
    const T largest =
        kernels_.fix(worker.tile.get(), left.rows, right.rows, a == b, static_cast<T>(scale_),
                     worker.fixed.get() + t * kProductTile, worker.across, worker.down);
    worker.largest = std::max(worker.largest, static_cast<double>(largest));
    if (static_cast<double>(largest) <= bound_) return;
    // Does not fit the fixed point, and another pass will come: keep the sums in range.
    std::fill_n(worker.fixed.get() + t * kProductTile, kProductTile, Word<T>(0));
    std::fill_n(worker.across, kProductRows, 0);
    std::fill_n(worker.down, kProductRows, 0);
  }

  void do_strip(int64_t a, int64_t b, int64_t tiles, int64_t first_panel, int64_t last_panel,
                bool add_rows, Worker& worker) {
    const ProductBlock<T> left = block(a);
    int64_t sums[kProductRows] = {};
    for (int64_t t = 0; t < tiles; ++t) {
      const ProductBlock<T> right = block(b + t);
      fix_tile(a, b + t, t, worker);
      if (!add_rows) continue;
      for (int64_t i = 0; i < left.rows; ++i) sums[i] += worker.across[i];
      for (int64_t j = 0; j < right.rows; ++j) {
        sums_.get()[(b + t) * kProductRows + j].fetch_add(worker.down[j],
                                                          std::memory_order_relaxed);
      }
    }
    for (int64_t i = 0; add_rows && i < left.rows; ++i) {
      sums_.get()[a * kProductRows + i].fetch_add(sums[i], std::memory_order_relaxed);
    }
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t p = panel * kMemberPanel;
      const int64_t count = std::min<int64_t>(kMemberPanel, params_.columns - p);
      kernels_.subsets(worker.fixed.get(), tiles, words_.get() + a * params_.columns + p,
                       words_.get() + b * params_.columns + p, params_.columns, count,
                       worker.table.get(), worker.lanes.get(), worker.sums.data());
      for (int64_t q = 0; q < count; ++q) worker.totals[p + q] += worker.sums[q];
    }
  }

  void finish() {
    for (int64_t i = 0; i < rows_; ++i) {
      params_.row_sums[i] =
          static_cast<double>(sums_.get()[i].load(std::memory_order_relaxed)) / scale_;
    }
    const double work =
        static_cast<double>(blocks_) * static_cast<double>(params_.columns) * kSubsetGroups;
    run_tickets(panels_, useful_workers(work, panels_), [&](int64_t, int64_t panel) {
      const int64_t first = panel * kMemberPanel;
      const int64_t count = std::min<int64_t>(kMemberPanel, params_.columns - first);
      Wide totals[kMemberPanel] = {};
      for (int64_t b = 0; b < blocks_; ++b) add_linear(b, first, count, totals);
      for (int64_t p = 0; p < count; ++p) {
        params_.linear[first + p] = static_cast<double>(totals[p]) / scale_;
        params_.quadratic[first + p] = 2.0 * static_cast<double>(totals_[first + p]) / scale_;
      }
    });
  }

  // totals[p] += sum of the row sums of the members in block b, by tables of subset sums.
  void add_linear(int64_t b, int64_t first, int64_t count, Wide* totals) const {
    constexpr int kEntries = 1 << kSubsetBits;
    int64_t table[kSubsetGroups][kEntries];
    for (int g = 0; g < kSubsetGroups; ++g) {
      table[g][0] = 0;
      for (int bit = 0; bit < kSubsetBits; ++bit) {
        const int64_t i = b * kProductRows + g * kSubsetBits + bit;
        const int64_t value = i < rows_ ? sums_.get()[i].load(std::memory_order_relaxed) : 0;
        for (int s = 0; s < 1 << bit; ++s) table[g][(1 << bit) + s] = table[g][s] + value;
      }
    }
    const uint64_t* words = words_.get() + b * params_.columns + first;
    for (int64_t p = 0; p < count; ++p) {
      int64_t sum = 0;
      for (int g = 0; g < kSubsetGroups; ++g) {
        sum += table[g][words[p] >> (g * kSubsetBits) & (kEntries - 1)];
      }
      totals[p] += sum;
    }
  }

  const KernelQuadraticParams& params_;
  const ProductKernels<T>& kernels_;
  const int64_t rows_, blocks_, panels_;
  Packed<T> packed_;
  Buffer<uint64_t> words_;  // [blocks, columns]
  Buffer<std::atomic<int64_t>> sums_;
  std::vector<Wide> totals_;
  MkmmdTerms<T> terms_;
  double bound_ = 0.0;  // of the values that the scale is for
  double scale_ = 1.0;
};

}  // namespace padkern
