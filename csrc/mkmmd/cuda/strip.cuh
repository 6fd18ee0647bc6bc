// Gradients of rows too wide to stay in registers: strip by strip of columns, coefficients go to
// memory, then one product with the strip's rows adds them to the gradients. Launches follow one
// another, so what a block adds to memory it owns is in a fixed order.
#pragma once

#include "mkmmd/cuda/value.cuh"

namespace padkern {
namespace cuda {

constexpr int kStripTiles = 4;
constexpr int kStripColumns = kStripTiles * kTile;
constexpr int kStripOut = 128;  // columns of the gradient per block

PADKERN_HD int64_t strip_slots(const Call& call) {
  return smaller<int64_t>(kStripTiles, all_tiles(call));
}

// Blocks (row tile, slot): coefficients of the tile's rows with one column tile of the strip.
template <bool LADDER>
struct StripCoefficients {
  static constexpr int kBlockThreads = kThreads;
  static constexpr int kMinBlocks = 2;
  static int64_t shared_bytes(const Call& call) {
    return stream_bytes() +
           (call.per_kernel != 0 ? int64_t{kThreads / 32} * call.count * 2 * 8 : 0);
  }

  template <class B>
  static PADKERN_DEVICE void run(const B& block, const Call& call) {
    constexpr int kBlocks = kTile / 8;
    const State& state = *call.state;
    if (state.mode != kRegular) return;
    const int64_t slot = block.index_y();
    const TilePair pair = {block.index_x(), call.strip * int64_t{kStripTiles} + slot};
    const int64_t index = slot * all_tiles(call) + pair.row;
    const int side = side_of_tile(call, pair.row);
    const bool exists = pair.column < all_tiles(call);
    const bool inside = exists && side == side_of_tile(call, pair.column);
    const int term_count = call.per_kernel != 0 ? call.count * 2 : 0;
    double* term_sums = reinterpret_cast<double*>(block.shared() + stream_bytes());
    block.each([&](int t, int) {
      for (int i = t; i < kThreads / 32 * term_count; i += kThreads) term_sums[i] = 0.0;
    });
    block.sync();

    Floats4 sum[kBlocks][B::kSlots];
    PADKERN_UNROLL
    for (int b = 0; b < kBlocks; ++b) set_zero(block, sum[b]);
    TileSums sums[B::kSlots];
    block.each([&](int, int s) { sums[s] = {0.0f, 0.0f, {0.0f, 0.0f}}; });
    if (exists && !(inside && cross_only(call))) {
      const int chunks = static_cast<int>(ceil_div(call.width, kChunk));
      copy_stage(block, call, pair, 0, stage_at(block.shared(), 0));
      block.commit();
      PADKERN_NO_UNROLL
      for (int chunk = 0; chunk < chunks; ++chunk) {
        if (chunk + 1 < chunks) {
          copy_stage(block, call, pair, chunk + 1, stage_at(block.shared(), (chunk + 1) & 1));
        }
        block.commit();
        block.template wait<1>();
        block.sync();
        const Stage stage = stage_at(block.shared(), chunk & 1);
        add_stage<true>(block, call, stage, chunk, sum);
        block.sync();
      }
      RowPair rows[B::kSlots];
      load_row_pair(block, call, pair.row, rows);
      const float factor = state.coefficient[side][inside ? 0 : 1];
      pair_terms<kBlocks, LADDER, true>(block, call, rows, pair.row, pair.column, 0, factor,
                                        term_sums, sum, sums);
    }
    block.template wait<0>();
    block.sync();
    write_coefficients(block, call, pair.row, slot, sum);

    double* scratch = reinterpret_cast<double*>(block.shared());
    const double times = inside ? state.factor[side] : 1.0;
    double part[B::kSlots], kernel, spread;
    block.each([&](int, int s) { part[s] = times * static_cast<double>(sums[s].kernel); });
    block_sum(block, part, scratch, &kernel);
    block.each([&](int, int s) { part[s] = static_cast<double>(sums[s].spread); });
    block_sum(block, part, scratch, &spread);
    double* slopes = reinterpret_cast<double*>(block.shared());
    block.each([&](int t, int s) {
      for (int r = 0; r < 2; ++r) {
        const int row = (t >> 5) * 16 + result_row(t & 31, 2 * r);
        slopes[row * 4 + (t & 3)] = static_cast<double>(sums[s].slope[r]);
      }
    });
    block.sync();
    const bool first = call.strip == 0;
    block.each([&](int t, int) {
      if (t == 0) {
        PairSums total = {0.0, 0.0, 0.0};
        if (!first) total = call.sums[index];
        (inside ? total.same : total.cross) += kernel;
        total.spread += state.unit[side] * spread;
        call.sums[index] = total;
      }
      if (t < kTile) {
        const double* p = slopes + t * 4;
        double* to = call.strip_slopes + index * kTile + t;
        *to = (first ? 0.0 : *to) + ((p[0] + p[1]) + (p[2] + p[3]));
      }
      if (t < term_count) {
        double* to = call.term_sums + index * term_count + t;
        double total = first ? 0.0 : *to;
        for (int w = 0; w < kThreads / 32; ++w) {
          total += state.unit[side] * term_sums[w * term_count + t];
        }
        *to = total;
      }
    });
  }

