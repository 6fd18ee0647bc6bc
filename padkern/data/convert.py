"""Columns of a table as checked ids, item lists, times and numbers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from padkern.data.tables import Table
from padkern.errors import DataError

__all__ = ["id_lists", "ids", "numbers", "texts", "times", "to_numpy"]

_INTEGER = r"^-?[0-9]{1,18}$"
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_CONTROL = r"[\x00-\x1f\x7f]"
_TIME_RULE = "must be a finite number of seconds or an ISO 8601 date"


def ids(table: Table, column: str) -> pa.Array:
    """The column as identifiers, surrounding blanks removed.

    Strings and integers are accepted. Rejects rows that are null, empty, or hold a control
    character.

    Raises:
        DataError: if the column has another type (Parquet only).
    """
    values = pc.ascii_trim_whitespace(_strings(table, column, "ids"))
    table.reject(to_numpy(pc.equal(values, "")), column, "empty_id", "must not be empty")
    _reject_control(table, column, values)
    return values


def id_lists(table: Table, column: str) -> tuple[pa.Array, np.ndarray]:
    """The column as item lists: ids separated by blanks, or a Parquet list.

    Returns:
        All ids end to end, and the number of ids of each row (int64). Rows that are null or empty,
        or hold an empty id or a control character, are rejected and have length 0.
    """
    array = table.columns[column]
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        _reject_null(table, column, array)
        lengths = to_numpy(pc.fill_null(pc.list_value_length(array), 0)).astype(np.int64)
        owner = np.repeat(np.arange(lengths.size), lengths)
        values = pc.list_flatten(array)
        inner = Table(table.path, table.unit, {column: values}, table.numbers[owner], 0, "", 0)
        flat = ids(inner, column)
        for fault in inner.faults:
            row = int(np.searchsorted(table.numbers, fault.number))
            if table.ok[row]:
                table.ok[row] = False
                table.faults.append(fault)
        table.reject(lengths == 0, column, "empty_sequence", "must hold at least one item")
        keep = table.ok[owner]
        return flat.filter(pa.array(keep)), np.where(table.ok, lengths, 0)
    strings = pc.ascii_trim_whitespace(_strings(table, column, "item lists"))
    empty = to_numpy(pc.equal(strings, ""))
    table.reject(empty, column, "empty_sequence", "must hold at least one item")
    _reject_control(table, column, strings)
    lists = pc.ascii_split_whitespace(strings.filter(pa.array(table.ok)))
    lengths = np.zeros(table.ok.size, dtype=np.int64)
    lengths[table.ok] = to_numpy(pc.list_value_length(lists))
    return pc.list_flatten(lists), lengths


def texts(table: Table, column: str) -> pa.Array:
    """The column as free text; null becomes empty, line breaks and tabs become one blank."""
    array = _strings(table, column, "texts", null_ok=True)
    nul = to_numpy(pc.match_substring(array, "\0"))
    table.reject(nul, column, "nul_byte", "contains a NUL byte")
    array = pc.replace_substring_regex(array, r"[\t\r\n\v\f]+", " ")
    return pc.ascii_trim_whitespace(array)


def numbers(table: Table, column: str, reason: str, rule: str) -> np.ndarray:
    """The column as float64, or int64 if every row is an integer; rejects what is not finite."""
    array = table.columns[column]
    kind = array.type
    if pa.types.is_integer(kind):
        _reject_null(table, column, array)
        array = pc.fill_null(array, 0)
        if kind == pa.uint64():
            large = to_numpy(pc.greater(array, pa.scalar(2**63 - 1, kind)))
            table.reject(large, column, reason, "must be below 2 ** 63")
        return to_numpy(array.cast(pa.int64(), safe=False))
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        _reject_null(table, column, array)
        values = to_numpy(pc.fill_null(array.cast(pa.float64()), 0.0))
        table.reject(~np.isfinite(values), column, reason, rule)
        return values
    strings = pc.ascii_trim_whitespace(_strings(table, column, "numbers"))
    return _parse_numbers(table, column, strings, reason, rule)


def times(table: Table, column: str) -> np.ndarray:
    """The column as seconds: int64 if every row is an integer, else float64.

    Text may hold numbers or ISO 8601 dates (UTC unless it says otherwise); the first row that is
    either decides which. Parquet may hold numbers, dates or timestamps.
    """
    array = table.columns[column]
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        _reject_null(table, column, array)
        return _seconds(array)
    kind = array.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return numbers(table, column, "bad_timestamp", _TIME_RULE)
    strings = pc.ascii_trim_whitespace(_strings(table, column, "timestamps"))
    numeric = to_numpy(pc.match_substring_regex(strings, _NUMBER))
    if not numeric.all() and not numeric[: _first_date(strings)].any():
        dates = _parse_dates(strings)
        bad = to_numpy(pc.is_null(dates))
        if not bad.all():
            table.reject(bad, column, "bad_timestamp", "must be an ISO 8601 date as in other rows")
            return _seconds(dates)
    return _parse_numbers(table, column, strings, "bad_timestamp", _TIME_RULE)


def _parse_numbers(
    table: Table, column: str, strings: pa.Array, reason: str, rule: str
) -> np.ndarray:
    numeric = to_numpy(pc.match_substring_regex(strings, _NUMBER))
    table.reject(~numeric, column, reason, rule)
    strings = pc.if_else(pa.array(numeric), strings, "0")
    if pc.all(pc.match_substring_regex(strings, _INTEGER)).as_py() is not False:
        return to_numpy(strings.cast(pa.int64()))
    values = to_numpy(pc.utf8_ltrim(strings, "+").cast(pa.float64()))
    table.reject(~np.isfinite(values), column, reason, rule)
    return values


def _first_date(strings: pa.Array) -> int:
    found = pc.index(pc.match_substring_regex(strings, r"^[0-9]{4}-[0-9]{2}-[0-9]{2}"), True)
    index = int(found.as_py())
    return index if index >= 0 else len(strings)


def _parse_dates(strings: pa.Array) -> pa.Array:
    naive, zoned = pa.timestamp("us"), pa.timestamp("us", "UTC")
    for kind in (naive, zoned):
        try:
            return strings.cast(kind).cast(naive)
        except pa.ArrowInvalid:
            pass
    return pa.array([_parse_date(scalar, naive, zoned) for scalar in strings], naive)


def _parse_date(scalar: pa.Scalar, naive: pa.DataType, zoned: pa.DataType) -> object | None:
    for kind in (naive, zoned):
        try:
            return scalar.cast(kind).cast(naive).as_py()
        except pa.ArrowInvalid:
            pass
    return None


def _seconds(array: pa.Array) -> np.ndarray:
    # Not safe: nanoseconds are cut to microseconds, which float64 seconds still tell apart.
    micros = pc.fill_null(array.cast(pa.timestamp("us"), safe=False).cast(pa.int64()), 0)
    values = to_numpy(micros)
    if not (values % 1_000_000).any():
        return values // 1_000_000
    return values / 1e6


def _strings(table: Table, column: str, what: str, *, null_ok: bool = False) -> pa.Array:
    """The column as valid UTF-8 without nulls (they are rejected, and become empty)."""
    array = table.columns[column]
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
        table.columns[column] = array
    kind = array.type
    if pa.types.is_integer(kind):
        array = array.cast(pa.string())
    elif not (_is_text(kind) or pa.types.is_null(kind)):
        raise DataError(
            f"{table.path}: column {column!r} has type {kind}, which cannot be read as {what}"
        )
    if not null_ok:
        _reject_null(table, column, array)
    if table.unit == "row" and _is_text(kind):
        array = _valid_utf8(table, column, array)
    return pc.fill_null(array.cast(pa.string()), "")


def _valid_utf8(table: Table, column: str, array: pa.Array) -> pa.Array:
    binary = array.cast(pa.binary())
    try:
        return binary.cast(pa.string())
    except pa.ArrowInvalid:
        pass
    cells: list[str | None] = []
    bad = np.zeros(len(binary), dtype=bool)
    for row, cell in enumerate(binary.to_pylist()):
        try:
            cells.append(None if cell is None else cell.decode("utf-8"))
        except UnicodeDecodeError:
            cells.append("")
            bad[row] = True
    table.reject(bad, column, "not_utf8", "is not valid UTF-8")
    return pa.array(cells, pa.string())


def _reject_null(table: Table, column: str, array: pa.Array) -> None:
    if array.null_count:
        table.reject(to_numpy(pc.is_null(array)), column, "null_value", "must not be null")


def _reject_control(table: Table, column: str, values: pa.Array) -> None:
    bad = to_numpy(pc.match_substring_regex(values, _CONTROL))
    table.reject(bad, column, "control_character", "must not contain control characters")


def _is_text(kind: pa.DataType) -> bool:
    return any(
        check(kind)
        for check in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
        )
    )


def to_numpy(array: pa.Array) -> np.ndarray:
    """A primitive array without nulls as numpy."""
    return array.to_numpy(zero_copy_only=False)
