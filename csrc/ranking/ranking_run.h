// One ranking call: who masks what, who is scanned, in which pieces, and what comes of it. Counts
// and lists of best items do not depend on how the scan is cut, so neither do the results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "common/tickets.h"
#include "ranking/ranking.h"
#include "ranking/ranking_kernel.h"

namespace padkern {

template <class T>
class RankRun {
 public:
  RankRun(const RankParams& params, const RankKernels<T>& kernels)
      : p_(params),
        kernels_(kernels),
        depths_(params.dim),
        panels_((params.items + kernels.width - 1) / kernels.width),
        keep_(std::min(params.top_k, params.items)),
        positions_(params.order != nullptr ? params.items + 1 : 0),
        lists_(params.seen_count + 2 * params.users),
        list_sizes_(params.users),
        own_(params.users),
        masked_(params.users),
        wild_(params.users),
        target_scores_(params.users) {
    const int64_t row_bytes = depths_.count * kRankDepth * static_cast<int64_t>(sizeof(T));
    block_rows_ = std::clamp<int64_t>(kBlockBytes / row_bytes / 8 * 8, 32, kBlockRows);
    const int64_t panel_bytes = kernels.width * p_.dim * static_cast<int64_t>(sizeof(T));
    stage_panels_ =
        std::max<int64_t>(2 * kMaxLanes, kStageBytes / std::max<int64_t>(panel_bytes, 1));
    threads_ = num_threads();
    lanes_ = early() ? lanes_for(1) : lanes_for(p_.users);
    const int64_t states = lanes_ * p_.users;
    if (p_.targets != nullptr) counts_.resize(states);
    if (keep_ > 0) {
      top_scores_ = std::make_unique<Buffer<T>>(states * keep_);
      top_ids_ = std::make_unique<Buffer<int32_t>>(states * keep_);
      tops_.resize(states);
      for (int64_t i = 0; i < states; ++i) {
        tops_[i] = {top_scores_->get() + i * keep_, top_ids_->get() + i * keep_, 0};
      }
    }
    for (int64_t w = 0; w < threads_; ++w) {
      scratch_.push_back(std::make_unique<Scratch>(*this));
    }
  }

  void run() {
    if (p_.order != nullptr) {
      for (int64_t i = 0; i < p_.items; ++i) positions_[p_.order[i]] = static_cast<int32_t>(i);
    }
    const double dim = static_cast<double>(p_.dim);
    each_user(64.0 + 4.0 * dim,
              [&](Scratch&, int64_t first, int64_t last) { prepare(first, last); });
    // A masked target is a miss whatever the others score; only NaN scores remain to be counted.
    for (int64_t u = 0; u < p_.users; ++u) {
      if (keep_ > 0 || wild_[u] != 0 || masked_[u] == 0) active_.push_back(u);
    }
    scan();
    each_user(64.0 + 32.0 * static_cast<double>(keep_ * lanes_),
              [&](Scratch& scratch, int64_t first, int64_t last) {
                for (int64_t u = first; u < last; ++u) finish(scratch, u);
              });
  }

 private:
  // Users of one task; their packed states stay in the second-level cache.
  static constexpr int64_t kBlockRows = 256;
  static constexpr int64_t kBlockBytes = int64_t{1} << 19;
  // Panels of one stage stay in the last-level cache while all users meet them.
  static constexpr int64_t kStageBytes = int64_t{6} << 20;
  // With few users the panels of a stage are shared out too, in at most so many lanes. Every lane
  // has lists of its own to fill, so there are no more than keep the threads busy.
  static constexpr int64_t kMaxLanes = 16;
  // Panels of the first stage of a search that may end early; every other stage is as long as all
  // before it.
  static constexpr int64_t kFirstPanels = 4;
  static constexpr int64_t kUsersPerTicket = 64;

  struct Counts {
    int64_t greater = 0;
    int64_t equal = 0;
    int64_t nans = 0;
  };

  struct Scratch {
    Buffer<T> points, tile, targets;
    Buffer<char> counters;
    Buffer<const int32_t*> lists;
    Buffer<int32_t> own;
    Buffer<int64_t> counts;
    Buffer<RankTop<T>*> tops;
    std::vector<std::pair<T, int32_t>> merged;
    int64_t packed = -1;  // number of the block that points holds

    explicit Scratch(const RankRun& r)
        : points(r.block_rows_ * r.depths_.count * kRankDepth),
          tile(r.block_rows_ * r.kernels_.width),
          targets(r.block_rows_),
          counters(r.block_rows_ * r.kernels_.lanes * static_cast<int64_t>(sizeof(T))),
          lists(r.block_rows_),
          own(r.block_rows_),
          counts(3 * r.block_rows_),
          tops(r.block_rows_) {
      merged.reserve(r.lanes_ * r.keep_);
    }
  };

  // Where users go out, all of them but those with NaN scores to be counted.
  bool early() const { return p_.at_most > 0 && p_.targets != nullptr && keep_ == 0; }

