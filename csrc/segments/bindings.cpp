// Bindings of the segment sums: raw pointers, sizes and strides in, error text out.
#include "bindings.h"

#include "segments/segments.h"

namespace padkern {
namespace {

// sizes: rows, dim, slots, segments. values: address and stride.
std::string segment_sum(int dtype, std::tuple<int64_t, int64_t, int64_t, int64_t> sizes,
                        std::tuple<uintptr_t, int64_t> values, uintptr_t slots, uintptr_t starts,
                        uintptr_t out) {
  SegmentSumParams p;
  p.dtype = static_cast<SegmentDtype>(dtype);
  std::tie(p.rows, p.dim, p.num_slots, p.segments) = sizes;
  p.values = pointer<const void*>(std::get<0>(values));
  p.value_stride = std::get<1>(values);
  p.slots = pointer<const int64_t*>(slots);
  p.starts = pointer<const int64_t*>(starts);
  p.out = pointer<void*>(out);
  py::gil_scoped_release release;
  return text(segment_sum_cpu(p));
}

}  // namespace

void bind_segments(py::module_& m) { m.def("segment_sum_cpu", &segment_sum); }

}  // namespace padkern
