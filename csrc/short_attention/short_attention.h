// Causal multi-head attention within packed sequences of at most 64 tokens on the CPU. The
// derivation is in padkern/ops/short_attention/README.md.
#pragma once

#include <cstdint>

#include "common/dropout.h"
#include "common/status.h"

namespace padkern {

enum class ShortAttentionDtype : int { kFloat32 = 0, kFloat64 = 1 };

constexpr int64_t kShortAttentionMaxTokens = 64;

// [tokens, heads, dim] with a dense last dimension; strides count elements.
struct HeadedRows {
  const void* data = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
};

struct ShortAttentionParams {
  ShortAttentionDtype dtype = ShortAttentionDtype::kFloat32;
  int64_t tokens = 0;
  int64_t heads = 0;
  int64_t dim = 0;
  int64_t sequences = 0;
  const int64_t* offsets = nullptr;  // [sequences + 1]
  double scale = 1.0;
  DropoutParams dropout;
  HeadedRows q, k, v;
  void* out = nullptr;        // [tokens, heads, dim], dense; forward only
  HeadedRows d_out;           // backward only
  void* gradients = nullptr;  // [tokens, 3, heads, dim], dense: by q, k and v; backward only
};

Status short_attention_cpu(const ShortAttentionParams& params);
Status short_attention_backward_cpu(const ShortAttentionParams& params);

}  // namespace padkern
