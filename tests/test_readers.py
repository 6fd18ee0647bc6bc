"""Readers of published files: every form, the authors' filters, detection, writing."""

from __future__ import annotations

import datetime
import gzip
import html
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import raw_files
from hypothesis import given, settings
from hypothesis import strategies as st

from padkern.cli import main
from padkern.data import (
    Columns,
    Dataset,
    Filters,
    authors_filters,
    convert_raw,
    frequency_bins,
    leave_one_out,
    read_dataset,
    read_raw,
)
from padkern.data.raw import jsonlines, read, stream
from padkern.errors import DataError, EnvError

# (user, item, rating, seconds); u2's b and c share a time.
RATINGS = [
    ("u2", "b", 5.0, 20),
    ("u1", "a", 4.0, 10),
    ("u2", "c", 3.0, 20),
    ("u1", "c", 5.0, 5),
    ("u2", "a", 5.0, 9),
    ("u1", "b", 1.0, 30),
]
ORDERED = {"u1": ["c", "a", "b"], "u2": ["a", "b", "c"]}
METAS = [
    {"asin": "b", "title": "old", "also_buy": ["a", {"asin": "x"}]},
    {"asin": "c", "title": "Caf\u00e9 &amp; Bar\n  9&quot;", "brand": "B"},
    {"asin": "a", "title": "", "feature": ["x", "", "y &lt; z"]},
    {"asin": "b", "title": "new \u65b0", "price": 1.5},
]
TEXTS = {"c": 'Café & Bar 9"', "a": "", "b": "new 新"}


