"""Few shapes for many batches: a plan filled up, for CUDA graphs and static compilation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from padkern.data.batch import PackedSequences

if TYPE_CHECKING:
    from padkern.data.plan import BatchPlan

__all__ = ["bucketed"]


def bucketed(plan: BatchPlan, max_len: int, bucket: int) -> BatchPlan:
    """The same batch with numbers of tokens and items that are multiples of ``bucket``.

    What is added lies behind: sequences of padding tokens, and items with no slot, the last of
    which is where all padding tokens point. ``valid`` is true for the batch's own tokens, and the
    loss reads these alone, so value and gradients are those of ``plan``. The number of sequences
    grows by the same number for every batch of a bucket, and the grid is ``max_len`` wide, so that
    batches of as many users differ in T and U alone.

    Args:
        plan: not bucketed yet.
        max_len: longest sequence.
        bucket: at least 1.

    Raises:
        ValueError: ``bucket`` or ``max_len`` is below 1, or ``plan`` has buckets already.
    """
    if bucket < 1:
        raise ValueError(f"bucket must be at least 1, got {bucket}")
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1, got {max_len}")
    if plan.valid is not None:
        raise ValueError("plan must not have been bucketed before")
    tokens, items = len(plan.targets), len(plan.unique)
    more = -tokens % bucket
    whole = -(-(items + 1) // bucket) * bucket  # at least one row for the padding
    last = whole - 1
    filler = int(plan.unique[0]) if items else 0

    def tokenwise(x: Tensor, value: int) -> Tensor:
        return F.pad(x, (*[0] * (2 * x.ndim - 1), more), value=value)

    def itemwise(x: Tensor, value: int) -> Tensor:
        return F.pad(x, (0, whole - items), value=value)

    count = plan.negatives.shape[1]
    starts, slots = [], []
    for role, begins in enumerate(plan.starts):
        # The last row owns the padding tokens' slots, the others behind the batch's own have none.
        used, added = int(begins[-1]), more * (count if role == 2 else 1)
        begins = F.pad(begins, (0, whole - items - 1), value=used)
        starts.append(F.pad(begins, (0, 1), value=used + added))
        slots.append(torch.cat([plan.slots[role], torch.arange(used, used + added)]))
    return replace(
        plan,
        inputs=_filled(plan.inputs, more, max_len, bucket, filler),
        targets=tokenwise(plan.targets, filler),
        negatives=tokenwise(plan.negatives, filler),
        unique=itemwise(plan.unique, filler),
        input_rows=tokenwise(plan.input_rows, last),
        target_rows=tokenwise(plan.target_rows, last),
        negative_rows=tokenwise(plan.negative_rows, last),
        starts=(starts[0], starts[1], starts[2]),
        slots=(slots[0], slots[1], slots[2]),
        bins=itemwise(plan.bins, 0),
        counts=itemwise(plan.counts, 0),
        valid=torch.arange(tokens + more) < tokens,
    )


def _filled(
    inputs: PackedSequences, more: int, max_len: int, bucket: int, filler: int
) -> PackedSequences:
    """The inputs and ``more`` padding tokens in sequences of their own, some of them empty."""
    extra = -(-(bucket - 1) // max_len)
    ends = len(inputs.items) + torch.arange(1, extra + 1).mul(max_len).clamp_max(more)
    offsets = torch.cat([inputs.offsets, ends])
    lengths = offsets.diff()
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    within = torch.arange(int(offsets[-1])) - offsets[:-1][rows]
    return PackedSequences(
        F.pad(inputs.items, (0, more), value=filler),
        offsets,
        max_len - lengths[rows] + within,
        rows * max_len + within,
        max_len,
        inputs.key,
    )
