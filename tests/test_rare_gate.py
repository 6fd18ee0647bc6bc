"""Rare items are raised as far as a stated share of NDCG@10 pays for it."""

from __future__ import annotations

import numpy as np
import pytest
import small_ring as ring
import torch
import yaml

from padkern.data.bins import frequency_bins
from padkern.data.split import make_split
from padkern.models.gates import ITEM_FORMS
from padkern.pad.config import RunConfig
from padkern.pad.gate import RARE_FACTORS, UNSEEN_FACTORS, fit_gate, held_out, rare_rows, set_gate
from padkern.pad.grid.spec import parse_grid
from padkern.pad.phases import Phases
from padkern.pad.stored import transform_text

GATE = "disentangle.gate."


def make_phases(*overrides: str, users: int = 80, items: int = 60) -> Phases:
    """Every item occurs some times, half of them at most four times; with more items some never."""
    dataset, text = ring.make_dataset(users=users, items=items)
    config = RunConfig.preset("clean").with_overrides(
        [*ring.SMALL, GATE + "steps=1", GATE + "lr=1e-9", GATE + "hide_max_frequency=4",
         GATE + "cold_tolerance=0", *overrides]
    )  # fmt: skip
    split = make_split(dataset, config.split)
    bins = frequency_bins(split.train_frequency, config.num_bins, unseen=config.unseen)
    return Phases.of(split, bins, transform_text(text, config), config)


def with_gate(phases: Phases):
    torch.manual_seed(4)
    model = phases.build("pad").eval()
    set_gate(model, torch.randn_like(model.gate.logit) - 1)
    return model


def fitted(phases: Phases, model) -> torch.Tensor:
    counts = phases.train_frequency
    data = held_out(model, phases.valid, train_frequency=counts)
    return fit_gate(model, data, phases.config.disentangle.gate, seed=1)


@pytest.mark.parametrize("form", ["scale", *ITEM_FORMS])
@pytest.mark.parametrize("tolerance", [0.0, 0.001, 0.2])
def test_rare_items_are_raised_as_far_as_the_tolerance_goes(form, tolerance):
    phases = make_phases(GATE + f"form={form}", GATE + f"rare_tolerance={tolerance}")
    model = with_gate(phases)
    before = model.gate.logit.detach().clone()
    rows = rare_rows(model, torch.from_numpy(phases.train_frequency), 4)
    assert rows
    after = fitted(phases, model)
    want = ring.largest_within(phases, model, before, rows, RARE_FACTORS, tolerance)
    if tolerance == 0:
        want = 1.0  # not even where it is for nothing
    raised = (after - before)[rows].exp()
    torch.testing.assert_close(raised, torch.full_like(raised, want), rtol=1e-4, atol=0)
    rest = torch.ones(len(before), dtype=torch.bool)
    rest[rows] = False
    torch.testing.assert_close(after[rest], before[rest], rtol=0, atol=1e-6)
    if tolerance == 0.2:
        assert want > 1


def test_rows_that_are_mostly_rare():
    """Bins by hand: a row counts when half of its items are rare; unseen items and padding not."""
    phases = make_phases(users=60, items=150)
    model = phases.build("pad")
    counts = phases.train_frequency
    assert (counts[1:] == 0).any()
    bins = model.item_bins.numpy()
    want = []
    for row in range(1, int(bins.max()) + 1):
        inside = (bins == row) & (counts > 0)
        inside[0] = False
        if inside.any() and (counts[inside] <= 4).mean() >= 0.5:
            want.append(row)
    assert rare_rows(model, torch.from_numpy(counts), 4) == want
    assert rare_rows(model, torch.from_numpy(counts), 0) == []
    seen = sorted(set(bins[counts > 0]))
    assert rare_rows(model, torch.from_numpy(counts), int(counts.max())) == seen


