"""Comparisons over a grid: YAML errors, interruption at any point, failures, budget, the table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_shop import write_shop

from padkern.cli import main
from padkern.data.random_streams import stream_seed
from padkern.errors import CheckpointError
from padkern.pad import methods
from padkern.pad.grid import budget as budgets
from padkern.pad.grid import runner, workers
from padkern.pad.grid.budget import Estimate, total_seconds, trim, trimmed_epochs
from padkern.pad.grid.cells import Result
from padkern.pad.grid.report import left_out, markdown
from padkern.pad.grid.runner import compare
from padkern.pad.grid.spec import parse_grid
from padkern.pad.grid.table import GROUPS, build_table
from padkern.pad.progress import Reporter
from padkern.pad.significance import holm, paired_bootstrap

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "{model: {dim: 8, num_layers: 1}, text.pca: 4, pretrain.epochs: 2, pretrain.batch_size: 16,"
    " evaluation.resamples: 100}"
)


class Noise:
    """A scorer drawn from the seed."""

    def __init__(self, phases: methods.Phases) -> None:
        draw = torch.Generator().manual_seed(stream_seed(phases.config.seed, "noise"))
        self._items = torch.randn(len(phases.train_frequency), 4, generator=draw)

    def user_states(self, history):
        ends = torch.as_tensor(history.offsets[1:]) - 1
        return self._items[torch.as_tensor(history.values)[ends]]

    def item_matrix(self):
        return self._items


def broken(phases: methods.Phases) -> methods.Scorer:
    raise ValueError(f"no luck with seed {phases.config.seed}")


@pytest.fixture(autouse=True)
def _more_methods(monkeypatch):
    known = dict(methods.METHODS)
    known["noise"] = methods.Method("noise", "a random scorer", Noise, ())
    known["broken"] = methods.Method("broken", "always fails", broken, ())
    monkeypatch.setattr(methods, "METHODS", known)


@pytest.fixture(scope="module")
def shops(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shops")
    for seed, name in enumerate(("north", "south")):
        write_shop(root / name, seed)
    return root


def grid_text(shops: Path, chosen: str, seeds: str = "[1, 2]", names=("north", "south")) -> str:
    entries = "".join(
        f"  {name}: {{data: {shops / name}, text: {shops / name / 'text.npy'}}}\n" for name in names
    )
    return f"datasets:\n{entries}methods: {chosen}\nseeds: {seeds}\nset: {SMALL}\n"


@pytest.fixture(scope="module")
def grid(shops) -> Path:
    """Two data sets, three methods, two seeds."""
    path = shops / "grid.yaml"
    path.write_text(grid_text(shops, "[most_pop, text_knn, pretrain]"))
    return path


@pytest.fixture(scope="module")
def finished(grid, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("comparison") / "out"
    compare(grid, out, device="cpu")
    return out


def tables(out: Path) -> tuple[bytes, bytes]:
    return (out / "table.json").read_bytes(), (out / "table.md").read_bytes()


# ---- the whole grid ------------------------------------------------------------------------------


def test_cells_and_table(finished):
    table = json.loads((finished / "table.json").read_text())
    assert table["cells"] == {"finished": 12, "failed": 0}
    assert table["trimmed"] is None
    cells = sorted(path.name for path in (finished / "cells").iterdir())
    assert len(cells) == 12
    assert not (finished / "work").exists() or not any((finished / "work").iterdir())
    for cell in cells:
        ranks = pq.read_table(finished / "cells" / cell / "ranks_test.parquet")
        assert ranks.column_names == ["user", "target", "frequency", "history_length", "rank"]
        assert ranks.num_rows == 30
        assert set(ranks["user"].to_pylist()) == {f"u{k}" for k in range(30)}
    for name in ("north", "south"):
        entry = table["datasets"][name]
        assert list(entry["methods"]) == ["most_pop", "text_knn", "pretrain"]
        assert entry["methods"]["most_pop"]["test"]["all"]["ndcg@10_sd"] == 0
        assert len(entry["differences"]) == 2
        assert all(pair.startswith(f"{entry['best']} - ") for pair in entry["differences"])
    report = (finished / "report.html").read_text()
    assert report.count("<svg") == 6
    assert "http" not in report.replace("http://www.w3.org/", "")
    assert "north" in (finished / "table.md").read_text()


def test_figures_of_the_table_are_those_of_the_parquet_files(finished):
    entry = json.loads((finished / "table.json").read_text())["datasets"]["south"]
    found, lengths = [], None
    for seed in (1, 2):
        [cell] = (finished / "cells").glob(f"south--pretrain--seed-{seed}--*")
        table = pq.read_table(cell / "ranks_test.parquet")
        found.append(table["rank"].to_numpy())
        lengths = table["history_length"].to_numpy()
    gains = [np.where(rank <= 10, 1 / np.log2(rank + 1), 0.0) for rank in found]
    cell = entry["methods"]["pretrain"]["test"]["all"]
    assert cell["ndcg@10"] == pytest.approx(np.mean(gains), abs=1e-15)
    assert cell["ndcg@10_sd"] == pytest.approx(np.std([g.mean() for g in gains], ddof=1))
    short = entry["methods"]["pretrain"]["test"]["hist_1_4"]
    assert short["count"] == int((lengths <= 4).sum()) > 0
    assert short["ndcg@10"] == pytest.approx(np.mean(gains, axis=0)[lengths <= 4].mean())
    other = next(label for label in entry["methods"] if label != entry["best"])
    pair = entry["differences"][f"{entry['best']} - {other}"]["all"]["ndcg@10"]
    means = {label: m["test"]["all"]["ndcg@10"] for label, m in entry["methods"].items()}
    assert pair["difference"] == pytest.approx(means[entry["best"]] - means[other])


def test_the_same_command_twice_is_bit_equal_and_repeats_nothing(
    grid, finished, tmp_path, monkeypatch
):
    compare(grid, tmp_path / "again", device="cpu")
    assert tables(tmp_path / "again") == tables(finished)
    monkeypatch.setattr(runner, "run_cell", lambda *_, **__: pytest.fail("a cell was repeated"))
    compare(grid, tmp_path / "again", device="cpu")
    assert tables(tmp_path / "again") == tables(finished)


class Killed(BaseException):
    """Ends a run where no handler may keep it alive."""


def test_death_at_any_write_loses_nothing(grid, finished, tmp_path, monkeypatch):
    """Each attempt dies at its k-th rename, before or after it, k growing until one ends."""
    rename, replace = os.rename, os.replace
    left = [0]

    def dying(act):
        def move(source, target):
            left[0] -= 1
            if left[0] == 0 and attempt % 2:
                raise Killed
            act(source, target)
            if left[0] == 0:
                raise Killed

        return move

    monkeypatch.setattr(os, "rename", dying(rename))
    monkeypatch.setattr(os, "replace", dying(replace))
    deaths = 0
    for attempt in range(1, 100):
        left[0] = attempt
        try:
            compare(grid, tmp_path / "out", device="cpu")
        except Killed:
            deaths += 1
        else:
            break
    assert 5 < deaths < 99
    assert tables(tmp_path / "out") == tables(finished)


class DiesAt(Reporter):
    """Ends the run at the end of one epoch of one phase."""

    def __init__(self, phase: str, epoch: int) -> None:
        self._place = (phase, epoch)

    def end_epoch(self, record) -> None:
        if (record["phase"], record["epoch"]) == self._place:
            raise Killed


def test_a_method_of_several_phases_continues_in_any_of_them(shops, tmp_path):
    path = tmp_path / "grid.yaml"
    budgets_of = ", ".join(f"{name}.epochs: 2" for name in ("language", "align", "disentangle"))
    text = grid_text(shops, "[pad, text_knn]", "[1]", names=("north",))
    path.write_text(
        text.replace("text.pca: 4", f"text.pca: 4, {budgets_of}, disentangle.gate.steps: 3")
    )
    compare(path, tmp_path / "whole", device="cpu")
    places = [("pretrain", 1), ("aligned", 1), ("aligned", 2), ("text", 1), ("pad", 2)]
    for place in places:
        with pytest.raises(Killed):
            compare(path, tmp_path / "parts", device="cpu", reporter=DiesAt(*place))
    compare(path, tmp_path / "parts", device="cpu")
    assert tables(tmp_path / "parts") == tables(tmp_path / "whole")
    facts = [json.loads(p.read_text()) for p in (tmp_path / "parts/cells").glob("*/cell.json")]
    assert sorted((f["label"], f["resumed"]) for f in facts) == [("pad", True), ("text_knn", False)]


def test_killed_processes_continue(grid, finished, tmp_path):
    out = tmp_path / "out"
    program = f"from padkern.pad.grid.runner import compare\nfrom padkern.pad.progress import " \
        f"PlainReporter\ncompare({str(grid)!r}, {str(out)!r}, device='cpu', " \
        "reporter=PlainReporter())\n"  # fmt: skip
    for lines in (9, 14):
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
        )
        for _ in range(lines):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "table.json").exists()
    compare(grid, out, device="cpu")
    assert tables(out) == tables(finished)


def test_cells_in_processes_give_the_same_table(shops, tmp_path, monkeypatch):
    path = tmp_path / "grid.yaml"
    path.write_text(grid_text(shops, "[most_pop, pretrain]", "[1]", names=("north",)))
    monkeypatch.setattr(workers, "_work", os._exit)  # ends at once, without a word
    table = compare(path, tmp_path / "two", device="cpu", jobs=2)
    errors = [failure["error"] for failure in table["failed"]]
    assert errors == ["the process ended with exit code 1"] * 2
    monkeypatch.undo()
    compare(path, tmp_path / "two", device="cpu", jobs=2)
    compare(path, tmp_path / "one", device="cpu")
    assert tables(tmp_path / "two") == tables(tmp_path / "one")


def test_a_grown_grid_runs_the_new_cells_alone(shops, tmp_path, monkeypatch):
    path = tmp_path / "grid.yaml"
    path.write_text(grid_text(shops, "[most_pop]", names=("north",)))
    compare(path, tmp_path / "out", device="cpu")
    ran = []
    real = runner.run_cell
    monkeypatch.setattr(
        runner, "run_cell", lambda cell, *a, **k: (ran.append(str(cell)), real(cell, *a, **k))
    )
    path.write_text(grid_text(shops, "[most_pop, noise]", "[1, 2, 3]", names=("north",)))
    compare(path, tmp_path / "out", device="cpu")
    assert sorted(ran) == [
        "north / most_pop / seed 3",
        *(f"north / noise / seed {seed}" for seed in (1, 2, 3)),
    ]


def test_a_changed_result_is_run_again(shops, tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(grid_text(shops, "[most_pop]", "[1]", names=("north",)))
    compare(path, tmp_path / "out", device="cpu")
    before = tables(tmp_path / "out")
    [cell] = (tmp_path / "out" / "cells").iterdir()
    (cell / "ranks_test.parquet").write_bytes(b"torn")
    compare(path, tmp_path / "out", device="cpu")
    assert tables(tmp_path / "out") == before


# ---- failures ------------------------------------------------------------------------------------


def test_a_failed_cell_is_reported_and_loses_nothing(shops, tmp_path, capsys, monkeypatch):
    path = tmp_path / "grid.yaml"
    path.write_text(grid_text(shops, "[broken, most_pop, noise]", names=("north",)))
    out = tmp_path / "out"
    assert main(["compare", str(path), "--out", str(out), "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "failed: north / broken / seed 1: ValueError: no luck with seed 1" in said
    table = json.loads((out / "table.json").read_text())
    assert table["cells"] == {"finished": 4, "failed": 2}
    assert table["failed"][1] == {
        "dataset": "north", "method": "broken", "seed": 2,
        "error": "ValueError: no luck with seed 2",
    }  # fmt: skip
    assert list(table["datasets"]["north"]["methods"]) == ["most_pop", "noise"]
    assert "no luck with seed 2" in (out / "table.md").read_text()
    assert "no luck with seed 2" in (out / "report.html").read_text()
    records = [json.loads(p.read_text()) for p in (out / "failures").iterdir()]
    assert len(records) == 2
    assert all("Traceback" in record["traceback"] for record in records)
    # What failed is tried again, and its record goes when it works.
    repaired = methods.METHODS | {"broken": methods.Method("broken", "repaired", Noise, ())}
    monkeypatch.setattr(methods, "METHODS", repaired)
    assert main(["compare", str(path), "--out", str(out), "--device", "cpu", "--quiet"]) == 0
    assert not list((out / "failures").iterdir())
    assert json.loads((out / "table.json").read_text())["cells"]["finished"] == 6


def test_a_data_set_that_cannot_be_read_fails_its_cells_alone(shops, tmp_path):
    text = grid_text(shops, "[most_pop]", "[1]").replace(str(shops / "south"), "/nowhere/south")
    (tmp_path / "grid.yaml").write_text(text)
    table = compare(tmp_path / "grid.yaml", tmp_path / "out", device="cpu")
    assert table["cells"] == {"finished": 1, "failed": 1}
    assert table["failed"][0]["dataset"] == "south"
    assert "/nowhere/south" in table["failed"][0]["error"]
    assert table["datasets"]["south"]["best"] is None


def test_folders_of_others_are_left_alone(grid, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert main(["compare", str(grid), "--out", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine.txt"]


@pytest.mark.parametrize(
    ("words", "part"),
    [(["--budget", "0"], "--budget must be a positive"), (["--jobs", "0"], "--jobs must be at")],
)
def test_bad_options(grid, tmp_path, capsys, words, part):
    assert main(["compare", str(grid), "--out", str(tmp_path / "out"), *words]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- budget --------------------------------------------------------------------------------------


def test_trimming_is_even_and_takes_seeds_first():
    slow = Estimate(10.0, ((9.0, 10),))  # 100 s
    quick = Estimate(20.0)
    for seconds, seeds in ((360, 3), (359.9, 2), (240, 2), (239, 1), (120, 1)):
        kept = trim([slow, quick], 3, seconds)
        assert (kept.seeds, kept.share, kept.seconds) == (seeds, 1.0, 120.0 * seeds)
    kept = trim([slow, quick], 3, 119)  # 30 + 9 epochs * 9
    assert (kept.seeds, kept.share, kept.seconds) == (1, 0.9, 111.0)
    two = Estimate(0.0, ((1.0, 10), (4.0, 2)))
    assert trim([two], 1, 9).share == 0.5  # 5 + 4 * 1
    assert trim([two], 1, 0.1).seconds == 5.0  # one epoch of one seed, even beyond the budget
    assert [trimmed_epochs(e, 0.5) for e in (0, 1, 2, 5, 10)] == [0, 1, 1, 2, 5]
    assert trim([], 3, 10).seeds == 3


def test_a_phase_in_common_counts_once_and_as_the_slowest_pilot_saw_it():
    first = Estimate(5.0, shared={"a": (2.0, 10)})
    second = Estimate(7.0, ((1.0, 10),), {"a": (3.0, 10), "b": (1.0, 4)})
    assert total_seconds([first]) == 25.0
    assert total_seconds([first, second]) == 5 + 7 + 10 + 30 + 4
    assert total_seconds([first, second], 0.5) == 5 + 7 + 5 + 15 + 2
    assert trim([first, second], 2, 112).seeds == 2
    kept = trim([first, second], 2, 28.9)  # 12 + 3 + 9 + 1 with a share of 0.3
    assert (kept.seeds, kept.share, kept.seconds) == (1, 0.3, 25.0)


def test_a_budget_trims_all_alike_once_and_says_so(shops, tmp_path, monkeypatch):
    path, out = tmp_path / "grid.yaml", tmp_path / "out"
    path.write_text(grid_text(shops, "[noise, pretrain]", "[1, 2, 3]"))
    estimate = Estimate(60.0, ((60.0, 2),))  # 3 minutes a cell, 12 a seed
    monkeypatch.setattr(budgets.Pilot, "estimate", lambda self, shared: estimate)
    table = compare(path, out, budget=30, device="cpu")
    assert table["trimmed"] == {
        "budget_minutes": 30, "seeds_kept": [1, 2], "seeds_left_out": [3], "epoch_share": 1.0,
    }  # fmt: skip
    found = [m["seeds"] for d in table["datasets"].values() for m in d["methods"].values()]
    assert found == [[1, 2]] * 4
    assert "left out 3" in (out / "table.md").read_text()
    assert "left out 3" in (out / "report.html").read_text()
    # The second call does not measure again.
    monkeypatch.setattr(runner, "train_and_rank", lambda *_, **__: pytest.fail("a second pilot"))
    assert compare(path, out, budget=30, device="cpu") == table


def test_a_small_budget_cuts_epochs(shops, tmp_path, monkeypatch):
    path, out = tmp_path / "grid.yaml", tmp_path / "out"
    path.write_text(grid_text(shops, "[pretrain]", "[1, 2]", names=("north",)))
    estimate = Estimate(6.0, ((60.0, 2),))
    monkeypatch.setattr(budgets.Pilot, "estimate", lambda self, shared: estimate)
    table = compare(path, out, budget=1.5, device="cpu")
    assert table["trimmed"]["epoch_share"] == 0.5
    assert table["trimmed"]["seeds_kept"] == [1]
    [cell] = (out / "cells").iterdir()
    assert "pretrain:\n  epochs: 1\n" in (cell / "config.yaml").read_text()


def test_a_pilot_stops_after_one_epoch_and_knows_the_rest(shops, tmp_path, monkeypatch):
    path = tmp_path / "grid.yaml"
    path.write_text(grid_text(shops, "[most_pop, llminit, pretrain, aligned]", "[1]", ("north",)))
    seen = []
    real = budgets.Pilot.estimate
    monkeypatch.setattr(
        budgets.Pilot, "estimate", lambda *args: (seen.append(real(*args)), seen[-1])[1]
    )
    table = compare(path, tmp_path / "out", budget=60, device="cpu")
    assert table["trimmed"] is None
    untrained, alone, pretrained, aligned = seen
    assert untrained.phases == ()
    assert untrained.fixed > 0
    assert len(alone.phases) == 1
    assert alone.shared == {}
    assert [epochs for _, epochs in pretrained.shared.values()] == [2]
    # What `aligned` starts from is what `pretrain` is, so it counts for both together once.
    assert pretrained.shared.keys() < aligned.shared.keys()
    assert len(aligned.shared) == 2
    both = total_seconds([pretrained, aligned])
    assert both < total_seconds([pretrained]) + total_seconds([aligned])
    assert both > total_seconds([pretrained, aligned], 0.5) > 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [len(e["shared"]) for e in plan["estimates"].values()] == [0, 0, 1, 2]


# ---- tests of significance -----------------------------------------------------------------------


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04; times 4, 3, 2, 1; the last may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
    for bad in ([1.1], [float("nan")], [-0.1]):
        with pytest.raises(ValueError, match="p must be"):
            holm(bad)


def made_up(ranks: dict[str, list[np.ndarray]], valid: dict[str, float]) -> list[Result]:
    grid = parse_grid(f"datasets: [a]\nmethods: [{', '.join(ranks)}]\nseeds: [1, 2]\n"
                      "set: {evaluation.resamples: 100}", "g")  # fmt: skip
    results = []
    for label, seeds in ranks.items():
        for seed, values in enumerate(seeds, start=1):
            n = len(values)
            columns = {
                "user": np.arange(n).astype(str), "target": np.arange(n).astype(str),
                "frequency": np.arange(n) % 8, "history_length": 1 + np.arange(n) % 12,
            }  # fmt: skip
            held = columns | {"rank": np.full(n, valid[label])}
            results.append(
                Result(
                    grid.cell("a", label, seed), {p: {"all": {}} for p in ("valid", "test")},
                    {"valid": held, "test": columns | {"rank": values}}, 1.0,
                )
            )  # fmt: skip
    return results


def test_best_by_validation_against_each_other_with_two_families():
    rng = np.random.default_rng(0)
    ranks = {
        "most_pop": [rng.integers(1, 40, 96).astype(float)],
        "noise": [rng.integers(1, 9, 96).astype(float) for _ in range(2)],
        "pretrain": [rng.integers(1, 30, 96).astype(float)],
    }
    grid = parse_grid("datasets: [a]\nmethods: [most_pop, noise, pretrain]\nseeds: [1, 2]", "g")
    results = made_up(ranks, {"most_pop": 5.0, "noise": 3.0, "pretrain": 2.0})
    entry = build_table(grid, results, [], None)["datasets"]["a"]
    assert entry["best"] == "pretrain"  # though noise is better on test
    tests = entry["differences"]
    assert list(tests) == ["pretrain - most_pop", "pretrain - noise"]
    assert tests["pretrain - noise"]["all"]["ndcg@10"]["difference"] < 0
    plain = paired_bootstrap(ranks["pretrain"][0], np.stack(ranks["noise"]), resamples=100)
    found = tests["pretrain - noise"]["all"]["ndcg@10"]
    assert {name: found[name] for name in plain} == plain
    overall = [groups["all"]["ndcg@10"] for groups in tests.values()]
    assert [t["p_holm"] for t in overall] == holm([t["p"] for t in overall])
    parts = [
        groups[group]["ndcg@10"]
        for groups in tests.values() for group in GROUPS if group != "all" and group in groups
    ]  # fmt: skip
    assert len(parts) == 2 * 6  # three frequency groups and three of history length have users
    assert [t["p_holm"] for t in parts] == holm([t["p"] for t in parts])
    assert entry["methods"]["most_pop"]["test"]["all"]["mrr_sd"] is None


def test_cells_over_other_users_are_not_compared():
    ranks = {"most_pop": [np.ones(8)], "noise": [np.ones(8)]}
    results = made_up(ranks, {"most_pop": 1.0, "noise": 2.0})
    results[1].ranks["test"]["target"] = np.roll(results[1].ranks["test"]["target"], 1)
    grid = parse_grid("datasets: [a]\nmethods: [most_pop, noise]", "g")
    with pytest.raises(CheckpointError, match="ranks another target in test"):
        build_table(grid, results, [], None)


# ---- reproduction --------------------------------------------------------------------------------


def test_reproduce_writes_tables_into_a_document(shops, tmp_path, monkeypatch, capsys):
    import importlib.util

    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "python" / "reproduce.py")
    reproduce = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reproduce)
    grids = tmp_path / "grids"
    grids.mkdir()
    (grids / "tiny.yaml").write_text(
        "title: Tiny\n" + grid_text(shops, "[most_pop, broken]", "[1]", names=("north",))
    )
    monkeypatch.setattr(reproduce, "GRIDS", grids)
    document = tmp_path / "results.md"
    document.write_text("# Results\n\nText.\n")
    words = ["tiny", "--out", str(tmp_path / "out"), "--docs", str(document), "--device", "cpu"]
    assert reproduce.main(words) == 1
    said = capsys.readouterr().out
    assert "north: most_pop (1)" in said
    assert "Failed: north / broken / seed 1: ValueError" in said
    once = document.read_text()
    assert once.startswith("# Results\n\nText.\n\n<!-- tiny:begin -->\n## Tiny\n")
    assert "### north" in once
    reproduce.main(words)
    assert document.read_text() == once
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert markdown(table) == (tmp_path / "out" / "table.md").read_text()
    assert left_out(table) == ["Failed: north / broken / seed 1: ValueError: no luck with seed 1"]
    (grids / "other.yaml").write_text(
        "title: Other\n" + grid_text(shops, "[most_pop]", "[1]", names=("south",))
    )
    both = ["tiny", "other", *words[1:], "--json", str(tmp_path / "json")]
    assert reproduce.main(both) == 1  # one of the two has a failed cell
    kept = json.loads((tmp_path / "json" / "tiny.json").read_text())
    assert kept == reproduce.rounded(table)
    assert kept["datasets"]["north"]["methods"]["most_pop"]["test"]["all"]["ndcg@10"] > 0
    document_of_both = document.read_text()
    assert document_of_both.startswith(once.rstrip())
    assert "<!-- other:begin -->\n## Other\n" in document_of_both
    assert sorted(path.name for path in (tmp_path / "out").glob("*/table.md")) == ["table.md"] * 2
