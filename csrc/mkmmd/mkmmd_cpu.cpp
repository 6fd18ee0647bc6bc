// Driver of the CPU kernels: bandwidth, blocks, schedule, and the final double-precision sums.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <thread>

#include "common/isa.h"
#include "common/parallel.h"
#include "mkmmd/mkmmd.h"
#include "mkmmd/mkmmd_kernel.h"
#include "mkmmd/mkmmd_plan.h"

namespace padkern {
namespace {

template <class T>
const MkmmdKernels<T>& kernels_for(Isa isa);

template <>
const MkmmdKernels<float>& kernels_for<float>(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::mkmmd_kernels_f32();
  if (isa == Isa::kAvx2) return avx2::mkmmd_kernels_f32();
#endif
  (void)isa;
  return baseline::mkmmd_kernels_f32();
}

template <>
const MkmmdKernels<double>& kernels_for<double>(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::mkmmd_kernels_f64();
  if (isa == Isa::kAvx2) return avx2::mkmmd_kernels_f64();
#endif
  (void)isa;
  return baseline::mkmmd_kernels_f64();
}

template <class T>
class Run {
 public:
  Run(const MkmmdParams& params, const MkmmdKernels<T>& kernels)
      : params_(params), kernels_(kernels), cut_(cut_for(params, kernels)) {
    Workspace space(params.workspace);
    buffers_ = lay_out<T>(space, cut_, params.want_gradient);
  }

  static Cut cut_for(const MkmmdParams& params, const MkmmdKernels<T>& kernels) {
    return make_cut(params.source.rows, params.target.rows, params.dim, sizeof(T) == 8,
                    kernels.lanes, kernels.panel);
  }

  Status run() {
    Status status = load_weights();
    if (!status.ok) return status;
    find_origin();
    for (int64_t b = 0; b < cut_.blocks(); ++b) {
      new (buffers_.sums + b) BlockSums();
      new (buffers_.progress + b) std::atomic<int64_t>(0);
    }
    seats_ = round_up(cut_.blocks(), 2);
    pairs_end_ = 2 * cut_.blocks() + cut_.blocks() + (seats_ - 1) * (seats_ / 2);
    tickets_ = pairs_end_ + (params_.want_gradient ? cut_.blocks() : 0);
    // One parallel region for everything; the ranges are workers, which draw tickets.
    parallel_for(0, workers(), 1, &Run::worker_body, this);
    if (sigma_sq_ > 0.0) {
      finish_regular();
    } else {
      finish_degenerate();
    }
    return Status();
  }

 private:
  const MkmmdSample& sample(int64_t block) const {
    return cut_.is_source(block) ? params_.source : params_.target;
  }

  MkmmdSource<T> source(int64_t block) const {
    const MkmmdSample& s = sample(block);
    return {static_cast<const T*>(s.data) + cut_.first_row(block) * s.row_stride, cut_.rows(block),
            s.row_stride, s.column_stride, buffers_.weights + block * cut_.padded_rows};
  }

  T* gradient(int64_t block) const {
    return static_cast<T*>(sample(block).gradient) + cut_.first_row(block) * cut_.dim;
  }

  MkmmdBlock<T> block(int64_t index) const {
    const int64_t row = cut_.first_row(index) + (cut_.is_source(index) ? 0 : cut_.source_rows);
    MkmmdBlock<T> out{};
    out.rows = cut_.rows(index);
    out.panels = buffers_.panels + index * cut_.padded_rows * cut_.dim;
    out.points = buffers_.points + row * cut_.point_stride;
    out.squares = buffers_.squares + index * cut_.padded_rows;
    out.weights = buffers_.weights + index * cut_.padded_rows;
    if (params_.want_gradient) {
      out.products = buffers_.products != nullptr ? buffers_.products + row * cut_.point_stride
                                                  : gradient(index);
      out.row_sum = buffers_.row_sums + row;
    }
    return out;
  }