 private:
  template <int BLOCKS, class B>
  static PADKERN_DEVICE void write_coefficients(const B& block, const Call& call, int64_t row_tile,
                                                int64_t slot, Floats4 (&sum)[BLOCKS][B::kSlots]) {
    float scale[B::kSlots];
    block.each([&](int, int s) { scale[s] = kNoScale; });
    Floats4 none[1][B::kSlots];
    set_zero(block, none[0]);
    fit_scale(block, sum, scale, none);
    block.each([&](int t, int s) {
      if ((t & 31) == 0) {
        const int64_t rows = slot * all_tiles(call) + row_tile;
        call.strip_scales[rows * (kTile / 16) + (t >> 5)] = scale[s];
      }
      PADKERN_UNROLL
      for (int b = 0; b < BLOCKS; ++b) {
        PADKERN_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int row = (t >> 5) * 16 + result_row(t & 31, 2 * r);
          const int column = 8 * b + result_column(t & 31, 0);
          const int64_t at = (row_tile * kTile + row) * kStripColumns + slot * kTile + column;
          uint32_t high, low;
          split_half(scale[s] * sum[b][s].x[2 * r], scale[s] * sum[b][s].x[2 * r + 1], &high, &low);
          *reinterpret_cast<uint32_t*>(call.strip_high + at) = high;
          *reinterpret_cast<uint32_t*>(call.strip_low + at) = low;
        }
      }
    });
  }
};

// Blocks (row tile, 128 columns): adds the strip's coefficients times its rows to the gradients;
// after the last strip, turns the sums into the gradients.
struct StripRows {
  static constexpr int kBlockThreads = kThreads;
  static constexpr int kMinBlocks = 2;
  static int64_t stage_bytes() { return rows_bytes(kTile) + rows_bytes(kStripOut); }
  static int64_t shared_bytes(const Call&) { return 2 * stage_bytes(); }

