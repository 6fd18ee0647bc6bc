"""What the readers of one data set gather: a catalogue of items, and interactions as codes."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from padkern.data.assemble import Log, lookup
from padkern.data.badrows import BadRowPolicy
from padkern.data.raw.blocks import Block, coded_ids
from padkern.data.raw.stream import LineFile

__all__ = [
    "Catalog",
    "Coded",
    "Events",
    "Reading",
    "clean_text",
    "in_order",
    "item_texts",
    "merge",
    "read_catalog",
]

_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")
_INTEGER = r"^(0|[1-9][0-9]{0,17})$"

Coded = tuple[np.ndarray, pa.Array]
"""Codes of rows, and the names that the codes stand for."""


@dataclass
class Reading:
    """What the readers of one data set share.

    Attributes:
        policy: what happens to bad rows.
        text_fields: fields of an item that make its text.
        with_ratings: whether ratings are read at all.
        catalog: the items, once they have been read.
        reject_unknown: whether an interaction with an item out of the catalogue is a bad row.
        files: summary of each file read so far.
    """

    policy: BadRowPolicy
    text_fields: tuple[str, ...]
    with_ratings: bool
    catalog: Catalog | None = None
    reject_unknown: bool = False
    files: list[dict[str, Any]] = field(default_factory=list)

    def settled(self, file: LineFile, blocks: Iterable[Block], check: Any) -> None:
        """Checks each block, treats its faults, and notes the file when it is done.

        Args:
            file: where the blocks come from.
            blocks: of the file.
            check: takes a block, marks its bad rows and returns what to call once they have been
                treated.
        """
        bad: dict[str, int] = {}
        for block in blocks:
            take = check(block)
            for reason, count in self.policy.settle(block).items():
                bad[reason] = bad.get(reason, 0) + count
            take()
        self.files.append({**file.summary, "bad_rows": bad})

    def reject_items(self, block: Block, column: str, items: Coded) -> None:
        """Marks rows with items out of the catalogue, where they are bad rows."""
        if self.reject_unknown and self.catalog is not None:
            unknown = lookup(items[1], self.catalog.names) < 0
            rule = f"item is not in {self.catalog.path.name}"
            block.reject(unknown[items[0]], column, "unknown_item", rule)


@dataclass
class Catalog:
    """Items in the order of their files; of rows with one id the last counts.

    Attributes:
        path: the (first) file.
        names: ids.
        texts: one per id.
        duplicates: rows that a later one replaced.
    """

    path: Path
    names: pa.Array
    texts: pa.Array
    duplicates: int

    @classmethod
    def of(cls, path: Path, names: list[pa.Array], texts: list[list[str]]) -> Catalog:
        """From the pieces of all files."""
        all_names = pa.chunked_array(names, pa.string()).combine_chunks()
        # Beyond 2 GiB of texts, offsets of 32 bits would not do.
        kind = pa.large_string()
        all_texts = pa.chunked_array([pa.array(part, kind) for part in texts], kind)
        codes = all_names.dictionary_encode().indices.to_numpy()
        # The first appearance in the reversed order is the last one.
        _, from_end = np.unique(codes[::-1], return_index=True)
        last = pa.array(np.sort(codes.size - 1 - from_end))
        kept = all_texts.combine_chunks().take(last)
        return cls(path, all_names.take(last), kept, codes.size - len(last))

    def with_unknown(self, names: pa.Array) -> Catalog:
        """With the names it lacks at its end, in order, without a text."""
        unknown = names.filter(pa.array(lookup(names, self.names) < 0))
        unknown = unknown.take(pa.array(in_order(unknown)))
        texts = pa.array([""] * len(unknown), self.texts.type)
        return Catalog(
            self.path,
            pa.concat_arrays([self.names, unknown]),
            pa.concat_arrays([self.texts, texts]),
            self.duplicates,
        )


@dataclass
class Events:
    """Interactions in file order: codes of users and items, and their names piece by piece."""

    users: list[Coded] = field(default_factory=list)
    items: list[Coded] = field(default_factory=list)
    times: list[np.ndarray] = field(default_factory=list)
    ratings: list[np.ndarray] = field(default_factory=list)

    def add(
        self,
        keep: np.ndarray,
        users: Coded,
        items: Coded,
        times: np.ndarray | None,
        ratings: np.ndarray | None,
    ) -> None:
        """Adds the rows of a block that are in ``keep`` (bool)."""
        whole = bool(keep.all())

        def chosen(values: np.ndarray) -> np.ndarray:
            return values if whole else values[keep]

        self.users.append((chosen(users[0]), users[1]))
        self.items.append((chosen(items[0]), items[1]))
        if times is not None:
            self.times.append(chosen(times))
        if ratings is not None:
            self.ratings.append(chosen(ratings).astype(np.float32))

    def log(self) -> Log:
        """Sorted by user, time and file order; users and items in order of first appearance.

        The events are used up: their pieces are released on the way.
        """
        users, user_names = merge(self.users)
        items, item_names = merge(self.items)
        times = np.concatenate(self.times) if self.times else None
        ratings = np.concatenate(self.ratings) if self.ratings else None
        self.times.clear()
        self.ratings.clear()
        order = _by_user_and_time(users, times)
        return Log(
            user_names,
            users[order],
            items[order],
            item_names,
            None if times is None else times[order],
            None if ratings is None else ratings[order],
        )


def merge(parts: list[Coded]) -> Coded:
    """The parts end to end under one set of codes, int32; the list is emptied."""
    filled = [part for part in parts if len(part[1])]  # encoding drops chunks without a value
    parts.clear()
    encoded = pa.chunked_array([names for _, names in filled], pa.string()).dictionary_encode()
    if not filled:
        return np.zeros(0, dtype=np.int32), pa.array([], pa.string())
    # Every chunk refers to one dictionary, that of all.
    merged = encoded.chunk(0).dictionary
    codes = np.empty(sum(local.size for local, _ in filled), dtype=np.int32)
    end = 0
    for chunk, (local, _) in zip(encoded.chunks, filled, strict=True):
        codes[end : end + local.size] = chunk.indices.to_numpy()[local]
        end += local.size
    return codes, merged


def in_order(names: pa.Array) -> np.ndarray:
    """Positions of the names in their order: of numbers if all are integers, else of bytes."""
    if len(names) and pc.all(pc.match_substring_regex(names, _INTEGER)).as_py():
        names = names.cast(pa.int64())
    order: np.ndarray = pc.sort_indices(names).to_numpy()
    return order.astype(np.int64)


def clean_text(value: str | None) -> str:
    """HTML entities resolved, each run of blanks, line breaks and control characters one blank."""
    if not value:
        return ""
    if "&" in value:
        value = html.unescape(value)
    return " ".join(_CONTROL.sub(" ", value).split())


def item_texts(block: Block, fields: tuple[str, ...]) -> list[str]:
    """Text of each row: the cleaned fields that are not empty, joined with ". "."""
    columns = [[clean_text(value) for value in block.columns[name].to_pylist()] for name in fields]
    if len(columns) == 1:
        return columns[0]
    return [". ".join(filter(None, cells)) for cells in zip(*columns, strict=True)]


def read_catalog(
    reading: Reading, files: Iterable[tuple[LineFile, Iterable[Block], str]]
) -> Catalog:
    """Items of all files: each with its blocks and the column of ids."""
    names: list[pa.Array] = []
    texts: list[list[str]] = []
    first: Path | None = None
    for file, blocks, column in files:
        first = first or file.path

        def check(block: Block, column: str = column) -> Any:
            codes, distinct = coded_ids(block, column)

            def take() -> None:
                keep = block.ok
                names.append(distinct.take(pa.array(codes[keep])))
                block.columns = {
                    name: block.columns[name].filter(pa.array(keep)) for name in reading.text_fields
                }
                texts.append(item_texts(block, reading.text_fields))

            return take

        reading.settled(file, blocks, check)
    assert first is not None
    return Catalog.of(first, names, texts)


def _by_user_and_time(users: np.ndarray, times: np.ndarray | None) -> np.ndarray:
    """Stable order by user, then time."""
    if times is None:
        return np.argsort(users, kind="stable")
    return np.lexsort((times, users))