  // Copies the weights, scaled by one power of two for both samples so that products stay in range,
  // and finds the sums that normalise the estimator.
  Status load_weights() {
    double largest = 0.0;
    for (const MkmmdSample* s : {&params_.source, &params_.target}) {
      if (s->weight == nullptr) {
        largest = std::max(largest, 1.0);
        continue;
      }
      for (int64_t i = 0; i < s->rows; ++i) {
        const double w =
            static_cast<double>(static_cast<const T*>(s->weight)[i * s->weight_stride]);
        if (w < 0.0) {
          return error_status("%s_weight must be >= 0, got %g at row %lld",
                              s == &params_.source ? "source" : "target", w,
                              static_cast<long long>(i));
        }
        if (w > largest) largest = w;
      }
    }
    int exponent = 0;
    if (largest > 0.0 && std::isfinite(largest)) std::frexp(largest, &exponent);
    // ldexp(1, 1 - exponent) maps ones to ones.
    const double factor = std::ldexp(1.0, 1 - exponent);
    for (int64_t b = 0; b < cut_.blocks(); ++b) {
      const MkmmdSample& s = sample(b);
      const int64_t first = cut_.first_row(b);
      const int64_t rows = cut_.rows(b);
      T* out = buffers_.weights + b * cut_.padded_rows;
      Moments& moments = cut_.is_source(b) ? source_weight_ : target_weight_;
      for (int64_t i = 0; i < cut_.padded_rows; ++i) {
        double w = 0.0;
        if (i < rows) {
          w = s.weight == nullptr ? 1.0
                                  : static_cast<double>(static_cast<const T*>(
                                        s.weight)[(first + i) * s.weight_stride]);
          w *= factor;
        }
        out[i] = static_cast<T>(w);
        moments.sum += w;
        moments.squares += w * w;
        if (w != 0.0) ++moments.rows;
      }
    }
    const bool unbiased = params_.estimator != MkmmdEstimator::kBiased;
    for (const MkmmdSample* s : {&params_.source, &params_.target}) {
      const Moments& moments = s == &params_.source ? source_weight_ : target_weight_;
      const int64_t needed = unbiased ? 2 : 1;
      if (moments.rows < needed) {
        return error_status("%s_weight must leave at least %lld rows, leaves %lld",
                            s == &params_.source ? "source" : "target",
                            static_cast<long long>(needed), static_cast<long long>(moments.rows));
      }
    }
    for (Moments* moments : {&source_weight_, &target_weight_}) {
      moments->pairs = moments->sum * moments->sum - (unbiased ? moments->squares : 0.0);
    }
    return Status();
  }

  // The first row in use. Differences to it are exactly zero when all rows are identical, which
  // differences to a rounded mean are not.
  void find_origin() {
    for (int64_t b = 0; b < cut_.blocks(); ++b) {
      const MkmmdSource<T> rows = source(b);
      for (int64_t i = 0; i < rows.rows; ++i) {
        if (rows.weights[i] == T(0)) continue;
        const T* row = rows.data + i * rows.row_stride;
        for (int64_t d = 0; d < cut_.dim; ++d) {
          buffers_.origin[d] = static_cast<double>(row[d * rows.column_stride]);
        }
        return;
      }
    }
  }

  // A thread is worth waking for about a tenth of a millisecond of work.
  int64_t workers() const {
    const double rows = static_cast<double>(cut_.source_rows + cut_.target_rows);
    const double work = rows * rows * (static_cast<double>(cut_.dim) + 16.0);
    const int64_t useful = 1 + static_cast<int64_t>(std::min(work / 4e6, 1e6));
    return std::min({num_threads(), useful, std::max<int64_t>(1, seats_ / 2)});
  }

  // Tickets in order: column sums of each block, packing of each block, pairs, gradients of each
  // block. A ticket only waits for lower ones, which are done or running, so any number of workers
  // gets through. Pairs: every block with itself, then rounds of a round-robin tournament in which
  // a block meets each other block once. Within a round no block appears twice and a block's pairs
  // run in round order, so gradients are accumulated in place, without atomics, in a fixed order.
  static void worker_body(int64_t, int64_t, void* context) {
    Run& run = *static_cast<Run*>(context);
    for (int64_t ticket; (ticket = run.next_.fetch_add(1)) < run.tickets_;) run.do_ticket(ticket);
  }