def put(folder: Path, name: str, text: str | bytes) -> Path:
    """A file; its bytes are packed if its name ends in .gz."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return folder


def json_lines(records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def rows_of(dataset: Dataset) -> dict[str, list[str]]:
    return {
        user: [dataset.items[i] for i in dataset.sequences.row(u)]
        for u, user in enumerate(dataset.users)
    }


def texts_of(dataset: Dataset) -> dict[str, str]:
    return dict(zip(dataset.items[1:], dataset.texts[1:], strict=True))


# ---- each form, written from the same rows -------------------------------------------------------


def amazon2018(folder: Path, rows=RATINGS, suffix: str = "") -> Path:
    lines = [f"{item},{user},{rating},{time}\n" for user, item, rating, time in rows]
    put(folder, f"Shop.csv{suffix}", "".join(lines))
    return put(folder, f"meta_Shop.json{suffix}", json_lines(METAS))


def amazon2023(folder: Path, rows=RATINGS, suffix: str = "") -> Path:
    reviews = [
        {"rating": r, "title": "so so", "asin": "x", "parent_asin": i, "user_id": u,
         "timestamp": (10**9 + t) * 1000 + 5}
        for u, i, r, t in rows
    ]  # fmt: skip
    metas = [{"parent_asin": meta["asin"], **meta} for meta in METAS]
    put(folder, f"Shop.jsonl{suffix}", json_lines(reviews))
    return put(folder, f"meta_Shop.jsonl{suffix}", json_lines(metas))


def movielens(folder: Path, rows=RATINGS, suffix: str = "") -> Path:
    lines = [f"{u},{i},{r},{t}\n" for u, i, r, t in rows]
    put(folder, f"ratings.csv{suffix}", "userId,movieId,rating,timestamp\n" + "".join(lines))
    movies = 'movieId,title,genres\nc,"Good, the ""Bad"" (1966)",Western|War\n'
    return put(folder, f"movies.csv{suffix}", movies + "a,Amélie,(no genres listed)\nb,,Drama\n")


def recbole(folder: Path, rows=RATINGS, suffix: str = "") -> Path:
    lines = [f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in rows]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    put(folder, f"shop.inter{suffix}", header + "".join(lines))
    items = 'c\tbig "C"\tX Y\t1\na\t\tX\t2\nb\tB\t\t3\n'
    header = "item_id:token\ttitle:token_seq\tclass:token_seq\tprice:float\n"
    return put(folder, f"shop.item{suffix}", header + items)


def sasrec(folder: Path, rows=RATINGS, suffix: str = "") -> Path:
    ordered = sorted(rows, key=lambda row: row[3])
    number = {name: str(k) for k, name in enumerate(["u1", "u2", "a", "b", "c"], 1)}
    lines = [f"{number[user]} {number[item]}\n" for user, item, *_ in ordered]
    return put(folder, f"shop.txt{suffix}", "".join(lines))


FORMS = {
    form.__name__: form for form in (amazon2018, amazon2023, movielens, recbole, sasrec)
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_sequences(tmp_path, form, suffix):
    data = read_raw(FORMS[form](tmp_path / "shop", suffix=suffix))
    assert data.name == "shop"
    assert data.provenance["format"] == form
    if form == "sasrec":
        assert rows_of(data) == {"1": ["5", "3", "4"], "2": ["3", "4", "5"]}
        assert data.timestamps is None
        assert data.texts == [""] * 4
        return
    assert rows_of(data) == ORDERED
    assert data.users == ["u1", "u2"]
    assert data.items == ["", "c", "a", "b"]  # the order of the items file, of "b" the last row
    times = [5, 10, 30, 9, 20, 20]
    if form == "amazon2023":
        assert data.timestamps.tolist() == [10**9 + t + 0.005 for t in times]
    else:
        assert data.timestamps.tolist() == times
        assert data.timestamps.dtype == np.int64 or form == "recbole"
    assert len({file["sha256"] for file in data.provenance["files"]}) == 2
    json.dumps(data.provenance)


def test_texts_of_each_form(tmp_path):
    for form in ("amazon2018", "amazon2023"):
        data = read_raw(FORMS[form](tmp_path / form))
        assert texts_of(data) == TEXTS
        assert data.provenance["duplicate_items"] == 1
    fields = ["title", "brand", "feature"]
    data = read_raw(amazon2018(tmp_path / "amazon2018"), text_fields=fields)
    assert texts_of(data) == {"c": 'Café & Bar 9". B', "a": "x, y < z", "b": "new 新"}
    data = read_raw(movielens(tmp_path / "ml"))
    assert texts_of(data) == {
        "c": 'Good, the "Bad" (1966). Western, War', "a": "Amélie", "b": "Drama"
    }  # fmt: skip
    data = read_raw(recbole(tmp_path / "rb"))
    assert texts_of(data) == {"c": 'big "C". X Y', "a": "X", "b": "B"}
    with pytest.raises(DataError, match="column 'year' is missing; the file has 'movieId'"):
        read_raw(movielens(tmp_path / "ml"), text_fields=["year"])


@pytest.mark.parametrize("ending", ["\r\n", "\r"])
@pytest.mark.parametrize("form", ["amazon2018", "movielens", "recbole", "sasrec"])
def test_line_ends_byte_order_marks_and_blank_lines(tmp_path, form, ending):
    folder = FORMS[form](tmp_path / "shop")
    want = read_raw(folder)
    for path in folder.iterdir():
        text = path.read_text()
        text = "\n" + text.replace("\n", "\n\n", 2).removesuffix("\n")
        path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", ending).encode())
    found = read_raw(folder)
    assert found.sha256() == want.sha256()
    assert [f["rows_read"] for f in found.provenance["files"]] == [
        f["rows_read"] for f in want.provenance["files"]
    ]


@pytest.mark.parametrize("piece", [1, 5, 64])
@pytest.mark.parametrize("form", FORMS)
def test_pieces_of_any_size(tmp_path, monkeypatch, form, piece):
    folder = FORMS[form](tmp_path)
    want = read_raw(folder)
    monkeypatch.setattr(stream, "_PIECE", piece)
    found = read_raw(folder)
    assert found.sha256() == want.sha256()
    assert found.provenance == want.provenance


@pytest.mark.parametrize("form", ["amazon2018", "amazon2023", "mind", "movielens", "recbole"])
def test_the_order_of_rows_decides_nothing_but_ties(tmp_path, form):
    rows = [
        (f"u{k % 7}", "abc"[k * k % 3], float(1 + k % 5), 100 + 7 * k) for k in range(60)
    ]  # fmt: skip
    write = mind if form == "mind" else FORMS[form]
    want = read_raw(write(tmp_path / "a", rows=rows))
    random.Random(3).shuffle(rows)
    assert read_raw(write(tmp_path / "b", rows=rows)).sha256() == want.sha256()


# ---- Amazon --------------------------------------------------------------------------------------


def test_metadata_as_python_dictionaries(tmp_path):
    folder = amazon2018(tmp_path)
    want = read_raw(folder)
    metas = [{**meta, "also": None, "good": True} for meta in METAS]
    put(folder, "meta_Shop.json", "".join(f"{meta!r}\n" for meta in metas))
    assert read_raw(folder).sha256() == want.sha256()
    put(folder, "meta_Shop.json", f"{METAS[0]!r}\n" + json_lines(METAS[1:]))
    assert read_raw(folder).sha256() == want.sha256()


def test_nothing_in_the_metadata_is_executed(tmp_path):
    folder = amazon2018(tmp_path)
    trap = tmp_path / "trap"
    line = f"{{'asin': 'a', 'title': open({str(trap)!r}, 'w')}}\n"
    put(folder, "meta_Shop.json", line)
    with pytest.raises(DataError, match=r"line 1: must be one JSON object"):
        read_raw(folder, format="amazon2018")
    assert not trap.exists()


@pytest.mark.parametrize("piece", [None, 40])
def test_of_items_with_one_id_the_last_row_counts(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(stream, "_PIECE", piece)
    names = random.Random(0).choices("abcdefgh", k=30)
    metas = [{"asin": name, "title": f"row {k}"} for k, name in enumerate(names)]
    rows = [(f"u{k % 3}", name, 5.0, k) for k, name in enumerate(names)]
    data = read_raw(put(amazon2018(tmp_path, rows=rows), "meta_Shop.json", json_lines(metas)))
    last = {name: k for k, name in enumerate(names)}
    assert texts_of(data) == {name: f"row {k}" for name, k in last.items()}
    assert data.items[1:] == sorted(last, key=last.get)
    assert data.provenance["duplicate_items"] == 30 - len(last)


OBJECTS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.one_of(st.text(max_size=3), st.integers(0, 9), st.none(), st.just(["x"])),
            "text": st.one_of(
                st.text(max_size=4), st.none(), st.lists(st.text(max_size=3), max_size=3),
                st.just([["a"], ["b", None]]), st.just({"a": "b"}), st.just("\ud800"),
            ),
            "number": st.one_of(
                st.integers(-9, 9), st.floats(), st.none(), st.just("5"), st.just(True)
            ),
            "other": st.one_of(st.none(), st.just({"id": "inner", "text": [1]})),
        },
    ),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(OBJECTS, st.booleans())
def test_arrow_and_python_read_objects_alike(tmp_path_factory, records, escape):
    path = tmp_path_factory.mktemp("json") / "x.jsonl"
    lines = "".join(json.dumps(record, ensure_ascii=escape) + "\n" for record in records)
    path.write_bytes(lines.encode("utf-8", "surrogatepass"))
    fields = {"id": jsonlines.STRING, "text": jsonlines.TEXT, "number": jsonlines.NUMBER}

    def read_all():
        (block,) = jsonlines.json_blocks(stream.LineFile(path), fields)
        columns = {name: array.to_pylist() for name, array in block.columns.items()}
        return columns, block.numbers.tolist(), block.faults, block.rows_read

    found = read_all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonlines, "_parse_with_arrow", lambda *_: None)
        assert read_all() == found


def test_arrow_reads_ordinary_metadata(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the slow path was taken")

    monkeypatch.setattr(jsonlines, "_parse_with_python", refuse)
    assert texts_of(read_raw(amazon2018(tmp_path))) == TEXTS


def test_either_order_of_the_first_two_columns(tmp_path):
    folder = amazon2018(tmp_path)
    want = read_raw(folder)
    lines = [f"{user},{item},{rating},{time}\n" for user, item, rating, time in RATINGS]
    put(folder, "Shop.csv", "".join(lines))
    assert rows_of(read_raw(folder)) == rows_of(want)
    with pytest.raises(DataError, match=r"known item|no usable|no item|no user"):
        read_raw(folder, user_first=False)
    lone = put(tmp_path / "lone", "Shop.csv", "".join(lines)) / "Shop.csv"
    with pytest.raises(DataError, match=r"cannot tell .* --user-first or --item-first"):
        read_raw(lone)
    assert rows_of(read_raw(lone, user_first=True)) == ORDERED
    asins = [f"B00000000{item},{user},{rating},{time}\n" for user, item, rating, time in RATINGS]
    put(tmp_path / "lone", "Shop.csv", "".join(asins).replace("B00000000a", "B00000000A"))
    put(tmp_path / "lone", "Shop.csv", "".join(asins).upper())
    assert read_raw(lone).users == ["U1", "U2"]


def test_the_table_that_the_authors_step_writes(tmp_path):
    folder = amazon2018(tmp_path)
    want = read_raw(folder)
    put(folder, "Shop.csv", "item,user,rating,timestamp\n" + (folder / "Shop.csv").read_text())
    assert read_raw(folder, format="amazon2018").sha256() == want.sha256()


def test_reviews_of_2018(tmp_path):
    folder = amazon2018(tmp_path)
    want = read_raw(folder)
    (folder / "Shop.csv").unlink()
    reviews = [
        {"overall": r, "reviewerID": u, "asin": i, "reviewText": "x", "unixReviewTime": t}
        for u, i, r, t in RATINGS
    ]
    put(folder, "Shop_5.json.gz", json_lines(reviews))
    assert read_raw(folder).sha256() == want.sha256()


def test_ratings_table_of_2023(tmp_path):
    folder = amazon2023(tmp_path)
    want = read_raw(folder)
    (folder / "Shop.jsonl").unlink()
    lines = [f"{u},{i},{r},{(10**9 + t) * 1000 + 5}\n" for u, i, r, t in RATINGS]
    put(folder, "Shop.csv.gz", "user_id,parent_asin,rating,timestamp\n" + "".join(lines))
    assert read_raw(folder).sha256() == want.sha256()
    put(folder, "Shop.csv.gz", "user_id,parent_asin,stars,timestamp\nu,a,1,1\n")
    with pytest.raises(DataError, match="column 'rating' is missing"):
        read_raw(folder)


def test_whole_seconds_of_milliseconds_are_integers(tmp_path):
    folder = amazon2023(tmp_path)
    path = folder / "Shop.jsonl"
    path.write_text(path.read_text().replace("005}", "000}"))
    data = read_raw(folder)
    assert data.timestamps.dtype == np.int64
    assert data.timestamps.tolist() == [10**9 + t for t in (5, 10, 30, 9, 20, 20)]


def test_unknown_items(tmp_path):
    rows = [*RATINGS, ("u1", "zz", 5.0, 40), ("u3", "yy", 5.0, 40)]
    folder = amazon2018(tmp_path, rows=rows)
    data = read_raw(folder)
    assert rows_of(data) == ORDERED
    assert data.provenance["filters"] == [
        {"filter": "known_items", "value": "meta_Shop.json", "dropped_interactions": 2,
         "dropped_users": 1, "dropped_items": 2}
    ]  # fmt: skip
    kept = read_raw(folder, unknown_items="keep")
    assert kept.items == ["", "c", "a", "b", "yy", "zz"]
    assert rows_of(kept) == {"u1": ["c", "a", "b", "zz"], "u2": ORDERED["u2"], "u3": ["yy"]}
    with pytest.raises(DataError) as caught:
        read_raw(folder, unknown_items="error")
    assert (
        "Shop.csv line 7, column 'item': item is not in meta_Shop.json (got 'zz'); 1 more"
        in str(caught.value)
    )
    skipped = read_raw(folder, unknown_items="error", on_bad_rows="skip")
    assert skipped.sha256() == data.sha256()
    with pytest.raises(ValueError, match="unknown_items must be"):
        read_raw(folder, unknown_items="ignore")


def test_unused_items_on_request(tmp_path):
    folder = amazon2018(tmp_path, rows=[row for row in RATINGS if row[1] != "b"])
    assert read_raw(folder).items == ["", "c", "a"]
    assert read_raw(folder, keep_unused_items=True).items == ["", "c", "a", "b"]


def authors_reference(rows, known) -> dict[str, list[str]]:
    """What the authors' clean.py keeps, spelled out."""
    users: dict[str, list] = {}
    for user, item, rating, time in rows:
        if item in known and rating >= 4:
            users.setdefault(user, []).append((time, item))
    found = {}
    for user in sorted(users):
        taken = [item for _, item in sorted(users[user], key=lambda pair: pair[0])]
        if len(taken) >= 5:
            found[user] = taken if len(taken) <= 23 else taken[-22:]
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_authors_filters(tmp_path_factory, seed):
    rng = random.Random(seed)
    users = {f"u{k}": n for k, n in enumerate([4, 5, 6, 22, 23, 24, 25, 40])}
    rows = [
        (user, rng.choice("abcx"), float(rng.choice([3, 4, 5]) if noisy else 5), rng.randrange(30))
        for noisy in (False, True)
        for user, count in users.items()
        for _ in range(count)
        if not noisy or rng.random() < 0.2
    ]
    rng.shuffle(rows)
    data = read_raw(amazon2018(tmp_path_factory.mktemp("shop"), rows=rows), authors=True)
    want = authors_reference(rows, "abc")
    assert rows_of(data) == want
    assert data.users == list(want)


