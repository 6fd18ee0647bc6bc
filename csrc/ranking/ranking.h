// Exact ranks and best items of users over a whole catalogue on the CPU, without a users x items
// matrix. The rules are in padkern/ops/ranking/README.md.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace padkern {

enum class RankDtype : int { kFloat32 = 0, kFloat64 = 1 };

// Items in one panel of the packed matrix, for the instruction set in use; 0 if there is none.
int64_t rank_panel_width(RankDtype dtype);

// Row 0 of the item matrix is padding and is not packed. Strides count elements; rows are dense.
struct RankPackParams {
  RankDtype dtype = RankDtype::kFloat32;
  int64_t items = 0;  // without padding
  int64_t dim = 0;
  const void* matrix = nullptr;  // [items + 1, dim]
  int64_t matrix_stride = 0;
  const int64_t* order = nullptr;  // [items]: a permutation of 1..items, or null for that order
  void* panels = nullptr;          // [panels, dim, width]
  void* largest = nullptr;         // scalar: the largest absolute value; NaN if one is not finite
};

Status rank_pack_items_cpu(const RankPackParams& params);

struct RankParams {
  RankDtype dtype = RankDtype::kFloat32;
  int64_t users = 0;
  int64_t items = 0;
  int64_t dim = 0;
  const void* states = nullptr;  // [users, dim]
  int64_t state_stride = 0;
  const void* matrix = nullptr;  // as packed
  int64_t matrix_stride = 0;
  const int64_t* order = nullptr;  // as packed
  const void* panels = nullptr;
  const void* largest = nullptr;
  const int64_t* targets = nullptr;  // [users], or null: best items only
  const int64_t* seen_values = nullptr;
  const int64_t* seen_offsets = nullptr;  // [users + 1]
  int64_t seen_count = 0;
  bool mask_repeats = true;
  int64_t top_k = 0;    // 0: ranks only
  int64_t at_most = 0;  // ranks above it are infinite; 0: no such limit
  // The first five only with targets, [users] each; the last two only with top_k, [users, top_k].
  double* ranks = nullptr;
  uint8_t* tied = nullptr;
  uint8_t* masked = nullptr;
  uint8_t* nan_target = nullptr;
  int64_t* nan_others = nullptr;
  int64_t* top = nullptr;
  void* top_scores = nullptr;
};

Status rank_topk_cpu(const RankParams& params);

}  // namespace padkern
