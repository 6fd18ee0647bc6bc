"""Public gated item matrix, its registered ops and the autograd function around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from padkern import _backends
from padkern.ops.first_order import once_differentiable
from padkern.ops.gated_table.reference import gated_table_ref

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAX_EXPERTS = 16

define("padkern::gated_table", "(Tensor[] tables, Tensor gate, Tensor item_bins) -> Tensor")
define(
    "padkern::gated_table_grad",
    "(Tensor d_out, Tensor[] tables, Tensor gate, Tensor item_bins) -> Tensor[]",
)


@impl("padkern::gated_table", "CPU")
def _table_cpu(tables: Sequence[Tensor], gate: Tensor, item_bins: Tensor) -> Tensor:
    from padkern.ops.gated_table.native import gated_table_native

    return gated_table_native(tables, gate, item_bins)


@impl("padkern::gated_table_grad", "CPU")
def _table_grad_cpu(
    d_out: Tensor, tables: Sequence[Tensor], gate: Tensor, item_bins: Tensor
) -> list[Tensor]:
    from padkern.ops.gated_table.native import gated_table_grad_native

    return gated_table_grad_native(d_out, tables, gate, item_bins)


def _table_triton(tables: Sequence[Tensor], gate: Tensor, item_bins: Tensor) -> Tensor:
    from padkern.ops.gated_table.triton_impl import gated_table_triton

    return gated_table_triton(tables, gate, item_bins)


def _table_grad_triton(
    d_out: Tensor, tables: Sequence[Tensor], gate: Tensor, item_bins: Tensor
) -> list[Tensor]:
    from padkern.ops.gated_table.triton_impl import gated_table_grad_triton

    return gated_table_grad_triton(d_out, tables, gate, item_bins)


impl("padkern::gated_table", "CUDA")(_table_triton)
impl("padkern::gated_table_grad", "CUDA")(_table_grad_triton)


@register_fake("padkern::gated_table")
def _table_fake(tables: Sequence[Tensor], gate: Tensor, item_bins: Tensor) -> Tensor:
    return gate.new_empty((item_bins.shape[0], sum(table.shape[1] for table in tables)))


@register_fake("padkern::gated_table_grad")
def _table_grad_fake(
    d_out: Tensor, tables: Sequence[Tensor], gate: Tensor, item_bins: Tensor
) -> list[Tensor]:
    return [gate.new_empty(x.shape) for x in (*tables, gate)]


_TABLE = torch.ops.padkern.gated_table.default
_TABLE_GRAD = torch.ops.padkern.gated_table_grad.default


class _GatedTableFunction(torch.autograd.Function):
    """``interpreted``: CPU tensors, for which the registered ops would be the native ones, go to
    Triton's interpreter."""

    @staticmethod
    def forward(gate: Tensor, item_bins: Tensor, interpreted: bool, *tables: Tensor) -> Tensor:
        return (_table_triton if interpreted else _TABLE)(list(tables), gate, item_bins)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, item_bins, ctx.interpreted, *tables = inputs
        ctx.save_for_backward(gate, item_bins, *tables)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        gate, item_bins, *tables = ctx.saved_tensors
        differentiate = _table_grad_triton if ctx.interpreted else _TABLE_GRAD
        *d_tables, d_gate = differentiate(d_out.to(gate.dtype), list(tables), gate, item_bins)
        d_tables = [d.to(table.dtype) for d, table in zip(d_tables, tables, strict=True)]
        return (d_gate, None, None, *d_tables)


def _check(tables: Sequence[Tensor], gate: Tensor, item_bins: Tensor) -> None:
    if not 1 <= len(tables) <= _MAX_EXPERTS:
        raise ValueError(f"tables must hold 1 to {_MAX_EXPERTS} experts, got {len(tables)}")
    named = [(f"tables[{e}]", table) for e, table in enumerate(tables)]
    for name, x in [*named, ("gate", gate), ("item_bins", item_bins)]:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    for name, x in [*named, ("gate", gate)]:
        if x.dtype not in _FLOAT_DTYPES:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {x.dtype}")
    if item_bins.dtype != torch.int64:
        raise TypeError(f"item_bins must be int64, got {item_bins.dtype}")
    if item_bins.dim() != 1:
        raise ValueError(f"item_bins must have shape [N], got {list(item_bins.shape)}")
    rows = item_bins.shape[0]
    for name, table in named:
        if table.dim() != 2 or table.shape[0] != rows:
            raise ValueError(f"{name} must have shape [{rows}, d], got {list(table.shape)}")
    if gate.dim() != 2 or gate.shape[1] != len(tables) or gate.shape[0] == 0:
        raise ValueError(f"gate must have shape [bins, {len(tables)}], got {list(gate.shape)}")
    for name, x in [*named, ("item_bins", item_bins)]:
        if x.device != gate.device:
            raise ValueError(f"{name} must be on {gate.device} like gate, got {x.device}")


def gated_table(
    tables: Tensor | Sequence[Tensor], gate: Tensor, item_bins: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Folded item matrix ``W[i] = [gate[bin(i), e] tables[e][i]]_e`` of several experts.

    The inner product of a row with the experts' states side by side is the gated score. The native
    and Triton backends read each table once and write the matrix once; their backward likewise,
    with the gate's gradient summed on the way, in a fixed order.

    Args:
        tables: E tables ``[N, d_e]`` of any widths, E <= 16, or one tensor ``[E, N, d]``; float64,
            float32, float16 or bfloat16.
        gate: ``[bins, E]`` weights.
        item_bins: ``[N]`` int64 rows of ``gate``.
        backend: "auto", "reference" (plain torch, any device), "native" (CPU) or "triton" (CUDA);
            the last two first order. A named backend never falls back; "auto" may.

    Returns:
        ``[N, sum d_e]``, float64 if a table is, else float32 (the gate is converted).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit, or a bin is out of range (checked on the CPU;
            with Triton its row is NaN).
        RuntimeError: the named backend cannot run; the message says why.
    """
    if isinstance(tables, Tensor):
        if tables.dim() != 3:
            raise ValueError(f"tables must have shape [E, N, d], got {list(tables.shape)}")
        tables = tables.unbind(0)
    _check(tables, gate, item_bins)
    double = any(table.dtype == torch.float64 for table in tables)
    dtype = torch.float64 if double else torch.float32
    gate = gate.to(dtype)
    arrays = (*tables, gate, item_bins)
    chosen = _backends.choose_backend(
        backend,
        _backends.TRITON_BACKENDS,
        {
            "native": lambda: _backends.why_not_native(*arrays),
            "triton": lambda: _backends.why_not_triton(*arrays),
        },
        automatic=("native",),
    )
    if gate.is_cpu and chosen != "native" and not torch.compiler.is_compiling():
        wrong = (item_bins < 0) | (item_bins >= gate.shape[0])
        if bool(wrong.any()):
            raise ValueError(
                f"item_bins must lie in 0..{gate.shape[0] - 1}, got {int(item_bins[wrong][0])}"
            )
    if chosen == "triton":  # reads half tables as they are
        return _GatedTableFunction.apply(gate, item_bins, gate.is_cpu, *tables)
    tables = [table.to(dtype) for table in tables]
    if chosen == "native":
        return _GatedTableFunction.apply(gate, item_bins, False, *tables)
    return gated_table_ref(tables, gate, item_bins)