def test_authors_filters_can_be_changed_and_have_a_scope(tmp_path):
    rows = [("u", "a", 5.0, t) for t in range(30)] + [("v", "b", 5.0, t) for t in range(30)]
    folder = amazon2018(tmp_path, rows=rows)
    lengths = read_raw(folder, authors=True).sequences.lengths.tolist()
    assert lengths == [22, 22]
    longer = read_raw(folder, authors=True, filters=Filters(keep_last=25, cut_above=29))
    assert longer.sequences.lengths.tolist() == [25, 25]
    whole = read_raw(folder, authors=True, filters=Filters(keep_last=25, cut_above=30))
    assert whole.sequences.lengths.tolist() == [30, 30]
    with pytest.raises(ValueError, match=r"authors' filters are for amazon2018, .* sasrec"):
        read_raw(sasrec(tmp_path / "s"), authors=True)
    with pytest.raises(ValueError, match="cut_above needs keep_last"):
        Filters(cut_above=23)
    assert authors_filters("mind") == Filters(min_user_length=5, keep_last=23)


@pytest.mark.data
def test_prime_pantry_from_files_as_published(tmp_path, padkern_data):
    """The prepared set is the outcome of the authors' filters: put back what they dropped."""
    want = read_dataset(padkern_data / "prime_pantry")
    raw = read_dataset(
        padkern_data / "prime_pantry" / "raw" / "metadata_Prime_Pantry.csv",
        columns=Columns(user="asin", item="title", timestamp=None),
    )
    titles = {user: raw.items[raw.sequences.row(u)[0]] for u, user in enumerate(raw.users)}
    rng = random.Random(1)
    rows = []
    sequences = rows_of(want)
    for user, items in sequences.items():
        times = sorted(rng.sample(range(1000, 4000), len(items)))
        rows += [
            (user, item, rng.choice([4.0, 5.0]), 86400 * t)
            for item, t in zip(items, times, strict=True)
        ]
        if len(items) == 22:  # cut: the authors saw more
            rows += [(user, rng.choice(items), 5.0, 86400 * t) for t in range(2)]
        rows += [(user, rng.choice(items), rng.choice([1.0, 3.0]), 86400 * 2000)]
        rows += [(user, "B000NOTHERE"[:10], 5.0, 86400 * 2001)]
    rows += [(f"A{k:013d}", want.items[1 + k % 8000], 5.0, 86400 * k) for k in range(4000)]
    rng.shuffle(rows)
    folder = tmp_path / "Prime_Pantry"
    put(folder, "Prime_Pantry.csv.gz", "".join(f"{i},{u},{r},{t}\n" for u, i, r, t in rows))
    metas = [{"asin": item, "title": titles[item], "brand": "x"} for item in want.items[1:]]
    metas.insert(5, {"asin": want.items[20], "title": "an older row"})
    metas.append({"asin": "B000UNUSED", "title": "nobody"})
    put(folder, "meta_Prime_Pantry.json.gz", json_lines(metas))

    data = read_raw(folder, authors=True)
    assert data.users == want.users
    assert data.items == want.items
    assert data.texts == want.texts
    assert data.sequences == want.sequences

    assert (data.num_users, data.num_items, data.sequences.values.size) == (12871, 8347, 115004)
    lengths = Counter(data.sequences.lengths.tolist())
    assert (lengths[5], lengths[21], lengths[22], lengths[23]) == (3503, 103, 697, 73)
    assert max(lengths) == 23
    split = leave_one_out(data)
    frequency = split.train_frequency[1:]
    assert split.train.values.size == 89262
    assert (int((frequency == 0).sum()), int((frequency <= 5).sum())) == (909, 5218)
    assert int(frequency.max()) == 486
    assert frequency_bins(split.train_frequency) is not None


