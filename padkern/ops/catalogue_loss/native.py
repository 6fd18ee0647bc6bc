"""Launcher over ``padkern._C``: checks, allocation, then raw pointers, sizes and strides."""

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


def _check(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    candidates: Tensor | None,
    excluded_values: Tensor | None,
    excluded_offsets: Tensor | None,
) -> None:
    dtype, ids = users.dtype, torch.int64
    check_tensor("users", users, dtype, ("T", "D"))
    tokens, dim = users.shape
    check_tensor("items", items, dtype, ("N", dim))
    check_tensor("targets", targets, ids, (tokens,))
    check_optional("bias", bias, dtype, (items.shape[0],))
    check_optional("candidates", candidates, ids, ("C",))
    check_optional("excluded_values", excluded_values, ids, ("E",))
    check_optional("excluded_offsets", excluded_offsets, ids, (tokens + 1,))
    for name, x in (("users", users), ("items", items), ("candidates", candidates)):
        if x is not None and x.shape[0] == 0:
            raise ValueError(f"{name} must have at least one row, got {list(x.shape)}")
    if (excluded_values is None) != (excluded_offsets is None):
        raise ValueError("excluded_values and excluded_offsets must be given together")


def catalogue_loss_native(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    candidates: Tensor | None,
    excluded_values: Tensor | None,
    excluded_offsets: Tensor | None,
    with_users: bool = False,
    with_items: bool = False,
    *,
    plan: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss and, where wanted, its derivatives by users, items and bias.

    Args:
        users, items, targets, bias, candidates, excluded_values, excluded_offsets: as in
            :func:`padkern.ops.catalogue_loss.catalogue_cross_entropy`; CPU tensors, the floating
            ones of one dtype.
        with_users, with_items: which derivatives to compute; that by the bias comes with the items.
        plan: 0 chosen by the shape; 1 keeps the probabilities of a group of tokens; 2 computes them
            twice.

    Raises:
        TypeError, ValueError: an argument does not fit the others, or an id is out of range.
    """
    dtype = users.dtype
    code = float_code("users", dtype)
    _check(users, items, targets, bias, candidates, excluded_values, excluded_offsets)
    users, items = dense_rows(users), dense_rows(items)
    targets = targets.contiguous()
    bias, candidates = dense(bias), dense(candidates)
    excluded_values, excluded_offsets = dense(excluded_values), dense(excluded_offsets)
    value = torch.empty((), dtype=dtype)
    d_users = d_items = d_bias = None
    if with_users:
        d_users = torch.empty(users.shape, dtype=dtype)
    if with_items:
        d_items = torch.empty(items.shape, dtype=dtype)
        d_bias = None if bias is None else torch.empty(bias.shape, dtype=dtype)
    error = core().catalogue_loss_cpu(
        code,
        (users.shape[0], items.shape[0], users.shape[1]),
        (users.data_ptr(), users.stride(0)),
        (items.data_ptr(), items.stride(0)),
        (
            targets.data_ptr(),
            address(bias),
            address(candidates),
            0 if candidates is None else len(candidates),
        ),
        (
            address(excluded_values),
            address(excluded_offsets),
            0 if excluded_values is None else len(excluded_values),
        ),
        (with_users, with_items),
        (value.data_ptr(), address(d_users), address(d_items), address(d_bias)),
        plan,
    )
    raise_error(error)
    return value, d_users, d_items, d_bias
