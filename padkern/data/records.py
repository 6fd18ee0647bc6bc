"""Records of a delimited file and their physical lines.

The parser of :mod:`padkern.data.tables` does the work on good files; this slower scanner follows
the same rules and runs only when a place has to be named or bytes are damaged.
"""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from padkern.data.badrows import Fault

__all__ = ["DelimitedText", "UnclosedQuote", "damaged_records"]

# Bytes that are no valid text on their own, shown to the parser as "?" so that it keeps going.
_MASK = bytes(63 if code == 0 or code >= 128 else code for code in range(256))


@dataclass(frozen=True)
class DelimitedText:
    """Bytes of a delimited file after the byte order mark."""

    data: bytes
    delimiter: str
    quoting: bool

    def records(self) -> Iterator[tuple[int, int, int]]:
        """First physical line, start and end byte of each record; blank lines are no records.

        This follows the parser's rules: a quote opens a field only at its start, a doubled quote
        is a quote, and newlines inside quotes belong to the field.
        """
        position = start = 0
        first_line = 1
        quoted = False
        for line_number, line in enumerate(self.data.splitlines(keepends=True), start=1):
            if not quoted:
                first_line, start = line_number, position
            position += len(line)
            if self.quoting and (quoted or b'"' in line):
                quoted = _open_after(line, self.delimiter.encode(), quoted)
                if quoted:
                    continue
            if self.data[start:position].strip(b"\r\n"):
                yield first_line, start, position
        if quoted:
            raise UnclosedQuote(first_line)

    def locate(self, numbers: Sequence[int]) -> dict[int, tuple[int, str]]:
        """First physical line and raw text of the given record numbers (from 1)."""
        wanted = set(numbers)
        found: dict[int, tuple[int, str]] = {}
        for number, (line, start, end) in enumerate(self.records(), start=1):
            if number in wanted:
                raw = self.data[start:end].rstrip(b"\r\n").decode("utf-8", "backslashreplace")
                found[number] = (line, raw)
                if len(found) == len(wanted):
                    break
        return found

    def left_open(self) -> bool:
        """Whether a quote is still open at the end of the data."""
        return _open_after(self.data, self.delimiter.encode(), False)

    def cells(self, record: bytes) -> list[bytes]:
        """The cells of one record, good enough to say in which one a byte lies."""
        record = record.rstrip(b"\r\n")
        if self.quoting:
            # Latin-1 maps bytes one to one, so damaged text passes through the csv module.
            rows = csv.reader([record.decode("latin-1")], delimiter=self.delimiter)
            try:
                return [cell.encode("latin-1") for cell in next(rows, [])]
            except csv.Error:  # a cell above the module's size limit
                pass
        return record.split(self.delimiter.encode())


class UnclosedQuote(Exception):
    """A quote that is opened on the given line and never closed."""

    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


def damaged_records(text: DelimitedText, header: list[str]) -> tuple[dict[int, Fault], bytes]:
    """Faults of records with NUL or invalid UTF-8, and the data with those records masked."""
    data = text.data
    try:
        if b"\0" not in data:
            data.decode("utf-8")
            return {}, data
    except UnicodeDecodeError:
        pass
    masked = bytearray(data)
    faults: dict[int, Fault] = {}
    for number, (_, start, end) in enumerate(text.records(), start=1):
        record = data[start:end]
        found = _damage(record)
        if found is None:
            continue
        masked[start:end] = record.translate(_MASK)
        column = value = None
        for index, cell in enumerate(text.cells(record)):
            if _damage(cell) is not None:
                column = header[index] if index < len(header) else None
                value = cell.decode("utf-8", "backslashreplace")
                break
        faults[number] = Fault(number, column, value, *found)
    return faults, bytes(masked)


def _damage(record: bytes) -> tuple[str, str] | None:
    if b"\0" in record:
        return "nul_byte", "contains a NUL byte"
    try:
        record.decode("utf-8")
    except UnicodeDecodeError as error:
        return "not_utf8", f"is not valid UTF-8 (byte 0x{record[error.start]:02x})"
    return None


@functools.cache
def _whole(delimiter: bytes) -> re.Pattern[bytes]:
    """Matches a line of plain and properly quoted fields."""
    mark = re.escape(delimiter)
    field = rb'(?:"[^"]*(?:""[^"]*)*"|[^"' + mark + rb"]*)"
    return re.compile(field + rb"(?:" + mark + field + rb")*")


def _open_after(line: bytes, delimiter: bytes, quoted: bool) -> bool:
    """Whether a quoted field is still open at the end of the line."""
    if not quoted and _whole(delimiter).fullmatch(line.rstrip(b"\r\n")):
        return False
    at_start = not quoted
    index = 0
    while index < len(line):
        char = line[index : index + 1]
        if quoted:
            if char == b'"':
                if line[index + 1 : index + 2] == b'"':
                    index += 1
                else:
                    quoted = False
        elif at_start and char == b'"':
            quoted, at_start = True, False
        else:
            at_start = char == delimiter
        index += 1
    return quoted
