"""Broken input: one clear line that names file, place, column, value and rule, and nothing else."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from padkern.data import Filters, global_time, leave_one_out, make_split, read_dataset
from padkern.errors import DataError

GOOD = [["u", "a", "1"], ["u", "b", "2"], ["v", "b", "1"], ["v", "a", "2"]]
ITEMS = "item\ttext\na\tapple\nb\tpear\n"
SEQUENCES = "user\titems\nu\ta b\nv\tb a\n"


def put(folder: Path, **files: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("__", ".")).write_bytes(raw)
    return folder


def interactions(delimiter: str, *extra: list[str], header=("user", "item", "timestamp")) -> str:
    """Good rows with the extra ones after the first two, so that bad rows stand on line 4."""
    rows = [list(header), *GOOD[:2], *extra, *GOOD[2:]]
    return "".join(delimiter.join(row) + "\n" for row in rows)


def failure(folder: Path, **options) -> str:
    with pytest.raises(DataError) as caught:
        read_dataset(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 3
    return message


# Each case: cells of a bad interaction row, then what its message must hold.
BAD_ROWS = {
    "ragged short": (["u", "a"], "expected 3 columns, found 2"),
    "ragged long": (["u", "a", "1", "9"], "expected 3 columns, found 4"),
    "empty user": (["", "a", "1"], "column 'user': must not be empty (got '')"),
    "blank user": (["  ", "a", "1"], "column 'user': must not be empty (got '  ')"),
    "empty item": (["u", "", "1"], "column 'item': must not be empty"),
    "empty time": (["u", "a", ""], "column 'timestamp': must be a finite number"),
    "word for time": (["u", "a", "soon"], "(got 'soon')"),
    "nan time": (["u", "a", "nan"], "column 'timestamp': must be a finite number"),
    "NaN time": (["u", "a", "NaN"], "(got 'NaN')"),
    "inf time": (["u", "a", "inf"], "(got 'inf')"),
    "minus inf time": (["u", "a", "-Infinity"], "(got '-Infinity')"),
    "overflow time": (["u", "a", "1e999"], "(got '1e999')"),
    "underscore time": (["u", "a", "1_000"], "(got '1_000')"),
    "hex time": (["u", "a", "0x10"], "(got '0x10')"),
    "date among numbers": (["u", "a", "2020-01-01"], "(got '2020-01-01')"),
    "full-width digits": (["u", "a", "１"], "column 'timestamp'"),
    "unknown item": (["u", "zz", "1"], "column 'item': item is not in items.tsv (got 'zz')"),
    "control character": (["u\x07", "a", "1"], "column 'user': must not contain control"),
    "very long value": (["u", "a" * 5000, "1"], "aaa...'"),
}


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_interaction_rows(tmp_path, suffix, case):
    row, expected = BAD_ROWS[case]
    text = interactions("," if suffix == "csv" else "\t", row)
    folder = put(tmp_path, items__tsv=ITEMS, **{f"interactions__{suffix}": text})
    message = failure(folder)
    assert f"{folder / f'interactions.{suffix}'} line 4" in message
    assert expected in message
    assert len(message) < 300
    for mode in ("skip", "quarantine"):
        quarantine = tmp_path / "run" / "bad.jsonl"
        data = read_dataset(folder, on_bad_rows=mode, quarantine=quarantine)
        assert data.sequences.values.tolist() == [1, 2, 2, 1]
        assert sum(data.provenance["files"][1]["bad_rows"].values()) == 1
    (entry,) = map(json.loads, quarantine.read_text(encoding="utf-8").splitlines())
    assert (entry["file"], entry["line"]) == (f"interactions.{suffix}", 4)
    assert entry["raw"].startswith(row[0])


RAW_BYTES = {
    "not UTF-8": (b"u,\xff\xfe,1", "column 'item': is not valid UTF-8 (byte 0xff)"),
    "cut UTF-8": (b"u,a,1\xc3", "column 'timestamp': is not valid UTF-8"),
    "Latin-1 in a ragged row": (b"u,caf\xe9", "column 'item': is not valid UTF-8 (byte 0xe9)"),
    "NUL": (b"u\0x,a,1", "column 'user': contains a NUL byte"),
    "NUL only": (b"\0", "column 'user': contains a NUL byte"),
    "embedded newline in an id": (b'u,"a\nb",1', "column 'item': must not contain control"),
    "blanks only": (b"   ", "expected 3 columns, found 1"),
}


@pytest.mark.parametrize("case", RAW_BYTES)
def test_bad_bytes(tmp_path, case):
    row, expected = RAW_BYTES[case]
    good = interactions(",").encode().splitlines(keepends=True)
    raw = b"".join([*good[:3], row + b"\n", *good[3:]])
    folder = put(tmp_path, interactions__csv=b"\xef\xbb\xbf" + raw)
    message = failure(folder)
    assert f"{folder / 'interactions.csv'} line 4" in message
    assert expected in message
    data = read_dataset(folder, on_bad_rows="quarantine", quarantine=tmp_path / "q")
    assert data.sequences.values.tolist() == [1, 2, 2, 1]
    assert len((tmp_path / "q").read_text().splitlines()) == 1


def test_lines_are_physical_lines(tmp_path):
    """Blank lines and newlines inside quotes count, whatever ends the lines."""
    for end in ("\n", "\r\n", "\r"):
        lines = ["item,text", "", 'a,"one', "", 'two"', 'b,"x ""y"" z"', "", "c,d,e"]
        folder = put(tmp_path, sequences__tsv=SEQUENCES, items__csv=end.join(lines) + end)
        assert "items.csv line 8: expected 2 columns, found 3" in failure(folder)


def test_embedded_newline_in_tsv_breaks_both_halves(tmp_path):
    text = "item\ttext\na\tapple\npie\nb\tpear\n"
    message = failure(put(tmp_path, sequences__tsv=SEQUENCES, items__tsv=text))
    assert "items.tsv line 3: expected 2 columns, found 1" in message


def test_the_first_bad_line_is_named_and_the_others_counted(tmp_path):
    rows = [["u", "a", "x"], ["u", "", "1"], ["u"]]
    message = failure(put(tmp_path, interactions__csv=interactions(",", *rows)))
    assert "line 4, column 'timestamp'" in message
    assert "2 more bad rows in this file" in message


SEQUENCE_ROWS = {
    "ragged": ("w", "expected 2 columns, found 1"),
    "no items": ("w\t", "column 'items': must hold at least one item"),
    "no user": ("\ta", "column 'user': must not be empty"),
    "unknown item": ("w\ta zz", "column 'items': item is not in items.tsv (got 'zz')"),
    "repeated user": ("u\ta", "column 'user': must be unique in this file"),
}


@pytest.mark.parametrize("case", SEQUENCE_ROWS)
def test_bad_sequence_rows(tmp_path, case):
    row, expected = SEQUENCE_ROWS[case]
    text = SEQUENCES + row + "\n"
    folder = put(tmp_path, sequences__tsv=text, items__tsv=ITEMS)
    message = failure(folder)
    assert f"{folder / 'sequences.tsv'} line 4" in message
    assert expected in message
    data = read_dataset(folder, on_bad_rows="skip")
    # Of the row with an unknown item only that interaction goes.
    assert data.users == (["u", "v", "w"] if case == "unknown item" else ["u", "v"])
    assert data.provenance["files"][1]["bad_rows"]


ITEM_ROWS = {
    "ragged": ("c", "expected 2 columns, found 1"),
    "no id": ("\tpear", "column 'item': must not be empty"),
    "duplicate item": ("a\tagain", "column 'item': must be unique in this file"),
}


@pytest.mark.parametrize("case", ITEM_ROWS)
def test_bad_item_rows(tmp_path, case):
    row, expected = ITEM_ROWS[case]
    folder = put(tmp_path, sequences__tsv=SEQUENCES, items__tsv=f"{ITEMS}{row}\n")
    message = failure(folder)
    assert f"{folder / 'items.tsv'} line 4" in message
    assert expected in message
    assert read_dataset(folder, on_bad_rows="skip").texts == ["", "apple", "pear"]


PARQUET = {
    "null user": ({"user": ["u", None, "v"]}, "row 2, column 'user': must not be null"),
    "null item": ({"item": ["a", "b", None]}, "row 3, column 'item': must not be null"),
    "null time": ({"timestamp": [1, None, 3]}, "row 2, column 'timestamp': must not be null"),
    "NaN time": ({"timestamp": [1.0, 2.0, np.nan]}, "row 3, column 'timestamp': must be a finite"),
    "inf time": ({"timestamp": [np.inf, 2.0, 3.0]}, "row 1, column 'timestamp': must be a finite"),
    "huge time": (
        {"timestamp": pa.array([1, 2, 2**64 - 1], pa.uint64())},
        "row 3, column 'timestamp': must be below 2 ** 63",
    ),
    "bad text time": ({"timestamp": ["1", "x", "3"]}, "row 2, column 'timestamp'"),
    "empty item": ({"item": ["a", "", "b"]}, "row 2, column 'item': must not be empty"),
    "newline in an id": ({"item": ["a", "a\nb", "b"]}, "row 2, column 'item': must not contain"),
    "float ids": ({"item": [1.0, 2.0, 3.0]}, "column 'item' has type double"),
    "flag times": ({"timestamp": [True, False, True]}, "column 'timestamp' has type bool"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_bad_parquet(tmp_path, case):
    change, expected = PARQUET[case]
    columns = {"user": ["u", "u", "v"], "item": ["a", "b", "a"], "timestamp": [1, 2, 3], **change}
    pq.write_table(pa.table(columns), tmp_path / "interactions.parquet")
    message = failure(tmp_path)
    assert str(tmp_path / "interactions.parquet") in message
    assert expected in message
    if "type" not in expected:
        quarantine = tmp_path / "q.jsonl"
        # Without v's only row one user is left; the quarantine is written all the same.
        with contextlib.suppress(DataError):
            read_dataset(tmp_path, on_bad_rows="quarantine", quarantine=quarantine)
        (entry,) = map(json.loads, quarantine.read_text().splitlines())
        assert f"row {entry['row']}" in expected


def test_parquet_text_that_is_not_utf8(tmp_path):
    items = pa.array([b"a", b"\xff", b"b"], pa.binary())
    broken = pa.StringArray.from_buffers(3, *items.buffers()[1:])
    columns = {"user": ["u", "u", "v"], "item": broken, "timestamp": [1, 2, 3]}
    pq.write_table(pa.table(columns), tmp_path / "interactions.parquet")
    assert "row 2, column 'item': is not valid UTF-8" in failure(tmp_path)


def test_bad_parquet_lists(tmp_path):
    columns = {"user": ["u", "v", "w", "x"], "items": [["a", "b"], ["b", ""], [], None]}
    pq.write_table(pa.table(columns), tmp_path / "sequences.parquet")
    message = failure(tmp_path)
    assert "row 2, column 'items': must not be empty" in message
    assert "2 more bad rows" in message


def test_damaged_parquet(tmp_path):
    (tmp_path / "interactions.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    assert "is not a readable Parquet file" in failure(tmp_path)


WHOLE_FILES = {
    "empty": (b"", "the file is empty"),
    "blank lines": (b"\n \n\n", "the file is empty"),
    "mark only": (b"\xef\xbb\xbf", "the file is empty"),
    "header only": (b"user,item,timestamp\n", "header but no data rows"),
    "header without newline": (b"user,item,timestamp", "header but no data rows"),
    "wrong delimiter": (b"user;item;timestamp\nu;a;1\n", "column 'user' is missing"),
    "no header": (b"u,a,1\nv,b,2\n", "column 'user' is missing; the file has 'u', 'a', '1'"),
    "column twice": (b"user,item,item,timestamp\n", "line 1: the header names column 'item' twice"),
    "UTF-16": ("user,item,timestamp\nu,a,1\n".encode("utf-16"), "is UTF-16"),
    "Latin-1 header": (b"us\xe9r,item\nu,a\n", "line 1: the header is not valid UTF-8"),
    "NUL in header": (b"us\0er,item\nu,a\n", "line 1: the header contains a NUL byte"),
    "open quote": (
        b'user,item,timestamp\nu,a,1\nu,"b,2\nv,a,1\n',
        "line 3: a quote is opened and never closed",
    ),
    "open quote in header": (b'user,"item\nu,a\n', "line 1: a quote is opened and never closed"),
    "one user": (b"user,item,timestamp\nu,a,1\nu,b,2\n", "only one user is left"),
    "one item": (b"user,item,timestamp\nu,a,1\nv,a,2\n", "only one item is left"),
}


@pytest.mark.parametrize("case", WHOLE_FILES)
def test_whole_files(tmp_path, case):
    raw, expected = WHOLE_FILES[case]
    for mode in ("error", "skip"):
        folder = put(tmp_path, interactions__csv=raw)
        message = failure(folder, on_bad_rows=mode)
        assert str(folder / "interactions.csv") in message
        assert expected in message


def test_folders(tmp_path):
    assert "neither sequences nor interactions" in failure(put(tmp_path / "none", items__tsv=ITEMS))
    both = put(tmp_path / "both", sequences__tsv=SEQUENCES, interactions__csv="x")
    assert "found sequences.tsv and interactions.csv" in failure(both)
    assert "no such file or folder" in failure(tmp_path / "missing" / "folder")
    (tmp_path / "data.txt").write_text("x")
    assert "must end in .tsv, .csv, .parquet" in failure(tmp_path / "data.txt")
    header = put(tmp_path / "h", sequences__tsv=SEQUENCES, items__tsv="item\ttext\n")
    assert "items.tsv: the file has a header but no data rows" in failure(header)
    empty = put(tmp_path / "e", sequences__tsv=SEQUENCES, items__tsv="")
    assert "items.tsv: the file is empty" in failure(empty)


def test_no_user_long_enough_and_no_warm_item(tmp_path):
    data = read_dataset(put(tmp_path / "short", sequences__tsv=SEQUENCES))
    with pytest.raises(DataError, match=r"no user is long enough.* the longest of 2 users has 2"):
        leave_one_out(data)
    data = read_dataset(put(tmp_path / "cold", sequences__tsv="user\titems\nu\ta b c\nv\tb a d\n"))
    with pytest.raises(DataError, match="no warm item"):
        make_split(data)
    same = "user,item,timestamp\n" + "".join(f"{u},{i},5\n" for u in "uvw" for i in "abcd")
    with pytest.raises(DataError, match="no warm item"):
        global_time(read_dataset(put(tmp_path / "same", interactions__csv=same)))


def test_nothing_left_and_too_many_bad_rows(tmp_path):
    text = interactions(",").replace("1\n", "x\n").replace("2\n", "y\n")
    folder = put(tmp_path, interactions__csv=text)
    quarantine = tmp_path / "q.jsonl"
    message = failure(folder, on_bad_rows="quarantine", quarantine=quarantine)
    assert "no usable row is left; all 4 rows were dropped" in message
    assert len(quarantine.read_text().splitlines()) == 4
    message = failure(folder, on_bad_rows="skip", max_bad_rows=3)
    assert "4 bad rows are more than the 3 allowed" in message
    assert "line 2, column 'timestamp'" in message


def test_quarantine_needs_a_path_and_leaves_no_old_file(tmp_path):
    folder = put(tmp_path / "d", interactions__csv=interactions(","))
    with pytest.raises(ValueError, match="path of the quarantine file"):
        read_dataset(folder, on_bad_rows="quarantine")
    with pytest.raises(ValueError, match="on_bad_rows must be"):
        read_dataset(folder, on_bad_rows="ignore")
    old = tmp_path / "q.jsonl"
    old.write_text("old\n")
    read_dataset(folder, on_bad_rows="quarantine", quarantine=old)
    assert old.read_text() == ""


CELL = st.text(st.sampled_from('ab1 ,"\t\n\r\0é\x7f'), max_size=4)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.lists(CELL, max_size=4), max_size=6),
    suffix=st.sampled_from(["csv", "tsv"]),
    cut=st.integers(0, 3),
)
def test_any_bytes_give_data_or_one_line(tmp_path_factory, rows, suffix, cut):
    """Whatever the file holds: a data set or one DataError line; lines named do exist."""
    delimiter = "," if suffix == "csv" else "\t"
    good = interactions(delimiter)
    raw = (good + "\n".join(delimiter.join(row) for row in rows)).encode()
    raw = raw[: len(raw) - cut]
    folder = tmp_path_factory.mktemp("fuzz")
    put(folder, **{f"interactions__{suffix}": raw})
    lines = len(raw.splitlines())
    try:
        read_dataset(folder)
    except DataError as error:
        message = str(error)
        assert "\n" not in message
        if f".{suffix} line " in message:
            number = message.split(f".{suffix} line ")[1].split(":")[0].split(",")[0]
            assert 1 < int(number) <= lines
    try:
        data = read_dataset(folder, on_bad_rows="skip")
    except DataError as error:
        # The good rows are enough for a data set, so only the file as a whole can be at fault.
        if "never closed" not in str(error):
            raise
    else:
        assert data.num_users >= 2
        assert all(name == name.strip(" \t\n\r\v\f") != "" for name in data.users)
    if rows:
        with pytest.raises(DataError):
            read_dataset(folder, filters=Filters(min_user_length=10**6), on_bad_rows="skip")
