"""Launchers over ``padkern._C``: dense rows, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

from padkern import _native

_DTYPES = {torch.float32: 0, torch.float64: 1}


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _launch(
    rows: tuple[Tensor, ...],
    offsets: Tensor,
    scale: float,
    dropout: tuple[float, int, int],
    out: Tensor,
) -> Tensor:
    core, reason, _ = _native.load()
    if core is None:
        raise RuntimeError(reason)
    rows = tuple(_dense_rows(x.detach()) for x in rows)
    offsets = offsets.contiguous()
    error = core.short_attention_cpu(
        len(rows) == 4,
        (_DTYPES[out.dtype], *rows[0].shape, offsets.numel() - 1),
        [(x.data_ptr(), x.stride(0), x.stride(1)) for x in rows],
        offsets.data_ptr(),
        scale,
        dropout,
        out.data_ptr(),
    )
    if error:
        raise ValueError(error)
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
    """States ``[T, H, d]``. CPU tensors of one float dtype, sequences of at most 64 tokens."""
    out = torch.empty(q.shape, dtype=q.dtype)
    return _launch((q, k, v), offsets, scale, (dropout, seed, step), out)


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
    """Gradients by q, k and v, side by side: ``[T, 3, H, d]``."""
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, 3, heads, dim), dtype=q.dtype)
    return _launch((q, k, v, d_out), offsets, scale, (dropout, seed, step), out)
