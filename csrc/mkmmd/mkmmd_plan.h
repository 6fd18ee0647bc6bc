// How one MK-MMD call is laid out: blocks of rows, workspace, and the terms of the kernel sum.
// Depends on sizes and options only, never on the data or the thread count.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "mkmmd/mkmmd.h"
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
  bool own_products;  // products have memory of their own, not that of the gradients
  bool keep_panels;   // blocks keep their transposed rows

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

template <class T>
Cut make_cut(const MkmmdParams& params, int lanes, int panel) {
  Cut cut{};
  cut.source_rows = params.source.rows;
  cut.target_rows = params.target.rows;
  cut.dim = params.dim;
  // Large blocks use the caches best, small ones leave enough pairs for every thread.
  const int64_t most = std::max(cut.source_rows, cut.target_rows);
  const int64_t full = kMkmmdTileRows<T>;
  const int64_t limit = most >= 1536 ? full : most >= 480 ? std::min<int64_t>(full, 96) : 48;
  // Blocks of one sample have nearly equal sizes, in steps that fill the register tiles.
  const auto block_rows = [limit](int64_t rows) {
    const int64_t blocks = (rows + limit - 1) / limit;
    return std::min(limit, round_up((rows + blocks - 1) / blocks, 8));
  };
  cut.source_block = block_rows(cut.source_rows);
  cut.target_block = block_rows(cut.target_rows);
  cut.source_blocks = (cut.source_rows + cut.source_block - 1) / cut.source_block;
  cut.target_blocks = (cut.target_rows + cut.target_block - 1) / cut.target_block;
  cut.padded_rows = round_up(std::max(cut.source_block, cut.target_block), panel);
  cut.point_stride = round_up(cut.dim, lanes);
  // Products accumulate in the gradients when rows need no padding. Packed rows are kept transposed
  // as well unless that would take more memory than promised: then each pair transposes its own.
  const auto half = [](MkmmdDtype d) {
    return d == MkmmdDtype::kBFloat16 || d == MkmmdDtype::kFloat16;
  };
  const int64_t stride = params.source.gradient_stride;
  if (stride == params.target.gradient_stride && stride > cut.point_stride && stride % lanes == 0) {
    cut.point_stride = stride;
  }
  cut.own_products = cut.point_stride != stride || stride != params.target.gradient_stride;
  cut.keep_panels =
      cut.point_stride == cut.dim && !half(params.source.dtype) && !half(params.target.dtype);
  if (most < 1536) cut.keep_panels = true;
  return cut;
}

// Threads that are worth waking: one for about a tenth of a millisecond of work.
inline int64_t useful_workers(const Cut& cut, int64_t threads) {
  const double rows = static_cast<double>(cut.source_rows + cut.target_rows);
  const double work = rows * rows * (static_cast<double>(cut.dim) + 16.0);
  const int64_t useful = 1 + static_cast<int64_t>(std::min(work / 4e6, 1e6));
  return std::min({threads, useful, std::max<int64_t>(1, (cut.blocks() + 1) / 2)});
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
  T* panels;  // null: not kept
  T* points;
  T* squares;
  T* weights;
  T* products;  // null: accumulate in the gradients themselves
  double* row_sums;
  double* origin;
  double* mean;
  double* column_sums;   // one row per block
  double* terms_kernel;  // one row of terms per block; null when not wanted
  double* terms_spread;
  BlockSums* sums;
  std::atomic<int64_t>* progress;
  char* scratch;  // one part per worker
};

// Lays out the scratch of one worker; with a null base it only measures.
template <class T>
int64_t lay_out_scratch(void* base, const Cut& cut, bool gradient, MkmmdScratch<T>* scratch) {
  Workspace space(base);
  *scratch = MkmmdScratch<T>{};
  const int64_t block = std::max(cut.source_block, cut.target_block);
  scratch->tile = space.take<T>(std::min<int64_t>(gradient ? block : 48, round_up(block, 8)) *
                                kMkmmdTileStride<T>);
  scratch->row = space.take<T>(cut.point_stride);
  if (!cut.keep_panels) scratch->panels = space.take<T>(cut.padded_rows * cut.dim);
  if (gradient && !cut.own_products) scratch->products = space.take<T>(block * cut.point_stride);
  return space.used();
}

template <class T>
Buffers<T> lay_out(Workspace& space, const Cut& cut, const MkmmdParams& params, int64_t workers) {
  const int64_t rows = cut.source_rows + cut.target_rows;
  const int64_t padded = cut.blocks() * cut.padded_rows;
  Buffers<T> buffers{};
  if (cut.keep_panels) buffers.panels = space.take<T>(padded * cut.dim);
  buffers.points = space.take<T>(rows * cut.point_stride);
  buffers.squares = space.take<T>(padded);
  buffers.weights = space.take<T>(padded);
  if (params.want_gradient) {
    if (cut.own_products) buffers.products = space.take<T>(rows * cut.point_stride);
    buffers.row_sums = space.take<double>(rows);
    buffers.terms_kernel = space.take<double>(cut.blocks() * kMkmmdMaxKernels);
    buffers.terms_spread = space.take<double>(cut.blocks() * kMkmmdMaxKernels);
  }
  buffers.origin = space.take<double>(cut.dim);
  buffers.mean = space.take<double>(cut.dim);
  buffers.column_sums = space.take<double>(cut.blocks() * cut.dim);
  buffers.sums = space.take<BlockSums>(cut.blocks());
  buffers.progress = space.take<std::atomic<int64_t>>(cut.blocks());
  MkmmdScratch<T> scratch;
  const int64_t size = lay_out_scratch<T>(nullptr, cut, params.want_gradient, &scratch);
  buffers.scratch = space.take<char>(size * workers);
  return buffers;
}

}  // namespace padkern
