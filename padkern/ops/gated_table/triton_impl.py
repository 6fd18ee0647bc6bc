"""Triton kernels and launchers of the gated item matrix; one launch per expert. See ``README.md``.

They run on the current stream, read no value on the host and use no atomics: same inputs, same
bits. A bin out of range gives NaN in its row, never foreign memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from padkern.ops.launch import dense_rows
from padkern.ops.triton_bins import bin_sums
from padkern.ops.triton_interpreter import guard

ELEMENTS = 1024  # of a tile
WIDEST = 512  # columns of a tile


@triton.jit
def gate_of(gate_ptr, bins_ptr, row, rows, bins, experts, DOUBLE: tl.constexpr):
    """The gate weight of each row; ``gate_ptr`` is the expert's column."""
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    own = tl.load(bins_ptr + row, mask=row < rows, other=0)
    good = (own >= 0) & (own < bins)
    gate = tl.load(gate_ptr + own * experts, mask=good & (row < rows), other=0).to(dtype)
    return tl.where(good, gate, float("nan"))


@triton.jit
def table_kernel(
    table_ptr,
    stride,
    gate_ptr,
    bins_ptr,
    out_ptr,
    out_stride,
    rows,
    width,
    bins,
    experts,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[i, c] = gate[bin(i)] table[i, c]."""
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate = gate_of(gate_ptr, bins_ptr, row, rows, bins, experts, DOUBLE)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    values = tl.load(table_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0)
    out = out_ptr + row[:, None] * out_stride + column[None, :]
    tl.store(out, gate[:, None] * values.to(dtype), mask=inside)


@triton.jit
def table_gradient_kernel(
    d_out_ptr,
    d_out_stride,
    table_ptr,
    stride,
    gate_ptr,
    bins_ptr,
    d_table_ptr,
    inner_ptr,
    rows,
    width,
    bins,
    experts,
    DOUBLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """d_table = gate d_out, and per row the inner product of d_out and table."""
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    gate = gate_of(gate_ptr, bins_ptr, row, rows, bins, experts, DOUBLE)
    inner = tl.zeros([ROWS], dtype)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        values = tl.load(table_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0)
        slope = d_out_ptr + row[:, None] * d_out_stride + column[None, :]
        slope = tl.load(slope, mask=inside, other=0).to(dtype)
        out = d_table_ptr + row[:, None] * width + column[None, :]
        tl.store(out, gate[:, None] * slope, mask=inside)
        inner += tl.sum(slope * values.to(dtype), 1)
    tl.store(inner_ptr + row, inner, mask=row < rows)


def _tile(width: int) -> tuple[int, int]:
    columns = min(WIDEST, max(16, triton.next_power_of_2(width)))
    return ELEMENTS // columns, columns


def gated_table_triton(tables: Sequence[Tensor], gate: Tensor, item_bins: Tensor) -> Tensor:
    """``[N, sum d_e]`` of the dtype of ``gate``; the tables may have any float dtype."""
    tables = [dense_rows(table) for table in tables]
    gate, item_bins = gate.detach().contiguous(), item_bins.contiguous()
    rows, width = item_bins.shape[0], sum(table.shape[1] for table in tables)
    out = torch.empty((rows, width), dtype=gate.dtype, device=gate.device)
    place = 0
    with guard(gate):
        for e, table in enumerate(tables):
            dim = table.shape[1]
            height, columns = _tile(dim)
            grid = (triton.cdiv(rows, height), triton.cdiv(dim, columns))
            if rows and dim:
                table_kernel[grid](
                    table,
                    table.stride(0),
                    gate[:, e:],
                    item_bins,
                    out[:, place:],
                    width,
                    rows,
                    dim,
                    gate.shape[0],
                    len(tables),
                    gate.dtype == torch.float64,
                    height,
                    columns,
                    num_warps=4,
                )
            place += dim
    return out


def gated_table_grad_triton(
    d_out: Tensor, tables: Sequence[Tensor], gate: Tensor, item_bins: Tensor
) -> list[Tensor]:
    """Derivatives by each of the tables, then by the gate, of the dtype of ``gate``."""
    tables, d_out = [dense_rows(table) for table in tables], dense_rows(d_out)
    gate, item_bins = gate.detach().contiguous(), item_bins.contiguous()
    rows = item_bins.shape[0]
    derivatives = [torch.empty(x.shape, dtype=gate.dtype, device=gate.device) for x in tables]
    inner = torch.empty(len(tables), rows, dtype=gate.dtype, device=gate.device)
    place = 0
    with guard(gate):
        for e, table in enumerate(tables):
            dim = table.shape[1]
            height, columns = _tile(dim)
            if rows:
                table_gradient_kernel[(triton.cdiv(rows, height),)](
                    d_out[:, place:],
                    d_out.stride(0),
                    table,
                    table.stride(0),
                    gate[:, e:],
                    item_bins,
                    derivatives[e],
                    inner[e],
                    rows,
                    dim,
                    gate.shape[0],
                    len(tables),
                    gate.dtype == torch.float64,
                    height,
                    columns,
                    num_warps=4,
                )
            place += dim
        return [*derivatives, bin_sums(inner, item_bins, gate.shape[0])]
