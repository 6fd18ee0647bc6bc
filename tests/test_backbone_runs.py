"""Encoders in whole runs: configuration, phases, resuming, stored runs and the command line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import small_ring as ring
import torch
from torch import nn

from padkern.cli import main
from padkern.errors import UsageError
from padkern.models import registry
from padkern.models.caser import Caser
from padkern.models.encoder import PackedEncoder
from padkern.models.gru4rec import GRU4Rec
from padkern.models.registry import register_encoder
from padkern.models.triple_expert import ExpertModel
from padkern.pad.config import RunConfig
from padkern.pad.folder import RunFolder
from padkern.pad.run import ROWS
from padkern.pad.stored import load_run

NAMES = ["gru4rec", "caser"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.encoder=lstm"],
         "--set: model.encoder: encoder must be one of caser, gru4rec, sasrec, sasrec_pre_ln or "
         "registered by padkern.models.registry.register_encoder, got 'lstm'"),
        (["model.encoder=caser", "model.max_len=4"],
         "--set: model: caser.window must be at most max_len (4), got 5"),
        (["model.dim=9"], "--set: model: dim must be divisible by num_heads, got 9 and 2"),
        (["model.caser.window=0"], "--set: model.caser.window: "),
        (["model.caser.height=3"], "unknown key 'model.caser.height'"),
    ],
)  # fmt: skip
def test_a_broken_configuration_is_one_clear_error(overrides, message):
    with pytest.raises(UsageError) as error:
        RunConfig.preset("clean").with_overrides(overrides)
    assert message in str(error.value)
    assert len(str(error.value)) < 250


def test_sizes_of_other_encoders_are_not_checked():
    config = RunConfig.preset("clean").with_overrides(
        ["model.encoder=gru4rec", "model.dim=9", "model.max_len=4"]
    )
    assert config.model.encoder_options == {}
    config = config.with_overrides(["model.encoder=caser", "model.caser.window=3"])
    assert config.model.encoder_options == {"window": 3, "horizontal": 16, "vertical": 4}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", [("pretrain", 1), ("pad", 1)])
def test_resume_gives_the_same_bits(tmp_path, name, where):
    chosen = [f"model.encoder={name}", "model.caser.window=4"]
    whole = ring.run(tmp_path / "whole", chosen)
    with pytest.raises(ring.Stop):
        ring.run(tmp_path / "cut", chosen, reporter=ring.StopAfter(*where))
    resumed = ring.run(tmp_path / "cut", chosen, resume=True)
    assert resumed["models"] == whole["models"]
    kind = {"gru4rec": GRU4Rec, "caser": Caser}[name]
    with (
        RunFolder(tmp_path / "whole", create=False) as a,
        RunFolder(tmp_path / "cut", create=False) as b,
    ):
        for row in ROWS[2:]:
            left, right = (f.load_tensors(f"models/{row}")[0] for f in (a, b))
            assert all(torch.equal(left[k], right[k]) for k in left), row
        loaded = load_run(b)
    for row in ("pretrain", "text", "id_plus_text", "aligned", "pad"):
        model: ExpertModel = loaded.scorers[row]
        assert all(isinstance(e.encoder, kind) for e in model.experts.values()), row
    again = loaded.evaluate("test", "pad").metrics()["all"]
    stored = whole["models"]["pad"]["test"]["all"]
    assert again == {k: v for k, v in stored.items() if k != "counters"}


@pytest.mark.parametrize("name", NAMES)
def test_parity_preset_trains(tmp_path, name):
    metrics = ring.run(tmp_path / "run", [f"model.encoder={name}"], preset="parity")
    assert metrics["models"]["pad"]["test"]["all"]["count"] == 60


@pytest.mark.parametrize("name", NAMES)
def test_pretraining_learns(name):
    phases = ring.make_phases([f"model.encoder={name}", "pretrain.epochs=8", "pretrain.lr=0.02"])
    _, result = phases.pretrain()
    losses = [record["loss"] for record in result.history]
    assert losses[-1] < 0.8 * losses[0]


def write_shop(folder: Path) -> list[str]:
    """A small data set in files; the options that name it."""
    rng = np.random.default_rng(0)
    names = [f"i{k}" for k in range(40)]
    items = "".join(f"{name}\tkind {k % 4} thing {k}\n" for k, name in enumerate(names))
    (folder / "items.tsv").write_text("item\ttext\n" + items)
    rows = [rng.permutation(40)[: rng.integers(5, 9)] for _ in range(40)]
    lines = [f"u{u}\t{' '.join(names[k] for k in row)}\n" for u, row in enumerate(rows)]
    (folder / "sequences.tsv").write_text("user\titems\n" + "".join(lines))
    np.save(folder / "text.npy", rng.normal(size=(40, 8)).astype(np.float32))
    (folder / "text.items.txt").write_text("".join(f"{name}\n" for name in names))
    return ["--data", str(folder), "--text", str(folder / "text.npy"), "--device", "cpu"]


@pytest.mark.parametrize("name", NAMES)
def test_command_line_trains_and_opens_a_run(tmp_path, capsys, name):
    source = write_shop(tmp_path)
    out = str(tmp_path / "run")
    small = [word for word in ring.SMALL if not word.endswith("epochs=2")]
    epochs = [f"{p}.epochs=1" for p in ("pretrain", "language", "id_plus_text", "align")]
    chosen = [f"model.encoder={name}", *small, *epochs, "disentangle.epochs=1"]
    assert main(["run", *source, "--out", out, "--quiet", "--set", *chosen]) == 0
    assert f"encoder: {name}" in (tmp_path / "run" / "config.yaml").read_text()
    assert main(["evaluate", out, "--row", "pad", "--json"]) == 0
    assert main(["recommend", out, "--history", "i0,i4", "--json"]) == 0
    capsys.readouterr()
    assert main(["run", *source, "--out", f"{out}2", "--set", "model.encoder=lstm"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("padkern: error: --set: model.encoder: encoder must be one of caser")
    assert len(said.splitlines()) == 1


def test_runs_stored_before_the_sizes_of_caser_open_and_resume(tmp_path):
    """Their configuration lacks ``model.caser``."""
    whole = ring.run(tmp_path / "whole")
    with pytest.raises(ring.Stop):
        ring.run(tmp_path / "cut", reporter=ring.StopAfter("aligned", 1))
    with RunFolder(tmp_path / "cut", create=False) as folder:
        text = folder.read_text("config.yaml")
        old = re.sub(r"  caser:\n(    .*\n)+", "", text)
        assert old != text
    (tmp_path / "cut" / "config.yaml").write_text(old)
    assert ring.run(tmp_path / "cut", resume=True)["models"] == whole["models"]
    with RunFolder(tmp_path / "cut", create=False) as folder:
        assert load_run(folder).config == RunConfig.from_yaml(text)
        assert folder.read_text("config.yaml") == old


class LastItem(PackedEncoder):
    """The vector of the token itself, scaled: the smallest encoder there is."""

    def __init__(self, dim, max_len, *, num_layers, num_heads, dropout):
        super().__init__(dim, max_len, dropout)
        self.scale = nn.Parameter(torch.ones(num_layers))

    def forward(self, x, packed, *, last=False):
        x = self.masks(packed).drop(x * self.scale.prod(), 0)
        return x.index_select(0, packed.last) if last else x


def test_a_registered_encoder_trains_in_all_phases(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    register_encoder("last_item", LastItem)
    metrics = ring.run(tmp_path / "run", ["model.encoder=last_item"])
    with RunFolder(tmp_path / "run", create=False) as folder:
        assert "encoder: last_item" in folder.read_text("config.yaml")
        loaded = load_run(folder)
        assert isinstance(loaded.model.experts["rec"].encoder, LastItem)
        again = loaded.evaluate("test", "pad").metrics()["all"]
        stored = metrics["models"]["pad"]["test"]["all"]
        assert again == {k: v for k, v in stored.items() if k != "counters"}
        monkeypatch.setattr(registry, "_REGISTERED", {})
        with pytest.raises(UsageError, match=r"registered by .*register_encoder, got 'last_item'"):
            load_run(folder)
