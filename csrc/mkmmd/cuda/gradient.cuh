// Value and gradient, row-parallel: a block owns one tile of rows and meets every column tile, so
// that each gradient is added up in registers, in a fixed order.
#pragma once

#include "mkmmd/cuda/prepare.cuh"
#include "mkmmd/cuda/tile.cuh"

namespace padkern {
namespace cuda {

PADKERN_HD int64_t term_space_bytes(const Call& call) {
  return call.per_kernel != 0 ? int64_t{kThreads / 32} * call.count * 2 * 8 : 0;
}
PADKERN_HD int64_t gradient_bytes(const Call& call, int stages) {
  return (1 + stages) * rows_bytes(call.width) + term_space_bytes(call);
}

// OUT: accumulators of 8 columns. BLOCKS: how many are formed of a row's inner products at a time,
// in columns of 8; fewer leave more registers to OUT.
template <int OUT, int BLOCKS, bool LADDER>
struct Gradient {
  static constexpr int kBlockThreads = kThreads;
  static constexpr int kMinBlocks = OUT <= 16 ? 2 : 1;
  static int64_t shared_bytes(const Call& call) { return gradient_bytes(call, call.stages); }

  template <class B>
  static PADKERN_DEVICE void run(const B& block, const Call& call) {
    const State& state = *call.state;
    const int64_t tile = block.index_x();
    const int split = static_cast<int>(block.index_y());
    if (state.mode != kRegular) {
      if (call.splits == 1) fill(block, call, tile);
      return;
    }
    const Rows left = rows_at(block.shared(), call.width);
    unsigned char* right_memory = block.shared() + rows_bytes(call.width);
    double* term_sums =
        reinterpret_cast<double*>(right_memory + call.stages * rows_bytes(call.width));
    const int term_count = call.per_kernel != 0 ? call.count * 2 : 0;
    block.each([&](int t, int) {
      for (int i = t; i < kThreads / 32 * term_count; i += kThreads) term_sums[i] = 0.0;
    });
    const TileRange range =
        column_range(tile, call.tiles[0], call.tiles[1], cross_only(call), split, call.splits);
    const int side = side_of_tile(call, tile);

    Floats4 out[OUT][B::kSlots];
    PADKERN_UNROLL
    for (int b = 0; b < OUT; ++b) set_zero(block, out[b]);
    struct Sums {
      double same, cross, spread, slope[2];
    };
    Sums total[B::kSlots];
    float scale[B::kSlots];
    block.each([&](int, int s) {
      total[s] = {0.0, 0.0, 0.0, {0.0, 0.0}};
      scale[s] = kNoScale;
    });
    RowPair rows[B::kSlots];
    load_row_pair(block, call, tile, rows);

    const bool two_stages = call.stages == 2;
    copy_tile(block, call, tile, 0, call.width, left);
    if (range.begin < range.end) {
      copy_tile(block, call, range.begin, 0, call.width, rows_at(right_memory, call.width));
    }
    block.commit();
    int now = 0;
    PADKERN_NO_UNROLL
    for (int64_t column_tile = range.begin; column_tile < range.end; ++column_tile) {
      const Rows right = rows_at(right_memory + now * rows_bytes(call.width), call.width);
      const bool more = column_tile + 1 < range.end;
      if (two_stages) {
        now ^= 1;
        if (more) {
          copy_tile(block, call, column_tile + 1, 0, call.width,
                    rows_at(right_memory + now * rows_bytes(call.width), call.width));
        }
        block.commit();
        block.template wait<1>();
      } else {
        block.template wait<0>();
      }
      block.sync();
      const bool inside = side == side_of_tile(call, column_tile);
      const double same_factor = state.factor[side];
      const float factor = state.coefficient[side][inside ? 0 : 1];
      PADKERN_NO_UNROLL
      for (int first = 0; first < kTile; first += 8 * BLOCKS) {
        Floats4 pair[BLOCKS][B::kSlots];
        PADKERN_UNROLL
        for (int b = 0; b < BLOCKS; ++b) set_zero(block, pair[b]);
        add_products<BLOCKS>(block, call, left, right, first, call.width, pair);
        TileSums sums[B::kSlots];
        pair_terms<BLOCKS, LADDER, true>(block, call, rows, tile, column_tile, first, factor,
                                         term_sums, pair, sums);
        fit_scale(block, pair, scale, out);
        PADKERN_UNROLL
        for (int b = 0; b < BLOCKS; b += 2) {
          Words4 c_high[B::kSlots], c_low[B::kSlots];
          split_results(block, scale, pair[b], pair[b + 1], c_high, c_low);
          add_weighted_step(block, call, right, first + 8 * b, call.width, c_high, c_low, out);
        }
        block.each([&](int, int s) {
          const double kernel = static_cast<double>(sums[s].kernel);
          if (inside) {
            total[s].same += same_factor * kernel;
          } else {
            total[s].cross += kernel;
          }
          total[s].spread += static_cast<double>(sums[s].spread);
          total[s].slope[0] += static_cast<double>(sums[s].slope[0]);
          total[s].slope[1] += static_cast<double>(sums[s].slope[1]);
        });
      }
      block.sync();
      if (!two_stages && more) {
        copy_tile(block, call, column_tile + 1, 0, call.width, right);
        block.commit();
      }
    }
    block.template wait<0>();
    block.sync();

    // Four lanes hold parts of each row's slope sum.
    double* slopes = reinterpret_cast<double*>(right_memory);
    block.each([&](int t, int s) {
      for (int r = 0; r < 2; ++r) {
        const int row = (t >> 5) * 16 + result_row(t & 31, 2 * r);
        slopes[row * 4 + (t & 3)] = total[s].slope[r];
      }
    });
    block.sync();
    const float unit = call.splits == 1 ? gradient_scale(call, side) : 1.0f;
    block.each([&](int t, int s) {
      const float inverse = 1.0f / scale[s];
      PADKERN_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int row = (t >> 5) * 16 + result_row(t & 31, 2 * r);
        const double* part = slopes + row * 4;
        const float slope = static_cast<float>((part[0] + part[1]) + (part[2] + part[3]));
        PADKERN_UNROLL
        for (int b = 0; b < OUT; ++b) {
          const int column = 8 * b + result_column(t & 31, 0);
          if (column >= call.width) break;
          const uint32_t high = *reinterpret_cast<uint32_t*>(left.high + row * left.pitch + column);
          const uint32_t low =
              call.products == 3
                  ? *reinterpret_cast<uint32_t*>(left.low + row * left.pitch + column)
                  : 0u;
          float z0, z1;
          join_half(high, low, &z0, &z1);
          const float weight = rows[s].weight[r] * unit;
          write(call, tile, split, row, column,
                weight * (slope * z0 - inverse * out[b][s].x[2 * r]),
                weight * (slope * z1 - inverse * out[b][s].x[2 * r + 1]));
        }
      }
    });
    block.sync();

