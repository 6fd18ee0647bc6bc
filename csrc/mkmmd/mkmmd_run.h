// One call of MK-MMD on the CPU: bandwidth, schedule, and the final double-precision sums.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <thread>

#include "common/pages.h"
#include "common/parallel.h"
#include "mkmmd/mkmmd_plan.h"
#include "mkmmd/mkmmd_weights.h"

namespace padkern {

template <class T>
class MkmmdRun {
 public:
  MkmmdRun(const MkmmdParams& params, const MkmmdKernels<T>& kernels)
      : params_(params),
        kernels_(kernels),
        cut_(make_cut<T>(params, kernels.lanes, kernels.panel)),
        workers_(useful_workers(cut_, num_threads())) {
    Workspace space(params.workspace);
    buffers_ = lay_out<T>(space, cut_, params, workers_);
    workspace_bytes_ = space.used();
    per_term_ = params.alphas_gradient != nullptr || params.betas_gradient != nullptr;
  }

  int64_t workspace_bytes() const { return workspace_bytes_; }

  Status run() {
    advise_large_pages(params_.workspace, workspace_bytes_);
    for (const MkmmdSample* s : {&params_.source, &params_.target}) {
      if (s->gradient == nullptr) continue;
      advise_large_pages(s->gradient,
                         s->rows * s->gradient_stride * static_cast<int64_t>(sizeof(T)));
    }
    Status status = load_weights<T>(params_, cut_, buffers_.weights, weights_, &weight_scale_);
    if (!status.ok) return status;
    find_origin();
    for (int64_t b = 0; b < cut_.blocks(); ++b) {
      new (buffers_.sums + b) BlockSums();
      new (buffers_.progress + b) std::atomic<int64_t>(0);
    }
    if (per_term_) {
      const int64_t count = cut_.blocks() * kMkmmdMaxKernels;
      std::fill(buffers_.terms_kernel, buffers_.terms_kernel + count, 0.0);
      std::fill(buffers_.terms_spread, buffers_.terms_spread + count, 0.0);
    }
    seats_ = round_up(cut_.blocks(), 2);
    pairs_end_ = 2 * cut_.blocks() + cut_.blocks() + (seats_ - 1) * (seats_ / 2);
    tickets_ = pairs_end_ + (params_.want_gradient ? cut_.blocks() : 0);
    // One parallel region for everything; the ranges are workers, which draw tickets.
    parallel_for(0, workers_, 1, &MkmmdRun::worker_body, this);
    if (sigma_sq_ > 0.0) {
      finish_regular();
    } else {
      finish_degenerate();
    }
    return Status();
  }

 private:
  bool cross_only() const { return params_.estimator == MkmmdEstimator::kCross; }

  const MkmmdSample& sample(int64_t block) const {
    return cut_.is_source(block) ? params_.source : params_.target;
  }

  MkmmdRows rows(int64_t block) const {
    const MkmmdSample& s = sample(block);
    const int64_t size = s.dtype == MkmmdDtype::kFloat64   ? 8
                         : s.dtype == MkmmdDtype::kFloat32 ? 4
                                                           : 2;
    const char* data =
        static_cast<const char*>(s.data) + cut_.first_row(block) * s.row_stride * size;
    return {data, s.dtype, cut_.rows(block), s.row_stride, s.column_stride};
  }

  T* gradient(int64_t block) const {
    return static_cast<T*>(sample(block).gradient) +
           cut_.first_row(block) * sample(block).gradient_stride;
  }

