"""Packed batches of sequences, and the order in which training visits them.

A packed batch holds real tokens only: item ids of all sequences one after the other, with
cumulative lengths. About 70 % of the slots of a padded Prime Pantry batch are padding, so packing
is where most of the training time is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from padkern.data.dataset import Ragged


class DropoutKey(NamedTuple):
    """What the dropout masks of a batch are a function of.

    Attributes:
        seed: 0..2**63 - 1, root of the masks.
        step: 0..2**32 - 1, which draw.
    """

    seed: int
    step: int


@dataclass(frozen=True)
class PackedSequences:
    """Sequences without padding.

    Attributes:
        items: ``[T]`` int64 item ids, oldest first within each sequence.
        offsets: ``[B + 1]`` int64 cumulative lengths; sequence b is
            ``items[offsets[b]:offsets[b + 1]]``.
        positions: ``[T]`` int64 right-aligned slots: the last item of every sequence stands at
            ``max_len - 1``.
        grid: ``[T]`` int64 flat slot of each token in a ``[B, width]`` grid (tokens first).
        width: longest sequence of the batch.
        key: of the dropout masks in training; ``None``: encoders draw one from torch's generator.
    """

    items: Tensor
    offsets: Tensor
    positions: Tensor
    grid: Tensor
    width: int
    key: DropoutKey | None = None

    @property
    def batch_size(self) -> int:
        return self.offsets.numel() - 1

    @property
    def last(self) -> Tensor:
        """``[B]`` int64 index of each sequence's last token."""
        return self.offsets[1:] - 1

    def to(self, device: torch.device | str) -> PackedSequences:
        return PackedSequences(
            self.items.to(device), self.offsets.to(device), self.positions.to(device),
            self.grid.to(device), self.width, self.key,
        )  # fmt: skip

    def keyed(self, seed: int, step: int) -> PackedSequences:
        """The same tokens with dropout masks that are a function of (seed, step)."""
        return replace(self, key=DropoutKey(seed, step))


def pack(items: Tensor, offsets: Tensor, max_len: int) -> PackedSequences:
    """Adds slots and grid places to packed ids.

    Args:
        items: ``[T]`` item ids.
        offsets: ``[B + 1]`` cumulative lengths, on any device.
        max_len: longest sequence allowed; the last item's slot is ``max_len - 1``.

    Raises:
        ValueError: a sequence is empty or longer than ``max_len``, or the offsets do not fit.
    """
    if offsets.ndim != 1 or offsets.numel() < 1 or int(offsets[0]) != 0:
        raise ValueError(f"offsets must be 1-D and start with 0, got {offsets.tolist()[:4]}")
    if int(offsets[-1]) != items.numel():
        raise ValueError(f"offsets end at {int(offsets[-1])} but items has {items.numel()} entries")
    offsets = offsets.to(items.device)
    lengths = offsets[1:] - offsets[:-1]
    if lengths.numel() and int(lengths.min()) < 1:
        raise ValueError("offsets must give every sequence at least one item")
    width = int(lengths.max()) if lengths.numel() else 0
    if width > max_len:
        raise ValueError(f"a sequence has {width} items but max_len is {max_len}")
    rows = torch.repeat_interleave(torch.arange(lengths.numel(), device=items.device), lengths)
    within = torch.arange(items.numel(), device=items.device) - offsets[:-1][rows]
    return PackedSequences(
        items, offsets, max_len - lengths[rows] + within, rows * width + within, width
    )


def pack_ragged(rows: Ragged, max_len: int) -> PackedSequences:
    """Packs the last ``max_len`` items of every row."""
    window = rows.tail(max_len)
    return pack(torch.from_numpy(window.values), torch.from_numpy(window.offsets), max_len)


def unpad(padded: Tensor) -> tuple[Tensor, Tensor]:
    """Packs a ``[B, L]`` id tensor whose padding is 0, on either side.

    Returns:
        ``items [T]`` and ``offsets [B + 1]``.
    """
    mask = padded != 0
    offsets = torch.zeros(padded.shape[0] + 1, dtype=torch.int64, device=padded.device)
    torch.cumsum(mask.sum(1), 0, out=offsets[1:])
    return padded[mask], offsets


