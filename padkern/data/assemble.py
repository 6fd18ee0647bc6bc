"""From interactions end to end to a data set: codes for names, and the rows that remain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from padkern.data import convert
from padkern.data.dataset import Dataset, Ragged
from padkern.errors import DataError

__all__ = ["Log", "assemble", "codes", "lookup"]


@dataclass(frozen=True)
class Log:
    """Interactions end to end, sorted by user, then time, then file order.

    Attributes:
        user_names: the names that ``users`` stands for.
        users: codes ``[nnz]``, non-decreasing.
        items: codes ``[nnz]``.
        item_names: the names that ``items`` stands for.
        times: ``[nnz]`` seconds, or None.
        ratings: ``[nnz]``, or None.
    """

    user_names: pa.Array
    users: np.ndarray
    items: np.ndarray
    item_names: pa.Array
    times: np.ndarray | None
    ratings: np.ndarray | None


def assemble(
    name: str,
    source: Path,
    log: Log,
    keep: np.ndarray,
    texts: pa.Array | None,
    keep_unused_items: bool,
    provenance: dict[str, Any],
) -> Dataset:
    """The data set of the interactions that remain.

    Args:
        name: of the data set.
        source: file or folder to name in messages.
        log: all interactions; items keep the order of ``log.item_names``, users that of the rows.
        keep: positions in the log, rising.
        texts: one per name of ``log.item_names``, or None where no text is known.
        keep_unused_items: keep items that have a text but no interaction.
        provenance: stored with the data set; its ``"filters"`` decide how a message is put.

    Raises:
        DataError: if fewer than two users or items are left.
    """
    users, items = log.users[keep], log.items[keep]
    user_codes, rows = np.unique(users, return_inverse=True)
    used = np.zeros(len(log.item_names), dtype=bool)
    used[items] = True
    if keep_unused_items and texts is not None:
        used |= convert.to_numpy(pc.not_equal(texts, ""))
    for count, what in ((user_codes.size, "user"), (int(used.sum()), "item")):
        if count < 2:
            only = f"only one {what}" if count else f"no {what}"
            after = " after the filters" if provenance["filters"] else ""
            raise DataError(f"{source}: {only} is left{after}; at least 2 {what}s are needed")
    new_id = np.cumsum(used)
    mask = pa.array(used)
    item_names = ["", *log.item_names.filter(mask).to_pylist()]
    lengths = np.bincount(rows, minlength=user_codes.size)
    return Dataset(
        name=name,
        users=log.user_names.take(pa.array(user_codes)).to_pylist(),
        items=item_names,
        sequences=Ragged.from_lengths(new_id[items].astype(np.int64), lengths),
        timestamps=None if log.times is None else log.times[keep],
        texts=[""] * len(item_names) if texts is None else ["", *texts.filter(mask).to_pylist()],
        provenance=provenance,
    )


def codes(names: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Integer codes in order of first appearance, and the names they stand for."""
    encoded = names.dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    return convert.to_numpy(encoded.indices).astype(np.int64), encoded.dictionary


def lookup(values: pa.Array, known: pa.Array) -> np.ndarray:
    """Position of each value among the known ones, -1 where it is not there."""
    found = pc.fill_null(pc.index_in(values, value_set=known), -1)
    return convert.to_numpy(found).astype(np.int64)
