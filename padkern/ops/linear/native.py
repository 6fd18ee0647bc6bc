"""Launchers over ``padkern._C``: dense rows, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from padkern import _native

_DTYPES = {torch.float32: 0, torch.float64: 1}


def _rows(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _matrix(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.stride(0)


def _core() -> Any:
    core, reason, _ = _native.load()
    if core is None:
        raise RuntimeError(reason)
    return core


def _check(x: Tensor, weight: Tensor, **others: tuple[Tensor | None, list[int]]) -> None:
    """What a call past the public function could get wrong."""
    if x.dtype not in _DTYPES or x.ndim != 2:
        raise ValueError(f"x must be [T, in], float32 or float64, got {list(x.shape)} {x.dtype}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must be [out, {x.shape[1]}], got {list(weight.shape)}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must be {x.dtype} like x, got {weight.dtype}")
    for name, (value, shape) in others.items():
        if value is not None and (list(value.shape) != shape or value.dtype != x.dtype):
            raise ValueError(
                f"{name} must be {shape} {x.dtype}, got {list(value.shape)} {value.dtype}"
            )


def linear_native(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """``[T, out]``. CPU tensors of one dtype, float32 or float64."""
    core = _core()
    _check(x, weight, bias=(bias, [weight.shape[0]]))
    x, weight = _rows(x), _rows(weight)
    bias = None if bias is None else bias.detach().contiguous()
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    error = core.linear_cpu(
        (_DTYPES[x.dtype], *x.shape, weight.shape[0]),
        relu,
        _matrix(x),
        _matrix(weight),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
    )
    if error:
        raise ValueError(error)
    return y


def linear_grad_native(
    d_y: Tensor, x: Tensor, weight: Tensor, y: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and bias, empty where not ``wanted``; ``y`` is given with ReLU."""
    core = _core()
    rows, out = x.shape[0], weight.shape[0]
    _check(x, weight, d_y=(d_y, [rows, out]), y=(y, [rows, out]))
    if len(wanted) != 3:
        raise ValueError(f"wanted must hold 3 values, got {len(wanted)}")
    x, weight, d_y = _rows(x), _rows(weight), _rows(d_y)
    y = None if y is None else y.detach().contiguous()
    shapes = (x.shape, weight.shape, (out,))
    outputs = [
        torch.empty(shape if want else (0,), dtype=x.dtype)
        for shape, want in zip(shapes, wanted, strict=True)
    ]
    error = core.linear_backward_cpu(
        (_DTYPES[x.dtype], *x.shape, out),
        y is not None,
        _matrix(x),
        _matrix(weight),
        0 if y is None else y.data_ptr(),
        _matrix(d_y),
        tuple(t.data_ptr() if want else 0 for t, want in zip(outputs, wanted, strict=True)),
    )
    if error:
        raise ValueError(error)
    return outputs[0], outputs[1], outputs[2]