# ---- MIND ----------------------------------------------------------------------------------------

NEWS = "".join(
    f"{news}\tsports\tgolf\t{title}\t{abstract}\thttps://x\t[]\t[]\n"
    for news, title, abstract in [
        ("N3", 'A "quoted" title', "Text &amp; more"),
        ("N1", "Élan", ""),
        ("N2", "Plain", "Abstract, with comma"),
    ]
)
BEHAVIORS = (
    "1\tU2\t11/12/2019 2:14:46 PM\tN2 N1\tN3-0 N1-1 N2-1\n"
    "2\tU2\t11/12/2019 12:00:01 AM\tN2 N1\tN3-1 N1-0\n"
    "3\tU10\t1/9/2020 12:59:59 PM\t\tN3-1\n"
    "4\tU10\t1/9/2020 12:59:59 PM\t\tN2-1 N1-0\n"
    "5\tU3\t2/29/2020 1:00:00 AM\tN3\tN1-0\n"
)


def mind(folder: Path, rows=None) -> Path:
    text = BEHAVIORS
    if rows is not None:
        news = {"a": "N1", "b": "N2", "c": "N3"}
        text = "".join(
            f"{k}\t{user}\t11/1/2019 {1 + t // 3600}:{t // 60 % 60:02d}:{t % 60:02d} AM\tN1 N1\t"
            f"N1-0 {news[item]}-1\n"
            for k, (user, item, _, t) in enumerate(rows)
        )
    put(folder, "news.tsv", NEWS)
    return put(folder, "behaviors.tsv", text)


