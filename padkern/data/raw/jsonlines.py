"""A file with one JSON object per line as columns: Arrow where it can, Python where it must."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pajson

from padkern.data.badrows import Fault
from padkern.data.convert import to_numpy
from padkern.data.raw.blocks import Block
from padkern.data.raw.stream import LineFile, Lines
from padkern.data.tables import flat
from padkern.errors import DataError

__all__ = ["NUMBER", "STRING", "TEXT", "json_blocks", "parse_object"]

STRING, NUMBER, TEXT = "string", "number", "text"
_RULES = {
    STRING: "must be a string",
    NUMBER: "must be a finite number",
    TEXT: "must be a text or a list of texts",
}
# Longest line that is tried as a Python literal: its parser needs a hundredfold in memory.
_LONGEST_LITERAL = 2**20


def json_blocks(file: LineFile, fields: Mapping[str, str]) -> Iterator[Block]:
    """Fields of the objects of a file, piece by piece; other fields are passed over.

    A line that is no JSON may also be a Python dictionary, as in the Amazon files of 2014; it is
    read as a literal and nothing is executed. Empty lines are passed over. A field that is absent
    or null is null, a text that is a list is joined with ", ".

    Args:
        file: the file.
        fields: name to kind: ``STRING`` (ids; integers are taken too), ``NUMBER`` or ``TEXT``.

    Returns:
        Blocks with a string column per string or text and a float64 column per number.
        Lines that are no object, or have a field of another kind, become faults.

    Raises:
        DataError: as :meth:`LineFile.pieces`, or if the file has no data row.
    """
    schema: pa.Schema | None = None
    for lines in file.pieces():
        if lines.data.isspace():
            continue
        if schema is None:
            schema = _schema(lines, fields)
        block = _parse_with_arrow(file, lines, schema)
        if block is None:
            block = _parse_with_python(file, lines, fields)
        file.rows_read += block.rows_read
        yield block
    if not file.rows_read:
        raise DataError(f"{file.path}: the file has no data rows")


def parse_object(line: str) -> dict[str, Any] | None:
    """The JSON object or Python dictionary that a line spells out, or None."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        if len(line) > _LONGEST_LITERAL or not line.lstrip().startswith("{"):
            return None
        try:
            value = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return None
    return value if isinstance(value, dict) else None


def _schema(lines: Lines, fields: Mapping[str, str]) -> pa.Schema:
    """Arrow types by the first object; where others differ, Python reads their piece."""
    first = parse_object(lines.records()[0][1].decode("utf-8", "replace")) or {}
    columns = []
    for name, kind in fields.items():
        value = first.get(name)
        if kind == NUMBER:
            columns.append((name, pa.float64()))
        else:
            is_list = kind == TEXT and isinstance(value, list)
            columns.append((name, pa.list_(pa.string()) if is_list else pa.string()))
    return pa.schema(columns)


def _parse_with_arrow(file: LineFile, lines: Lines, schema: pa.Schema) -> Block | None:
    """The block, or None unless every line is a plain object of the schema."""
    data = lines.data
    try:
        if not data.isascii():
            data.decode("utf-8")
        table = pajson.read_json(
            pa.BufferReader(data),
            read_options=pajson.ReadOptions(block_size=min(len(data) + 1, 2**31 - 1)),
            parse_options=pajson.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="ignore"
            ),
        )
    except (pa.ArrowException, UnicodeDecodeError):
        return None
    filled = data.count(b"\n") + (not data.endswith(b"\n"))
    if b"\n\n" in data or data.startswith(b"\n") or table.num_rows != filled:
        return None
    columns = {name: flat(table.column(name)) for name in schema.names}
    for name, array in columns.items():
        if pa.types.is_list(array.type):
            texts = [None if value is None else _plain(value) for value in array.to_pylist()]
            columns[name] = pa.array(texts, pa.string())
        elif pa.types.is_floating(array.type) and not np.isfinite(to_numpy(array)).all():
            return None  # a null or NaN
    count = np.arange(1, table.num_rows + 1)
    return Block(file.path, "line", columns, count, table.num_rows, "", 0, lines=lines)


def _parse_with_python(file: LineFile, lines: Lines, fields: Mapping[str, str]) -> Block:
    columns: dict[str, list[Any]] = {name: [] for name in fields}
    faults: list[Fault] = []
    numbers: list[int] = []
    records = lines.records()
    blank = 0
    for number, (_, line) in enumerate(records, start=1):
        if not line.strip():
            blank += 1
            continue
        fault, values = _row(number, line, fields)
        if fault is not None:
            faults.append(fault)
            continue
        numbers.append(number)
        for name, value in values.items():
            columns[name].append(value)
    arrays = {
        name: pa.array(column, pa.float64() if fields[name] == NUMBER else pa.string())
        for name, column in columns.items()
    }
    order = np.array(numbers, dtype=np.int64)
    return Block(
        *(file.path, "line", arrays, order, len(records) - blank, "", 0, faults), lines=lines
    )


def _row(number: int, line: bytes, fields: Mapping[str, str]) -> tuple[Fault | None, dict]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        rule = f"is not valid UTF-8 (byte 0x{line[error.start]:02x})"
        return Fault(number, None, None, "not_utf8", rule), {}
    record = parse_object(text)
    if record is None:
        return Fault(number, None, text, "not_an_object", "must be one JSON object"), {}
    values = {}
    for name, kind in fields.items():
        value = record.get(name)
        good, value = _value(value, kind)
        if not good:
            shown = str(record.get(name))
            return Fault(number, name, shown, f"not_a_{kind}", _RULES[kind]), {}
        values[name] = value
    return None, values


def _value(value: Any, kind: str) -> tuple[bool, Any]:
    if kind == NUMBER:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False, None
        try:
            return math.isfinite(value), float(value)
        except OverflowError:
            return False, None
    if value is None:
        return True, None
    if kind == STRING:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        return isinstance(value, str), _encodable(value)
    if isinstance(value, (str, int, float, list, tuple)):
        try:
            return True, _encodable(_plain(value))
        except RecursionError:
            pass
    return False, None


def _plain(value: Any) -> str:
    """A text, or what a list of texts (of lists) holds, joined."""
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(_plain, value)))
    return "" if value is None or isinstance(value, dict) else str(value)


def _encodable(value: Any) -> Any:
    """Half a surrogate pair, which JSON may spell but UTF-8 cannot, becomes U+FFFD."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value
