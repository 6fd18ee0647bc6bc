"""Phases that several cells of a grid need are trained once, with the bits of a cell of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import small_ring as ring
from small_shop import write_shop

from padkern.pad.config import RunConfig
from padkern.pad.grid import shared
from padkern.pad.grid.runner import compare
from padkern.pad.grid.shared import phase_name, phases_of
from padkern.pad.grid.spec import Cell
from padkern.pad.grid.workers import first_free
from padkern.pad.progress import Reporter

SMALL = (
    "{model: {dim: 8, num_layers: 1}, text.pca: 4, pretrain.epochs: 2, language.epochs: 1,"
    " align.epochs: 1, disentangle.epochs: 1, disentangle.gate.steps: 3, evaluation.resamples: 100}"
)


class Epochs(Reporter):
    """Counts the epochs of every phase."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}

    def end_epoch(self, record) -> None:
        self.of[record["phase"]] = self.of.get(record["phase"], 0) + 1


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    return write_shop(tmp_path_factory.mktemp("shops") / "shop", 0)


def write(shop: Path, path: Path, chosen: str) -> Path:
    data = f"{{data: {shop}, text: {shop / 'text.npy'}}}"
    path.write_text(f"datasets:\n  s: {data}\nmethods: {chosen}\nseeds: [1]\nset: {SMALL}\n")
    return path


def ranks(out: Path, label: str) -> dict[str, bytes]:
    [cell] = (out / "cells").glob(f"s--{label}--*")
    return {part: (cell / f"ranks_{part}.parquet").read_bytes() for part in ("valid", "test")}


def test_a_phase_is_trained_once_and_gives_the_same_bits(shop, tmp_path):
    grid = write(shop, tmp_path / "all.yaml", "[pretrain, text, aligned, pad]")
    reporter = Epochs()
    compare(grid, tmp_path / "all", device="cpu", reporter=reporter)
    assert reporter.of == {"pretrain": 2, "text": 1, "aligned": 1, "pad": 1}
    alone = write(shop, tmp_path / "pad.yaml", "[pad]")
    compare(alone, tmp_path / "alone", device="cpu")
    assert ranks(tmp_path / "all", "pad") == ranks(tmp_path / "alone", "pad")
    [cell] = (tmp_path / "all" / "cells").glob("s--pad--*")
    facts = json.loads((cell / "cell.json").read_text())
    assert sorted(facts["phases_of_other_cells"]) == ["aligned", "pretrain", "text"]
    assert facts["seconds"] > sum(facts["phases_of_other_cells"].values()) > 0


def test_only_what_a_phase_reads_keeps_it_apart(shop, tmp_path):
    grid = write(
        shop, tmp_path / "grid.yaml",
        "{aligned: {}, weak: {method: aligned, set: {align.gamma: 100}},"
        " slow: {method: aligned, set: {pretrain.lr: 0.001}},"
        " pad: {set: {disentangle.lr: 0.01}}}",
    )  # fmt: skip
    reporter = Epochs()
    compare(grid, tmp_path / "out", device="cpu", reporter=reporter)
    # weak has a phase 2 of its own, slow a phase 1 and so a phase 2; pad shares both of aligned.
    assert reporter.of == {"pretrain": 4, "aligned": 3, "text": 1, "pad": 1}
    kept = [path.name.split("--")[1] for path in (tmp_path / "out" / "phases").iterdir()]
    assert sorted(kept) == ["aligned"] * 3 + ["pretrain"] * 2 + ["text"]


def test_a_damaged_phase_is_trained_again(shop, tmp_path):
    grid = write(shop, tmp_path / "grid.yaml", "[pretrain]")
    compare(grid, tmp_path / "out", device="cpu")
    before = ranks(tmp_path / "out", "pretrain")
    [phase] = (tmp_path / "out" / "phases").iterdir()
    file = phase / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"12345678")
    [cell] = (tmp_path / "out" / "cells").iterdir()
    (cell / "metrics.json").unlink()
    reporter = Epochs()
    table = compare(grid, tmp_path / "out", device="cpu", reporter=reporter)
    assert table["cells"] == {"finished": 1, "failed": 0}
    assert reporter.of == {"pretrain": 2}
    assert ranks(tmp_path / "out", "pretrain") == before
    (tmp_path / "out" / "cells" / cell.name / "metrics.json").unlink()
    reporter = Epochs()
    compare(grid, tmp_path / "out", device="cpu", reporter=reporter)
    assert reporter.of == {}
    assert ranks(tmp_path / "out", "pretrain") == before


# ---- what a phase is ----------------------------------------------------------------------------


def cell_of(method: str, overrides=(), **other) -> Cell:
    facts = {"dataset": "s", "label": method, "method": method, "seed": 1, "data_id": "d"}
    config = RunConfig().with_overrides(list(overrides))
    return Cell(**(facts | other), config=config)


