// Dropout whose mask is a function of (seed, step, place) and is never stored.
#pragma once

#include <cstdint>

namespace padkern {

struct DropoutParams {
  double probability = 0.0;  // 0 <= p < 1
  uint64_t seed = 0;
  uint32_t step = 0;
};

// An element is kept where its 32 random bits are at or above this.
inline uint32_t dropout_threshold(double probability) {
  const double scaled = probability * 4294967296.0 + 0.5;
  return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
}

}  // namespace padkern