@dataclass(frozen=True)
class TrainBatch:
    """Inputs and next-item targets of some users.

    Attributes:
        users: ``[B]`` int64 rows of the training table.
        inputs: packed inputs, each sequence without its last item.
        targets: ``[T]`` int64, the item after each input token.
    """

    users: np.ndarray
    inputs: PackedSequences
    targets: Tensor


class TrainBatches:
    """Shuffled training batches; the order depends on (seed, phase, epoch) alone.

    Args:
        train: training rows, one per user; rows shorter than 2 are left out.
        batch_size: users per batch.
        max_len: inputs per user (the last ``max_len + 1`` items of a row are used).
        seed: root of the order.
        phase: name of the phase, so that phases see different orders.
    """

    def __init__(
        self, train: Ragged, *, batch_size: int, max_len: int, seed: int, phase: str
    ) -> None:
        self.rows = np.flatnonzero(train.lengths >= 2)
        self.window = train.tail(max_len + 1)
        self.batch_size = batch_size
        self.max_len = max_len
        self.seed = seed
        self.phase = phase

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[TrainBatch]:
        order = np.random.default_rng(stream_key(self.seed, self.phase, "order", epoch))
        users = order.permutation(self.rows)
        for start in range(0, len(users), self.batch_size):
            yield self.batch(users[start : start + self.batch_size])

    def batch(self, users: np.ndarray) -> TrainBatch:
        part = self.window.take(users)
        lengths = part.lengths
        last = part.offsets[1:] - 1
        first = part.offsets[:-1]
        keep_input = np.ones(len(part.values), dtype=bool)
        keep_input[last] = False
        keep_target = np.ones(len(part.values), dtype=bool)
        keep_target[first] = False
        offsets = np.zeros(len(users) + 1, dtype=np.int64)
        np.cumsum(lengths - 1, out=offsets[1:])
        inputs = pack(
            torch.from_numpy(part.values[keep_input]), torch.from_numpy(offsets), self.max_len
        )
        return TrainBatch(users, inputs, torch.from_numpy(part.values[keep_target]))


def stream_key(*parts: int | str) -> list[int]:
    """Integers that seed one named random stream; strings count by their bytes."""
    return [p if isinstance(p, int) else int.from_bytes(p.encode()[:8], "little") for p in parts]


class NegativeSampler:
    """Uniform negatives that are never one of the user's training items.

    The draws of a step depend on (seed, phase, step) alone.

    Args:
        train: training rows, one per user.
        candidates: sorted item ids to draw from (``clean``: items seen in training).
        num_items: catalogue size N.
        seed: root of the draws.
        phase: name of the phase.

    Raises:
        ValueError: fewer than two candidates.
    """

    def __init__(
        self, train: Ragged, candidates: np.ndarray, num_items: int, *, seed: int, phase: str
    ) -> None:
        if len(candidates) < 2:
            raise ValueError(f"negatives need at least 2 candidate items, got {len(candidates)}")
        self.candidates = np.asarray(candidates, dtype=np.int64)
        self.stride = num_items + 1
        owner = np.repeat(np.arange(len(train)), train.lengths)
        self.taken = np.unique(owner * self.stride + train.values)
        own = np.bincount(self.taken // self.stride, minlength=len(train))
        self.exhausted = own >= len(self.candidates)
        self.seed, self.phase = seed, phase

    def draw(self, batch: TrainBatch, count: int, step: int) -> Tensor:
        """``[T, count]`` int64 negatives of the batch's tokens.

        A user whose training items cover every candidate keeps uniform draws.
        """
        rng = np.random.default_rng(stream_key(self.seed, self.phase, "neg", step))
        users = np.repeat(batch.users, np.diff(batch.inputs.offsets.numpy()))
        out = self.candidates[rng.integers(len(self.candidates), size=(len(users), count))]
        free = ~self.exhausted[users][:, None]
        while True:
            key = users[:, None] * self.stride + out
            place = np.minimum(np.searchsorted(self.taken, key), len(self.taken) - 1)
            bad = (self.taken[place] == key) & free
            wrong = int(bad.sum())
            if not wrong:
                return torch.from_numpy(out)
            out[bad] = self.candidates[rng.integers(len(self.candidates), size=wrong)]
