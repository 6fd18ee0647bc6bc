"""MovieLens, RecBole and SASRec: one interaction per line, with or without a file of items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from padkern.data.raw.amazon import RATING_RULE, TIME_RULE
from padkern.data.raw.blocks import Block, Layout, blocks, coded_ids, header_of, numbers
from padkern.data.raw.events import Catalog, Events, Reading, read_catalog
from padkern.data.raw.stream import LineFile, first_lines
from padkern.errors import DataError

__all__ = ["item_fields", "read_table_catalog", "read_table_events"]

_NO_GENRES = "(no genres listed)"


def item_fields(path: Path) -> tuple[str, ...]:
    """Fields of a RecBole ``.item`` file that make the text by default.

    Those of type ``token_seq``; without one, those of type ``token`` except the id.
    """
    header = header_of(path, "\t", False)
    found: dict[str, list[str]] = {"token_seq": [], "token": []}
    for cell in header:
        name, _, kind = cell.partition(":")
        if name != "item_id" and kind in found:
            found[kind].append(name)
    return tuple(found["token_seq"] or found["token"])


def read_table_catalog(reading: Reading, paths: Sequence[Path], format: str) -> Catalog:
    """Items of ``movies.csv`` or ``.item`` files."""

    def each() -> Iterator[tuple[LineFile, Iterator[Block], str]]:
        for path in paths:
            item = "movieId" if format == "movielens" else "item_id"
            layout = _layout(path, format, (item, *reading.text_fields))
            file = LineFile(path)
            found = blocks(file, layout, (item, *reading.text_fields))
            yield file, (_genres(block) for block in found), item

    return read_catalog(reading, each())


def read_table_events(reading: Reading, paths: Sequence[Path], format: str) -> Events:
    """Interactions of ``ratings.csv``, ``.inter`` or SASRec files.

    Times are known where there is a column of them; RecBole files need not have one, SASRec files
    never do, and their rows are in order.
    """
    events = Events()
    timed = {_has_times(path, format) for path in paths}
    if len(timed) > 1:
        names = ", ".join(path.name for path in paths)
        raise DataError(f"{names}: some have a column 'timestamp' and some have none")
    for path in paths:
        with_times = timed == {True}
        user, item = ("userId", "movieId") if format == "movielens" else ("user_id", "item_id")
        wanted = [user, item]
        if with_times:
            wanted.append("timestamp")
        if reading.with_ratings:
            wanted.append("rating")
        layout = _layout(path, format, wanted)
        file = LineFile(path)

        def check(
            block: Block, user: str = user, item: str = item, with_times: bool = with_times
        ) -> Any:
            users, items = coded_ids(block, user), coded_ids(block, item)
            times = ratings = None
            if with_times:
                times = numbers(block, "timestamp", "bad_timestamp", TIME_RULE)
            if reading.with_ratings:
                ratings = numbers(block, "rating", "bad_rating", RATING_RULE)
            reading.reject_items(block, item, items)
            return lambda: events.add(block.ok, users, items, times, ratings)

        reading.settled(file, blocks(file, layout, wanted), check)
    return events


def _has_times(path: Path, format: str) -> bool:
    if format != "recbole":
        return format == "movielens"
    return any(cell.partition(":")[0] == "timestamp" for cell in header_of(path, "\t", False))


def _layout(path: Path, format: str, wanted: Sequence[str]) -> Layout:
    """How the file is cut, its header checked."""
    if format == "sasrec":
        if "rating" in wanted:
            raise DataError(f"{path}: the min_rating filter needs ratings, and this file has none")
        first = next(iter(first_lines(path)), "")
        return Layout("\t" if "\t" in first else " ", False, ("user_id", "item_id"))
    quoting = format == "movielens"
    names = header_of(path, "," if quoting else "\t", quoting)
    if format == "recbole":
        names = [name.partition(":")[0] for name in names]
        if "item_id_list" in names and "item_id" in wanted:
            raise DataError(
                f"{path}: has item lists ('item_id_list'), one row per prediction; the .inter file "
                "with one interaction per row is needed"
            )
    for name in wanted:
        if name not in names:
            shown = ", ".join(map(repr, names[:12]))
            raise DataError(f"{path}: column {name!r} is missing; the file has {shown}")
    return Layout("," if quoting else "\t", quoting, tuple(names), header=True)


def _genres(block: Block) -> Block:
    """MovieLens separates genres by a bar, and says so where there are none."""
    if "genres" in block.columns:
        genres = block.columns["genres"]
        genres = pc.if_else(pc.equal(genres, _NO_GENRES), pa.scalar(""), genres)
        block.columns["genres"] = pc.replace_substring(genres, "|", ", ")
    return block
