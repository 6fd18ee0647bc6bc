#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "common/checks.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "triple_expert/gated_bce.h"
#include "triple_expert/gated_bce_kernel.h"

namespace padkern {
namespace {

// Work is cut by the shape alone, so the thread count changes no bit.
constexpr int64_t kMinBlockTokens = 32;
constexpr int64_t kMaxBlocks = 64;

const GatedBceKernels<float>& kernels_of(Isa isa, float) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::gated_bce_kernels_f32();
  if (isa == Isa::kAvx2) return avx2::gated_bce_kernels_f32();
#endif
  (void)isa;
  return baseline::gated_bce_kernels_f32();
}

const GatedBceKernels<double>& kernels_of(Isa isa, double) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::gated_bce_kernels_f64();
  if (isa == Isa::kAvx2) return avx2::gated_bce_kernels_f64();
#endif
  (void)isa;
  return baseline::gated_bce_kernels_f64();
}

Status check(const GatedBceParams& p) {
  if (p.tokens < 0 || p.dim < 0 || p.rows < 1 || p.bins < 1 || p.negatives < 1) {
    return error_status("gated_bce: a size is out of range");
  }
  if (p.experts < 1 || p.experts > kGatedBceMaxExperts) {
    return error_status("users must hold 1 to %lld experts, got %lld", shown(kGatedBceMaxExperts),
                        shown(p.experts));
  }
  if (!(p.positive_weight > 0.0 && std::isfinite(p.positive_weight))) {
    return error_status("positive_weight must be positive and finite, got %g", p.positive_weight);
  }
  const bool has_values = p.tokens > 0 && p.dim > 0;
  if (p.value == nullptr || p.gate == nullptr || p.item_bins == nullptr ||
      (p.tokens > 0 && (p.positive_ids == nullptr || p.negative_ids == nullptr)) ||
      (has_values && p.users == nullptr) || (p.dim > 0 && p.tables == nullptr) ||
      (p.want_gradient && (p.d_gate == nullptr || (has_values && p.d_users == nullptr) ||
                           (p.dim > 0 && p.d_tables == nullptr)))) {
    return error_status("gated_bce: a pointer is null");
  }
  Status status = check_ids("item_bins", p.item_bins, p.rows, 0, p.bins - 1);
  if (status.ok) status = check_ids("positives", p.positive_ids, p.tokens, 0, p.rows - 1);
  if (!status.ok) return status;
  return check_ids("negatives", p.negative_ids, p.tokens * p.negatives, 0, p.rows - 1);
}

// Slots of every item in slot order, by counting sort: the order in which gradients are added.
struct ItemIndex {
  std::vector<int64_t> offsets, slots, tokens;

  explicit ItemIndex(const GatedBceParams& p) : offsets(p.rows + 2, 0) {
    const int64_t per_token = p.negatives + 1;
    const auto each = [&](auto&& visit) {
      for (int64_t t = 0; t < p.tokens; ++t) {
        if (p.valid != nullptr && p.valid[t] == 0) continue;
        visit(p.positive_ids[t], t, t * per_token);
        for (int64_t j = 0; j < p.negatives; ++j) {
          visit(p.negative_ids[t * p.negatives + j], t, t * per_token + 1 + j);
        }
      }
    };
    // Counted two places up: after the running sum offsets[id + 1] is where item id starts, and
    // filling moves it to where the item ends, so that offsets[id] is the start in the end.
    each([&](int64_t id, int64_t, int64_t) { ++offsets[id + 2]; });
    for (int64_t i = 2; i < p.rows + 2; ++i) offsets[i] += offsets[i - 1];
    slots.resize(offsets.back());
    tokens.resize(offsets.back());
    each([&](int64_t id, int64_t token, int64_t slot) {
      const int64_t place = offsets[id + 1]++;
      slots[place] = slot;
      tokens[place] = token;
    });
  }
};

template <class T>
struct Job {
  GatedBceView<T> view;
  const GatedBceKernels<T>* kernels;
  int64_t tokens, block_tokens, bins;
  GatedBceSums* sums;
  double* d_gate;
  const int64_t* item_cuts;
};

template <class T>
void run_tokens(int64_t begin, int64_t end, void* context) {
  const Job<T>& job = *static_cast<const Job<T>*>(context);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * job.block_tokens;
    job.kernels->tokens(job.view, first, std::min(first + job.block_tokens, job.tokens),
                        job.sums + b, job.d_gate + b * job.bins * job.view.experts);
  }
}