def test_mind_history_then_clicks_by_time(tmp_path):
    data = read_raw(mind(tmp_path))
    assert data.provenance["format"] == "mind"
    assert rows_of(data) == {
        "U10": ["N3", "N2"],
        "U2": ["N2", "N1", "N3", "N1", "N2"],
        "U3": ["N3"],
    }
    assert data.items == ["", "N3", "N1", "N2"]
    assert data.texts == ["", 'A "quoted" title', "Élan", "Plain"]
    assert data.timestamps is None
    both = read_raw(tmp_path, text_fields=["title", "abstract"])
    assert both.texts[1:3] == ['A "quoted" title. Text & more', "Élan"]
    with pytest.raises(ValueError, match=r"text_fields must be of category, .* got 'url'"):
        read_raw(tmp_path, text_fields=["url"])


def test_mind_clicks_alone_have_times(tmp_path):
    data = read_raw(mind(tmp_path), history=False)
    assert rows_of(data) == {"U10": ["N3", "N2"], "U2": ["N3", "N1", "N2"]}
    days = [
        np.datetime64(t, "s").astype(int)
        for t in ["2020-01-09T12:59:59"] * 2 + ["2019-11-12T00:00:01"] + ["2019-11-12T14:14:46"] * 2
    ]
    assert data.timestamps.tolist() == days


def test_mind_train_and_dev_as_one(tmp_path):
    whole = read_raw(mind(tmp_path / "whole"))
    lines = BEHAVIORS.splitlines(keepends=True)
    dev = lines[0].replace("\tN2 N1\t", "\tN2 N1 N3\t")  # by then the history has grown
    for folder, text in (("dev", dev), ("train", "".join(lines[1:]))):
        put(tmp_path / folder, "behaviors.tsv", text)
        put(tmp_path / folder, "news.tsv", NEWS)
    found = read_raw(tmp_path / "dev", tmp_path / "train")
    assert rows_of(found) == rows_of(whole)
    assert found.provenance["duplicate_items"] == 3


@pytest.mark.data
def test_mind_sample_against_a_plain_reading(padkern_data):
    folder = padkern_data / "mind_small_sample"
    impressions: dict[str, list] = {}
    for line in (folder / "behaviors.tsv").read_text().splitlines():
        _, user, time, past, shown = line.split("\t")
        when = datetime.datetime.strptime(time, "%m/%d/%Y %I:%M:%S %p")
        clicks = [word[:-2] for word in shown.split() if word.endswith("-1")]
        impressions.setdefault(user, []).append((when, past.split(), clicks))
    want = {}
    for user, seen in impressions.items():
        seen.sort(key=lambda one: one[0])
        want[user] = seen[0][1] + [news for _, _, clicks in seen for news in clicks]
    data = read_raw(folder, unknown_items="keep")
    assert rows_of(data) == want
    assert data.users == sorted(want)
    titles = dict(
        line.split("\t")[0:4:3] for line in (folder / "news.tsv").read_text().splitlines()
    )
    for item, text in texts_of(data).items():
        assert text == " ".join(html.unescape(titles.get(item, "")).split())
    cut = read_raw(folder, unknown_items="keep", authors=True)
    assert rows_of(cut) == {user: row[-23:] for user, row in want.items() if len(row) >= 5}
    with pytest.raises(DataError, match=r"behaviors.tsv line 1, column 'impressions': item is not"):
        read_raw(folder)


# ---- MovieLens, RecBole, SASRec ------------------------------------------------------------------


@pytest.mark.data
def test_movielens_is_read_as_the_tables_are(padkern_data):
    path = padkern_data / "ml_latest_small" / "ratings.csv"
    want = read_dataset(path, columns=Columns(user="userId", item="movieId"))
    data = read_raw(path)
    assert data.provenance["format"] == "movielens"
    assert rows_of(data) == rows_of(want)
    assert data.timestamps.tolist() == want.timestamps.tolist()
    assert data.users == [str(k) for k in range(1, 611)]  # as numbers, not as text


def test_recbole_without_times_and_without_items(tmp_path):
    text = "user_id:token\titem_id:token\nu2\tb\nu1\tc\nu2\ta\n"
    data = read_raw(put(tmp_path, "x.inter", text))
    assert rows_of(data) == {"u1": ["c"], "u2": ["b", "a"]}
    assert data.timestamps is None
    assert data.items == ["", "a", "b", "c"]
    with pytest.raises(DataError, match="column 'rating' is missing"):
        read_raw(tmp_path, filters=Filters(min_rating=3))
    text = "user_id:token\titem_id_list:token_seq\titem_id:token\nu\ta b\tc\n"
    put(tmp_path, "x.inter", text)
    with pytest.raises(DataError, match="has item lists"):
        read_raw(tmp_path)


def test_recbole_text_without_sequences_of_tokens(tmp_path):
    folder = recbole(tmp_path)
    header = "item_id:token\tbrand:token\tprice:float\n"
    put(folder, "shop.item", header + "c\tC\t1\na\tA\t1\nb\tB\t1\n")
    assert texts_of(read_raw(folder)) == {"c": "C", "a": "A", "b": "B"}


def test_sasrec_with_tabs_and_any_names(tmp_path):
    folder = put(tmp_path, "beauty.txt", "u1\ta\nu2\tb\nu1\tb\n")
    with pytest.raises(DataError, match="no file of a known format"):
        read_raw(folder)
    assert rows_of(read_raw(folder, format="sasrec")) == {"u1": ["a", "b"], "u2": ["b"]}
    with pytest.raises(DataError, match="min_rating filter needs ratings"):
        read_raw(folder, format="sasrec", filters=Filters(min_rating=3))


# ---- detection -----------------------------------------------------------------------------------


