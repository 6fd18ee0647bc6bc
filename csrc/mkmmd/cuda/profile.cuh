// The radial kernels at the scaled distances that a thread holds.
#pragma once

#include "mkmmd/cuda/call.cuh"
#include "mkmmd/cuda/device_block.cuh"

namespace padkern {
namespace cuda {

constexpr double kLog2E = 1.4426950408889634;

PADKERN_HD bool is_root_kernel(int kernel) { return kernel == kLaplacian || kernel == kEnergy; }

// Squared distances up to this share of the two norms' sum count as 0, because a root would magnify
// what rounding leaves of equal rows.
PADKERN_HD float root_floor(int kernel) { return is_root_kernel(kernel) ? 4.76837e-7f : 0.0f; }

// What the squared distance is multiplied with to give y, for the widest kernel: 1 / (2 alpha_0
// sigma_sq), Gaussian times log2(e), energy 1.
PADKERN_HD double profile_scale(int kernel, double alpha, double sigma_sq) {
  if (kernel == kEnergy) return 1.0;
  const double inverse = 0.5 / (alpha * sigma_sq);
  return kernel == kGaussian ? inverse * kLog2E : inverse;
}

// One kernel of bandwidth alpha_0 / ratio at y, and h: minus its derivative by y ratio (for
// Gaussian kernels by y ratio ln 2). NaN stays NaN; the root's derivative at 0 is taken as 0.
template <class T>
PADKERN_DEVICE void profile(int kernel, T y, T* value, T* slope) {
  switch (kernel) {
    case kGaussian:
      *value = exp2_of(-y);
      *slope = *value;
      break;
    case kLaplacian: {
      const T root = root_of(T(2) * y);
      *value = exp2_of(root * static_cast<T>(-kLog2E));
      *slope = root == T(0) ? T(0) : *value * inverse_of(root);
      break;
    }
    case kInverseMultiquadric: {
      *value = inverse_root_of(T(1) + y);
      *slope = T(0.5) * *value * (*value * *value);
      break;
    }
    case kRationalQuadratic:
      *value = inverse_of(T(1) + y);
      *slope = *value * *value;
      break;
    default: {
      const T root = root_of(y);
      *value = -root;
      *slope = root == T(0) ? T(0) : T(0.5) * inverse_of(root);
    }
  }
}

// COUNT pairs of one thread: y and the columns' weights in, kernel and slope sums out.
template <int COUNT>
struct Pairs {
  float y[COUNT];
  float weight[COUNT];
  float kernel[COUNT];
  float slope[COUNT];
};

// Five Gaussian kernels whose alphas halve from one to the next: one exponential, four squarings.
template <bool GRADIENT, int COUNT, class B>
PADKERN_DEVICE void ladder_terms(const B& block, Pairs<COUNT> (&pairs)[B::kSlots]) {
  block.each([&](int, int s) {
    PADKERN_UNROLL
    for (int e = 0; e < COUNT; ++e) {
      const float t1 = exp2_of(-pairs[s].y[e]);
      const float t2 = t1 * t1;
      const float t4 = t2 * t2;
      const float t8 = t4 * t4;
      const float t16 = t8 * t8;
      pairs[s].kernel[e] = ((t1 + t2) + (t4 + t8)) + t16;
      if (GRADIENT) {
        pairs[s].slope[e] = t1 + (2.0f * t2 + (4.0f * t4 + (8.0f * t8 + 16.0f * t16)));
      }
    }
  });
}

// Any kernels, any weights of theirs. The loop over terms is outside, so that all pairs stay in
// registers. term_sums, when per-term sums are wanted: for this warp's share, [count][2].
template <bool GRADIENT, int COUNT, class Row, class B>
PADKERN_DEVICE void general_terms(const B& block, const Call& call,
                                  Pairs<COUNT> (&pairs)[B::kSlots], const Row (&rows)[B::kSlots],
                                  float factor, double* term_sums) {
  const Table<float>& table = call.state->single;
  struct Values {
    float term[COUNT];
  };
  Values terms[B::kSlots];
  block.each([&](int, int s) {
    PADKERN_UNROLL
    for (int e = 0; e < COUNT; ++e) {
      terms[s].term[e] = 0.0f;
      pairs[s].kernel[e] = 0.0f;
      pairs[s].slope[e] = 0.0f;
    }
  });
  PADKERN_NO_UNROLL
  for (int u = 0; u < call.count; ++u) {
    const float ratio = table.ratio[u], beta = table.beta[u], slope = table.slope[u];
    const int squarings = call.squarings[u];
    float sum_kernel[B::kSlots], sum_slope[B::kSlots];
    block.each([&](int, int s) {
      float kernel_sum[2] = {0.0f, 0.0f}, slope_sum[2] = {0.0f, 0.0f};
      const auto use = [&](int e, float value, float h) {
        Pairs<COUNT>& p = pairs[s];
        p.kernel[e] += beta * value;
        if (GRADIENT) {
          p.slope[e] += slope * h;
          if (call.per_kernel != 0) {
            const int r = (e >> 1) & 1;
            kernel_sum[r] += p.weight[e] * value;
            slope_sum[r] += p.weight[e] * (slope * h) * p.y[e];
          }
        }
      };
      const auto all = [&](int kernel) {
        PADKERN_UNROLL
        for (int e = 0; e < COUNT; ++e) {
          float value, h;
          profile<float>(kernel, pairs[s].y[e] * ratio, &value, &h);
          use(e, value, h);
        }
      };
      switch (call.kernel) {
        case kGaussian:
          if (squarings < 0) {
            PADKERN_UNROLL
            for (int e = 0; e < COUNT; ++e) {
              terms[s].term[e] = exp2_of(-(pairs[s].y[e] * ratio));
            }
          }
          for (int q = 0; q < squarings; ++q) {
            PADKERN_UNROLL
            for (int e = 0; e < COUNT; ++e) terms[s].term[e] *= terms[s].term[e];
          }
          PADKERN_UNROLL
          for (int e = 0; e < COUNT; ++e) use(e, terms[s].term[e], terms[s].term[e]);
          break;
        case kLaplacian:
          all(kLaplacian);
          break;
        case kInverseMultiquadric:
          all(kInverseMultiquadric);
          break;
        case kRationalQuadratic:
          all(kRationalQuadratic);
          break;
        default:
          all(kEnergy);
      }
      sum_kernel[s] =
          factor * (rows[s].weight[0] * kernel_sum[0] + rows[s].weight[1] * kernel_sum[1]);
      sum_slope[s] = factor * (rows[s].weight[0] * slope_sum[0] + rows[s].weight[1] * slope_sum[1]);
    });
    if (!GRADIENT || call.per_kernel == 0) continue;
    block.warp_sum(sum_kernel);
    block.warp_sum(sum_slope);
    block.each([&](int t, int s) {
      if ((t & 31) != 0) return;
      double* out = term_sums + ((t >> 5) * call.count + u) * 2;
      out[0] += static_cast<double>(sum_kernel[s]);
      out[1] += static_cast<double>(sum_slope[s]);
    });
  }
}

}  // namespace cuda
}  // namespace padkern
