"""Read a data set: an interactions or sequences table, with or without an items table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from padkern.data import convert
from padkern.data.assemble import Log, assemble, codes, lookup
from padkern.data.badrows import BadRowPolicy, Fault, OnBadRows
from padkern.data.dataset import Dataset
from padkern.data.fetch import resolve_dataset
from padkern.data.filters import Filters, apply_filters
from padkern.data.tables import SUFFIXES, Table, read_table
from padkern.errors import DataError

__all__ = ["Columns", "read_dataset"]


class Columns(BaseModel):
    """Column names of the input tables.

    Attributes:
        user: user id, in interactions and sequences.
        item: item id, in interactions.
        timestamp: time of an interaction; None takes the rows of a user in file order.
        rating: rating of an interaction; read only for the ``min_rating`` filter.
        items: the list of item ids in a sequences table, oldest first.
        catalog_item: item id in the items table.
        text: item text in the items table.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    user: str = "user"
    item: str = "item"
    timestamp: str | None = "timestamp"
    rating: str = "rating"
    items: str = "items"
    catalog_item: str = "item"
    text: str = "text"


def read_dataset(
    path_or_name: str | Path,
    *,
    columns: Columns | None = None,
    on_bad_rows: OnBadRows = "error",
    quarantine: str | Path | None = None,
    max_bad_rows: int | None = None,
    filters: Filters | None = None,
    keep_unused_items: bool = False,
    tsv_quoting: bool = False,
) -> Dataset:
    """Read, check and filter a data set.

    A folder holds ``interactions`` (user, item, timestamp, optional rating) or ``sequences``
    (user, item ids separated by blanks, oldest first), and may hold ``items`` (item, text); each
    as ``.tsv``, ``.csv`` or ``.parquet``. A file may be given in place of the folder: it is a
    sequences table if its name starts with ``sequences``, else an interactions table, and the
    items table is looked for beside it.

    Rows of a user are sorted by (timestamp, original row). Internal item ids follow the order of
    the items table, or first appearance without one. An interaction with an item that the items
    table does not hold is a bad row; ``skip`` and ``quarantine`` drop that interaction.

    Args:
        path_or_name: folder, file, or a name that :func:`padkern.data.fetch.resolve_dataset`
            knows.
        columns: names of the columns where they differ from the defaults.
        on_bad_rows: ``"error"`` stops at the first bad row, ``"skip"`` drops bad rows,
            ``"quarantine"`` drops them and writes them to ``quarantine``.
        quarantine: path of the quarantine file, JSON lines.
        max_bad_rows: with ``skip`` or ``quarantine``, the most bad rows to put up with.
        filters: what to keep; see :class:`~padkern.data.filters.Filters`.
        keep_unused_items: keep items that have a text but no interaction as candidates.
        tsv_quoting: treat ``"`` as a quote in TSV files, as in CSV.

    Returns:
        The data set; ``provenance`` holds file digests, rows read and dropped, and filter counts.

    Raises:
        DataError: for a bad file or row, with file, line or row, column, value and rule; or if
            fewer than two users or items are left.
        EnvError: if a known data set is not here and cannot be downloaded.
        ValueError: on an unknown ``on_bad_rows``, or quarantine without a path.
    """
    columns = columns or Columns()
    filters = filters or Filters()
    policy = BadRowPolicy(on_bad_rows, Path(quarantine) if quarantine else None, max_bad_rows)
    source, catalog_file = _find(resolve_dataset(path_or_name))
    is_sequences = source.stem.lower().startswith("sequences")
    files: list[dict[str, Any]] = []

    def settle(table: Table, **extra: Any) -> None:
        bad = policy.settle(table)
        files.append({**table.summary, "bad_rows": bad, **extra})

    try:
        catalog = None
        if catalog_file is not None:
            catalog, table = _read_items(catalog_file, columns, tsv_quoting)
            settle(table)
            _require(table, bool(len(catalog[0])))
        known = catalog[0] if catalog else None
        read = _read_sequences if is_sequences else _read_interactions
        log, table = read(source, columns, tsv_quoting, known, catalog_file, filters)
        settle(table, interactions_kept=int(log.users.size))
        _require(table, bool(log.users.size))
    finally:
        policy.finish()

    keep, steps = apply_filters(log.users, log.items, log.ratings, filters)
    provenance = {
        "files": files,
        "on_bad_rows": on_bad_rows,
        "filters": steps,
        "keep_unused_items": keep_unused_items,
    }
    name = source.parent.resolve().name or source.stem
    texts = catalog[1] if catalog else None
    return assemble(name, source, log, keep, texts, keep_unused_items, provenance)


def _find(path: Path) -> tuple[Path, Path | None]:
    """The interaction file and the items file (or None) of a folder or file."""
    if path.is_file():
        return path, _one_of(path.parent, ("items",))
    source = _one_of(path, ("sequences", "interactions"))
    if source is None:
        raise DataError(
            f"{path}: the folder holds neither sequences nor interactions "
            f"({', '.join(SUFFIXES)}); 'padkern convert' makes them from published files"
        )
    return source, _one_of(path, ("items",))


