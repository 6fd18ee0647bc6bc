"""Public segment sum and expansion, the registered op and the autograd functions.

Each is the gradient of the other, so both can be differentiated as often as wanted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from padkern import _backends
from padkern.ops.segments.reference import segment_rows, segment_sum_ref

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

define("padkern::segment_sum", "(Tensor values, Tensor slots, Tensor starts) -> Tensor")


@impl("padkern::segment_sum", "CPU")
def _sum_cpu(values: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
    from padkern.ops.segments.native import segment_sum_native

    return segment_sum_native(values, slots, starts)


def _sum_triton(values: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
    from padkern.ops.segments.triton_impl import segment_sum_triton

    return segment_sum_triton(values, slots, starts)


impl("padkern::segment_sum", "CUDA")(_sum_triton)


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@register_fake("padkern::segment_sum")
def _sum_fake(values: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
    shape = (starts.shape[0] - 1, values.shape[1])
    return values.new_empty(shape, dtype=_result_dtype(values))


_SUM = torch.ops.padkern.segment_sum.default


def _sum(values: Tensor, slots: Tensor, starts: Tensor, backend: str) -> Tensor:
    """The sums by a backend that has been chosen; only the reference's carry a graph."""
    if backend == "triton":
        # Triton's interpreter takes tensors on the CPU, and half inputs are read as they are.
        return (_sum_triton if values.is_cpu else _SUM)(values, slots, starts)
    values = values.to(_result_dtype(values))
    if backend == "native":
        return _SUM(values, slots, starts)
    with _backends.without_autocast(values.device.type):
        return segment_sum_ref(values, slots, starts)


