// The value alone: unique pairs of tiles, products streamed through shared memory. And the norms,
// which are the diagonal of the same products.
#pragma once

#include "mkmmd/cuda/prepare.cuh"
#include "mkmmd/cuda/tile.cuh"

namespace padkern {
namespace cuda {

// Two stages of kChunk columns of both operands.
PADKERN_HD int64_t stream_bytes() { return 4 * rows_bytes(kChunk); }

struct Stage {
  Rows left;
  Rows right;
};

PADKERN_DEVICE Stage stage_at(unsigned char* memory, int stage) {
  unsigned char* base = memory + stage * 2 * rows_bytes(kChunk);
  return {rows_at(base, kChunk), rows_at(base + rows_bytes(kChunk), kChunk)};
}

template <class B>
PADKERN_DEVICE void copy_stage(const B& block, const Call& call, TilePair pair, int chunk,
                               const Stage& stage) {
  const int columns = smaller(kChunk, call.width - chunk * kChunk);
  copy_tile(block, call, pair.row, chunk * kChunk, columns, stage.left);
  copy_tile(block, call, pair.column, chunk * kChunk, columns, stage.right);
}

// sum += the inner products of one stage. Matrix units round sums toward zero, and with DEEP rows
// the steps are many: then they are added in parts, rounded to nearest. All kernels that meet a
// width do the same, see add_products.
template <bool DEEP, int BLOCKS, class B>
PADKERN_DEVICE void add_stage(const B& block, const Call& call, const Stage& stage, int chunk,
                              Floats4 (&sum)[BLOCKS][B::kSlots]) {
  const int columns = smaller(kChunk, call.width - chunk * kChunk);
  if constexpr (!DEEP) {
    add_products<BLOCKS>(block, call, stage.left, stage.right, 0, columns, sum);
  } else {
    Floats4 part[BLOCKS][B::kSlots];
    PADKERN_UNROLL
    for (int b = 0; b < BLOCKS; ++b) set_zero(block, part[b]);
    add_products<BLOCKS>(block, call, stage.left, stage.right, 0, columns, part);
    block.each([&](int, int s) {
      PADKERN_UNROLL
      for (int e = 0; e < 4 * BLOCKS; ++e) sum[e >> 2][s].x[e & 3] += part[e >> 2][s].x[e & 3];
    });
  }
}

// One block per row tile: |z|^2 as the pair kernels see it, so that equal rows are at distance 0.
template <bool DEEP>
struct Norms {
  static constexpr int kBlockThreads = kThreads;
  static constexpr int kMinBlocks = 2;
  static int64_t shared_bytes(const Call&) { return stream_bytes(); }

  template <class B>
  static PADKERN_DEVICE void run(const B& block, const Call& call) {
    constexpr int kBlocks = kTile / 8;
    const TilePair pair = {block.index_x(), block.index_x()};
    const Stage stage = stage_at(block.shared(), 0);
    Floats4 sum[kBlocks][B::kSlots];
    PADKERN_UNROLL
    for (int b = 0; b < kBlocks; ++b) set_zero(block, sum[b]);
    for (int chunk = 0; chunk * kChunk < call.width; ++chunk) {
      copy_stage(block, call, pair, chunk, stage);
      block.commit();
      block.template wait<0>();
      block.sync();
      add_stage<DEEP>(block, call, stage, chunk, sum);
      block.sync();
    }
    block.each([&](int t, int s) {
      PADKERN_UNROLL
      for (int e = 0; e < 4 * kBlocks; ++e) {
        const int row = (t >> 5) * 16 + result_row(t & 31, e & 3);
        const int column = 8 * (e >> 2) + result_column(t & 31, e & 3);
        if (row == column) call.norms[pair.row * kTile + row] = sum[e >> 2][s].x[e & 3];
      }
    });
  }
};

template <bool LADDER, bool DEEP>
struct Value {
  static constexpr int kBlockThreads = kThreads;
  static constexpr int kMinBlocks = 2;
  static int64_t shared_bytes(const Call&) { return stream_bytes(); }

  template <class B>
  static PADKERN_DEVICE void run(const B& block, const Call& call) {
    constexpr int kBlocks = kTile / 8;
    const State& state = *call.state;
    if (state.mode != kRegular) return;
    const bool only_cross = cross_only(call);
    const int64_t pairs = pair_count(call.tiles[0], call.tiles[1], only_cross);
    const int chunks = static_cast<int>(ceil_div(call.width, kChunk));
    double same[B::kSlots], cross[B::kSlots];
    block.each([&](int, int s) { same[s] = cross[s] = 0.0; });
    int64_t index = block.index_x();
    TilePair pair = pair_at(index, call.tiles[0], only_cross);
    int now = 0;
    copy_stage(block, call, pair, 0, stage_at(block.shared(), now));
    block.commit();
    PADKERN_NO_UNROLL
    for (int64_t next; index < pairs; index = next) {
      next = index + block.count_x();
      TilePair following = pair;
      if (next < pairs) following = pair_at(next, call.tiles[0], only_cross);
      RowPair rows[B::kSlots];
      load_row_pair(block, call, pair.row, rows);
      Floats4 sum[kBlocks][B::kSlots];
      PADKERN_UNROLL
      for (int b = 0; b < kBlocks; ++b) set_zero(block, sum[b]);
      PADKERN_NO_UNROLL
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const Stage other = stage_at(block.shared(), now ^ 1);
        if (chunk + 1 < chunks) {
          copy_stage(block, call, pair, chunk + 1, other);
        } else if (next < pairs) {
          copy_stage(block, call, following, 0, other);
        }
        block.commit();
        block.template wait<1>();
        block.sync();
        const Stage stage = stage_at(block.shared(), now);
        add_stage<DEEP>(block, call, stage, chunk, sum);
        block.sync();
        now ^= 1;
      }
      TileSums sums[B::kSlots];
      pair_terms<kBlocks, LADDER, false>(block, call, rows, pair.row, pair.column, 0, 1.0f, nullptr,
                                         sum, sums);
      const int side = side_of_tile(call, pair.row);
      const bool inside = side == side_of_tile(call, pair.column);
      const double times =
          inside ? state.factor[side] * (pair.row == pair.column ? 1.0 : 2.0) : 1.0;
      block.each([&](int, int s) {
        const double kernel = times * static_cast<double>(sums[s].kernel);
        (inside ? same[s] : cross[s]) += kernel;
      });
      pair = following;
    }
    block.template wait<0>();
    block.sync();
    double* scratch = reinterpret_cast<double*>(block.shared());
    PairSums out = {0.0, 0.0, 0.0};
    block_sum(block, same, scratch, &out.same);
    block_sum(block, cross, scratch, &out.cross);
    block.each([&](int t, int) {
      if (t == 0) call.sums[block.index_x()] = out;
    });
  }
};

}  // namespace cuda
}  // namespace padkern
