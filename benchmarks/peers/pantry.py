"""Prime Pantry for the benchmarks of whole epochs and evaluations, or users of its shape."""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from padkern.data import Dataset, EvalSplit, Ragged, leave_one_out, resolve_dataset
from padkern.data.bins import frequency_bins

# Users by number of training inputs, 1 to 20; a whole history is 3 longer (last input's target,
# validation, test).
HISTOGRAM = [0, 3503, 2089, 1520, 1128, 828, 624, 473, 396, 311]
HISTOGRAM += [230, 252, 163, 158, 109, 111, 103, 103, 697, 73]
USERS, ITEMS, LENGTH = 12871, 8347, 20


class Pantry(NamedTuple):
    """What training and evaluation read.

    Attributes:
        name: ``"prime_pantry"``, or ``"synthetic"``.
        train: training rows, one per user.
        test: histories and targets of the test split.
        frequency: int64 ``[N + 1]`` training counts.
        bins: int64 ``[N + 1]`` ten bins of equal training mass, as released.
    """

    name: str
    train: Ragged
    test: EvalSplit
    frequency: np.ndarray
    bins: np.ndarray


def load() -> Pantry:
    """The data set under ``PADKERN_DATA``; without the variable, synthetic users."""
    if not os.environ.get("PADKERN_DATA"):
        return synthetic(USERS)
    from padkern.data import read_dataset

    return _split(read_dataset(resolve_dataset("prime_pantry")))


def lengths_like(histogram: list[int], users: int, seed: int) -> np.ndarray:
    """Input lengths 1, 2, ... drawn with the frequencies of a histogram."""
    share = np.asarray(histogram, dtype=np.float64)
    rng = np.random.default_rng(seed)
    return rng.choice(len(histogram), size=users, p=share / share.sum()) + 1


def synthetic(users: int, items: int = ITEMS, *, seed: int = 0) -> Pantry:
    """Users whose history lengths follow Prime Pantry's, over items of Zipf-like popularity."""
    rng = np.random.default_rng([users, items, seed])
    lengths = lengths_like(HISTOGRAM, users, seed) + 3
    weights = 1 / (np.arange(items) + 30.0)
    values = rng.choice(items, int(lengths.sum()), p=weights / weights.sum())
    return _split(
        Dataset(
            "synthetic",
            [str(user) for user in range(users)],
            ["", *(str(item) for item in range(items))],
            Ragged.from_lengths(1 + rng.permutation(items)[values], lengths),
            None,
            [""] * (items + 1),
        )
    )


def _split(dataset: Dataset) -> Pantry:
    split = leave_one_out(dataset)
    bins = frequency_bins(split.train_frequency, unseen="last").item_bins
    return Pantry(dataset.name, split.train, split.test, split.train_frequency, bins)