class _SumFunction(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, slots: Tensor, starts: Tensor, backend: str) -> Tensor:
        return _sum(values, slots, starts, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, slots, starts, _ = inputs
        ctx.save_for_backward(slots, starts)
        ctx.like = (values.shape, values.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        slots, starts = ctx.saved_tensors
        shape, dtype = ctx.like
        rows = d_out.index_select(0, segment_rows(slots, starts))
        return d_out.new_zeros(shape).index_add(0, slots, rows).to(dtype), None, None, None


class _ExpandFunction(torch.autograd.Function):
    @staticmethod
    def forward(table: Tensor, rows: Tensor, slots: Tensor, starts: Tensor, backend: str) -> Tensor:
        return table.index_select(0, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:4])
        ctx.backend, ctx.dtype = inputs[4], inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        slots, starts = ctx.saved_tensors
        if torch.is_grad_enabled() and d_out.requires_grad:
            d_table = _SumFunction.apply(d_out, slots, starts, ctx.backend)
        else:
            d_table = _sum(d_out, slots, starts, ctx.backend)
        return d_table.to(ctx.dtype), *[None] * 4


def _check(name: str, x: Tensor, slots: Tensor, starts: Tensor) -> None:
    for label, tensor in ((name, x), ("slots", slots), ("starts", starts)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{label} must be a Tensor, got {type(tensor).__name__}")
    if x.dtype not in _FLOAT_DTYPES:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{name} must have shape [rows, d], got {list(x.shape)}")
    for label, ids in (("slots", slots), ("starts", starts)):
        if ids.dtype != torch.int64:
            raise TypeError(f"{label} must be int64, got {ids.dtype}")
        if ids.dim() != 1:
            raise ValueError(f"{label} must have one dimension, got {list(ids.shape)}")
        if ids.device != x.device:
            raise ValueError(f"{label} must be on {x.device}, got {ids.device}")
    if starts.numel() == 0:
        raise ValueError("starts must have shape [U + 1], got [0]")


def _check_values(slots: Tensor, starts: Tensor, rows: int) -> None:
    """For the reference on the CPU; the native backend checks its own."""
    count = slots.numel()
    if int(starts[0]) != 0 or int(starts[-1]) != count:
        raise ValueError(
            f"starts must rise from 0 to the {count} slots, "
            f"got {int(starts[0])} to {int(starts[-1])}"
        )
    steps = starts.diff()
    if steps.numel() and int(steps.min()) < 0:
        raise ValueError(f"starts must not decrease, got a step of {int(steps.min())}")
    if count and not 0 <= int(slots.min()) <= int(slots.max()) < rows:
        raise ValueError(
            f"slots must lie in 0..{rows - 1}, got {int(slots.min())} to {int(slots.max())}"
        )


def _choose(backend: str, *tensors: Tensor) -> str:
    return _backends.choose_backend(
        backend,
        _backends.TRITON_BACKENDS,
        {
            "native": lambda: _backends.why_not_native(*tensors),
            "triton": lambda: _backends.why_not_triton(*tensors),
        },
        ("native",),
    )


def segment_sum(values: Tensor, slots: Tensor, starts: Tensor, *, backend: str = "auto") -> Tensor:
    """Sums of rows over segments.

    ``out[u] = sum of values[slots[s]] over starts[u] <= s < starts[u + 1]``, which is
    ``torch.zeros(U, d).index_add_(0, segment of s, values[slots])``, in an order that depends on
    the arguments alone: the native backend adds each segment from its first slot to its last, the
    Triton backend in pieces of 64 slots.

    Args:
        values: ``[T, d]``; float64, float32, float16 or bfloat16, any strides.
        slots: int64 ``[S]`` rows of ``values``, those of one segment together.
        starts: int64 ``[U + 1]`` first slot of each segment, from 0 to S; segments may be empty.
        backend: "auto", "reference" (plain torch, any device), "native" (CPU) or "triton" (GPU). A
            named backend never falls back; "auto" may.

    Returns:
        ``[U, d]``; float64 if ``values`` is, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit, or a value is out of range (checked on the CPU;
            Triton gives NaN for a slot out of range).
        RuntimeError: the named backend cannot run; the message says why.
    """
    _check("values", values, slots, starts)
    chosen = _choose(backend, values, slots, starts)
    if chosen == "reference":
        if values.is_cpu and not torch.compiler.is_compiling():
            _check_values(slots, starts, values.shape[0])
        return _sum(values, slots, starts, chosen)
    if torch.is_grad_enabled() and values.requires_grad:
        return _SumFunction.apply(values, slots, starts, chosen)
    return _sum(values, slots, starts, chosen)


def expand(
    table: Tensor, rows: Tensor, slots: Tensor, starts: Tensor, *, backend: str = "auto"
) -> Tensor:
    """``table[rows]``, whose gradient is :func:`segment_sum` and not a scatter.

    Args:
        table: ``[U, d]``; float64, float32, float16 or bfloat16.
        rows: int64 ``[T]`` rows of ``table``.
        slots: int64 ``[T]`` places in ``rows`` grouped by their row, as in a
            :class:`padkern.data.plan.BatchPlan`: ``rows[slots[s]] == u`` for
            ``starts[u] <= s < starts[u + 1]``. Not checked: the gradient trusts it.
        starts: int64 ``[U + 1]``.
        backend: of the gradient, as in :func:`segment_sum`.

    Returns:
        ``[T, d]``, dtype of ``table``. Gradients are summed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`segment_sum`; ``starts`` or ``rows`` do not
            have the size that ``table`` and ``slots`` ask for.
    """
    _check("table", table, slots, starts)
    if starts.numel() != table.shape[0] + 1:
        raise ValueError(f"starts must have shape [{table.shape[0] + 1}], got {list(starts.shape)}")
    if rows.shape != slots.shape:
        raise ValueError(f"rows must have shape {list(slots.shape)}, got {list(rows.shape)}")
    chosen = _choose(backend, table, slots, starts)
    if torch.is_grad_enabled() and table.requires_grad:
        return _ExpandFunction.apply(table, rows, slots, starts, chosen)
    return table.index_select(0, rows)
