"""Launchers over ``padkern._C``: checks, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from padkern.ops.launch import check_tensor, core, dense_rows, float_code, raise_error


def _check(tables: Sequence[Tensor], gate: Tensor, item_bins: Tensor) -> int:
    """The code of the dtype of a call that fits together."""
    dtype = gate.dtype
    code = float_code("gate", dtype)
    check_tensor("item_bins", item_bins, torch.int64, ("N",))
    check_tensor("gate", gate, dtype, ("bins", len(tables)))
    if gate.shape[0] == 0:
        raise ValueError(f"gate must have at least one row, got {list(gate.shape)}")
    rows = item_bins.shape[0]
    for e, table in enumerate(tables):
        check_tensor(f"tables[{e}]", table, dtype, (rows, "d"))
    return code


def _launch(
    code: int,
    tables: Sequence[Tensor],
    gate: Tensor,
    item_bins: Tensor,
    out: Tensor | None,
    d_out: Tensor | None,
    derivatives: Sequence[Tensor],
) -> None:
    tables = [dense_rows(table) for table in tables]
    gate, item_bins = gate.detach().contiguous(), item_bins.contiguous()
    gradient = (0, 0, 0)
    if d_out is not None:
        d_out = dense_rows(d_out)
        gradient = (d_out.data_ptr(), d_out.stride(0), derivatives[-1].data_ptr())
    error = core().gated_table_cpu(
        code,
        (item_bins.shape[0], gate.shape[0]),
        (
            [table.data_ptr() for table in tables],
            [table.stride(0) for table in tables],
            [table.shape[1] for table in tables],
        ),
        gate.data_ptr(),
        item_bins.data_ptr(),
        0 if out is None else out.data_ptr(),
        gradient,
        [x.data_ptr() for x in derivatives[:-1]],
    )
    raise_error(error)


def gated_table_native(tables: Sequence[Tensor], gate: Tensor, item_bins: Tensor) -> Tensor:
    """``[N, sum d_e]``. CPU tensors of one float dtype, ``tables`` E of ``[N, d_e]``.

    Raises:
        TypeError, ValueError: an argument does not fit the others, or a bin is out of range.
    """
    code = _check(tables, gate, item_bins)
    width = sum(table.shape[1] for table in tables)
    out = torch.empty((item_bins.shape[0], width), dtype=gate.dtype)
    _launch(code, tables, gate, item_bins, out, None, ())
    return out


def gated_table_grad_native(
    d_out: Tensor, tables: Sequence[Tensor], gate: Tensor, item_bins: Tensor
) -> list[Tensor]:
    """Derivatives by each of the tables, then by the gate, given that by the matrix.

    Raises:
        TypeError, ValueError: as there.
    """
    code = _check(tables, gate, item_bins)
    width = sum(table.shape[1] for table in tables)
    check_tensor("d_out", d_out, gate.dtype, (item_bins.shape[0], width))
    derivatives = [torch.empty(x.shape, dtype=gate.dtype) for x in (*tables, gate)]
    _launch(code, tables, gate, item_bins, None, d_out, derivatives)
    return derivatives
