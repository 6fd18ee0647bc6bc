"""Amazon product reviews as published in 2018 and 2023: ratings or reviews, and metadata.

2018 (Ni et al.): ``Electronics.csv`` (item, user, rating, seconds; no header) or reviews, one JSON
object per line (``reviewerID``, ``asin``, ``overall``, ``unixReviewTime``), and
``meta_Electronics.json.gz``. 2023 (Hou et al.): reviews as JSON lines (``user_id``,
``parent_asin``, ``rating``, ``timestamp`` in milliseconds) or a CSV file with these names, and
``meta_Electronics.jsonl.gz``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from padkern.data.assemble import lookup
from padkern.data.raw.blocks import Block, Layout, blocks, coded_ids, header_of, numbers
from padkern.data.raw.events import Catalog, Events, Reading, read_catalog
from padkern.data.raw.jsonlines import NUMBER, STRING, TEXT, json_blocks
from padkern.data.raw.stream import LineFile, first_lines
from padkern.errors import DataError

__all__ = ["read_amazon_catalog", "read_amazon_events"]

TIME_RULE = "must be a finite number of seconds"
RATING_RULE = "must be a finite number"
_ASIN = r"^(B[0-9A-Z]{9}|[0-9]{9}[0-9X])$"
_MILLISECONDS_FROM = 1e11  # as seconds this is the year 5138
_EXACT = 2.0**53  # below it float64 holds every integer
_REVIEW = {
    "amazon2018": ("reviewerID", "asin", "unixReviewTime", "overall"),
    "amazon2023": ("user_id", "parent_asin", "timestamp", "rating"),
}
_COLUMNS = ("user", "item", "timestamp", "rating")


def read_amazon_catalog(reading: Reading, paths: Sequence[Path], format: str) -> Catalog:
    """Items of the metadata files."""
    column = "parent_asin" if format == "amazon2023" else "asin"

    def each() -> Iterator[tuple[LineFile, Iterator[Block], str]]:
        for path in paths:
            file = LineFile(path)
            fields = {**dict.fromkeys(reading.text_fields, TEXT), column: STRING}
            yield file, json_blocks(file, fields), column

    return read_catalog(reading, each())


def read_amazon_events(
    reading: Reading, paths: Sequence[Path], format: str, user_first: bool | None
) -> Events:
    """Interactions of the reviews or ratings files."""
    events = Events()
    for path in paths:
        file = LineFile(path)
        first = next(iter(first_lines(path)), "")
        if first.lstrip().startswith("{") or ".json" in path.name.lower():
            source, names = _reviews(file, format, reading.with_ratings)
        else:
            source, names = _ratings(reading, file, format, first, user_first)
        user, item, time, rating = names

        def check(
            block: Block, user: str = user, item: str = item, time: str = time, rating: str = rating
        ) -> Any:
            users, items = coded_ids(block, user), coded_ids(block, item)
            times = numbers(block, time, "bad_timestamp", TIME_RULE)
            ratings = None
            if reading.with_ratings:
                ratings = numbers(block, rating, "bad_rating", RATING_RULE)
            reading.reject_items(block, item, items)
            return lambda: events.add(block.ok, users, items, times, ratings)

        reading.settled(file, source, check)
    events.times = [_seconds(events.times)] if events.times else []
    return events


def _reviews(
    file: LineFile, format: str, with_ratings: bool
) -> tuple[Iterator[Block], tuple[str, ...]]:
    names = _REVIEW[format]
    kinds = dict(zip(names, (STRING, STRING, NUMBER, NUMBER), strict=True))
    if not with_ratings:
        del kinds[names[3]]
    return json_blocks(file, kinds), names


def _ratings(
    reading: Reading, file: LineFile, format: str, first: str, user_first: bool | None
) -> tuple[Iterator[Block], tuple[str, ...]]:
    if format == "amazon2023":
        header = tuple(header_of(file.path, ",", True))
        names = _REVIEW[format]
        for name in names:
            if name not in header:
                shown = ", ".join(map(repr, header[:12]))
                raise DataError(f"{file.path}: column {name!r} is missing; the file has {shown}")
        layout = Layout(",", True, header, header=True)
    else:
        names = _COLUMNS
        # Some copies have a header line, as the authors' own step writes one.
        header = tuple(cell.strip(' "') for cell in first.lower().split(","))
        named = {"user", "item"} <= set(header)
        for name in names if named else ():
            if name not in header:
                raise DataError(f"{file.path}: column {name!r} is missing; the file has {header}")
        if named:
            columns = header
        else:
            if user_first is None:
                user_first = _user_comes_first(reading, file.path)
            order = ("user", "item") if user_first else ("item", "user")
            columns = (*order, "rating", "timestamp")
        layout = Layout(",", True, columns, header=named)
    wanted = names if reading.with_ratings else names[:3]
    return blocks(file, layout, wanted), names


def _user_comes_first(reading: Reading, path: Path) -> bool:
    """Whether the user stands before the item: the items file knows, or else the form of the ids.

    The files of 2018 begin with the item, those of 2014 with the user, and neither has a header.
    """
    layout = Layout(",", True, ("a", "b", "rating", "timestamp"))
    block = next(blocks(LineFile(path, 2**20), layout, ("a", "b")))
    hits = {}
    for column in ("a", "b"):
        values = block.columns[column]
        if reading.catalog is not None:
            hits[column] = int((lookup(values, reading.catalog.names) >= 0).sum())
        else:
            found = pc.match_substring_regex(values, _ASIN)
            hits[column] = pc.sum(found.cast(pa.int64())).as_py() or 0
    if hits["a"] == hits["b"]:
        raise DataError(
            f"{path}: cannot tell whether the first column is the user or the item; say "
            "--user-first or --item-first"
        )
    return hits["b"] > hits["a"]


def _seconds(parts: list[np.ndarray]) -> np.ndarray:
    """Times end to end, in seconds: int64 where all are whole, else float64."""
    times = np.concatenate(parts)
    parts.clear()
    if not times.size:
        return times
    exact = times.dtype == np.float64 and np.abs(times).max() < _EXACT
    if exact and (times == np.trunc(times)).all():
        times = times.astype(np.int64)
    if np.median(times) >= _MILLISECONDS_FROM:
        whole = times.dtype == np.int64 and not (times % 1000).any()
        times = times // 1000 if whole else times / 1000
    return times
