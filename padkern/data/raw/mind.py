"""MIND news (Wu et al. 2020): ``behaviors.tsv`` with impressions and histories, ``news.tsv``.

The order of a user's clicks: the history of the first impression, oldest first, then the clicked
news of all impressions by their time. Histories have no times and are the same in every impression
of a user, or hold what earlier impressions held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from padkern.data.assemble import Log, lookup
from padkern.data.badrows import Fault
from padkern.data.convert import to_numpy
from padkern.data.raw.blocks import Block, Layout, blocks, coded_ids
from padkern.data.raw.events import Catalog, Coded, Reading, merge, read_catalog
from padkern.data.raw.stream import LineFile

__all__ = ["NEWS_FIELDS", "Impressions", "read_mind_catalog", "read_mind_events"]

NEWS_FIELDS = ("category", "subcategory", "title", "abstract")
_NEWS = Layout("\t", False, ("news", *NEWS_FIELDS, "url", "title_entities", "abstract_entities"))
_BEHAVIORS = Layout("\t", False, ("impression", "user", "time", "history", "impressions"))
_TIME = (
    r"^(?P<month>[0-9]{1,2})/(?P<day>[0-9]{1,2})/(?P<year>[0-9]{4}) "
    r"(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2}) (?P<half>AM|PM)$"
)
_TIME_RULE = "must be a time such as 11/12/2019 2:14:46 PM"
_SHOWN_RULE = "must be news ids with -1 (clicked) or -0, separated by blanks"


@dataclass
class Impressions:
    """Clicks and histories in file order.

    Attributes:
        users, items, times: one per click.
        owners, owner_times, histories: one per impression; a history is its text.
    """

    users: list[Coded] = field(default_factory=list)
    items: list[Coded] = field(default_factory=list)
    times: list[np.ndarray] = field(default_factory=list)
    owners: list[Coded] = field(default_factory=list)
    owner_times: list[np.ndarray] = field(default_factory=list)
    histories: list[Coded] = field(default_factory=list)

    def log(self, history: bool) -> Log:
        """Sorted by user, then as the module says; times only where ``history`` is left out."""
        clicks = sum(part[0].size for part in self.users)
        users, user_names = merge([*self.users, *self.owners])
        owners, users = users[clicks:], users[:clicks]
        times = np.concatenate(self.times)
        if not history:
            items, item_names = merge(self.items)
            order = np.lexsort((times, users))
            return Log(user_names, users[order], items[order], item_names, times[order], None)
        owner_times = np.concatenate(self.owner_times)
        codes, texts = merge(self.histories)
        by_time = np.lexsort((owner_times, owners))
        first = by_time[np.unique(owners[by_time], return_index=True)[1]]
        lists = _split(texts.take(pa.array(codes[first])))
        lengths = to_numpy(pc.list_value_length(lists))
        before = lists.flatten().dictionary_encode()
        items, item_names = merge([(to_numpy(before.indices), before.dictionary), *self.items])
        users = np.concatenate([np.repeat(owners[first], lengths), users])
        early = np.full(int(lengths.sum()), np.iinfo(np.int64).min)
        # Stable: what shares a time keeps its order, and histories stand in front.
        order = np.lexsort((np.concatenate([early, times]), users))
        return Log(user_names, users[order], items[order], item_names, None, None)


def read_mind_catalog(reading: Reading, paths: Sequence[Path]) -> Catalog:
    """News of all files."""

    def each() -> Iterator[tuple[LineFile, Iterator[Block], str]]:
        for path in paths:
            file = LineFile(path)
            yield file, blocks(file, _NEWS, ("news", *reading.text_fields)), "news"

    return read_catalog(reading, each())


def read_mind_events(reading: Reading, paths: Sequence[Path], history: bool) -> Impressions:
    """Impressions of all files."""
    found = Impressions()

    def check(block: Block) -> Any:
        users = coded_ids(block, "user")
        times = _times(block)
        past = block.columns["history"].dictionary_encode()
        shown = _split(block.columns["impressions"])
        lengths = to_numpy(pc.list_value_length(shown))
        row = np.repeat(np.arange(lengths.size), lengths)
        tokens = shown.flatten()
        clicked = to_numpy(pc.ends_with(tokens, "-1"))
        plain = clicked | to_numpy(pc.ends_with(tokens, "-0"))
        plain &= to_numpy(pc.greater(pc.binary_length(tokens), 2))
        bad = lengths == 0
        bad[row[~plain]] = True
        block.reject(bad, "impressions", "bad_impressions", _SHOWN_RULE)
        row = row[clicked]
        items = pc.utf8_slice_codeunits(tokens.filter(pa.array(clicked)), 0, -2)
        _unknown(reading, block, "impressions", items, row)
        if history:
            lists = _split(past.dictionary)
            owner = np.repeat(np.arange(len(lists)), to_numpy(pc.list_value_length(lists)))
            _unknown(reading, block, "history", lists.flatten(), owner, to_numpy(past.indices))

        def take() -> None:
            good = block.ok[row]
            encoded = items.filter(pa.array(good)).dictionary_encode()
            found.users.append((users[0][row[good]], users[1]))
            found.items.append((to_numpy(encoded.indices), encoded.dictionary))
            found.times.append(times[row[good]])
            if history:
                found.owners.append((users[0][block.ok], users[1]))
                found.owner_times.append(times[block.ok])
                found.histories.append((to_numpy(past.indices)[block.ok], past.dictionary))

        return take

    for path in paths:
        file = LineFile(path)
        wanted = ("user", "time", "history", "impressions")
        reading.settled(file, blocks(file, _BEHAVIORS, wanted), check)
    return found


def _split(texts: pa.Array) -> pa.Array:
    """Lists of what stands between blanks; an empty text gives an empty list."""
    # Each blank run becomes one, so that no empty word is left at either end or inside.
    words = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(texts))
    empty = to_numpy(pc.equal(pc.ascii_trim_whitespace(texts), ""))
    if not empty.any():
        return words
    lengths = np.where(empty, 0, to_numpy(pc.list_value_length(words)))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = words.flatten()
    return pa.ListArray.from_arrays(pa.array(offsets), flat.filter(pc.not_equal(flat, "")))


def _unknown(
    reading: Reading,
    block: Block,
    column: str,
    items: pa.Array,
    owner: np.ndarray,
    rows: np.ndarray | None = None,
) -> None:
    """Rejects rows that hold news out of the catalogue, where that is a bad row.

    Args:
        reading: holds the catalogue.
        block: the rows.
        column: where the news stand.
        items: news.
        owner: row of each, or position among the values that ``rows`` stands for.
        rows: code of each row, or None where ``owner`` holds rows.
    """
    if not reading.reject_unknown or reading.catalog is None:
        return
    unknown = np.flatnonzero(lookup(items, reading.catalog.names) < 0)
    if not unknown.size:
        return
    position, first = np.unique(owner[unknown], return_index=True)
    value = dict(zip(position.tolist(), unknown[first].tolist(), strict=True))
    codes = np.arange(block.ok.size) if rows is None else rows
    rule = f"item is not in {reading.catalog.path.name}"
    for row in np.flatnonzero(np.isin(codes, position) & block.ok).tolist():
        item = items[value[int(codes[row])]].as_py()
        block.faults.append(Fault(int(block.numbers[row]), column, item, "unknown_item", rule))
        block.ok[row] = False


def _times(block: Block) -> np.ndarray:
    """Seconds since 1970, int64, the clock taken as UTC."""
    found = pc.extract_regex(pc.ascii_trim_whitespace(block.columns["time"]), _TIME)
    valid = to_numpy(pc.is_valid(found))

    def part(name: str) -> np.ndarray:
        return to_numpy(pc.fill_null(pc.struct_field(found, name), "1").cast(pa.int64()))

    year, month, day, hour = part("year"), part("month"), part("day"), part("hour")
    minute, second = part("minute"), part("second")
    valid &= (month >= 1) & (month <= 12) & (hour >= 1) & (hour <= 12)
    valid &= (minute < 60) & (second < 60)
    months = (year - 1970) * 12 + np.where(valid, month, 1) - 1
    start = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    following = (months + 1).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    valid &= (day >= 1) & (day <= following - start)
    block.reject(~valid, "time", "bad_timestamp", _TIME_RULE)
    half = pc.fill_null(pc.equal(pc.struct_field(found, "half"), "PM"), False)
    hours = hour % 12 + 12 * to_numpy(half)
    return ((start + day - 1) * 24 + hours) * 3600 + minute * 60 + second
