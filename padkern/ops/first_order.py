"""Refuses second derivatives of functions whose backward is written by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _FirstOrderFunction(torch.autograd.Function):
    """The gradient itself; takes the samples only so that its own derivative meets an error.

    A gradient computed by hand carries no graph: without this node it would count as a constant.
    """

    @staticmethod
    def forward(message: str, gradient: Tensor, *samples: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        raise RuntimeError(ctx.message)


def first_order_only(message: str, gradient: Tensor, *samples: Tensor) -> Tensor:
    """The gradient, with a derivative that raises RuntimeError(message).

    Args:
        message: Says what to use instead.
        gradient: Computed from the samples.
        samples: What a second derivative could be taken by.
    """
    # Grad mode is on in a backward only under create_graph; a compiler refuses that by itself.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _FirstOrderFunction.apply(message, gradient, *samples)
    return gradient


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """:func:`torch.autograd.function.once_differentiable` that always refuses.

    Torch's lets a gradient pass as a constant where the incoming one is a constant, as under a sum:
    a second derivative would then be silently zero.
    """
    first = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return first(ctx, *grads)
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        # Something that requires a gradient, so that a derivative of these meets the error.
        tie = torch.ones((), requires_grad=True)
        message = "once_differentiable: use backend='reference' for second derivatives"
        return tuple(
            None if g is None else _FirstOrderFunction.apply(message, g, tie) for g in gradients
        )

    return run
