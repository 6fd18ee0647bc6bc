// One tile of pairs: inner products by matrix instructions, and the coefficients made from them.
#pragma once

#include "mkmmd/cuda/call.cuh"
#include "mkmmd/cuda/device_block.cuh"
#include "mkmmd/cuda/profile.cuh"

namespace padkern {
namespace cuda {

// Both parts of some packed rows in shared memory; `pitch` counts elements.
struct Rows {
  uint16_t* high;
  uint16_t* low;
  int pitch;
};

PADKERN_HD int64_t rows_bytes(int columns) {
  return int64_t{2} * kTile * (columns + kRowPad) * static_cast<int64_t>(sizeof(uint16_t));
}

PADKERN_DEVICE Rows rows_at(unsigned char* memory, int columns) {
  Rows rows;
  rows.pitch = columns + kRowPad;
  rows.high = reinterpret_cast<uint16_t*>(memory);
  rows.low = rows.high + kTile * rows.pitch;
  return rows;
}

// Starts the copy of 64 rows of `columns` elements, a multiple of 16, from packed rows `stride`
// apart. Eight threads copy 128 bytes of one row.
template <class B>
PADKERN_DEVICE void copy_rows(const B& block, const Call& call, const uint16_t* high,
                              const uint16_t* low, int64_t stride, int columns, const Rows& rows) {
  block.each([&](int t, int) {
    for (int r = t >> 3; r < kTile; r += B::kBlockThreads / 8) {
      for (int c = (t & 7) * 8; c < columns; c += 64) {
        const int64_t from = r * stride + c;
        block.copy16(rows.high + r * rows.pitch + c, high + from);
        if (call.products == 3) block.copy16(rows.low + r * rows.pitch + c, low + from);
      }
    }
  });
}

// The same for columns [first_column, first_column + columns) of a tile of the samples' rows.
template <class B>
PADKERN_DEVICE void copy_tile(const B& block, const Call& call, int64_t tile, int first_column,
                              int columns, const Rows& rows) {
  const int64_t from = tile * kTile * call.width + first_column;
  copy_rows(block, call, call.high + from, call.low + from, call.width, columns, rows);
}

// sum[b] += inner products of the warp's 16 rows of `left` with rows 8 b .. 8 b + 7, counted from
// right_row, of `right`, over the given columns. Every kernel forms them in this order, so equal
// rows have equal inner products, bit for bit, wherever they lie.
template <int BLOCKS, class B>
PADKERN_DEVICE void add_products(const B& block, const Call& call, const Rows& left,
                                 const Rows& right, int right_row, int columns,
                                 Floats4 (&sum)[BLOCKS][B::kSlots]) {
  const bool three = call.products == 3;
  PADKERN_NO_UNROLL
  for (int k = 0; k < columns; k += kStep) {
    Words4 a_high[B::kSlots], a_low[B::kSlots];
    const auto left_place = [&](int t) {
      return ((t >> 5) * 16 + block_row(t & 31)) * left.pitch + k + block_column(t & 31);
    };
    block.template load_blocks<false>(a_high, [&](int t) { return left.high + left_place(t); });
    if (three) {
      block.template load_blocks<false>(a_low, [&](int t) { return left.low + left_place(t); });
    }
    PADKERN_UNROLL
    for (int b = 0; b < BLOCKS; b += 2) {
      const auto right_place = [&](int t) {
        return (right_row + 8 * b + pair_row(t & 31)) * right.pitch + k + pair_column(t & 31);
      };
      Words4 b_high[B::kSlots], b_low[B::kSlots];
      block.template load_blocks<false>(b_high, [&](int t) { return right.high + right_place(t); });
      block.mma(sum[b], a_high, b_high, 0);
      block.mma(sum[b + 1], a_high, b_high, 1);
      if (!three) continue;
      block.template load_blocks<false>(b_low, [&](int t) { return right.low + right_place(t); });
      block.mma(sum[b], a_high, b_low, 0);
      block.mma(sum[b + 1], a_high, b_low, 1);
      block.mma(sum[b], a_low, b_high, 0);
      block.mma(sum[b + 1], a_low, b_high, 1);
    }
  }
}

// sum[b] += C z over the columns 8 b .. 8 b + 7 of `right`, for 16 rows of `right` from right_row
// on, whose coefficients are given as left operands. `columns` <= 8 OUT, a multiple of 16.
template <int OUT, class B>
PADKERN_DEVICE void add_weighted_step(const B& block, const Call& call, const Rows& right,
                                      int right_row, int columns, const Words4 (&c_high)[B::kSlots],
                                      const Words4 (&c_low)[B::kSlots],
                                      Floats4 (&sum)[OUT][B::kSlots]) {
  const bool three = call.products == 3;
  PADKERN_UNROLL
  for (int b = 0; b < OUT; b += 2) {
    if (8 * b >= columns) break;
    const auto place = [&](int t) {
      return (right_row + block_row(t & 31)) * right.pitch + 8 * b + block_column(t & 31);
    };
    Words4 z_high[B::kSlots], z_low[B::kSlots];
    block.template load_blocks<true>(z_high, [&](int t) { return right.high + place(t); });
    block.mma(sum[b], c_high, z_high, 0);
    block.mma(sum[b + 1], c_high, z_high, 1);
    if (!three) continue;
    block.template load_blocks<true>(z_low, [&](int t) { return right.low + place(t); });
    block.mma(sum[b], c_high, z_low, 0);
    block.mma(sum[b + 1], c_high, z_low, 1);
    block.mma(sum[b], c_low, z_high, 0);
    block.mma(sum[b + 1], c_low, z_high, 1);
  }
}

// Before any coefficient was seen. Scales are powers of two, the same in all lanes of a warp.
constexpr float kNoScale = 1.329227995784916e36f;  // 2^120

// The power of two that brings a positive number to [2^9, 2^10).
PADKERN_HD float scale_for(float most) {
  const uint32_t exponent = (bit_cast<uint32_t>(most) >> 23) & 255u;
  return bit_cast<float>(smaller(263u - exponent, 247u) << 23);
}

// Makes room for a warp's coefficients in the range of float16: when the largest, times the scale
// so far, is beyond 2^15, the scale shrinks and with it the sums. Smaller coefficients keep the
// scale, as they add little to sums that hold larger ones; so what is lost is below 2^-34 of the
// largest.
template <int BLOCKS, int OUT, class B>
PADKERN_DEVICE void fit_scale(const B& block, const Floats4 (&coefficient)[BLOCKS][B::kSlots],
                              float (&scale)[B::kSlots], Floats4 (&sum)[OUT][B::kSlots]) {
  float most[B::kSlots];
  block.each([&](int, int s) {
    most[s] = 0.0f;
    PADKERN_UNROLL
    for (int e = 0; e < 4 * BLOCKS; ++e) {
      most[s] = fmaxf(most[s], fabsf(coefficient[e >> 2][s].x[e & 3]));
    }
  });
  block.warp_largest(most);
  block.each([&](int, int s) {
    if (!(most[s] * scale[s] >= 32768.0f)) return;
    const float fitting = scale_for(most[s]);
    const float ratio = fitting / scale[s];
    scale[s] = fitting;
    PADKERN_UNROLL
    for (int b = 0; b < OUT; ++b) {
      PADKERN_UNROLL
      for (int e = 0; e < 4; ++e) sum[b][s].x[e] *= ratio;
    }
  });
}

// The left operand that the results of two neighbouring 16 x 8 products are, lane by lane, in
// parts.
template <class B>
PADKERN_DEVICE void split_results(const B& block, const float (&scale)[B::kSlots],
                                  const Floats4 (&first)[B::kSlots],
                                  const Floats4 (&second)[B::kSlots], Words4 (&high)[B::kSlots],
                                  Words4 (&low)[B::kSlots]) {
  block.each([&](int, int s) {
    PADKERN_UNROLL
    for (int w = 0; w < 4; ++w) {
      const float* c = (w < 2 ? first : second)[s].x + 2 * (w & 1);
      split_half(scale[s] * c[0], scale[s] * c[1], &high[s].x[w], &low[s].x[w]);
    }
  });
}

// What a thread knows of the two rows that its results belong to.
struct RowPair {
  float norm[2];
  float weight[2];
};

template <class B>
PADKERN_DEVICE void load_row_pair(const B& block, const Call& call, int64_t tile,
                                  RowPair (&rows)[B::kSlots]) {
  block.each([&](int t, int s) {
    PADKERN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int64_t row = tile * kTile + (t >> 5) * 16 + result_row(t & 31, 2 * r);
      rows[s].norm[r] = call.norms[row];
      rows[s].weight[r] = call.weights[row];
    }
  });
}

// What turns sum_j C_ij (z_i - z_j) of a sample's packed rows into the gradient.
PADKERN_DEVICE float gradient_scale(const Call& call, int side) {
  const State& state = *call.state;
  return static_cast<float>(-4.0 * state.rate * state.unit[side] / state.row_scale);
}

template <class B>
PADKERN_DEVICE void set_zero(const B& block, Floats4 (&x)[B::kSlots]) {
  block.each([&](int, int s) {
    PADKERN_UNROLL
    for (int e = 0; e < 4; ++e) x[s].x[e] = 0.0f;
  });
}

// What pair_terms adds up for one thread: the caller adds it to sums in double precision.
struct TileSums {
  float kernel;    // w_i w_j k_ij
  float spread;    // w_i C_ij y_ij
  float slope[2];  // C_ij by row, without w_i
};

// Turns inner products (of the tile's rows with columns first_column ...) into the kernel sum and,
// with GRADIENT, the coefficients C_ij = factor w_j slope_ij in their place.
// The rows' own weights are factored out. Pairs of a row with itself count nothing.
template <int BLOCKS, bool LADDER, bool GRADIENT, class B>
PADKERN_DEVICE void pair_terms(const B& block, const Call& call, const RowPair (&rows)[B::kSlots],
                               int64_t row_tile, int64_t column_tile, int first_column,
                               float factor, double* term_sums, Floats4 (&tile)[BLOCKS][B::kSlots],
                               TileSums (&sums)[B::kSlots]) {
  constexpr int kCount = 4 * BLOCKS;
  const float* norms = call.norms + column_tile * kTile + first_column;
  const float* weights = call.weights + column_tile * kTile + first_column;
  const float scale = static_cast<float>(call.state->scale);
  const float floor = root_floor(call.kernel);
  const bool diagonal = row_tile == column_tile;
  Pairs<kCount> pairs[B::kSlots];
  block.each([&](int t, int s) {
    const int lane = t & 31;
    // How far the thread's first row lies right of its first column, within the tile.
    const int offset = (t >> 5) * 16 + result_row(lane, 0) - first_column - result_column(lane, 0);
    PADKERN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      const int column = 8 * (e >> 2) + result_column(lane, e);
      const float both = rows[s].norm[(e >> 1) & 1] + norms[column];
      // Exactly 0 for equal rows: their norms are the inner product that stands here.
      float d = both - 2.0f * tile[e >> 2][s].x[e & 3];
      d = LADDER ? not_negative(d) : (d <= floor * both ? 0.0f : d);
      pairs[s].y[e] = d * scale;
      const bool self = diagonal && offset == 8 * (e >> 2) + (e & 1) - 8 * ((e >> 1) & 1);
      pairs[s].weight[e] = self ? 0.0f : weights[column];
    }
  });
  if (LADDER) {
    ladder_terms<GRADIENT>(block, pairs);
  } else {
    general_terms<GRADIENT>(block, call, pairs, rows, factor, term_sums);
  }
  block.each([&](int, int s) {
    float kernel[2] = {0.0f, 0.0f}, spread[2] = {0.0f, 0.0f};
    TileSums& out = sums[s];
    out.slope[0] = out.slope[1] = 0.0f;
    PADKERN_UNROLL
    for (int e = 0; e < kCount; ++e) {
      const int r = (e >> 1) & 1;
      kernel[r] += pairs[s].weight[e] * pairs[s].kernel[e];
      if (GRADIENT) {
        const float c = pairs[s].slope[e] * (pairs[s].weight[e] * factor);
        tile[e >> 2][s].x[e & 3] = c;
        out.slope[r] += c;
        spread[r] += c * pairs[s].y[e];
      }
    }
    out.kernel = rows[s].weight[0] * kernel[0] + rows[s].weight[1] * kernel[1];
    out.spread = rows[s].weight[0] * spread[0] + rows[s].weight[1] * spread[1];
  });
}

}  // namespace cuda
}  // namespace padkern
