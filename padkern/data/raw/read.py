"""Read a published data set in its own form, and write it as the folder that padkern takes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from padkern.data.assemble import Log, assemble, lookup
from padkern.data.badrows import BadRowPolicy, OnBadRows
from padkern.data.dataset import Dataset
from padkern.data.filters import Filters, apply_filters, distinct
from padkern.data.raw import amazon, mind, tables
from padkern.data.raw.detect import FORMATS, Files, find_files
from padkern.data.raw.events import Catalog, Reading, in_order
from padkern.data.write import write_dataset
from padkern.errors import DataError, EnvError

__all__ = ["FORMATS", "authors_filters", "convert_raw", "read_raw"]

UnknownItems = Literal["drop", "keep", "error"]

_TEXT_FIELDS = {
    "amazon2018": ("title",),
    "amazon2023": ("title",),
    "mind": ("title",),
    "movielens": ("title", "genres"),
}
_AMAZON = Filters(min_rating=4, min_user_length=5, keep_last=22, cut_above=23)
_AUTHORS = {
    "amazon2018": _AMAZON,
    "amazon2023": _AMAZON,
    "mind": Filters(min_user_length=5, keep_last=23),
}


def authors_filters(format: str) -> Filters:
    """What the authors of PAD keep of a data set in this format.

    Amazon (their ``clean.py``): items in the metadata, ratings of at least 4, users with at least 5
    of these, and of users with more than 23 the last 22. MIND: users with at least 5 clicks, the
    last 23 of each. There is no bound on items.

    Raises:
        ValueError: for a format that the authors do not use.
    """
    if format not in _AUTHORS:
        raise ValueError(
            f"the authors' filters are for {', '.join(_AUTHORS)}; this data set is {format}"
        )
    return _AUTHORS[format]


def read_raw(
    *sources: str | Path,
    format: str | None = None,
    authors: bool = False,
    filters: Filters | None = None,
    text_fields: Sequence[str] | None = None,
    unknown_items: UnknownItems | None = None,
    history: bool = True,
    user_first: bool | None = None,
    on_bad_rows: OnBadRows = "error",
    quarantine: str | Path | None = None,
    max_bad_rows: int | None = None,
    keep_unused_items: bool = False,
) -> Dataset:
    """Read and filter a published data set, plain or gzip, in pieces.

    Rows of a user are sorted by time; ties keep the order of the file (for MIND: impressions of one
    time that of the file, clicks of one impression that of the list). Users are sorted by id, as
    numbers if all ids are integers, else by bytes; items keep the order of the items file, where
    the last row of an id counts, and are sorted like users without one. The order of rows in an
    interactions file therefore decides nothing but ties (and ``max_users``).

    Args:
        sources: files and folders of one data set; several files of one kind are read as one.
        format: one of ``FORMATS``; None goes by the first line of each file.
        authors: start from :func:`authors_filters`.
        filters: what to keep; fields that are set replace the authors'.
        text_fields: fields of an item whose contents, joined with ". ", are its text. By default
            the title; for MovieLens title and genres; for RecBole every ``token_seq`` field.
        unknown_items: an interaction with an item that the items file lacks is dropped and counted
            (``"drop"``, the default for Amazon, as the authors do), kept without a text
            (``"keep"``), or a bad row (``"error"``, the default elsewhere).
        history: MIND: put the history in front of the clicks. Its entries have no times, so the
            data set has none; without it, it has.
        user_first: order of the first two columns of an Amazon ratings file without a header; None
            finds out.
        on_bad_rows: as in :func:`padkern.data.read_dataset`.
        quarantine: path of the quarantine file, JSON lines.
        max_bad_rows: with ``skip`` or ``quarantine``, the most bad rows to put up with.
        keep_unused_items: keep items that have a text but no interaction as candidates.

    Returns:
        The data set; ``provenance`` holds format, file digests, rows read and dropped, and filter
        counts. Timestamps are seconds.

    Raises:
        DataError: for a bad file or row, with file, line, column, value and rule; or if fewer than
            two users or items are left.
        ValueError: on an option that is unknown or does not fit the format.
    """
    if unknown_items not in (None, "drop", "keep", "error"):
        raise ValueError(f'unknown_items must be "drop", "keep" or "error", got {unknown_items!r}')
    policy = BadRowPolicy(on_bad_rows, Path(quarantine) if quarantine else None, max_bad_rows)
    files = find_files([Path(source) for source in sources], format)
    chosen = _filters(files.format, authors, filters)
    unknown = unknown_items or ("drop" if files.format.startswith("amazon") else "error")
    reading = Reading(
        policy,
        text_fields=_text_fields(files, text_fields),
        with_ratings=chosen.min_rating is not None,
        reject_unknown=unknown == "error",
    )
    try:
        if files.catalogs:
            reading.catalog = _catalog(reading, files)
        log = _log(reading, files, history, user_first)
    finally:
        policy.finish()
    source = files.events[0]
    if not log.users.size:
        raise DataError(f"{source}: no usable interaction is left")
    log, texts, steps = _join(log, reading.catalog, unknown)
    keep, more = apply_filters(log.users, log.items, log.ratings, chosen)
    log, keep = _users_in_order(log, keep)
    provenance = {
        "format": files.format,
        "files": reading.files,
        "on_bad_rows": on_bad_rows,
        "filters": [*steps, *more],
        "text_fields": list(reading.text_fields) if reading.catalog else [],
        "duplicate_items": reading.catalog.duplicates if reading.catalog else 0,
        "keep_unused_items": keep_unused_items,
    }
    first = Path(sources[0])
    name = first.resolve().name if first.is_dir() else first.name.split(".")[0]
    return assemble(name, source, log, keep, texts, keep_unused_items, provenance)


def convert_raw(dataset: Dataset, out: str | Path) -> Path:
    """Write a data set that was read as the folder ``out``, in one step.

    Beside the tables of :func:`padkern.data.write_dataset` it holds ``convert.json``: format,
    digests of the files read, rows and filters. The folder appears when everything is written.

    Raises:
        DataError: if an id or a text cannot be written.
        EnvError: if the folder holds something already, or cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EnvError(f"{out}: exists already; take another name or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise EnvError(f"{out.parent}: cannot be written ({error.strerror})") from None
    try:
        write_dataset(dataset, part)
        facts = json.dumps(dict(dataset.provenance), indent=2, ensure_ascii=False)
        (part / "convert.json").write_text(facts + "\n", encoding="utf-8")
        mask = os.umask(0o022)
        os.umask(mask)
        part.chmod(0o777 & ~mask)
        part.replace(out)
    except OSError as error:
        raise EnvError(f"{out}: cannot be written ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{dataset.name}: {error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _filters(format: str, authors: bool, filters: Filters | None) -> Filters:
    chosen = authors_filters(format) if authors else Filters()
    if filters is None:
        return chosen
    return Filters(**{**chosen.model_dump(), **filters.model_dump(exclude_unset=True)})


def _text_fields(files: Files, wanted: Sequence[str] | None) -> tuple[str, ...]:
    if wanted is not None:
        fields = tuple(dict.fromkeys(wanted))
        if files.format == "mind":
            for name in fields:
                if name not in mind.NEWS_FIELDS:
                    raise ValueError(
                        f"text_fields must be of {', '.join(mind.NEWS_FIELDS)}, got {name!r}"
                    )
        if not fields:
            raise ValueError("text_fields must name at least one field")
        return fields
    if files.format == "recbole" and files.catalogs:
        return tables.item_fields(files.catalogs[0])
    return _TEXT_FIELDS.get(files.format, ())


def _catalog(reading: Reading, files: Files) -> Catalog:
    if files.format == "mind":
        return mind.read_mind_catalog(reading, files.catalogs)
    if files.format.startswith("amazon"):
        return amazon.read_amazon_catalog(reading, files.catalogs, files.format)
    return tables.read_table_catalog(reading, files.catalogs, files.format)


def _log(reading: Reading, files: Files, history: bool, user_first: bool | None) -> Log:
    if files.format == "mind":
        if reading.with_ratings:
            raise ValueError("min_rating needs ratings, and MIND has none")
        return mind.read_mind_events(reading, files.events, history).log(history)
    if files.format.startswith("amazon"):
        paths, format = files.events, files.format
        return amazon.read_amazon_events(reading, paths, format, user_first).log()
    return tables.read_table_events(reading, files.events, files.format).log()


def _join(
    log: Log, catalog: Catalog | None, unknown: str
) -> tuple[Log, pa.Array | None, list[dict[str, Any]]]:
    """Items as positions in the catalogue (or in order, without one); what was dropped for it."""
    if catalog is None:
        order = in_order(log.item_names)
        rank = np.empty(order.size, dtype=np.int32)
        rank[order] = np.arange(order.size, dtype=np.int32)
        names = log.item_names.take(pa.array(order))
        return replace(log, items=rank[log.items], item_names=names), None, []
    if unknown == "keep":
        catalog = catalog.with_unknown(log.item_names)
    position = lookup(log.item_names, catalog.names).astype(np.int32)
    items = position[log.items]
    known = items >= 0
    log = replace(log, items=items, item_names=catalog.names)
    if known.all():
        return log, catalog.texts, []
    step = {
        "filter": "known_items",
        "value": catalog.path.name,
        "dropped_interactions": int(items.size - np.count_nonzero(known)),
        "dropped_users": distinct(log.users) - distinct(log.users[known]),
        "dropped_items": int(np.count_nonzero(position < 0)),
    }
    return _rows(log, known), catalog.texts, [step]


def _users_in_order(log: Log, keep: np.ndarray) -> tuple[Log, np.ndarray]:
    """The kept rows alone, users sorted by id; the rows of a user keep their order."""
    log = _rows(log, keep)
    present, rows = np.unique(log.users, return_inverse=True)
    names = log.user_names.take(pa.array(present))
    order = in_order(names)
    rank = np.empty(order.size, dtype=np.int64)
    rank[order] = np.arange(order.size)
    users = rank[rows]
    by_user = np.argsort(users, kind="stable")
    log = replace(log, user_names=names.take(pa.array(order)), users=users)
    return _rows(log, by_user), np.arange(users.size)


def _rows(log: Log, rows: np.ndarray) -> Log:
    """The chosen rows (positions, or bool)."""
    return replace(
        log,
        users=log.users[rows],
        items=log.items[rows],
        times=None if log.times is None else log.times[rows],
        ratings=None if log.ratings is None else log.ratings[rows],
    )
