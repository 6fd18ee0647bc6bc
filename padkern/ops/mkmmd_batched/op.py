"""Registered ops of batched MK-MMD and the autograd function around them.

``padkern::mkmmd_batched_value`` and ``padkern::mkmmd_batched_value_grad`` are functional and know
nothing of autograd. The second gives the values and their derivatives in one pass; backward only
scales the rows of each problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from padkern.ops.mkmmd.reference import compute_dtype

# source and target hold packed rows [total, D]; the native backend also takes [B, n, D] of any
# strides. offsets [B + 1] cut the packed rows into problems; rows past the last one belong to none
# and get no gradient. A problem with too few rows gives NaN. sigma_sq is [B]. max_*_rows are upper
# bounds on a problem's rows.
_ARGUMENTS = (
    "(Tensor source, Tensor target, Tensor source_offsets, Tensor target_offsets, "
    "Tensor? sigma_sq, Tensor? source_weight, Tensor? target_weight, float[] alphas, str kernel, "
    "str estimator, SymInt max_source_rows, SymInt max_target_rows, str backend)"
)
define("padkern::mkmmd_batched_value", _ARGUMENTS + " -> Tensor")
define("padkern::mkmmd_batched_value_grad", _ARGUMENTS + " -> (Tensor, Tensor, Tensor, Tensor)")


@cache
def _launchers(backend: str) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
    """The (value, value_grad) launchers of one backend: the schema's arguments but ``backend``."""
    if backend == "native":
        from padkern.ops.mkmmd_batched import native

        return native.mkmmd_batched_value_native, native.mkmmd_batched_value_grad_native
    if backend == "triton":
        from padkern.ops.mkmmd import triton_impl

        return triton_impl.mkmmd_batched_value_triton, triton_impl.mkmmd_batched_value_grad_triton
    raise ValueError(f"backend must be native or triton, got {backend!r}")


def _value(*args: Any) -> Tensor:
    return _launchers(args[12])[0](*args[:12])


def _value_grad(*args: Any) -> tuple[Tensor, ...]:
    value, d_source, d_target, d_sigma = _launchers(args[12])[1](*args[:12])
    return value, d_source.contiguous(), d_target.contiguous(), d_sigma


for _key in ("CPU", "CUDA"):
    impl("padkern::mkmmd_batched_value", _key)(_value)
    impl("padkern::mkmmd_batched_value_grad", _key)(_value_grad)


@register_fake("padkern::mkmmd_batched_value")
def _value_fake(source: Tensor, target: Tensor, source_offsets: Tensor, *_: Any) -> Tensor:
    problems = source_offsets.shape[0] - 1
    return source.new_empty((problems,), dtype=compute_dtype(source, target))


@register_fake("padkern::mkmmd_batched_value_grad")
def _value_grad_fake(
    source: Tensor, target: Tensor, source_offsets: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(source, target)
    problems = source_offsets.shape[0] - 1
    return (
        source.new_empty((problems,), dtype=dtype),
        source.new_empty(source.shape, dtype=dtype),
        target.new_empty(target.shape, dtype=dtype),
        source.new_empty((problems,), dtype=torch.float64),
    )


_VALUE = torch.ops.padkern.mkmmd_batched_value.default
_VALUE_GRAD = torch.ops.padkern.mkmmd_batched_value_grad.default


class _ScaleFunction(torch.autograd.Function):
    """(saved * factor) in the dtype of ``sample``; its own derivative is refused.

    Takes ``sample`` only so that a second derivative meets an error here: the saved gradients carry
    no graph, and without this node they would count as constants.
    """

    @staticmethod
    def forward(saved: Tensor, factor: Tensor, sample: Tensor) -> Tensor:
        return _scale(saved, factor, sample)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        raise RuntimeError(
            "mkmmd_loss_batched: the fused backends are once_differentiable; "
            "use backend='reference' for second derivatives"
        )


def _scale(saved: Tensor, factor: Tensor, sample: Tensor) -> Tensor:
    return (saved * factor.to(saved.dtype)).to(sample.dtype)


def _row_factors(grad_value: Tensor, saved: Tensor, offsets: Tensor) -> Tensor:
    """grad_value [B] as a factor of the rows [total, D] or [B, n, D] of each problem."""
    if saved.dim() == 3:
        return grad_value[:, None, None]
    rows = torch.arange(saved.shape[0], dtype=offsets.dtype, device=offsets.device)
    # The inner offsets alone keep the index in range whatever the last one says.
    problem = torch.bucketize(rows, offsets[1:-1], right=True)
    return grad_value.index_select(0, problem)[:, None]


class _MkmmdBatchedFunction(torch.autograd.Function):
    """Saves the derivatives in the compute dtype; backward scales, then casts."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _VALUE_GRAD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        source, target, source_offsets, target_offsets, sigma_sq = inputs[:5]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:], source_offsets, target_offsets, source, target, sigma_sq)

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_source, d_target, d_sigma, *offsets, source, target, sigma_sq = ctx.saved_tensors
        # Grad mode is on here only under create_graph; a compiler refuses that by itself.
        second_order = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        scale = _ScaleFunction.apply if second_order else _scale
        gradients: list[Tensor | None] = [None] * 13
        for position, saved, sample in ((0, d_source, source), (1, d_target, target)):
            if ctx.needs_input_grad[position]:
                factor = _row_factors(grad_value, saved, offsets[position])
                gradients[position] = scale(saved, factor, sample)
        if ctx.needs_input_grad[4]:
            gradients[4] = scale(d_sigma, grad_value, sigma_sq)
        return tuple(gradients)


def mkmmd_batched_fused(
    source: Tensor,
    target: Tensor,
    source_offsets: Tensor,
    target_offsets: Tensor,
    sigma_sq: Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    alphas: Sequence[float],
    kernel: str,
    estimator: str,
    max_source_rows: int,
    max_target_rows: int,
    backend: str,
) -> Tensor:
    """The losses [B] through the registered ops; the value-only one when no gradient is wanted."""
    if backend != "native":
        source_offsets, target_offsets = source_offsets.long(), target_offsets.long()
    if backend != "native" and source.dim() == 3:
        source, target = source.flatten(0, 1), target.flatten(0, 1)
        source_weight, target_weight = (
            None if weight is None else weight.flatten()
            for weight in (source_weight, target_weight)
        )
    args = (
        source,
        target,
        source_offsets,
        target_offsets,
        sigma_sq,
        source_weight,
        target_weight,
        alphas,
        kernel,
        estimator,
        max_source_rows,
        max_target_rows,
        backend,
    )
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (source, target, sigma_sq)
    ):
        return _MkmmdBatchedFunction.apply(*args)[0]
    return _VALUE(*args)
