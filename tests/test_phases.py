"""Phases in detail: no leak of test targets, the parity MMD, BCE, devices, odd data."""

from __future__ import annotations

import numpy as np
import pytest
import small_ring as ring
import torch

from padkern.data.bins import frequency_bins
from padkern.data.dataset import Dataset, Ragged
from padkern.data.plan import PlanSource, TrainBatches
from padkern.data.split import make_split
from padkern.errors import UsageError
from padkern.pad.config import RunConfig
from padkern.pad.folder import RunFolder
from padkern.pad.gate import UNSEEN_FACTORS, HeldOut, fit_gate, held_out, set_gate
from padkern.pad.phases import TRAINED_ROWS, Phases
from padkern.pad.run import run_experiment
from padkern.pad.stored import load_run, transform_text

SMALL, make_dataset, make_phases, run = ring.SMALL, ring.make_dataset, ring.make_phases, ring.run


def first_batch(phases, row: str):
    """The first training batch of a row, its loss and its model."""
    grabbed = {}

    def grab(model, batches, loss, *_args, **_kw):
        grabbed.update(batch=next(batches.epoch(0)), loss=loss, model=model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("padkern.pad.phases.fit", grab)
        if row == "aligned":
            patch.setattr("padkern.pad.phases.fit", lambda *_a, **_k: None)
            pretrained, _ = phases.pretrain()
            patch.setattr("padkern.pad.phases.fit", grab)
            phases.align(pretrained)
        else:
            getattr(phases, {"text": "language"}.get(row, row))()
    return grabbed["batch"], grabbed["loss"], grabbed["model"]


@pytest.mark.parametrize("preset", ["clean", "parity"])
def test_test_targets_change_nothing_that_is_trained_or_selected(tmp_path, preset):
    metrics = run(tmp_path / "a", preset=preset)
    dataset, text = make_dataset()
    values = dataset.sequences.values.copy()
    last = dataset.sequences.offsets[1:] - 1
    values[last] = values[last] % dataset.num_items + 1
    other = Dataset(
        dataset.name, dataset.users, dataset.items, Ragged(values, dataset.sequences.offsets),
        None, dataset.texts,
    )  # fmt: skip
    config = RunConfig.preset(preset).with_overrides(SMALL)
    with RunFolder(tmp_path / "b") as folder:
        changed = run_experiment(other, text, config, folder, audit={})
        with RunFolder(tmp_path / "a", create=False) as before:
            for row in TRAINED_ROWS:
                left, right = (f.load_tensors(f"models/{row}")[0] for f in (before, folder))
                assert all(torch.equal(left[k], right[k]) for k in left), row
    for row, parts in metrics["models"].items():
        assert parts["valid"] == changed["models"][row]["valid"], row
    assert any(
        parts["test"] != changed["models"][row]["test"] for row, parts in metrics["models"].items()
    )


def test_stored_validation_figures_are_those_of_the_loaded_run(tmp_path):
    metrics = run(tmp_path / "run", ["disentangle.gate.lr=0.5"])
    loaded = load_run(RunFolder(tmp_path / "run", create=False))
    for row in ("aligned", "pad"):
        again = loaded.evaluate("valid", row)
        stored = metrics["models"][row]["valid"]
        assert again.metrics() == {k: v for k, v in stored.items() if k != "counters"}


# -- parity ----------------------------------------------------------------------------------------


def test_parity_mmd_takes_every_slot_of_positives_and_negatives():
    phases = make_phases(preset="parity")
    batch, _, _ = first_batch(phases, "aligned")
    slots = phases.config.model.max_len + 1
    groups = phases._mmd_rows(batch, 0, phases.config.align)
    users = len(batch.users)
    assert [len(rows) for rows in groups] == [2 * slots * users]
    negatives = batch.negatives[:, 0]
    want = []
    low = 0
    for user in batch.users:
        row = phases.train.row(user)[-slots:].tolist()
        drawn = negatives[low : low + len(row) - 1].tolist()
        low += len(row) - 1
        want += [0] * (slots - len(row)) + row  # positives
        want += [0] * (slots - len(row)) + drawn + [0]  # negatives
    assert sorted(groups[0].tolist()) == sorted(want)


def test_parity_padding_vector_takes_no_gradient():
    phases = make_phases(preset="parity")
    batch, loss, model = first_batch(phases, "aligned")
    ids = model.experts["aligned"].tower.id
    assert ids[0].norm() > 0  # the release's xavier start overwrites the zero row
    loss(batch, 0).backward()
    assert ids.grad[0].abs().max() == 0
    assert (ids.grad[1:].abs().sum(1) > 0).any()


def test_unique_rows_leave_out_a_group_of_one_item():
    phases = make_phases(["align.gamma=1.0"])
    _, loss, _ = first_batch(phases, "aligned")
    train = Ragged.from_lists([[5, 5, 5]])
    source = PlanSource(train, num_items=len(phases.train_frequency) - 1, max_len=6)
    batch = next(TrainBatches(source, batch_size=1, seed=0, phase="x").epoch(0))
    assert phases._mmd_rows(batch, 0, phases.config.align) == []
    assert torch.isfinite(loss(batch, 0))


def test_parity_stops_by_its_epochs_alone():
    """The release knows no epoch 0: only epochs count for its last-epoch rule."""
    phases = make_phases(["disentangle.epochs=1"], preset="parity")
    pretrained, _ = phases.pretrain()
    aligned, _ = phases.align(pretrained)
    _, result = phases.disentangle(pretrained, aligned, None)
    assert result.best_epoch == 0
    assert result.best == result.history[0]["hit@10"]


# -- loss, devices, odd data -----------------------------------------------------------------------


def make_sparse_phases(overrides=(), preset="clean"):
    """A ring with items that only occur as targets."""
    dataset, text = make_dataset(users=60, items=150)
    config = RunConfig.preset(preset).with_overrides([*SMALL, *overrides])
    split = make_split(dataset, config.split)
    assert (split.train_frequency[split.valid.targets] == 0).sum() >= 5
    bins = frequency_bins(split.train_frequency, config.num_bins, unseen=config.unseen)
    return Phases.of(split, bins, transform_text(text, config), config)


@pytest.mark.parametrize("kind", ["bce", "gbce"])
def test_bce_draws_as_many_negatives_as_asked(monkeypatch, kind):
    phases = make_phases([f"loss.kind={kind}", "loss.negatives=3"])
    batch, loss, model = first_batch(phases, "pretrain")
    seen = []
    real = model.plan_loss

    def spy(plan, **kw):
        seen.append(plan.negatives)
        return real(plan, **kw)

    monkeypatch.setattr(model, "plan_loss", spy)
    assert torch.isfinite(loss(batch, 0))
    (negatives,) = seen
    assert negatives.shape == (batch.targets.numel(), 3)
    owner = np.repeat(batch.users, np.diff(batch.inputs.offsets.numpy()))
    for user, drawn in zip(owner, negatives.tolist(), strict=True):
        assert not set(drawn) & set(phases.train.row(user).tolist())
        assert (phases.train_frequency[drawn] > 0).all()


GBCE = ["loss.kind=gbce", "loss.negatives=3", "loss.calibration=0.6"]


@pytest.mark.parametrize("preset", ["clean", "parity"])
@pytest.mark.parametrize("row", ["pretrain", "aligned"])
def test_gbce_of_a_step_is_that_of_the_paper(row, preset):
    """Its N counts the items that may be drawn."""
    phases = make_sparse_phases([*GBCE, "model.dropout=0", "align.gamma=0"], preset)
    batch, loss, model = first_batch(phases, row)
    seen = int((phases.train_frequency > 0).sum())
    assert seen < 150
    alpha = 3 / ((seen if preset == "clean" else 150) - 1)
    beta = alpha * (0.6 * (1 - 1 / alpha) + 1 / alpha)
    states = model.encode(model.tables(), batch.inputs)
    scores = states @ model.fold(model.tables()).T
    softplus = torch.nn.functional.softplus
    terms = beta * softplus(-scores.gather(1, batch.targets[:, None])).squeeze(1)
    terms = terms + softplus(scores.gather(1, batch.negatives)).sum(1)
    # The paper divides by the k + 1 slots of a token; two separate means by one k.
    papers = terms.mean().item() / 4
    assert loss(batch, 0).item() * 3 / 4 == pytest.approx(papers, rel=1e-5)


def test_phases_train_with_gbce():
    budget = [f"id_plus_text.{one}" for one in ("epochs=12", "lr=0.01", "patience=0")]
    phases = make_phases([*GBCE, *budget])
    before = phases._evaluate(phases.build("id_plus_text")).metrics()["all"]["ndcg@10"]
    _, result = phases.id_plus_text()
    losses = [record["loss"] for record in result.history]
    assert losses[-1] < 0.9 * losses[0]
    assert result.best > before
    pretrained, _ = phases.pretrain()
    aligned, second = phases.align(pretrained)
    _, third = phases.disentangle(pretrained, aligned, None)
    assert len(second.history) == len(third.history) == 2
    assert all(np.isfinite(record["loss"]) for record in second.history + third.history)


def test_a_step_leaves_nothing_on_another_device():
    """The meta device stands for an accelerator: a tensor left on the CPU makes an op fail."""
    phases = make_phases(["disentangle.gate.hide=0.5"])
    batch, _, _ = first_batch(phases, "pretrain")
    model = phases.build("pad").to("meta")
    phases.device = "meta"
    hidden = phases._hidden(0)
    tables = model.tables(hidden)
    states = model.encode(tables, batch.inputs.to("meta"))
    scores = states @ model.fold(tables, hidden).T
    assert scores.device.type == "meta"
    assert scores.shape == (batch.targets.numel(), len(phases.train_frequency))
    items = batch.inputs.items.to("meta")
    assert model.fold(tables).index_select(0, items).device.type == "meta"


def test_gate_is_fitted_on_the_device_of_the_model():
    phases = make_phases(["disentangle.gate.cold_tolerance=0", "disentangle.gate.steps=2"])
    model = phases.build("pad").eval()
    data = held_out(model, phases.valid)
    model.to("meta")
    moved = HeldOut(data.split, data.states.to("meta"), [t.to("meta") for t in data.tables])
    logit = fit_gate(model, moved, phases.config.disentangle.gate, seed=1)
    assert logit.device.type == "meta"


def cold_gate(overrides=()):
    """A model with an arbitrary gate, on a ring with items that only occur as targets."""
    phases = make_sparse_phases(overrides)
    model = phases.build("pad").eval()
    set_gate(model, torch.randn_like(model.gate.logit) - 1)
    return phases, model


@pytest.mark.parametrize("tolerance", [0.001, 0.05, 0.5])
def test_unseen_items_are_raised_as_far_as_the_tolerance_goes(tolerance):
    steps = ["disentangle.gate.steps=1", "disentangle.gate.lr=1e-9"]
    phases, model = cold_gate([*steps, f"disentangle.gate.cold_tolerance={tolerance}"])
    unseen = phases.bins.unseen_bin
    before = model.gate.logit.detach().clone()
    after = fit_gate(model, held_out(model, phases.valid), phases.config.disentangle.gate, seed=1)
    want = ring.largest_within(phases, model, before, unseen, UNSEEN_FACTORS, tolerance)
    raised = (after - before).exp()
    torch.testing.assert_close(raised[unseen], torch.full((3,), want), rtol=1e-4, atol=0)
    rest = torch.arange(len(before)) != unseen
    torch.testing.assert_close(after[rest], before[rest], rtol=0, atol=1e-6)


def test_an_empty_unseen_bin_is_not_raised():
    phases, model = cold_gate(["disentangle.gate.steps=1", "disentangle.gate.cold_tolerance=0.5"])
    unseen = phases.bins.unseen_bin
    config = phases.config.disentangle.gate
    before = model.gate.logit[unseen].detach().clone()
    nobody = np.zeros(0, dtype=np.int64)
    logit = fit_gate(model, held_out(model, phases.valid), config, seed=1, users=nobody)
    assert torch.equal(logit[unseen], before)
    model.item_bins[1:] = 1
    logit = fit_gate(model, held_out(model, phases.valid), config, seed=1)
    assert torch.equal(logit[unseen], before)


def test_hiding_takes_rare_items_alone_and_depends_on_the_step():
    phases, _ = cold_gate(["disentangle.gate.hide=0.5", "disentangle.gate.hide_max_frequency=2"])
    frequency = phases.train_frequency
    rare = (frequency > 0) & (frequency <= 2)
    draws = [phases._hidden(step).numpy() for step in range(40)]
    assert not np.logical_or.reduce(draws)[~rare].any()
    assert np.logical_or.reduce(draws)[rare].all()
    assert abs(np.mean([d[rare].mean() for d in draws]) - 0.5) < 0.1
    assert np.array_equal(draws[3], phases._hidden(3).numpy())
    assert not np.array_equal(draws[3], draws[4])


def test_one_item_seen_in_training_is_enough_for_the_softmax(tmp_path):
    dataset = Dataset(
        "tiny", ["a", "b"], ["", "x", "y", "z"], Ragged.from_lists([[1, 1, 2, 3], [1, 1, 3, 2]]),
        None, ["", "one", "two", "three"],
    )  # fmt: skip
    text = np.zeros((4, 5), dtype=np.float32)
    text[1:] = np.random.default_rng(0).normal(size=(3, 5))
    config = RunConfig.preset("clean").with_overrides(SMALL)
    with RunFolder(tmp_path / "run") as folder:
        metrics = run_experiment(dataset, text, config, folder, audit={})
    assert metrics["models"]["pad"]["test"]["freq_0"]["count"] == 2


def test_histories_that_begin_after_training(tmp_path):
    """Global time split: users without a training row are ranked by what they did since."""
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, 21, size=8) for _ in range(20)]
    times = [np.arange(8.0) * 16 + user for user in range(16)]
    for user in range(8):
        times[user][-1] = 130.5  # a validation target
    times += [128.0 + np.arange(8) * 4 + user for user in range(4)]
    dataset = Dataset(
        "late", [f"u{i}" for i in range(20)], ["", *(f"i{i}" for i in range(20))],
        Ragged.from_lists(rows), np.concatenate(times), ["", *["text"] * 20],
    )  # fmt: skip
    text = np.zeros((21, 12), dtype=np.float32)
    text[1:] = rng.normal(size=(20, 12))
    config = RunConfig.preset("clean").with_overrides([*SMALL, "split=global_time"])
    with RunFolder(tmp_path / "run") as folder:
        metrics = run_experiment(dataset, text, config, folder, audit={})
        loaded = load_run(folder)
    lengths = loaded.split.train.lengths
    assert (lengths[loaded.split.test.users] == 0).any()
    assert metrics["models"]["pad"]["test"]["all"]["count"] == len(loaded.split.test)


def test_a_negative_seed_is_named():
    with pytest.raises(UsageError, match="seed"):
        RunConfig.preset("clean").with_overrides(["seed=-1"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable CUDA device")
@pytest.mark.parametrize("preset", ["clean", "parity"])
def test_all_phases_run_on_the_gpu(preset):
    phases = make_phases(preset=preset, device="cuda")
    pretrained, _ = phases.pretrain()
    aligned, _ = phases.align(pretrained)
    language, _ = phases.language()
    model, result = phases.disentangle(pretrained, aligned, language)
    set_gate(model, model.gate.logit.cpu())
    assert len(result.history) == 2
    assert len(phases.validation("pad", model).ranks) == len(phases.valid)
