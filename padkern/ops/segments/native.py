"""Launcher over ``padkern._C``: dense rows, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from padkern import _native

_DTYPES = {torch.float32: 0, torch.float64: 1}


def segment_sum_native(values: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
    """``[U, d]``. CPU tensors, ``values`` float32 or float64."""
    core, reason, _ = _native.load()
    if core is None:
        raise RuntimeError(reason)
    values = values.detach()
    if values.stride(1) != 1 and values.shape[1] != 1:
        values = values.contiguous()
    slots, starts = slots.contiguous(), starts.contiguous()
    segments, dim = starts.numel() - 1, values.shape[1]
    out = torch.empty(segments, dim, dtype=values.dtype)
    error = core.segment_sum_cpu(
        _DTYPES[values.dtype],
        (values.shape[0], dim, slots.numel(), segments),
        (values.data_ptr(), values.stride(0)),
        slots.data_ptr(),
        starts.data_ptr(),
        out.data_ptr(),
    )
    if error:
        raise ValueError(error)
    return out
