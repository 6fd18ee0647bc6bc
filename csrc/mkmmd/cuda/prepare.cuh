// What comes before the pairs: sums of weights, the mean, centred rows in the form that the pair
// kernels read, and the moments that the default bandwidth needs. All sums in double precision, in
// a fixed order.
#pragma once

#include "mkmmd/cuda/call.cuh"
#include "mkmmd/cuda/device_block.cuh"

namespace padkern {
namespace cuda {

// Sums `value` over the block into *total, visible to all threads. `scratch` holds one double per
// thread and may be used again afterwards.
template <class B>
PADKERN_DEVICE void block_sum(const B& block, const double (&value)[B::kSlots], double* scratch,
                              double* total) {
  block.each([&](int t, int s) { scratch[t] = value[s]; });
  block.sync();
  for (int step = B::kBlockThreads / 2; step > 0; step >>= 1) {
    block.each([&](int t, int) {
      if (t < step) scratch[t] += scratch[t + step];
    });
    block.sync();
  }
  *total = scratch[0];
  block.sync();
}

// Largest of the values that the block's threads left in scratch.
template <class B>
PADKERN_DEVICE double block_largest(const B& block, double* scratch) {
  block.sync();
  for (int step = B::kBlockThreads / 2; step > 0; step >>= 1) {
    block.each([&](int t, int) {
      if (t < step) scratch[t] = larger(scratch[t], scratch[t + step]);
    });
    block.sync();
  }
  const double out = scratch[0];
  block.sync();
  return out;
}

// One block: sums, scale and first used row of the weights.
struct WeightSums {
  static constexpr int kBlockThreads = 256;
  static constexpr int kMinBlocks = 1;
  static int64_t shared_bytes(const Call&) { return kBlockThreads * sizeof(double); }

  template <class B>
  static PADKERN_DEVICE void run(const B& block, const Call& call) {
    double* scratch = reinterpret_cast<double*>(block.shared());
    double sum[2], squares[2], scale[2];
    double first[2];  // row numbers are exact in a double
    for (int k = 0; k < 2; ++k) {
      const Sample& sample = call.sample[k];
      if (sample.weight.data == nullptr) {
        sum[k] = squares[k] = static_cast<double>(sample.rows);
        scale[k] = 1.0;
        first[k] = 0.0;
        continue;
      }
      block.each([&](int t, int) {
        double most = 0.0;
        for (int64_t i = t; i < sample.rows; i += kBlockThreads) {
          const double w = row_weight(sample, i);
          if (w > most) most = w;
        }
        scratch[t] = most;
      });
      const double most = block_largest(block, scratch);
      block.each([&](int t, int) {
        double row = static_cast<double>(sample.rows);
        for (int64_t i = t; i < sample.rows; i += kBlockThreads) {
          if (row_weight(sample, i) != 0.0) {
            row = static_cast<double>(i);
            break;
          }
        }
        scratch[t] = -row;
      });
      first[k] = -block_largest(block, scratch);
      int exponent = 1;
      if (most > 0.0 && most < HUGE_VAL) frexp(most, &exponent);
      const double power = ldexp(1.0, smaller(1 - exponent, 1000));
      scale[k] = power;
      typename B::template Reg<double> part, part_squares;
      block.each([&](int t, int s) {
        part[s] = part_squares[s] = 0.0;
        for (int64_t i = t; i < sample.rows; i += kBlockThreads) {
          const double w = row_weight(sample, i) * power;
          part[s] += w;
          part_squares[s] += w * w;
        }
      });
      block_sum(block, part, scratch, &sum[k]);
      block_sum(block, part_squares, scratch, &squares[k]);
    }
    block.each([&](int t, int) {
      if (t != 0) return;
      State& state = *call.state;
      for (int k = 0; k < 2; ++k) {
        state.weight_scale[k] = scale[k];
        state.pool_scale[k] = smaller(scale[0], scale[1]) / scale[k];
        state.weight_sum[k] = sum[k];
        state.weight_squares[k] = squares[k];
      }
      const bool in_source = first[0] < static_cast<double>(call.sample[0].rows);
      const bool in_target = first[1] < static_cast<double>(call.sample[1].rows);
      state.origin_sample = in_source || !in_target ? 0 : 1;
      state.origin_row = in_source ? static_cast<int64_t>(first[0])
                                   : (in_target ? static_cast<int64_t>(first[1]) : -1);
    });
  }
};

// The row that is subtracted first. Differences to it are exactly zero when all rows are identical.
PADKERN_DEVICE double origin_value(const Call& call, int64_t column) {
  const State& state = *call.state;
  if (state.origin_row < 0) return 0.0;
  const Sample& sample = call.sample[state.origin_sample];
  return read_element(sample.data, sample.dtype,
                      state.origin_row * sample.row_stride + column * sample.column_stride);
}

// Blocks (range of rows, 64 columns): weighted column sums relative to the origin.
struct ColumnSums {
  static constexpr int kBlockThreads = 256;
  static constexpr int kMinBlocks = 2;
  static constexpr int kColumns = 64;
  static int64_t shared_bytes(const Call&) { return 2 * kBlockThreads * sizeof(double); }