  void do_ticket(int64_t ticket) {
    const int64_t count = cut_.blocks();
    if (ticket < count) {
      kernels_.column_sums(source(ticket), cut_.dim, buffers_.origin,
                           buffers_.column_sums + ticket * cut_.dim);
      if (summed_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
        combine_means();
        ready_.store(1, std::memory_order_release);
      }
    } else if (ticket < 2 * count) {
      wait_for(ready_, 1);
      const int64_t b = ticket - count;
      buffers_.sums[b].moment = kernels_.pack(source(b), cut_.dim, cut_.point_stride,
                                              buffers_.origin, buffers_.mean, block(b));
      if (packed_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
        prepare_pairs();
        ready_.store(2, std::memory_order_release);
      }
    } else if (wait_for(ready_, 2); !(sigma_sq_ > 0.0)) {
      return;
    } else if (ticket < pairs_end_) {
      do_pair(ticket - 2 * count);
    } else {
      const int64_t b = ticket - pairs_end_;
      wait_for(buffers_.progress[b], seats_);
      kernels_.finish(block(b), cut_.dim, cut_.point_stride, cut_.point_stride, gradient_scale_,
                      gradient(b));
    }
  }

  void do_pair(int64_t ticket) {
    const int64_t count = cut_.blocks();
    if (ticket < count) {
      pair_blocks(ticket, ticket);
      buffers_.progress[ticket].store(1, std::memory_order_release);
      return;
    }
    const int64_t round = (ticket - count) / (seats_ / 2);
    const int64_t place = (ticket - count) % (seats_ / 2);
    int64_t a = place == 0 ? seats_ - 1 : (round + place) % (seats_ - 1);
    int64_t b = place == 0 ? round : (round - place + seats_ - 1) % (seats_ - 1);
    if (a > b) std::swap(a, b);
    const bool bye = b >= count;  // with an odd number of blocks one of them rests each round
    wait_for(buffers_.progress[a], round + 1);
    if (!bye) {
      wait_for(buffers_.progress[b], round + 1);
      pair_blocks(a, b);
      buffers_.progress[b].store(round + 2, std::memory_order_release);
    }
    buffers_.progress[a].store(round + 2, std::memory_order_release);
  }

  static void wait_for(const std::atomic<int64_t>& counter, int64_t value) {
    for (int spins = 0; counter.load(std::memory_order_acquire) < value; ++spins) {
      if (spins > 256) std::this_thread::yield();
    }
  }

  void combine_means() {
    const double total = source_weight_.sum + target_weight_.sum;
    std::fill(buffers_.mean, buffers_.mean + cut_.dim, 0.0);
    for (int64_t b = 0; b < cut_.blocks(); ++b) {
      const double* row = buffers_.column_sums + b * cut_.dim;
      for (int64_t d = 0; d < cut_.dim; ++d) buffers_.mean[d] += row[d];
    }
    for (int64_t d = 0; d < cut_.dim; ++d) buffers_.mean[d] /= total;
  }

  void prepare_pairs() {
    sigma_sq_ = params_.sigma_sq == nullptr ? mean_distance() : *params_.sigma_sq;
    if (!(sigma_sq_ > 0.0)) return;
    make_terms<T>(params_.alphas, params_.num_alphas, sigma_sq_, &terms_);
    const double same_source = 1.0 / source_weight_.pairs;
    const double same_target = 1.0 / target_weight_.pairs;
    const double cross = -1.0 / (source_weight_.sum * target_weight_.sum);
    const double largest = std::max({same_source, same_target, -cross});
    source_factor_ = static_cast<T>(same_source / largest);
    target_factor_ = static_cast<T>(same_target / largest);
    cross_factor_ = static_cast<T>(cross / largest);
    // Derivative of the widest kernel's exponent; the other terms carry their ratio in slope.
    const double widest = *std::max_element(params_.alphas, params_.alphas + params_.num_alphas);
    rate_ = 0.5 * largest / (widest * sigma_sq_);
    gradient_scale_ = -4.0 * rate_;
  }

