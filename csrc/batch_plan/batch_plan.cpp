#include "batch_plan/batch_plan.h"

#include <algorithm>

#include "common/philox_words.h"

namespace padkern {
namespace {

// High half of a 64-bit product: a uniform word scaled to 0..count-1.
uint64_t scaled(uint64_t word, uint64_t count) {
  const uint64_t high = (word >> 32) * count;
  const uint64_t low = (word & 0xffffffffu) * count;
  return (high + (low >> 32)) >> 32;
}

class Negatives {
 public:
  Negatives(const PlanSource& source, const PlanRequest& request, const int64_t* targets,
            int64_t tokens)
      : source_(source), request_(request), targets_(targets), tokens_(tokens) {}

  // Negative j of the token at a slot of a row: never one of the row's items if there is another.
  int64_t draw(int64_t row, int64_t slot, int64_t j) const {
    const int64_t* own = source_.own_values + source_.own_offsets[row];
    const int64_t* own_end = source_.own_values + source_.own_offsets[row + 1];
    for (int64_t attempt = 0; attempt < kPlanAttempts; ++attempt) {
      const int64_t item = candidate(word(row, slot, j, attempt));
      if (!std::binary_search(own, own_end, item)) return item;
    }
    // Nearly everything is the row's own: the next free candidate after a uniform place.
    const uint64_t first = word(row, slot, j, 0);
    const int64_t count = source_.num_candidates;
    const int64_t place = static_cast<int64_t>(scaled(first, static_cast<uint64_t>(count)));
    for (int64_t step = 0; step < count; ++step) {
      const int64_t item = source_.candidates[(place + step) % count];
      if (!std::binary_search(own, own_end, item)) return item;
    }
    return source_.candidates[place];
  }

 private:
  uint64_t word(int64_t row, int64_t slot, int64_t j, int64_t attempt) const {
    const uint64_t user = static_cast<uint64_t>(row);
    const PhiloxWords x = philox(
        request_.key, {{static_cast<uint32_t>(user), static_cast<uint32_t>(user >> 32),
                        static_cast<uint32_t>(slot), static_cast<uint32_t>(j << 12 | attempt)}});
    return uint64_t{x.word[0]} << 32 | x.word[1];
  }

  int64_t candidate(uint64_t word) const {
    const int64_t count = source_.num_candidates;
    switch (request_.sampling) {
      case NegativeSampling::kPopularity: {
        const double* sums = source_.cumulative;
        const double at = static_cast<double>(word >> 11) * 0x1p-53 * sums[count - 1];
        const int64_t place = std::upper_bound(sums, sums + count, at) - sums;
        return source_.candidates[std::min(place, count - 1)];
      }
      case NegativeSampling::kInBatch:
        return targets_[scaled(word, static_cast<uint64_t>(tokens_))];
      default:
        return source_.candidates[scaled(word, static_cast<uint64_t>(count))];
    }
  }

  const PlanSource& source_;
  const PlanRequest& request_;
  const int64_t* targets_;
  int64_t tokens_;
};

}  // namespace

Status plan_sizes(const PlanSource& source, const PlanRequest& request, int64_t* tokens,
                  int64_t* width) {
  *tokens = *width = 0;
  if (request.negatives < 0 || request.negatives > kPlanNegatives) {
    return error_status("negatives must be from 0 to %lld, got %lld",
                        static_cast<long long>(kPlanNegatives),
                        static_cast<long long>(request.negatives));
  }
  if (source.items >= kPlanItems) {
    return error_status("items must be below 2^31, got %lld", static_cast<long long>(source.items));
  }
  for (int64_t b = 0; b < request.batch; ++b) {
    const int64_t row = request.users[b];
    if (row < 0 || row >= source.rows) {
      return error_status("users must be rows from 0 to %lld, got %lld at %lld",
                          static_cast<long long>(source.rows - 1), static_cast<long long>(row),
                          static_cast<long long>(b));
    }
    const int64_t length = source.offsets[row + 1] - source.offsets[row];
    if (length < 2) {
      return error_status("users must have at least 2 items, row %lld has %lld",
                          static_cast<long long>(row), static_cast<long long>(length));
    }
    const int64_t inputs = std::min(length - 1, source.max_len);
    *tokens += inputs;
    *width = std::max(*width, inputs);
  }
  return Status();
}

Status batch_plan(const PlanSource& source, const PlanRequest& request, int64_t width,
                  PlanOutput* out) {
  int64_t tokens = 0;
  out->offsets[0] = 0;
  for (int64_t b = 0; b < request.batch; ++b) {
    const int64_t row = request.users[b];
    const int64_t* end = source.values + source.offsets[row + 1];
    const int64_t length =
        std::min(end - (source.values + source.offsets[row]) - 1, source.max_len);
    for (int64_t t = 0; t < length; ++t) {
      out->inputs[tokens + t] = end[t - length - 1];
      out->targets[tokens + t] = end[t - length];
      out->positions[tokens + t] = source.max_len - length + t;
      out->grid[tokens + t] = b * width + t;
    }
    tokens += length;
    out->offsets[b + 1] = tokens;
  }
  const int64_t k = request.negatives;
  if (k > 0) {
    const Negatives negatives(source, request, out->targets, tokens);
    for (int64_t b = 0; b < request.batch; ++b) {
      for (int64_t t = out->offsets[b]; t < out->offsets[b + 1]; ++t) {
        for (int64_t j = 0; j < k; ++j) {
          out->negatives[t * k + j] = negatives.draw(request.users[b], out->positions[t], j);
        }
      }
    }
  }
  // Unique items in ascending order, and the place of each.
  const int64_t* roles[kPlanRoles] = {out->inputs, out->targets, out->negatives};
  const int64_t sizes[kPlanRoles] = {tokens, tokens, tokens * k};
  std::fill(out->mark, out->mark + source.items + 1, 0);
  for (int64_t role = 0; role < kPlanRoles; ++role) {
    for (int64_t s = 0; s < sizes[role]; ++s) {
      const int64_t item = roles[role][s];
      if (item < 1 || item > source.items) {
        return error_status("item ids must be from 1 to %lld, got %lld",
                            static_cast<long long>(source.items), static_cast<long long>(item));
      }
      ++out->mark[item];
    }
  }
  int64_t unique = 0;
  for (int64_t item = 1; item <= source.items; ++item) {
    if (out->mark[item] == 0) continue;
    out->unique[unique] = item;
    out->counts[unique] = out->mark[item];
    out->bins[unique] = source.bins[item];
    out->mark[item] = unique++;
  }
  out->num_unique = unique;
  // Slots of each role by item: counting sort, which keeps them in ascending order.
  int64_t* rows = out->rows;
  int64_t* slots = out->slots;
  for (int64_t role = 0; role < kPlanRoles; ++role) {
    int64_t* starts = out->starts + role * (unique + 1);
    std::fill(starts, starts + unique + 1, 0);
    for (int64_t s = 0; s < sizes[role]; ++s) {
      rows[s] = out->mark[roles[role][s]];
      ++starts[rows[s] + 1];
    }
    for (int64_t u = 0; u < unique; ++u) starts[u + 1] += starts[u];
    for (int64_t s = 0; s < sizes[role]; ++s) slots[starts[rows[s]]++] = s;
    // Each start has moved to the next one's place.
    for (int64_t u = unique; u > 0; --u) starts[u] = starts[u - 1];
    starts[0] = 0;
    rows += sizes[role];
    slots += sizes[role];
  }
  return Status();
}

}  // namespace padkern