  template <class B>
  static PADKERN_DEVICE void run(const B& block, const Call& call) {
    constexpr int kOut = kStripOut / 8;
    const int64_t tile = block.index_x();
    const int first_column = static_cast<int>(block.index_y()) * kStripOut;
    const int columns = smaller(kStripOut, call.width - first_column);
    Floats4 total[kOut][B::kSlots], sum[kOut][B::kSlots];
    PADKERN_UNROLL
    for (int b = 0; b < kOut; ++b) set_zero(block, total[b]);
    if (call.state->mode == kRegular) {
      const int64_t begin = call.strip * int64_t{kStripTiles};
      const int count = static_cast<int>(smaller<int64_t>(kStripTiles, all_tiles(call) - begin));
      copy(block, call, tile, begin, 0, first_column, columns);
      PADKERN_NO_UNROLL
      for (int j = 0; j < count; ++j) {
        if (j + 1 < count) copy(block, call, tile, begin, j + 1, first_column, columns);
        block.commit();
        block.template wait<1>();
        block.sync();
        const Stage stage = at(block.shared(), j & 1);
        PADKERN_UNROLL
        for (int b = 0; b < kOut; ++b) set_zero(block, sum[b]);
        PADKERN_NO_UNROLL
        for (int k = 0; k < kTile; k += kStep) {
          const auto place = [&](int t) {
            return ((t >> 5) * 16 + block_row(t & 31)) * stage.left.pitch + k +
                   block_column(t & 31);
          };
          Words4 c_high[B::kSlots], c_low[B::kSlots];
          block.template load_blocks<false>(c_high,
                                            [&](int t) { return stage.left.high + place(t); });
          if (call.products == 3) {
            block.template load_blocks<false>(c_low,
                                              [&](int t) { return stage.left.low + place(t); });
          }
          add_weighted_step(block, call, stage.right, k, columns, c_high, c_low, sum);
        }
        const float* scales = call.strip_scales + (j * all_tiles(call) + tile) * (kTile / 16);
        block.each([&](int t, int s) {
          const float inverse = 1.0f / scales[t >> 5];
          PADKERN_UNROLL
          for (int e = 0; e < 4 * kOut; ++e) {
            total[e >> 2][s].x[e & 3] += inverse * sum[e >> 2][s].x[e & 3];
          }
        });
        block.sync();
      }
    }
    write(block, call, tile, first_column, total);
  }

 private:
  static PADKERN_DEVICE Stage at(unsigned char* memory, int stage) {
    unsigned char* base = memory + stage * (rows_bytes(kTile) + rows_bytes(kStripOut));
    return {rows_at(base, kTile), rows_at(base + rows_bytes(kTile), kStripOut)};
  }

  template <class B>
  static PADKERN_DEVICE void copy(const B& block, const Call& call, int64_t tile, int64_t begin,
                                  int j, int first_column, int columns) {
    const Stage stage = at(block.shared(), j & 1);
    const int64_t from = tile * kTile * kStripColumns + j * kTile;
    copy_rows(block, call, call.strip_high + from, call.strip_low + from, kStripColumns, kTile,
              stage.left);
    copy_tile(block, call, begin + j, first_column, columns, stage.right);
    if (j == 0) block.commit();
  }

  template <int OUT, class B>
  static PADKERN_DEVICE void write(const B& block, const Call& call, int64_t tile, int first_column,
                                   const Floats4 (&sum)[OUT][B::kSlots]) {
    const State& state = *call.state;
    const Sample& sample = call.sample[side_of_tile(call, tile)];
    const float fill = state.mode == kZero ? 0.0f : bit_cast<float>(0x7fc00000u);
    const bool last = call.strip == call.strips - 1;
    const float scale = gradient_scale(call, side_of_tile(call, tile));
    block.each([&](int t, int s) {
      PADKERN_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int row = (t >> 5) * 16 + result_row(t & 31, 2 * r);
        const int64_t i = first_row(call, tile) + row;
        if (i >= sample.rows) continue;
        const int64_t packed = tile * kTile + row;
        double slopes = 0.0;
        if (last && state.mode == kRegular) {
          for (int64_t k = 0; k < strip_slots(call); ++k) {
            slopes += call.strip_slopes[k * all_tiles(call) * kTile + packed];
          }
        }
        const float weight = scale * call.weights[packed];
        PADKERN_UNROLL
        for (int e = 0; e < 2 * OUT; ++e) {
          const int column = first_column + 8 * (e >> 1) + result_column(t & 31, e & 1);
          if (column >= call.dim) continue;
          float* to = static_cast<float*>(sample.gradient) + i * call.dim + column;
          float total = sum[e >> 1][s].x[2 * r + (e & 1)];
          if (call.strip != 0) total += *to;
          if (last) {
            const int64_t from = packed * call.width + column;
            float z = half_value(call.high[from]);
            if (call.products == 3) z += half_value(call.low[from]);
            total = weight * (static_cast<float>(slopes) * z - total);
          }
          *to = state.mode == kRegular ? total : fill;
        }
      }
    });
  }
};

}  // namespace cuda
}  // namespace padkern
