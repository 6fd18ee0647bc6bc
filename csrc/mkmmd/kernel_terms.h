// Values and slopes of the sum of kernels at vectors of squared distances. Included only by sources
// that CMake compiles once per instruction set.
#pragma once

#include "common/simd.h"
#include "mkmmd/mkmmd_terms.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {

// Which code evaluates the terms: chosen once per call, compiled as a template parameter.
enum class TermPath : int { kLadder5, kSingle, kGaussian, kOther };

template <class T>
inline TermPath term_path(const MkmmdTerms<T>& terms) {
  if (terms.kernel != MkmmdKernel::kGaussian) return TermPath::kOther;
  if (terms.ladder && terms.count == 5) return TermPath::kLadder5;
  if (terms.ladder && terms.count == 1) return TermPath::kSingle;
  return TermPath::kGaussian;
}

// k_u(r) and h_u(r) of a kernel that is not Gaussian; r = d / s_u >= 0.
template <class T>
inline __attribute__((always_inline)) void other_kernel(MkmmdKernel kernel, Vec<T> r, Vec<T>* value,
                                                        Vec<T>* slope) {
  const Vec<T> zero = {};
  const Vec<T> one = zero + T(1);
  switch (kernel) {
    case MkmmdKernel::kLaplacian: {
      const Vec<T> root = square_root(r * T(2));
      *value = exp_scaled(root, T(-1));
      // The distance has no derivative at 0; 0 is taken. NaN stays NaN.
      *slope = root == zero ? zero : *value / root;
      break;
    }
    case MkmmdKernel::kInverseMultiquadric: {
      const Vec<T> root = square_root(one + r);
      *value = one / root;
      *slope = T(0.5) * *value / (one + r);
      break;
    }
    case MkmmdKernel::kRationalQuadratic:
      *value = one / (one + r);
      *slope = *value * *value;
      break;
    default: {
      const Vec<T> root = square_root(r);
      *value = -root;
      *slope = root == zero ? zero : T(0.5) / root;
    }
  }
}

// Calls use(u, k_u, h_u) for each term at squared distance d >= 0 (NaN passes through).
template <class T, class Use>
inline __attribute__((always_inline)) void each_term(const MkmmdTerms<T>& terms, Vec<T> d,
                                                     const Use& use) {
  Vec<T> value = {}, slope = {};
  for (int u = 0; u < terms.count; ++u) {
    if (terms.kernel != MkmmdKernel::kGaussian) {
      other_kernel<T>(terms.kernel, d * terms.inverse_scale[u], &value, &slope);
      use(u, value, slope);
      continue;
    }
    if (terms.squarings[u] < 0) {
      value = exp_scaled(d, -terms.inverse_scale[u]);
    } else {
      for (int s = 0; s < terms.squarings[u]; ++s) value = value * value;
    }
    use(u, value, value);
  }
}

// kernel = sum_u beta_u k_u and, with GRADIENT, slope = sum_u slope_u h_u. `rate` is
// -terms.inverse_scale[0], which a loop that stores cannot keep in a register by itself.
template <class T, TermPath PATH, bool GRADIENT>
inline __attribute__((always_inline)) void kernel_terms(const MkmmdTerms<T>& terms, T rate,
                                                        Vec<T> d, Vec<T>* kernel, Vec<T>* slope) {
  if (PATH == TermPath::kLadder5 || PATH == TermPath::kSingle) {
    Vec<T> e = exp_scaled(d, rate);
    *kernel = e;
    if (GRADIENT) *slope = e;
    constexpr int kCount = PATH == TermPath::kLadder5 ? 5 : 1;
#pragma GCC unroll 8
    for (int u = 1; u < kCount; ++u) {
      e = e * e;
      *kernel += e;
      if (GRADIENT) *slope += e * static_cast<T>(1 << u);
    }
    return;
  }
  Vec<T> values = {}, slopes = {};
  each_term<T>(terms, d, [&](int u, Vec<T> value, Vec<T> h) {
    values += value * terms.beta[u];
    if (GRADIENT) slopes += h * terms.slope[u];
  });
  *kernel = values;
  if (GRADIENT) *slope = slopes;
}

// Squared distance from norms and inner product: never negative, and exactly 0 where rounding of
// identical rows would be magnified by the root of a kernel of the distance.
template <class T>
inline __attribute__((always_inline)) Vec<T> squared_distance(Vec<T> squares, Vec<T> inner,
                                                              bool root_kernel) {
  const Vec<T> d = squares - T(2) * inner;
  if (!root_kernel) return positive_part<T>(d);
  const Vec<T> zero = {};
  constexpr T kEpsilon = sizeof(T) == 4 ? T(1.1920929e-7) : T(2.220446049250313e-16);
  return d <= T(4) * kEpsilon * squares ? zero : d;
}

inline bool is_root_kernel(MkmmdKernel kernel) {
  return kernel == MkmmdKernel::kLaplacian || kernel == MkmmdKernel::kEnergy;
}

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
