"""Launcher over ``padkern._C``: checks, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from padkern.ops.launch import check_tensor, core, dense_rows, float_code, raise_error


def segment_sum_native(values: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
    """``[U, d]``. CPU tensors, ``values`` float32 or float64.

    Raises:
        TypeError, ValueError: an argument does not fit the others, or is out of range.
    """
    code = float_code("values", values.dtype)
    check_tensor("values", values, values.dtype, ("T", "d"))
    check_tensor("slots", slots, torch.int64, ("S",))
    check_tensor("starts", starts, torch.int64, ("U + 1",))
    if starts.shape[0] == 0:
        raise ValueError(f"starts must have shape [U + 1], got {list(starts.shape)}")
    values, slots, starts = dense_rows(values), slots.contiguous(), starts.contiguous()
    segments, dim = starts.shape[0] - 1, values.shape[1]
    out = torch.empty(segments, dim, dtype=values.dtype)
    error = core().segment_sum_cpu(
        code,
        (values.shape[0], dim, slots.numel(), segments),
        (values.data_ptr(), values.stride(0)),
        slots.data_ptr(),
        starts.data_ptr(),
        out.data_ptr(),
    )
    raise_error(error)
    return out
