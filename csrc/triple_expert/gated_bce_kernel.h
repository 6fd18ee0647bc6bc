// What the per-instruction-set objects offer to the driver in gated_bce_cpu.cpp.
#pragma once

#include <cstdint>

namespace padkern {

// Inputs and scratch of one call. A slot is one candidate of one token: slot 0 of a token is its
// positive, slots 1..negatives its negatives.
template <class T>
struct GatedBceView {
  int64_t experts;
  int64_t dim;
  int64_t rows;
  int64_t negatives;
  const T* users;
  int64_t user_token_stride;
  int64_t user_expert_stride;
  const T* tables;
  int64_t table_expert_stride;
  int64_t table_row_stride;
  const T* gate;
  const int64_t* item_bins;
  const int64_t* positive_ids;
  const int64_t* negative_ids;
  const uint8_t* valid;
  T positive_weight;  // weight of the positives / valid tokens
  T negative_weight;  // 1 / (valid tokens x negatives)
  bool want_gradient;
  T* d_users;
  T* d_tables;
  T* coefficients;              // [slots, experts]: loss derivative times gate weight
  const int64_t* item_offsets;  // [rows + 1] into the two arrays below
  const int64_t* item_slots;    // slots of every item, in slot order
  const int64_t* item_tokens;   // token of each of them
};

struct GatedBceSums {
  double positive;  // sums of softplus, not yet divided
  double negative;
};

template <class T>
struct GatedBceKernels {
  // Tokens [first, last): losses into sums, gate gradient added to d_gate [bins, experts], user
  // gradients and coefficients written.
  void (*tokens)(const GatedBceView<T>& view, int64_t first, int64_t last, GatedBceSums* sums,
                 double* d_gate);
  // Item gradients of rows [first, last), every element written.
  void (*items)(const GatedBceView<T>& view, int64_t first, int64_t last);
};

#define PADKERN_DECLARE_GATED_BCE_KERNELS(isa)            \
  namespace isa {                                         \
  const GatedBceKernels<float>& gated_bce_kernels_f32();  \
  const GatedBceKernels<double>& gated_bce_kernels_f64(); \
  }
PADKERN_DECLARE_GATED_BCE_KERNELS(baseline)
#if defined(__x86_64__)
PADKERN_DECLARE_GATED_BCE_KERNELS(avx2)
PADKERN_DECLARE_GATED_BCE_KERNELS(avx512)
#endif
#undef PADKERN_DECLARE_GATED_BCE_KERNELS

}  // namespace padkern
