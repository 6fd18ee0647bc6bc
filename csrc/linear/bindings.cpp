// Bindings of the linear maps.
#include "bindings.h"

#include "linear/linear.h"

namespace padkern {
namespace {

// A matrix with dense rows is (data, row stride); 0 stands for none.
using RowsTuple = std::tuple<uintptr_t, int64_t>;

// sizes: dtype, rows, in, out.
LinearParams linear_params(const std::tuple<int, int64_t, int64_t, int64_t>& sizes, bool relu,
                           const RowsTuple& x, const RowsTuple& weight) {
  LinearParams params;
  params.dtype = static_cast<LinearDtype>(std::get<0>(sizes));
  params.rows = std::get<1>(sizes);
  params.in = std::get<2>(sizes);
  params.out = std::get<3>(sizes);
  params.relu = relu;
  params.x = pointer<const void*>(std::get<0>(x));
  params.x_stride = std::get<1>(x);
  params.weight = pointer<const void*>(std::get<0>(weight));
  params.weight_stride = std::get<1>(weight);
  return params;
}

std::string call_linear(const std::tuple<int, int64_t, int64_t, int64_t>& sizes, bool relu,
                        const RowsTuple& x, const RowsTuple& weight, uintptr_t bias, uintptr_t y) {
  LinearParams params = linear_params(sizes, relu, x, weight);
  params.bias = pointer<const void*>(bias);
  params.y = pointer<void*>(y);
  py::gil_scoped_release release;
  return text(linear_cpu(params));
}

// outputs: d_x, d_weight, d_bias.
std::string call_linear_backward(const std::tuple<int, int64_t, int64_t, int64_t>& sizes, bool relu,
                                 const RowsTuple& x, const RowsTuple& weight, uintptr_t y,
                                 const RowsTuple& d_y,
                                 const std::tuple<uintptr_t, uintptr_t, uintptr_t>& outputs) {
  LinearParams params = linear_params(sizes, relu, x, weight);
  params.y = pointer<void*>(y);
  params.d_y = pointer<const void*>(std::get<0>(d_y));
  params.d_y_stride = std::get<1>(d_y);
  params.d_x = pointer<void*>(std::get<0>(outputs));
  params.d_weight = pointer<void*>(std::get<1>(outputs));
  params.d_bias = pointer<void*>(std::get<2>(outputs));
  py::gil_scoped_release release;
  return text(linear_backward_cpu(params));
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_cpu", &call_linear);
  m.def("linear_backward_cpu", &call_linear_backward);
}

}  // namespace padkern
