#include <algorithm>
#include <cstring>

#include "common/tickets.h"
#include "segments/segments.h"

namespace padkern {
namespace {

// Segments of one ticket. A segment has one owner, so the thread count changes no bit.
constexpr int64_t kSegmentsPerTicket = 64;

Status check(const SegmentSumParams& p) {
  if (p.rows < 0 || p.dim < 0 || p.num_slots < 0 || p.segments < 0) {
    return error_status("segment_sum: a size is negative");
  }
  if (p.starts == nullptr || (p.num_slots > 0 && p.slots == nullptr) ||
      (p.rows > 0 && p.dim > 0 && p.values == nullptr) ||
      (p.segments > 0 && p.dim > 0 && p.out == nullptr)) {
    return error_status("segment_sum: a pointer is null");
  }
  if (p.starts[0] != 0 || p.starts[p.segments] != p.num_slots) {
    return error_status("starts must rise from 0 to the %lld slots, got %lld to %lld",
                        static_cast<long long>(p.num_slots), static_cast<long long>(p.starts[0]),
                        static_cast<long long>(p.starts[p.segments]));
  }
  for (int64_t u = 0; u < p.segments; ++u) {
    if (p.starts[u + 1] < p.starts[u]) {
      return error_status("starts must not decrease, got %lld after %lld",
                          static_cast<long long>(p.starts[u + 1]),
                          static_cast<long long>(p.starts[u]));
    }
  }
  for (int64_t s = 0; s < p.num_slots; ++s) {
    if (static_cast<uint64_t>(p.slots[s]) >= static_cast<uint64_t>(p.rows)) {
      return error_status("slots must lie in 0..%lld, got %lld", static_cast<long long>(p.rows - 1),
                          static_cast<long long>(p.slots[s]));
    }
  }
  return {};
}

template <class T>
void run(const SegmentSumParams& p) {
  const T* values = static_cast<const T*>(p.values);
  const int64_t tickets = (p.segments + kSegmentsPerTicket - 1) / kSegmentsPerTicket;
  const double work = static_cast<double>(p.num_slots + p.segments) * static_cast<double>(p.dim);
  run_tickets(tickets, useful_workers(4.0 * work, tickets), [&](int64_t, int64_t ticket) {
    const int64_t last = std::min(p.segments, (ticket + 1) * kSegmentsPerTicket);
    for (int64_t u = ticket * kSegmentsPerTicket; u < last; ++u) {
      T* __restrict out = static_cast<T*>(p.out) + u * p.dim;
      const int64_t begin = p.starts[u], end = p.starts[u + 1];
      if (begin == end) {
        std::fill(out, out + p.dim, T(0));
        continue;
      }
      std::memcpy(out, values + p.slots[begin] * p.value_stride,
                  static_cast<size_t>(p.dim) * sizeof(T));
      for (int64_t s = begin + 1; s < end; ++s) {
        const T* __restrict row = values + p.slots[s] * p.value_stride;
        for (int64_t d = 0; d < p.dim; ++d) out[d] += row[d];
      }
    }
  });
}

}  // namespace

Status segment_sum_cpu(const SegmentSumParams& params) {
  const Status status = check(params);
  if (!status.ok || params.dim == 0) return status;
  if (params.dtype == SegmentDtype::kFloat64) {
    run<double>(params);
  } else {
    run<float>(params);
  }
  return {};
}

}  // namespace padkern
