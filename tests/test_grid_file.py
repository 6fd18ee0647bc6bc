"""The YAML file of a grid: every mistake has one clear error, values have an order."""

from __future__ import annotations

from pathlib import Path

import pytest

from padkern.cli import main
from padkern.errors import UsageError
from padkern.pad import methods
from padkern.pad.grid.spec import parse_grid, read_grid

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_more_method(monkeypatch):
    noise = methods.Method("noise", "a random scorer", lambda phases: None, ())
    monkeypatch.setattr(methods, "METHODS", methods.METHODS | {"noise": noise})


GOOD = "datasets: [a]\nmethods: [most_pop, noise]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "grid.yaml: a grid is a mapping with the keys datasets and methods"),
        ("a: [", "grid.yaml: line 1: "),
        ("seeds: [1]\nseeds: [2]\n" + GOOD, "grid.yaml: line 2: the key 'seeds' is given twice"),
        ("methods: [noise]", "grid.yaml: datasets: Field required"),
        ("datasets: {}\nmethods: [noise]", "grid.yaml: datasets: Dictionary should have at least"),
        (GOOD + "sets: 1", "grid.yaml: sets: Extra inputs are not permitted, got 1"),
        (GOOD + "preset: best", "grid.yaml: preset: Input should be 'clean' or 'parity', got"),
        (GOOD + "seeds: []", "grid.yaml: seeds: List should have at least 1 item"),
        (GOOD + "seeds: [1, 1]", "seeds: must be different and not negative, got [1, 1]"),
        (GOOD + "seeds: [-1]", "seeds: must be different and not negative, got [-1]"),
        (GOOD + "seeds: [one]", "grid.yaml: seeds.0: Input should be a valid integer"),
        ("datasets: [a]\nmethods: [nois]", "methods.nois: must be one of most_pop, "),
        ("datasets: [a]\nmethods: [noise, noise]",
         "methods: each name once, got ['noise', 'noise']"),
        ("datasets: [a]\nmethods: {x: {method: y}}", "methods.x.method: must be one of "),
        ("datasets: {a/b: {}}\nmethods: [noise]", "datasets: a key starts with a letter or digit"),
        ("datasets: {a: {txt: x}}\nmethods: [noise]", "datasets.a.txt: Extra inputs are not"),
        ("datasets: {a: {methods: [pad]}}\nmethods: [noise]",
         "datasets.a.methods: must be of noise, got 'pad'"),
        ("datasets: {a: {methods: []}}\nmethods: [noise]",
         "datasets.a.methods: must be one or more, each once, got []"),
        ("datasets: {a: {tuned: {pad: {}}}}\nmethods: [noise]",
         "datasets.a.tuned: must be of noise, got 'pad'"),
        ("datasets: {a: {filters: {kcore: 5}}}\nmethods: [noise]",
         "datasets.a.filters: unknown name 'kcore'"),
        (GOOD + "set: {model.dmi: 8}", "grid.yaml: set: unknown key 'model.dmi'"),
        (GOOD + "set: {model: {dim: 0}}", "grid.yaml: set: model.dim: Input should be greater "
         "than or equal to 1, got 0"),
        (GOOD + "set: {seed: 3}", "set.seed: belongs into the keys seeds and preset, got 3"),
        ("datasets: [a]\nmethods: {noise: {set: {pretrain.lr: -1}}}",
         "grid.yaml: methods.noise.set: pretrain.lr: Input should be greater than 0, got -1"),
        ("datasets: [a]\nmethods: {noise: {set: {split: global_time}}}",
         "methods.noise.set.split: belongs into a data set's set"),
        ("datasets: {a: {set: {split: x}}}\nmethods: [noise]",
         "grid.yaml: datasets.a.set: split: Input should be 'leave_one_out' or"),
    ],
)  # fmt: skip
def test_mistakes_in_the_grid(text, message):
    with pytest.raises(UsageError) as error:
        parse_grid(text, "grid.yaml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).count("grid.yaml") == 1


def test_a_grid_that_is_not_there(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "no.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert "no.yaml: cannot be read: No such file" in capsys.readouterr().err


def test_values_of_a_cell_in_their_order():
    grid = parse_grid(
        "datasets:\n"
        "  a: {set: {align.gamma: 2, pretrain.lr: 0.2}, tuned: {x: {pretrain.epochs: 4}}}\n"
        "  b: {methods: [noise]}\n"
        "methods:\n  noise:\n  x: {method: noise, set: {pretrain: {lr: 0.3, epochs: 3}}}\n"
        "seeds: [5]\nset: {pretrain: {lr: 0.1}, align: {gamma: 1.5}}\n",
        "grid.yaml",
    )
    assert grid.pairs() == [("a", "noise"), ("a", "x"), ("b", "noise")]
    plain, own, other = grid.cells()
    assert (plain.config.pretrain.lr, plain.config.align.gamma, plain.config.seed) == (0.2, 2, 5)
    assert (own.config.pretrain.lr, own.config.pretrain.epochs, own.method) == (0.3, 4, "noise")
    assert (other.config.pretrain.lr, other.config.align.gamma) == (0.1, 1.5)
    assert len({cell.name for cell in (plain, own, other)}) == 3


GRIDS = sorted(path.stem for path in (ROOT / "python" / "grids").glob("*.yaml"))


@pytest.mark.parametrize("name", GRIDS)
def test_stored_grids(name):
    grid = read_grid(ROOT / "python" / "grids" / f"{name}.yaml")
    assert len(grid.pairs()) >= 2
    assert len({cell.name for cell in grid.cells()}) == len(grid.pairs()) * len(grid.seeds)
    if name == "default":
        assert len(grid.seeds) == 3
        everywhere = {d for d, m in grid.pairs() if m == "noise"}  # a method of these tests: "all"
        assert everywhere == set(grid.datasets) == {"prime_pantry", "amazon_scientific"}
        assert grid.tuning["trials"] == 6


def test_stored_grids_cover_six_data_sets():
    grids = [
        read_grid(ROOT / "python" / "grids" / f"{name}.yaml")
        for name in ("default", "more", "games")
    ]
    assert len({d for grid in grids for d, m in grid.pairs() if m == "pad"}) == 6
