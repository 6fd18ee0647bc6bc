"""Registered ops of MK-MMD and the autograd function around them.

``padkern::mkmmd_value`` and ``padkern::mkmmd_value_grad`` are functional and know nothing of
autograd. The second gives value and derivatives in one pass; backward only scales them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from padkern.ops.mkmmd.reference import compute_dtype

_ARGUMENTS = (
    "(Tensor source, Tensor target, Tensor? sigma_sq, Tensor? source_weight, "
    "Tensor? target_weight, float[] alphas, str estimator)"
)
define("padkern::mkmmd_value", _ARGUMENTS + " -> Tensor")
define("padkern::mkmmd_value_grad", _ARGUMENTS + " -> (Tensor, Tensor, Tensor, Tensor)")


@impl("padkern::mkmmd_value", "CPU")
def _value_cpu(*args: Any) -> Tensor:
    from padkern.ops.mkmmd.native import mkmmd_value_native

    return mkmmd_value_native(*args)


@impl("padkern::mkmmd_value_grad", "CPU")
def _value_grad_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from padkern.ops.mkmmd.native import mkmmd_value_grad_native

    return mkmmd_value_grad_native(*args)


@register_fake("padkern::mkmmd_value")
def _value_fake(source: Tensor, target: Tensor, *_: Any) -> Tensor:
    return source.new_empty((), dtype=compute_dtype(source, target))


@register_fake("padkern::mkmmd_value_grad")
def _value_grad_fake(
    source: Tensor, target: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(source, target)
    return (
        source.new_empty((), dtype=dtype),
        source.new_empty(source.shape, dtype=dtype),
        target.new_empty(target.shape, dtype=dtype),
        source.new_empty((), dtype=torch.float64),
    )


_VALUE = torch.ops.padkern.mkmmd_value.default
_VALUE_GRAD = torch.ops.padkern.mkmmd_value_grad.default


class _ScaleFunction(torch.autograd.Function):
    """(saved * grad_value) in the dtype of ``sample``; its own derivative is refused.

    Takes ``sample`` only so that a second derivative meets an error here: the saved gradients carry
    no graph, and without this node they would count as constants.
    """

    @staticmethod
    def forward(saved: Tensor, grad_value: Tensor, sample: Tensor) -> Tensor:
        return _scale(saved, grad_value, sample)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        raise RuntimeError(
            "mkmmd_loss: the native backend is once_differentiable; "
            "use backend='reference' for second derivatives"
        )


def _scale(saved: Tensor, grad_value: Tensor, sample: Tensor) -> Tensor:
    return (saved * grad_value.to(saved.dtype)).to(sample.dtype).reshape(sample.shape)


class _MkmmdFunction(torch.autograd.Function):
    """Saves the derivatives in the compute dtype; backward scales, then casts.

    Loss scaling makes grad_output 65536 a normal case: a half-precision gradient must be rounded
    after the scaling, not before.
    """

    @staticmethod
    def forward(
        source: Tensor,
        target: Tensor,
        sigma_sq: Tensor | None,
        source_weight: Tensor | None,
        target_weight: Tensor | None,
        alphas: Sequence[float],
        estimator: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _VALUE_GRAD(
            source, target, sigma_sq, source_weight, target_weight, alphas, estimator
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        source, target, sigma_sq, *_ = inputs
        _, d_source, d_target, d_sigma = output
        ctx.mark_non_differentiable(d_source, d_target, d_sigma)
        ctx.save_for_backward(d_source, d_target, d_sigma, source, target, sigma_sq)

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved, samples = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        # Grad mode is on here only under create_graph; a compiler refuses that by itself.
        second_order = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        scale = _ScaleFunction.apply if second_order else _scale
        gradients = [
            scale(saved[i], grad_value, samples[i]) if ctx.needs_input_grad[i] else None
            for i in range(3)
        ]
        return (*gradients, None, None, None, None)


def mkmmd_native(
    source: Tensor,
    target: Tensor,
    sigma_sq: Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    alphas: Sequence[float],
    estimator: str,
) -> Tensor:
    """The loss through the registered ops; picks the value-only one when no gradient is wanted."""
    args = (source, target, sigma_sq, source_weight, target_weight, alphas, estimator)
    wanted = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (source, target, sigma_sq)
    )
    if wanted:
        return _MkmmdFunction.apply(*args)[0]
    return _VALUE(*args)
