// What a training step needs to know of its batch: packed tokens, negatives, unique items, and
// where each slot finds its item. The rules are in padkern/data/PLAN.md.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace padkern {

enum class NegativeSampling : int { kUniform = 0, kPopularity = 1, kInBatch = 2 };

constexpr int64_t kPlanAttempts = 64;             // draws of one negative before it is searched for
constexpr int64_t kPlanNegatives = 1 << 20;       // most negatives per token
constexpr int64_t kPlanRoles = 3;                 // input, target, negative
constexpr int64_t kPlanItems = int64_t{1} << 31;  // most items

// The training rows and how negatives are drawn from them. Arrays belong to the caller.
struct PlanSource {
  const int64_t* values = nullptr;   // item ids of all rows, end to end, 1..items
  const int64_t* offsets = nullptr;  // [rows + 1]
  int64_t rows = 0;
  int64_t items = 0;                    // ids run from 1 to items
  int64_t max_len = 0;                  // inputs of a row: all but the last of its last max_len + 1
  const int64_t* own_values = nullptr;  // each row's items, sorted, once each
  const int64_t* own_offsets = nullptr;  // [rows + 1]
  const int64_t* candidates = nullptr;   // ids that may be negatives, sorted
  const double* cumulative = nullptr;    // popularity: running sums of the candidates' weights
  int64_t num_candidates = 0;
  const int64_t* bins = nullptr;  // [items + 1]
};

struct PlanRequest {
  const int64_t* users = nullptr;  // rows of the training table, each of two items or more
  int64_t batch = 0;
  int64_t negatives = 0;  // per token
  NegativeSampling sampling = NegativeSampling::kUniform;
  uint64_t key = 0;  // of the step's random numbers
};

// Sizes first: tokens and the longest sequence. Checks the users.
Status plan_sizes(const PlanSource& source, const PlanRequest& request, int64_t* tokens,
                  int64_t* width);

// T tokens, k negatives, S = T (2 + k) slots, at most min(S, items) unique items.
struct PlanOutput {
  int64_t* offsets = nullptr;    // [batch + 1]
  int64_t* inputs = nullptr;     // [T]
  int64_t* positions = nullptr;  // [T]
  int64_t* grid = nullptr;       // [T]
  int64_t* targets = nullptr;    // [T]
  int64_t* negatives = nullptr;  // [T, k]
  int64_t* unique = nullptr;     // [min(S, items)], ascending
  int64_t* rows = nullptr;       // [S]: place in unique of every input, target, negative
  int64_t* starts = nullptr;     // [3, min(S, items) + 1], dense rows of unique items + 1 used
  int64_t* slots = nullptr;      // [S]: slots of each role, by item, ascending
  int64_t* bins = nullptr;       // [min(S, items)]
  int64_t* counts = nullptr;     // [min(S, items)]: slots of all roles
  int64_t* mark = nullptr;       // [items + 1], workspace
  int64_t num_unique = 0;        // written
};

Status batch_plan(const PlanSource& source, const PlanRequest& request, int64_t width,
                  PlanOutput* out);

}  // namespace padkern