    double* scratch = reinterpret_cast<double*>(right_memory);
    double part[B::kSlots];
    PairSums sums;
    block.each([&](int, int s) { part[s] = total[s].same; });
    block_sum(block, part, scratch, &sums.same);
    block.each([&](int, int s) { part[s] = total[s].cross; });
    block_sum(block, part, scratch, &sums.cross);
    block.each([&](int, int s) { part[s] = total[s].spread; });
    block_sum(block, part, scratch, &sums.spread);
    const int64_t index = split * all_tiles(call) + tile;
    block.each([&](int t, int) {
      if (t == 0) call.sums[index] = {sums.same, sums.cross, state.unit[side] * sums.spread};
      if (t < term_count) {
        double sum = term_sums[t];
        for (int w = 1; w < kThreads / 32; ++w) sum += term_sums[w * term_count + t];
        call.term_sums[index * term_count + t] = state.unit[side] * sum;
      }
    });
  }

 private:
  // Two neighbouring columns of one row.
  static PADKERN_DEVICE void write(const Call& call, int64_t tile, int split, int row, int column,
                                   float first, float second) {
    if (call.splits != 1) {
      const int64_t at = (split * all_tiles(call) + tile) * kTile + row;
      float* to = call.parts + at * call.width + column;
      to[0] = first;
      to[1] = second;
      return;
    }
    const Sample& sample = call.sample[side_of_tile(call, tile)];
    const int64_t i = first_row(call, tile) + row;
    if (i >= sample.rows) return;
    float* to = static_cast<float*>(sample.gradient) + i * call.dim + column;
    if (column < call.dim) to[0] = first;
    if (column + 1 < call.dim) to[1] = second;
  }

  template <class B>
  static PADKERN_DEVICE void fill(const B& block, const Call& call, int64_t tile) {
    const Sample& sample = call.sample[side_of_tile(call, tile)];
    const float value = call.state->mode == kZero ? 0.0f : bit_cast<float>(0x7fc00000u);
    const int64_t begin = first_row(call, tile) * call.dim;
    const int64_t end = smaller(first_row(call, tile) + kTile, sample.rows) * call.dim;
    block.each([&](int t, int) {
      for (int64_t i = begin + t; i < end; i += kThreads) {
        static_cast<float*>(sample.gradient)[i] = value;
      }
    });
  }
};

// Blocks of rows: adds the splits' parts in order. Only launched when there are several.
struct Combine {
  static constexpr int kBlockThreads = 256;
  static constexpr int kMinBlocks = 2;
  static constexpr int kRows = 8;
  static int64_t shared_bytes(const Call&) { return 0; }

  template <class B>
  static PADKERN_DEVICE void run(const B& block, const Call& call) {
    const State& state = *call.state;
    const float constant = state.mode == kZero ? 0.0f : bit_cast<float>(0x7fc00000u);
    const int64_t stride = all_tiles(call) * kTile * call.width;
    block.each([&](int t, int) {
      for (int r = t / 32; r < kRows; r += kBlockThreads / 32) {
        const int64_t packed = block.index_x() * kRows + r;
        const int64_t tile = packed / kTile;
        const Sample& sample = call.sample[side_of_tile(call, tile)];
        const int64_t i = first_row(call, tile) + packed % kTile;
        if (i >= sample.rows) continue;
        const float scale = gradient_scale(call, side_of_tile(call, tile));
        float* to = static_cast<float*>(sample.gradient) + i * call.dim;
        for (int64_t c = t % 32; c < call.dim; c += 32) {
          float sum = 0.0f;
          if (state.mode == kRegular) {
            for (int k = 0; k < call.splits; ++k) {
              sum += call.parts[k * stride + packed * call.width + c];
            }
          }
          to[c] = state.mode == kRegular ? scale * sum : constant;
        }
      }
    });
  }
};

}  // namespace cuda
}  // namespace padkern
