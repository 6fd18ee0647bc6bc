// One call of catalogue_loss_cpu. Tokens are taken in groups; for each group the items are read
// twice, first for the sums over all items (segments of items are tickets), then for the gradients
// of the items (blocks of items are tickets, each owns its rows). Cuts depend on the shape alone
// and sums have a fixed order, so the thread count changes no bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "catalogue_loss/catalogue_loss.h"
#include "catalogue_loss/catalogue_loss_kernel.h"
#include "common/pages.h"
#include "common/tickets.h"

namespace padkern {

// Tokens and exclusions of a group, sorted by the tile of logits that they touch.
struct TileIndex {
  struct Entry {
    int32_t item, token;  // within the tile
  };
  std::vector<int64_t> starts;
  std::vector<Entry> entries;

  template <class Each>
  void build(int64_t tiles, const Each& each) {
    // Counted two places up: filling moves starts[k + 1] from where tile k begins to where it ends.
    starts.assign(tiles + 2, 0);
    each([&](int64_t tile, int32_t, int32_t) { ++starts[tile + 2]; });
    for (int64_t k = 2; k < tiles + 2; ++k) starts[k] += starts[k - 1];
    entries.resize(starts[tiles + 1]);
    each([&](int64_t tile, int32_t item, int32_t token) {
      entries[starts[tile + 1]++] = {item, token};
    });
  }
  template <class Visit>
  void visit(int64_t tile, const Visit& visit_entry) const {
    if (entries.empty()) return;
    for (int64_t k = starts[tile]; k < starts[tile + 1]; ++k) visit_entry(entries[k]);
  }
};

template <class T>
class CatalogueRun {
 public:
  CatalogueRun(const CatalogueLossParams& params, const CatalogueKernels<T>& kernels,
               const std::vector<int64_t>& target_columns)
      : p_(params),
        k_(kernels),
        targets_(target_columns),
        columns_(params.candidates == nullptr ? params.items : params.candidate_count),
        blocks_(up(columns_, kCatalogueItems)),
        subs_(up(params.tokens, kCatalogueTokens)),
        parts_(row_parts(params.dim, kCatalogueRow<T>)),
        stride_(up(params.dim, kernels.lanes) * kernels.lanes),
        segments_(std::max<int64_t>(1, std::min<int64_t>(kSegments, blocks_ / kSegmentBlocks))) {
    plan();
    const int64_t group = group_subs_ * kCatalogueTokens, round = round_subs_ * kCatalogueTokens;
    packed_ = Buffer<T>(round_subs_ * packed_size());
    panels_ = Buffer<T>(round_subs_ * panel_size());
    tops_ = Buffer<T>(segments_ * group);
    masses_ = Buffer<double>(segments_ * group);
    target_logits_ = Buffer<T>(group);
    sums_ = Buffer<T>(p_.want_users ? segments_ * group * stride_ : 0);
    top_ = Buffer<T>(round);
    weight_ = Buffer<T>(round);
    losses_ = Buffer<double>(p_.tokens);
    if (keep_) {
      const int64_t size = blocks_ * group_subs_ * kTile;
      kept_ = Buffer<T>(size);
      advise_large_pages(kept_.get(), size * static_cast<int64_t>(sizeof(T)));
      block_tops_ = Buffer<T>(blocks_ * group);
    }
  }

  void run() {
    const double work = 4.0 * static_cast<double>(p_.tokens) * static_cast<double>(columns_) *
                        static_cast<double>(p_.dim + 8);
    const int64_t most = std::max(blocks_, segments_ * (split_ ? group_subs_ : 1));
    threads_ = useful_workers(work, most);
    for (int64_t w = 0; w < threads_; ++w) workers_.emplace_back(*this);
    if (p_.want_items) clear();
    for (int64_t first = 0; first < subs_; first += round_subs_) {
      const int64_t end = std::min(subs_, first + round_subs_);
      tickets(end - first, [&](Worker&, int64_t s) { pack(first, first + s); });
      for (int64_t group = first; group < end; group += group_subs_) {
        const int64_t subs = std::min(group_subs_, end - group);
        index(group, subs);
        const int64_t cuts = split_ ? subs : 1;
        tickets(segments_ * cuts, [&](Worker& worker, int64_t ticket) {
          sum_segment(worker, first, group, subs, ticket / cuts, split_ ? ticket % cuts : 0,
                      split_ ? ticket % cuts + 1 : subs);
        });
        tickets(subs, [&](Worker&, int64_t s) { finish(first, group, group + s); });
      }
      if (!p_.want_items) continue;
      if (!keep_) index(first, end - first);
      tickets(blocks_, [&](Worker& worker, int64_t block) {
        item_block(worker, first, end - first, block);
      });
    }
    double total = 0.0;
    for (int64_t t = 0; t < p_.tokens; ++t) total += losses_.get()[t];
    *static_cast<T*>(p_.value) = static_cast<T>(total / static_cast<double>(p_.tokens));
  }

