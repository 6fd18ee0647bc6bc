"""Launchers over ``padkern._C``: checks, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from padkern.ops.keyed_dropout import check_dropout
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


def _matrix(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else dense_rows(x)


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

    Raises:
        TypeError, ValueError: an argument does not fit the others, or is out of range.
    """
    dtype, norms = x.dtype, weight is not None
    code = float_code("x", dtype)
    check_tensor("x", x, dtype, ("T", "d"))
    rows, dim = x.shape
    check_optional("residual", residual, dtype, x.shape)
    check_optional("bias", bias, dtype, (dim,))
    check_optional("weight", weight, dtype, (dim,))
    check_optional("shift", shift, dtype, (dim,))
    check_optional("token_ids", token_ids, torch.int64, (rows,))
    if norms != (shift is not None):
        raise ValueError("weight and shift must be given together")
    check_dropout(dropout, seed, step)
    x_rows, residual = dense_rows(x), _rows(residual)
    bias, weight, shift, token_ids = dense(bias), dense(weight), dense(shift), dense(token_ids)
    out = torch.empty((rows, dim) if norms else (0,), dtype=dtype)
    total = torch.empty((rows, dim) if keep or not norms else (0,), dtype=dtype)
    stats = torch.empty((rows, 2) if keep and norms else (0,), dtype=dtype)
    error = core().dropout_add_norm_cpu(
        (code, rows, dim),
        eps,
        (dropout, seed, step),
        (address(token_ids), address(weight)),
        (_matrix(x_rows), _matrix(residual)),
        (address(bias), address(shift)),
        (
            total.data_ptr() if keep or not norms else 0,
            out.data_ptr() if norms else 0,
            stats.data_ptr() if keep and norms else 0,
        ),
    )
    raise_error(error)
    return out, total, stats


def dropout_add_norm_grad_native(
    d_out: Tensor | None,
    d_sum: Tensor | None,
    total: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    token_ids: Tensor | None,
    dropout: float,
    seed: int,
    step: int,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by x, residual, bias, weight and shift.

    The first is empty without dropout: it is then the second. The others are empty where there is
    nothing to differentiate by. ``stats`` is read where there is a weight.

    Raises:
        TypeError, ValueError: as there.
    """
    dtype, norms = total.dtype, weight is not None
    code = float_code("total", dtype)
    check_tensor("total", total, dtype, ("T", "d"))
    rows, dim = total.shape
    check_tensor("stats", stats, dtype, (rows, 2) if norms else (0,))
    check_optional("weight", weight, dtype, (dim,))
    check_optional("d_out", d_out, dtype, total.shape)
    check_optional("d_sum", d_sum, dtype, total.shape)
    check_optional("token_ids", token_ids, torch.int64, (rows,))
    if d_out is not None and not norms:
        raise ValueError("d_out must be None without a weight")
    check_dropout(dropout, seed, step)
    weight, token_ids = dense(weight), dense(token_ids)
    d_out, d_sum = _rows(d_out), _rows(d_sum)
    total, stats = total.contiguous(), stats.contiguous()
    d_x = torch.empty((rows, dim) if dropout else (0,), dtype=dtype)
    d_residual = torch.empty((rows, dim), dtype=dtype)
    d_bias = torch.empty((dim,) if with_bias else (0,), dtype=dtype)
    d_weight, d_shift = (torch.empty((dim,) if norms else (0,), dtype=dtype) for _ in range(2))
    error = core().dropout_add_norm_backward_cpu(
        (code, rows, dim),
        (dropout, seed, step),
        (address(token_ids), address(weight)),
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
    raise_error(error)
    return d_x, d_residual, d_bias, d_weight, d_shift
