// What one block computes between and after the pairs: bandwidth and factors, then the results.
#pragma once

#include "mkmmd/cuda/prepare.cuh"
#include "mkmmd/cuda/profile.cuh"

namespace padkern {
namespace cuda {

// Bandwidth, factors and table of terms, from the moments and what the caller gave.
struct Bandwidth {
  static constexpr int kBlockThreads = 256;
  static constexpr int kMinBlocks = 1;
  static int64_t shared_bytes(const Call&) { return kBlockThreads * sizeof(double); }

  template <class B>
  static PADKERN_DEVICE void run(const B& block, const Call& call) {
    double* scratch = reinterpret_cast<double*>(block.shared());
    const int64_t count = all_tiles(call) * ceil_div(call.width, 64);
    double part[B::kSlots];
    block.each([&](int t, int s) {
      part[s] = 0.0;
      for (int64_t i = t; i < count; i += kBlockThreads) part[s] += call.moments[i];
    });
    double moment;
    block_sum(block, part, scratch, &moment);
    block.each([&](int t, int) {
      if (t == 0) set_state(call, moment);
    });
    block.sync();
    block.each([&](int t, int) {
      State& state = *call.state;
      if (t >= call.count) return;
      const double ratio = call.kernel == kEnergy ? 1.0 : widest(call) / alpha_at(call, t);
      const double beta = call.betas.data == nullptr ? 1.0 : element(call.betas, call.order[t]);
      state.alphas[t] = alpha_at(call, t);
      state.wide.ratio[t] = ratio;
      state.wide.beta[t] = beta;
      state.wide.slope[t] = beta * ratio;
      state.single.ratio[t] = static_cast<float>(ratio);
      state.single.beta[t] = static_cast<float>(beta);
      state.single.slope[t] = static_cast<float>(beta * ratio);
    });
  }

 private:
  static PADKERN_DEVICE double alpha_at(const Call& call, int u) {
    return call.alphas.data == nullptr ? call.host_alphas[u] : element(call.alphas, u);
  }

  static PADKERN_DEVICE double widest(const Call& call) {
    double out = alpha_at(call, 0);
    if (call.alphas.data != nullptr) {
      for (int u = 1; u < call.count; ++u) out = larger(out, alpha_at(call, u));
    }
    return out;
  }

  static PADKERN_DEVICE void set_state(const Call& call, double moment) {
    State& state = *call.state;
    const double* sum = state.weight_sum;
    double sigma_sq = 1.0;  // energy has none
    if (call.kernel != kEnergy) {
      sigma_sq = call.sigma_sq.data != nullptr ? element(call.sigma_sq, 0)
                                               : 2.0 * moment / pooled_weight(state);
    }
    state.sigma_sq = sigma_sq;
    state.mode = sigma_sq > 0.0 ? kRegular : (sigma_sq == 0.0 ? kZero : kNan);
    double factor[3] = {0.0, 0.0, 0.5 / (state.weight_scale[0] * state.weight_scale[1])};
    for (int k = 0; k < 2; ++k) {
      const double pairs =
          sum[k] * sum[k] - (call.estimator == kBiased ? 0.0 : state.weight_squares[k]);
      state.divisor[k] = pairs;
      if (!cross_only(call)) factor[k] = 1.0 / pairs;
    }
    if (!cross_only(call)) factor[2] = -1.0 / (sum[0] * sum[1]);
    for (int k = 0; k < 3; ++k) state.factor[k] = factor[k];
    const double alpha = widest(call);
    const double row_scale = call.wide != 0 ? 1.0 : state.row_scale;
    state.scale = profile_scale(call.kernel, alpha, sigma_sq) / (row_scale * row_scale);
    state.rate = call.kernel == kEnergy ? 1.0 : 0.5 / (alpha * sigma_sq);
    for (int k = 0; k < 2; ++k) {
      // Not finite when the divisor is 0: the result is NaN then.
      const double most = larger(fabs(factor[k]), fabs(factor[2]));
      state.coefficient[k][0] = static_cast<float>(factor[k] / most);
      state.coefficient[k][1] = static_cast<float>(factor[2] / most);
      state.unit[k] = most;
    }
  }
};

// Value and derivatives from the sums of the pair kernel's blocks.
struct Finish {
  static constexpr int kBlockThreads = 256;
  static constexpr int kMinBlocks = 1;
  static int64_t shared_bytes(const Call&) { return kBlockThreads * sizeof(double); }

