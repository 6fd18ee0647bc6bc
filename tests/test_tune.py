"""Tuning: the same number of trials for every method, validation alone, the grid that comes out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from padkern.cli import main
from padkern.errors import UsageError
from padkern.pad import methods
from padkern.pad.config import RunConfig
from padkern.pad.grid import cells, tune
from padkern.pad.grid.runner import compare
from padkern.pad.grid.space import Range, read_search, space_of
from padkern.pad.grid.spec import read_grid

SMALL = (
    "{model: {dim: 8, num_layers: 1}, text.pca: 4, pretrain.epochs: 3, pretrain.batch_size: 16,"
    " evaluation.resamples: 100}"
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """Twenty items of four kinds, twenty-four users who stay with one kind."""
    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)
    rows = ["user\titems\n"]
    for user in range(24):
        chosen = rng.permutation(np.arange(user % 4, 20, 4))[:4]
        rows.append(f"u{user}\t{' '.join(f'i{k}' for k in chosen)}\n")
    (folder / "sequences.tsv").write_text("".join(rows))
    lines = [f"i{k}\tkind {k % 4} thing {k}\n" for k in range(20)]
    (folder / "items.tsv").write_text("item\ttext\n" + "".join(lines))
    np.save(folder / "text.npy", rng.normal(size=(20, 6)).astype(np.float32))
    (folder / "text.items.txt").write_text("".join(f"i{k}\n" for k in range(20)))
    return folder


@pytest.fixture
def grid(shop, tmp_path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(
        f"datasets: {{shop: {{data: {shop}, text: {shop / 'text.npy'}}}}}\n"
        "methods: [most_pop, text_knn, pretrain]\nseeds: [1]\n"
        f"set: {SMALL}\nsearch: {{pretrain.epochs: [2, 3], model.dropout: {{low: 0, high: 0.4}}}}\n"
    )
    return path


# ---- ranges --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"model.dropuot": [0.1]}, "g: search.model.dropuot: unknown key 'model.dropuot'"),
        ({"model.dropout": []}, "g: search.model.dropout.choices: List should have at least 1"),
        ({"model.dropout": 3}, "g: search.model.dropout: Input should be a valid dictionary"),
        ({"model.dropout": {"low": 0.1}}, "give either choices, or both low and high"),
        ({"model.dropout": {}}, "give either choices, or both low and high"),
        ({"model.dropout": {"low": 0.3, "high": 0.1}}, "low must be below high, got 0.3 and 0.1"),
        ({"model.dropout": {"low": 0, "high": 0.1, "scale": "log"}}, "low must be positive on a"),
        ({"model.dropout": {"low": 0, "hihg": 1}}, "search.model.dropout.hihg: Extra inputs"),
    ],
)
def test_mistakes_in_ranges(search, message):
    with pytest.raises(UsageError) as error:
        read_search(search, "g")
    assert message in str(error.value)


def test_spaces_are_around_the_configuration_and_fit_it():
    config = RunConfig()
    keys = ("pretrain.lr", "pretrain.epochs", "align.gamma", "model.pool_decay")
    space, unknown = space_of(keys, config, {}, "g")
    assert (space["pretrain.lr"].low, space["pretrain.lr"].high) == (5e-4, 5e-2)
    assert space["pretrain.lr"].scale == "log"
    assert space["pretrain.epochs"].choices == [5, 10, 20]
    assert unknown == ["model.pool_decay"]
    search = read_search({"pretrain.lr": {"low": 1, "high": 2}}, "g")
    space, _ = space_of(keys, config, search, "g")
    assert space["pretrain.lr"] == Range(low=1, high=2)
    with pytest.raises(UsageError, match=r"g: search\.model\.dropout: model\.dropout: Input"):
        space_of(("model.dropout",), config, read_search({"model.dropout": [0.1, 1.5]}, "g"), "g")
    space, unknown = space_of(("rivals.null_dim",), config, {}, "g")
    assert (space["rivals.null_dim"].choices, unknown) == ([16, 32, 48], [])
    narrow = config.with_values({"model.dim": 2}, "g")
    assert space_of(("rivals.null_dim",), narrow, {}, "g")[0]["rivals.null_dim"].choices == [1, 2]
    without = config.with_values({"align.gamma": 0.0}, "g")
    assert space_of(("align.gamma",), without, {}, "g")[1] == ["align.gamma"]


def test_every_tunable_key_exists():
    for method in methods.METHODS.values():
        space, unknown = space_of(method.tunable, RunConfig(), {}, "g")
        assert (set(space), unknown) == (set(method.tunable), [])


# ---- without optuna ------------------------------------------------------------------------------


def test_error_without_optuna(grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    words = ["tune", str(grid), "--out", str(tmp_path / "out"), "--trials", "2"]
    assert main(words) == 5
    assert "needs the package optuna" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- with optuna ---------------------------------------------------------------------------------


def test_equal_trials_and_a_grid_that_compare_reads(grid, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    ranked = []
    real = cells.train_and_rank
    monkeypatch.setattr(
        tune, "train_and_rank",
        lambda *a, **k: (ranked.append(k["parts"]), real(*a, **k))[1],
    )  # fmt: skip
    out = tmp_path / "out"
    best = tune.tune(grid, out, trials=3, device="cpu")
    assert ranked == [("valid",)] * 6
    record = json.loads((out / "tuning.json").read_text())
    by_method = {study["method"]: study for study in record["studies"]}
    assert [by_method[m]["trials"] for m in ("most_pop", "text_knn", "pretrain")] == [0, 3, 3]
    for name in ("text_knn", "pretrain"):
        study = by_method[name]
        assert study["complete"] + study["pruned"] + study["failed"] == 3
    [path] = (out / "trials").glob("shop--pretrain--*.jsonl")
    trials = [json.loads(line) for line in path.read_text().splitlines()]
    assert trials[0]["values"] == {}
    assert all(0 <= trial["values"]["model.dropout"] <= 0.4 for trial in trials[1:])
    assert by_method["pretrain"]["best"] == max(trial["value"] for trial in trials)
    assert trials[0]["epochs"]
    found = read_grid(best)
    assert found.tuning == {"trials": 3, "metric": "valid ndcg@10", "seed": 1}
    table = compare(best, tmp_path / "compared", device="cpu")
    assert table["tuning"] == found.tuning
    valid = table["datasets"]["shop"]["methods"]["pretrain"]["valid"]["all"]["ndcg@10"]
    assert valid == pytest.approx(by_method["pretrain"]["best"])
    assert "trials 3" in (tmp_path / "compared" / "table.md").read_text()


def test_an_interrupted_search_tries_the_same(grid, tmp_path, monkeypatch):
    pytest.importorskip("optuna")

    def trials(out: Path) -> list[list]:
        [path] = (out / "trials").glob("shop--pretrain--*.jsonl")
        lines = map(json.loads, path.read_text().splitlines())
        return [[t["number"], t["values"], t["state"], t["value"]] for t in lines]

    tune.tune(grid, tmp_path / "whole", trials=8, device="cpu")
    real = tune._Study._trial

    def dying(self, study, number):
        if number == 7 and self._cell.label == "pretrain":
            raise KeyboardInterrupt
        return real(self, study, number)

    monkeypatch.setattr(tune._Study, "_trial", dying)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(grid, tmp_path / "parts", trials=8, device="cpu")
    assert not (tmp_path / "parts" / "best.yaml").exists()
    monkeypatch.setattr(tune._Study, "_trial", real)
    tune.tune(grid, tmp_path / "parts", trials=8, device="cpu")
    assert trials(tmp_path / "parts") == trials(tmp_path / "whole")
    best = [(tmp_path / name / "best.yaml").read_text() for name in ("parts", "whole")]
    assert best[0] == best[1]


def test_pruned_and_failed_trials_count(grid, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    calls = []
    real = methods.METHODS["pretrain"].train

    def fragile(phases):
        calls.append(phases.config.pretrain.epochs)
        if len(calls) == 2:
            raise RuntimeError("too bold")
        return real(phases)

    broken = methods.Method("pretrain", "", fragile, methods.METHODS["pretrain"].tunable)
    monkeypatch.setattr(methods, "METHODS", methods.METHODS | {"pretrain": broken})
    asked = []
    monkeypatch.setattr(
        optuna.trial.Trial, "should_prune", lambda self: (asked.append(1), self.number == 2)[1]
    )
    best = tune.tune(grid, tmp_path / "out", trials=4, device="cpu")
    record = json.loads((tmp_path / "out" / "tuning.json").read_text())["studies"][2]
    assert (record["trials"], record["failed"], record["pruned"]) == (4, 1, 1)
    assert asked
    text = next((tmp_path / "out" / "trials").glob("shop--pretrain--*")).read_text()
    assert "RuntimeError: too bold" in text
    assert yaml.safe_load(best.read_text())["tuning"]["trials"] == 4


def test_a_range_that_nobody_tunes_is_refused(grid, tmp_path):
    pytest.importorskip("optuna")
    grid.write_text(grid.read_text().replace("model.dropout", "align.gamma"))
    with pytest.raises(UsageError, match=r"search\.align\.gamma: no method of the grid can tune"):
        tune.tune(grid, tmp_path / "out", trials=1, device="cpu")
