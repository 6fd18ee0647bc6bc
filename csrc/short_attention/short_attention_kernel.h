// Boundary between the driver and the per-instruction-set objects.
#pragma once

#include <cstdint>

namespace padkern {

template <class T>
struct HeadedView {
  const T* data;
  int64_t token_stride;
  int64_t head_stride;
};

template <class T>
struct ShortAttentionView {
  int64_t heads;
  int64_t dim;
  const int64_t* offsets;
  T scale;
  bool drops;
  uint64_t seed;
  uint32_t step;
  uint32_t threshold;
  T keep_scale;
  HeadedView<T> q, k, v, d_out;
  T* out;
  T* gradients;
};

template <class T>
struct ShortAttentionKernels {
  // Elements of scratch that one worker needs; the memory must be initialised once.
  int64_t (*scratch_size)(int64_t dim);
  // All heads of sequences [first, last).
  void (*forward)(const ShortAttentionView<T>& view, int64_t first, int64_t last, T* scratch);
  void (*backward)(const ShortAttentionView<T>& view, int64_t first, int64_t last, T* scratch);
};

#define PADKERN_DECLARE_SHORT_ATTENTION_KERNELS(isa)                  \
  namespace isa {                                                     \
  const ShortAttentionKernels<float>& short_attention_kernels_f32();  \
  const ShortAttentionKernels<double>& short_attention_kernels_f64(); \
  }
PADKERN_DECLARE_SHORT_ATTENTION_KERNELS(baseline)
#if defined(__x86_64__)
PADKERN_DECLARE_SHORT_ATTENTION_KERNELS(avx2)
PADKERN_DECLARE_SHORT_ATTENTION_KERNELS(avx512)
#endif
#undef PADKERN_DECLARE_SHORT_ATTENTION_KERNELS

}  // namespace padkern