  template <class B>
  static PADKERN_DEVICE void run(const B& block, const Call& call) {
    double* scratch = reinterpret_cast<double*>(block.shared());
    const bool regular = call.state->mode == kRegular;
    PairSums total = {0.0, 0.0, 0.0};
    if (regular) {
      double same[B::kSlots], cross[B::kSlots], spread[B::kSlots];
      block.each([&](int t, int s) {
        same[s] = cross[s] = spread[s] = 0.0;
        for (int64_t i = t; i < call.pair_blocks; i += kBlockThreads) {
          same[s] += call.sums[i].same;
          cross[s] += call.sums[i].cross;
          spread[s] += call.sums[i].spread;
        }
      });
      block_sum(block, same, scratch, &total.same);
      block_sum(block, cross, scratch, &total.cross);
      block_sum(block, spread, scratch, &total.spread);
    }
    block.each([&](int t, int) {
      if (t == 0) {
        write_value(call, regular ? value(call, total) : constant_value(call));
        if (call.sigma_gradient != nullptr) {
          *call.sigma_gradient = regular ? sigma_gradient(call, total.spread) : filling(call);
        }
      }
      if (call.per_kernel != 0 && t < call.count) write_terms(call, t, regular);
    });
  }

 private:
  static PADKERN_DEVICE double filling(const Call& call) {
    return call.state->mode == kZero ? 0.0 : static_cast<double>(bit_cast<float>(0x7fc00000u));
  }

  static PADKERN_DEVICE double offset(const Call& call) {
    return call.estimator == kTllib ? 2.0 / (static_cast<double>(call.sample[0].rows) - 1.0) : 0.0;
  }

  // sum_u beta_u k_u(0)
  static PADKERN_DEVICE double kernel_at_zero(const Call& call) {
    if (call.kernel == kEnergy) return 0.0;
    double sum = 0.0;
    for (int u = 0; u < call.count; ++u) sum += call.state->wide.beta[u];
    return sum;
  }

  static PADKERN_DEVICE double unscaled(const Call& call, double sum) {
    return sum / (call.state->weight_scale[0] * call.state->weight_scale[1]);
  }

  // What the loss is when every kernel is 1: pairs inside the samples and across cancel.
  static PADKERN_DEVICE double constant_kernel(const Call& call) {
    if (!cross_only(call)) return 0.0;
    return unscaled(call, call.state->weight_sum[0] * call.state->weight_sum[1]);
  }

  static PADKERN_DEVICE double constant_value(const Call& call) {
    return filling(call) + kernel_at_zero(call) * constant_kernel(call) + offset(call);
  }

  // Share of the diagonal in the derivative by a kernel's weight.
  static PADKERN_DEVICE double diagonal(const Call& call) {
    const State& state = *call.state;
    if (call.estimator != kBiased || call.kernel == kEnergy) return 0.0;
    return state.weight_squares[0] / state.divisor[0] + state.weight_squares[1] / state.divisor[1];
  }

  static PADKERN_DEVICE double value(const Call& call, const PairSums& total) {
    const State& state = *call.state;
    // With gradients every pair across was met from both sides.
    const double cross = call.sigma_gradient != nullptr ? 0.5 * total.cross : total.cross;
    if (cross_only(call)) return unscaled(call, cross);
    return total.same + kernel_at_zero(call) * diagonal(call) -
           2.0 * cross / (state.weight_sum[0] * state.weight_sum[1]) + offset(call);
  }

  static PADKERN_DEVICE void write_value(const Call& call, double value) {
    if (call.wide != 0) {
      *static_cast<double*>(call.value) = value;
    } else {
      *static_cast<float*>(call.value) = static_cast<float>(value);
    }
  }

  // The spread was taken with y in place of d, which for packed rows are row_scale^2 times larger.
  static PADKERN_DEVICE double sigma_gradient(const Call& call, double spread) {
    const State& state = *call.state;
    if (call.kernel == kEnergy) return 0.0;
    return state.rate * (spread / used_scale(call)) / state.sigma_sq;
  }

  static PADKERN_DEVICE double used_scale(const Call& call) {
    const double scale = call.state->scale;
    if (call.wide != 0) return scale;
    const double row_scale = call.state->row_scale;
    return static_cast<double>(static_cast<float>(scale)) * (row_scale * row_scale);
  }

  static PADKERN_DEVICE void write_terms(const Call& call, int place, bool regular) {
    const State& state = *call.state;
    const int u = call.order[place];
    if (!regular) {
      call.alphas_gradient[u] = filling(call);
      call.betas_gradient[u] = filling(call) + constant_kernel(call);
      return;
    }
    double kernel = 0.0, slope = 0.0;
    for (int64_t i = 0; i < call.pair_blocks; ++i) {
      const double* sums = call.term_sums + (i * call.count + place) * 2;
      kernel += sums[0];
      slope += sums[1];
    }
    call.betas_gradient[u] = kernel + diagonal(call);
    call.alphas_gradient[u] = call.kernel == kEnergy
                                  ? 0.0
                                  : state.rate * (slope / used_scale(call)) / state.alphas[place];
  }
};

}  // namespace cuda
}  // namespace padkern
