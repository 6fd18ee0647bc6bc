"""Launchers over ``padkern._C``: dense rows, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from padkern import _native
from padkern.ops.ranking.common import check_arguments

_DTYPES = {torch.float32: 0, torch.float64: 1}


def _core() -> ModuleType:
    core, reason, _ = _native.load()
    if core is None:
        raise RuntimeError(reason)
    return core


def _dense_rows(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def panel_width(dtype: torch.dtype) -> int:
    """Items in one packed panel for the instruction set in use."""
    return _core().rank_panel_width(_DTYPES[dtype])


def rank_pack_items_native(item_matrix: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Panels ``[ceil(N / width), D, width]`` of the items, and their largest absolute value."""
    matrix, dtype = _dense_rows(item_matrix), item_matrix.dtype
    items, dim = matrix.shape[0] - 1, matrix.shape[1]
    width = panel_width(dtype)
    panels = torch.empty(-(-items // width), dim, width, dtype=dtype)
    largest = torch.empty((), dtype=dtype)
    order = None if order is None else order.contiguous()
    error = _core().rank_pack_items_cpu(
        _DTYPES[dtype],
        items,
        dim,
        (matrix.data_ptr(), matrix.stride(0)),
        0 if order is None else order.data_ptr(),
        (panels.data_ptr(), largest.data_ptr()),
    )
    if error:
        raise ValueError(error)
    return panels, largest


def rank_topk_native(
    user_states: Tensor,
    item_matrix: Tensor,
    panels: Tensor,
    largest: Tensor,
    order: Tensor | None,
    targets: Tensor | None,
    seen_values: Tensor,
    seen_offsets: Tensor,
    mask_repeats: bool,
    top_k: int,
    at_most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ranks, tied, masked, nan_target, nan_others, best ids and their scores."""
    states, matrix = _dense_rows(user_states), _dense_rows(item_matrix)
    dtype, users = states.dtype, states.shape[0]
    items, dim = matrix.shape[0] - 1, matrix.shape[1]
    panels, largest = panels.contiguous(), largest.contiguous()
    order = None if order is None else order.contiguous()
    targets = None if targets is None else targets.contiguous()
    seen_values, seen_offsets = seen_values.contiguous(), seen_offsets.contiguous()
    check_arguments(
        panel_width(dtype), states, matrix, panels, largest, order, targets, seen_offsets
    )
    counted = 0 if targets is None else users
    ranks = torch.empty(counted, dtype=torch.float64)
    tied, masked, nan_target = (torch.empty(counted, dtype=torch.bool) for _ in range(3))
    nan_others = torch.empty(counted, dtype=torch.int64)
    top = torch.empty(users, top_k, dtype=torch.int64)
    scores = torch.empty(users, top_k, dtype=dtype)
    outputs = (ranks, tied, masked, nan_target, nan_others, top, scores)
    # An empty tensor may have no address; without users nothing is to be written.
    if users == 0:
        return outputs
    error = _core().rank_topk_cpu(
        _DTYPES[dtype],
        (users, items, dim),
        (states.data_ptr(), states.stride(0)),
        (matrix.data_ptr(), matrix.stride(0)),
        (panels.data_ptr(), largest.data_ptr(), 0 if order is None else order.data_ptr()),
        (
            0 if targets is None else targets.data_ptr(),
            seen_values.data_ptr(),
            seen_offsets.data_ptr(),
            seen_values.numel(),
        ),
        (mask_repeats, top_k, at_most),
        tuple(out.data_ptr() for out in outputs),
    )
    if error:
        raise ValueError(error)
    return outputs