def test_files_may_be_named_one_by_one(tmp_path):
    folder = amazon2018(tmp_path)
    want = read_raw(folder)
    found = read_raw(folder / "meta_Shop.json", folder / "Shop.csv")
    assert found.sha256() == want.sha256()
    alone = read_raw(folder / "Shop.csv", user_first=False)
    assert rows_of(alone) == ORDERED
    assert alone.name == "Shop"


def test_other_files_of_a_folder_are_passed_over(tmp_path):
    folder = movielens(tmp_path)
    put(folder, "README.txt", "Summary\n=======\n")
    put(folder, "tags.csv", "userId,movieId,tag,timestamp\n1,2,funny,3\n")
    put(folder, "links.csv", "movieId,imdbId,tmdbId\n1,2,3\n")
    put(folder, "photo.png", b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "inner").mkdir()
    assert read_raw(folder).provenance["format"] == "movielens"


def test_several_formats_need_a_choice(tmp_path):
    folder = sasrec(recbole(tmp_path))
    with pytest.raises(DataError, match=r"several formats \(recbole: .*; sasrec: shop.txt\)"):
        read_raw(folder)
    assert read_raw(folder, format="recbole").provenance["format"] == "recbole"
    assert read_raw(folder, format="sasrec").provenance["format"] == "sasrec"


