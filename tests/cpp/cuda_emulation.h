// Runs the CUDA kernel bodies on the host. A HostBlock stands for all threads of a block at once:
// each() visits them one after the other, and the instructions of whole warps are carried out by
// their definition in the PTX manual. It shows that the index arithmetic, the order of copies and
// the mathematics are right; it cannot show races between threads, nor what a GPU really does.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "mkmmd/cuda/run.cuh"

namespace padkern {
namespace cuda {

// How the emulation treats what a GPU leaves open: results must not depend on it.
struct Freedom {
  bool late_copies = true;  // asynchronous copies happen when they are waited for, else at once
  bool backward = false;    // threads take turns from the last to the first
};

// Sums rounded toward zero, as matrix units do.
inline float toward_zero(double value) {
  float out = static_cast<float>(value);
  if (std::isfinite(out) && std::fabs(static_cast<double>(out)) > std::fabs(value)) {
    out = std::nextafter(out, 0.0f);
  }
  return out;
}

template <int THREADS>
class HostBlock {
 public:
  static constexpr int kBlockThreads = THREADS;
  static constexpr int kSlots = THREADS;
  template <class T>
  using Reg = T[kSlots];

  HostBlock(int64_t x, int64_t y, int64_t count_x, unsigned char* shared, int64_t bytes,
            Freedom freedom)
      : x_(x), y_(y), count_x_(count_x), shared_(shared), bytes_(bytes), freedom_(freedom) {}

  int64_t index_x() const { return x_; }
  int64_t index_y() const { return y_; }
  int64_t count_x() const { return count_x_; }
  unsigned char* shared() const { return shared_; }

  template <class F>
  void each(const F& f) const {
    for (int i = 0; i < THREADS; ++i) {
      const int t = freedom_.backward ? THREADS - 1 - i : i;
      f(t, t);
    }
  }
  void sync() const {}

  void copy16(void* to, const void* from) const {
    check(to, 16);
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
      std::abort();  // cp.async of 16 bytes needs both aligned
    }
    if (freedom_.late_copies) {
      open_.push_back({to, from});
    } else {
      std::memcpy(to, from, 16);
    }
  }
  void commit() const {
    groups_.push_back(open_);
    open_.clear();
  }
  template <int PENDING>
  void wait() const {
    while (groups_.size() > PENDING) {
      for (const Copy& copy : groups_.front()) std::memcpy(copy.to, copy.from, 16);
      groups_.pop_front();
    }
  }

  template <bool TRANSPOSE, class F>
  void load_blocks(Words4 (&out)[kSlots], const F& where) const {
    for (int warp = 0; warp < THREADS; warp += 32) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t x[8][8];
        for (int r = 0; r < 8; ++r) {
          const uint16_t* from = where(warp + 8 * matrix + r);
          check(from, 16);
          if (reinterpret_cast<uintptr_t>(from) % 16 != 0) std::abort();
          std::memcpy(x[r], from, 16);
        }
        for (int lane = 0; lane < 32; ++lane) {
          const int a = lane / 4, b = 2 * (lane % 4);
          const uint32_t first = TRANSPOSE ? x[b][a] : x[a][b];
          const uint32_t second = TRANSPOSE ? x[b + 1][a] : x[a][b + 1];
          out[warp + lane].x[matrix] = first | (second << 16);
        }
      }
    }
  }

  void mma(Floats4 (&sum)[kSlots], const Words4 (&left)[kSlots], const Words4 (&right)[kSlots],
           int half) const {
    const auto part = [](uint32_t word, int i) {
      return static_cast<double>(half_value(i == 0 ? word & 0xffffu : word >> 16));
    };
    for (int warp = 0; warp < THREADS; warp += 32) {
      double a[16][16], b[16][8];
      for (int lane = 0; lane < 32; ++lane) {
        const int group = lane / 4, pair = lane % 4;
        for (int i = 0; i < 2; ++i) {
          const uint32_t* l = left[warp + lane].x;
          a[group][2 * pair + i] = part(l[0], i);
          a[group + 8][2 * pair + i] = part(l[1], i);
          a[group][2 * pair + 8 + i] = part(l[2], i);
          a[group + 8][2 * pair + 8 + i] = part(l[3], i);
          const uint32_t* r = right[warp + lane].x + 2 * half;
          b[2 * pair + i][group] = part(r[0], i);
          b[2 * pair + 8 + i][group] = part(r[1], i);
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int group = lane / 4, pair = lane % 4;
        for (int e = 0; e < 4; ++e) {
          const int row = group + (e >= 2 ? 8 : 0), column = 2 * pair + e % 2;
          double total = static_cast<double>(sum[warp + lane].x[e]);
          for (int k = 0; k < 16; ++k) total += a[row][k] * b[k][column];
          sum[warp + lane].x[e] = toward_zero(total);
        }
      }
    }
  }

  void warp_largest(float (&value)[kSlots]) const {
    for (int warp = 0; warp < THREADS; warp += 32) {
      float most = value[warp];
      for (int lane = 1; lane < 32; ++lane) most = std::fmax(most, value[warp + lane]);
      for (int lane = 0; lane < 32; ++lane) value[warp + lane] = most;
    }
  }

  template <class T>
  void warp_sum(T (&value)[kSlots]) const {
    for (int step = 16; step > 0; step >>= 1) {
      T other[kSlots];
      for (int t = 0; t < THREADS; ++t) other[t] = value[t ^ step];
      for (int t = 0; t < THREADS; ++t) value[t] += other[t];
    }
  }

 private:
  struct Copy {
    void* to;
    const void* from;
  };

  void check(const void* place, int64_t bytes) const {
    const unsigned char* at = static_cast<const unsigned char*>(place);
    if (at < shared_ || at + bytes > shared_ + bytes_) std::abort();
  }

  const int64_t x_, y_, count_x_;
  unsigned char* const shared_;
  const int64_t bytes_;
  const Freedom freedom_;
  mutable std::vector<Copy> open_;
  mutable std::deque<std::vector<Copy>> groups_;
};

struct HostLauncher {
  Freedom freedom;
  int64_t limit = 227 * 1024;  // shared memory of a block

  template <class Body>
  int32_t launch(const Call& call, int64_t x, int64_t y, Error* error) const {
    const int64_t bytes = Body::shared_bytes(call);
    if (bytes > limit) return fail(error, 1000, "%lld bytes are too many", (long long)bytes);
    // Exactly the bytes asked for, so that a sanitizer sees one too many.
    std::unique_ptr<unsigned char, void (*)(void*)> shared(
        static_cast<unsigned char*>(std::aligned_alloc(16, round_up(bytes + 1, 16))), std::free);
    for (int64_t j = 0; j < y; ++j) {
      for (int64_t i = 0; i < x; ++i) {
        std::memset(shared.get(), 0xff, bytes);  // NaN, whatever it is read as
        HostBlock<Body::kBlockThreads> block(i, j, x, shared.get(), bytes, freedom);
        Body::run(block, call);
      }
    }
    return 0;
  }
  int64_t shared_limit(Error*) const { return limit; }
};

}  // namespace cuda
}  // namespace padkern