  template <class B>
  static PADKERN_DEVICE void run(const B& block, const Call& call) {
    double* scratch = reinterpret_cast<double*>(block.shared());
    const int64_t chunk = block.index_x();
    const int side = chunk < call.chunks[0] ? 0 : 1;
    const Sample& sample = call.sample[side];
    const int64_t begin = (side == 0 ? chunk : chunk - call.chunks[0]) * call.chunk_rows[side];
    const int64_t end = smaller(begin + call.chunk_rows[side], sample.rows);
    const int64_t first_column = block.index_y() * kColumns;
    constexpr int kGroups = kBlockThreads / kColumns;
    double* bounds = scratch + kBlockThreads;
    block.each([&](int t, int) {
      const int64_t column = first_column + t % kColumns;
      double sum = 0.0, bound = 0.0;
      if (column < call.dim) {
        const double origin = origin_value(call, column);
        const double scale = call.state->weight_scale[side] * call.state->pool_scale[side];
        for (int64_t i = begin + t / kColumns; i < end; i += kGroups) {
          const double w = row_weight(sample, i) * scale;
          if (w == 0.0) continue;  // not even read: the row may hold NaN
          const double x = read_element(sample.data, sample.dtype,
                                        i * sample.row_stride + column * sample.column_stride);
          sum += w * (x - origin);
          bound = larger(bound, fabs(x - origin));
        }
      }
      scratch[t] = sum;
      bounds[t] = bound;
    });
    block.sync();
    block.each([&](int t, int) {
      if (t >= kColumns || first_column + t >= call.width) return;
      double sum = scratch[t], bound = bounds[t];
      for (int g = 1; g < kGroups; ++g) {
        sum += scratch[g * kColumns + t];
        bound = larger(bound, bounds[g * kColumns + t]);
      }
      call.column_sums[chunk * call.width + first_column + t] = sum;
      call.bounds[chunk * call.width + first_column + t] = bound;
    });
  }
};

// Blocks of 32 columns: the mean from the ranges' sums.
struct Mean {
  static constexpr int kBlockThreads = 256;
  static constexpr int kMinBlocks = 2;
  static constexpr int kColumns = 32;
  static int64_t shared_bytes(const Call&) { return 2 * kBlockThreads * sizeof(double); }

  template <class B>
  static PADKERN_DEVICE void run(const B& block, const Call& call) {
    double* scratch = reinterpret_cast<double*>(block.shared());
    double* bounds = scratch + kBlockThreads;
    constexpr int kGroups = kBlockThreads / kColumns;
    const int64_t first_column = block.index_x() * kColumns;
    const int64_t chunks = call.chunks[0] + call.chunks[1];
    block.each([&](int t, int) {
      const int64_t column = first_column + t % kColumns;
      double sum = 0.0, bound = 0.0;
      if (column < call.width) {
        for (int64_t c = t / kColumns; c < chunks; c += kGroups) {
          sum += call.column_sums[c * call.width + column];
          bound = larger(bound, call.bounds[c * call.width + column]);
        }
      }
      scratch[t] = sum;
      bounds[t] = bound;
    });
    block.sync();
    block.each([&](int t, int) {
      const int64_t column = first_column + t;
      if (t >= kColumns || column >= call.width) return;
      double sum = scratch[t], bound = bounds[t];
      for (int g = 1; g < kGroups; ++g) {
        sum += scratch[g * kColumns + t];
        bound = larger(bound, bounds[g * kColumns + t]);
      }
      const double total = pooled_weight(*call.state);
      call.origin[column] = column < call.dim ? origin_value(call, column) : 0.0;
      const double shift = total == 0.0 ? 0.0 : sum / total;
      call.shift[column] = shift;
      call.bounds[chunks * call.width + column] = bound + fabs(shift);
    });
  }
};

// Blocks (tile of rows, 64 columns): centred rows, zero where unused or padding; weights; moments.
// WIDE: float64 rows; else two float16 parts, scaled to their range.
template <bool WIDE>
struct Pack {
  static constexpr int kBlockThreads = 256;
  static constexpr int kMinBlocks = 2;
  static constexpr int kColumns = 64;
  static int64_t shared_bytes(const Call&) { return kBlockThreads * sizeof(double); }

