// Bindings of the catalogue loss and of the gated table under it.
#include "bindings.h"

#include "catalogue_loss/catalogue_loss.h"
#include "gated_table/gated_table.h"

namespace padkern {
namespace {

// value, d_users, d_items, d_bias
using OutputsTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

// sizes: tokens, items, dim. users and items are (data, row stride), options (targets, bias,
// candidates, their count), excluded (values, offsets, count), outputs (value, d_users, d_items,
// d_bias); 0 where there is none. plan: see CatalogueLossParams.
using RowsTuple = std::tuple<uintptr_t, int64_t>;
using CatalogueOptionsTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t>;
using ExcludedTuple = std::tuple<uintptr_t, uintptr_t, int64_t>;

std::string call_catalogue_loss(int dtype, const std::tuple<int64_t, int64_t, int64_t>& sizes,
                                const RowsTuple& users, const RowsTuple& items,
                                const CatalogueOptionsTuple& options, const ExcludedTuple& excluded,
                                const std::tuple<bool, bool>& wanted, const OutputsTuple& outputs,
                                int plan) {
  CatalogueLossParams params;
  params.dtype = float_dtype<CatalogueDtype>(dtype);
  std::tie(params.tokens, params.items, params.dim) = sizes;
  params.users = pointer<const void*>(std::get<0>(users));
  params.user_stride = std::get<1>(users);
  params.item_rows = pointer<const void*>(std::get<0>(items));
  params.item_stride = std::get<1>(items);
  params.targets = pointer<const int64_t*>(std::get<0>(options));
  params.bias = pointer<const void*>(std::get<1>(options));
  params.candidates = pointer<const int64_t*>(std::get<2>(options));
  params.candidate_count = std::get<3>(options);
  params.excluded_values = pointer<const int64_t*>(std::get<0>(excluded));
  params.excluded_offsets = pointer<const int64_t*>(std::get<1>(excluded));
  params.excluded_count = std::get<2>(excluded);
  std::tie(params.want_users, params.want_items) = wanted;
  params.value = pointer<void*>(std::get<0>(outputs));
  params.d_users = pointer<void*>(std::get<1>(outputs));
  params.d_items = pointer<void*>(std::get<2>(outputs));
  params.d_bias = pointer<void*>(std::get<3>(outputs));
  params.plan = plan;
  py::gil_scoped_release release;
  return text(catalogue_loss_cpu(params));
}

// tables: (addresses, row strides, widths). sizes: rows, bins. gradient: (d_out, its row stride,
// d_gate); d_tables and they are 0 and empty for the value, out is 0 for the gradients.
using TablesTuple = std::tuple<std::vector<uintptr_t>, std::vector<int64_t>, std::vector<int64_t>>;
using TableGradientTuple = std::tuple<uintptr_t, int64_t, uintptr_t>;

std::string call_gated_table(int dtype, const std::tuple<int64_t, int64_t>& sizes,
                             const TablesTuple& tables, uintptr_t gate, uintptr_t item_bins,
                             uintptr_t out, const TableGradientTuple& gradient,
                             const std::vector<uintptr_t>& d_tables) {
  const auto pointers = [](const std::vector<uintptr_t>& addresses) {
    std::vector<void*> result;
    for (const uintptr_t address : addresses) result.push_back(pointer<void*>(address));
    return result;
  };
  const std::vector<void*> inputs = pointers(std::get<0>(tables)), outputs = pointers(d_tables);
  if (inputs.size() != std::get<1>(tables).size() || inputs.size() != std::get<2>(tables).size() ||
      (!outputs.empty() && outputs.size() != inputs.size())) {
    return "gated_table: tables, strides, widths and gradients must be equally many";
  }
  GatedTableParams params;
  params.dtype = float_dtype<GatedTableDtype>(dtype);
  params.experts = static_cast<int64_t>(inputs.size());
  std::tie(params.rows, params.bins) = sizes;
  params.tables = inputs.data();
  params.strides = std::get<1>(tables).data();
  params.widths = std::get<2>(tables).data();
  params.gate = pointer<const void*>(gate);
  params.item_bins = pointer<const int64_t*>(item_bins);
  params.out = pointer<void*>(out);
  params.d_out = pointer<const void*>(std::get<0>(gradient));
  params.d_out_stride = std::get<1>(gradient);
  params.d_gate = pointer<void*>(std::get<2>(gradient));
  params.d_tables = outputs.empty() ? nullptr : outputs.data();
  py::gil_scoped_release release;
  return text(gated_table_cpu(params));
}

}  // namespace

void bind_catalogue_loss(py::module_& m) {
  m.def("catalogue_loss_cpu", &call_catalogue_loss);
  m.def("gated_table_cpu", &call_gated_table);
}

}  // namespace padkern
