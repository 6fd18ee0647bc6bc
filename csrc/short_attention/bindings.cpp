// Bindings of the encoder's kernels: attention, and what stands between the matrix products.
#include "bindings.h"

#include "dropout_add_norm/dropout_add_norm.h"
#include "short_attention/short_attention.h"

namespace padkern {
namespace {

using StridedTuple = std::tuple<uintptr_t, int64_t, int64_t>;

// dropout: probability, seed, step.
using DropoutTuple = std::tuple<double, uint64_t, uint32_t>;

DropoutParams dropout_params(const DropoutTuple& in) {
  DropoutParams out;
  std::tie(out.probability, out.seed, out.step) = in;
  return out;
}

HeadedRows headed_rows(const StridedTuple& in) {
  return {pointer<const void*>(std::get<0>(in)), std::get<1>(in), std::get<2>(in)};
}

// sizes: dtype, tokens, heads, dim, sequences. rows: q, k, v and, for the backward pass, d_out,
// each (data, token stride, head stride). out: [tokens, heads, dim], or the gradients [tokens, 3,
// heads, dim].
std::string call_short_attention(bool backward,
                                 const std::tuple<int, int64_t, int64_t, int64_t, int64_t>& sizes,
                                 const std::vector<StridedTuple>& rows, uintptr_t offsets,
                                 double scale, const DropoutTuple& dropout, uintptr_t out) {
  if (rows.size() != (backward ? 4u : 3u)) return "short_attention: wrong number of inputs";
  ShortAttentionParams params;
  params.dtype = float_dtype<ShortAttentionDtype>(std::get<0>(sizes));
  params.tokens = std::get<1>(sizes);
  params.heads = std::get<2>(sizes);
  params.dim = std::get<3>(sizes);
  params.sequences = std::get<4>(sizes);
  params.offsets = pointer<const int64_t*>(offsets);
  params.scale = scale;
  params.dropout = dropout_params(dropout);
  params.q = headed_rows(rows[0]);
  params.k = headed_rows(rows[1]);
  params.v = headed_rows(rows[2]);
  py::gil_scoped_release release;
  if (!backward) {
    params.out = pointer<void*>(out);
    return text(short_attention_cpu(params));
  }
  params.d_out = headed_rows(rows[3]);
  params.gradients = pointer<void*>(out);
  return text(short_attention_backward_cpu(params));
}

// A matrix with dense rows is (data, row stride). options: dtype, rows, dim. shared:
// token_ids, weight. inputs: x, residual. vectors: bias, shift. outputs: sum, out, stats. 0 stands
// for none.
using RowsTuple = std::tuple<uintptr_t, int64_t>;
using NormOptionsTuple = std::tuple<int, int64_t, int64_t>;

DropoutAddNormParams norm_params(const NormOptionsTuple& options, const DropoutTuple& dropout,
                                 const std::tuple<uintptr_t, uintptr_t>& shared) {
  DropoutAddNormParams params;
  params.dtype = float_dtype<DropoutAddNormDtype>(std::get<0>(options));
  params.rows = std::get<1>(options);
  params.dim = std::get<2>(options);
  params.dropout = dropout_params(dropout);
  params.token_ids = pointer<const int64_t*>(std::get<0>(shared));
  params.weight = pointer<const void*>(std::get<1>(shared));
  return params;
}

std::string call_dropout_add_norm(const NormOptionsTuple& options, double eps,
                                  const DropoutTuple& dropout,
                                  const std::tuple<uintptr_t, uintptr_t>& shared,
                                  const std::tuple<RowsTuple, RowsTuple>& inputs,
                                  const std::tuple<uintptr_t, uintptr_t>& vectors,
                                  const std::tuple<uintptr_t, uintptr_t, uintptr_t>& outputs) {
  DropoutAddNormParams params = norm_params(options, dropout, shared);
  params.eps = eps;
  const auto& [x, residual] = inputs;
  params.x = pointer<const void*>(std::get<0>(x));
  params.x_stride = std::get<1>(x);
  params.residual = pointer<const void*>(std::get<0>(residual));
  params.residual_stride = std::get<1>(residual);
  params.bias = pointer<const void*>(std::get<0>(vectors));
  params.shift = pointer<const void*>(std::get<1>(vectors));
  params.sum = pointer<void*>(std::get<0>(outputs));
  params.out = pointer<void*>(std::get<1>(outputs));
  params.stats = pointer<void*>(std::get<2>(outputs));
  py::gil_scoped_release release;
  return text(dropout_add_norm_cpu(params));
}

// inputs: d_out, d_sum. saved: sum, stats. outputs: d_x, d_residual, d_bias, d_weight, d_shift.
std::string call_dropout_add_norm_backward(
    const NormOptionsTuple& options, const DropoutTuple& dropout,
    const std::tuple<uintptr_t, uintptr_t>& shared, const std::tuple<RowsTuple, RowsTuple>& inputs,
    const std::tuple<uintptr_t, uintptr_t>& saved,
    const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>& outputs) {
  DropoutAddNormParams params = norm_params(options, dropout, shared);
  const auto& [d_out, d_sum] = inputs;
  params.d_out = pointer<const void*>(std::get<0>(d_out));
  params.d_out_stride = std::get<1>(d_out);
  params.d_sum = pointer<const void*>(std::get<0>(d_sum));
  params.d_sum_stride = std::get<1>(d_sum);
  params.sum = pointer<void*>(std::get<0>(saved));
  params.stats = pointer<void*>(std::get<1>(saved));
  params.d_x = pointer<void*>(std::get<0>(outputs));
  params.d_residual = pointer<void*>(std::get<1>(outputs));
  params.d_bias = pointer<void*>(std::get<2>(outputs));
  params.d_weight = pointer<void*>(std::get<3>(outputs));
  params.d_shift = pointer<void*>(std::get<4>(outputs));
  py::gil_scoped_release release;
  return text(dropout_add_norm_backward_cpu(params));
}

}  // namespace

void bind_encoder(py::module_& m) {
  m.def("dropout_add_norm_cpu", &call_dropout_add_norm);
  m.def("dropout_add_norm_backward_cpu", &call_dropout_add_norm_backward);
  m.def("short_attention_cpu", &call_short_attention);
}

}  // namespace padkern