 private:
  static constexpr int64_t kTile = kCatalogueItems * kCatalogueTokens;
  static constexpr int64_t kSegments = 32;      // each has sums of its own over a group's tokens
  static constexpr int64_t kSegmentBlocks = 8;  // at least so many, or merging costs too much
  static constexpr int64_t kKeptBytes = int64_t{128} << 20;
  static constexpr int64_t kGroupBytes = int64_t{480}
                                         << 10;  // of states and sums, for the L2 cache
  static constexpr int64_t kRoundTokens = 4096;  // packed at once when nothing is kept

  struct Worker {
    Buffer<T> items, tile, sums;
    T factor[kCatalogueTokens], scale[kCatalogueTokens];
    double row_sum[kCatalogueItems];

    explicit Worker(const CatalogueRun& run)
        : items(run.parts_ * kCatalogueItems * kCatalogueRow<T>),
          tile(kTile),
          sums(run.p_.want_items ? kCatalogueItems * run.stride_ : 0) {}
  };

  static int64_t up(int64_t size, int64_t unit) { return (size + unit - 1) / unit; }
  int64_t packed_size() const { return parts_ * kCatalogueTokens * kCatalogueRow<T>; }
  int64_t panel_size() const { return kCatalogueTokens * p_.dim; }
  int64_t tokens_of(int64_t sub) const {
    return std::min(kCatalogueTokens, p_.tokens - sub * kCatalogueTokens);
  }
  int64_t vectors_of(int64_t sub) const { return up(tokens_of(sub), k_.lanes); }
  int64_t items_of(int64_t block) const {
    return std::min(kCatalogueItems, columns_ - block * kCatalogueItems);
  }
  int64_t row_of(int64_t column) const {
    return p_.candidates == nullptr ? column : p_.candidates[column];
  }
  const T* item_row(int64_t row) const {
    return static_cast<const T*>(p_.item_rows) + row * p_.item_stride;
  }
  template <class Body>
  void tickets(int64_t count, const Body& body) {
    run_tickets(count, std::min(threads_, count),
                [&](int64_t worker, int64_t ticket) { body(workers_[worker], ticket); });
  }

  void plan() {
    const auto size = static_cast<int64_t>(sizeof(T));
    // With few segments of items the token blocks of a group are tickets of their own.
    split_ = segments_ < 8;
    const int64_t states = 2 * kCatalogueTokens * std::max<int64_t>(p_.dim, 1) * size;
    group_subs_ = split_ ? 64 : std::max<int64_t>(1, kGroupBytes / states);
    const int64_t tiles = kKeptBytes / (blocks_ * kTile * size);
    keep_ = p_.want_items && p_.plan != 2 &&
            (p_.plan == 1 || tiles >= std::min<int64_t>(2, group_subs_));
    if (keep_ && p_.plan == 0) group_subs_ = std::min(group_subs_, tiles);
    group_subs_ = std::min(group_subs_, subs_);
    group_subs_ = up(subs_, up(subs_, group_subs_));  // groups of even size
    round_subs_ = group_subs_;
    if (!keep_) {
      const int64_t groups = std::max<int64_t>(1, kRoundTokens / kCatalogueTokens / group_subs_);
      round_subs_ = std::min(subs_, groups * group_subs_);
    }
  }

  // Rows of items that no candidate writes.
  void clear() {
    if (p_.candidates == nullptr) return;
    const auto size = static_cast<int64_t>(sizeof(T));
    constexpr int64_t kRows = 4096;
    tickets(up(p_.items, kRows), [&](Worker&, int64_t part) {
      const int64_t rows = std::min(kRows, p_.items - part * kRows);
      std::memset(static_cast<T*>(p_.d_items) + part * kRows * p_.dim, 0, rows * p_.dim * size);
    });
    if (p_.d_bias != nullptr) std::memset(p_.d_bias, 0, p_.items * size);
  }

  void pack(int64_t first, int64_t sub) {
    T* packed = packed_.get() + (sub - first) * packed_size();
    k_.pack_rows(static_cast<const T*>(p_.users), p_.user_stride, nullptr, sub * kCatalogueTokens,
                 tokens_of(sub), p_.dim, kCatalogueTokens, packed);
    k_.pack_panels(packed, p_.dim, panels_.get() + (sub - first) * panel_size());
  }