  int64_t lanes_for(int64_t users) const {
    const int64_t blocks = std::max<int64_t>(1, (users + block_rows_ - 1) / block_rows_);
    if (threads_ == 1) return 1;
    return std::clamp<int64_t>(2 * threads_ / blocks, 1, kMaxLanes);
  }

  template <class Body>
  void each_user(double work, const Body& body) {
    const int64_t tickets = (p_.users + kUsersPerTicket - 1) / kUsersPerTicket;
    work *= static_cast<double>(p_.users);
    run_tickets(tickets, workers(work, tickets), [&](int64_t worker, int64_t ticket) {
      const int64_t first = ticket * kUsersPerTicket;
      body(*scratch_[worker], first, std::min(first + kUsersPerTicket, p_.users));
    });
  }

  int64_t workers(double work, int64_t tickets) const {
    return std::min<int64_t>(useful_workers(work, tickets), scratch_.size());
  }

  int32_t position(int64_t id) const {
    return p_.order != nullptr ? positions_[id] : static_cast<int32_t>(id - 1);
  }

  int32_t* list(int64_t user) const {
    return lists_.get() + (p_.seen_offsets != nullptr ? p_.seen_offsets[user] : 0) + 2 * user;
  }

  // Masked positions, the target's score, and whether any score could be NaN.
  void prepare(int64_t first, int64_t last) {
    const T* states = static_cast<const T*>(p_.states);
    if (p_.targets != nullptr) {
      kernels_.target_scores(states, p_.state_stride, static_cast<const T*>(p_.matrix),
                             p_.matrix_stride, p_.targets, p_.dim, first, last,
                             target_scores_.get());
    }
    const double of_items = static_cast<double>(*static_cast<const T*>(p_.largest));
    for (int64_t u = first; u < last; ++u) {
      int32_t* out = list(u);
      int64_t size = 0;
      const int64_t target = p_.targets != nullptr ? p_.targets[u] : 0;
      bool masked = false;
      if (p_.mask_repeats) {
        for (int64_t k = p_.seen_offsets[u]; k < p_.seen_offsets[u + 1]; ++k) {
          const int64_t id = p_.seen_values[k];
          if (id != 0) out[size++] = position(id);
          masked = masked || (id != 0 && id == target);
        }
      }
      own_[u] = -1;
      if (target != 0 && !masked) out[size++] = own_[u] = position(target);
      std::sort(out, out + size);
      size = std::unique(out, out + size) - out;
      out[size] = kRankNoPosition;
      list_sizes_[u] = size;
      masked_[u] = masked ? 1 : 0;
      const double of_user =
          static_cast<double>(kernels_.largest(states + u * p_.state_stride, p_.dim));
      // Sums that stay below the largest number cannot become NaN; a NaN fails the comparison.
      const double bound = 2.0 * static_cast<double>(p_.dim + 1) * of_user * of_items;
      wild_[u] = bound < static_cast<double>(std::numeric_limits<T>::max()) ? 0 : 1;
    }
  }

  void scan() {
    int64_t first = 0, blocks_before = 0;
    while (first < panels_ && !active_.empty()) {
      int64_t size = stage_panels_;
      if (early()) size = std::min(size, std::max(first, kFirstPanels));
      const int64_t last = std::min(panels_, first + size);
      const int64_t users = static_cast<int64_t>(active_.size());
      const int64_t blocks = (users + block_rows_ - 1) / block_rows_;
      const int64_t rows = ((users + blocks - 1) / blocks + 7) / 8 * 8;
      const int64_t lanes = std::min({lanes_for(users), lanes_, last - first});
      const double work = 2.0 * static_cast<double>(users) * static_cast<double>(p_.dim + 1) *
                          static_cast<double>((last - first) * kernels_.width);
      run_tickets(blocks * lanes, workers(work / 50.0, blocks * lanes),
                  [&](int64_t worker, int64_t ticket) {
                    const int64_t block = ticket / lanes, lane = ticket % lanes;
                    const int64_t begin = block * rows, end = std::min(begin + rows, users);
                    if (begin >= end) return;
                    task(*scratch_[worker], blocks_before + block, begin, end, lane,
                         first + (last - first) * lane / lanes,
                         first + (last - first) * (lane + 1) / lanes);
                  });
      blocks_before += blocks;
      first = last;
      if (early()) drop_beaten();
    }
  }

