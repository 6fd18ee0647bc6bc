"""Readers: the same data in every form, ids, order, filters, writing."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from padkern.data import (
    Columns,
    Dataset,
    Filters,
    Ragged,
    read_dataset,
    write_dataset,
)
from padkern.errors import DataError

SEQUENCES = "user\titems\nann\tc a c\nbob\tb a b b\n"
ITEMS = "item\ttext\na\tapple\nb\tpear\nc\tplum\nunused\tquince\n"
INTERACTIONS = [
    ("bob", "b", 1, 5),
    ("ann", "c", 5, 4),
    ("ann", "a", 7, 1),
    ("bob", "a", 1, 3),
    ("ann", "c", 9, 5),
    ("bob", "b", 9, 4),
    ("bob", "b", 4, 2),
]


def put(folder: Path, **files: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("__", ".")).write_bytes(raw)
    return folder


def interactions_text(delimiter: str, rows=INTERACTIONS) -> str:
    lines = [("user", "item", "timestamp", "rating"), *rows]
    return "".join(delimiter.join(map(str, row)) + "\n" for row in lines)


def rows_of(dataset: Dataset) -> dict[str, list[str]]:
    return {
        user: [dataset.items[i] for i in dataset.sequences.row(u)]
        for u, user in enumerate(dataset.users)
    }


def test_sequences_with_items(tmp_path):
    data = read_dataset(put(tmp_path / "shop", sequences__tsv=SEQUENCES, items__tsv=ITEMS))
    assert data.name == "shop"
    assert data.users == ["ann", "bob"]
    assert data.items == ["", "a", "b", "c"]
    assert data.texts == ["", "apple", "pear", "plum"]
    assert data.sequences == Ragged.from_lists([[3, 1, 3], [2, 1, 2, 2]])
    assert data.timestamps is None
    assert data.num_users == 2
    assert data.num_items == 3
    files = {file["name"]: file for file in data.provenance["files"]}
    assert files["items.tsv"]["rows_read"] == 4
    assert files["sequences.tsv"]["interactions_kept"] == 7
    json.dumps(data.provenance)


def test_without_an_items_table_ids_follow_first_appearance(tmp_path):
    data = read_dataset(put(tmp_path, sequences__tsv=SEQUENCES))
    assert data.items == ["", "c", "a", "b"]
    assert data.texts == [""] * 4
    assert rows_of(data) == {"ann": ["c", "a", "c"], "bob": ["b", "a", "b", "b"]}


def test_unused_items_are_kept_on_request_if_they_have_a_text(tmp_path):
    folder = put(tmp_path, sequences__tsv=SEQUENCES, items__tsv=ITEMS + "blank\t\n")
    assert read_dataset(folder, keep_unused_items=True).items == ["", "a", "b", "c", "unused"]


@pytest.mark.parametrize("form", ["tsv", "csv", "parquet", "parquet_time"])
def test_interactions_in_every_form(tmp_path, form):
    if form.startswith("parquet"):
        user, item, time, rating = zip(*INTERACTIONS, strict=True)
        times = pa.array(time, pa.int32())
        if form == "parquet_time":
            times = pa.array([t * 10**6 for t in time], pa.timestamp("us"))
        columns = {"user": list(user), "item": list(item), "timestamp": times, "rating": rating}
        pq.write_table(pa.table(columns), tmp_path / "interactions.parquet")
    else:
        text = interactions_text("\t" if form == "tsv" else ",")
        put(tmp_path, **{f"interactions__{form}": text})
    data = read_dataset(tmp_path)
    assert data.users == ["bob", "ann"]
    # bob's b and a share the time 1 and keep the order of the file.
    assert rows_of(data) == {"bob": ["b", "a", "b", "b"], "ann": ["c", "a", "c"]}
    assert data.timestamps.tolist() == [1, 1, 4, 9, 5, 7, 9]
    assert data.timestamps.dtype == np.int64


def test_file_order_without_a_timestamp_column(tmp_path):
    put(tmp_path, interactions__csv="user,item\nu,b\nv,a\nu,a\n")
    with pytest.raises(DataError, match=r"column 'timestamp' is missing.*file order"):
        read_dataset(tmp_path)
    data = read_dataset(tmp_path, columns=Columns(timestamp=None))
    assert rows_of(data) == {"u": ["b", "a"], "v": ["a"]}
    assert data.timestamps is None


def test_a_file_with_other_column_names(tmp_path):
    put(tmp_path, ratings__csv="when,who,what\n2,u,a\n1,u,b\n1,v,a\n", items__tsv=ITEMS)
    columns = Columns(user="who", item="what", timestamp="when")
    data = read_dataset(tmp_path / "ratings.csv", columns=columns)
    assert rows_of(data) == {"u": ["b", "a"], "v": ["a"]}
    assert data.texts == ["", "apple", "pear"]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1.5", "-2", "1e3"], [-2.0, 1.5, 1000.0]),
        (["+3", "2", "1"], [1.0, 2.0, 3.0]),
        (["2020-01-02", "2020-01-01", "2020-01-03"], [1577836800, 1577923200, 1578009600]),
        (["1970-01-01T00:00:02Z", "1970-01-01T00:00:01Z", "1970-01-01 01:00:00+01:00"], [0, 1, 2]),
        (["1970-01-01 00:00:01.5", "1970-01-01", "1970-01-01 00:00:01.25"], [0, 1.25, 1.5]),
    ],
)
def test_times_as_text(tmp_path, cells, expected):
    rows = "".join(f"u,i{k},{cell}\n" for k, cell in enumerate(cells))
    put(tmp_path, interactions__csv=f"user,item,timestamp\n{rows}v,i0,{cells[0]}\n")
    data = read_dataset(tmp_path)
    assert data.timestamps[:3].tolist() == expected


def test_byte_order_mark_crlf_blank_lines_and_padding_blanks(tmp_path):
    text = "\ufeffuser\titems\r\n\r\n ann \ta  b \r\nbob\tb a\r\n\r\n"
    data = read_dataset(put(tmp_path, sequences__tsv=text))
    assert rows_of(data) == {"ann": ["a", "b"], "bob": ["b", "a"]}


def test_quotes_are_text_in_tsv_and_quotes_in_csv(tmp_path):
    seqs = "user\titems\nu\ta b\nv\tb a\n"
    tsv = put(tmp_path / "t", sequences__tsv=seqs, items__tsv='item\ttext\na\t"x" 5" y\nb\t"\n')
    assert read_dataset(tsv).texts == ["", '"x" 5" y', '"']
    quoted = 'item,text\na,"one, ""two""\nthree"\nb,5" pipe\n'
    csv = put(tmp_path / "c", sequences__tsv=seqs, items__csv=quoted)
    assert read_dataset(csv).texts == ["", 'one, "two" three', '5" pipe']
    both = put(tmp_path / "q", sequences__tsv=seqs, items__tsv='item\ttext\na\t"x\ty"\nb\tz\n')
    assert read_dataset(both, tsv_quoting=True).texts == ["", "x y", "z"]


def test_parquet_sequences_as_lists_and_integer_ids(tmp_path):
    table = pa.table({"user": [10, 20], "items": [[3, 1, 3], [2, 2]]})
    pq.write_table(table, tmp_path / "sequences.parquet")
    pq.write_table(
        pa.table({"item": [1, 2, 3], "text": ["a", None, "c"]}), tmp_path / "items.parquet"
    )
    data = read_dataset(tmp_path)
    assert data.users == ["10", "20"]
    assert data.sequences == Ragged.from_lists([[3, 1, 3], [2, 2]])
    assert data.texts == ["", "a", "", "c"]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (pa.array([1_500_000_001, 0, 10**9], pa.timestamp("ns")), [1.5, 0.0, 1.0]),
        (pa.array([1, 0, 2], pa.timestamp("s", "Europe/Oslo")), [1, 0, 2]),
        (pa.array([1, 0, 2], pa.date32()), [86400, 0, 172800]),
        (pa.array([1, 0, 2], pa.uint64()), [1, 0, 2]),
        (pa.array([1.5, 0, 2], pa.float32()), [1.5, 0.0, 2.0]),
        (pa.array(["1.5", "0.0", "2.0"]).cast(pa.decimal128(5, 1)), [1.5, 0.0, 2.0]),
    ],
)
def test_parquet_types_of_time(tmp_path, times, expected):
    columns = {
        "user": pa.array(["u", "v", "w"]).dictionary_encode(),
        "item": pa.array([7, 8, 8], pa.uint16()),
        "timestamp": times,
    }
    pq.write_table(pa.table(columns), tmp_path / "interactions.parquet")
    data = read_dataset(tmp_path)
    assert data.timestamps.tolist() == expected
    assert data.users == ["u", "v", "w"]
    assert data.items == ["", "7", "8"]


def test_a_row_longer_than_the_parser_s_usual_block(tmp_path):
    long = " ".join(["a", "b"] * 400_000)
    data = read_dataset(put(tmp_path, sequences__tsv=f"user\titems\nu\t{long}\nv\ta\n"))
    assert data.sequences.lengths.tolist() == [800_000, 1]


def test_the_digest_is_that_of_the_file(tmp_path):
    raw = b"\xef\xbb\xbf" + SEQUENCES.encode()
    data = read_dataset(put(tmp_path, sequences__tsv=raw))
    assert data.provenance["files"][0]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert data.provenance["files"][0]["bytes"] == len(raw)


IDS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Zs", "Zl", "Zp", "Cs")),
    min_size=1,
    max_size=4,
)
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8).map(
    str.strip
)


@st.composite
def datasets(draw):
    items = draw(st.lists(IDS, min_size=2, max_size=6, unique=True))
    users = draw(st.lists(IDS, min_size=2, max_size=5, unique=True))
    item = st.integers(1, len(items))
    rows = [draw(st.lists(item, min_size=1, max_size=6)) for _ in users]
    rows[0] = list(range(1, len(items) + 1))  # every item occurs, so ids survive
    times = None
    if draw(st.booleans()):
        stamp = draw(st.sampled_from([st.integers(-(10**12), 10**12), st.floats(-1e12, 1e12)]))
        times = np.concatenate([np.sort([draw(stamp) for _ in row]) for row in rows])
    texts = ["", *(draw(TEXTS) for _ in items)]
    return Dataset("toy", users, ["", *items], Ragged.from_lists(rows), times, texts)


@settings(deadline=None, max_examples=60)
@given(data=datasets())
def test_what_is_written_reads_back(tmp_path_factory, data):
    folder = write_dataset(data, tmp_path_factory.mktemp("round"))
    back = read_dataset(folder)
    assert back.users == data.users
    assert back.items == data.items
    assert back.texts == data.texts
    assert back.sequences == data.sequences
    if data.timestamps is None:
        assert back.timestamps is None
    else:
        np.testing.assert_array_equal(back.timestamps, data.timestamps)


@pytest.mark.parametrize("bad", ["", "a b", "a\tb", " a"])
def test_ids_that_a_file_cannot_hold_are_not_written(tmp_path, bad):
    data = Dataset("d", ["u"], ["", bad], Ragged.from_lists([[1]]), None, ["", ""])
    with pytest.raises(ValueError, match="cannot be written"):
        write_dataset(data, tmp_path)


def read_filtered(tmp_path, rows, **filters):
    put(tmp_path, interactions__csv=interactions_text(",", rows))
    return read_dataset(tmp_path, filters=Filters(**filters))


def test_each_filter_and_its_counts(tmp_path):
    data = read_filtered(tmp_path, INTERACTIONS, min_rating=3)
    assert rows_of(data) == {"bob": ["b", "a", "b"], "ann": ["c", "c"]}
    (step,) = data.provenance["filters"]
    assert (step["filter"], step["value"], step["dropped_interactions"]) == ("min_rating", 3.0, 2)

    data = read_filtered(tmp_path, INTERACTIONS, first_only=True)
    assert rows_of(data) == {"bob": ["b", "a"], "ann": ["c", "a"]}
    data = read_filtered(tmp_path, INTERACTIONS, drop_consecutive_repeats=True)
    assert rows_of(data) == {"bob": ["b", "a", "b"], "ann": ["c", "a", "c"]}
    data = read_filtered(tmp_path, INTERACTIONS, keep_last=2)
    assert rows_of(data) == {"bob": ["b", "b"], "ann": ["a", "c"]}
    assert data.timestamps.tolist() == [4, 9, 7, 9]

    more = [*INTERACTIONS, ("eve", "a", 1, 1)]
    data = read_filtered(tmp_path, more, min_user_length=3)
    assert data.users == ["bob", "ann"]
    assert data.provenance["filters"][0]["dropped_users"] == 1
    data = read_filtered(tmp_path, more, max_users=2)
    assert data.users == ["bob", "ann"]


def test_k_core_is_repeated_until_stable(tmp_path):
    # Dropping item x takes w below 2, which takes y below 2, which takes v below 2.
    pairs = ["t:a", "t:b", "u:a", "u:b", "v:y", "v:a", "w:x", "w:y"]
    rows = [(*pair.split(":"), n, 1) for n, pair in enumerate(pairs)]
    data = read_filtered(tmp_path, rows, k_core=2)
    assert rows_of(data) == {"t": ["a", "b"], "u": ["a", "b"]}
    step = data.provenance["filters"][0]
    assert step["dropped_users"] == 2
    assert step["dropped_items"] == 2
    assert step["rounds"] > 2
    once = read_filtered(tmp_path, rows, item_core=2)
    assert rows_of(once) == {"t": ["a", "b"], "u": ["a", "b"], "v": ["y", "a"], "w": ["y"]}
    users = read_filtered(tmp_path, [*rows, ("z", "a", 1, 1)], user_core=2)
    assert users.users == ["t", "u", "v", "w"]


@settings(deadline=None, max_examples=40)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=40),
    k=st.integers(1, 4),
)
def test_k_core_leaves_the_largest_core(pairs, k):
    from padkern.data.filters import apply_filters

    pairs = sorted(pairs, key=lambda pair: pair[0])
    users = np.array([u for u, _ in pairs], dtype=np.int64)
    items = np.array([i for _, i in pairs], dtype=np.int64)
    keep, _ = apply_filters(users, items, None, Filters(k_core=k))
    left = list(range(len(pairs)))
    while True:
        stay = [
            p
            for p in left
            if sum(users[q] == users[p] for q in left) >= k
            and sum(items[q] == items[p] for q in left) >= k
        ]
        if stay == left:
            break
        left = stay
    assert keep.tolist() == left


def test_filters_run_in_the_documented_order(tmp_path):
    rows = [("u", "a", 1, 5), ("u", "b", 2, 1), ("u", "a", 3, 5), ("u", "c", 4, 5)]
    rows += [("v", item, n, 5) for n, item in enumerate("cba")]
    rows += [("w", "a", 1, 5), ("w", "a", 2, 5)]
    data = read_filtered(
        tmp_path, rows, keep_last=1, min_user_length=2, first_only=True, min_rating=2
    )
    # w has one item left when its length is taken; u and v have two and three, then their last.
    assert rows_of(data) == {"u": ["c"], "v": ["a"]}
    names = [step["filter"] for step in data.provenance["filters"]]
    assert names == ["min_rating", "first_only", "min_user_length", "keep_last"]


def test_filters_that_leave_nothing_or_need_a_rating(tmp_path):
    with pytest.raises(DataError, match="no user is left after the filters"):
        read_filtered(tmp_path, INTERACTIONS, min_user_length=50)
    folder = put(tmp_path / "plain", interactions__csv="user,item,timestamp\nu,a,1\nv,b,1\n")
    with pytest.raises(DataError, match="column 'rating' is missing"):
        read_dataset(folder, filters=Filters(min_rating=1))
    with pytest.raises(DataError, match="min_rating filter needs an interactions table"):
        read_dataset(put(tmp_path / "s", sequences__tsv=SEQUENCES), filters=Filters(min_rating=1))
    with pytest.raises(ValueError, match="k_cores"):
        Filters(k_cores=2)


def test_ratings_are_not_looked_at_unless_needed(tmp_path):
    rows = [("u", "a", 1, ""), ("v", "b", 2, "good")]
    assert read_filtered(tmp_path, rows).num_users == 2
    with pytest.raises(DataError, match=r"line 2, column 'rating': must be a finite number"):
        read_filtered(tmp_path, rows, min_rating=1)


@pytest.fixture(scope="module")
def shared() -> Path:
    root = os.environ.get("PADKERN_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("needs PADKERN_DATA, the folder of the shared data sets")
    return Path(root)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "users", "items", "interactions"),
    [
        ("prime_pantry", 12871, 8347, 115004),
        ("amazon_scientific", 8442, 4385, 59384),
        ("amazon_beauty2014", 22363, 12101, 198502),
        ("amazon_video_games2018", 50546, 16859, 440264),
        ("ml_latest_small", 610, 9724, 100836),
    ],
)
def test_shared_data_sets(shared, name, users, items, interactions):
    data = read_dataset(shared / name)
    assert (data.num_users, data.num_items) == (users, items)
    assert data.sequences.values.size == interactions


@pytest.mark.data
def test_ratings_table_agrees_with_the_sequences(shared):
    folder = shared / "ml_latest_small"
    columns = Columns(user="userId", item="movieId")
    data = read_dataset(folder / "ratings.csv", columns=columns)
    derived = read_dataset(folder)
    assert data.users == derived.users
    assert data.items == derived.items
    assert np.all(np.diff(data.timestamps)[np.diff(data.sequences.row_index()) == 0] >= 0)
    # Both orders are by time; they may differ where a user's times are equal.
    for user in range(data.num_users):
        low, high = data.sequences.offsets[user : user + 2]
        times = dict(zip(data.sequences.values[low:high], data.timestamps[low:high], strict=True))
        again = [times[item] for item in derived.sequences.row(user)]
        assert again == sorted(again)
