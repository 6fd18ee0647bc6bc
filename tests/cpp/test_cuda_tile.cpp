// The CUDA kernels without a GPU: index arithmetic against its definition, and the emulated kernel
// bodies against plain loops. Run by ctest (-DPADKERN_CPP_TESTS=ON).
#include <cmath>
#include <cstdio>
#include <set>
#include <vector>

#include "cuda_emulation.h"

namespace {

using namespace padkern::cuda;

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  ++failures;
}

float uniform(uint32_t* state) {
  *state = *state * 1664525u + 1013904223u;
  return static_cast<float>(*state >> 8) / 8388608.0f - 1.0f;
}

// ---- numbers
// ---------------------------------------------------------------------------------------

void test_numbers() {
  uint32_t state = 1;
  for (int i = 0; i < 20000; ++i) {
    const float x = std::ldexp(uniform(&state), static_cast<int>(state % 40) - 25);
    uint32_t high, low;
    split_half(x, -x, &high, &low);
    float first, second, leading, other;
    join_half(high, low, &first, &second);
    unpack_half(high, &leading, &other);
    const float limit = std::fmax(std::ldexp(std::fabs(x), -22), std::ldexp(1.0f, -25));
    expect(std::fabs(x - first) <= limit, "two float16 hold a float to 2^-22 or 2^-25");
    expect(first == -second && leading == -other, "both halves round alike");
    const float nearest = std::fmax(std::ldexp(std::fabs(x), -11), std::ldexp(1.0f, -25));
    expect(std::fabs(x - leading) <= nearest, "nearest float16");
  }
  // Every float16 is its own nearest one; between two of them, ties go to the even one.
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    expect(round_half(half_value(bits)) == bits, "float16 stays what it is");
    expect(round_half(-half_value(bits)) == (bits | 0x8000u), "negative float16 stays what it is");
    if (bits + 1 == 0x7c00) break;
    const float middle = 0.5f * (half_value(bits) + half_value(bits + 1));
    expect(round_half(middle) == bits + (bits & 1u), "ties to even");
    expect(round_half(std::nextafter(middle, 0.0f)) == bits, "below the middle");
    expect(round_half(std::nextafter(middle, 1e9f)) == bits + 1, "above the middle");
  }
  expect(round_half(65519.0f) == 0x7bffu && round_half(65520.0f) == 0x7c00u, "largest float16");
  expect(round_half(-HUGE_VALF) == 0xfc00u && std::isnan(half_value(round_half(NAN))),
         "infinity and NaN");
  expect(half_value(0x3c00) == 1.0f && half_value(0xc000) == -2.0f, "float16 of 1 and -2");
  expect(std::isinf(half_value(0x7c00)) && std::isnan(half_value(0x7e00)), "float16 inf and NaN");
  expect(bf16_value(0x3f80) == 1.0f && bf16_value(0xc040) == -3.0f, "bfloat16 of 1 and -3");
  for (int exponent = -126; exponent < 128; ++exponent) {
    const float x = std::ldexp(1.5f, exponent), scale = scale_for(x);
    int power;
    expect(std::frexp(scale, &power) == 0.5f, "scales are powers of two");
    expect(scale <= kNoScale && (scale == kNoScale || (x * scale >= 512.0f && x * scale < 1024.0f)),
           "scales bring numbers to 2^9");
  }
}

// ---- tiles
// -----------------------------------------------------------------------------------------

