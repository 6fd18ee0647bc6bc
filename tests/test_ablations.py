"""Parts of PAD left out: the anchor of phase 2, an expert, the gate."""

from __future__ import annotations

import json

import pytest
import small_ring as ring
import torch

from padkern.cli import main
from padkern.errors import UsageError
from padkern.models.triple_expert import TripleExpert
from padkern.pad.config import EXPERTS, RunConfig
from padkern.pad.folder import RunFolder
from padkern.pad.methods import train_method
from padkern.pad.stored import load_run

PAIRS = [("rec", "aligned"), ("rec", "language"), ("aligned", "language")]


def chosen(names: tuple[str, ...]) -> str:
    return f"disentangle.experts=[{', '.join(names)}]"


# ---- the anchor ----------------------------------------------------------------------------------


def aligned_and_start(*overrides: str):
    phases = ring.make_phases(["align.weight_decay=0", "align.restore_best=false", *overrides])
    pretrained, _ = phases.pretrain()
    start = phases.build("aligned").state_dict()
    model, _ = phases.align(pretrained)
    return pretrained.experts["rec"], start, model.experts["aligned"]


def test_without_the_anchor_only_the_projection_moves():
    # Weight decay and all: what only the anchor trains takes no step.
    source, start, expert = aligned_and_start("align.anchor=0", "align.weight_decay=0.1")
    for name, value in expert.encoder.state_dict().items():
        assert torch.equal(value, source.encoder.state_dict()[name]), name
    assert torch.equal(expert.tower.id, start["experts.aligned.tower.id"])
    moved = [
        name
        for name, value in expert.tower.state_dict().items()
        if not torch.equal(value, start[f"experts.aligned.tower.{name}"])
    ]
    assert moved


def test_the_anchor_weighs_the_recommendation_loss():
    runs = {anchor: aligned_and_start(f"align.anchor={anchor}")[2] for anchor in (0.5, 1.0)}
    _, _, default = aligned_and_start()
    ids = {anchor: expert.tower.id for anchor, expert in runs.items()}
    assert torch.equal(ids[1.0], default.tower.id)
    assert not torch.equal(ids[0.5], ids[1.0])


# ---- two experts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("names", PAIRS)
def test_pad_with_two_experts(names):
    phases = ring.make_phases([chosen(names)])
    seen = []
    phases.reporter.start_phase = lambda phase, *rest: seen.append(phase)
    model = train_method("pad", phases)
    assert tuple(model.experts) == names
    assert model.gate.logit.shape[1] == 2
    assert not torch.equal(model.gate.logit, model.gate.fresh())
    # An expert that is left out is not trained for nothing, but phase 1 is where phase 2 starts.
    wanted = {"pretrain", "pad"} | {"aligned"} & set(names)
    assert set(seen) == wanted | ({"text"} if "language" in names else set())
    metrics = phases.validation("pad", model).metrics()["all"]
    assert 0 < metrics["ndcg@10"] <= 1


def test_experts_start_from_their_phases():
    phases = ring.make_phases([chosen(("rec", "language")), "disentangle.epochs=0"])
    pretrained, language = phases.pretrain()[0], phases.language()[0]
    model, _ = phases.disentangle(pretrained, pretrained, language)
    for name, source in (("rec", pretrained), ("language", language)):
        wanted = source.experts[name].state_dict()
        assert all(torch.equal(v, wanted[k]) for k, v in model.experts[name].state_dict().items())


def test_a_run_with_two_experts_is_stored_shown_and_grown(tmp_path, capsys):
    ring.run(tmp_path / "run", [chosen(("rec", "language"))])
    gate = json.loads((tmp_path / "run" / "gate.json").read_text())
    assert gate["experts"] == ["rec", "language"]
    run = load_run(RunFolder(tmp_path / "run", create=False))
    assert tuple(run.model.experts) == ("rec", "language")
    assert set(run.recommend([1, 2])[0]["shares"]) == {"rec", "language"}
    grown = run.add_items(["new"], vectors=torch.ones(1, 12).numpy())
    assert grown.model.item_matrix().shape[0] == 42
    assert main(["recommend", str(tmp_path / "run"), "--history", "i1,i2"]) == 0
    assert "language" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[rec]", "at least 2 items"),
        ("[language, rec]", "each of rec, aligned, language at most once, in this order"),
        ("[rec, rec]", "each of rec, aligned, language at most once, in this order"),
        ("[rec, text]", "'rec', 'aligned' or 'language'"),
    ],
)
def test_mistakes_in_the_experts(value, message):
    with pytest.raises(UsageError, match=r"disentangle\.experts") as error:
        RunConfig().with_overrides([f"disentangle.experts={value}"])
    assert message in str(error.value)


def test_two_experts_start_from_their_ramps_of_the_release():
    for names in PAIRS:
        three = ring.make_phases(preset="parity").build("pad").gate.logit
        two = ring.make_phases([chosen(names)], preset="parity").build("pad").gate.logit
        assert torch.equal(two, three[:, [EXPERTS.index(name) for name in names]])


def test_three_experts_are_the_default_of_both_presets():
    assert EXPERTS == TripleExpert.NAMES
    for preset in ("clean", "parity"):
        assert RunConfig.preset(preset).disentangle.experts == EXPERTS
