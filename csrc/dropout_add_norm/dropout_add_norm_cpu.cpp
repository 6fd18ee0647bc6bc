#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "common/checks.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "dropout_add_norm/dropout_add_norm.h"
#include "dropout_add_norm/dropout_add_norm_kernel.h"

namespace padkern {
namespace {

// Channel sums are taken over blocks of rows whose size depends on the shape alone, so the thread
// count changes no bit.
constexpr int64_t kMinBlockRows = 32;
constexpr int64_t kMaxBlocks = 64;

const DropoutAddNormKernels<float>& kernels_of(Isa isa, float) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::dropout_add_norm_kernels_f32();
  if (isa == Isa::kAvx2) return avx2::dropout_add_norm_kernels_f32();
#endif
  (void)isa;
  return baseline::dropout_add_norm_kernels_f32();
}

const DropoutAddNormKernels<double>& kernels_of(Isa isa, double) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::dropout_add_norm_kernels_f64();
  if (isa == Isa::kAvx2) return avx2::dropout_add_norm_kernels_f64();
#endif
  (void)isa;
  return baseline::dropout_add_norm_kernels_f64();
}

Status check(const DropoutAddNormParams& p, bool backward) {
  if (p.rows < 0 || p.dim < 0) return error_status("dropout_add_norm: a size is out of range");
  const Status status = check_dropout(p.dropout.probability);
  if (!status.ok) return status;
  if (!(p.eps >= 0.0)) return error_status("eps must be at least 0, got %g", p.eps);
  const bool norms = p.weight != nullptr;
  bool bad = false;
  if (p.dim > 0 && backward) {
    bad = norms && (p.d_weight == nullptr || p.d_shift == nullptr);
  }
  if (p.rows > 0 && p.dim > 0) {
    if (backward) {
      bad = bad || p.d_residual == nullptr;
      bad = bad || (norms && p.d_out != nullptr && (p.sum == nullptr || p.stats == nullptr));
      bad = bad || (p.d_x == nullptr && p.dropout.probability > 0.0);
    } else {
      bad = p.x == nullptr || (p.sum == nullptr && !norms) ||
            (norms && (p.out == nullptr || p.shift == nullptr));
    }
  }
  if (bad) return error_status("dropout_add_norm: a pointer is null");
  for (int64_t i = 0; p.token_ids != nullptr && i < p.rows; ++i) {
    if (p.token_ids[i] < 0) {
      return error_status("token_ids must be >= 0, got %lld at row %lld", shown(p.token_ids[i]),
                          shown(i));
    }
  }
  return {};
}

template <class T>
struct Job {
  DropoutAddNormView<T> view;
  const DropoutAddNormKernels<T>* kernels;
  bool backward;
  int64_t rows, block_rows, blocks, scratch_size;
  T* scratch;
  T* sums;
  std::atomic<int64_t> next{0};
};

// An index is a worker with scratch of its own; workers draw blocks until none is left.
template <class T>
void work(int64_t begin, int64_t end, void* context) {
  Job<T>& job = *static_cast<Job<T>*>(context);
  for (int64_t worker = begin; worker < end; ++worker) {
    T* scratch = job.scratch + worker * job.scratch_size;
    for (int64_t b; (b = job.next.fetch_add(1)) < job.blocks;) {
      const int64_t first = b * job.block_rows;
      const int64_t last = std::min(first + job.block_rows, job.rows);
      if (job.backward) {
        job.kernels->backward(job.view, first, last, scratch, job.sums + b * 3 * job.view.dim);
      } else {
        job.kernels->forward(job.view, first, last, scratch);
      }
    }
  }
}

template <class T>
void run(const DropoutAddNormParams& p, Isa isa, bool backward) {
  Job<T> job;
  const auto in = [](const void* x) { return static_cast<const T*>(x); };
  const auto out = [](void* x) { return static_cast<T*>(x); };
  job.view = {p.dim,
              p.eps,
              p.dropout.probability > 0.0,
              p.dropout.seed,
              p.dropout.step,
              dropout_threshold(p.dropout.probability),
              static_cast<T>(1.0 / (1.0 - p.dropout.probability)),
              p.token_ids,
              in(p.weight),
              in(p.x),
              p.x_stride,
              in(p.residual),
              p.residual_stride,
              in(p.bias),
              in(p.shift),
              out(p.sum),
              out(p.out),
              out(p.stats),
              in(p.d_out),
              p.d_out_stride,
              in(p.d_sum),
              p.d_sum_stride,
              out(p.d_x),
              out(p.d_residual),
              p.d_bias != nullptr};
  job.kernels = &kernels_of(isa, T());
  job.backward = backward;
  job.rows = p.rows;
  job.block_rows = std::max(kMinBlockRows, (p.rows + kMaxBlocks - 1) / kMaxBlocks);
  job.blocks = (p.rows + job.block_rows - 1) / job.block_rows;
  job.scratch_size = job.kernels->scratch_size(p.dim);
  const int64_t workers = std::max<int64_t>(1, std::min(num_threads(), job.blocks));
  std::vector<T> scratch(workers * job.scratch_size);
  std::vector<T> sums(backward ? job.blocks * 3 * p.dim : 0);
  job.scratch = scratch.data();
  job.sums = sums.data();
  parallel_for(0, workers, 1, work<T>, &job);
  if (!backward) return;
  void* const targets[3] = {p.d_bias, p.d_weight, p.d_shift};
  for (int64_t part = 0; part < 3; ++part) {
    if (targets[part] == nullptr) continue;
    for (int64_t c = 0; c < p.dim; ++c) {
      double total = 0.0;
      for (int64_t b = 0; b < job.blocks; ++b) {
        total += static_cast<double>(sums[(b * 3 + part) * p.dim + c]);
      }
      static_cast<T*>(targets[part])[c] = static_cast<T>(total);
    }
  }
}

Status call(const DropoutAddNormParams& params, bool backward) {
  Status status = check(params, backward);
  if (!status.ok) return status;
  Isa isa;
  const char* error;
  if (!chosen_isa(&isa, &error)) return error_status("%s", error);
  if (params.dim == 0) return {};
  try {
    if (params.dtype == DropoutAddNormDtype::kFloat64) {
      run<double>(params, isa, backward);
    } else {
      run<float>(params, isa, backward);
    }
  } catch (const std::bad_alloc&) {
    return error_status("dropout_add_norm: out of memory for rows of width %lld",
                        shown(params.dim));
  }
  return {};
}

}  // namespace

Status dropout_add_norm_cpu(const DropoutAddNormParams& params) { return call(params, false); }

Status dropout_add_norm_backward_cpu(const DropoutAddNormParams& params) {
  return call(params, true);
}

}  // namespace padkern
