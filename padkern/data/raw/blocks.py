"""A piece of a delimited text file as checked columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from padkern.data import convert
from padkern.data.badrows import Fault
from padkern.data.raw.stream import LineFile, Lines
from padkern.data.records import DelimitedText, damaged_records
from padkern.data.tables import Table, flat
from padkern.errors import DataError

__all__ = ["Block", "Layout", "blocks", "coded_ids", "header_of", "numbers"]

_QUOTE = ord('"')
_DIGITS = 18  # more may not fit into int64


@dataclass(frozen=True)
class Layout:
    """How the lines of a file are cut into cells.

    Attributes:
        delimiter: one character.
        quoting: whether ``"`` quotes a cell. A quoted cell ends on its line.
        names: of all cells of a line.
        header: whether the first line holds names, not data.
    """

    delimiter: str
    quoting: bool
    names: tuple[str, ...]
    header: bool = False


@dataclass
class Block(Table):
    """Rows of one piece of a file; faults name its lines."""

    lines: Lines | None = None

    #: Ends a message about further bad rows: only this piece has been looked at.
    scope = "this part of the file"

    def locate(self, numbers: Sequence[int]) -> dict[int, tuple[int, str]]:
        """Line number and raw text of the given record numbers of this piece."""
        assert self.lines is not None
        records = self.lines.records()
        return {
            number: (records[number - 1][0], records[number - 1][1].decode("utf-8", "replace"))
            for number in numbers
        }


def header_of(path: Path, delimiter: str, quoting: bool) -> list[str]:
    """Names on the first line that is not empty, blanks around them removed.

    Raises:
        DataError: if the file cannot be read or is empty, or the line is not UTF-8 or names a
            column twice.
    """
    for lines in LineFile(path, 2**16).pieces():
        for number, line in lines.records():
            text = DelimitedText(line, delimiter, quoting)
            try:
                names = [cell.decode("utf-8").strip() for cell in text.cells(line)]
            except UnicodeDecodeError:
                raise DataError(f"{path} line {number}: the header is not valid UTF-8") from None
            for name in names:
                if names.count(name) > 1:
                    raise DataError(f"{path} line {number}: the header names column {name!r} twice")
            return names
    raise DataError(f"{path}: the file is empty")


def blocks(file: LineFile, layout: Layout, wanted: Sequence[str]) -> Iterator[Block]:
    """The wanted columns of a file, piece by piece, as strings.

    Lines with a wrong number of cells, a quote left open, a NUL byte or bytes that are not UTF-8
    become faults of their block and are not among its rows; empty lines are passed over.

    Raises:
        DataError: as :meth:`LineFile.pieces`, or if the file has no data row.
    """
    header = layout.header
    for lines in file.pieces():
        if header:
            first = next(iter(lines.records()), None)
            if first is None:
                continue
            number, line = first
            start = lines.data.index(line) + len(line) + 1
            lines, header = Lines(lines.data[start:], number + 1), False
        block = _parse(file.path, lines, layout, wanted)
        if block is not None:
            file.rows_read += block.rows_read
            yield block
    if not file.rows_read:
        what = "a header but no data rows" if layout.header else "no data rows"
        raise DataError(f"{file.path}: the file has {what}")


def _parse(path: Path, lines: Lines, layout: Layout, wanted: Sequence[str]) -> Block | None:
    if lines.data.count(b"\n") == len(lines.data):
        return None
    names = list(layout.names)
    damaged, data = damaged_records(DelimitedText(lines.data, layout.delimiter, False), names)
    if layout.quoting and b'"' in data:
        data = _close_quotes(data, layout, damaged)
    ragged: dict[int, int] = {}

    def note(row: Any) -> str:
        ragged[row.number] = row.actual_columns
        return "skip"

    # Columns are known by their place: the names of a header may repeat a word of the parser's.
    places = [str(index) for index in range(len(names))]
    include = [str(names.index(name)) for name in wanted]
    try:
        parsed = pacsv.read_csv(
            pa.BufferReader(data),
            read_options=pacsv.ReadOptions(
                use_threads=False, column_names=places, block_size=len(data) + 1
            ),
            parse_options=pacsv.ParseOptions(
                delimiter=layout.delimiter,
                quote_char='"' if layout.quoting else False,
                invalid_row_handler=note,
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=dict.fromkeys(include, pa.string()),
                include_columns=include,
                strings_can_be_null=False,
                check_utf8=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} from line {lines.first} on: cannot be parsed: {error}") from None
    total = parsed.num_rows + len(ragged)
    numbers = np.arange(1, total + 1)
    columns = {
        name: flat(parsed.column(place)) for name, place in zip(wanted, include, strict=True)
    }
    if ragged or damaged:
        numbers = np.delete(numbers, np.array(list(ragged), dtype=np.int64) - 1)
        keep = ~np.isin(numbers, list(damaged))
        numbers = numbers[keep]
        columns = {name: array.filter(pa.array(keep)) for name, array in columns.items()}
    faults = list(damaged.values())
    for number, actual in ragged.items():
        if number not in damaged:
            rule = f"expected {len(names)} columns, found {actual}"
            faults.append(Fault(number, None, None, "ragged_row", rule))
    return Block(path, "line", columns, numbers, total, "", 0, faults, lines=lines)


def _close_quotes(data: bytes, layout: Layout, damaged: dict[int, Fault]) -> bytes:
    """Faults of lines that end within a quote, and the data with their quotes masked.

    The parser would take the following lines into the cell without complaint.
    """
    records = [line for line in data.split(b"\n") if line]
    changed = False
    for index, line in enumerate(records):
        if b'"' in line and DelimitedText(line, layout.delimiter, True).left_open():
            rule = "a quote is opened and not closed on its line"
            damaged.setdefault(index + 1, Fault(index + 1, None, None, "open_quote", rule))
            records[index] = line.replace(b'"', b"?")
            changed = True
    return b"\n".join(records) + b"\n" if changed else data


def coded_ids(block: Table, column: str) -> tuple[np.ndarray, pa.Array]:
    """A column of ids as codes of its rows and the names of the codes, each checked once.

    Returns:
        int32 ``[rows]`` codes, and the names in order of first appearance, blanks around them
        removed (so that two codes may share a name). Rows with an id that is null or empty, or
        holds a control character, are rejected.
    """
    array = block.columns[column]
    if array.null_count:
        block.reject(convert.to_numpy(pc.is_null(array)), column, "null_value", "must not be null")
        array = pc.fill_null(array, "")
    encoded = array.dictionary_encode()
    codes = convert.to_numpy(encoded.indices)
    names = encoded.dictionary
    inner = Table(block.path, block.unit, {column: names}, np.arange(len(names)), 0, "", 0)
    checked = convert.ids(inner, column)
    for reason, rule in dict.fromkeys((fault.reason, fault.rule) for fault in inner.faults):
        bad = np.zeros(len(names), dtype=bool)
        bad[[fault.number for fault in inner.faults if fault.reason == reason]] = True
        block.reject(bad[codes], column, reason, rule)
    return codes, checked


def numbers(block: Table, column: str, reason: str, rule: str) -> np.ndarray:
    """As :func:`padkern.data.convert.numbers`, quick for columns of digits or of few values."""
    array = block.columns[column]
    if pa.types.is_string(array.type) and not array.null_count and len(array):
        if (
            pc.all(pc.ascii_is_decimal(array)).as_py()
            and pc.max(pc.binary_length(array)).as_py() <= _DIGITS
        ):
            return convert.to_numpy(array.cast(pa.int64()))
        encoded = array.dictionary_encode()
        if 4 * len(encoded.dictionary) < len(array):
            names = encoded.dictionary
            inner = Table(block.path, block.unit, {column: names}, np.arange(len(names)), 0, "", 0)
            values = convert.numbers(inner, column, reason, rule)
            codes = convert.to_numpy(encoded.indices)
            block.reject(~inner.ok[codes], column, reason, rule)
            return values[codes]
    return convert.numbers(block, column, reason, rule)
