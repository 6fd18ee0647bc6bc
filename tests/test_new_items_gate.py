"""The gate's weights of unseen items when the catalogue grows after training."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import small_ring as ring
import torch

from padkern.errors import UsageError
from padkern.pad.added import store_added
from padkern.pad.folder import RunFolder
from padkern.pad.gate import UNSEEN_FACTORS, fit_new_items, held_out, set_gate
from padkern.pad.stored import load_run

GATE = "disentangle.gate."
FORMS = ("scale", "continuous", "per_item")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    ring.run(path)
    return path


def opened(path: Path):
    return load_run(RunFolder(path, create=False))


def vectors(count: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, 12)).astype(np.float32)


def fitted(form: str = "scale", *, tolerance: float = 0.0, before: float = 0.0, share: float = 0.2):
    """Row of unseen items before and after, and whether the other rows kept their bits."""
    phases = ring.make_phases([GATE + f"form={form}", GATE + f"cold_tolerance={tolerance}"])
    model = phases.build("pad").eval()
    logit = torch.randn(model.gate.logit.shape, generator=torch.Generator().manual_seed(1)) - 1
    row = model.gate.unseen_row(phases.bins.unseen_bin)
    logit[row] = before
    set_gate(model, logit)
    data = held_out(model, phases.valid, phases.train_frequency > 0)
    config = phases.config.disentangle.gate
    after = fit_new_items(model, data, config, share=share, seed=3)
    assert torch.equal(model.gate.logit, logit)
    rest = torch.arange(len(logit)) != row
    assert torch.equal(after[rest], logit[rest])
    return after[row]


@pytest.mark.parametrize("form", FORMS)
def test_the_unseen_row_alone_is_fitted_anew(form):
    row = fitted(form)
    assert not torch.equal(row, torch.zeros(3))
    # What the raise for the old catalogue had made of it does not matter.
    assert torch.equal(row, fitted(form, before=5.0))


@pytest.mark.parametrize("form", FORMS)
def test_a_larger_tolerance_raises_further(form):
    rows = [fitted(form, tolerance=tolerance) for tolerance in (0.0, 0.01, 0.9)]
    factors = [(row - rows[0]).exp() for row in rows]
    for factor in factors:
        assert min(abs(factor[0] - known) for known in UNSEEN_FACTORS) < 1e-4
        torch.testing.assert_close(factor, factor[:1].expand(3), rtol=1e-4, atol=0)
    assert 1 <= factors[1][0] <= factors[2][0]
    assert factors[2][0] > 1


def test_hidden_items_decide():
    assert not torch.equal(fitted(share=0.1), fitted(share=0.4))
    # Very few arrivals are fitted as five in a hundred, very many as half.
    assert torch.equal(fitted(share=0.0001), fitted(share=0.05))
    assert torch.equal(fitted(share=0.9), fitted(share=0.5))


def test_the_items_that_may_be_hidden_must_be_given():
    phases = ring.make_phases()
    model = phases.build("pad").eval()
    config = phases.config.disentangle.gate
    with pytest.raises(ValueError, match="data must be held out with the items that may be hidden"):
        fit_new_items(model, held_out(model, phases.valid), config, share=0.1, seed=1)


def test_the_row_of_a_grown_run_is_that_of_its_larger_catalogue(trained):
    run = opened(trained)
    grown = run.add_items(["a", "b", "c"], vectors=vectors(3))
    model, config = run.model, run.config
    data = held_out(model, run.split.valid, run.split.train_frequency > 0)
    want = fit_new_items(
        model, data, config.disentangle.gate, share=3 / 43, seed=config.seed
    )  # fmt: skip
    assert torch.equal(grown.model.gate.logit, want)
    assert not torch.equal(want, model.gate.logit)
    shy = run.add_items(["a", "b", "c"], vectors=vectors(3), cold_tolerance=0.0)
    bold = run.add_items(["a", "b", "c"], vectors=vectors(3), cold_tolerance=0.9)
    row = model.gate.unseen_row(run.bins.unseen_bin)
    assert (bold.model.gate.logit[row] > shy.model.gate.logit[row]).all()


def test_in_parts_at_once_and_stored_are_the_same(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    raw = vectors(5)
    with RunFolder(tmp_path / "run") as folder:
        run = load_run(folder)
        once = run.add_items(list("abcde"), vectors=raw)
        with torch.no_grad():  # callers may recommend in the same block
            parts = run.add_items(list("ab"), vectors=raw[:2]).add_items(
                list("cde"), vectors=raw[2:]
            )
        store_added(folder, parts)
        again = load_run(folder)
        tensors, names = folder.load_tensors("added")
        folder.save_tensors("added", {"vectors": tensors["vectors"]}, names)
        older = load_run(folder)
    for grown in (parts, again):
        assert grown.dataset.items == once.dataset.items
        assert torch.equal(grown.model.item_matrix(), once.model.item_matrix())
    assert torch.equal(tensors["unseen_logit"], once.model.gate.logit[run.bins.unseen_bin])
    # What was stored before these weights were, recommends as it did.
    assert torch.equal(older.model.gate.logit, run.model.gate.logit)


def test_a_tolerance_holds_for_all_added_items(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    raw = vectors(5)
    with RunFolder(tmp_path / "run") as folder:
        run = load_run(folder)
        once = run.add_items(list("abcde"), vectors=raw, cold_tolerance=0.9)
        store_added(folder, run.add_items(list("ab"), vectors=raw[:2], cold_tolerance=0.9))
        later = load_run(folder).add_items(list("cde"), vectors=raw[2:])
    assert torch.equal(later.model.gate.logit, once.model.gate.logit)
    assert not torch.equal(
        run.add_items(list("abcde"), vectors=raw).model.gate.logit, once.model.gate.logit
    )


def test_items_may_be_added_in_inference_mode(trained):
    run = opened(trained)
    with torch.inference_mode():
        grown = run.add_items(["a"], vectors=vectors(1))
    want = run.add_items(["a"], vectors=vectors(1))
    assert torch.equal(grown.model.gate.logit, want.model.gate.logit)


def test_unseen_items_of_the_catalogue_share_the_new_weights(tmp_path):
    dataset, text = ring.make_dataset(users=60, items=150)
    config = ring.RunConfig.preset("clean").with_overrides(ring.SMALL)
    with RunFolder(tmp_path / "run") as folder:
        ring.run_experiment(dataset, text, config, folder, audit={})
    run = opened(tmp_path / "run")
    grown = run.add_items(["a", "b"], vectors=vectors(2)[:, : text.shape[1]])
    unseen = torch.from_numpy(run.split.train_frequency == 0)
    unseen[0] = False
    assert unseen.sum() > 5
    before, after = run.model.item_matrix(), grown.model.item_matrix()[: len(unseen)]
    assert torch.equal(before[~unseen], after[~unseen])
    assert not torch.equal(before[unseen], after[unseen])
    row = run.model.gate.unseen_row(run.bins.unseen_bin)
    factor = (grown.model.gate.logit[row] - run.model.gate.logit[row]).exp()
    widths = [table.shape[1] for table in run.model.tables()]
    for old, new, times in zip(
        before[unseen].split(widths, 1), after[unseen].split(widths, 1), factor, strict=True
    ):
        torch.testing.assert_close(new, old * times)


def test_validation_figures_of_a_grown_run_are_refused(trained):
    grown = opened(trained).add_items(["a"], vectors=vectors(1))
    with pytest.raises(UsageError, match="split must be test for row pad of a run with added"):
        grown.evaluate("valid")
    assert grown.evaluate("valid", "text_knn").num_items == 41
    assert grown.evaluate("test").num_items == 41


@pytest.mark.parametrize("learning", ["joint", "uniform"])
def test_a_gate_that_was_not_fitted_stays(tmp_path, learning):
    ring.run(tmp_path / "run", [GATE + f"learning={learning}"])
    run = opened(tmp_path / "run")
    grown = run.add_items(["a"], vectors=vectors(1))
    assert torch.equal(grown.model.gate.logit, run.model.gate.logit)
    with pytest.raises(ValueError, match="cold_tolerance must not be given"):
        run.add_items(["a"], vectors=vectors(1), cold_tolerance=0.1)


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_a_tolerance_out_of_range_is_refused(trained, tolerance):
    with pytest.raises(ValueError, match="cold_tolerance must be at least 0 and below 1, got"):
        opened(trained).add_items(["a"], vectors=vectors(1), cold_tolerance=tolerance)
