"""Refuses second derivatives of functions whose backward is written by hand."""

from __future__ import annotations

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
