// Checks that the entry points of several ops share; each text is what Python raises.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace padkern {

// For "%lld".
inline long long shown(int64_t value) { return static_cast<long long>(value); }

// Every id lies in low..high, where low <= high.
inline Status check_ids(const char* name, const int64_t* ids, int64_t count, int64_t low,
                        int64_t high) {
  const uint64_t first = static_cast<uint64_t>(low);
  const uint64_t span = static_cast<uint64_t>(high) - first;
  for (int64_t i = 0; i < count; ++i) {
    if (static_cast<uint64_t>(ids[i]) - first > span) {
      return error_status("%s must lie in %lld..%lld, got %lld at position %lld", name, shown(low),
                          shown(high), shown(ids[i]), shown(i));
    }
  }
  return {};
}

// The first of the count + 1 offsets that does not fit an ascent from 0 to total, or -1.
inline int64_t bad_offset(const int64_t* offsets, int64_t count, int64_t total) {
  int64_t before = 0;
  for (int64_t i = 0; i <= count; ++i) {
    if (offsets[i] < before || (i == 0 && offsets[i] != 0)) return i;
    before = offsets[i];
  }
  return before == total ? -1 : count;
}

inline Status check_dropout(double probability) {
  if (probability >= 0.0 && probability < 1.0) return {};
  return error_status("dropout must be at least 0 and below 1, got %g", probability);
}

}  // namespace padkern
