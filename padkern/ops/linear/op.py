"""Public linear map, its registered ops and the autograd function around them.

``padkern::linear`` and ``padkern::linear_grad`` are functional and know nothing of autograd. Empty
tensors stand for gradients that nobody asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from padkern import _backends
from padkern.ops.linear.reference import linear_ref

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

define("padkern::linear", "(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor")
define(
    "padkern::linear_grad",
    "(Tensor d_y, Tensor x, Tensor weight, Tensor? y, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)


@impl("padkern::linear", "CPU")
def _value_cpu(*args: Any) -> Tensor:
    from padkern.ops.linear.native import linear_native

    return linear_native(*args)


@impl("padkern::linear_grad", "CPU")
def _grad_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from padkern.ops.linear.native import linear_grad_native

    return linear_grad_native(*args)


@register_fake("padkern::linear")
def _value_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@register_fake("padkern::linear_grad")
def _grad_fake(
    d_y: Tensor, x: Tensor, weight: Tensor, y: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, ...]:
    shapes = (x.shape, weight.shape, (weight.shape[0],))
    return tuple(
        x.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)
    )


_VALUE = torch.ops.padkern.linear.default
_GRAD = torch.ops.padkern.linear_grad.default


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        return _VALUE(x, weight, bias, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, relu = inputs
        ctx.save_for_backward(x, weight, output if relu else None)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        wanted = [bool(need) for need in ctx.needs_input_grad[:3]]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # Under create_graph: in torch's operations, which can be differentiated again.
            z = d_y if y is None else d_y * (y > 0)
            gradients: tuple[Tensor, ...] = (z @ weight, z.T @ x, z.sum(0))
        else:
            gradients = _GRAD(d_y, x, weight, y, wanted)
        return (*(g if need else None for g, need in zip(gradients, wanted, strict=True)), None)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    named = {"x": x, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
        if value.dtype not in _FLOAT_DTYPES:
            raise TypeError(
                f"{name} must be float64, float32, float16 or bfloat16, got {value.dtype}"
            )
    if x.dim() != 2:
        raise ValueError(f"x must have shape [T, in], got {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must have shape [out, {x.shape[1]}], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    for name, value in named.items():
        if value.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {value.device}")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""``y = x W^T + b``, or its positive part, of rows that are many and short.

    The native backend gives every row the same bits whatever other rows are in the call, and every
    result the same bits for any number of threads; torch's products promise neither. ReLU and bias
    cost no pass of their own.

    Args:
        x: ``[T, in]``, any strides.
        weight: ``[out, in]``.
        bias: ``[out]`` b, or None.
        relu: give ``max(y, 0)``.
        backend: "auto", "reference" (plain torch, any device) or "native" (CPU). A named
            backend never falls back; "auto" may.

    Returns:
        ``[T, out]``, float64 if x or the weight is, else float32 (the bias is converted), also
        under autocast. NaN or Inf in a row spreads over that row.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit.
        RuntimeError: the named backend cannot run; the message says why.
    """
    _check(x, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    double = torch.float64 in (x.dtype, weight.dtype)
    dtype = torch.float64 if double else torch.float32
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    chosen = _backends.resolve_backend(backend, lambda: _backends.why_not_native(x, weight, bias))
    if chosen != "native":
        with _backends.without_autocast(x.device.type):
            return linear_ref(x, weight, bias, relu)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _LinearFunction.apply(x, weight, bias, relu)
    return _VALUE(x, weight, bias, relu)
