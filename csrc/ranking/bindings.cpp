// Bindings of exact ranking.
#include "bindings.h"

#include "ranking/ranking.h"

namespace padkern {
namespace {

int64_t call_rank_panel_width(int dtype) { return rank_panel_width(float_dtype<RankDtype>(dtype)); }

// matrix is (data, row stride), outputs (panels, largest).
std::string call_rank_pack_items(int dtype, int64_t items, int64_t dim,
                                 const std::tuple<uintptr_t, int64_t>& matrix, uintptr_t order,
                                 const std::tuple<uintptr_t, uintptr_t>& outputs) {
  RankPackParams params;
  params.dtype = float_dtype<RankDtype>(dtype);
  params.items = items;
  params.dim = dim;
  params.matrix = pointer<const void*>(std::get<0>(matrix));
  params.matrix_stride = std::get<1>(matrix);
  params.order = pointer<const int64_t*>(order);
  params.panels = pointer<void*>(std::get<0>(outputs));
  params.largest = pointer<void*>(std::get<1>(outputs));
  py::gil_scoped_release release;
  return text(rank_pack_items_cpu(params));
}

// sizes: users, items, dim. states and matrix are (data, row stride), packed (panels, largest,
// order), ids (targets, seen values, seen offsets, count of seen values), options (mask_repeats,
// top_k, at_most), outputs (ranks, tied, masked, nan_target, nan_others, top, top_scores).
std::string call_rank_topk(int dtype, const std::tuple<int64_t, int64_t, int64_t>& sizes,
                           const std::tuple<uintptr_t, int64_t>& states,
                           const std::tuple<uintptr_t, int64_t>& matrix,
                           const std::tuple<uintptr_t, uintptr_t, uintptr_t>& packed,
                           const std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t>& ids,
                           const std::tuple<bool, int64_t, int64_t>& options,
                           const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
                                            uintptr_t, uintptr_t>& outputs) {
  RankParams params;
  params.dtype = float_dtype<RankDtype>(dtype);
  std::tie(params.users, params.items, params.dim) = sizes;
  params.states = pointer<const void*>(std::get<0>(states));
  params.state_stride = std::get<1>(states);
  params.matrix = pointer<const void*>(std::get<0>(matrix));
  params.matrix_stride = std::get<1>(matrix);
  params.panels = pointer<const void*>(std::get<0>(packed));
  params.largest = pointer<const void*>(std::get<1>(packed));
  params.order = pointer<const int64_t*>(std::get<2>(packed));
  params.targets = pointer<const int64_t*>(std::get<0>(ids));
  params.seen_values = pointer<const int64_t*>(std::get<1>(ids));
  params.seen_offsets = pointer<const int64_t*>(std::get<2>(ids));
  params.seen_count = std::get<3>(ids);
  std::tie(params.mask_repeats, params.top_k, params.at_most) = options;
  params.ranks = pointer<double*>(std::get<0>(outputs));
  params.tied = pointer<uint8_t*>(std::get<1>(outputs));
  params.masked = pointer<uint8_t*>(std::get<2>(outputs));
  params.nan_target = pointer<uint8_t*>(std::get<3>(outputs));
  params.nan_others = pointer<int64_t*>(std::get<4>(outputs));
  params.top = pointer<int64_t*>(std::get<5>(outputs));
  params.top_scores = pointer<void*>(std::get<6>(outputs));
  py::gil_scoped_release release;
  return text(rank_topk_cpu(params));
}

}  // namespace

void bind_ranking(py::module_& m) {
  m.def("rank_panel_width", &call_rank_panel_width);
  m.def("rank_pack_items_cpu", &call_rank_pack_items);
  m.def("rank_topk_cpu", &call_rank_topk);
}

}  // namespace padkern
