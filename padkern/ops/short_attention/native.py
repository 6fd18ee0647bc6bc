"""Launchers over ``padkern._C``: checks, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from padkern.ops.keyed_dropout import check_dropout
from padkern.ops.launch import check_tensor, core, dense_rows, float_code, raise_error


def _check(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> None:
    dtype = q.dtype
    check_tensor("q", q, dtype, ("T", "H", "d"))
    check_tensor("k", k, dtype, q.shape)
    check_tensor("v", v, dtype, q.shape)
    check_tensor("offsets", offsets, torch.int64, ("B + 1",))
    if offsets.shape[0] == 0:
        raise ValueError(f"offsets must have shape [B + 1], got {list(offsets.shape)}")


def _launch(
    code: int,
    rows: tuple[Tensor, ...],
    offsets: Tensor,
    scale: float,
    dropout: tuple[float, int, int],
    out: Tensor,
) -> Tensor:
    check_dropout(*dropout)
    rows = tuple(dense_rows(x) for x in rows)
    offsets = offsets.contiguous()
    error = core().short_attention_cpu(
        len(rows) == 4,
        (code, *rows[0].shape, offsets.shape[0] - 1),
        [(x.data_ptr(), x.stride(0), x.stride(1)) for x in rows],
        offsets.data_ptr(),
        scale,
        dropout,
        out.data_ptr(),
    )
    raise_error(error)
    return out


def short_attention_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    scale: float,
    dropout: float,
    seed: int,
    step: int,
) -> Tensor:
    """States ``[T, H, d]``. CPU tensors of one float dtype, sequences of at most 64 tokens.

    Raises:
        TypeError, ValueError: an argument does not fit the others, or is out of range.
    """
    code = float_code("q", q.dtype)
    _check(q, k, v, offsets)
    out = torch.empty(q.shape, dtype=q.dtype)
    return _launch(code, (q, k, v), offsets, scale, (dropout, seed, step), out)


def short_attention_grad_native(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    scale: float,
    dropout: float,
    seed: int,
    step: int,
) -> Tensor:
    """Gradients by q, k and v, side by side: ``[T, 3, H, d]``.

    Raises:
        TypeError, ValueError: as there.
    """
    code = float_code("q", q.dtype)
    _check(q, k, v, offsets)
    check_tensor("d_out", d_out, q.dtype, q.shape)
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, 3, heads, dim), dtype=q.dtype)
    return _launch(code, (q, k, v, d_out), offsets, scale, (dropout, seed, step), out)
