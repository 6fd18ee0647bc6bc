"""Launchers over ``padkern._C``: dense rows, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from padkern import _native

_DTYPES = {torch.float32: 0, torch.float64: 1}


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _launch(
    users: Tensor,
    item_tables: Tensor,
    gate: Tensor,
    item_bins: Tensor,
    positives: Tensor,
    negatives: Tensor,
    valid: Tensor | None,
    gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    core, reason, _ = _native.load()
    if core is None:
        raise RuntimeError(reason)
    dtype = users.dtype
    users, item_tables = _dense_rows(users.detach()), _dense_rows(item_tables.detach())
    gate, item_bins = gate.detach().contiguous(), item_bins.contiguous()
    positives, negatives = positives.contiguous(), negatives.contiguous()
    valid = None if valid is None else valid.contiguous()
    tokens, experts, dim = users.shape
    value = torch.empty((), dtype=dtype)
    outputs: list[Tensor | None] = [None, None, None]
    if gradient:
        outputs = [torch.empty(x.shape, dtype=dtype) for x in (users, item_tables, gate)]
    error = core.gated_bce_cpu(
        _DTYPES[dtype],
        (tokens, experts, dim, item_tables.shape[1], gate.shape[0], negatives.shape[1]),
        (users.data_ptr(), users.stride(0), users.stride(1)),
        (item_tables.data_ptr(), item_tables.stride(0), item_tables.stride(1)),
        gate.data_ptr(),
        item_bins.data_ptr(),
        (positives.data_ptr(), negatives.data_ptr(), 0 if valid is None else valid.data_ptr()),
        gradient,
        (value.data_ptr(), *(0 if out is None else out.data_ptr() for out in outputs)),
    )
    if error:
        raise ValueError(error)
    return value, outputs[0], outputs[1], outputs[2]


def gated_bce_value_native(
    users: Tensor,
    item_tables: Tensor,
    gate: Tensor,
    item_bins: Tensor,
    positives: Tensor,
    negatives: Tensor,
    valid: Tensor | None,
) -> Tensor:
    """The loss: scalar of the dtype of ``users``. CPU tensors of one float dtype."""
    return _launch(users, item_tables, gate, item_bins, positives, negatives, valid, False)[0]


def gated_bce_value_grad_native(
    users: Tensor,
    item_tables: Tensor,
    gate: Tensor,
    item_bins: Tensor,
    positives: Tensor,
    negatives: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its derivatives: (value, [T, E, d], [E, N + 1, d], [bins + 1, E])."""
    value, d_users, d_tables, d_gate = _launch(
        users, item_tables, gate, item_bins, positives, negatives, valid, True
    )
    assert d_users is not None
    assert d_tables is not None
    assert d_gate is not None
    return value, d_users, d_tables, d_gate
