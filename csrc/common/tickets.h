// Work in tickets that threads draw, and scratch memory for it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

#include "common/parallel.h"

namespace padkern {

// Memory on a cache line, not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(
            static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T), std::align_val_t(64)))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
};

// Calls body(worker, ticket) for every ticket; each worker draws the next one.
template <class Body>
void run_tickets(int64_t tickets, int64_t workers, const Body& body) {
  struct Region {
    const Body& body;
    int64_t tickets;
    std::atomic<int64_t> next{0};
  };
  Region region{body, tickets};
  parallel_for(
      0, workers, 1,
      [](int64_t begin, int64_t end, void* context) {
        Region& r = *static_cast<Region*>(context);
        for (int64_t worker = begin; worker < end; ++worker) {
          for (int64_t t; (t = r.next.fetch_add(1)) < r.tickets;) r.body(worker, t);
        }
      },
      &region);
}

// A thread is worth waking for about a tenth of a millisecond of work.
inline int64_t useful_workers(double work, int64_t tickets) {
  const auto useful = 1 + static_cast<int64_t>(std::min(work / 4e6, 1e6));
  return std::max<int64_t>(1, std::min({num_threads(), useful, tickets}));
}

}  // namespace padkern
