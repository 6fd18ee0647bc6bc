// Cross-entropy over a catalogue on the CPU: value and all gradients without a matrix of logits.
// The derivation is in padkern/ops/catalogue_loss/README.md.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace padkern {

enum class CatalogueDtype : int { kFloat32 = 0, kFloat64 = 1 };

// Strides count elements; the last dimension of users and item_rows is dense.
struct CatalogueLossParams {
  CatalogueDtype dtype = CatalogueDtype::kFloat32;
  int64_t tokens = 0;
  int64_t items = 0;
  int64_t dim = 0;
  const void* users = nullptr;  // [tokens, dim]
  int64_t user_stride = 0;
  const void* item_rows = nullptr;  // [items, dim]
  int64_t item_stride = 0;
  const int64_t* targets = nullptr;     // [tokens]
  const void* bias = nullptr;           // [items], or null
  const int64_t* candidates = nullptr;  // [candidate_count] ascending, or null for all items
  int64_t candidate_count = 0;
  const int64_t* excluded_values = nullptr;   // [excluded_count], or null
  const int64_t* excluded_offsets = nullptr;  // [tokens + 1]
  int64_t excluded_count = 0;
  bool want_users = false;  // their gradient
  bool want_items = false;  // theirs and the bias'
  void* value = nullptr;    // scalar of dtype
  void* d_users = nullptr;  // [tokens, dim], dense; only when want_users
  void* d_items = nullptr;  // [items, dim], dense; only when want_items, like d_bias
  void* d_bias = nullptr;   // [items], or null
  // 0: chosen by the shape. 1: keeps the probabilities of a group of tokens. 2: computes them
  // twice.
  int plan = 0;
};

Status catalogue_loss_cpu(const CatalogueLossParams& params);

}  // namespace padkern
