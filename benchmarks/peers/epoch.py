"""Whole training epochs in the forms that users run: how each makes its batches.

Every ``*_batches`` function yields (batch, users, tokens) until the users are through. Like
padkern's planner, all make the next batch in a thread while the present one is used, which is what
the workers of a data loader are for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from padkern.data.batch import pack
from padkern.data.dataset import Ragged
from padkern.data.plan import BatchPlan, PlanSource, TrainBatches

from .training import Batch

Part, Made = TypeVar("Part"), TypeVar("Made")
Step = tuple[Batch, int, int]


class Data(NamedTuple):
    """Training rows and what batches are made with.

    Attributes:
        train: one row per user, each of two items or more.
        text: ``[N + 1, E]``, row 0 zero.
        bins: int64 ``[N + 1]``.
        length: inputs per user.
        batch: users per batch.
    """

    train: Ragged
    text: Tensor
    bins: np.ndarray
    length: int
    batch: int

    @property
    def num_items(self) -> int:
        return len(self.text) - 1

    def parts(self, seed: int) -> list[np.ndarray]:
        """The users of every batch of an epoch, in the order of a seed."""
        order = np.random.default_rng(seed).permutation(len(self.train))
        return [order[low : low + self.batch] for low in range(0, len(order), self.batch)]

    def source(self) -> PlanSource:
        """padkern's view of it; as released, every item may be a negative."""
        return PlanSource(
            self.train,
            num_items=self.num_items,
            max_len=self.length,
            item_bins=self.bins,
            candidates=np.arange(1, self.num_items + 1),
        )


def ahead(make: Callable[[Part], Made], parts: Iterable[Part]) -> Iterator[Made]:
    """``make`` of every part in order, each in a thread while the one before is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for part in parts:
            following = pool.submit(make, part)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def padkern_batches(batches: TrainBatches, seed: int) -> Iterator[tuple[BatchPlan, int, int]]:
    """padkern's own, with keyed dropout as :func:`padkern.pad.trainer.fit` trains."""
    for step, plan in enumerate(batches.epoch(seed)):
        yield plan.keyed(seed, step), len(plan.users), plan.targets.numel()


def packed_batches(data: Data, seed: int) -> Iterator[Step]:
    """Packed batches made with numpy; a batch's negatives drawn at once, redrawn where owned."""
    rng = np.random.default_rng(seed)
    rows = data.num_items + 1
    owned = np.unique(data.train.row_index() * rows + data.train.values)

    def make(users: np.ndarray) -> Step:
        window = data.train.take(users).tail(data.length + 1)
        lengths = window.lengths - 1
        first = np.zeros(len(window.values), dtype=bool)
        last = first.copy()
        first[window.offsets[:-1]] = last[window.offsets[1:] - 1] = True
        offsets = np.zeros(len(users) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        owner = np.repeat(users, lengths) * rows
        negatives = rng.integers(1, rows, offsets[-1])
        bad = np.ones(len(negatives), dtype=bool)
        while bad.any():
            keys = owner[bad] + negatives[bad]
            place = np.minimum(np.searchsorted(owned, keys), len(owned) - 1)
            bad[bad] = owned[place] == keys
            negatives[bad] = rng.integers(1, rows, int(bad.sum()))
        inputs = torch.from_numpy(window.values[~last])
        packed = pack(inputs, torch.from_numpy(offsets), data.length)
        targets = torch.from_numpy(window.values[~first])
        none = torch.zeros(0)
        batch = Batch(None, packed, targets, torch.from_numpy(negatives), none, none, none)
        return batch, len(users), len(targets)

    return ahead(make, data.parts(seed))


def authors_slots(
    row: list[int], length: int, num_items: int, rng: random.Random, negatives: int = 1
) -> tuple[list[int], list[list[int]]]:
    """One user as PAD's released data set makes it: left-padded items, and negatives per target.

    A negative is drawn again while the user owns it. Both lists have ``length + 1`` entries; the
    negatives stand in the slot of their target.
    """
    window = row[-(length + 1) :]
    drawn = []
    for _ in range(len(window) - 1):
        found = []
        for _ in range(negatives):
            item = rng.randint(1, num_items)
            while item in row:
                item = rng.randint(1, num_items)
            found.append(item)
        drawn.append(found)
    padding = length + 1 - len(window)
    return [0] * padding + window, [[0] * negatives for _ in range(padding + 1)] + drawn


def authors_batches(data: Data, seed: int) -> Iterator[Step]:
    """Padded batches: user by user in Python, text vectors of all slots gathered and stacked."""
    rng = random.Random(seed)
    rows = [data.train.row(user).tolist() for user in range(len(data.train))]

    def sample(user: int) -> tuple[Tensor, Tensor, Tensor]:
        slots, other = authors_slots(rows[user], data.length, data.num_items, rng)
        items, negatives = torch.tensor(slots), torch.tensor(other)[:, 0]
        return items, negatives, data.text[torch.stack([items, negatives], 1)]

    def make(users: np.ndarray) -> Step:
        parts = zip(*(sample(int(user)) for user in users), strict=True)
        slots, other, features = (torch.stack(part) for part in parts)
        none = torch.zeros(0, dtype=torch.int64)
        batch = Batch(None, None, none, none, slots, other, features)
        return batch, len(users), int((slots[:, :-1] > 0).sum())

    return ahead(make, data.parts(seed))


def packed_from_slots(slots: Tensor, other: Tensor, length: int) -> tuple:
    """Packed inputs, targets and negatives ``[T]`` of left-padded batches."""
    inside = slots[:, :-1] > 0
    offsets = torch.zeros(len(slots) + 1, dtype=torch.int64)
    torch.cumsum(inside.sum(1), 0, out=offsets[1:])
    packed = pack(slots[:, :-1][inside], offsets, length)
    return packed, slots[:, 1:][inside], other[:, 1:][inside]