  // Users active_[begin, end) against the panels [first, last).
  void task(Scratch& s, int64_t number, int64_t begin, int64_t end, int64_t lane, int64_t first,
            int64_t last) {
    const int64_t* users = active_.data() + begin;
    const int64_t rows = end - begin;
    RankTask<T> task;
    task.items = {static_cast<const T*>(p_.panels), p_.order, p_.items, p_.dim};
    task.first_panel = first;
    task.last_panel = last;
    task.rows = rows;
    if (s.packed != number) {
      kernels_.pack_users(static_cast<const T*>(p_.states), p_.state_stride, users, rows, p_.dim,
                          s.points.get());
      s.packed = number;
    }
    task.points = s.points.get();
    task.targets = p_.targets != nullptr ? s.targets.get() : nullptr;
    task.masked = s.lists.get();
    task.own = s.own.get();
    task.count_nans = false;
    task.greater = s.counts.get();
    task.equal = task.greater + rows;
    task.nans = task.equal + rows;
    task.tops = keep_ > 0 ? s.tops.get() : nullptr;
    task.top_k = keep_;
    task.tile = s.tile.get();
    task.counters = s.counters.get();
    const auto start = static_cast<int32_t>(first * kernels_.width);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t u = users[i];
      const int32_t* masked = list(u);
      s.lists.get()[i] = std::lower_bound(masked, masked + list_sizes_[u], start);
      s.own.get()[i] = own_[u];
      s.targets.get()[i] = target_scores_.get()[u];
      if (keep_ > 0) s.tops.get()[i] = &tops_[lane * p_.users + u];
      task.count_nans = task.count_nans || wild_[u] != 0;
    }
    kernels_.run(task);
    if (p_.targets == nullptr) return;
    for (int64_t i = 0; i < rows; ++i) {
      Counts& counts = counts_[lane * p_.users + users[i]];
      counts.greater += task.greater[i];
      counts.equal += task.equal[i];
      counts.nans += task.nans[i];
    }
  }

  Counts counts(int64_t user) const {
    Counts sum;
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      const Counts& part = counts_[lane * p_.users + user];
      sum.greater += part.greater;
      sum.equal += part.equal;
      sum.nans += part.nans;
    }
    return sum;
  }

  static double rank(const Counts& counts) {
    return 1.0 + static_cast<double>(counts.greater) + 0.5 * static_cast<double>(counts.equal);
  }

  void drop_beaten() {
    const auto limit = static_cast<double>(p_.at_most);
    const auto beaten = [&](int64_t u) { return wild_[u] == 0 && rank(counts(u)) > limit; };
    active_.erase(std::remove_if(active_.begin(), active_.end(), beaten), active_.end());
  }

  void finish(Scratch& scratch, int64_t u) {
    if (p_.targets != nullptr) {
      const Counts sum = counts(u);
      const T own = target_scores_.get()[u];
      const bool lost = masked_[u] == 0 && own != own;
      double value = rank(sum);
      if (masked_[u] != 0 || lost || (p_.at_most > 0 && value > static_cast<double>(p_.at_most))) {
        value = std::numeric_limits<double>::infinity();
      }
      p_.ranks[u] = value;
      p_.tied[u] = sum.equal > 0 && std::isfinite(value) ? 1 : 0;
      p_.masked[u] = masked_[u];
      p_.nan_target[u] = lost ? 1 : 0;
      p_.nan_others[u] = sum.nans;
    }
    if (p_.top_k == 0) return;
    auto& merged = scratch.merged;
    merged.clear();
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      const RankTop<T>& top = tops_[lane * p_.users + u];
      for (int64_t i = 0; i < top.size; ++i) merged.emplace_back(top.scores[i], top.ids[i]);
    }
    std::sort(merged.begin(), merged.end(), [](const auto& a, const auto& b) {
      return a.first > b.first || (a.first == b.first && a.second < b.second);
    });
    const auto found = std::min<int64_t>(p_.top_k, merged.size());
    int64_t* ids = p_.top + u * p_.top_k;
    T* scores = static_cast<T*>(p_.top_scores) + u * p_.top_k;
    for (int64_t i = 0; i < p_.top_k; ++i) {
      ids[i] = i < found ? merged[i].second : 0;
      scores[i] = i < found ? merged[i].first : -std::numeric_limits<T>::infinity();
    }
  }

  const RankParams& p_;
  const RankKernels<T>& kernels_;
  const RankDepths depths_;
  const int64_t panels_;
  const int64_t keep_;  // best items to find: there may be fewer items than asked for
  int64_t block_rows_, stage_panels_, lanes_, threads_;
  std::vector<int32_t> positions_;  // of an id, where the caller gave an order
  Buffer<int32_t> lists_;           // masked positions of every user, each list with its end mark
  std::vector<int64_t> list_sizes_;
  std::vector<int32_t> own_;  // position of the target; -1 where it needs no rank
  std::vector<uint8_t> masked_, wild_;
  Buffer<T> target_scores_;
  std::vector<Counts> counts_;  // [lanes, users]
  std::unique_ptr<Buffer<T>> top_scores_;
  std::unique_ptr<Buffer<int32_t>> top_ids_;
  std::vector<RankTop<T>> tops_;  // [lanes, users]
  std::vector<int64_t> active_;   // users still to be scanned, ascending
  std::vector<std::unique_ptr<Scratch>> scratch_;
};

}  // namespace padkern
