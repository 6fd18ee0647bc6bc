"""Launchers over ``padkern._C``: dense rows, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from padkern import _native

_DTYPES = {torch.float32: 0, torch.float64: 1}


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _launch(
    tables: Sequence[Tensor],
    gate: Tensor,
    item_bins: Tensor,
    out: Tensor | None,
    d_out: Tensor | None,
    derivatives: Sequence[Tensor],
) -> None:
    core, reason, _ = _native.load()
    if core is None:
        raise RuntimeError(reason)
    tables = [_dense_rows(table.detach()) for table in tables]
    gate, item_bins = gate.detach().contiguous(), item_bins.contiguous()
    gradient = (0, 0, 0)
    if d_out is not None:
        d_out = _dense_rows(d_out.detach())
        gradient = (d_out.data_ptr(), d_out.stride(0), derivatives[-1].data_ptr())
    error = core.gated_table_cpu(
        _DTYPES[gate.dtype],
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
    if error:
        raise ValueError(error)


def gated_table_native(tables: Sequence[Tensor], gate: Tensor, item_bins: Tensor) -> Tensor:
    """``[N, sum d_e]``. CPU tensors of one float dtype, ``tables`` E of ``[N, d_e]``."""
    width = sum(table.shape[1] for table in tables)
    out = torch.empty((item_bins.shape[0], width), dtype=gate.dtype)
    _launch(tables, gate, item_bins, out, None, ())
    return out


def gated_table_grad_native(
    d_out: Tensor, tables: Sequence[Tensor], gate: Tensor, item_bins: Tensor
) -> list[Tensor]:
    """Derivatives by each of the tables, then by the gate, given that by the matrix."""
    derivatives = [torch.empty(x.shape, dtype=gate.dtype) for x in (*tables, gate)]
    _launch(tables, gate, item_bins, None, d_out, derivatives)
    return derivatives
