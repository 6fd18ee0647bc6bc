"""Launchers over ``padkern._C``: dense rows, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from padkern import _native

_DTYPES = {torch.float32: 0, torch.float64: 1}


def _rows(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _matrix(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def dropout_add_norm_native(
    x: Tensor,
    residual: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    token_ids: Tensor | None,
    eps: float,
    dropout: float,
    seed: int,
    step: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out ``[T, d]``, sum ``[T, d]``, mean and reciprocal deviation ``[T, 2]``).

    Without ``weight`` there is no normalisation and out is empty; the other two are given where
    ``keep`` says so, or where there is nothing else to give. CPU tensors of one float dtype.
    """
    core, reason, _ = _native.load()
    if core is None:
        raise RuntimeError(reason)
    rows, dim = x.shape
    dtype, norms = x.dtype, weight is not None
    x_rows, residual = _rows(x), _rows(residual)
    bias, weight, shift, token_ids = (_vector(v) for v in (bias, weight, shift, token_ids))
    out = torch.empty((rows, dim) if norms else (0,), dtype=dtype)
    total = torch.empty((rows, dim) if keep or not norms else (0,), dtype=dtype)
    stats = torch.empty((rows, 2) if keep and norms else (0,), dtype=dtype)
    error = core.dropout_add_norm_cpu(
        (_DTYPES[dtype], rows, dim, eps),
        (dropout, seed, step),
        (_address(token_ids), _address(weight)),
        (_matrix(x_rows), _matrix(residual)),
        (_address(bias), _address(shift)),
        (
            total.data_ptr() if keep or not norms else 0,
            out.data_ptr() if norms else 0,
            stats.data_ptr() if keep and norms else 0,
        ),
    )
    if error:
        raise ValueError(error)
    return out, total, stats


def dropout_add_norm_grad_native(
    d_out: Tensor | None,
    d_sum: Tensor | None,
    total: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    token_ids: Tensor | None,
    eps: float,
    dropout: float,
    seed: int,
    step: int,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by x, residual, bias, weight and shift.

    The first is empty without dropout: it is then the second. The others are empty where there is
    nothing to differentiate by.
    """
    core, reason, _ = _native.load()
    if core is None:
        raise RuntimeError(reason)
    rows, dim = total.shape
    dtype, norms = total.dtype, weight is not None
    weight, token_ids = _vector(weight), _vector(token_ids)
    d_out, d_sum = _rows(d_out), _rows(d_sum)
    total, stats = total.contiguous(), stats.contiguous()
    d_x = torch.empty((rows, dim) if dropout else (0,), dtype=dtype)
    d_residual = torch.empty((rows, dim), dtype=dtype)
    d_bias = torch.empty((dim,) if with_bias else (0,), dtype=dtype)
    d_weight, d_shift = (torch.empty((dim,) if norms else (0,), dtype=dtype) for _ in range(2))
    error = core.dropout_add_norm_backward_cpu(
        (_DTYPES[dtype], rows, dim, eps),
        (dropout, seed, step),
        (_address(token_ids), _address(weight)),
        (_matrix(d_out), _matrix(d_sum)),
        (total.data_ptr(), stats.data_ptr()),
        (
            d_x.data_ptr() if dropout else 0,
            d_residual.data_ptr(),
            d_bias.data_ptr() if with_bias else 0,
            d_weight.data_ptr() if norms else 0,
            d_shift.data_ptr() if norms else 0,
        ),
    )
    if error:
        raise ValueError(error)
    return d_x, d_residual, d_bias, d_weight, d_shift
