// Threads of the host program. The core links no thread pool: the Python side hands over torch's
// own (torch_parallel_for), tests hand over std::thread, and without either everything runs
// serially.
#pragma once

#include <cstdint>

namespace padkern {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelForFn = int32_t (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body,
                                  void* context);
using NumThreadsFn = int32_t (*)(uint32_t* out);

// Null pointers select the serial backend.
void set_parallel(ParallelForFn parallel_for, NumThreadsFn num_threads);

// Threads the injected pool would use now; 1 for the serial backend.
int64_t num_threads();

// Calls body on ranges that cover [begin, end). The cut depends on the thread count, so callers
// pass indices of blocks whose shape does not. body must not throw.
void parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

}  // namespace padkern
