"""Training rows as baskets: the distinct items of a user, without order or repeats."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from padkern.data.dataset import Ragged

_ENTRIES = 2**23  # of one block of co-occurrence counts
_PAIRS = 2**22  # of items of one user, counted in one go


def distinct(rows: Ragged, width: int) -> Ragged:
    """The distinct values of every row, ascending; values are below ``width``."""
    key = np.unique(rows.row_index() * width + rows.values)
    return Ragged.from_lengths(key % width, np.bincount(key // width, minlength=len(rows)))


def inverted(rows: Ragged, width: int) -> Ragged:
    """``width`` rows: row v holds the rows of ``rows`` with the value v, ascending."""
    order = np.argsort(rows.values, kind="stable")
    counts = np.bincount(rows.values, minlength=width)
    return Ragged.from_lengths(rows.row_index()[order], counts)


def cooccurrences(baskets: Ragged, width: int) -> Iterator[tuple[int, np.ndarray]]:
    """Numbers of baskets that hold both of two items, a block of rows at a time.

    Args:
        baskets: distinct items of every user, below ``width``.
        width: number of items.

    Yields:
        First item of the block, int64 ``[items of the block, width]`` counts.
    """
    owners = inverted(baskets, width)
    sizes = baskets.lengths[baskets.row_index()]
    pairs = np.bincount(baskets.values, weights=sizes, minlength=width)
    low, tallest = 0, max(1, _ENTRIES // width)
    while low < width:
        fitting = np.searchsorted(np.cumsum(pairs[low : low + tallest]), _PAIRS, side="right")
        high = min(low + max(1, int(fitting)), width)
        users = owners.take(np.arange(low, high))
        others = baskets.take(users.values)
        flat = np.repeat(users.row_index(), others.lengths) * width + others.values
        counts = np.bincount(flat, minlength=(high - low) * width)
        yield low, counts.reshape(high - low, width)
        low = high


def check_ids(rows: Ragged, num_items: int) -> None:
    """Raises ValueError for an item outside 1..num_items."""
    if len(rows.values):
        low, high = int(rows.values.min()), int(rows.values.max())
        if low < 1 or high > num_items:
            raise ValueError(f"train must hold item ids from 1 to {num_items}, got {low} to {high}")


def seen_items(train: Ragged, num_items: int) -> tuple[np.ndarray, Ragged]:
    """Ascending ids of the items of training, and every user's distinct items as places in them."""
    check_ids(train, num_items)
    if not len(train.values):
        raise ValueError("train must hold an interaction")
    ids = np.unique(train.values)
    return ids, known_items(train, ids)


def known_items(history: Ragged, ids: np.ndarray) -> Ragged:
    """Distinct items of every row that are among ``ids``, as places in it."""
    place = np.minimum(np.searchsorted(ids, history.values), len(ids) - 1)
    known = ids[place] == history.values
    counts = np.bincount(history.row_index()[known], minlength=len(history))
    return distinct(Ragged.from_lengths(place[known], counts), len(ids))