@pytest.mark.parametrize(
    ("method", "overrides", "phases"),
    [
        ("pad", [], ("pretrain", "aligned", "text")),
        ("pad", ["disentangle.experts=[rec, language]"], ("pretrain", "text")),
        ("pad", ["disentangle.experts=[rec, aligned]"], ("pretrain", "aligned")),
        ("pad", ["disentangle.start_language=random"], ("pretrain", "aligned")),
        ("aligned", [], ("pretrain", "aligned")),
        ("text", [], ("text",)),
        ("llminit", [], ()),
    ],
)
def test_a_cell_takes_the_phases_that_it_reads(method, overrides, phases):
    assert phases_of(cell_of(method, overrides)) == phases


class Guard:
    """A configuration of which some sections must not be read."""

    def __init__(self, config: RunConfig, unread: tuple[str, ...]) -> None:
        self._config, self._unread = config, unread

    def __getattr__(self, name: str):
        assert name not in self._unread, f"{name} is read"
        return getattr(self._config, name)


@pytest.mark.parametrize("phase", ["pretrain", "text", "aligned"])
def test_what_the_name_leaves_out_is_not_read(phase):
    phases = ring.make_phases()
    pretrained = phases.pretrain()[0]
    phases.config = Guard(phases.config, shared._UNREAD[phase])
    {
        "pretrain": phases.pretrain,
        "text": phases.language,
        "aligned": lambda: phases.align(pretrained),
    }[phase]()


@pytest.mark.parametrize("phase", ["pretrain", "text", "aligned"])
@pytest.mark.parametrize(
    "value",
    ["model.dropout=0.3", "loss.kind=bce", "text.pca=7", "num_bins=4", "unseen=last",
     "evaluation.mask_repeats=false", "split=global_time"],
)  # fmt: skip
def test_whatever_else_differs_keeps_phases_apart(phase, value):
    names = {phase_name(cell_of("pad", some), phase, "cpu") for some in ([], [value])}
    assert len(names) == 2


def test_device_threads_seed_and_data_keep_phases_apart(monkeypatch):
    cell = cell_of("pad")
    names = {phase_name(cell, "text", device) for device in ("cpu", "cuda")}
    names.add(phase_name(cell_of("pad", ["seed=2"]), "text", "cpu"))
    names.add(phase_name(cell_of("pad", data_id="e"), "text", "cpu"))
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    names.add(phase_name(cell, "text", "cpu"))
    assert len(names) == 5


def test_without_room_for_a_phase_the_cell_is_finished_all_the_same(shop, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared, "_copy", full)
    grid = write(shop, tmp_path / "grid.yaml", "[pretrain, aligned]")
    table = compare(grid, tmp_path / "out", device="cpu")
    assert table["cells"] == {"finished": 2, "failed": 0}


def test_times_of_a_taken_phase_survive_an_interruption(shop, tmp_path, monkeypatch):
    from padkern.pad.grid import cells

    grid = write(shop, tmp_path / "grid.yaml", "[pretrain, aligned]")
    real = cells.train_and_rank

    def killed(cell, *args, **kw):
        if cell.method == "aligned":
            raise KeyboardInterrupt
        return real(cell, *args, **kw)

    monkeypatch.setattr(cells, "train_and_rank", killed)
    with pytest.raises(KeyboardInterrupt):
        compare(grid, tmp_path / "out", device="cpu")
    monkeypatch.setattr(cells, "train_and_rank", real)
    compare(grid, tmp_path / "out", device="cpu")
    [cell] = (tmp_path / "out" / "cells").glob("s--aligned--*")
    facts = json.loads((cell / "cell.json").read_text())
    assert facts["resumed"]
    assert list(facts["phases_of_other_cells"]) == ["pretrain"]


def test_a_cell_waits_for_a_phase_in_training_and_others_go_first():
    assert first_free([{"a"}, {"b"}, set()], {"a"}) == 1
    assert first_free([{"a"}, {"a", "b"}], {"b"}) == 0
    assert first_free([{"a"}, {"a", "b"}], {"a", "c"}) is None
    assert first_free([set()], {"a"}) == 0
    assert first_free([], set()) is None


def test_cells_at_the_same_time_train_a_phase_once(shop, tmp_path):
    grid = write(shop, tmp_path / "all.yaml", "[pad, aligned, pretrain, text]")
    compare(grid, tmp_path / "all", device="cpu", jobs=4)
    taken = {}
    for cell in (tmp_path / "all" / "cells").iterdir():
        facts = json.loads((cell / "cell.json").read_text())
        taken[facts["method"]] = sorted(facts["phases_of_other_cells"])
    # Few phases first, whatever the order of the grid: nobody trains what another has in hand.
    assert taken == {
        "pad": ["aligned", "pretrain", "text"], "aligned": ["pretrain"], "pretrain": [], "text": [],
    }  # fmt: skip
