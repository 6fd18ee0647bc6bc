// How one MK-MMD call is laid out: blocks of rows, workspace, and the terms of the kernel sum.
// Depends on sizes and options only, never on the data or the thread count.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "mkmmd/mkmmd_kernel.h"

namespace padkern {

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// How rows are cut into blocks. Depends on the sizes only, so sums have the same order, and results
// the same bits, for every thread count.
struct Cut {
  int64_t source_rows, target_rows, dim;
  int64_t source_block, target_block;    // rows of a block
  int64_t source_blocks, target_blocks;  // number of blocks
  int64_t padded_rows;                   // rows of a block's padded vectors and panels
  int64_t point_stride;

  int64_t blocks() const { return source_blocks + target_blocks; }
  bool is_source(int64_t block) const { return block < source_blocks; }
  int64_t first_row(int64_t block) const {
    return is_source(block) ? block * source_block : (block - source_blocks) * target_block;
  }
  int64_t rows(int64_t block) const {
    const int64_t total = is_source(block) ? source_rows : target_rows;
    const int64_t size = is_source(block) ? source_block : target_block;
    return std::min(size, total - first_row(block));
  }
};

inline Cut make_cut(int64_t source_rows, int64_t target_rows, int64_t dim, bool is_double,
                    int lanes, int panel) {
  Cut cut{};
  cut.source_rows = source_rows;
  cut.target_rows = target_rows;
  cut.dim = dim;
  const bool small = is_double || std::max(source_rows, target_rows) < 480;
  const int64_t limit = small ? kMkmmdBlockRows / 2 : kMkmmdBlockRows;
  // Blocks of one sample have nearly equal sizes, in steps that fill the register tiles.
  const auto block_rows = [limit](int64_t rows) {
    const int64_t blocks = (rows + limit - 1) / limit;
    return std::min(limit, round_up((rows + blocks - 1) / blocks, 8));
  };
  cut.source_block = block_rows(source_rows);
  cut.target_block = block_rows(target_rows);
  cut.source_blocks = (source_rows + cut.source_block - 1) / cut.source_block;
  cut.target_blocks = (target_rows + cut.target_block - 1) / cut.target_block;
  cut.padded_rows = round_up(std::max(cut.source_block, cut.target_block), panel);
  cut.point_stride = round_up(dim, lanes);
  return cut;
}

// Bump allocator over the caller's buffer; with a null base it only measures.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class U>
  U* take(int64_t count) {
    U* out = base_ == nullptr ? nullptr : reinterpret_cast<U*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(U)), 64);
    return out;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Sums of one block, added by its pairs in schedule order.
struct BlockSums {
  double same = 0.0;    // kernel sum over ordered pairs inside one sample
  double cross = 0.0;   // kernel sum over source x target
  double spread = 0.0;  // sum of C_ij d_ij over ordered pairs
  double moment = 0.0;  // sum of w_i |z_i|^2
};

template <class T>
struct Buffers {
  T* panels;
  T* points;
  T* squares;
  T* weights;
  T* products;  // null: accumulate in the gradients themselves
  double* row_sums;
  double* origin;
  double* mean;
  double* column_sums;  // one row per block
  BlockSums* sums;
  std::atomic<int64_t>* progress;
};

template <class T>
Buffers<T> lay_out(Workspace& space, const Cut& cut, bool gradient) {
  const int64_t rows = cut.source_rows + cut.target_rows;
  const int64_t padded = cut.blocks() * cut.padded_rows;
  Buffers<T> buffers{};
  buffers.panels = space.take<T>(padded * cut.dim);
  buffers.points = space.take<T>(rows * cut.point_stride);
  buffers.squares = space.take<T>(padded);
  buffers.weights = space.take<T>(padded);
  if (gradient) {
    if (cut.point_stride != cut.dim) buffers.products = space.take<T>(rows * cut.point_stride);
    buffers.row_sums = space.take<double>(rows);
  }
  buffers.origin = space.take<double>(cut.dim);
  buffers.mean = space.take<double>(cut.dim);
  buffers.column_sums = space.take<double>(cut.blocks() * cut.dim);
  buffers.sums = space.take<BlockSums>(cut.blocks());
  buffers.progress = space.take<std::atomic<int64_t>>(cut.blocks());
  return buffers;
}

template <class T>
void make_terms(const double* alphas, int64_t count, double sigma_sq, MkmmdTerms<T>* terms) {
  double sorted[kMkmmdMaxKernels];
  std::copy(alphas, alphas + count, sorted);
  std::sort(sorted, sorted + count, [](double a, double b) { return a > b; });
  terms->count = static_cast<int>(count);
  terms->ladder = true;
  int since_exp = 0;  // squarings double the relative error, so a chain is cut after six
  for (int64_t u = 0; u < count; ++u) {
    terms->rate[u] = static_cast<T>(-0.5 / (sorted[u] * sigma_sq));
    terms->slope[u] = static_cast<T>(sorted[0] / sorted[u]);
    terms->squarings[u] = -1;
    if (u == 0) continue;
    const double ratio = sorted[u - 1] / sorted[u];
    for (int s = 0; s <= 3; ++s) {
      if (ratio == static_cast<double>(1 << s) && since_exp + s <= 6) terms->squarings[u] = s;
    }
    since_exp = terms->squarings[u] < 0 ? 0 : since_exp + terms->squarings[u];
    terms->ladder = terms->ladder && terms->squarings[u] == 1;
  }
}

}  // namespace padkern