template <class T>
void run_items(int64_t begin, int64_t end, void* context) {
  const Job<T>& job = *static_cast<const Job<T>*>(context);
  for (int64_t b = begin; b < end; ++b) {
    job.kernels->items(job.view, job.item_cuts[b], job.item_cuts[b + 1]);
  }
}

template <class T>
void run(const GatedBceParams& p, Isa isa) {
  int64_t valid = p.tokens;
  if (p.valid != nullptr) {
    valid = std::count_if(p.valid, p.valid + p.tokens, [](uint8_t v) { return v != 0; });
  }
  const int64_t block_tokens = std::max(kMinBlockTokens, (p.tokens + kMaxBlocks - 1) / kMaxBlocks);
  const int64_t blocks = (p.tokens + block_tokens - 1) / block_tokens;
  const int64_t gate_size = p.bins * p.experts;
  std::vector<GatedBceSums> sums(blocks);
  std::vector<double> d_gate(p.want_gradient ? blocks * gate_size : 0, 0.0);
  std::vector<T> coefficients;
  if (p.want_gradient) coefficients.resize(p.tokens * (p.negatives + 1) * p.experts);

  Job<T> job;
  job.view = {
      p.experts,
      p.dim,
      p.rows,
      p.negatives,
      static_cast<const T*>(p.users),
      p.user_token_stride,
      p.user_expert_stride,
      static_cast<const T*>(p.tables),
      p.table_expert_stride,
      p.table_row_stride,
      static_cast<const T*>(p.gate),
      p.item_bins,
      p.positive_ids,
      p.negative_ids,
      p.valid,
      static_cast<T>(valid ? p.positive_weight / static_cast<double>(valid) : 0.0),
      static_cast<T>(valid ? 1.0 / (static_cast<double>(valid) * static_cast<double>(p.negatives))
                           : 0.0),
      p.want_gradient,
      static_cast<T*>(p.d_users),
      static_cast<T*>(p.d_tables),
      coefficients.data(),
      nullptr,
      nullptr,
      nullptr};
  job.kernels = &kernels_of(isa, T());
  job.tokens = p.tokens;
  job.block_tokens = block_tokens;
  job.bins = p.bins;
  job.sums = sums.data();
  job.d_gate = d_gate.data();
  parallel_for(0, blocks, 1, run_tokens<T>, &job);

  double positive = 0.0, negative = 0.0;
  for (const GatedBceSums& s : sums) {
    positive += s.positive;
    negative += s.negative;
  }
  double value = 0.0;
  if (valid) {
    const double count = static_cast<double>(valid);
    value = p.positive_weight * (positive / count) +
            negative / (count * static_cast<double>(p.negatives));
  }
  *static_cast<T*>(p.value) = static_cast<T>(value);
  if (!p.want_gradient) return;

  for (int64_t g = 0; g < gate_size; ++g) {
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; ++b) sum += d_gate[b * gate_size + g];
    static_cast<T*>(p.d_gate)[g] = static_cast<T>(sum);
  }

  const ItemIndex index(p);
  job.view.item_offsets = index.offsets.data();
  job.view.item_slots = index.slots.data();
  job.view.item_tokens = index.tokens.data();
  // Every item is summed by one thread in slot order, so these cuts only balance the load: a slot
  // costs a row read, an item a row written.
  std::vector<int64_t> cuts(kMaxBlocks + 1, 0);
  const int64_t total = index.offsets[p.rows] + p.rows;
  int64_t item = 0;
  for (int64_t b = 1; b <= kMaxBlocks; ++b) {
    const int64_t goal = total / kMaxBlocks * b;
    while (item < p.rows && index.offsets[item] + item < goal) ++item;
    cuts[b] = b == kMaxBlocks ? p.rows : item;
  }
  job.item_cuts = cuts.data();
  parallel_for(0, kMaxBlocks, 1, run_items<T>, &job);
}

}  // namespace

Status gated_bce_cpu(const GatedBceParams& params) {
  Status status = check(params);
  if (!status.ok) return status;
  Isa isa;
  const char* error;
  if (!chosen_isa(&isa, &error)) return error_status("%s", error);
  try {
    if (params.dtype == GatedBceDtype::kFloat64) {
      run<double>(params, isa);
    } else {
      run<float>(params, isa);
    }
  } catch (const std::bad_alloc&) {
    return error_status("gated_bce: out of memory for %lld tokens", shown(params.tokens));
  }
  return {};
}

}  // namespace padkern
