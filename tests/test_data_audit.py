"""The audit: by hand on a toy, and against the published facts of Prime Pantry."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from padkern.data import (
    Dataset,
    Filters,
    Ragged,
    audit,
    format_audit,
    frequency_bins,
    global_time,
    leave_one_out,
    read_dataset,
)

PAPER_EDGES = (0, 35, 100, 205, 361, 585, 898, 1357, 2074, 3348, 8348)


def toy(times=True):
    rows = [[1, 1, 2, 1], [3, 4, 5], [2, 2, 2, 2, 6], [1, 2]]
    stamps = np.array([1, 1, 2, 2, 5, 6, 7, 1, 2, 2, 4, 9, 3, 3])
    return Dataset(
        "toy",
        list("abcd"),
        ["", *"pqrstu"],
        Ragged.from_lists(rows),
        stamps if times else None,
        ["", "x", "", "x", "y", "z", ""],
    )


def test_audit_by_hand():
    data = toy()
    facts = audit(data, leave_one_out(data), max_len=2)
    assert (facts["users"], facts["items"], facts["interactions"]) == (4, 6, 14)
    assert facts["density"] == 14 / 24
    assert {k: facts["length"][k] for k in ("min", "median", "mean", "max")} == {
        "min": 2,
        "median": 3.5,
        "mean": 3.5,
        "max": 5,
    }
    counts = {step["from"]: step["count"] for step in facts["length"]["histogram"]}
    assert counts == {2: 1, 3: 1, 4: 1, 5: 1}
    # Train rows: 1 1 | 3 | 2 2 2 | 1 2
    assert facts["train_frequency"]["groups"] == {
        "freq_0": 3,
        "freq_1_5": 3,
        "freq_6_50": 0,
        "freq_gt_50": 0,
    }
    assert facts["texts"] == {"empty": 2, "duplicates": 1}
    # Seen before: the second and third 1 of a, and three 2s of c.
    assert facts["repeats"] == {
        "transitions": 10,
        "interactions": 5,
        "users": 2,
        "consecutive": 4,
        "exact_duplicates": 2,
    }
    split = facts["split"]
    assert split["users_not_evaluated"] == 1
    assert (split["train_interactions"], split["train_pairs"]) == (8, 4)
    # Targets: valid 2, 4, 2; test 1, 5, 6. In their history: 2 of c in valid, 1 of a in test.
    valid, test = split["valid"], split["test"]
    assert (valid["users"], valid["cold_targets"], valid["masked_targets"]) == (3, 1, 1)
    assert (test["users"], test["cold_targets"], test["masked_targets"]) == (3, 2, 1)
    assert valid["ceiling"] == pytest.approx(2 / 3)
    # Ties: a's valid and test targets share their time.
    assert (valid["timestamp_ties"], test["timestamp_ties"]) == (1, 1)
    assert (valid["histories_cut"], test["histories_cut"]) == (1, 2)
    # Three users with 1, 2 and 1 pairs fill 4 of 6 slots.
    assert facts["padding"]["slots"] == 6
    assert facts["padding"]["share"] == pytest.approx(1 / 3)
    assert facts["sha256"] == data.sha256()


def test_without_timestamps_time_facts_are_unknown():
    data = toy(times=False)
    facts = audit(data, leave_one_out(data), max_len=3)
    assert facts["repeats"]["exact_duplicates"] is None
    assert facts["split"]["test"]["timestamp_ties"] is None
    assert "unknown, no timestamps" in format_audit(facts)


def test_audit_of_a_file_with_drops_is_printable_and_json(tmp_path):
    rows = [f"u{n % 7},i{n * n % 11},{n // 3},{n % 5}" for n in range(80)] + ["u1,,3,4", "x"]
    (tmp_path / "interactions.csv").write_text(
        "user,item,timestamp,rating\n" + "\n".join(rows) + "\n"
    )
    data = read_dataset(
        tmp_path, on_bad_rows="skip", filters=Filters(min_rating=1, k_core=2, keep_last=8)
    )
    facts = json.loads(json.dumps(audit(data, global_time(data), max_len=5)))
    assert facts["input"]["files"][0]["bad_rows"] == {"empty_id": 1, "ragged_row": 1}
    text = format_audit(facts)
    for shown in (
        "interactions.csv",
        "82 rows, dropped: 1 empty_id, 1 ragged_row",
        "filter min_rating",
        "filter k_core",
        "filter keep_last",
        facts["sha256"],
        "global_time",
    ):
        assert shown in text


def test_wide_histograms_use_doubling_ranges():
    data = Dataset(
        "long",
        ["a", "b", "c"],
        ["", "x", "y"],
        Ragged.from_lists([[1, 2] * 50, [1, 2], [1] * 33]),
        None,
        [""] * 3,
    )
    steps = audit(data, leave_one_out(data), max_len=5)["length"]["histogram"]
    assert steps == [
        {"from": 2, "to": 3, "count": 1},
        {"from": 32, "to": 63, "count": 1},
        {"from": 64, "to": 100, "count": 1},
    ]


def test_audit_refuses_a_foreign_split():
    data = toy()
    other = Dataset("o", ["a"], ["", "x"], Ragged.from_lists([[1, 1, 1]]), None, ["", ""])
    with pytest.raises(ValueError, match="does not belong"):
        audit(data, leave_one_out(other), max_len=2)
    with pytest.raises(ValueError, match="max_len"):
        audit(data, leave_one_out(data), max_len=0)


@pytest.fixture(scope="module")
def pantry():
    root = os.environ.get("PADKERN_DATA")
    if not root or not (Path(root) / "prime_pantry").is_dir():
        pytest.skip("needs PADKERN_DATA with a folder prime_pantry")
    data = read_dataset(Path(root) / "prime_pantry")
    return Path(root) / "prime_pantry", data, leave_one_out(data)


@pytest.mark.data
def test_prime_pantry_facts(pantry):
    _, data, split = pantry
    facts = audit(data, split, max_len=20)
    assert (facts["users"], facts["items"], facts["interactions"]) == (12871, 8347, 115004)
    assert f"{facts['density']:.3%}" == "0.107%"
    histogram = {step["from"]: step["count"] for step in facts["length"]["histogram"]}
    users = [3503, 2089, 1520, 1128, 828, 624, 473, 396, 311, 230, 252]
    users += [163, 158, 109, 111, 103, 103, 697, 73]
    assert histogram == dict(enumerate(users, start=5))
    assert facts["train_frequency"]["groups"]["freq_0"] == 909
    assert facts["train_frequency"]["groups"]["freq_1_5"] == 5218 - 909
    assert facts["train_frequency"]["groups"]["freq_gt_50"] == 328
    assert facts["train_frequency"]["max"] == 486
    assert facts["texts"] == {"empty": 0, "duplicates": 14}
    repeats = facts["repeats"]
    assert (repeats["users"], repeats["interactions"]) == (3769, 5127)
    assert (repeats["consecutive"], repeats["transitions"]) == (4046, 102133)
    parts = facts["split"]
    assert (parts["train_interactions"], parts["train_pairs"]) == (89262, 76391)
    assert list(parts["valid"]["targets"].values()) == [443, 2346, 6794, 3288]
    assert list(parts["test"]["targets"].values()) == [813, 3204, 6254, 2600]
    assert (parts["valid"]["masked_targets"], parts["test"]["masked_targets"]) == (454, 336)
    assert f"{parts['valid']['ceiling']:.2%} {parts['test']['ceiling']:.2%}" == "96.47% 97.39%"
    assert facts["padding"]["share"] == pytest.approx(1 - 76391 / (12871 * 20))


@pytest.mark.data
def test_prime_pantry_frequencies_are_the_authors(pantry):
    folder, data, split = pantry
    raw = folder / "raw" / "Prime_Pantry_fre.csv"
    if not raw.is_file():
        pytest.skip("needs the authors' raw files")
    table = np.loadtxt(raw, delimiter=",", skiprows=1, dtype=np.int64)
    np.testing.assert_array_equal(table[:, 0], np.arange(data.num_items + 1))
    np.testing.assert_array_equal(table[:, 1], split.train_frequency)


@pytest.mark.data
def test_prime_pantry_bins_have_the_paper_s_edges(pantry):
    _, _, split = pantry
    last = frequency_bins(split.train_frequency, unseen="last")
    assert last.edges == PAPER_EDGES
    targets = np.bincount(last.item_bins[split.test.targets], minlength=11)[1:]
    assert targets.tolist() == [530, 662, 726, 806, 896, 1062, 1193, 1344, 1847, 3805]
    own = frequency_bins(split.train_frequency)
    assert own.edges == (*PAPER_EDGES[:-1], 8347 - 909, 8348)
    assert np.count_nonzero(own.item_bins == own.unseen_bin) == 909
