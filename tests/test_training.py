"""Trainer, gate and phases on small made-up data: exact resume, honest selection, hand-over."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from small_ring import Stop, StopAfter, make_dataset, make_phases, run

from padkern.data.dataset import Ragged
from padkern.data.plan import PlanSource, TrainBatches
from padkern.data.split import make_split
from padkern.errors import CheckpointError, PadkernError, UsageError
from padkern.models.triple_expert import TripleExpert
from padkern.modules import FrequencyGate
from padkern.pad.config import RunConfig
from padkern.pad.folder import RunFolder
from padkern.pad.gate import cross_fitted, fit_gate, held_out, set_gate
from padkern.pad.run import ROWS, shuffled_text
from padkern.pad.stored import load_run
from padkern.pad.trainer import parameter_groups, schedule


@pytest.mark.parametrize("preset", ["clean", "parity"])
def test_run_writes_every_row(tmp_path, preset):
    metrics = run(tmp_path / "run", preset=preset)
    assert set(metrics["models"]) == set(ROWS)
    stored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for row in ROWS:
        for part in ("valid", "test"):
            every = stored["models"][row][part]["all"]
            assert every["count"] == 60
            assert 0 <= every["hit@10"] <= 1
    comparison = json.loads((tmp_path / "run" / "comparison.json").read_text())
    interval = comparison["test"]["pad - id_plus_text"]["all"]["ndcg@10"]
    assert interval["low"] <= interval["difference"] <= interval["high"]
    for row in ("text", "id_plus_text"):
        # The ring is learnable: trained rows must beat popularity by far.
        better = stored["models"][row]["test"]["all"]["ndcg@10"]
        if preset == "clean":
            assert better > 2 * stored["models"]["most_pop"]["test"]["all"]["ndcg@10"]


@pytest.mark.parametrize("where", [("pretrain", 1), ("aligned", 1), ("aligned", 2), ("pad", 1)])
def test_resume_gives_the_same_bits(tmp_path, where):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "cut", reporter=StopAfter(*where))
    resumed = run(tmp_path / "cut", resume=True)
    assert resumed["models"] == whole["models"]
    with (
        RunFolder(tmp_path / "whole", create=False) as a,
        RunFolder(tmp_path / "cut", create=False) as b,
    ):
        for row in ROWS[2:]:
            left, right = (f.load_tensors(f"models/{row}")[0] for f in (a, b))
            assert all(torch.equal(left[k], right[k]) for k in left), row
        epochs = [
            [(r["phase"], r["epoch"], r["loss"]) for r in f.read_jsonl("metrics.jsonl")]
            for f in (a, b)
        ]
        assert epochs[0] == epochs[1]


def test_resume_after_a_kill_between_record_and_checkpoint(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    real, calls = RunFolder.save_tensors, []

    def save(folder, name, *args):
        calls.append(name)
        if calls.count("checkpoints/aligned") == 2:
            raise Stop
        return real(folder, name, *args)

    monkeypatch.setattr(RunFolder, "save_tensors", save)
    with pytest.raises(Stop):
        run(tmp_path / "cut")
    monkeypatch.undo()
    assert run(tmp_path / "cut", resume=True)["models"] == whole["models"]
    with RunFolder(tmp_path / "cut", create=False) as folder:
        epochs = [(r["phase"], r["epoch"]) for r in folder.read_jsonl("metrics.jsonl")]
    assert len(epochs) == len(set(epochs)) == 10


def test_resume_refuses_another_configuration(tmp_path):
    run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another configuration"):
        run(tmp_path / "run", ["align.gamma=3.0"], resume=True)


def test_loaded_run_ranks_and_recommends_as_before(tmp_path):
    metrics = run(tmp_path / "run")
    with RunFolder(tmp_path / "run", create=False) as folder:
        loaded = load_run(folder)
    for row in ROWS:
        again = loaded.evaluate("test", row).metrics()
        assert again["all"] == {
            k: v for k, v in metrics["models"][row]["test"]["all"].items() if k != "counters"
        }
    best = loaded.recommend([3, 4, 5], k=5)
    assert len(best) == 5
    assert not {"i3", "i4", "i5"} & {r["item"] for r in best}
    assert all(abs(sum(r["shares"].values()) - 1) < 1e-5 for r in best)
    assert [r["score"] for r in best] == sorted((r["score"] for r in best), reverse=True)
    for call in (lambda: loaded.recommend([]), lambda: loaded.recommend([99]),
                 lambda: loaded.recommend([1], 0), lambda: loaded.evaluate("train"),
                 lambda: loaded.evaluate("test", "best")):  # fmt: skip
        with pytest.raises(UsageError):
            call()


def test_phases_never_hold_the_test_targets():
    phases = make_phases()
    dataset, _ = make_dataset()
    test = make_split(dataset, "leave_one_out").test
    for value in vars(phases).values():
        targets = getattr(value, "targets", None)
        assert targets is None or not np.array_equal(targets, test.targets)


def test_hand_over_between_phases():
    phases = make_phases(["align.start=copy", "disentangle.epochs=0", "align.epochs=0"])
    pretrained, _ = phases.pretrain()
    aligned, _ = phases.align(pretrained)
    source, copy = pretrained.experts["rec"], aligned.experts["aligned"]
    assert torch.equal(source.tower.id, copy.tower.id)
    language, _ = phases.language()
    model, _ = phases.disentangle(pretrained, aligned, language)
    for name, part in (("rec", pretrained), ("aligned", aligned), ("language", language)):
        ours, theirs = model.experts[name].state_dict(), part.experts[name].state_dict()
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs), name


def test_alignment_pulls_text_towards_collaborative_vectors():
    from padkern import mkmmd_loss

    distance = {}
    for gamma in (0.0, 5.0):
        phases = make_phases(
            [f"align.gamma={gamma}", "align.epochs=8", "align.lr=0.01", "align.restore_best=false"]
        )
        pretrained, _ = phases.pretrain()
        aligned, _ = phases.align(pretrained)
        warm = torch.from_numpy(phases.candidates())
        words = aligned.experts["aligned"].tower.projected_text(aligned.text)[warm]
        distance[gamma] = float(mkmmd_loss(words, pretrained.tables()[0][warm]).detach())
    assert distance[5.0] < 0.8 * distance[0.0]


def test_gate_fit_prefers_the_expert_that_predicts():
    """One expert knows the ring, the others are noise: the gate must find it."""
    phases = make_phases(["disentangle.gate.steps=60", "disentangle.gate.lr=0.2"])
    model = phases.build("pad").eval()
    data = held_out(model, phases.valid)
    rng = torch.Generator().manual_seed(0)
    for e in (0, 1):
        data.tables[e].copy_(torch.randn(data.tables[e].shape, generator=rng))
    logit = fit_gate(model, data, phases.config.disentangle.gate, seed=1)
    widths = [table.shape[1] for table in data.tables]
    spread = torch.stack(
        [(u @ t.T).std() for u, t in zip(data.states.split(widths, 1), data.tables, strict=True)]
    )
    say = logit.exp()[1 : phases.config.num_bins + 1] * spread
    assert (say[:, 2] > 2 * say[:, 0]).all()
    assert (say[:, 2] > 2 * say[:, 1]).all()
    assert torch.equal(logit, fit_gate(model, data, phases.config.disentangle.gate, seed=1))


def test_cross_fitting_leaves_the_gate_alone():
    phases = make_phases()
    model = phases.build("pad").eval()
    set_gate(model, torch.randn_like(model.gate.logit))
    before = model.gate.logit.detach().clone()
    result = cross_fitted(
        model, held_out(model, phases.valid), phases.train_frequency,
        phases.config.disentangle.gate, seed=1,
    )  # fmt: skip
    assert torch.equal(model.gate.logit, before)
    # A gate that has seen the targets must not be where a fold's fit starts from.
    set_gate(model, torch.zeros_like(before))
    again = cross_fitted(
        model, held_out(model, phases.valid), phases.train_frequency,
        phases.config.disentangle.gate, seed=1,
    )  # fmt: skip
    assert np.array_equal(result.ranks, again.ranks)
    assert len(result.ranks) == len(phases.valid)


def test_optimiser_groups_spare_gates_norms_and_biases():
    phases = make_phases()
    model = phases.build("pad")
    groups = parameter_groups(model, phases.config.disentangle, 0.5)
    place = {id(p): g for g in groups for p in g["params"]}
    for name, p in model.named_parameters():
        group = place[id(p)]
        if "gate" in name:
            assert group["weight_decay"] == 0
            assert group["lr"] == 0.5
        elif p.ndim < 2:
            assert group["weight_decay"] == 0, name
        else:
            assert group["weight_decay"] > 0, name
    assert isinstance(model.gate, FrequencyGate)


def test_schedule_warms_up_and_ends_at_the_floor():
    factors = [schedule(step, 100, 10, 0.05) for step in range(101)]
    assert factors[0] < 0.11
    assert max(factors) > 0.97
    assert abs(factors[100] - 0.05) < 1e-12
    assert all(b <= a for a, b in itertools.pairwise(factors[10:]))


def test_diverged_loss_stops_with_the_place():
    phases = make_phases(["pretrain.lr=1e30", "pretrain.warmup_steps=0"])
    with pytest.raises(PadkernError, match="phase pretrain, epoch"):
        phases.pretrain()


def test_early_stopping_restores_the_best_epoch():
    phases = make_phases(["pretrain.epochs=12", "pretrain.lr=0.05", "pretrain.patience=2"])
    model, result = phases.pretrain()
    values = [r["ndcg@10"] for r in result.history]
    assert values[result.best_epoch] == max(values)
    assert phases._evaluate(model).metrics()["all"]["ndcg@10"] == max(values)
    assert len(values) <= result.best_epoch + 3


def test_shuffled_text_keeps_rows_and_padding():
    _, text = make_dataset()
    mixed = shuffled_text(text, 3)
    assert np.array_equal(mixed[0], text[0])
    assert not np.array_equal(mixed, text)
    assert np.array_equal(np.sort(mixed, axis=0), np.sort(text, axis=0))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("align.gama=1", "unknown key 'align.gama'"),
        ("align", "expected key=value"),
        ("align.gamma=-1", "align.gamma"),
        ("model.encoder=lstm", "model.encoder"),
        ("loss=ce", "loss"),
        ("loss.kind=mse", "loss.kind"),
        ("loss.calibration=1.5", "loss.calibration"),
        ("loss.calibration=.nan", "loss.calibration"),
        ("nothing.here=1", "unknown key"),
    ],
)
def test_bad_overrides_are_named(override, message):
    with pytest.raises(UsageError) as error:
        RunConfig.preset("clean").with_overrides([override])
    assert message in str(error.value)


def test_incomplete_configuration_is_refused():
    text = RunConfig.preset("clean").to_yaml().replace("  gamma: 1.0\n", "")
    with pytest.raises(UsageError, match=r"align\.gamma is missing"):
        RunConfig.from_yaml(text)


@pytest.mark.parametrize("preset", ["clean", "parity"])
def test_configurations_from_before_the_calibration_open(preset):
    config = RunConfig.preset(preset)
    old = config.to_yaml().replace("  calibration: 0.75\n", "")
    assert old != config.to_yaml()
    assert RunConfig.from_yaml(old) == config


@pytest.mark.parametrize("preset", ["clean", "parity"])
def test_configuration_survives_yaml(preset):
    config = RunConfig.preset(preset).with_overrides(["seed=7", "align.gamma=0.3"])
    assert RunConfig.from_yaml(config.to_yaml()) == config


@pytest.mark.parametrize("encoder", ["sasrec", "sasrec_pre_ln"])
def test_steps_have_the_same_bits_for_any_number_of_threads(native_core, encoder):
    rng = np.random.default_rng(0)
    text = torch.from_numpy(rng.normal(size=(2001, 96))).float()
    text[0] = 0
    bins = torch.from_numpy(rng.integers(1, 11, 2001))
    bins[0] = 0
    histories = Ragged.from_lists([rng.integers(1, 2001, n) for n in rng.integers(2, 30, 96)])
    source = PlanSource(histories, num_items=2000, max_len=20, item_bins=bins.numpy())
    batches = TrainBatches(source, batch_size=48, seed=1, phase="train", negatives=2)

    def trained(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = TripleExpert(2000, text, bins, dim=64, encoder=encoder).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step, plan in enumerate(batches.epoch(0)):
            keyed = plan.keyed(3, step)
            losses = (model.plan_loss(keyed), model.loss(keyed.inputs, keyed.targets))
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
        return list(model.parameters())

    before = torch.get_num_threads()
    try:
        first = trained(1)
        for threads in (2, 3):
            for got, want in zip(trained(threads), first, strict=True):
                assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)
