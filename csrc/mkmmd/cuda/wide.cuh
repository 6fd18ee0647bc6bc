// float64: plain loops over tiles in shared memory, distances from differences.
#pragma once

#include "mkmmd/cuda/prepare.cuh"
#include "mkmmd/cuda/profile.cuh"

namespace padkern {
namespace cuda {

constexpr int kWideTile = 32;   // two of them to a tile of packed rows
constexpr int kWideDepth = 16;  // columns in shared memory
constexpr int kWideThreads = 256;
constexpr int kWideWarps = kWideThreads / 32;
constexpr int kWidePitch = kWideDepth + 1;  // odd, against bank conflicts
constexpr int kWideTilePitch = kWideTile + 1;

struct WideSpace {
  double* left;
  double* right;
  double* tile;     // coefficients
  double* scratch;  // one per thread
  double* terms;    // [warps, count, 2]
};

PADKERN_HD int64_t wide_bytes(const Call& call) {
  const int64_t terms = call.per_kernel != 0 ? int64_t{kWideWarps} * call.count * 2 : 0;
  return (2 * kWideTile * kWidePitch + kWideTile * kWideTilePitch + kWideThreads + terms) * 8;
}

PADKERN_DEVICE WideSpace wide_space(unsigned char* memory) {
  WideSpace space;
  space.left = reinterpret_cast<double*>(memory);
  space.right = space.left + kWideTile * kWidePitch;
  space.tile = space.right + kWideTile * kWidePitch;
  space.scratch = space.tile + kWideTile * kWideTilePitch;
  space.terms = space.scratch + kWideThreads;
  return space;
}

// A thread's four pairs of a tile: row t / 8, columns t % 8 + 8 e.
constexpr int kWidePairs = 4;
PADKERN_HD int wide_row(int t) { return t >> 3; }
PADKERN_HD int wide_column(int t, int e) { return (t & 7) + 8 * e; }

struct WidePairs {
  double y[kWidePairs];
  double weight[kWidePairs];  // w_i w_j, 0 for a row with itself
  double slope[kWidePairs];
};

template <class B>
PADKERN_DEVICE void wide_distances(const B& block, const Call& call, const WideSpace& space,
                                   int64_t first, int64_t second, WidePairs (&pairs)[B::kSlots]) {
  block.each([&](int, int s) {
    PADKERN_UNROLL
    for (int e = 0; e < kWidePairs; ++e) pairs[s].y[e] = 0.0;
  });
  for (int column = 0; column < call.width; column += kWideDepth) {
    block.each([&](int t, int) {
      for (int i = t; i < kWideTile * kWideDepth; i += kWideThreads) {
        const int r = i / kWideDepth, c = i % kWideDepth;
        space.left[r * kWidePitch + c] = call.points[(first + r) * call.width + column + c];
        space.right[r * kWidePitch + c] = call.points[(second + r) * call.width + column + c];
      }
    });
    block.sync();
    block.each([&](int t, int s) {
      for (int c = 0; c < kWideDepth; ++c) {
        const double a = space.left[wide_row(t) * kWidePitch + c];
        PADKERN_UNROLL
        for (int e = 0; e < kWidePairs; ++e) {
          const double difference = a - space.right[wide_column(t, e) * kWidePitch + c];
          pairs[s].y[e] += difference * difference;
        }
      }
    });
    block.sync();
  }
  const double scale = call.state->scale;
  block.each([&](int t, int s) {
    const int64_t i = first + wide_row(t);
    PADKERN_UNROLL
    for (int e = 0; e < kWidePairs; ++e) {
      const int64_t j = second + wide_column(t, e);
      pairs[s].y[e] *= scale;
      pairs[s].weight[e] = i == j ? 0.0 : call.wide_weights[i] * call.wide_weights[j];
      pairs[s].slope[e] = 0.0;
    }
  });
}

// Kernel sum of the pairs and, with GRADIENT, C_ij = factor w_i w_j slope_ij in pairs.slope.
template <bool GRADIENT, class B>
PADKERN_DEVICE void wide_terms(const B& block, const Call& call, const WideSpace& space,
                               double factor, WidePairs (&pairs)[B::kSlots],
                               double (&kernel)[B::kSlots], double (&spread)[B::kSlots]) {
  const Table<double>& table = call.state->wide;
  block.each([&](int, int s) { kernel[s] = spread[s] = 0.0; });
  for (int u = 0; u < call.count; ++u) {
    double sum_kernel[B::kSlots], sum_slope[B::kSlots];
    block.each([&](int, int s) {
      sum_kernel[s] = sum_slope[s] = 0.0;
      PADKERN_UNROLL
      for (int e = 0; e < kWidePairs; ++e) {
        double value, h;
        profile<double>(call.kernel, pairs[s].y[e] * table.ratio[u], &value, &h);
        sum_kernel[s] += pairs[s].weight[e] * value;
        if (GRADIENT) {
          const double c = factor * pairs[s].weight[e] * (table.slope[u] * h);
          pairs[s].slope[e] += c;
          sum_slope[s] += c * pairs[s].y[e];
        }
      }
      kernel[s] += table.beta[u] * sum_kernel[s];
      spread[s] += sum_slope[s];
      sum_kernel[s] *= factor;
    });
    if (!GRADIENT || call.per_kernel == 0) continue;
    block.warp_sum(sum_kernel);
    block.warp_sum(sum_slope);
    block.each([&](int t, int s) {
      if ((t & 31) != 0) return;
      double* out = space.terms + ((t >> 5) * call.count + u) * 2;
      out[0] += sum_kernel[s];
      out[1] += sum_slope[s];
    });
  }
}

struct WideValue {
  static constexpr int kBlockThreads = kWideThreads;
  static constexpr int kMinBlocks = 2;
  static int64_t shared_bytes(const Call& call) { return wide_bytes(call); }

