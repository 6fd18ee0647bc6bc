"""Packed batches of sequences.

A packed batch holds real tokens only: item ids of all sequences one after the other, with
cumulative lengths. About 70 % of the slots of a padded Prime Pantry batch are padding, so packing
is where most of the training time is saved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from padkern.data.dataset import Ragged
from padkern.ops.keyed_dropout import mix_seed


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
        groups: where ``items`` are rows of a table: ``slots [T]`` and ``starts [U + 1]`` as in
            :func:`padkern.ops.segments.expand`; ``None``: not known.
    """

    items: Tensor
    offsets: Tensor
    positions: Tensor
    grid: Tensor
    width: int
    key: DropoutKey | None = None
    groups: tuple[Tensor, Tensor] | None = None

    @property
    def batch_size(self) -> int:
        return self.offsets.numel() - 1

    @property
    def last(self) -> Tensor:
        """``[B]`` int64 index of each sequence's last token."""
        return self.offsets[1:] - 1

    @property
    def steps(self) -> Tensor:
        """``[T]`` int64 number of each token in its sequence, the oldest 0."""
        return self.grid % max(self.width, 1)

    def to_grid(self, x: Tensor) -> Tensor:
        """``[B, width, d]`` with each sequence's rows first and zeros after them, from ``[T, d]``.

        What a causal encoder computes there for the rows of a sequence depends on no padding.
        """
        grid = x.new_zeros(self.batch_size * self.width, x.shape[1])
        return grid.index_copy(0, self.grid, x).view(self.batch_size, self.width, x.shape[1])

    def from_grid(self, grid: Tensor) -> Tensor:
        """``[T, d]`` rows of the tokens, from ``[B, width, d]``."""
        return grid.flatten(0, 1).index_select(0, self.grid)

    def to(self, device: torch.device | str) -> PackedSequences:
        groups = self.groups and (self.groups[0].to(device), self.groups[1].to(device))
        return PackedSequences(
            self.items.to(device), self.offsets.to(device), self.positions.to(device),
            self.grid.to(device), self.width, self.key, groups,
        )  # fmt: skip

    def keyed(self, seed: int, step: int) -> PackedSequences:
        """The same tokens with dropout masks that are a function of (seed, step)."""
        return replace(self, key=DropoutKey(seed, step))

    def stream(self, number: int) -> PackedSequences:
        """The same tokens with masks of another stream; without a key, the same tokens.

        Encoders that share a key get one stream each.
        """
        if self.key is None:
            return self
        return self.keyed(mix_seed(self.key.seed, number), self.key.step)


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


def stream_key(*parts: int | str) -> list[int]:
    """Integers that seed one named random stream; strings count by their bytes."""
    return [p if isinstance(p, int) else int.from_bytes(p.encode()[:8], "little") for p in parts]
