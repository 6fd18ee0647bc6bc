// Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") for the
// per-instruction-set objects: random bits as a function of a key and a counter, several counters
// at a time. Dropout masks are drawn from it, so that they are never stored and do not depend on
// how the work is cut.
#pragma once

#include "common/simd.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {

// One 32-bit word per 64-bit lane; the upper halves hold anything.
using Words = Simd<double>::Bits;
constexpr int kPhiloxLanes = Simd<double>::kLanes;

// Full products of the lower halves.
inline __attribute__((always_inline)) Words multiply_words(Words a, Words b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<Words>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffull) * (b & 0xffffffffull);
#endif
}

// Ten rounds on kPhiloxLanes counters. The upper halves of the results are not zero.
inline __attribute__((always_inline)) void philox(Words (&counter)[4], const uint32_t (&key)[2]) {
  uint32_t k0 = key[0], k1 = key[1];
  const Words m0 = Words{} + 0xD2511F53ull, m1 = Words{} + 0xCD9E8D57ull;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Words p0 = multiply_words(m0, counter[0]);
    const Words p1 = multiply_words(m1, counter[2]);
    counter[0] = (p1 >> 32) ^ counter[1] ^ static_cast<uint64_t>(k0);
    counter[2] = (p0 >> 32) ^ counter[3] ^ static_cast<uint64_t>(k1);
    counter[1] = p1;
    counter[3] = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

inline __attribute__((always_inline)) Words lane_numbers() {
  Words lanes = {};
  for (int l = 0; l < kPhiloxLanes; ++l) lanes[l] = static_cast<uint64_t>(l);
  return lanes;
}

// The lower halves of the lanes, in order.
inline __attribute__((always_inline)) void store_words(uint32_t* out, Words words) {
  typedef uint32_t Narrow __attribute__((vector_size(4 * kPhiloxLanes)));
  typedef uint32_t Place __attribute__((vector_size(4 * kPhiloxLanes), aligned(4), may_alias));
  *reinterpret_cast<Place*>(out) = __builtin_convertvector(words & 0xffffffffull, Narrow);
}

// scale where the bits at p say keep, else 0: one factor per lane of T.
template <class T>
inline __attribute__((always_inline)) Vec<T> keep_factor(const uint32_t* p, uint32_t threshold,
                                                         T scale) {
  using Bits = typename Simd<T>::Bits;
  typedef uint32_t Narrow __attribute__((vector_size(4 * Simd<T>::kLanes)));
  typedef uint32_t Place __attribute__((vector_size(4 * Simd<T>::kLanes), aligned(4), may_alias));
  const Bits bits =
      __builtin_convertvector(static_cast<Narrow>(*reinterpret_cast<const Place*>(p)), Bits);
  const Vec<T> zero = {};
  return bits >= Bits{} + threshold ? zero + scale : zero;
}

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
