"""Sums of rows over segments in plain torch: the oracle, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_rows(slots: Tensor, starts: Tensor) -> Tensor:
    """``[S]`` int64 number of the segment that each entry of ``slots`` belongs to."""
    place = torch.arange(slots.numel(), device=slots.device)
    return torch.bucketize(place, starts[1:].contiguous(), right=True)


def segment_sum_ref(values: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
    """``out[u] = sum of values[slots[s]] over s in [starts[u], starts[u + 1])``.

    Args:
        values: float ``[T, d]``.
        slots: int64 ``[S]`` rows of ``values``.
        starts: int64 ``[U + 1]``, from 0 to S.

    Returns:
        ``[U, d]``, dtype of ``values``.
    """
    out = values.new_zeros(starts.numel() - 1, values.shape[1])
    return out.index_add(0, segment_rows(slots, starts), values.index_select(0, slots))
