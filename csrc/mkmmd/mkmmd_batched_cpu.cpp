// Driver of batched problems: spreads them over the threads, each through mkmmd_cpu.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "common/parallel.h"
#include "mkmmd/mkmmd_batched.h"

namespace padkern {
namespace {

// A thread is worth waking for about a tenth of a millisecond of work, in the units of Batch::work.
constexpr double kWorkPerThread = 4e6;
// The fixed cost of one problem in the same units.
constexpr double kWorkPerCall = 4e4;

int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t bytes_of(MkmmdDtype dtype) {
  switch (dtype) {
    case MkmmdDtype::kFloat64:
      return 8;
    case MkmmdDtype::kBFloat16:
    case MkmmdDtype::kFloat16:
      return 2;
    case MkmmdDtype::kBool:
      return 1;
    default:
      return 4;
  }
}

const void* shift(const void* base, int64_t elements, MkmmdDtype dtype) {
  return static_cast<const char*>(base) + elements * bytes_of(dtype);
}

int64_t offset(const MkmmdBatchedSample& sample, int64_t index) {
  if (sample.offsets == nullptr) return index * sample.rows_per_problem;
  if (sample.offset_bytes == 4) {
    return static_cast<const int32_t*>(sample.offsets)[index];
  }
  return static_cast<const int64_t*>(sample.offsets)[index];
}

class Batch {
 public:
  explicit Batch(const MkmmdBatchedParams& params) : params_(params) {
    threads_ = num_threads();
    for (int64_t b = 0; b < params_.problems; ++b) total_work_ += work(b);
    const double useful = 1.0 + total_work_ / kWorkPerThread;
    workers_ = std::min({threads_, params_.problems, static_cast<int64_t>(std::min(useful, 1e6))});
    shared_out_ = workers_ > 1;
    failed_.store(params_.problems);
    int64_t source_rows = -1, target_rows = -1, bytes = 0;
    for (int64_t b = 0; b < params_.problems; ++b) {
      if (too_small(b)) continue;
      if (rows(params_.source, b) != source_rows || rows(params_.target, b) != target_rows) {
        source_rows = rows(params_.source, b);
        target_rows = rows(params_.target, b);
        bytes = align(mkmmd_workspace_bytes(problem(b)));
      }
      int64_t& most = runs_alone(b) ? alone_bytes_ : slice_bytes_;
      most = std::max(most, bytes);
    }
  }

  // The order of the problems comes first, then one slice for each worker. A problem that runs
  // alone has all slices.
  int64_t workspace_bytes() const {
    return order_bytes() + std::max(alone_bytes_, workers_ * slice_bytes_);
  }

  Status run() {
    if (slices_bytes() < std::max(alone_bytes_, slice_bytes_)) {
      return error_status("workspace of %lld bytes is too small",
                          static_cast<long long>(params_.workspace_bytes));
    }
    // The pool may have grown since the workspace was sized.
    if (slice_bytes_ > 0) workers_ = std::min(workers_, slices_bytes() / slice_bytes_);
    order_ = static_cast<int64_t*>(params_.workspace);
    slices_ = static_cast<char*>(params_.workspace) + order_bytes();
    zero_uncovered_rows(params_.source);
    zero_uncovered_rows(params_.target);
    for (int64_t b = 0; b < params_.problems; ++b) {
      if (too_small(b)) {
        fill_nan(b);
      } else if (runs_alone(b)) {
        attempt(b, slices_, slices_bytes());
      } else {
        order_[waiting_++] = b;
      }
    }
    // The longest first, so that no thread ends up with a long one while the others are done.
    if (workers_ > 1) {
      std::sort(order_, order_ + waiting_, [this](int64_t a, int64_t b) {
        const double left = work(a), right = work(b);
        return left != right ? left > right : a < b;
      });
    }
    parallel_for(0, workers_, 1, &Batch::worker_body, this);
    const int64_t failed = failed_.load();
    if (failed == params_.problems) return Status();
    const Status status = solve(failed, slices_, slices_bytes());
    return error_status("problem %lld: %s", static_cast<long long>(failed), status.message);
  }

 private:
  static int64_t rows(const MkmmdBatchedSample& sample, int64_t b) {
    return offset(sample, b + 1) - offset(sample, b);
  }

