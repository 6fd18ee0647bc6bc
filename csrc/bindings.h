// What the bindings of all ops share: addresses to pointers, a Status to the text that Python
// raises.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "common/status.h"

namespace padkern {

namespace py = pybind11;

template <class P>
P pointer(uintptr_t address) {
  return reinterpret_cast<P>(address);
}

// An op's enumeration of float32 (0) and float64 (1).
template <class Dtype>
Dtype float_dtype(int code) {
  if (code != 0 && code != 1) {
    throw py::value_error("dtype must be 0 (float32) or 1 (float64), got " + std::to_string(code));
  }
  return static_cast<Dtype>(code);
}

// An empty string means success; the Python launcher raises anything else.
inline std::string text(const Status& status) { return status.ok ? "" : status.message; }

// One function per bindings.cpp; each adds its m.def to the module.
void bind_batch_plan(py::module_& m);
void bind_catalogue_loss(py::module_& m);
void bind_encoder(py::module_& m);
void bind_linear(py::module_& m);
void bind_ranking(py::module_& m);
void bind_segments(py::module_& m);

}  // namespace padkern