  // Mean over all pooled pairs, diagonal included, in closed form: the points are centred.
  double mean_distance() const {
    double moment = 0.0;
    for (int64_t b = 0; b < cut_.blocks(); ++b) moment += buffers_.sums[b].moment;
    return 2.0 * moment / (source_weight_.sum + target_weight_.sum);
  }

  void pair_blocks(int64_t a, int64_t b) {
    const MkmmdBlock<T> left = block(a);
    const MkmmdBlock<T> right = block(b);
    const bool same = cut_.is_source(a) == cut_.is_source(b);
    const T factor = !same ? cross_factor_ : (cut_.is_source(a) ? source_factor_ : target_factor_);
    const int64_t product_stride = cut_.point_stride;
    if (a == b && params_.want_gradient) {
      std::fill(left.products, left.products + left.rows * product_stride, T(0));
      std::fill(left.row_sum, left.row_sum + left.rows, 0.0);
    }
    MkmmdPairSums sums;
    kernels_.pair(left, right, a == b, cut_.dim, cut_.point_stride, product_stride, terms_, factor,
                  params_.want_gradient, &sums);
    BlockSums& total = buffers_.sums[a];
    const double ordered = a == b ? 1.0 : 2.0;
    if (same) {
      total.same += ordered * sums.kernel;
    } else {
      total.cross += sums.kernel;
    }
    total.spread += ordered * sums.spread;
  }

  double offset() const {
    return params_.estimator == MkmmdEstimator::kTllib
               ? 2.0 / (static_cast<double>(params_.source.rows) - 1.0)
               : 0.0;
  }

  // Bandwidth 0: every kernel is 1 and nothing moves it. Negative or NaN: NaN everywhere.
  void finish_degenerate() {
    const double fill = sigma_sq_ == 0.0 ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    *static_cast<T*>(params_.value) = static_cast<T>(fill + offset());
    if (!params_.want_gradient) return;
    *params_.sigma_gradient = fill;
    for (const MkmmdSample* s : {&params_.source, &params_.target}) {
      T* out = static_cast<T*>(s->gradient);
      std::fill(out, out + s->rows * params_.dim, static_cast<T>(fill));
    }
  }

  void finish_regular() {
    double source_same = 0.0, target_same = 0.0, cross = 0.0, spread = 0.0;
    for (int64_t b = 0; b < cut_.blocks(); ++b) {
      (cut_.is_source(b) ? source_same : target_same) += buffers_.sums[b].same;
      cross += buffers_.sums[b].cross;
      spread += buffers_.sums[b].spread;
    }
    if (params_.estimator == MkmmdEstimator::kBiased) {
      const double count = static_cast<double>(params_.num_alphas);
      source_same += count * source_weight_.squares;
      target_same += count * target_weight_.squares;
    }
    const double value = source_same / source_weight_.pairs + target_same / target_weight_.pairs -
                         2.0 * cross / (source_weight_.sum * target_weight_.sum) + offset();
    *static_cast<T*>(params_.value) = static_cast<T>(value);
    if (!params_.want_gradient) return;
    *params_.sigma_gradient = rate_ * spread / sigma_sq_;
  }

  struct Moments {
    double sum = 0.0;
    double squares = 0.0;
    double pairs = 0.0;
    int64_t rows = 0;
  };

