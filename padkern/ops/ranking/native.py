"""Launchers over ``padkern._C``: checks, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from padkern.ops.launch import (
    address,
    check_optional,
    check_tensor,
    core,
    dense,
    dense_rows,
    float_code,
    raise_error,
)


def panel_width(dtype: torch.dtype) -> int:
    """Items in one packed panel for the instruction set in use."""
    return core().rank_panel_width(float_code("item_matrix", dtype))


def _check_items(item_matrix: Tensor, dtype: torch.dtype, order: Tensor | None) -> None:
    check_tensor("item_matrix", item_matrix, dtype, ("N + 1", "D"))
    items = item_matrix.shape[0] - 1
    if items < 1:
        raise ValueError(f"item_matrix must hold at least one item, got {list(item_matrix.shape)}")
    check_optional("order", order, torch.int64, (items,))


def rank_pack_items_native(item_matrix: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Panels ``[ceil(N / width), D, width]`` of the items, and their largest absolute value.

    Raises:
        TypeError, ValueError: the matrix has another form, or order is no permutation of 1..N.
    """
    dtype = item_matrix.dtype
    width = panel_width(dtype)
    _check_items(item_matrix, dtype, order)
    matrix = dense_rows(item_matrix)
    items, dim = matrix.shape[0] - 1, matrix.shape[1]
    panels = torch.empty(-(-items // width), dim, width, dtype=dtype)
    largest = torch.empty((), dtype=dtype)
    order = dense(order)
    error = core().rank_pack_items_cpu(
        float_code("item_matrix", dtype),
        items,
        dim,
        (matrix.data_ptr(), matrix.stride(0)),
        address(order),
        (panels.data_ptr(), largest.data_ptr()),
    )
    raise_error(error)
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
    """Ranks, tied, masked, nan_target, nan_others, best ids and their scores.

    Raises:
        TypeError, ValueError: an argument does not fit the others, or is out of range.
    """
    dtype, ids = user_states.dtype, torch.int64
    code = float_code("user_states", dtype)
    check_tensor("user_states", user_states, dtype, ("B", "D"))
    users, dim = user_states.shape
    _check_items(item_matrix, dtype, order)
    items, width = item_matrix.shape[0] - 1, panel_width(dtype)
    if item_matrix.shape[1] != dim or panels.shape != (-(-items // width), dim, width):
        raise ValueError(
            f"panels must be those of item_matrix {list(item_matrix.shape)} and fit user_states "
            f"{list(user_states.shape)}, got {list(panels.shape)}"
        )
    check_tensor("panels", panels, dtype, panels.shape)
    check_tensor("largest", largest, dtype, ())
    check_optional("targets", targets, ids, (users,))
    check_tensor("seen_values", seen_values, ids, ("nnz",))
    check_tensor("seen_offsets", seen_offsets, ids, (users + 1,))
    for name, value in (("top_k", top_k), ("at_most", at_most)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    states, matrix = dense_rows(user_states), dense_rows(item_matrix)
    panels, largest = panels.contiguous(), largest.contiguous()
    order, targets = dense(order), dense(targets)
    seen_values, seen_offsets = seen_values.contiguous(), seen_offsets.contiguous()
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
    error = core().rank_topk_cpu(
        code,
        (users, items, dim),
        (states.data_ptr(), states.stride(0)),
        (matrix.data_ptr(), matrix.stride(0)),
        (panels.data_ptr(), largest.data_ptr(), address(order)),
        (
            address(targets),
            seen_values.data_ptr(),
            seen_offsets.data_ptr(),
            seen_values.numel(),
        ),
        (mask_repeats, top_k, at_most),
        tuple(out.data_ptr() for out in outputs),
    )
    raise_error(error)
    return outputs
