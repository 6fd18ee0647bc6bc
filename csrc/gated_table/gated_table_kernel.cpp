// Compiled once per instruction set (CMake: padkern_add_isa_kernel). No standard library, no static
// objects: the linker must have nothing here that a narrower CPU could be handed.
#include "gated_table/gated_table_kernel.h"

#include "common/simd.h"

namespace padkern {
namespace PADKERN_ISA_NAMESPACE {
namespace {

template <class T>
void scale(const T* in, T weight, int64_t width, T* out) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(out + d, load(in + d) * weight);
  for (; d < width; ++d) out[d] = in[d] * weight;
}

template <class T>
double scale_and_dot(const T* in, const T* row, T weight, int64_t width, T* out) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  Vec<T> sum[2] = {};
  int64_t d = 0;
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
    for (int v = 0; v < 2; ++v) {
      const Vec<T> x = load(in + d + v * kLanes);
      sum[v] += x * load(row + d + v * kLanes);
      store(out + d + v * kLanes, x * weight);
    }
  }
  for (; d + kLanes <= width; d += kLanes) {
    const Vec<T> x = load(in + d);
    sum[0] += x * load(row + d);
    store(out + d, x * weight);
  }
  double total = lane_sum<T>(sum[0] + sum[1]);
  for (; d < width; ++d) {
    total += static_cast<double>(in[d]) * static_cast<double>(row[d]);
    out[d] = in[d] * weight;
  }
  return total;
}

template <class T>
constexpr GatedTableKernels<T> kKernels = {scale<T>, scale_and_dot<T>};

}  // namespace

const GatedTableKernels<float>& gated_table_kernels_f32() { return kKernels<float>; }
const GatedTableKernels<double>& gated_table_kernels_f64() { return kKernels<double>; }

}  // namespace PADKERN_ISA_NAMESPACE
}  // namespace padkern
