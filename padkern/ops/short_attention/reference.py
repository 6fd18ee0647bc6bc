"""Causal attention within packed sequences in plain torch: the oracle and the way off the CPU."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from padkern.ops.keyed_dropout import attention_keep


def short_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    step: int = 0,
    longest: int | None = None,
    fused: bool = False,
) -> Tensor:
    """:func:`padkern.ops.short_attention.short_attention` on a padded grid, tokens first.

    Args:
        q, k, v: float ``[T, H, d]``.
        offsets: int64 ``[B + 1]``, cumulative lengths.
        scale: of the scores, default ``d ** -0.5``.
        dropout, seed, step: of the probabilities.
        longest: upper bound of the lengths; default: read from the offsets.
        fused: ``scaled_dot_product_attention`` on the grid where there is no dropout.

    Returns:
        ``[T, H, d]``, dtype of the inputs.
    """
    tokens, heads, dim = q.shape
    sequences = offsets.numel() - 1
    if tokens == 0 or sequences == 0:
        return q * k * v
    if longest is None:
        longest = tokens if torch.compiler.is_compiling() else int(offsets.diff().max())
    index = torch.arange(tokens, device=q.device)
    row = torch.bucketize(index, offsets[1:].contiguous(), right=True)
    place = row * longest + index - offsets[row]

    def grid(x: Tensor) -> Tensor:
        padded = x.new_zeros(sequences * longest, heads, dim).index_copy(0, place, x)
        return padded.view(sequences, longest, heads, dim).transpose(1, 2)

    if fused and not dropout:
        y = F.scaled_dot_product_attention(grid(q), grid(k), grid(v), is_causal=True, scale=scale)
        return y.transpose(1, 2).reshape(sequences * longest, heads, dim)[place]
    scores = grid(q) @ grid(k).transpose(2, 3) * (dim**-0.5 if scale is None else scale)
    # Empty slots are no queries: against an infinite key they would turn its gradient into NaN.
    real = torch.zeros(sequences * longest, dtype=torch.bool, device=q.device)
    real = real.index_fill(0, place, True).view(sequences, 1, longest, 1)
    scores = scores.masked_fill(~real, 0.0)
    later = torch.ones(longest, longest, dtype=torch.bool, device=q.device).triu(1)
    weights = torch.softmax(scores.masked_fill(later, -torch.inf), 3)
    if dropout:
        numbers = torch.arange(sequences, device=q.device)
        keep = attention_keep(dropout, seed, step, numbers, heads, longest)
        weights = weights * (keep.to(weights.dtype) / (1.0 - dropout))
    return (weights @ grid(v)).transpose(1, 2).reshape(sequences * longest, heads, dim)[place]


def long_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float | None = None
) -> Tensor:
    """The same without dropout by ``scaled_dot_product_attention``, one sequence at a time."""
    parts = []
    cuts = offsets.tolist()
    for first, last in pairwise(cuts):
        a, b, c = (x[first:last].transpose(0, 1)[None] for x in (q, k, v))
        y = F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale)
        parts.append(y[0].transpose(0, 1))
    return torch.cat(parts) if parts else q * k * v
