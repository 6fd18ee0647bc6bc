#include "common/parallel.h"

#include <atomic>

namespace padkern {
namespace {

std::atomic<ParallelForFn> g_parallel_for{nullptr};
std::atomic<NumThreadsFn> g_num_threads{nullptr};

}  // namespace

void set_parallel(ParallelForFn parallel_for, NumThreadsFn num_threads) {
  g_parallel_for.store(parallel_for);
  g_num_threads.store(num_threads);
}

int64_t num_threads() {
  NumThreadsFn fn = g_num_threads.load();
  uint32_t count = 1;
  if (g_parallel_for.load() == nullptr || fn == nullptr || fn(&count) != 0 || count == 0) return 1;
  return count;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  if (end <= begin) return;
  ParallelForFn fn = g_parallel_for.load();
  if (fn == nullptr || end - begin <= grain) {
    body(begin, end, context);
    return;
  }
  fn(begin, end, grain, body, context);
}

}  // namespace padkern
