"""Ragged rows, data sets, frequency bins and splits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from padkern.data import (
    Dataset,
    Ragged,
    frequency_bins,
    global_time,
    leave_one_out,
    make_split,
)
from padkern.errors import DataError

LISTS = st.lists(st.lists(st.integers(1, 9), max_size=6), max_size=8)


def dataset(rows, times=None, num_items=9):
    sequences = Ragged.from_lists(rows)
    return Dataset(
        "toy",
        [f"u{i}" for i in range(len(rows))],
        [""] + [f"i{i}" for i in range(1, num_items + 1)],
        sequences,
        None if times is None else np.concatenate([np.asarray(t) for t in times]),
        [""] * (num_items + 1),
    )


@settings(deadline=None, max_examples=50)
@given(rows=LISTS, k=st.integers(0, 7), data=st.data())
def test_ragged_agrees_with_lists(rows, k, data):
    ragged = Ragged.from_lists(rows)
    assert len(ragged) == len(rows)
    assert ragged.values.dtype == ragged.offsets.dtype == np.int64
    assert [ragged.row(i).tolist() for i in range(len(rows))] == rows
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    assert ragged.tail(k) == Ragged.from_lists([row[len(row) - min(k, len(row)) :] for row in rows])
    assert ragged.head(k) == Ragged.from_lists([row[:k] for row in rows])
    picks = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9)) if rows else []
    assert ragged.take(picks) == Ragged.from_lists([rows[i] for i in picks])


def test_ragged_row_is_a_view_and_checks_its_index():
    ragged = Ragged.from_lists([[1, 2], [3]])
    assert np.shares_memory(ragged.row(0), ragged.values)
    assert ragged.row(-1).tolist() == [3]
    with pytest.raises(IndexError, match="row 2"):
        ragged.row(2)


@pytest.mark.parametrize(
    ("values", "offsets"),
    [([1, 2], [0, 1]), ([1, 2], [1, 2]), ([1, 2], [0, 2, 1, 2]), ([1.5], [0, 1]), ([], [])],
)
def test_ragged_refuses_arrays_that_do_not_fit(values, offsets):
    with pytest.raises(ValueError, match="Ragged"):
        Ragged(np.array(values), np.array(offsets, dtype=np.int64))


def test_dataset_refuses_parts_that_do_not_fit():
    rows = Ragged.from_lists([[1, 2]])
    with pytest.raises(ValueError, match="padding"):
        Dataset("d", ["u"], ["a", "b"], rows, None, ["", ""])
    with pytest.raises(ValueError, match=r"1\.\.1"):
        Dataset("d", ["u"], ["", "a"], rows, None, ["", ""])
    with pytest.raises(ValueError, match="texts"):
        Dataset("d", ["u"], ["", "a", "b"], rows, None, ["", "x"])
    with pytest.raises(ValueError, match="2 users"):
        Dataset("d", ["u", "v"], ["", "a", "b"], rows, None, [""] * 3)


def test_digest_sees_order_names_and_times():
    base = dataset([[1, 2, 3]])
    others = [
        dataset([[1, 3, 2]]),
        dataset([[1, 2], [3]]),
        dataset([[1, 2, 3]], [[1, 2, 3]]),
        dataset([[1, 2, 3]], num_items=8),
    ]
    digests = {base.sha256(), *(other.sha256() for other in others)}
    assert len(digests) == 5
    assert base.sha256() == dataset([[1, 2, 3]]).sha256()


def reference_bins(frequency, num_bins):
    """The greedy rule, one item at a time."""
    order = sorted(range(1, len(frequency)), key=lambda i: (-frequency[i], i))
    total = sum(frequency[1:])
    bins, current, mass = {}, 1, 0
    for item in order:
        bins[item] = current
        mass += frequency[item]
        if current < num_bins and mass * num_bins >= total:
            current, mass = current + 1, 0
    return bins


@settings(deadline=None, max_examples=100)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any),
    num_bins=st.integers(1, 12),
)
def test_bins_follow_the_greedy_rule(counts, num_bins):
    frequency = np.array([0, *counts])
    expected = reference_bins(frequency.tolist(), num_bins)
    last = frequency_bins(frequency, num_bins, unseen="last")
    assert last.num_bins == num_bins
    assert last.unseen_bin is None
    assert last.item_bins[0] == 0
    assert {i: int(b) for i, b in enumerate(last.item_bins) if i} == expected
    own = frequency_bins(frequency, num_bins)
    assert own.num_bins == own.unseen_bin == num_bins + 1
    seen = frequency > 0
    assert (own.item_bins[1:][~seen[1:]] == num_bins + 1).all()
    np.testing.assert_array_equal(own.item_bins[seen], last.item_bins[seen])
    for bins in (own, last):
        assert bins.edges[-1] == frequency.size
        assert len(bins.labels) == bins.num_bins + 1
        sizes = np.bincount(bins.item_bins[1:], minlength=bins.num_bins + 1)[1:]
        sizes[-1] += 1  # padding counts as the coldest
        np.testing.assert_array_equal(np.diff(bins.edges), sizes)


def test_bins_labels_and_ties_by_id():
    bins = frequency_bins(np.array([0, 5, 5, 9, 0, 1]), 2)
    # Total 20: items 3 and 1 reach 14 >= 10; item 2 ties with 1 and has the higher id.
    assert bins.item_bins.tolist() == [0, 1, 2, 1, 3, 2]
    assert bins.labels == ("padding", "5-9", "1-5", "0")
    assert bins.edges == (0, 2, 4, 6)


def test_bins_refuse_wrong_counts():
    with pytest.raises(DataError, match="no warm item"):
        frequency_bins(np.zeros(5, dtype=np.int64))
    with pytest.raises(ValueError, match="negative"):
        frequency_bins(np.array([0, -1]))
    with pytest.raises(ValueError, match="num_bins"):
        frequency_bins(np.array([0, 1]), 0)
    with pytest.raises(ValueError, match="unseen"):
        frequency_bins(np.array([0, 1]), unseen="first")
    with pytest.raises(ValueError, match="integer"):
        frequency_bins(np.array([0.0, 1.0]))


def test_leave_one_out():
    split = leave_one_out(dataset([[1, 2, 3, 4], [5, 6], [7, 7, 7], []]))
    assert split.train == Ragged.from_lists([[1, 2], [5, 6], [7], []])
    assert split.valid.users.tolist() == split.test.users.tolist() == [0, 2]
    assert split.valid.history == Ragged.from_lists([[1, 2], [7]])
    assert split.valid.targets.tolist() == [3, 7]
    assert split.test.history == Ragged.from_lists([[1, 2, 3], [7, 7]])
    assert split.test.targets.tolist() == [4, 7]
    assert split.train_frequency.tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 0, 0]
    assert split.info["users_not_evaluated"] == 2
    with pytest.raises(ValueError, match="min_length"):
        leave_one_out(dataset([[1, 2, 3]]), min_length=2)


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=8))
def test_leave_one_out_keeps_every_interaction_once(rows):
    if max(map(len, rows)) < 3:
        with pytest.raises(DataError, match="no user is long enough"):
            leave_one_out(dataset(rows))
        return
    split = leave_one_out(dataset(rows))
    for i, user in enumerate(split.test.users):
        whole = [*split.train.row(user), split.valid.targets[i], split.test.targets[i]]
        assert whole == rows[user]
    assert split.train_frequency.sum() == split.train.values.size


def test_global_time_by_hand():
    data = dataset(
        [[1, 2, 3, 4], [5, 6], [7, 8, 9], [1, 2]],
        [[0, 1, 8, 9], [2, 3], [4, 9, 9], [8, 10]],
        num_items=9,
    )
    # Sorted times: 0 1 2 3 4 8 8 9 9 9 10; the cut points are the values at ranks 5 and 7.
    split = global_time(data, valid_quantile=0.5, test_quantile=0.7)
    assert (split.info["valid_time"], split.info["test_time"]) == (8, 9)
    assert split.train == Ragged.from_lists([[1, 2], [5, 6], [7], []])
    assert split.valid.users.tolist() == [0]
    assert split.valid.targets.tolist() == [3]
    assert split.valid.history == Ragged.from_lists([[1, 2]])
    assert split.test.users.tolist() == [0, 2, 3]
    assert split.test.targets.tolist() == [4, 8, 2]
    assert split.test.history == Ragged.from_lists([[1, 2, 3], [7], [1]])
    assert split.info["users_not_evaluated"] == 1


def test_global_time_never_trains_on_the_future():
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 10, size=n).tolist() for n in rng.integers(1, 12, size=60)]
    times = [np.sort(rng.random(len(row))) for row in rows]
    data = dataset(rows, times)
    split = global_time(data)
    train_times = np.concatenate([t[:n] for t, n in zip(times, split.train.lengths, strict=True)])
    assert train_times.max() < split.info["valid_time"]
    for part, low in ((split.valid, "valid_time"), (split.test, "test_time")):
        for i, user in enumerate(part.users):
            at = part.history.lengths[i]
            assert at > 0
            assert times[user][at] >= split.info[low] > times[user][at - 1]
            assert rows[user][at] == part.targets[i]
            assert part.history.row(i).tolist() == rows[user][:at]


def test_global_time_errors():
    with pytest.raises(DataError, match="needs timestamps"):
        global_time(dataset([[1, 2, 3]]))
    with pytest.raises(DataError, match="no warm item"):
        global_time(dataset([[1, 2, 3], [4, 5, 6]], [[7, 7, 7], [7, 7, 7]]))
    with pytest.raises(DataError, match=r"valid part .* is empty"):
        global_time(dataset([[1, 2], [3]], [[0, 1], [2]]))
    with pytest.raises(ValueError, match="quantile"):
        global_time(dataset([[1]], [[1]]), valid_quantile=0.9, test_quantile=0.8)


def test_make_split_checks_that_something_can_be_learned():
    assert make_split(dataset([[1, 2, 3, 4]])).kind == "leave_one_out"
    with pytest.raises(DataError, match="no warm item"):
        make_split(dataset([[1, 2, 3], [4, 5, 6]]))
    with pytest.raises(ValueError, match="split must be one of"):
        make_split(dataset([[1, 2, 3, 4]]), "random")