void test_schedule() {
  for (int64_t source = 1; source <= 5; ++source) {
    for (int64_t target = 1; target <= 6; ++target) {
      for (bool cross : {false, true}) {
        std::set<std::pair<int64_t, int64_t>> seen;
        const int64_t count = pair_count(source, target, cross);
        for (int64_t i = 0; i < count; ++i) {
          const TilePair pair = pair_at(i, source, cross);
          expect(pair.row <= pair.column && pair.column < source + target, "pair in the triangle");
          expect(!cross || (pair.row < source && pair.column >= source), "pair across");
          seen.insert({pair.row, pair.column});
        }
        const int64_t tiles = source + target;
        expect(static_cast<int64_t>(seen.size()) ==
                   (cross ? source * target : tiles * (tiles + 1) / 2),
               "every pair of tiles once");
        for (int64_t row = 0; row < tiles; ++row) {
          int64_t met = 0, last = -1;
          const int splits = split_count(source, target);
          for (int split = 0; split < splits; ++split) {
            const TileRange range = column_range(row, source, target, cross, split, splits);
            expect(last < 0 || range.begin == last, "splits follow one another");
            last = range.end;
            met += range.end - range.begin;
          }
          expect(met == (!cross ? tiles : row < source ? target : source), "all columns met");
        }
      }
    }
  }
  // Far out, where a float could not tell neighbours apart.
  for (int64_t column : {int64_t{1} << 20, int64_t{3000000}, (int64_t{1} << 26) + 1}) {
    const int64_t first = column * (column + 1) / 2;
    for (int64_t i : {first - 1, first, first + column}) {
      const TilePair pair = pair_at(i, 1, false);
      expect(pair.column * (pair.column + 1) / 2 + pair.row == i && pair.row <= pair.column,
             "large indices are inverted");
    }
  }
  for (int64_t tiles = 2; tiles < 300; ++tiles) {
    const int splits = split_count(1, tiles - 1);
    expect(splits >= 1 && splits <= 8 && (tiles < 128 || splits == 1), "splits within bounds");
  }
}

void test_fragments() {
  // Each fragment covers its block exactly once.
  std::set<int> result, left, right;
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 4; ++e) {
      result.insert(result_row(lane, e) * 8 + result_column(lane, e));
      left.insert(left_row(lane, e) * 16 + left_column(lane, e));
      left.insert(left_row(lane, e) * 16 + left_column(lane, e) + 1);
    }
    for (int w = 0; w < 2; ++w) {
      right.insert(right_depth(lane, w) * 8 + right_column(lane));
      right.insert((right_depth(lane, w) + 1) * 8 + right_column(lane));
    }
  }
  expect(result.size() == 128 && left.size() == 256 && right.size() == 128, "fragments are whole");
  // Two neighbouring results hold what one left operand holds, word for word.
  for (int lane = 0; lane < 32; ++lane) {
    for (int w = 0; w < 4; ++w) {
      const int element = 2 * (w & 1);
      expect(left_row(lane, w) == result_row(lane, element) &&
                 left_column(lane, w) == result_column(lane, element) + 8 * (w >> 1),
             "results become a left operand");
    }
  }
  // No two of the eight rows that ldmatrix reads at once start in the same banks.
  for (int width = 16; width <= 256; width += 16) {
    std::set<int> banks;
    for (int r = 0; r < 8; ++r) banks.insert(r * (width + kRowPad) * 2 / 16 % 8);
    expect(banks.size() == 8, "rows lie in different banks");
  }
}

// ldmatrix through the lane addresses gives the fragments that the functions describe.
void test_loads() {
  constexpr int kPitch = 16 + kRowPad;
  alignas(16) unsigned char memory[16 * kPitch * 2];
  uint16_t* x = reinterpret_cast<uint16_t*>(memory);
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 16; ++c) x[r * kPitch + c] = static_cast<uint16_t>(r * 16 + c);
  }
  const HostBlock<32> block(0, 0, 1, memory, sizeof(memory), Freedom());
  Words4 whole[32], pairs[32], turned[32];
  const auto block_place = [&](int t) { return x + block_row(t) * kPitch + block_column(t); };
  block.load_blocks<false>(whole, block_place);
  block.load_blocks<true>(turned, block_place);
  block.load_blocks<false>(pairs, [&](int t) { return x + pair_row(t) * kPitch + pair_column(t); });
  const auto value = [](int row, int column) { return static_cast<uint32_t>(row * 16 + column); };
  for (int lane = 0; lane < 32; ++lane) {
    for (int w = 0; w < 4; ++w) {
      const int r = left_row(lane, w), c = left_column(lane, w);
      expect(whole[lane].x[w] == (value(r, c) | value(r, c + 1) << 16), "left operand");
      const int depth = right_depth(lane, w & 1), column = right_column(lane) + 8 * (w >> 1);
      expect(turned[lane].x[w] == (value(depth, column) | value(depth + 1, column) << 16),
             "right operand, depth along rows");
      expect(pairs[lane].x[w] == (value(column, depth) | value(column, depth + 1) << 16),
             "right operand, depth along columns");
    }
  }
}