  template <class B>
  static PADKERN_DEVICE void run(const B& block, const Call& call) {
    double* scratch = reinterpret_cast<double*>(block.shared());
    const int64_t tile = block.index_x();
    const int side = side_of_tile(call, tile);
    const Sample& sample = call.sample[side];
    const double scale = call.state->weight_scale[side];
    const double pool_scale = call.state->pool_scale[side];
    const int64_t first = first_row(call, tile);
    const double row_scale = WIDE ? 1.0 : range_scale(block, call, scratch);
    constexpr int kPairs = kColumns / 2;
    constexpr int kGroups = kBlockThreads / kPairs;
    typename B::template Reg<double> moment;
    block.each([&](int t, int s) {
      moment[s] = 0.0;
      const int64_t column = block.index_y() * kColumns + 2 * (t % kPairs);
      if (column >= call.width) return;
      for (int r = t / kPairs; r < kTile; r += kGroups) {
        const int64_t i = first + r;
        const double w = i < sample.rows ? row_weight(sample, i) * scale : 0.0;
        double z[2] = {0.0, 0.0};
        for (int c = 0; c < 2; ++c) {
          if (w == 0.0 || column + c >= call.dim) continue;
          const double x =
              read_element(sample.data, sample.dtype,
                           i * sample.row_stride + (column + c) * sample.column_stride);
          z[c] = (x - call.origin[column + c]) - call.shift[column + c];
          moment[s] += (w * pool_scale) * (z[c] * z[c]);
        }
        const int64_t row = tile * kTile + r;
        const int64_t at = row * call.width + column;
        if (WIDE) {
          call.points[at] = z[0];
          call.points[at + 1] = z[1];
        } else {
          uint32_t high, low;
          split_half(static_cast<float>(z[0] * row_scale), static_cast<float>(z[1] * row_scale),
                     &high, &low);
          *reinterpret_cast<uint32_t*>(call.high + at) = high;
          *reinterpret_cast<uint32_t*>(call.low + at) = low;
        }
        if (column == 0) {
          if (WIDE) {
            call.wide_weights[row] = w;
          } else {
            call.weights[row] = static_cast<float>(w);
          }
        }
      }
    });
    double total;
    block_sum(block, moment, scratch, &total);
    block.each([&](int t, int) {
      if (t != 0) return;
      const int64_t blocks = ceil_div(call.width, kColumns);
      call.moments[tile * blocks + block.index_y()] = total;
      if (tile == 0 && block.index_y() == 0) call.state->row_scale = row_scale;
    });
  }

 private:
  // The power of two that brings the largest centred element to below 2^14.
  template <class B>
  static PADKERN_DEVICE double range_scale(const B& block, const Call& call, double* scratch) {
    const double* bounds = call.bounds + (call.chunks[0] + call.chunks[1]) * call.width;
    block.each([&](int t, int) {
      double bound = 0.0;
      for (int64_t c = t; c < call.width; c += kBlockThreads) bound = larger(bound, bounds[c]);
      scratch[t] = bound;
    });
    const double bound = block_largest(block, scratch);
    int exponent = 14;
    if (bound > 0.0 && bound < HUGE_VAL) frexp(bound, &exponent);
    return ldexp(1.0, 14 - exponent);
  }
};

}  // namespace cuda
}  // namespace padkern