  template <class B>
  static PADKERN_DEVICE void run(const B& block, const Call& call) {
    const State& state = *call.state;
    if (state.mode != kRegular) return;
    const WideSpace space = wide_space(block.shared());
    const bool only_cross = cross_only(call);
    const int64_t source_tiles = 2 * call.tiles[0];
    const int64_t count = pair_count(source_tiles, 2 * call.tiles[1], only_cross);
    double same[B::kSlots], cross[B::kSlots];
    block.each([&](int, int s) { same[s] = cross[s] = 0.0; });
    for (int64_t index = block.index_x(); index < count; index += block.count_x()) {
      const TilePair pair = pair_at(index, source_tiles, only_cross);
      WidePairs pairs[B::kSlots];
      double kernel[B::kSlots], spread[B::kSlots];
      wide_distances(block, call, space, pair.row * kWideTile, pair.column * kWideTile, pairs);
      wide_terms<false>(block, call, space, 1.0, pairs, kernel, spread);
      const int side = pair.row < source_tiles ? 0 : 1;
      const bool inside = side == (pair.column < source_tiles ? 0 : 1);
      const double times =
          inside ? state.factor[side] * (pair.row == pair.column ? 1.0 : 2.0) : 1.0;
      block.each([&](int, int s) { (inside ? same[s] : cross[s]) += times * kernel[s]; });
    }
    PairSums out = {0.0, 0.0, 0.0};
    block_sum(block, same, space.scratch, &out.same);
    block_sum(block, cross, space.scratch, &out.cross);
    block.each([&](int t, int) {
      if (t == 0) call.sums[block.index_x()] = out;
    });
  }
};

// A block owns 32 rows and adds their gradients up in the output itself, tile by tile.
struct WideGradient {
  static constexpr int kBlockThreads = kWideThreads;
  static constexpr int kMinBlocks = 2;
  static int64_t shared_bytes(const Call& call) { return wide_bytes(call); }