def _one_of(folder: Path, stems: tuple[str, ...]) -> Path | None:
    found = [
        folder / (stem + suffix)
        for stem in stems
        for suffix in SUFFIXES
        if (folder / (stem + suffix)).is_file()
    ]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(f"{folder}: found {names}; keep one, or name the file to read")
    return found[0] if found else None


def _require(table: Table, usable: bool) -> None:
    if not usable:
        raise DataError(
            f"{table.path}: no usable row is left; all {table.rows_read} rows were dropped"
        )


def _read_items(
    path: Path, columns: Columns, tsv_quoting: bool
) -> tuple[tuple[pa.Array, pa.Array], Table]:
    table = read_table(path, (columns.catalog_item, columns.text), tsv_quoting=tsv_quoting)
    names = convert.ids(table, columns.catalog_item)
    texts = convert.texts(table, columns.text)
    _reject_duplicates(table, columns.catalog_item, names, "duplicate_item")
    keep = pa.array(table.ok)
    return (names.filter(keep), texts.filter(keep)), table


def _reject_duplicates(table: Table, column: str, names: pa.Array, reason: str) -> None:
    """Reject later rows with an id that an earlier good row has."""
    rows = np.flatnonzero(table.ok)
    present = codes(names.filter(pa.array(table.ok)))[0]
    _, first, inverse = np.unique(present, return_index=True, return_inverse=True)
    again = rows[first[inverse] != np.arange(rows.size)]
    if not again.size:
        return
    bad = np.zeros(table.ok.size, dtype=bool)
    bad[again] = True
    table.reject(
        bad, column, reason, f"must be unique in this file, but an earlier {table.unit} has it"
    )


def _read_sequences(
    path: Path,
    columns: Columns,
    tsv_quoting: bool,
    known: pa.Array | None,
    catalog: Path | None,
    filters: Filters,
) -> tuple[Log, Table]:
    if filters.min_rating is not None:
        raise DataError(f"{path}: the min_rating filter needs an interactions table with ratings")
    table = read_table(path, (columns.user, columns.items), tsv_quoting=tsv_quoting)
    names = convert.ids(table, columns.user)
    _reject_duplicates(table, columns.user, names, "duplicate_user")
    values, lengths = convert.id_lists(table, columns.items)
    owner = np.repeat(np.arange(lengths.size), lengths)
    if known is None:
        items, item_names = codes(values)
    else:
        items, item_names = lookup(values, known), known
        unknown = items < 0
        for position in np.flatnonzero(unknown):
            number = int(table.numbers[owner[position]])
            value = values[int(position)].as_py()
            table.faults.append(Fault(number, columns.items, value, *_unknown(catalog)))
        owner, items = owner[~unknown], items[~unknown]
    return Log(names, owner, items, item_names, None, None), table


def _read_interactions(
    path: Path,
    columns: Columns,
    tsv_quoting: bool,
    known: pa.Array | None,
    catalog: Path | None,
    filters: Filters,
) -> tuple[Log, Table]:
    required = [columns.user, columns.item]
    if columns.timestamp is not None:
        required.append(columns.timestamp)
    if filters.min_rating is not None:
        required.append(columns.rating)
    try:
        table = read_table(path, required, tsv_quoting=tsv_quoting)
    except DataError as error:
        if columns.timestamp and f"column {columns.timestamp!r} is missing" in str(error):
            raise DataError(
                f"{error}; name another one, or set the timestamp column to none to take the rows "
                "in file order"
            ) from None
        raise
    names = convert.ids(table, columns.user)
    values = convert.ids(table, columns.item)
    times = convert.times(table, columns.timestamp) if columns.timestamp else None
    ratings = None
    if filters.min_rating is not None:
        rule = "must be a finite number"
        ratings = convert.numbers(table, columns.rating, "bad_rating", rule)
    if known is not None:
        positions = lookup(values, known)
        table.reject(positions < 0, columns.item, *_unknown(catalog))
    keep = table.ok
    mask = pa.array(keep)
    if known is None:
        items, item_names = codes(values.filter(mask))
    else:
        items, item_names = positions[keep], known
    users, user_names = codes(names.filter(mask))
    # lexsort is stable, so equal times keep the order of the file.
    order = np.lexsort((users,) if times is None else (times[keep], users))
    log = Log(
        user_names,
        users[order],
        items[order],
        item_names,
        None if times is None else times[keep][order],
        None if ratings is None else ratings[keep][order],
    )
    return log, table


def _unknown(catalog: Path | None) -> tuple[str, str]:
    name = catalog.name if catalog is not None else "the items table"
    return "unknown_item", f"item is not in {name}"
