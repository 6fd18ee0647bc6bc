"""In-memory form of an interaction data set: ragged rows of item ids, and the names behind them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Dataset", "Ragged"]


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of different lengths, stored end to end.

    Attributes:
        values: int64 ``[nnz]``; row ``i`` is ``values[offsets[i]:offsets[i + 1]]``.
        offsets: int64 ``[n + 1]``, non-decreasing, from 0 to ``nnz``.

    Raises:
        ValueError: if the two arrays do not fit together.
    """

    values: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        values = np.asarray(self.values)
        offsets = np.asarray(self.offsets)
        for name, array in (("values", values), ("offsets", offsets)):
            if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
                raise ValueError(
                    f"Ragged: {name} must be a 1-D integer array, "
                    f"got {array.dtype}{list(array.shape)}"
                )
        values = values.astype(np.int64, copy=False)
        offsets = offsets.astype(np.int64, copy=False)
        if offsets.size == 0 or offsets[0] != 0 or offsets[-1] != values.size:
            raise ValueError(f"Ragged: offsets must run from 0 to len(values) = {values.size}")
        if np.any(np.diff(offsets) < 0):
            raise ValueError("Ragged: offsets must not decrease")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "offsets", offsets)

    @classmethod
    def from_lists(cls, lists: Iterable[Sequence[int]]) -> Ragged:
        """Build from any iterable of integer sequences (empty ones allowed)."""
        rows = [np.asarray(row, dtype=np.int64).reshape(-1) for row in lists]
        return cls.from_lengths(
            np.concatenate(rows) if rows else np.zeros(0, np.int64),
            np.array([row.size for row in rows], dtype=np.int64),
        )

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: np.ndarray) -> Ragged:
        """Build from the values end to end and the length of each row."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(values, offsets)

    def __len__(self) -> int:
        return self.offsets.size - 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ragged):
            return NotImplemented
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(
            self.values, other.values
        )

    __hash__ = None  # type: ignore[assignment]

    def row(self, i: int) -> np.ndarray:
        """Row ``i`` as a view into ``values``; negative ``i`` counts from the end."""
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"row {i} of a Ragged with {n} rows")
        i %= n
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 ``[n]``, the number of values of each row."""
        return np.diff(self.offsets)

    def row_index(self) -> np.ndarray:
        """int64 ``[nnz]``, the row each value belongs to."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    def take(self, rows: np.ndarray | Sequence[int]) -> Ragged:
        """The given rows, in the given order (repeats allowed)."""
        index = np.asarray(rows)
        if index.dtype == bool:
            index = np.flatnonzero(index)
        index = index.astype(np.int64, copy=False)
        return self._gather(self.offsets[:-1][index], self.lengths[index])

    def head(self, counts: np.ndarray | int) -> Ragged:
        """The first ``counts`` values of each row (one number, or one per row)."""
        take = np.minimum(np.maximum(counts, 0), self.lengths)
        return self._gather(self.offsets[:-1], take)

    def tail(self, k: int) -> Ragged:
        """The last ``k`` values of each row, shorter rows whole."""
        if k < 0:
            raise ValueError(f"tail: k must not be negative, got {k}")
        take = np.minimum(self.lengths, k)
        return self._gather(self.offsets[1:] - take, take)

    def _gather(self, starts: np.ndarray, lengths: np.ndarray) -> Ragged:
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        index = np.arange(offsets[-1], dtype=np.int64)
        index += np.repeat(starts - offsets[:-1], lengths)
        return Ragged(self.values[index], offsets)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Users, items and who took what in which order.

    Attributes:
        name: short name, used in reports.
        users: external user ids; row ``u`` of ``sequences`` belongs to ``users[u]``.
        items: external item ids, length N + 1; ``items[0] == ""`` is padding, so internal ids are
            1..N.
        sequences: internal item ids per user, oldest first, repeats kept.
        timestamps: int64 or float64 seconds parallel to ``sequences.values``, or None when only
            the order is known.
        texts: text per internal id, length N + 1, ``texts[0] == ""``; empty where there is none.
        provenance: JSON-serialisable record of the files read, rows dropped and filters applied.

    Raises:
        ValueError: if the parts do not fit together.
    """

    name: str
    users: list[str]
    items: list[str]
    sequences: Ragged
    timestamps: np.ndarray | None
    texts: list[str]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.items or self.items[0] != "":
            raise ValueError('Dataset: items[0] must be "" (padding)')
        if len(self.texts) != len(self.items) or self.texts[0] != "":
            raise ValueError(
                f"Dataset: texts must have len(items) = {len(self.items)} entries, the first empty"
            )
        if len(self.users) != len(self.sequences):
            raise ValueError(
                f"Dataset: {len(self.users)} users but {len(self.sequences)} sequences"
            )
        values = self.sequences.values
        if values.size and (values.min() < 1 or values.max() >= len(self.items)):
            raise ValueError(f"Dataset: item ids must lie in 1..{len(self.items) - 1}")
        if self.timestamps is not None and self.timestamps.shape != values.shape:
            raise ValueError("Dataset: timestamps must be parallel to sequences.values")

    @property
    def num_users(self) -> int:
        """Number of users."""
        return len(self.users)

    @property
    def num_items(self) -> int:
        """Number of items N, padding not counted."""
        return len(self.items) - 1

    def item_ids(self) -> dict[str, int]:
        """External item id to internal id (1..N)."""
        return {item: i for i, item in enumerate(self.items) if i}

    def sha256(self) -> str:
        """SHA-256 of the processed table: names, texts, sequences and timestamps.

        The digest runs over, in this order and each preceded by its byte count: the user ids, item
        ids and texts (UTF-8, joined by NUL), offsets and values (little-endian int64) and, where
        present, timestamps (little-endian float64).
        """
        parts = ["\0".join(names).encode() for names in (self.users, self.items, self.texts)]
        parts += [
            array.astype("<i8").tobytes()
            for array in (self.sequences.offsets, self.sequences.values)
        ]
        if self.timestamps is not None:
            parts.append(self.timestamps.astype("<f8").tobytes())
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()
