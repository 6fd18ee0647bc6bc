#include <new>
#include <vector>

#include "common/checks.h"
#include "common/isa.h"
#include "common/pages.h"
#include "common/tickets.h"
#include "ranking/ranking.h"
#include "ranking/ranking_run.h"

namespace padkern {
namespace {

// Positions are 32-bit numbers, with room for the items that fill up the last panel.
constexpr int64_t kMaxItems = (int64_t{1} << 31) - 256;
constexpr int64_t kPanelsPerTicket = 16;

const RankKernels<float>& kernels_of(Isa isa, float) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::rank_kernels_f32();
  if (isa == Isa::kAvx2) return avx2::rank_kernels_f32();
#endif
  (void)isa;
  return baseline::rank_kernels_f32();
}

const RankKernels<double>& kernels_of(Isa isa, double) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512::rank_kernels_f64();
  if (isa == Isa::kAvx2) return avx2::rank_kernels_f64();
#endif
  (void)isa;
  return baseline::rank_kernels_f64();
}

Status check_sizes(int64_t items, int64_t dim) {
  if (items < 1 || items > kMaxItems || dim < 0) {
    return error_status("item_matrix must hold 1..%lld items, got %lld", shown(kMaxItems),
                        shown(items));
  }
  return {};
}

Status check(const RankParams& p) {
  Status status = check_sizes(p.items, p.dim);
  if (!status.ok) return status;
  if (p.users < 0 || p.seen_count < 0 || p.top_k < 0 || p.at_most < 0) {
    return error_status("rank_topk: a size is out of range");
  }
  const bool counts = p.targets != nullptr;
  if (p.largest == nullptr || p.seen_offsets == nullptr ||
      (p.dim > 0 && (p.panels == nullptr || p.matrix == nullptr)) ||
      (p.users > 0 && p.dim > 0 && p.states == nullptr) ||
      (p.seen_count > 0 && p.seen_values == nullptr) ||
      (counts && (p.ranks == nullptr || p.tied == nullptr || p.masked == nullptr ||
                  p.nan_target == nullptr || p.nan_others == nullptr)) ||
      (p.top_k > 0 && p.users > 0 && (p.top == nullptr || p.top_scores == nullptr))) {
    return error_status("rank_topk: a pointer is null");
  }
  const int64_t place = bad_offset(p.seen_offsets, p.users, p.seen_count);
  if (place >= 0) {
    return error_status(
        "seen_offsets must rise from 0 to len(seen_values) = %lld, got %lld at position %lld",
        shown(p.seen_count), shown(p.seen_offsets[place]), shown(place));
  }
  if (counts) status = check_ids("targets", p.targets, p.users, 1, p.items);
  if (status.ok) status = check_ids("seen_values", p.seen_values, p.seen_count, 0, p.items);
  for (int64_t i = 0; status.ok && p.order != nullptr && i < p.items; ++i) {
    if (p.order[i] < 1 || p.order[i] > p.items) {
      status = error_status("order must be a permutation of 1..%lld, got %lld at place %lld",
                            shown(p.items), shown(p.order[i]), shown(i));
    }
  }
  return status;
}

template <class T>
void pack(const RankPackParams& p, const RankKernels<T>& kernels) {
  const int64_t panels = (p.items + kernels.width - 1) / kernels.width;
  const int64_t size = kernels.width * p.dim;
  T* out = static_cast<T*>(p.panels);
  advise_large_pages(out, panels * size * static_cast<int64_t>(sizeof(T)));
  const int64_t tickets = (panels + kPanelsPerTicket - 1) / kPanelsPerTicket;
  std::vector<T> largest(tickets);
  const double work = static_cast<double>(panels) * static_cast<double>(size);
  run_tickets(tickets, useful_workers(work, tickets), [&](int64_t, int64_t ticket) {
    const int64_t first = ticket * kPanelsPerTicket;
    const int64_t last = std::min(first + kPanelsPerTicket, panels);
    kernels.pack_items(static_cast<const T*>(p.matrix), p.matrix_stride, p.order, p.items, p.dim,
                       first, last, out);
    largest[ticket] = kernels.largest(out + first * size, (last - first) * size);
  });
  T most = T(0);
  // Once most is NaN it stays.
  for (const T value : largest) most = value <= most ? most : most != most ? most : value;
  *static_cast<T*>(p.largest) = most;
}

Status choose(Isa* isa) {
  const char* error;
  return chosen_isa(isa, &error) ? Status{} : error_status("%s", error);
}

}  // namespace

int64_t rank_panel_width(RankDtype dtype) {
  Isa isa;
  if (!choose(&isa).ok) return 0;
  return dtype == RankDtype::kFloat64 ? kernels_of(isa, double()).width
                                      : kernels_of(isa, float()).width;
}

Status rank_pack_items_cpu(const RankPackParams& params) {
  Status status = check_sizes(params.items, params.dim);
  if (!status.ok) return status;
  if (params.largest == nullptr ||
      (params.dim > 0 && (params.matrix == nullptr || params.panels == nullptr))) {
    return error_status("rank_pack_items: a pointer is null");
  }
  Isa isa;
  status = choose(&isa);
  if (!status.ok) return status;
  try {
    if (params.order != nullptr) {
      std::vector<bool> met(params.items + 1, false);
      for (int64_t i = 0; i < params.items; ++i) {
        const int64_t id = params.order[i];
        if (id < 1 || id > params.items || met[id]) {
          return error_status("order must be a permutation of 1..%lld, got %lld at place %lld",
                              shown(params.items), shown(id), shown(i));
        }
        met[id] = true;
      }
    }
    if (params.dtype == RankDtype::kFloat64) {
      pack<double>(params, kernels_of(isa, double()));
    } else {
      pack<float>(params, kernels_of(isa, float()));
    }
  } catch (const std::bad_alloc&) {
    return error_status("rank_pack_items: out of memory for %lld items", shown(params.items));
  }
  return {};
}

Status rank_topk_cpu(const RankParams& params) {
  Status status = check(params);
  if (!status.ok) return status;
  Isa isa;
  status = choose(&isa);
  if (!status.ok) return status;
  try {
    if (params.dtype == RankDtype::kFloat64) {
      RankRun<double>(params, kernels_of(isa, double())).run();
    } else {
      RankRun<float>(params, kernels_of(isa, float())).run();
    }
  } catch (const std::bad_alloc&) {
    return error_status("rank_topk: out of memory for %lld users", shown(params.users));
  }
  return {};
}

}  // namespace padkern
