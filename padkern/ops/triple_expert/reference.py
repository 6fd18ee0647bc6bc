"""Gated expert score and its binary cross-entropy in plain torch: the oracle and the export path.

``README.md`` derives the forward and all gradients. Works in float32 and float64 on any device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_score_ref(
    users: Tensor, item_tables: Tensor, gate: Tensor, item_bins: Tensor, candidates: Tensor
) -> Tensor:
    """Scores ``sum_e gate[bin(i), e] <users[t, e], item_tables[e, i]>`` of the candidates.

    Args:
        users: float ``[T, E, d]``, one state per token and expert.
        item_tables: float ``[E, N + 1, d]``, one table per expert.
        gate: float ``[bins + 1, E]`` gate weights, row b for the items of bin b.
        item_bins: int64 ``[N + 1]`` in ``0..bins``.
        candidates: int64 ``[T, C]`` rows of the tables.

    Returns:
        ``[T, C]``, dtype of the inputs.
    """
    items = item_tables[:, candidates]  # [E, T, C, d]
    # Products and sums, not a matmul: autocast must not lower the precision of a score.
    parts = (users.transpose(0, 1)[:, :, None] * items).sum(-1)  # [E, T, C]
    weights = gate[item_bins[candidates]]  # [T, C, E]
    return (parts.permute(1, 2, 0) * weights).sum(-1)


def gated_bce_loss_ref(
    users: Tensor,
    item_tables: Tensor,
    gate: Tensor,
    item_bins: Tensor,
    positives: Tensor,
    negatives: Tensor,
    valid: Tensor | None = None,
    positive_weight: float = 1.0,
) -> Tensor:
    """``w mean softplus(-s+) + mean softplus(s-)`` over the valid tokens and their negatives.

    Args:
        users, item_tables, gate, item_bins: as in `gated_score_ref`.
        positives: int64 ``[T]``, the item of each token.
        negatives: int64 ``[T, k]``, k >= 1 sampled items of each token.
        valid: bool ``[T]``, tokens that count; None for all.
        positive_weight: w.

    Returns:
        Scalar, dtype of the inputs; 0 without a valid token.
    """
    candidates = torch.cat([positives[:, None], negatives], 1)
    if valid is not None:
        # Rows are selected before anything is computed: a masked row may hold NaN, and its
        # gradient is exactly 0.
        users = torch.where(valid[:, None, None], users, torch.zeros_like(users))
    scores = gated_score_ref(users, item_tables, gate, item_bins, candidates)
    # softplus(x) = -logsigmoid(-x); torch's own softplus is only linear above 20.
    positive = positive_weight * -F.logsigmoid(scores[:, 0])
    negative = -F.logsigmoid(-scores[:, 1:]).mean(1)
    if valid is None:
        return (positive + negative).sum() / max(len(positives), 1)
    zero = torch.zeros_like(positive)
    total = torch.where(valid, positive + negative, zero).sum()
    return total / valid.sum().clamp_min(1)
