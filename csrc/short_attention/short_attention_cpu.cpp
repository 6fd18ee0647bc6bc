#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "common/checks.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "short_attention/short_attention.h"
#include "short_attention/short_attention_kernel.h"

namespace padkern {
namespace {

// A worker takes so many sequences at a time. Every (sequence, head) is computed by itself, so the
// cut changes no bit.
constexpr int64_t kChunk = 4;
constexpr int64_t kMostDim = 1 << 20;

const ShortAttentionKernels<float>& kernels_of(Isa isa, float) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::short_attention_kernels_f32();
  if (isa == Isa::kAvx2) return avx2::short_attention_kernels_f32();
#endif
  (void)isa;
  return baseline::short_attention_kernels_f32();
}

const ShortAttentionKernels<double>& kernels_of(Isa isa, double) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::short_attention_kernels_f64();
  if (isa == Isa::kAvx2) return avx2::short_attention_kernels_f64();
#endif
  (void)isa;
  return baseline::short_attention_kernels_f64();
}

Status check(const ShortAttentionParams& p, bool backward) {
  if (p.tokens < 0 || p.heads < 0 || p.dim < 0 || p.dim > kMostDim || p.sequences < 0) {
    return error_status("short_attention: a size is out of range");
  }
  if (p.offsets == nullptr) return error_status("short_attention: offsets is null");
  const Status status = check_dropout(p.dropout.probability);
  if (!status.ok) return status;
  if (p.offsets[0] != 0 || p.offsets[p.sequences] != p.tokens) {
    return error_status("offsets must start at 0 and end at the %lld tokens, got %lld and %lld",
                        shown(p.tokens), shown(p.offsets[0]), shown(p.offsets[p.sequences]));
  }
  const int64_t place = bad_offset(p.offsets, p.sequences, p.tokens);
  if (place > 0) {
    return error_status("offsets must not decrease, got %lld after %lld at sequence %lld",
                        shown(p.offsets[place]), shown(p.offsets[place - 1]), shown(place - 1));
  }
  for (int64_t b = 0; b < p.sequences; ++b) {
    const int64_t count = p.offsets[b + 1] - p.offsets[b];
    if (count > kShortAttentionMaxTokens) {
      return error_status(
          "offsets must give sequences of at most %lld tokens to the native backend, got %lld at "
          "sequence %lld",
          shown(kShortAttentionMaxTokens), shown(count), shown(b));
    }
  }
  const bool has_values = p.tokens > 0 && p.heads > 0 && p.dim > 0;
  if (has_values &&
      (p.q.data == nullptr || p.k.data == nullptr || p.v.data == nullptr ||
       (backward ? p.d_out.data == nullptr || p.gradients == nullptr : p.out == nullptr))) {
    return error_status("short_attention: a pointer is null");
  }
  return {};
}

template <class T>
struct Job {
  ShortAttentionView<T> view;
  void (*run)(const ShortAttentionView<T>& view, int64_t first, int64_t last, T* scratch);
  int64_t sequences, scratch_size;
  T* scratch;
  std::atomic<int64_t> next{0};
};

// An index is a worker with scratch of its own; workers draw chunks until none is left.
template <class T>
void work(int64_t begin, int64_t end, void* context) {
  Job<T>& job = *static_cast<Job<T>*>(context);
  for (int64_t worker = begin; worker < end; ++worker) {
    for (int64_t first; (first = job.next.fetch_add(kChunk)) < job.sequences;) {
      job.run(job.view, first, std::min(first + kChunk, job.sequences),
              job.scratch + worker * job.scratch_size);
    }
  }
}

template <class T>
HeadedView<T> view_of(const HeadedRows& rows) {
  return {static_cast<const T*>(rows.data), rows.token_stride, rows.head_stride};
}

template <class T>
void run(const ShortAttentionParams& p, Isa isa, bool backward) {
  const ShortAttentionKernels<T>& kernels = kernels_of(isa, T());
  Job<T> job;
  job.view = {p.heads,
              p.dim,
              p.offsets,
              static_cast<T>(p.scale),
              p.dropout.probability > 0.0,
              p.dropout.seed,
              p.dropout.step,
              dropout_threshold(p.dropout.probability),
              static_cast<T>(1.0 / (1.0 - p.dropout.probability)),
              view_of<T>(p.q),
              view_of<T>(p.k),
              view_of<T>(p.v),
              view_of<T>(p.d_out),
              static_cast<T*>(p.out),
              static_cast<T*>(p.gradients)};
  job.run = backward ? kernels.backward : kernels.forward;
  job.sequences = p.sequences;
  job.scratch_size = kernels.scratch_size(p.dim);
  const int64_t chunks = (p.sequences + kChunk - 1) / kChunk;
  const int64_t workers = std::max<int64_t>(1, std::min(num_threads(), chunks));
  std::vector<T> scratch(workers * job.scratch_size, T(0));
  job.scratch = scratch.data();
  parallel_for(0, workers, 1, work<T>, &job);
}

Status call(const ShortAttentionParams& params, bool backward) {
  Status status = check(params, backward);
  if (!status.ok) return status;
  Isa isa;
  const char* error;
  if (!chosen_isa(&isa, &error)) return error_status("%s", error);
  if (params.tokens == 0 || params.heads == 0 || params.dim == 0) return {};
  try {
    if (params.dtype == ShortAttentionDtype::kFloat64) {
      run<double>(params, isa, backward);
    } else {
      run<float>(params, isa, backward);
    }
  } catch (const std::bad_alloc&) {
    return error_status("short_attention: out of memory for heads of width %lld",
                        shown(params.dim));
  }
  return {};
}

}  // namespace

Status short_attention_cpu(const ShortAttentionParams& params) { return call(params, false); }

Status short_attention_backward_cpu(const ShortAttentionParams& params) {
  return call(params, true);
}

}  // namespace padkern
