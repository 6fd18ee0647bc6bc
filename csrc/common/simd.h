// Fixed-width vectors for the per-instruction-set objects: compiler vector types, intrinsics only
// for the square root, no standard library. Included only by sources that CMake compiles once per
// instruction set.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

// Sum over the lanes, in double precision, as a tree.
template <class T>
inline __attribute__((always_inline)) double lane_sum(Vec<T> v) {
  typedef double Two __attribute__((vector_size(16)));
  typedef double Four __attribute__((vector_size(32)));
  typedef double Eight __attribute__((vector_size(64)));
  constexpr int kLanes = Simd<T>::kLanes;
  Two two;
  if constexpr (kLanes == 16) {
    const Eight low =
        __builtin_convertvector(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7), Eight);
    const Eight high =
        __builtin_convertvector(__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15), Eight);
    const Eight eight = low + high;
    const Four four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                      __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    two = __builtin_shufflevector(four, four, 0, 1) + __builtin_shufflevector(four, four, 2, 3);
  } else if constexpr (kLanes == 8) {
    const Four low = __builtin_convertvector(__builtin_shufflevector(v, v, 0, 1, 2, 3), Four);
    const Four high = __builtin_convertvector(__builtin_shufflevector(v, v, 4, 5, 6, 7), Four);
    const Four four = low + high;
    two = __builtin_shufflevector(four, four, 0, 1) + __builtin_shufflevector(four, four, 2, 3);
  } else if constexpr (kLanes == 4) {
    two = __builtin_convertvector(__builtin_shufflevector(v, v, 0, 1), Two) +
          __builtin_convertvector(__builtin_shufflevector(v, v, 2, 3), Two);
  } else {
    two = v;
  }
  return two[0] + two[1];
}

// out[d * out_stride + i] = in[i * in_stride + d] for i, d < 4.
template <class T>
inline __attribute__((always_inline)) void transpose4(const T* in, int64_t in_stride, T* out,
                                                      int64_t out_stride) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
  typedef T Value __attribute__((vector_size(4 * sizeof(T))));
  const Value a = *reinterpret_cast<const Four*>(in);
  const Value b = *reinterpret_cast<const Four*>(in + in_stride);
  const Value c = *reinterpret_cast<const Four*>(in + 2 * in_stride);
  const Value e = *reinterpret_cast<const Four*>(in + 3 * in_stride);
  const Value ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const Value ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Value ce_low = __builtin_shufflevector(c, e, 0, 4, 1, 5);
  const Value ce_high = __builtin_shufflevector(c, e, 2, 6, 3, 7);
  *reinterpret_cast<Four*>(out) = __builtin_shufflevector(ab_low, ce_low, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(out + out_stride) = __builtin_shufflevector(ab_low, ce_low, 2, 3, 6, 7);
  *reinterpret_cast<Four*>(out + 2 * out_stride) =
      __builtin_shufflevector(ab_high, ce_high, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(out + 3 * out_stride) =
      __builtin_shufflevector(ab_high, ce_high, 2, 3, 6, 7);
}

inline __attribute__((always_inline)) Vec<float> square_root(Vec<float> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__x86_64__)
  return _mm_sqrt_ps(x);
#else
  for (int l = 0; l < Simd<float>::kLanes; ++l) x[l] = __builtin_sqrtf(x[l]);
  return x;
#endif
}

inline __attribute__((always_inline)) Vec<double> square_root(Vec<double> x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_pd(0xff, x);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(x);
#elif defined(__x86_64__)
  return _mm_sqrt_pd(x);
#else
  for (int l = 0; l < Simd<double>::kLanes; ++l) x[l] = __builtin_sqrt(x[l]);
  return x;
#endif
}

// exp(x rate) for x rate <= 0, absolute error about one unit in the last place of 1; results below
// the normal range become 0 or subnormal and NaN stays NaN. 2^y with y split into an integer n and
// f in [-1/2, 1/2]; the polynomial is a minimax fit of 2^f with relative error 2e-9.
inline __attribute__((always_inline)) Vec<float> exp_scaled(Vec<float> x, float rate) {
  const float rate2 = rate * 1.44269504088896341f;
  const Vec<float> shifted = x * rate2 + 12582912.0f;  // 1.5 * 2^23 rounds to integer
  const Vec<float> n = shifted - 12582912.0f;
  const Vec<float> f = x * rate2 - n;
  Vec<float> p = f * 1.5345789e-4f + 1.3399937e-3f;
  p = p * f + 9.6184891e-3f;
  p = p * f + 5.5503288e-2f;
  p = p * f + 2.4022647e-1f;
  p = p * f + 6.9314721e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(0xffff, p, n);
#else
  using Bits = Simd<float>::Bits;
  // The scale is multiplied, not added to the exponent bits, so that NaN stays NaN.
  const Vec<float> scale =
      reinterpret_cast<Vec<float>>((reinterpret_cast<Bits>(shifted) << 23) + (127u << 23));
  const Vec<float> zero = {};
  return n < -126.0f ? zero : p * scale;
#endif
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

inline __attribute__((always_inline)) Vec<double> exp_scaled(Vec<double> x, double rate) {
  return exp_nonpositive(x * rate);
}

// exp(x) for x <= 0, 0 where that would be subnormal (also for -Inf); NaN stays NaN.
template <class T>
inline __attribute__((always_inline)) Vec<T> exp_or_zero(Vec<T> x) {
  const Vec<T> zero = {};
  return x < T(sizeof(T) == 4 ? -87.0 : -708.0) ? zero : exp_scaled(x, T(1));
}

// max(x, 0) with NaN kept.
template <class T>
inline __attribute__((always_inline)) Vec<T> positive_part(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_max_ps(0xffff, Vec<T>{}, x);
  } else {
    return _mm512_maskz_max_pd(0xff, Vec<T>{}, x);
  }
#else
  const Vec<T> zero = {};
  return zero > x ? zero : x;
#endif
}

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
