"""Rows sorted by class, the form in which class-conditional losses are computed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ClassRows(NamedTuple):
    """One sample sorted by class; rows of no class, or of one that is not used, come last.

    Attributes:
        rows: ``[n, D]``; the rows at the end are 0, so that nothing in them matters.
        weight: ``[n]`` or None.
        offsets: ``[C + 1]`` int64: the first row of each class, then the end of the last one.
    """

    rows: Tensor
    weight: Tensor | None
    offsets: Tensor


def usable(labels: Tensor, weight: Tensor | None, num_classes: int) -> Tensor:
    """bool [n]: rows that have a class and are not masked."""
    mask = (labels >= 0) & (labels < num_classes)
    return mask if weight is None else mask & (weight != 0)


def class_counts(labels: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """int64 [C]: rows of each class under the mask. Never waits for the device."""
    bins = torch.where(mask, labels, num_classes)
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=labels.device)
    return counts.scatter_add(0, bins, torch.ones_like(bins))[:-1]


def sort_by_class(
    rows: Tensor, labels: Tensor, mask: Tensor, weight: Tensor | None, keep: Tensor
) -> ClassRows:
    """Sorts the rows under the mask by class; ``keep`` is bool [C], the classes that are used."""
    num_classes = keep.shape[0]
    used = mask & keep[torch.where(mask, labels, 0)]
    counts = class_counts(labels, used, num_classes)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    order = torch.argsort(torch.where(used, labels, num_classes), stable=True)
    used = used[order]
    sorted_rows = torch.where(used[:, None], rows.index_select(0, order), 0)
    sorted_weight = None
    if weight is not None:  # masked_fill keeps bool weights bool
        sorted_weight = weight.index_select(0, order).masked_fill(~used, 0)
    return ClassRows(sorted_rows, sorted_weight, offsets)