  const MkmmdParams& params_;
  const MkmmdKernels<T>& kernels_;
  const Cut cut_;
  Buffers<T> buffers_;
  MkmmdTerms<T> terms_;
  Moments source_weight_;
  Moments target_weight_;
  double sigma_sq_ = 0.0;
  double rate_ = 0.0;
  double gradient_scale_ = 0.0;
  T source_factor_ = 0;
  T target_factor_ = 0;
  T cross_factor_ = 0;
  int64_t seats_ = 0;
  int64_t pairs_end_ = 0;
  int64_t tickets_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<int64_t> summed_{0};
  std::atomic<int64_t> packed_{0};
  std::atomic<int64_t> ready_{0};
};

template <class T>
int64_t workspace_bytes(Isa isa, int64_t source_rows, int64_t target_rows, int64_t dim,
                        bool gradient) {
  const MkmmdKernels<T>& kernels = kernels_for<T>(isa);
  const Cut cut =
      make_cut(source_rows, target_rows, dim, sizeof(T) == 8, kernels.lanes, kernels.panel);
  Workspace space(nullptr);
  lay_out<T>(space, cut, gradient);
  return space.used();
}

bool sizes_fit(int64_t source_rows, int64_t target_rows, int64_t dim) {
  const int64_t limit = int64_t{1} << 40;
  return source_rows > 0 && target_rows > 0 && dim > 0 && source_rows < limit &&
         target_rows < limit && dim < limit && (source_rows + target_rows) < limit / dim;
}

Status check(const MkmmdParams& params) {
  if (!sizes_fit(params.source.rows, params.target.rows, params.dim)) {
    return error_status(
        "sizes must be positive and below 2^40 elements, got %lld, %lld rows of %lld",
        static_cast<long long>(params.source.rows), static_cast<long long>(params.target.rows),
        static_cast<long long>(params.dim));
  }
  if (params.num_alphas < 1 || params.num_alphas > kMkmmdMaxKernels || params.alphas == nullptr) {
    return error_status("alphas must hold 1 to %d values, got %lld", kMkmmdMaxKernels,
                        static_cast<long long>(params.num_alphas));
  }
  for (int64_t u = 0; u < params.num_alphas; ++u) {
    if (!(params.alphas[u] > 0.0) || !std::isfinite(params.alphas[u])) {
      return error_status("alphas must be positive and finite, got %g", params.alphas[u]);
    }
  }
  for (const MkmmdSample* s : {&params.source, &params.target}) {
    if (s->data == nullptr || (params.want_gradient && s->gradient == nullptr)) {
      return error_status("null pointer for %s", s == &params.source ? "source" : "target");
    }
    if (params.estimator != MkmmdEstimator::kBiased && s->rows < 2) {
      return error_status("%s needs at least 2 rows for this estimator, got %lld",
                          s == &params.source ? "source" : "target",
                          static_cast<long long>(s->rows));
    }
  }
  if (params.estimator == MkmmdEstimator::kTllib && params.source.rows != params.target.rows) {
    return error_status("the tllib estimator needs equal sizes, got %lld and %lld",
                        static_cast<long long>(params.source.rows),
                        static_cast<long long>(params.target.rows));
  }
  if (params.value == nullptr || (params.want_gradient && params.sigma_gradient == nullptr)) {
    return error_status("null pointer for an output");
  }
  const int64_t needed = mkmmd_workspace_bytes(params.dtype, params.source.rows, params.target.rows,
                                               params.dim, params.want_gradient);
  if (params.workspace == nullptr || params.workspace_bytes < needed) {
    return error_status("workspace of %lld bytes is smaller than the %lld needed",
                        static_cast<long long>(params.workspace_bytes),
                        static_cast<long long>(needed));
  }
  if (reinterpret_cast<uintptr_t>(params.workspace) % 64 != 0) {
    return error_status("workspace must be aligned to 64 bytes");
  }
  return Status();
}

}  // namespace

int64_t mkmmd_workspace_bytes(MkmmdDtype dtype, int64_t source_rows, int64_t target_rows,
                              int64_t dim, bool want_gradient) {
  Isa isa;
  const char* error;
  if (!chosen_isa(&isa, &error) || !sizes_fit(source_rows, target_rows, dim)) return 0;
  return dtype == MkmmdDtype::kFloat32
             ? workspace_bytes<float>(isa, source_rows, target_rows, dim, want_gradient)
             : workspace_bytes<double>(isa, source_rows, target_rows, dim, want_gradient);
}

Status mkmmd_cpu(const MkmmdParams& params) {
  Isa isa;
  const char* error;
  if (!chosen_isa(&isa, &error)) return error_status("%s", error);
  Status status = check(params);
  if (!status.ok) return status;
  if (params.dtype == MkmmdDtype::kFloat32) {
    return Run<float>(params, kernels_for<float>(isa)).run();
  }
  return Run<double>(params, kernels_for<double>(isa)).run();
}

}  // namespace padkern
