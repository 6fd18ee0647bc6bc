// Sums of rows over segments on the CPU. The derivation is in padkern/ops/segments/README.md.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace padkern {

enum class SegmentDtype : int { kFloat32 = 0, kFloat64 = 1 };

// out[u] = sum of values[slots[s]] over s in [starts[u], starts[u + 1]), in that order.
struct SegmentSumParams {
  SegmentDtype dtype = SegmentDtype::kFloat32;
  int64_t rows = 0;  // of values
  int64_t dim = 0;
  int64_t num_slots = 0;
  int64_t segments = 0;
  const void* values = nullptr;  // [rows, dim], the last dimension dense
  int64_t value_stride = 0;
  const int64_t* slots = nullptr;   // [num_slots]
  const int64_t* starts = nullptr;  // [segments + 1]
  void* out = nullptr;              // [segments, dim], dense
};

Status segment_sum_cpu(const SegmentSumParams& params);

}  // namespace padkern