  int64_t order_bytes() const {
    return align(params_.problems * static_cast<int64_t>(sizeof(int64_t)));
  }

  int64_t slices_bytes() const { return params_.workspace_bytes - order_bytes(); }

  bool too_small(int64_t b) const {
    const int64_t n = rows(params_.source, b), m = rows(params_.target, b);
    if (params_.estimator == MkmmdEstimator::kTllib && n != m) return true;
    const bool pairs = params_.estimator == MkmmdEstimator::kUnbiased ||
                       params_.estimator == MkmmdEstimator::kTllib;
    return std::min(n, m) < (pairs ? 2 : 1);
  }

  double work(int64_t b) const {
    const double all = static_cast<double>(rows(params_.source, b) + rows(params_.target, b));
    return all * all * (static_cast<double>(params_.dim) + 16.0) + kWorkPerCall;
  }

  // Whether a problem keeps all threads busy by itself, or would be the last to finish: then
  // mkmmd_cpu spreads its blocks over the threads.
  bool runs_alone(int64_t b) const {
    if (!shared_out_) return false;
    const double own = work(b), threads = static_cast<double>(threads_);
    return own >= 8.0 * kWorkPerThread * threads ||
           (own >= 2.0 * kWorkPerThread && own * threads > total_work_);
  }

  MkmmdSample sample(const MkmmdBatchedSample& in, int64_t b) const {
    const bool packed = in.offsets != nullptr;
    const int64_t first = offset(in, b);
    MkmmdSample out;
    out.data = shift(in.data, packed ? first * in.row_stride : b * in.problem_stride, in.dtype);
    out.dtype = in.dtype;
    if (in.weight != nullptr) {
      const int64_t start = packed ? first * in.weight_stride : b * in.weight_problem_stride;
      out.weight = shift(in.weight, start, in.weight_dtype);
      out.weight_dtype = in.weight_dtype;
      out.weight_stride = in.weight_stride;
    }
    out.rows = rows(in, b);
    out.row_stride = in.row_stride;
    out.column_stride = in.column_stride;
    if (in.gradient != nullptr) {
      out.gradient =
          static_cast<char*>(in.gradient) + first * params_.dim * bytes_of(params_.dtype);
    }
    out.gradient_stride = params_.dim;
    return out;
  }

  MkmmdParams problem(int64_t b) const {
    MkmmdParams out;
    out.dtype = params_.dtype;
    out.estimator = params_.estimator;
    out.kernel = params_.kernel;
    out.source = sample(params_.source, b);
    out.target = sample(params_.target, b);
    out.dim = params_.dim;
    out.alphas = params_.alphas;
    out.num_alphas = params_.num_alphas;
    out.sigma_sq = params_.sigma_sq == nullptr ? nullptr : params_.sigma_sq + b;
    out.want_gradient = params_.want_gradient;
    out.value = static_cast<char*>(params_.value) + b * bytes_of(params_.dtype);
    out.sigma_gradient = params_.want_gradient ? params_.sigma_gradient + b : nullptr;
    return out;
  }

  Status solve(int64_t b, char* workspace, int64_t bytes) const {
    MkmmdParams one = problem(b);
    one.workspace = workspace;
    one.workspace_bytes = bytes;
    return mkmmd_cpu(one);
  }

  // Keeps the first problem that failed; its message is made again at the end.
  void attempt(int64_t b, char* workspace, int64_t bytes) {
    if (solve(b, workspace, bytes).ok) return;
    for (int64_t seen = failed_.load(); b < seen && !failed_.compare_exchange_weak(seen, b);) {
    }
  }

  static void worker_body(int64_t begin, int64_t end, void* context) {
    Batch& batch = *static_cast<Batch*>(context);
    for (int64_t worker = begin; worker < end; ++worker) {
      char* slice = batch.slices_ + worker * batch.slice_bytes_;
      for (int64_t ticket; (ticket = batch.next_.fetch_add(1)) < batch.waiting_;) {
        batch.attempt(batch.order_[ticket], slice, batch.slice_bytes_);
      }
    }
  }