  int64_t column_of(int64_t item) const {
    if (p_.candidates == nullptr) return item;
    const int64_t* end = p_.candidates + p_.candidate_count;
    const int64_t* at = std::lower_bound(p_.candidates, end, item);
    return at != end && *at == item ? at - p_.candidates : -1;
  }

  // Tile (block, sub) has number block * subs + sub; those of a group have others within its round.
  void index(int64_t first, int64_t subs) {
    const int64_t begin = first * kCatalogueTokens;
    const int64_t end = std::min(p_.tokens, begin + subs * kCatalogueTokens);
    const auto place = [&](const auto& add, int64_t column, int64_t t) {
      const int64_t sub = (t - begin) / kCatalogueTokens;
      add(column / kCatalogueItems * subs + sub, static_cast<int32_t>(column % kCatalogueItems),
          static_cast<int32_t>((t - begin) % kCatalogueTokens));
    };
    target_index_.build(blocks_ * subs, [&](const auto& add) {
      for (int64_t t = begin; t < end; ++t) place(add, targets_[t], t);
    });
    if (p_.excluded_offsets == nullptr) return;
    excluded_index_.build(blocks_ * subs, [&](const auto& add) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t e = p_.excluded_offsets[t]; e < p_.excluded_offsets[t + 1]; ++e) {
          const int64_t column = column_of(p_.excluded_values[e]);
          if (column >= 0 && column != targets_[t]) place(add, column, t);
        }
      }
    });
  }

  void pack_items(Worker& worker, int64_t block) {
    k_.pack_rows(static_cast<const T*>(p_.item_rows), p_.item_stride, p_.candidates,
                 block * kCatalogueItems, items_of(block), p_.dim, kCatalogueItems,
                 worker.items.get());
  }

  // Logits of one tile, those of excluded items -Inf. `sub` counts from `first`, `place` is the
  // tile's number in the index.
  void logits(Worker& worker, int64_t block, int64_t first, int64_t sub, int64_t place, T* tile) {
    k_.logits(worker.items.get(), items_of(block), panels_.get() + sub * panel_size(),
              vectors_of(first + sub), p_.dim, static_cast<const T*>(p_.bias), p_.candidates,
              block * kCatalogueItems, tile);
    if (p_.excluded_offsets == nullptr) return;
    excluded_index_.visit(place, [&](const TileIndex::Entry& e) {
      tile[e.item * kCatalogueTokens + e.token] = -std::numeric_limits<T>::infinity();
    });
  }

  // Sums over one segment of the items for token blocks [begin, end) of a group: maximum and mass
  // of the exponentials, and the item vectors weighted with them.
  void sum_segment(Worker& worker, int64_t first, int64_t group, int64_t subs, int64_t segment,
                   int64_t begin, int64_t end) {
    const int64_t width = group_subs_ * kCatalogueTokens;
    T* tops = tops_.get() + segment * width;
    double* masses = masses_.get() + segment * width;
    for (int64_t t = begin * kCatalogueTokens; t < end * kCatalogueTokens; ++t) {
      tops[t] = -std::numeric_limits<T>::infinity();
      masses[t] = 0.0;
    }
    const int64_t from = blocks_ * segment / segments_, to = blocks_ * (segment + 1) / segments_;
    for (int64_t block = from; block < to; ++block) {
      pack_items(worker, block);
      for (int64_t s = begin; s < end; ++s) {
        const int64_t sub = group + s, at = s * kCatalogueTokens, place = block * subs + s;
        T* tile = keep_ ? kept_.get() + place * kTile : worker.tile.get();
        logits(worker, block, first, sub - first, place, tile);
        target_index_.visit(place, [&](const TileIndex::Entry& e) {
          target_logits_.get()[at + e.token] = tile[e.item * kCatalogueTokens + e.token];
        });
        const bool changed = k_.exponentials(tile, items_of(block), vectors_of(sub), tops + at,
                                             masses + at, worker.factor);
        if (keep_) {
          std::memcpy(block_tops_.get() + place * kCatalogueTokens, tops + at,
                      kCatalogueTokens * sizeof(T));
        }
        if (!p_.want_users) continue;
        k_.state_sums(tile, items_of(block), worker.items.get(), tokens_of(sub), p_.dim,
                      block == from, changed ? worker.factor : nullptr,
                      sums_.get() + (segment * width + at) * stride_, stride_);
      }
    }
  }

  // Joins the segments for one token block: loss, state gradients, and what the items' pass needs.
  void finish(int64_t first, int64_t group, int64_t sub) {
    const int64_t width = group_subs_ * kCatalogueTokens;
    const int64_t at = (sub - group) * kCatalogueTokens, out = (sub - first) * kCatalogueTokens;
    const double share = 1.0 / static_cast<double>(p_.tokens);
    for (int64_t i = 0; i < kCatalogueTokens; ++i) {
      const int64_t t = sub * kCatalogueTokens + i;
      // Padding has logits too, those of the bias: against the largest number they count nothing.
      top_.get()[out + i] = std::numeric_limits<T>::max();
      weight_.get()[out + i] = T(0);
      if (t >= p_.tokens) continue;
      T top = -std::numeric_limits<T>::infinity();
      for (int64_t s = 0; s < segments_; ++s) top = std::max(top, tops_.get()[s * width + at + i]);
      double mass = 0.0, factor[kSegments];
      for (int64_t s = 0; s < segments_; ++s) {
        factor[s] = std::exp(static_cast<double>(tops_.get()[s * width + at + i]) -
                             static_cast<double>(top));
        mass += factor[s] * masses_.get()[s * width + at + i];
      }
      losses_.get()[t] = static_cast<double>(top) + std::log(mass) -
                         static_cast<double>(target_logits_.get()[at + i]);
      const double weight = share / mass;
      top_.get()[out + i] = top;
      weight_.get()[out + i] = static_cast<T>(weight);
      if (!p_.want_users) continue;
      T factors[kSegments];
      for (int64_t s = 0; s < segments_; ++s) factors[s] = static_cast<T>(factor[s] * weight);
      k_.merge(sums_.get() + (at + i) * stride_, width * stride_, factors, segments_,
               item_row(row_of(targets_[t])), static_cast<T>(share), p_.dim,
               static_cast<T*>(p_.d_users) + t * p_.dim);
    }
  }

  // Gradients of one block of items from all tokens of a round.
  void item_block(Worker& worker, int64_t first, int64_t subs, int64_t block) {
    const int64_t count = items_of(block);
    const T share = static_cast<T>(1.0 / static_cast<double>(p_.tokens));
    double* row_sum = p_.d_bias == nullptr ? nullptr : worker.row_sum;
    std::fill(worker.row_sum, worker.row_sum + kCatalogueItems, 0.0);
    if (!keep_) pack_items(worker, block);
    for (int64_t s = 0; s < subs; ++s) {
      const int64_t place = block * subs + s, at = s * kCatalogueTokens;
      T* tile = worker.tile.get();
      const T* scale = weight_.get() + at;
      if (keep_) {
        tile = kept_.get() + place * kTile;
        k_.scales(block_tops_.get() + place * kCatalogueTokens, top_.get() + at, scale,
                  vectors_of(first + s), worker.scale);
        scale = worker.scale;
      } else {
        logits(worker, block, first, s, place, tile);
      }
      k_.residuals(tile, count, vectors_of(first + s), keep_ ? nullptr : top_.get() + at, scale,
                   row_sum);
      target_index_.visit(place, [&](const TileIndex::Entry& e) {
        tile[e.item * kCatalogueTokens + e.token] -= share;
        worker.row_sum[e.item] -= static_cast<double>(share);
      });
      k_.item_sums(tile, count, packed_.get() + s * packed_size(), tokens_of(first + s), p_.dim,
                   s == 0, worker.sums.get(), stride_);
    }
    const bool fresh = first == 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = row_of(block * kCatalogueItems + i);
      k_.add_row(worker.sums.get() + i * stride_, p_.dim, fresh,
                 static_cast<T*>(p_.d_items) + row * p_.dim);
      if (p_.d_bias == nullptr) continue;
      T* out = static_cast<T*>(p_.d_bias) + row;
      *out = static_cast<T>(worker.row_sum[i] + (fresh ? 0.0 : static_cast<double>(*out)));
    }
  }

  const CatalogueLossParams& p_;
  const CatalogueKernels<T>& k_;
  const std::vector<int64_t>& targets_;
  const int64_t columns_, blocks_, subs_, parts_, stride_, segments_;
  int64_t group_subs_ = 1;  // token blocks whose states and sums stay in cache
  int64_t round_subs_ = 1;  // token blocks after which the items' gradients are taken
  int64_t threads_ = 1;
  bool keep_ = false, split_ = false;
  TileIndex target_index_, excluded_index_;
  std::vector<Worker> workers_;
  Buffer<T> packed_{0}, panels_{0}, tops_{0}, target_logits_{0}, sums_{0}, top_{0}, weight_{0},
      kept_{0}, block_tops_{0};
  Buffer<double> masses_{0}, losses_{0};
};

}  // namespace padkern
