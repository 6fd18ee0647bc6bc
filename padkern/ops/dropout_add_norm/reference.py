"""Dropout, residual sum and layer normalisation in plain torch: the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from padkern.ops.keyed_dropout import channel_keep


def keyed_dropout_ref(
    x: Tensor, dropout: float, *, seed: int = 0, step: int = 0, token_ids: Tensor | None = None
) -> Tensor:
    """``x`` with every element dropped or scaled by 1 / (1 - dropout).

    Args:
        x: ``[T, d]``.
        dropout: probability in [0, 1).
        seed, step: which draw.
        token_ids: int64 ``[T]`` >= 0, default 0, 1, ...

    Returns:
        ``[T, d]``.
    """
    if not dropout:
        return x
    if token_ids is None:
        token_ids = torch.arange(x.shape[0], device=x.device)
    keep = channel_keep(dropout, seed, step, token_ids, x.shape[1])
    return x * (keep.to(x.dtype) / (1.0 - dropout))


def dropout_add_norm_ref(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    step: int = 0,
    token_ids: Tensor | None = None,
    eps: float = 1e-5,
    return_sum: bool = False,
    exact: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`padkern.ops.dropout_add_norm.dropout_add_norm` step by step.

    Args:
        x, residual: float ``[T, d]``; no residual counts as 0.
        weight, shift, bias: ``[d]``.
        dropout, seed, step, token_ids: as in :func:`keyed_dropout_ref`.
        eps: added to the variance.
        return_sum: also give the sum that is normalised.
        exact: normalise in float64, so that no square overflows; else as ``layer_norm`` does.

    Returns:
        ``[T, d]``, or that and the sum.
    """
    total = keyed_dropout_ref(
        x if bias is None else x + bias, dropout, seed=seed, step=step, token_ids=token_ids
    )
    if residual is not None:
        total = total + residual
    if exact:
        wide = total.double()
        centred = wide - wide.mean(1, keepdim=True)
        unit = centred / (centred.square().mean(1, keepdim=True) + eps).sqrt()
        out = (unit * weight.double() + shift.double()).to(total.dtype)
    else:
        out = F.layer_norm(total, weight.shape, weight, shift, eps)
    return (out, total) if return_sum else out
