"""Launchers over ``padkern._C``: checks, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from padkern.ops.launch import (
    address,
    check_optional,
    check_tensor,
    core,
    dense,
    dense_rows,
    float_code,
    raise_error,
)


def _matrix(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.stride(0)


def _check(x: Tensor, weight: Tensor) -> None:
    check_tensor("x", x, x.dtype, ("T", "in"))
    check_tensor("weight", weight, x.dtype, ("out", x.shape[1]))


def linear_native(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """``[T, out]``. CPU tensors of one dtype, float32 or float64.

    Raises:
        TypeError, ValueError: an argument does not fit the others.
    """
    code = float_code("x", x.dtype)
    _check(x, weight)
    check_optional("bias", bias, x.dtype, (weight.shape[0],))
    x, weight, bias = dense_rows(x), dense_rows(weight), dense(bias)
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    error = core().linear_cpu(
        (code, *x.shape, weight.shape[0]),
        relu,
        _matrix(x),
        _matrix(weight),
        address(bias),
        y.data_ptr(),
    )
    raise_error(error)
    return y


def linear_grad_native(
    d_y: Tensor, x: Tensor, weight: Tensor, y: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, weight and bias, empty where not ``wanted``; ``y`` is given with ReLU.

    Raises:
        TypeError, ValueError: an argument does not fit the others.
    """
    code = float_code("x", x.dtype)
    _check(x, weight)
    rows, out = x.shape[0], weight.shape[0]
    check_tensor("d_y", d_y, x.dtype, (rows, out))
    check_optional("y", y, x.dtype, (rows, out))
    if len(wanted) != 3:
        raise ValueError(f"wanted must hold 3 values, got {len(wanted)}")
    x, weight, d_y, y = dense_rows(x), dense_rows(weight), dense_rows(d_y), dense(y)
    shapes = (x.shape, weight.shape, (out,))
    outputs = [
        torch.empty(shape if want else (0,), dtype=x.dtype)
        for shape, want in zip(shapes, wanted, strict=True)
    ]
    error = core().linear_backward_cpu(
        (code, *x.shape, out),
        y is not None,
        _matrix(x),
        _matrix(weight),
        address(y),
        _matrix(d_y),
        tuple(t.data_ptr() if want else 0 for t, want in zip(outputs, wanted, strict=True)),
    )
    raise_error(error)
    return outputs[0], outputs[1], outputs[2]