@pytest.mark.parametrize(
    ("name", "content", "format", "message"),
    [
        ("x.csv", "hello\n", None, "does not look like a file of any known format; name it"),
        ("x.txt", "1 2\n", "mind", "does not look like a file of format mind"),
        ("movies.csv", "movieId,title,genres\n1,a,b\n", None, "no file with interactions"),
        ("x.inter", "", "recbole", "x.inter: the file is empty"),
        ("x.txt", "\n\n", "sasrec", "x.txt: the file has no data rows"),
        ("x.inter", "user_id:token\titem_id:token\n", None, "a header but no data rows"),
        ("x.txt", "1 2\n".encode("utf-16"), "sasrec", "UTF-16"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, format, message):
    path = put(tmp_path, name, content) / name
    with pytest.raises(DataError, match=message) as caught:
        read_raw(path, format=format)
    assert str(tmp_path) in str(caught.value)


def test_sources_and_options_that_do_not_exist(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_raw(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="sources must name"):
        read_raw()
    with pytest.raises(ValueError, match="format must be one of amazon2018"):
        read_raw(tmp_path, format="netflix")


@pytest.mark.parametrize("kind", sorted(raw_files.WRITERS))
def test_files_of_the_benchmark(tmp_path, kind):
    raw_files.WRITERS[kind](tmp_path, 0.0003)
    found = raw_files.read_here(tmp_path)
    assert found["train"] == found["interactions"] - 2 * found["users"] > 0
    assert found["items"] <= found["rows"]


# ---- broken rows ---------------------------------------------------------------------------------

BROKEN = {
    "amazon2018": [
        ("a,u1,5.0", "line 4: expected 4 columns, found 3"),
        (",u1,5.0,3", "line 4, column 'item': must not be empty (got '')"),
        ("a,  ,5.0,3", "line 4, column 'user': must not be empty (got '  ')"),
        ("a,u\x07,5.0,3", "column 'user': must not contain control characters"),
        ("a,u1,5.0,soon", "line 4, column 'timestamp': must be a finite number of seconds"),
        ("a,u1,5.0,nan", "(got 'nan')"),
        ("a,u1,5.0,0x10", "(got '0x10')"),
        ('a,"u1,5.0,3', "line 4: a quote is opened and not closed on its line"),
        ("a,u1\0,5.0,3", "contains a NUL byte"),
        (b"a,u\xff1,5.0,3", "is not valid UTF-8 (byte 0xff)"),
    ],
    "amazon2023": [
        ('{"user_id": "u1"', "line 4: must be one JSON object (got '{\"user_id\": \"u1\"')"),
        ("[1, 2]", "line 4: must be one JSON object"),
        ('{"user_id": 1.5, "parent_asin": "a", "timestamp": 1, "rating": 1}',
         "line 4, column 'user_id': must be a string (got '1.5')"),
        ('{"user_id": "u", "timestamp": 1, "rating": 1}',
         "line 4, column 'parent_asin': must not be null"),
        ('{"user_id": "u", "parent_asin": "", "timestamp": 1, "rating": 1}',
         "line 4, column 'parent_asin': must not be empty"),
        ('{"user_id": "u", "parent_asin": "a", "timestamp": "1", "rating": 1}',
         "line 4, column 'timestamp': must be a finite number (got '1')"),
        ('{"user_id": "u", "parent_asin": "a", "timestamp": NaN, "rating": 1}', "(got 'nan')"),
        ('{"user_id": "u", "parent_asin": "a", "rating": 1}', "(got 'None')"),
        (b'{"user_id": "\xff", "parent_asin": "a", "timestamp": 1}', "not valid UTF-8"),
    ],
    "movielens": [
        ("u1,a,5,1,9", "line 5: expected 4 columns, found 5"),
        ("u1,,5,1", "line 5, column 'movieId': must not be empty"),
        ("u1,zz,5,1", "line 5, column 'movieId': item is not in movies.csv (got 'zz')"),
        ("u1,a,5,", "line 5, column 'timestamp': must be a finite number of seconds (got '')"),
    ],
    "recbole": [
        ("u1\ta\t5", "line 5: expected 4 columns, found 3"),
        ("u1\ta\t5\tinf", "line 5, column 'timestamp'"),
        ("u1\tzz\t5\t1", "item is not in shop.item (got 'zz')"),
    ],
    "sasrec": [
        ("1 2 3", "line 4: expected 2 columns, found 3"),
        ("1", "line 4: expected 2 columns, found 1"),
        ("1 ", "line 4, column 'item_id': must not be empty"),
    ],
    "mind": [
        ("9\tU1\t11/12/2019 2:14:46 PM\tN1", "line 4: expected 5 columns, found 4"),
        ("9\t\t11/12/2019 2:14:46 PM\tN1\tN1-1", "column 'user': must not be empty"),
        ("9\tU1\t13/12/2019 2:14:46 PM\tN1\tN1-1", "line 4, column 'time': must be a time such"),
        ("9\tU1\t2/29/2019 2:14:46 PM\tN1\tN1-1", "(got '2/29/2019 2:14:46 PM')"),
        ("9\tU1\t2/28/2019 0:14:46 PM\tN1\tN1-1", "column 'time'"),
        ("9\tU1\t2019-11-12 14:14:46\tN1\tN1-1", "column 'time'"),
        ("9\tU1\t11/12/2019 2:14:46 PM\tN1\tN1 N2", "column 'impressions': must be news ids"),
        ("9\tU1\t11/12/2019 2:14:46 PM\tN1\t-1", "column 'impressions': must be news ids"),
        ("9\tU1\t11/12/2019 2:14:46 PM\tN1\t", "column 'impressions': must be news ids"),
        ("9\tU1\t11/12/2019 2:14:46 PM\tN1\tN9-1", "item is not in news.tsv (got 'N9')"),
        ("9\tU1\t11/12/2019 2:14:46 PM\tN1 N9\tN1-1",
         "column 'history': item is not in news.tsv (got 'N9')"),
    ],
}  # fmt: skip
EVENTS = {
    "amazon2018": "Shop.csv", "amazon2023": "Shop.jsonl", "movielens": "ratings.csv",
    "recbole": "shop.inter", "sasrec": "shop.txt", "mind": "behaviors.tsv",
}  # fmt: skip


@pytest.mark.parametrize("piece", [None, 100])
@pytest.mark.parametrize(
    ("form", "row", "expected"), [(form, *case) for form in BROKEN for case in BROKEN[form]]
)
def test_broken_rows(tmp_path, monkeypatch, form, row, expected, piece):
    if piece is not None:
        monkeypatch.setattr(stream, "_PIECE", piece)
    folder = mind(tmp_path) if form == "mind" else FORMS[form](tmp_path)
    want = read_raw(folder)
    path = folder / EVENTS[form]
    lines = path.read_bytes().splitlines(keepends=True)
    start = 4 if form in ("movielens", "recbole") else 3
    lines.insert(start, (row if isinstance(row, bytes) else row.encode()) + b"\n")
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError) as caught:
        read_raw(folder)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 300
    aside = tmp_path / "aside" / "quarantine.jsonl"
    found = read_raw(folder, on_bad_rows="quarantine", quarantine=aside)
    assert found.sha256() == want.sha256()
    (entry,) = map(json.loads, aside.read_text().splitlines())
    assert entry["file"] == path.name
    assert entry["line"] == start + 1
    assert sum(found.provenance["files"][-1]["bad_rows"].values()) == 1


def test_broken_rows_of_the_items_file(tmp_path):
    folder = amazon2018(tmp_path)
    put(
        folder,
        "meta_Shop.json",
        json_lines(METAS) + '{"title": "no id"}\n{"asin": "q", "title": {}}',
    )
    with pytest.raises(DataError, match=r"meta_Shop.json line 5, column 'asin': must not be null"):
        read_raw(folder)
    data = read_raw(folder, on_bad_rows="skip")
    assert texts_of(data) == TEXTS
    assert data.provenance["files"][0]["bad_rows"] == {"not_a_text": 1, "null_value": 1}
    with pytest.raises(DataError, match="2 bad rows are more than the 1 allowed"):
        read_raw(folder, on_bad_rows="skip", max_bad_rows=1)


def test_an_item_column_that_is_all_bad(tmp_path):
    folder = put(tmp_path, "x.inter", "user_id:token\titem_id:token\nu\t \nv\t \n")
    with pytest.raises(DataError, match="no usable interaction is left"):
        read_raw(folder, on_bad_rows="skip")


def test_impressions_that_are_all_bad(tmp_path):
    folder = mind(tmp_path)
    put(folder, "behaviors.tsv", BEHAVIORS.replace("-1", "").replace("-0", ""))
    with pytest.raises(DataError, match="column 'impressions': must be news ids with -1"):
        read_raw(folder)
    with pytest.raises(DataError, match="no usable interaction is left"):
        read_raw(folder, on_bad_rows="skip")


def test_times_in_one_file_of_two(tmp_path):
    folder = recbole(tmp_path)
    put(folder, "more.inter", "user_id:token\titem_id:token\nu1\ta\n")
    with pytest.raises(DataError, match="some have a column 'timestamp' and some have none"):
        read_raw(folder)


def test_damaged_gzip(tmp_path):
    folder = amazon2018(tmp_path, suffix=".gz")
    path = folder / "meta_Shop.json.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    with pytest.raises(DataError, match=r"meta_Shop.json.gz: the gzip data is damaged"):
        read_raw(folder, format="amazon2018")
    path.write_bytes(whole[:20] + b"\0\0\0\0\0\0" + whole[26:])
    with pytest.raises(DataError, match="the gzip data is damaged"):
        read_raw(folder, format="amazon2018")


def test_gzip_is_known_by_its_content_and_may_have_members(tmp_path):
    folder = amazon2018(tmp_path)
    want = read_raw(folder)
    for path in folder.iterdir():
        raw = path.read_bytes()
        path.write_bytes(gzip.compress(raw[:30]) + gzip.compress(raw[30:]))
    assert read_raw(folder).sha256() == want.sha256()


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_PIECE", 10)
    monkeypatch.setattr(stream, "_LONGEST_LINE", 50)
    folder = put(tmp_path, "x.txt", "1 2\n" + "9" * 100)
    with pytest.raises(DataError, match=r"x.txt line 2: the line is longer"):
        read_raw(folder, format="sasrec")


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FORMS, "mind"])
def test_written_and_read_again(tmp_path, form):
    folder = mind(tmp_path / "in") if form == "mind" else FORMS[form](tmp_path / "in")
    data = read_raw(folder)
    again = read_dataset(convert_raw(data, tmp_path / "deep" / "out"))
    assert again.sha256() == data.sha256()
    facts = json.loads((tmp_path / "deep" / "out" / "convert.json").read_text())
    assert facts["format"] == form
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_nothing_half_written(tmp_path, monkeypatch):
    data = read_raw(amazon2018(tmp_path / "in"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(read.json, "dumps", full)
        with pytest.raises(EnvError, match=r"out: cannot be written .No space left"):
            convert_raw(data, tmp_path / "place" / "out")
    assert list((tmp_path / "place").iterdir()) == []
    put(tmp_path / "taken", "note.txt", "mine")
    with pytest.raises(EnvError, match="exists already"):
        convert_raw(data, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["note.txt"]
    blanks = read_raw(
        put(tmp_path / "b", "x.inter", "user_id:token\titem_id:token\nu\ta b\nv\tc\n")
    )
    with pytest.raises(DataError, match="item id 'a b' cannot be written"):
        convert_raw(blanks, tmp_path / "place" / "out")
    assert list((tmp_path / "place").iterdir()) == []


def test_command_line(tmp_path, capsys):
    folder = amazon2018(tmp_path / "in")
    out = tmp_path / "out"
    words = ["convert", str(folder), "--out", str(out), "--filter", "min_rating=2"]
    assert main([*words, "--text-fields", "title,brand"]) == 0
    said = capsys.readouterr().out
    assert "meta_Shop.json: 4 rows" in said
    assert "min_rating=2.0 dropped 1 interactions, 0 users, 0 items" in said
    assert f"{out} (amazon2018): 2 users, 3 items, 5 interactions" in said
    again = read_dataset(out)
    assert rows_of(again) == {"u1": ["c", "a"], "u2": ["a", "b", "c"]}
    assert texts_of(again)["c"] == 'Café & Bar 9". B'


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--format", "netflix"], 2, "format must be one of"),
        (["--unknown-items", "ignore"], 2, "unknown_items must be"),
        (["--on-bad-rows", "ignore"], 2, "--on-bad-rows must be"),
        (["--filter", "size=3"], 2, "unknown name 'size'"),
        (["--filter", "cut_above=3"], 2, "cut_above needs keep_last"),
        (["--filter", "min_user_length=9"], 3, "no user is left after the filters"),
    ],
)
def test_command_line_errors(tmp_path, capsys, words, code, part):
    folder = amazon2018(tmp_path / "in")
    assert main(["convert", str(folder), "--out", str(tmp_path / "out"), *words]) == code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("padkern: error: ")
    assert part in line
    assert not (tmp_path / "out").exists()


def test_command_line_keeps_what_is_there(tmp_path, capsys):
    folder = amazon2018(tmp_path / "in")
    assert main(["convert", str(folder), "--out", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_command_line_quarantine(tmp_path):
    folder = amazon2018(tmp_path / "in")
    put(folder, "Shop.csv", (folder / "Shop.csv").read_text() + "a,u1,5.0,soon\n")
    out = tmp_path / "out"
    words = ["convert", str(folder), "--out", str(out), "--quiet"]
    assert main(words) == 3
    assert not out.exists()
    assert main([*words, "--on-bad-rows", "quarantine"]) == 0
    (entry,) = map(json.loads, (tmp_path / "out.quarantine.jsonl").read_text().splitlines())
    assert entry["reason"] == "bad_timestamp"


@pytest.mark.parametrize("twin", ["Shop.csv.gz", "Shop.json", "Shop_5.csv"])
def test_a_folder_with_the_same_interactions_twice_is_refused(tmp_path, twin):
    folder = tmp_path / "raw"
    csv = "".join(f"{item},{user},{rating},{time}\n" for user, item, rating, time in RATINGS)
    rows = [
        {"overall": r, "reviewerID": u, "asin": i, "unixReviewTime": t} for u, i, r, t in RATINGS
    ]
    json_rows = "".join(json.dumps(row) + "\n" for row in rows)
    put(folder, "Shop.csv", csv)
    put(folder, twin, json_rows if "json" in twin else csv)
    with pytest.raises(DataError, match=r"Shop.* the same interactions in two forms"):
        read_raw(folder, format="amazon2018", user_first=False)
    named = read_raw(folder / "Shop.csv", format="amazon2018", user_first=False)
    assert rows_of(named) == ORDERED


def test_a_header_of_ratings_names_the_columns(tmp_path):
    rows = "".join(f"{time},{user},{rating},{item}\n" for user, item, rating, time in RATINGS)
    put(tmp_path, "Shop.csv", "timestamp,user,rating,item\n" + rows)
    assert rows_of(read_raw(tmp_path, format="amazon2018")) == ORDERED
    put(tmp_path, "Shop.csv", "user,item,rating\nu,a,5\n")
    with pytest.raises(DataError, match="column 'timestamp' is missing"):
        read_raw(tmp_path, format="amazon2018")


def test_one_time_far_off_does_not_change_the_unit(tmp_path):
    rows = [*RATINGS, ("u3", "a", 5.0, 10**12)]
    csv = "".join(f"{item},{user},{rating},{time}\n" for user, item, rating, time in rows)
    put(tmp_path, "Shop.csv", csv)
    data = read_raw(tmp_path, format="amazon2018", user_first=False)
    assert sorted(data.timestamps.tolist())[:2] == [5, 9]