def test_knots_near_rare_items_are_raised_and_never_the_unseen_row():
    phases = make_phases(GATE + "form=continuous")
    model = phases.build("pad")
    rows = rare_rows(model, torch.from_numpy(phases.train_frequency), 4)
    unseen = model.gate.unseen_row(phases.bins.unseen_bin)
    assert rows
    assert unseen not in rows
    assert rows == list(range(1, len(rows) + 1))  # knots stand coldest first
    assert len(rows) < len(model.gate.logit) - 2


def test_without_training_counts_nothing_is_known_to_be_rare():
    phases = make_phases(GATE + "rare_tolerance=0.5")
    model = with_gate(phases)
    data = held_out(model, phases.valid)
    logit = fit_gate(model, data, phases.config.disentangle.gate, seed=1)
    torch.testing.assert_close(logit, model.gate.logit.detach(), rtol=0, atol=1e-6)
    assert not torch.allclose(fitted(phases, model), logit)


def test_a_normalised_gate_is_left_alone():
    phases = make_phases(GATE + "rare_tolerance=0.5", GATE + "form=sigmoid")
    model = with_gate(phases)
    before = model.gate.logit.detach().clone()
    torch.testing.assert_close(fitted(phases, model), before, rtol=0, atol=1e-6)


def test_phases_tell_the_fit_who_is_rare():
    fits = {}
    for tolerance in (0.0, 0.2):
        phases = make_phases(GATE + f"rare_tolerance={tolerance}")
        model = with_gate(phases)
        rows = rare_rows(model, torch.from_numpy(phases.train_frequency), 4)
        phases.fit_gate(model)
        fits[tolerance] = model.gate.logit.detach().clone()
    raised = (fits[0.2] - fits[0.0]).exp()[rows]
    assert raised.min() > 1.04


def test_unseen_items_are_raised_beside_raised_rare_ones():
    """The second price is measured with the first raise in place."""
    changes = [GATE + "rare_tolerance=0.2", GATE + "cold_tolerance=0.2"]
    phases = make_phases(*changes, users=60, items=150)
    model = with_gate(phases)
    before = model.gate.logit.detach().clone()
    unseen = phases.bins.unseen_bin
    rows = rare_rows(model, torch.from_numpy(phases.train_frequency), 4)
    after = fitted(phases, model)
    rare_factor = float((after - before)[rows].exp().max())
    trial = before.clone()
    trial[rows] += np.log(rare_factor)
    want = ring.largest_within(phases, model, trial, unseen, UNSEEN_FACTORS, 0.2)
    raised = (after - before)[unseen].exp()
    torch.testing.assert_close(raised, torch.full_like(raised, want), rtol=1e-4, atol=0)


def test_runs_of_before_are_read_as_what_they_did():
    clean = RunConfig.preset("clean")
    assert clean.disentangle.gate.rare_tolerance == 0.005
    values = yaml.safe_load(clean.to_yaml())
    del values["disentangle"]["gate"]["rare_tolerance"], values["model"]["text_maps"]
    old = RunConfig.from_yaml(yaml.safe_dump(values))
    assert old.disentangle.gate.rare_tolerance == 0.0
    assert old.model.text_maps == 1
    assert RunConfig.from_yaml(clean.to_yaml()) == clean


def test_names_of_cells_tell_results_with_and_without_apart():
    def names(value: float, more: str = "") -> dict[str, str]:
        grid = parse_grid(
            "datasets: [a]\nmethods: [aligned, pad]\nseeds: [1]\n"
            f"set: {{disentangle.gate.rare_tolerance: {value}{more}}}", "g",
        )  # fmt: skip
        return {cell.method: cell.name for cell in grid.cells()}

    without, few, many = names(0.0), names(0.005), names(0.1)
    assert without["aligned"] == few["aligned"] == many["aligned"]
    assert len({without["pad"], few["pad"], many["pad"]}) == 3
    joint = ", disentangle.gate.learning: joint"
    assert names(0.0, joint) == names(0.005, joint)
