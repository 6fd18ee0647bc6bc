// The gated item matrix [gate[bin(i), e] table_e[i]]_e on the CPU, and its gradients. The
// derivation is in padkern/ops/gated_table/README.md.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace padkern {

enum class GatedTableDtype : int { kFloat32 = 0, kFloat64 = 1 };

constexpr int64_t kGatedTableMaxExperts = 16;

// Strides count elements; the last dimension of tables and gradient is dense.
struct GatedTableParams {
  GatedTableDtype dtype = GatedTableDtype::kFloat32;
  int64_t experts = 0;
  int64_t rows = 0;
  int64_t bins = 0;  // rows of the gate table
  const int64_t* widths = nullptr;
  const void* const* tables = nullptr;  // per expert [rows, widths[e]]
  const int64_t* strides = nullptr;
  const void* gate = nullptr;          // [bins, experts], dense
  const int64_t* item_bins = nullptr;  // [rows]
  void* out = nullptr;                 // [rows, sum of widths], dense; the value, or null
  const void* d_out = nullptr;         // the same for the gradients
  int64_t d_out_stride = 0;
  void* const* d_tables = nullptr;  // per expert [rows, widths[e]], dense; null with `out`
  void* d_gate = nullptr;           // [bins, experts], dense
};

Status gated_table_cpu(const GatedTableParams& params);

}  // namespace padkern
