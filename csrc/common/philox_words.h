// Philox 4x32-10 (see philox.h) for one counter, in code that is compiled once.
#pragma once

#include <cstdint>

namespace padkern {

struct PhiloxWords {
  uint32_t word[4];
};

inline PhiloxWords philox(uint64_t key, PhiloxWords counter) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  PhiloxWords x = counter;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * x.word[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * x.word[2];
    x = {{static_cast<uint32_t>(b >> 32) ^ x.word[1] ^ key0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ x.word[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return x;
}

}  // namespace padkern
