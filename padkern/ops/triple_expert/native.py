"""Launchers over ``padkern._C``: checks, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from padkern.ops.launch import (
    address,
    check_optional,
    check_tensor,
    core,
    dense_rows,
    float_code,
    raise_error,
)


def _check(
    users: Tensor,
    item_tables: Tensor,
    gate: Tensor,
    item_bins: Tensor,
    positives: Tensor,
    negatives: Tensor,
    valid: Tensor | None,
) -> None:
    dtype, ids = users.dtype, torch.int64
    check_tensor("users", users, dtype, ("T", "E", "d"))
    tokens, experts, dim = users.shape
    check_tensor("item_tables", item_tables, dtype, (experts, "N + 1", dim))
    check_tensor("gate", gate, dtype, ("bins + 1", experts))
    check_tensor("item_bins", item_bins, ids, (item_tables.shape[1],))
    check_tensor("positives", positives, ids, (tokens,))
    check_tensor("negatives", negatives, ids, (tokens, "k"))
    check_optional("valid", valid, torch.bool, (tokens,))
    for name, x, dimension in (
        ("item_tables", item_tables, 1),
        ("gate", gate, 0),
        ("negatives", negatives, 1),
    ):
        if x.shape[dimension] == 0:
            raise ValueError(f"{name} must not be empty, got {list(x.shape)}")


def _launch(
    users: Tensor,
    item_tables: Tensor,
    gate: Tensor,
    item_bins: Tensor,
    positives: Tensor,
    negatives: Tensor,
    valid: Tensor | None,
    positive_weight: float,
    gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    dtype = users.dtype
    code = float_code("users", dtype)
    _check(users, item_tables, gate, item_bins, positives, negatives, valid)
    users, item_tables = dense_rows(users), dense_rows(item_tables)
    gate, item_bins = gate.detach().contiguous(), item_bins.contiguous()
    positives, negatives = positives.contiguous(), negatives.contiguous()
    valid = None if valid is None else valid.contiguous()
    tokens, experts, dim = users.shape
    value = torch.empty((), dtype=dtype)
    outputs: list[Tensor | None] = [None, None, None]
    if gradient:
        outputs = [torch.empty(x.shape, dtype=dtype) for x in (users, item_tables, gate)]
    error = core().gated_bce_cpu(
        code,
        (tokens, experts, dim, item_tables.shape[1], gate.shape[0], negatives.shape[1]),
        (users.data_ptr(), users.stride(0), users.stride(1)),
        (item_tables.data_ptr(), item_tables.stride(0), item_tables.stride(1)),
        gate.data_ptr(),
        item_bins.data_ptr(),
        (positives.data_ptr(), negatives.data_ptr(), address(valid)),
        positive_weight,
        gradient,
        (value.data_ptr(), *(address(out) for out in outputs)),
    )
    raise_error(error)
    return value, outputs[0], outputs[1], outputs[2]


def gated_bce_value_native(
    users: Tensor,
    item_tables: Tensor,
    gate: Tensor,
    item_bins: Tensor,
    positives: Tensor,
    negatives: Tensor,
    valid: Tensor | None,
    positive_weight: float = 1.0,
) -> Tensor:
    """The loss: scalar of the dtype of ``users``. CPU tensors of one float dtype.

    Raises:
        TypeError, ValueError: an argument does not fit the others, or an id or the weight is out
            of range.
    """
    arrays = (users, item_tables, gate, item_bins, positives, negatives, valid)
    return _launch(*arrays, positive_weight, False)[0]


def gated_bce_value_grad_native(
    users: Tensor,
    item_tables: Tensor,
    gate: Tensor,
    item_bins: Tensor,
    positives: Tensor,
    negatives: Tensor,
    valid: Tensor | None,
    positive_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its derivatives: (value, [T, E, d], [E, N + 1, d], [bins + 1, E]).

    Raises:
        TypeError, ValueError: as there.
    """
    arrays = (users, item_tables, gate, item_bins, positives, negatives, valid)
    value, d_users, d_tables, d_gate = _launch(*arrays, positive_weight, True)
    assert d_users is not None
    assert d_tables is not None
    assert d_gate is not None
    return value, d_users, d_tables, d_gate