// ---- a tile of pairs against plain loops
// -----------------------------------------------------------

template <int BLOCKS, bool LADDER>
void test_tile(int kernel, int width, int products) {
  std::vector<uint16_t> high(2 * kTile * width), low(high.size());
  std::vector<float> norms(2 * kTile), weights(2 * kTile);
  uint32_t random = 7;
  // Rows in the range that packed ones have.
  for (size_t i = 0; i < high.size(); i += 2) {
    const float first = 8192.0f * uniform(&random), second = 8192.0f * uniform(&random);
    uint32_t h, l;
    split_half(first, second, &h, &l);
    high[i] = static_cast<uint16_t>(h), high[i + 1] = static_cast<uint16_t>(h >> 16);
    low[i] = static_cast<uint16_t>(l), low[i + 1] = static_cast<uint16_t>(l >> 16);
  }
  const auto z = [&](int row, int column) {
    const int at = row * width + column;
    return static_cast<double>(half_value(high[at])) +
           (products == 3 ? static_cast<double>(half_value(low[at])) : 0.0);
  };
  State state{};
  Call call{};
  call.kernel = kernel;
  call.width = width;
  call.products = products;
  call.high = high.data();
  call.low = low.data();
  call.norms = norms.data();
  call.weights = weights.data();
  call.state = &state;
  call.count = LADDER ? 5 : 2;
  for (int u = 0; u < call.count; ++u) {
    const float ratio = LADDER ? static_cast<float>(1 << u) : 1.0f + 2.5f * u;
    state.single.ratio[u] = ratio;
    state.single.beta[u] = LADDER ? 1.0f : 0.5f + u;
    state.single.slope[u] = state.single.beta[u] * ratio;
    call.squarings[u] = -1;
  }
  state.scale = 1.0 / (8192.0 * 8192.0 * width);
  for (int r = 0; r < 2 * kTile; ++r) {
    double norm = 0.0;
    for (int c = 0; c < width; ++c) norm += z(r, c) * z(r, c);
    norms[r] = static_cast<float>(norm);
    weights[r] = 1.0f + 0.5f * uniform(&random);
  }
  std::vector<unsigned char> memory(static_cast<size_t>(2 * rows_bytes(width)) + 16);
  unsigned char* shared =
      memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
  const float factor = -0.75f;
  for (int64_t column_tile : {0, 1}) {
    const HostBlock<kThreads> block(0, 0, 1, shared, 2 * rows_bytes(width), Freedom());
    const Rows left = rows_at(shared, width), right = rows_at(shared + rows_bytes(width), width);
    copy_tile(block, call, 0, 0, width, left);
    copy_tile(block, call, column_tile, 0, width, right);
    block.commit();
    block.wait<0>();
    static RowPair rows[kThreads];
    load_row_pair(block, call, 0, rows);
    static Floats4 out[32][kThreads], pair[BLOCKS][kThreads];
    static TileSums sums[kThreads];
    static float scale[kThreads];
    for (float& x : scale) x = kNoScale;
    for (auto& o : out) set_zero(block, o);
    double kernel_sum = 0.0, spread = 0.0, wanted_kernel = 0.0, wanted_spread = 0.0;
    std::vector<double> slopes(kTile, 0.0);
    for (int first = 0; first < kTile; first += 8 * BLOCKS) {
      for (auto& p : pair) set_zero(block, p);
      add_products<BLOCKS>(block, call, left, right, first, width, pair);
      pair_terms<BLOCKS, LADDER, true>(block, call, rows, 0, column_tile, first, factor, nullptr,
                                       pair, sums);
      fit_scale(block, pair, scale, out);
      for (int b = 0; b < BLOCKS; b += 2) {
        static Words4 c_high[kThreads], c_low[kThreads];
        split_results(block, scale, pair[b], pair[b + 1], c_high, c_low);
        add_weighted_step(block, call, right, first + 8 * b, width, c_high, c_low, out);
      }
      for (int t = 0; t < kThreads; ++t) {
        kernel_sum += static_cast<double>(sums[t].kernel);
        spread += static_cast<double>(sums[t].spread);
        for (int r = 0; r < 2; ++r) {
          slopes[t / 32 * 16 + result_row(t % 32, 2 * r)] += static_cast<double>(sums[t].slope[r]);
        }
      }
    }
    double worst_slope = 0.0, worst_out = 0.0, largest = 0.0;
    for (int i = 0; i < kTile; ++i) {
      std::vector<double> product(width, 0.0);
      double slope_sum = 0.0;
      for (int j = 0; j < kTile; ++j) {
        const int jj = static_cast<int>(column_tile) * kTile + j;
        if (jj == i) continue;
        double d = 0.0;
        for (int c = 0; c < width; ++c) d += (z(i, c) - z(jj, c)) * (z(i, c) - z(jj, c));
        const double y = d * state.scale;
        double k = 0.0, h = 0.0;
        for (int u = 0; u < call.count; ++u) {
          const double r = y * static_cast<double>(state.single.ratio[u]);
          double value = 0.0, slope = 0.0;
          if (kernel == kGaussian) value = slope = std::exp2(-r);
          if (kernel == kLaplacian) {
            value = std::exp(-std::sqrt(2 * r)), slope = value / std::sqrt(2 * r);
          }
          if (kernel == kInverseMultiquadric) {
            value = std::pow(1 + r, -0.5), slope = 0.5 * std::pow(1 + r, -1.5);
          }
          if (kernel == kRationalQuadratic) value = 1 / (1 + r), slope = value * value;
          if (kernel == kEnergy) value = -std::sqrt(r), slope = 0.5 / std::sqrt(r);
          k += static_cast<double>(state.single.beta[u]) * value;
          h += static_cast<double>(state.single.slope[u]) * slope;
        }
        const double wi = static_cast<double>(weights[i]), wj = static_cast<double>(weights[jj]);
        const double c = static_cast<double>(factor) * wj * h;
        wanted_kernel += wi * wj * k;
        wanted_spread += wi * c * y;
        slope_sum += c;
        for (int p = 0; p < width; ++p) product[p] += c * z(jj, p);
      }
      worst_slope = std::fmax(worst_slope, std::fabs(slopes[i] - slope_sum) / std::fabs(slope_sum));
      const int t = i / 16 * 32 + i % 8 * 4, element = i % 16 < 8 ? 0 : 2;
      for (int p = 0; p < width; ++p) {
        const float found = out[p / 8][t + p % 8 / 2].x[element + p % 2] / scale[t];
        worst_out = std::fmax(worst_out, std::fabs(static_cast<double>(found) - product[p]));
        largest = std::fmax(largest, std::fabs(product[p]));
      }
    }
    const double limit = products == 3 ? 2e-6 : 2e-3;
    char what[120];
    std::snprintf(what, sizeof(what),
                  "tile of kernel %d, width %d, products %d: %.1e %.1e %.1e %.1e", kernel, width,
                  products, kernel_sum / wanted_kernel - 1, spread / wanted_spread - 1, worst_slope,
                  worst_out / largest);
    expect(std::fabs(kernel_sum / wanted_kernel - 1) < limit &&
               std::fabs(spread / wanted_spread - 1) < limit && worst_slope < limit &&
               worst_out < limit * largest,
           what);
  }
}

}  // namespace

int main() {
  test_numbers();
  test_schedule();
  test_fragments();
  test_loads();
  for (int width : {16, 48, 128, 256}) {
    for (int products : {1, 3}) test_tile<8, true>(kGaussian, width, products);
  }
  test_tile<4, true>(kGaussian, 80, 3);
  for (int kernel = kGaussian; kernel <= kEnergy; ++kernel) {
    test_tile<4, false>(kernel, 32, 3);
    test_tile<2, false>(kernel, 48, 3);
  }
  if (failures == 0) std::puts("all passed");
  return failures == 0 ? 0 : 1;
}