  void zero_uncovered_rows(const MkmmdBatchedSample& sample) const {
    if (!params_.want_gradient) return;
    const int64_t covered = offset(sample, params_.problems);
    const int64_t row_bytes = params_.dim * bytes_of(params_.dtype);
    std::memset(static_cast<char*>(sample.gradient) + covered * row_bytes, 0,
                static_cast<size_t>((sample.total_rows - covered) * row_bytes));
  }

  template <class T>
  void fill_nan_as(int64_t b) const {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    static_cast<T*>(params_.value)[b] = nan;
    if (!params_.want_gradient) return;
    params_.sigma_gradient[b] = std::numeric_limits<double>::quiet_NaN();
    for (const MkmmdBatchedSample* s : {&params_.source, &params_.target}) {
      T* out = static_cast<T*>(s->gradient);
      std::fill(out + offset(*s, b) * params_.dim, out + offset(*s, b + 1) * params_.dim, nan);
    }
  }

  void fill_nan(int64_t b) const {
    params_.dtype == MkmmdDtype::kFloat32 ? fill_nan_as<float>(b) : fill_nan_as<double>(b);
  }

  const MkmmdBatchedParams& params_;
  int64_t threads_ = 1;
  int64_t workers_ = 1;
  bool shared_out_ = false;  // whether problems run side by side
  double total_work_ = 0.0;
  int64_t slice_bytes_ = 0;
  int64_t alone_bytes_ = 0;
  int64_t* order_ = nullptr;
  char* slices_ = nullptr;
  int64_t waiting_ = 0;  // problems in order_
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> failed_{0};  // the first problem that failed; problems when none did
};

Status check_offsets(const MkmmdBatchedSample& sample, const char* name, int64_t problems) {
  if (offset(sample, 0) != 0) {
    return error_status("%s_offsets must start at 0, got %lld", name,
                        static_cast<long long>(offset(sample, 0)));
  }
  for (int64_t b = 0; b < problems; ++b) {
    if (offset(sample, b + 1) < offset(sample, b)) {
      return error_status("%s_offsets must not decrease, got %lld after %lld at problem %lld", name,
                          static_cast<long long>(offset(sample, b + 1)),
                          static_cast<long long>(offset(sample, b)), static_cast<long long>(b));
    }
  }
  if (offset(sample, problems) > sample.total_rows) {
    return error_status("%s_offsets must end at %lld, the rows of %s, got %lld", name,
                        static_cast<long long>(sample.total_rows), name,
                        static_cast<long long>(offset(sample, problems)));
  }
  return Status();
}

// What mkmmd_cpu does not check for each problem.
Status check(const MkmmdBatchedParams& params) {
  if (params.problems < 1 || params.dim < 1) {
    return error_status("problems and dim must be positive, got %lld and %lld",
                        static_cast<long long>(params.problems),
                        static_cast<long long>(params.dim));
  }
  for (const MkmmdBatchedSample* s : {&params.source, &params.target}) {
    const char* name = s == &params.source ? "source" : "target";
    if (s->total_rows < 0 || s->rows_per_problem < 0 ||
        (s->offset_bytes != 4 && s->offset_bytes != 8)) {
      return error_status("%s has a size that is negative or an offset of %lld bytes", name,
                          static_cast<long long>(s->offset_bytes));
    }
    const Status status = check_offsets(*s, name, params.problems);
    if (!status.ok) return status;
    if (s->total_rows > 0 &&
        (s->data == nullptr || (params.want_gradient && s->gradient == nullptr))) {
      return error_status("null pointer for %s", name);
    }
  }
  if (params.value == nullptr || (params.want_gradient && params.sigma_gradient == nullptr)) {
    return error_status("null pointer for an output");
  }
  return Status();
}

}  // namespace

int64_t mkmmd_batched_workspace_bytes(const MkmmdBatchedParams& params) {
  return check(params).ok ? Batch(params).workspace_bytes() : 0;
}

Status mkmmd_batched_cpu(const MkmmdBatchedParams& params) {
  const Status status = check(params);
  if (!status.ok) return status;
  if (params.workspace == nullptr || reinterpret_cast<uintptr_t>(params.workspace) % 64 != 0) {
    return error_status("workspace must be aligned to 64 bytes and not null");
  }
  return Batch(params).run();
}

}  // namespace padkern
