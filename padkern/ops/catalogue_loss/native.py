"""Launcher over ``padkern._C``: dense rows, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from padkern import _native

_DTYPES = {torch.float32: 0, torch.float64: 1}


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def catalogue_loss_native(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    candidates: Tensor | None,
    excluded_values: Tensor | None,
    excluded_offsets: Tensor | None,
    *,
    gradient: bool,
    plan: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss and, where wanted, its derivatives by users, items and bias.

    Args:
        users, items, targets, bias, candidates, excluded_values, excluded_offsets: as in
            :func:`padkern.ops.catalogue_loss.catalogue_cross_entropy`; CPU tensors, the floating
            ones of one dtype.
        gradient: whether to compute the derivatives.
        plan: 0 chosen by the shape; 1 keeps the probabilities of a group of tokens; 2 computes them
            twice.
    """
    core, reason, _ = _native.load()
    if core is None:
        raise RuntimeError(reason)
    dtype = users.dtype
    users, items = _dense_rows(users.detach()), _dense_rows(items.detach())
    targets = targets.contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    candidates, excluded_values, excluded_offsets = (
        None if x is None else x.contiguous()
        for x in (candidates, excluded_values, excluded_offsets)
    )
    value = torch.empty((), dtype=dtype)
    d_users = d_items = d_bias = None
    if gradient:
        d_users, d_items = (torch.empty(x.shape, dtype=dtype) for x in (users, items))
        d_bias = None if bias is None else torch.empty(bias.shape, dtype=dtype)
    error = core.catalogue_loss_cpu(
        _DTYPES[dtype],
        (users.shape[0], items.shape[0], users.shape[1]),
        (users.data_ptr(), users.stride(0)),
        (items.data_ptr(), items.stride(0)),
        (
            targets.data_ptr(),
            _address(bias),
            _address(candidates),
            0 if candidates is None else len(candidates),
        ),
        (
            _address(excluded_values),
            _address(excluded_offsets),
            0 if excluded_values is None else len(excluded_values),
        ),
        gradient,
        (value.data_ptr(), _address(d_users), _address(d_items), _address(d_bias)),
        plan,
    )
    if error:
        raise ValueError(error)
    return value, d_users, d_items, d_bias