  MkmmdBlock<T> block(int64_t index) const {
    const int64_t row = cut_.first_row(index) + (cut_.is_source(index) ? 0 : cut_.source_rows);
    MkmmdBlock<T> out{};
    out.rows = cut_.rows(index);
    if (buffers_.panels != nullptr) {
      out.panels = buffers_.panels + index * cut_.padded_rows * cut_.dim;
    }
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

  MkmmdScratch<T> scratch(int64_t worker) const {
    MkmmdScratch<T> out;
    const int64_t size = lay_out_scratch<T>(nullptr, cut_, params_.want_gradient, &out);
    lay_out_scratch<T>(buffers_.scratch + worker * size, cut_, params_.want_gradient, &out);
    return out;
  }

  // The first row in use. Differences to it are exactly zero when all rows are identical, which
  // differences to a rounded mean are not.
  void find_origin() {
    std::fill(buffers_.origin, buffers_.origin + cut_.dim, 0.0);
    for (int64_t b = 0; b < cut_.blocks(); ++b) {
      const T* weights = buffers_.weights + b * cut_.padded_rows;
      MkmmdRows source = rows(b);
      for (int64_t i = 0; i < source.rows; ++i) {
        if (weights[i] == T(0)) continue;
        kernels_.read(source, i, cut_.dim, buffers_.origin);
        return;
      }
    }
  }

  // Tickets in order: column sums of each block, packing of each block, pairs, gradients of each
  // block. A ticket only waits for lower ones, which are done or running, so any number of workers
  // gets through. Pairs: every block with itself, then rounds of a round-robin tournament in which
  // a block meets each other block once. Within a round no block appears twice and a block's pairs
  // run in round order, so gradients are accumulated in place, without atomics, in a fixed order.
  static void worker_body(int64_t begin, int64_t, void* context) {
    MkmmdRun& run = *static_cast<MkmmdRun*>(context);
    const MkmmdScratch<T> scratch = run.scratch(begin);
    for (int64_t ticket; (ticket = run.next_.fetch_add(1)) < run.tickets_;) {
      run.do_ticket(ticket, scratch);
    }
  }

  void do_ticket(int64_t ticket, const MkmmdScratch<T>& scratch) {
    const int64_t count = cut_.blocks();
    if (ticket < count) {
      kernels_.column_sums(rows(ticket), buffers_.weights + ticket * cut_.padded_rows, cut_.dim,
                           buffers_.origin, scratch.row, buffers_.column_sums + ticket * cut_.dim);
      if (summed_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
        combine_means();
        ready_.store(1, std::memory_order_release);
      }
    } else if (ticket < 2 * count) {
      wait_for(ready_, 1);
      const int64_t b = ticket - count;
      buffers_.sums[b].moment = kernels_.pack(rows(b), cut_.dim, cut_.point_stride, buffers_.origin,
                                              buffers_.mean, scratch, block(b));
      if (packed_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
        prepare_pairs();
        ready_.store(2, std::memory_order_release);
      }
    } else if (wait_for(ready_, 2); !(sigma_sq_ > 0.0)) {
      return;
    } else if (ticket < pairs_end_) {
      do_pair(ticket - 2 * count, scratch);
    } else {
      const int64_t b = ticket - pairs_end_;
      wait_for(buffers_.progress[b], seats_);
      kernels_.finish(block(b), cut_.dim, cut_.point_stride, gradient_scale_, scratch, gradient(b),
                      sample(b).gradient_stride);
    }
  }

  void do_pair(int64_t ticket, const MkmmdScratch<T>& scratch) {
    const int64_t count = cut_.blocks();
    if (ticket < count) {
      pair_blocks(ticket, ticket, scratch);
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
      pair_blocks(a, b, scratch);
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
    const double total = weights_[0].sum + weights_[1].sum;
    std::fill(buffers_.mean, buffers_.mean + cut_.dim, 0.0);
    if (total == 0.0) return;  // "cross" of nothing
    for (int64_t b = 0; b < cut_.blocks(); ++b) {
      const double* row = buffers_.column_sums + b * cut_.dim;
      for (int64_t d = 0; d < cut_.dim; ++d) buffers_.mean[d] += row[d];
    }
    for (int64_t d = 0; d < cut_.dim; ++d) buffers_.mean[d] /= total;
  }

  void prepare_pairs() {
    const bool energy = params_.kernel == MkmmdKernel::kEnergy;
    if (energy) {
      sigma_sq_ = 1.0;  // no bandwidth
    } else {
      sigma_sq_ = params_.sigma_sq == nullptr ? mean_distance() : *params_.sigma_sq;
    }
    if (!(sigma_sq_ > 0.0)) return;
    make_terms<T>(params_.kernel, params_.alphas, params_.betas, params_.num_alphas, sigma_sq_,
                  &terms_);
    double same_source = 0.0, same_target = 0.0;
    double cross = 0.5 / (weight_scale_ * weight_scale_);
    if (!cross_only()) {
      same_source = 1.0 / weights_[0].pairs;
      same_target = 1.0 / weights_[1].pairs;
      cross = -1.0 / (weights_[0].sum * weights_[1].sum);
    }
    largest_ = std::max({same_source, same_target, std::fabs(cross)});
    source_factor_ = static_cast<T>(same_source / largest_);
    target_factor_ = static_cast<T>(same_target / largest_);
    cross_factor_ = static_cast<T>(cross / largest_);
    // Derivative of the widest kernel's argument; the other terms carry their ratio in slope.
    const double widest = *std::max_element(params_.alphas, params_.alphas + params_.num_alphas);
    rate_ = energy ? largest_ : 0.5 * largest_ / (widest * sigma_sq_);
    gradient_scale_ = -4.0 * rate_;
  }

  // Mean over all pooled pairs, diagonal included, in closed form: the points are centred.
  double mean_distance() const {
    double moment = 0.0;
    for (int64_t b = 0; b < cut_.blocks(); ++b) moment += buffers_.sums[b].moment;
    return 2.0 * moment / (weights_[0].sum + weights_[1].sum);
  }

  void pair_blocks(int64_t a, int64_t b, const MkmmdScratch<T>& scratch) {
    const MkmmdBlock<T> left = block(a);
    const MkmmdBlock<T> right = block(b);
    const bool same = cut_.is_source(a) == cut_.is_source(b);
    const T factor = !same ? cross_factor_ : (cut_.is_source(a) ? source_factor_ : target_factor_);
    if (a == b && params_.want_gradient) {
      std::fill(left.products, left.products + left.rows * cut_.point_stride, T(0));
      std::fill(left.row_sum, left.row_sum + left.rows, 0.0);
    }
    if (same && cross_only()) return;
    double terms_kernel[kMkmmdMaxKernels], terms_spread[kMkmmdMaxKernels];
    MkmmdPairSums sums{};
    if (per_term_) {
      std::fill(terms_kernel, terms_kernel + params_.num_alphas, 0.0);
      std::fill(terms_spread, terms_spread + params_.num_alphas, 0.0);
      sums.terms_kernel = terms_kernel;
      sums.terms_spread = terms_spread;
    }
    kernels_.pair(left, right, a == b, cut_.dim, cut_.point_stride, terms_, factor,
                  params_.want_gradient, scratch, &sums);
    BlockSums& total = buffers_.sums[a];
    const double ordered = a == b ? 1.0 : 2.0;
    if (same) {
      total.same += ordered * sums.kernel;
    } else {
      total.cross += sums.kernel;
    }
    total.spread += ordered * sums.spread;
    if (!per_term_) return;
    for (int64_t u = 0; u < params_.num_alphas; ++u) {
      buffers_.terms_kernel[a * kMkmmdMaxKernels + u] += ordered * terms_kernel[u];
      buffers_.terms_spread[a * kMkmmdMaxKernels + u] += ordered * terms_spread[u];
    }
  }

  double offset() const {
    return params_.estimator == MkmmdEstimator::kTllib
               ? 2.0 / (static_cast<double>(params_.source.rows) - 1.0)
               : 0.0;
  }

  // sum_u beta_u k_u(0)
  double kernel_at_zero() const {
    if (params_.kernel == MkmmdKernel::kEnergy) return 0.0;
    if (params_.betas == nullptr) return static_cast<double>(params_.num_alphas);
    double sum = 0.0;
    for (int64_t u = 0; u < params_.num_alphas; ++u) sum += params_.betas[u];
    return sum;
  }

  // What the loss is when every kernel is 1: the pairs of a sample, diagonal included where the
  // estimator has it, minus the cross term.
  double constant_kernel() const {
    if (!cross_only()) return 0.0;
    return weights_[0].sum * weights_[1].sum / (weight_scale_ * weight_scale_);
  }

  // Share of the diagonal in the derivative by a kernel's weight.
  double diagonal() const {
    if (params_.estimator != MkmmdEstimator::kBiased || params_.kernel == MkmmdKernel::kEnergy) {
      return 0.0;
    }
    return weights_[0].squares / weights_[0].pairs + weights_[1].squares / weights_[1].pairs;
  }

  // Bandwidth 0: every kernel is 1 and nothing moves it. Negative or NaN: NaN everywhere.
  void finish_degenerate() {
    const double fill = sigma_sq_ == 0.0 ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    *static_cast<T*>(params_.value) =
        static_cast<T>(fill + kernel_at_zero() * constant_kernel() + offset());
    if (!params_.want_gradient) return;
    *params_.sigma_gradient = fill;
    for (int64_t u = 0; u < params_.num_alphas; ++u) {
      if (params_.alphas_gradient != nullptr) params_.alphas_gradient[u] = fill;
      if (params_.betas_gradient != nullptr) params_.betas_gradient[u] = fill + constant_kernel();
    }
    for (const MkmmdSample* s : {&params_.source, &params_.target}) {
      for (int64_t i = 0; i < s->rows; ++i) {
        T* out = static_cast<T*>(s->gradient) + i * s->gradient_stride;
        std::fill(out, out + params_.dim, static_cast<T>(fill));
      }
    }
  }

  void finish_regular() {
    double source_same = 0.0, target_same = 0.0, cross = 0.0, spread = 0.0;
    for (int64_t b = 0; b < cut_.blocks(); ++b) {
      (cut_.is_source(b) ? source_same : target_same) += buffers_.sums[b].same;
      cross += buffers_.sums[b].cross;
      spread += buffers_.sums[b].spread;
    }
    double value = cross / (weight_scale_ * weight_scale_);
    if (!cross_only()) {
      if (params_.estimator == MkmmdEstimator::kBiased) {
        source_same += kernel_at_zero() * weights_[0].squares;
        target_same += kernel_at_zero() * weights_[1].squares;
      }
      value = source_same / weights_[0].pairs + target_same / weights_[1].pairs -
              2.0 * cross / (weights_[0].sum * weights_[1].sum) + offset();
    }
    *static_cast<T*>(params_.value) = static_cast<T>(value);
    if (!params_.want_gradient) return;
    const bool energy = params_.kernel == MkmmdKernel::kEnergy;
    *params_.sigma_gradient = energy ? 0.0 : rate_ * spread / sigma_sq_;
    if (!per_term_) return;
    for (int64_t place = 0; place < params_.num_alphas; ++place) {
      double kernel = 0.0, slope = 0.0;
      for (int64_t b = 0; b < cut_.blocks(); ++b) {
        kernel += buffers_.terms_kernel[b * kMkmmdMaxKernels + place];
        slope += buffers_.terms_spread[b * kMkmmdMaxKernels + place];
      }
      const int u = terms_.order[place];
      if (params_.betas_gradient != nullptr) {
        params_.betas_gradient[u] = largest_ * kernel + diagonal();
      }
      if (params_.alphas_gradient != nullptr) {
        params_.alphas_gradient[u] = energy ? 0.0 : rate_ * slope / params_.alphas[u];
      }
    }
  }

  const MkmmdParams& params_;
  const MkmmdKernels<T>& kernels_;
  const Cut cut_;
  const int64_t workers_;
  Buffers<T> buffers_;
  int64_t workspace_bytes_ = 0;
  bool per_term_ = false;
  MkmmdTerms<T> terms_;
  WeightMoments weights_[2];
  double weight_scale_ = 1.0;
  double sigma_sq_ = 0.0;
  double largest_ = 1.0;  // largest factor of a pair, taken out of the coefficients
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

}  // namespace padkern
