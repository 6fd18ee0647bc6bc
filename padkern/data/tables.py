"""One input file as columns, with the place of every row kept for error messages."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from padkern.data.badrows import Fault
from padkern.data.records import DelimitedText, UnclosedQuote, damaged_records
from padkern.errors import DataError

__all__ = ["SUFFIXES", "Table", "flat", "read_table"]

SUFFIXES = (".tsv", ".csv", ".parquet")


@dataclass
class Table:
    """The wanted columns of a file.

    Attributes:
        path: the file, as the caller named it.
        unit: ``"line"`` for text files, ``"row"`` for Parquet.
        columns: column name to array, all of one length.
        numbers: int64 ``[rows]``, record number of each row (see :class:`Fault`).
        ok: bool ``[rows]``, rows that broke no rule so far.
        faults: the broken rules so far, in any order.
        rows_read: data rows in the file, bad ones included.
        sha256: digest of the file's bytes.
        size: bytes.
    """

    path: Path
    unit: str
    columns: dict[str, pa.Array]
    numbers: np.ndarray
    rows_read: int
    sha256: str
    size: int
    faults: list[Fault] = field(default_factory=list)
    ok: np.ndarray = field(init=False)
    _text: DelimitedText | None = None

    def __post_init__(self) -> None:
        self.ok = np.ones(self.numbers.size, dtype=bool)

    def reject(self, bad: np.ndarray, column: str, reason: str, rule: str) -> None:
        """Mark rows as bad; a row that is already bad keeps its first fault.

        Args:
            bad: bool ``[rows]``.
            column: the column at fault; its value goes into the message.
            reason: key used for counting.
            rule: the rule in words.
        """
        values = self.columns[column]
        for row in np.flatnonzero(bad & self.ok):
            value = _plain(values[int(row)])
            self.faults.append(Fault(int(self.numbers[row]), column, value, reason, rule))
        self.ok &= ~bad

    def locate(self, numbers: Sequence[int]) -> dict[int, tuple[int, str]]:
        """Physical line (or row) and raw text of the given record numbers, in rising order."""
        if self._text is not None:
            return self._text.locate(numbers)
        found = {}
        for number in numbers:
            row = int(np.searchsorted(self.numbers, number))
            raw = {name: _plain(array[row]) for name, array in self.columns.items()}
            found[number] = (number, str(raw))
        return found

    @property
    def summary(self) -> dict[str, Any]:
        """JSON-serialisable facts about the file."""
        return {
            "name": self.path.name,
            "sha256": self.sha256,
            "bytes": self.size,
            "rows_read": self.rows_read,
        }


def read_table(
    path: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    *,
    tsv_quoting: bool = False,
) -> Table:
    """Read the named columns of a ``.tsv``, ``.csv`` or ``.parquet`` file.

    Text files are UTF-8 with a header line (a byte order mark is allowed); all their columns come
    as strings. Blank lines are ignored. Fields may be quoted with ``"`` in CSV, and in TSV only if
    ``tsv_quoting`` is set. Rows with a wrong number of cells, a NUL byte or bytes that are not
    UTF-8 become faults of the table and are not among its rows.

    Args:
        path: the file.
        required: columns that must exist.
        optional: columns to read when they exist.
        tsv_quoting: treat ``"`` as a quote in TSV files too.

    Raises:
        DataError: if the file cannot be read at all: missing, empty, without a data row, without a
            required column, not UTF-8 in its header, or with a quote that is never closed.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: the file name must end in {', '.join(SUFFIXES)}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not raw.strip():
        raise DataError(f"{path}: the file is empty")
    if suffix == ".parquet":
        table = _read_parquet(path, raw, required, optional)
    else:
        table = _read_text(path, raw, required, optional, suffix == ".csv" or tsv_quoting)
    if not table.rows_read:
        raise DataError(f"{path}: the file has a header but no data rows")
    return table


