"""Frequency bins of items, from training counts only."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from padkern.errors import DataError

__all__ = ["FrequencyBins", "frequency_bins"]


@dataclass(frozen=True, eq=False)
class FrequencyBins:
    """A bin for every item, hottest first.

    Attributes:
        item_bins: int64 ``[N + 1]``; 0 for padding, else 1..``num_bins``.
        num_bins: the highest bin index, the unseen bin included. A gate table needs
            ``num_bins + 1`` rows.
        edges: bin ``b`` holds positions ``edges[b - 1]`` to ``edges[b]`` (exclusive) of the items
            sorted by falling frequency; the last edge is N + 1, because padding is counted at the
            end, as in the paper.
        labels: ``labels[b]`` is the range of training counts of bin ``b``, such as ``"35-48"``;
            ``labels[0]`` is ``"padding"``, the unseen bin is ``"0"``, an empty bin ``"none"``.
        unseen_bin: index of the bin that holds exactly the items of frequency 0, or None when they
            share the last bin.
    """

    item_bins: np.ndarray
    num_bins: int
    edges: tuple[int, ...]
    labels: tuple[str, ...]
    unseen_bin: int | None


def frequency_bins(
    train_frequency: np.ndarray,
    num_bins: int = 10,
    *,
    unseen: Literal["own", "last"] = "own",
) -> FrequencyBins:
    """Cut the items into bins of about equal training mass.

    Items are sorted by (falling frequency, rising id) and added to a bin until the bin's own mass
    reaches ``total / num_bins``; then the next bin starts from zero. The last bin takes the rest.
    This greedy rule reproduces the edges in the released code of PAD (arXiv 2412.04107); cutting
    at global deciles does not.

    Args:
        train_frequency: integer counts ``[N + 1]``, index 0 (padding) ignored.
        num_bins: bins among the items seen in training (``unseen="own"``) or among all items.
        unseen: ``"own"`` puts items of frequency 0 into bin ``num_bins + 1``, which exists even
            when it is empty; ``"last"`` leaves them in the last bin, as the paper does.

    Returns:
        The bins; with few items the colder ones may be empty, their number does not change.

    Raises:
        ValueError: on a wrong shape, dtype, negative count, ``num_bins`` or ``unseen``.
        DataError: if no item has a training interaction.
    """
    counts = np.asarray(train_frequency)
    if counts.ndim != 1 or counts.size < 2 or not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(
            "train_frequency must be a 1-D integer array of num_items + 1 counts, "
            f"got {counts.dtype}{list(counts.shape)}"
        )
    if counts[1:].min() < 0:
        raise ValueError("train_frequency must not be negative")
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    if unseen not in ("own", "last"):
        raise ValueError(f'unseen must be "own" or "last", got {unseen!r}')
    frequency = counts[1:].astype(np.int64)
    if not frequency.any():
        raise DataError("no warm item: no item has a training interaction")

    order = np.argsort(-frequency, kind="stable")
    mass = np.cumsum(frequency[order])
    total = int(mass[-1])
    edges = [0]
    for _ in range(num_bins - 1):
        start = edges[-1]
        done = int(mass[start - 1]) if start else 0
        # Integers only: own mass >= total / num_bins, without rounding.
        need = done + -(-total // num_bins)
        edges.append(min(int(np.searchsorted(mass, need, side="left")) + 1, frequency.size))
    if unseen == "own":
        seen = int(np.count_nonzero(frequency))
        edges = [min(edge, seen) for edge in edges] + [seen]
    edges.append(frequency.size + 1)

    highest = len(edges) - 1
    item_bins = np.zeros(counts.size, dtype=np.int64)
    positions = np.arange(frequency.size)
    item_bins[1 + order] = np.searchsorted(np.array(edges[1:-1]), positions, side="right") + 1
    labels = ["padding"]
    for low, high in itertools.pairwise(edges):
        members = frequency[order[low : min(high, frequency.size)]]
        if unseen == "own" and len(labels) == highest:
            labels.append("0")
        elif not members.size:
            labels.append("none")
        else:
            least, most = int(members.min()), int(members.max())
            labels.append(str(most) if least == most else f"{least}-{most}")
    return FrequencyBins(
        item_bins, highest, tuple(edges), tuple(labels), highest if unseen == "own" else None
    )
