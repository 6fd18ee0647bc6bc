// What the per-instruction-set objects offer to the driver in gated_table_cpu.cpp.
#pragma once

#include <cstdint>

namespace padkern {

template <class T>
struct GatedTableKernels {
  // out = weight in
  void (*scale)(const T* in, T weight, int64_t width, T* out);
  // out = weight in; returns the inner product of in and row, summed in double over the lanes.
  double (*scale_and_dot)(const T* in, const T* row, T weight, int64_t width, T* out);
};

namespace baseline {
const GatedTableKernels<float>& gated_table_kernels_f32();
const GatedTableKernels<double>& gated_table_kernels_f64();
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
const GatedTableKernels<float>& gated_table_kernels_f32();
const GatedTableKernels<double>& gated_table_kernels_f64();
}  // namespace avx2
namespace avx512 {
const GatedTableKernels<float>& gated_table_kernels_f32();
const GatedTableKernels<double>& gated_table_kernels_f64();
}  // namespace avx512
#endif

}  // namespace padkern