def _read_text(
    path: Path, raw: bytes, required: Sequence[str], optional: Sequence[str], quoting: bool
) -> Table:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: the file is UTF-16; save it as UTF-8")
    delimiter = "," if path.suffix.lower() == ".csv" else "\t"
    data = raw.removeprefix(b"\xef\xbb\xbf")
    text = DelimitedText(data, delimiter, quoting)
    try:
        first = next(text.records(), None)
        if first is None:
            raise DataError(f"{path}: the file is empty")
        header = _header(path, text, first)
        _check_columns(path, header, required)
        damaged, data = damaged_records(text, header)
    except UnclosedQuote:
        raise _unclosed(path, text) from None

    # The parser takes an unclosed quote without complaint and swallows the rest of the file; a row
    # of our own at the end shows whether it came through.
    guard = quoting and b'"' in data
    if guard:
        data = b"".join([data, b"\n", delimiter.join(["end"] * len(header)).encode(), b"\n"])
    ragged: dict[int, int] = {}

    def note(row: Any) -> str:
        ragged[row.number] = row.actual_columns
        return "skip"

    names = [str(index) for index in range(len(header))]
    wanted = [name for name in (*required, *optional) if name in header]
    include = [str(header.index(name)) for name in wanted]
    try:
        parsed = pacsv.read_csv(
            pa.BufferReader(data),
            # One block: a row may be of any length. One thread: only then are rows numbered.
            read_options=pacsv.ReadOptions(
                use_threads=False, column_names=names, block_size=min(len(data) + 1, 2**31 - 1)
            ),
            parse_options=pacsv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if quoting else False,
                newlines_in_values=quoting,
                invalid_row_handler=note,
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(include, pa.string()),
                include_columns=include,
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: cannot be parsed: {error}") from None

    if guard:
        last = parsed.slice(parsed.num_rows - 1) if parsed.num_rows else parsed
        if [column.to_pylist() for column in last.columns] != [["end"]] * len(include):
            raise _unclosed(path, text)
        parsed = parsed.slice(0, parsed.num_rows - 1)
    total = parsed.num_rows + len(ragged)
    all_numbers = np.arange(1, total + 1)
    numbers = np.delete(all_numbers, np.array(list(ragged), dtype=np.int64) - 1)
    keep = (numbers > 1) & ~np.isin(numbers, list(damaged))
    columns = {
        name: flat(parsed.column(index)).filter(pa.array(keep))
        for name, index in zip(wanted, include, strict=True)
    }
    faults = list(damaged.values())
    for number, actual in ragged.items():
        if number not in damaged:
            rule = f"expected {len(header)} columns, found {actual}"
            faults.append(Fault(number, None, None, "ragged_row", rule))
    digest = hashlib.sha256(raw).hexdigest()
    return Table(
        path, "line", columns, numbers[keep], total - 1, digest, len(raw), faults, _text=text
    )


def _unclosed(path: Path, text: DelimitedText) -> DataError:
    line = ""
    try:
        for _ in text.records():
            pass
    except UnclosedQuote as error:
        line = f" line {error.line}"
    return DataError(f"{path}{line}: a quote is opened and never closed")


def _header(path: Path, text: DelimitedText, first: tuple[int, int, int]) -> list[str]:
    line, start, end = first
    try:
        names = [cell.decode("utf-8").strip() for cell in text.cells(text.data[start:end])]
    except UnicodeDecodeError:
        raise DataError(f"{path} line {line}: the header is not valid UTF-8") from None
    for name in names:
        if "\0" in name:
            raise DataError(f"{path} line {line}: the header contains a NUL byte")
        if names.count(name) > 1:
            raise DataError(f"{path} line {line}: the header names column {name!r} twice")
    return names


def _read_parquet(
    path: Path, raw: bytes, required: Sequence[str], optional: Sequence[str]
) -> Table:
    try:
        file = pq.ParquetFile(pa.BufferReader(raw))
        names = file.schema_arrow.names
        _check_columns(path, names, required)
        wanted = [name for name in (*required, *optional) if name in names]
        parsed = file.read(columns=wanted)
        columns = {name: flat(parsed.column(name)) for name in wanted}
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path}: is not a readable Parquet file: {error}") from None
    numbers = np.arange(1, parsed.num_rows + 1)
    digest = hashlib.sha256(raw).hexdigest()
    return Table(path, "row", columns, numbers, parsed.num_rows, digest, len(raw))


def _check_columns(path: Path, names: Sequence[str], required: Sequence[str]) -> None:
    for name in required:
        if name not in names:
            shown = ", ".join(repr(found) for found in names[:12])
            raise DataError(f"{path}: column {name!r} is missing; the file has {shown}")


def flat(column: pa.ChunkedArray) -> pa.Array:
    """The column in one piece."""
    array = column.combine_chunks()
    return array.chunk(0) if isinstance(array, pa.ChunkedArray) else array


def _plain(scalar: pa.Scalar) -> str | None:
    try:
        value = scalar.as_py()
    except (UnicodeDecodeError, ValueError):
        value = scalar.cast(pa.binary()).as_py().decode("utf-8", "backslashreplace")
    return None if value is None else str(value)
