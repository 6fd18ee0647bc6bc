"""Cold tests of several seeds put together."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "cold_seeds", Path(__file__).resolve().parents[1] / "python" / "cold_seeds.py"
)
cold_seeds = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cold_seeds)


def result(seed: int, value: float, **other) -> dict:
    figures = {"hit@10": value, "ndcg@10": value / 2}
    row = dict.fromkeys(("cold", "among_cold", "warm", "warm_before"), figures)
    row |= {"exposure@10": value, "warm_change": {"ndcg@10": {"difference": -value}}}
    return {
        "dataset": "shop", "split": "leave_one_out", "share": 0.1, "seed": seed,
        "targets": {"cold": 3, "warm": 7}, "rows": {"pad": row},
    } | other  # fmt: skip


def test_means_and_deviations(tmp_path, monkeypatch, capsys):
    for seed, value in ((1, 0.1), (2, 0.3)):
        (tmp_path / f"run-{seed}").mkdir()
        (tmp_path / f"run-{seed}" / "coldtest.json").write_text(json.dumps(result(seed, value)))
    words = ["cold_seeds", *(str(tmp_path / f"run-{seed}") for seed in (1, 2))]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "cold.json")])
    cold_seeds.main()
    found = json.loads((tmp_path / "cold.json").read_text())
    assert found["seeds"] == [1, 2]
    assert found["targets"] == {"cold": [3, 3], "warm": [7, 7]}
    pad = found["rows"]["pad"]
    assert pad["cold"]["hit@10"]["mean"] == pytest.approx(0.2)
    assert pad["cold"]["hit@10"]["sd"] == pytest.approx(0.02**0.5)
    last = capsys.readouterr().out.splitlines()[-1]
    pairs = "20.00 / 10.00 | 20.00 / 10.00 | 20.00 | 20.00 / 10.00 | 20.00 / 10.00"
    assert last == f"| pad | {pairs} | -20.00 ± 14.14 |"


@pytest.mark.parametrize(
    ("other", "message"), [({"share": 0.2}, "share must be alike"), ({}, "each seed once")]
)
def test_what_does_not_belong_together_is_refused(other, message):
    with pytest.raises(SystemExit, match=message):
        cold_seeds.summarise([result(1, 0.1), result(1, 0.2, **other)])


def test_one_seed_has_no_deviation():
    rows = cold_seeds.summarise([result(1, 0.1)])["rows"]
    assert rows["pad"]["warm"]["ndcg@10"] == {"mean": 0.05, "sd": 0.0}