  template <class B>
  static PADKERN_DEVICE void run(const B& block, const Call& call) {
    const State& state = *call.state;
    const WideSpace space = wide_space(block.shared());
    const int64_t tile = block.index_x();
    const int side = side_of_tile(call, tile / 2);
    const double fill = state.mode == kNan ? bit_cast<float>(0x7fc00000u) : 0.0f;
    each_output(block, call, tile, [&](int, int, double* out) { *out = fill; });
    if (state.mode != kRegular) return;
    const int term_count = call.per_kernel != 0 ? call.count * 2 : 0;
    block.each([&](int t, int) {
      for (int i = t; i < kWideWarps * term_count; i += kWideThreads) space.terms[i] = 0.0;
    });
    const TileRange range =
        column_range(tile, 2 * call.tiles[0], 2 * call.tiles[1], cross_only(call), 0, 1);
    double same[B::kSlots], cross[B::kSlots], spread[B::kSlots];
    block.each([&](int, int s) { same[s] = cross[s] = spread[s] = 0.0; });
    for (int64_t column_tile = range.begin; column_tile < range.end; ++column_tile) {
      WidePairs pairs[B::kSlots];
      double kernel[B::kSlots], tile_spread[B::kSlots];
      const int64_t first = tile * kWideTile, second = column_tile * kWideTile;
      const bool inside = side == side_of_tile(call, column_tile / 2);
      const double factor = state.factor[inside ? side : 2];
      wide_distances(block, call, space, first, second, pairs);
      wide_terms<true>(block, call, space, factor, pairs, kernel, tile_spread);
      block.each([&](int t, int s) {
        (inside ? same[s] : cross[s]) += inside ? factor * kernel[s] : kernel[s];
        spread[s] += tile_spread[s];
        PADKERN_UNROLL
        for (int e = 0; e < kWidePairs; ++e) {
          space.tile[wide_row(t) * kWideTilePitch + wide_column(t, e)] = pairs[s].slope[e];
        }
      });
      block.sync();
      each_output(block, call, tile, [&](int r, int column, double* out) {
        const double* z = call.points + second * call.width + column;
        const double own = call.points[(first + r) * call.width + column];
        double sum = 0.0;
        for (int j = 0; j < kWideTile; ++j) {
          sum += space.tile[r * kWideTilePitch + j] * (own - z[j * call.width]);
        }
        *out += sum;
      });
      block.sync();
    }
    const double scale = -4.0 * state.rate;
    each_output(block, call, tile, [&](int, int, double* out) { *out *= scale; });
    PairSums sums;
    block_sum(block, same, space.scratch, &sums.same);
    block_sum(block, cross, space.scratch, &sums.cross);
    block_sum(block, spread, space.scratch, &sums.spread);
    block.each([&](int t, int) {
      if (t == 0) call.sums[tile] = sums;
      if (t >= term_count) return;
      double sum = space.terms[t];
      for (int w = 1; w < kWideWarps; ++w) sum += space.terms[w * term_count + t];
      call.term_sums[tile * term_count + t] = sum;
    });
  }

 private:
  // use(row within the tile, column, &gradient) for what the tile has; a thread always meets the
  // same elements, so it may read back what it wrote.
  template <class B, class Use>
  static PADKERN_DEVICE void each_output(const B& block, const Call& call, int64_t tile,
                                         const Use& use) {
    const int64_t packed = tile * kWideTile;
    const Sample& sample = call.sample[side_of_tile(call, tile / 2)];
    const int64_t begin = first_row(call, packed / kTile) + packed % kTile;
    const int rows =
        static_cast<int>(larger<int64_t>(0, smaller<int64_t>(kWideTile, sample.rows - begin)));
    double* out = static_cast<double*>(sample.gradient) + begin * call.dim;
    block.each([&](int t, int) {
      for (int r = t / 32; r < rows; r += kWideWarps) {
        for (int64_t c = t % 32; c < call.dim; c += 32) {
          use(r, static_cast<int>(c), out + r * call.dim + c);
        }
      }
    });
  }
};

}  // namespace cuda
}  // namespace padkern
