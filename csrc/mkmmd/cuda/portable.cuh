// What the kernels need of CUDA, in a form that a C++ compiler understands too: the tests run the
// same kernel bodies on the host, see tests/cpp/cuda_emulation.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PADKERN_HD __host__ __device__ __forceinline__
#define PADKERN_DEVICE __device__ __forceinline__
#define PADKERN_UNROLL _Pragma("unroll")
#define PADKERN_NO_UNROLL _Pragma("unroll 1")
#else
#define PADKERN_HD inline
#define PADKERN_DEVICE inline
#define PADKERN_UNROLL
#define PADKERN_NO_UNROLL
#endif

namespace padkern {
namespace cuda {

template <class To, class From>
PADKERN_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To out;
  memcpy(&out, &value, sizeof(out));
  return out;
}

PADKERN_HD float bf16_value(uint32_t bits) { return bit_cast<float>(bits << 16); }

PADKERN_HD float half_value(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 31u;
  const uint32_t fraction = bits & 0x3ffu;
  if (exponent == 31u) return bit_cast<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0u) return bit_cast<float>(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
  return sign != 0u ? -magnitude : magnitude;
}

// Nearest float16, ties to even; above 65504 infinity, NaN stays NaN.
inline uint32_t round_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return 0x7fffu;
  if (rest >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more
  if (rest >= 0x38800000u) {                       // 2^-14 and more
    return sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13);
  }
  // Subnormal: adding 2^-1 puts the last bit of float16 at the last bit of the sum.
  const float shifted = bit_cast<float>(rest) + 0.5f;
  return sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u);
}

// Two float16 in one word, the first in its lower half.
PADKERN_DEVICE uint32_t pack_half(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return round_half(first) | (round_half(second) << 16);
#endif
}
PADKERN_DEVICE void unpack_half(uint32_t pair, float* first, float* second) {
#if defined(__CUDA_ARCH__)
  asm("{\n.reg .f16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}"
      : "=f"(*first), "=f"(*second)
      : "r"(pair));
#else
  *first = half_value(pair & 0xffffu);
  *second = half_value(pair >> 16);
#endif
}

// first and second as the sum of two float16 each. What is left is below 2^-22 of a number above
// 2^-3, and below 2^-25 for smaller ones.
PADKERN_DEVICE void split_half(float first, float second, uint32_t* high, uint32_t* low) {
  float high_first, high_second;
  *high = pack_half(first, second);
  unpack_half(*high, &high_first, &high_second);
  *low = pack_half(first - high_first, second - high_second);
}
PADKERN_DEVICE void join_half(uint32_t high, uint32_t low, float* first, float* second) {
  float low_first, low_second;
  unpack_half(high, first, second);
  unpack_half(low, &low_first, &low_second);
  *first += low_first;
  *second += low_second;
}

// Element `index` of an array of MkmmdDtype `dtype`.
PADKERN_HD double read_element(const void* data, int dtype, int64_t index) {
  switch (dtype) {
    case 0:
      return static_cast<double>(static_cast<const float*>(data)[index]);
    case 1:
      return static_cast<const double*>(data)[index];
    case 2:
      return static_cast<double>(bf16_value(static_cast<const uint16_t*>(data)[index]));
    case 3:
      return static_cast<double>(half_value(static_cast<const uint16_t*>(data)[index]));
    default:
      return static_cast<const uint8_t*>(data)[index] != 0 ? 1.0 : 0.0;
  }
}

// Approximate on the device: about 2^-22, relative; infinities and NaN as they should be.
PADKERN_DEVICE float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return std::exp2(x);
#endif
}
PADKERN_DEVICE float root_of(float x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return std::sqrt(x);
#endif
}
PADKERN_DEVICE float inverse_root_of(float x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return 1.0f / std::sqrt(x);
#endif
}
PADKERN_DEVICE float inverse_of(float x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return 1.0f / x;
#endif
}
// 0 for what is below, NaN stays NaN.
PADKERN_DEVICE float not_negative(float x) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(out) : "f"(x));
  return out;
#else
  return x <= 0.0f ? 0.0f : x;
#endif
}
PADKERN_DEVICE double exp2_of(double x) { return exp2(x); }
PADKERN_DEVICE double root_of(double x) { return sqrt(x); }
PADKERN_DEVICE double inverse_root_of(double x) { return 1.0 / sqrt(x); }
PADKERN_DEVICE double inverse_of(double x) { return 1.0 / x; }

PADKERN_HD int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}
PADKERN_HD int64_t ceil_div(int64_t value, int64_t step) { return (value + step - 1) / step; }
template <class T>
PADKERN_HD T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
PADKERN_HD T larger(T a, T b) {
  return a < b ? b : a;
}

}  // namespace cuda
}  // namespace padkern
