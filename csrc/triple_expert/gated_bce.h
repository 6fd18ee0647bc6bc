// Gated expert score with binary cross-entropy on the CPU: value and all gradients without gathered
// intermediates. The derivation is in padkern/ops/triple_expert/README.md.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace padkern {

enum class GatedBceDtype : int { kFloat32 = 0, kFloat64 = 1 };

constexpr int64_t kGatedBceMaxExperts = 16;

// Strides count elements; the last dimension of users and tables is dense.
struct GatedBceParams {
  GatedBceDtype dtype = GatedBceDtype::kFloat32;
  int64_t tokens = 0;
  int64_t experts = 0;
  int64_t dim = 0;
  int64_t rows = 0;             // of every item table, padding included
  int64_t bins = 0;             // rows of the gate table
  int64_t negatives = 0;        // per token
  const void* users = nullptr;  // [tokens, experts, dim]
  int64_t user_token_stride = 0;
  int64_t user_expert_stride = 0;
  const void* tables = nullptr;  // [experts, rows, dim]
  int64_t table_expert_stride = 0;
  int64_t table_row_stride = 0;
  const void* gate = nullptr;             // [bins, experts], dense
  const int64_t* item_bins = nullptr;     // [rows]
  const int64_t* positive_ids = nullptr;  // [tokens]
  const int64_t* negative_ids = nullptr;  // [tokens, negatives], dense
  const uint8_t* valid = nullptr;         // [tokens] of 0 and 1, or null for all
  double positive_weight = 1.0;           // of the mean over the positives; positive and finite
  bool want_gradient = false;
  void* value = nullptr;     // scalar of dtype
  void* d_users = nullptr;   // [tokens, experts, dim], dense; the three only when want_gradient
  void* d_tables = nullptr;  // [experts, rows, dim], dense
  void* d_gate = nullptr;    // [bins, experts], dense
};

Status gated_bce_cpu(const GatedBceParams& params);

}  // namespace padkern
