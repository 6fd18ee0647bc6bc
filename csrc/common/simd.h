// Fixed-width vectors for the per-instruction-set objects: compiler vector types, no intrinsics, no
// standard library. Included only by sources that CMake compiles once per instruction set.
#pragma once

#include <cstdint>

#ifndef PADKERN_ISA_NAMESPACE
#error "compile through padkern_add_isa_kernel"
#endif

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {

#if defined(__AVX512F__)
#define PADKERN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PADKERN_VECTOR_BYTES 32
#else
#define PADKERN_VECTOR_BYTES 16
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int kLanes = PADKERN_VECTOR_BYTES / 4;
  typedef float Vec __attribute__((vector_size(PADKERN_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(PADKERN_VECTOR_BYTES), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(PADKERN_VECTOR_BYTES)));
};

template <>
struct Simd<double> {
  static constexpr int kLanes = PADKERN_VECTOR_BYTES / 8;
  typedef double Vec __attribute__((vector_size(PADKERN_VECTOR_BYTES)));
  typedef double Unaligned
      __attribute__((vector_size(PADKERN_VECTOR_BYTES), aligned(8), may_alias));
  typedef uint64_t Bits __attribute__((vector_size(PADKERN_VECTOR_BYTES)));
};

template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
inline __attribute__((always_inline)) Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
inline __attribute__((always_inline)) void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

template <class T>
inline __attribute__((always_inline)) double lane_sum(Vec<T> v) {
  double sum = 0.0;
  for (int l = 0; l < Simd<T>::kLanes; ++l) sum += static_cast<double>(v[l]);
  return sum;
}

// exp(x) for x <= 0 to about one unit in the last place; results below the normal range become 0
// and NaN stays NaN (the scale is multiplied, not added to the exponent bits, for that reason).
inline __attribute__((always_inline)) Vec<float> exp_nonpositive(Vec<float> x) {
  using Bits = Simd<float>::Bits;
  const Vec<float> shifted =
      x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 rounds to integer
  const Vec<float> n = shifted - 12582912.0f;
  Vec<float> r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec<float> scale =
      reinterpret_cast<Vec<float>>((reinterpret_cast<Bits>(shifted) << 23) + (127u << 23));
  const Vec<float> zero = {};
  return x < -87.0f ? zero : p * scale;
}

inline __attribute__((always_inline)) Vec<double> exp_nonpositive(Vec<double> x) {
  using Bits = Simd<double>::Bits;
  const Vec<double> shifted = x * 1.4426950408889634074 + 6755399441055744.0;  // 1.5 * 2^52
  const Vec<double> n = shifted - 6755399441055744.0;
  Vec<double> r = x - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  Vec<double> p = r * (1.0 / 6227020800.0) + (1.0 / 479001600.0);
  p = p * r + (1.0 / 39916800.0);
  p = p * r + (1.0 / 3628800.0);
  p = p * r + (1.0 / 362880.0);
  p = p * r + (1.0 / 40320.0);
  p = p * r + (1.0 / 5040.0);
  p = p * r + (1.0 / 720.0);
  p = p * r + (1.0 / 120.0);
  p = p * r + (1.0 / 24.0);
  p = p * r + (1.0 / 6.0);
  p = p * r + 0.5;
  p = p * (r * r) + r + 1.0;
  const Vec<double> scale =
      reinterpret_cast<Vec<double>>((reinterpret_cast<Bits>(shifted) << 52) + (1023ull << 52));
  const Vec<double> zero = {};
  return x < -708.0 ? zero : p * scale;
}

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
