// The part of padkern._C that encoders use.
#pragma once

#include <pybind11/pybind11.h>

namespace padkern {

void bind_encoder(pybind11::module_& m);

}  // namespace padkern
