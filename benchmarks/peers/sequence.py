"""Short attention, ranking and segment sums on a GPU as people write them in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def padded_sdpa(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, width: int) -> Tensor:
    """``scaled_dot_product_attention`` on a grid with the sequences at its left: causal alone then
    keeps empty slots away."""
    tokens, heads, dim = q.shape
    sequences = offsets.numel() - 1
    index = torch.arange(tokens, device=q.device)
    row = torch.bucketize(index, offsets[1:], right=True)
    place = row * width + index - offsets[row]

    def grid(x: Tensor) -> Tensor:
        padded = x.new_zeros(sequences * width, heads, dim).index_copy(0, place, x)
        return padded.view(sequences, width, heads, dim).transpose(1, 2)

    y = F.scaled_dot_product_attention(grid(q), grid(k), grid(v), is_causal=True)
    return y.transpose(1, 2).reshape(sequences * width, heads, dim)[place]


def varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, width: int) -> Tensor:
    """``torch.nn.attention.varlen.varlen_attn``: half inputs, no dropout."""
    from torch.nn.attention.varlen import varlen_attn

    cuts = offsets.to(torch.int32)
    return varlen_attn(q, k, v, cuts, cuts, width, width, window_size=(-1, 0))


def _chunks(states: Tensor, offsets: Tensor, chunk: int):
    users = torch.arange(len(states), device=states.device)
    rows = torch.repeat_interleave(users, offsets.diff())
    cuts = offsets.tolist()
    for low in range(0, len(states), chunk):
        high = min(low + chunk, len(states))
        part = slice(cuts[low], cuts[high])
        yield slice(low, high), part, rows[part] - low


def mm_count(
    states: Tensor, matrix: Tensor, targets: Tensor, seen: Tensor, offsets: Tensor, chunk: int
) -> Tensor:
    """Ranks by product, mask and count, in chunks of users."""
    ranks = []
    for users, part, rows in _chunks(states, offsets, chunk):
        scores = states[users] @ matrix.T
        own = scores.gather(1, targets[users, None])
        scores[:, 0] = torch.nan
        scores[rows, seen[part]] = torch.nan
        masked = scores.gather(1, targets[users, None])[:, 0].isnan()
        count = 0.5 + (scores > own).sum(1) + 0.5 * (scores == own).sum(1)
        ranks.append(torch.where(masked, torch.inf, count))
    return torch.cat(ranks)


def mm_topk(
    states: Tensor, matrix: Tensor, seen: Tensor, offsets: Tensor, k: int, chunk: int
) -> Tensor:
    """Ids of the best items by product, mask and ``topk``."""
    best = []
    for users, part, rows in _chunks(states, offsets, chunk):
        scores = states[users] @ matrix.T
        scores[:, 0] = -torch.inf
        scores[rows, seen[part]] = -torch.inf
        best.append(scores.topk(k).indices)
    return torch.cat(best)
