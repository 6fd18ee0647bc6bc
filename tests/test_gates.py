"""Gates with a weight per item: fold, gradients, hidden items, fits, runs and broken choices."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import small_ring as ring
import torch

from padkern import TripleExpert
from padkern.data.batch import pack_ragged
from padkern.data.dataset import Ragged
from padkern.data.plan import BatchPlanner, PlanSource
from padkern.errors import UsageError
from padkern.models.gates import ITEM_FORMS, ItemGate, build_gate, knot_mix
from padkern.models.growth import add_items
from padkern.modules import FrequencyGate
from padkern.pad.config import RunConfig
from padkern.pad.folder import RunFolder
from padkern.pad.gate import UNSEEN_FACTORS, fit_gate, held_out, set_gate
from padkern.pad.stored import load_run

N, E, D, L, UNSEEN = 30, 12, 8, 6, 4
GATE = "disentangle.gate."


def make_counts() -> torch.Tensor:
    counts = (torch.arange(N + 1) * 7) % 23 + 1
    counts[torch.arange(N + 1) % 5 == 0] = 0
    return counts


def make_bins() -> torch.Tensor:
    counts = make_counts()
    bins = torch.where(counts > 15, 1, torch.where(counts > 6, 2, 3))
    bins[counts == 0] = UNSEEN
    bins[0] = 0
    return bins


def make_model(form: str, **options) -> TripleExpert:
    torch.manual_seed(0)
    text = torch.randn(N + 1, E)
    text[0] = 0
    options = {"unseen_bin": UNSEEN, "dropout": 0.0, "gate_knots": 4} | options
    model = TripleExpert(
        N, text, make_bins(), dim=D, max_len=L,
        gate_form=form, train_frequency=make_counts(), **options,
    ).double()  # fmt: skip
    with torch.no_grad():
        model.gate.logit.normal_()
        for expert in model.experts.values():
            for p in expert.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def weights_by_definition(model: TripleExpert, hidden=()) -> torch.Tensor:
    """``[N + 1, E]`` weights item by item, without a mixing matrix."""
    gate, counts, bins = model.gate, make_counts(), make_bins()
    logit = gate.logit.detach().numpy()
    rows = []
    for item in range(N + 1):
        unseen = int(bins[item]) == UNSEEN or item in hidden
        if gate.form == "per_item":
            row = logit[UNSEEN if unseen else int(bins[item])]
            own = logit[UNSEEN + 1 + item]
            rows.append(row if unseen else row + own)
        elif unseen or item == 0:
            rows.append(logit[-1] if unseen else logit[0])
        else:
            seen = np.log1p(counts[(bins > 0) & (bins != UNSEEN)].numpy())
            knots = np.linspace(seen.min(), seen.max(), 4)
            place = math.log1p(int(counts[item]))
            rows.append([np.interp(place, knots, logit[1:5, e]) for e in range(3)])
    return torch.from_numpy(np.exp(np.array(rows)))


@pytest.mark.parametrize("form", ITEM_FORMS)
def test_weights_are_their_definition(form):
    model = make_model(form)
    got = model.gate(model.item_bins)
    torch.testing.assert_close(got, weights_by_definition(model), rtol=1e-6, atol=0)
    some = torch.tensor([7, 1, 20, 5])
    assert torch.equal(model.gate(model.item_bins[some], some), got[some])


@pytest.mark.parametrize("form", ITEM_FORMS)
def test_hidden_items_read_the_unseen_row_and_nothing_of_their_own(form):
    model = make_model(form)
    hidden = torch.zeros(N + 1, dtype=torch.bool)
    hidden[[7, 12]] = True
    got = model.gate(model.bins(hidden))
    want = weights_by_definition(model, hidden=(7, 12))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert torch.equal(got[7], got[12])
    row = model.gate.unseen_row(UNSEEN)
    torch.testing.assert_close(got[7], model.gate.logit[row].exp())
    assert not torch.allclose(model.gate(model.item_bins)[7], got[7])


@pytest.mark.parametrize("language", ["text_space", "projected"])
@pytest.mark.parametrize("form", ITEM_FORMS)
def test_folded_matrix_equals_gated_sum(form, language):
    model = make_model(form, language=language)
    states = model(torch.tensor([3, 1, 4]), torch.tensor([0, 3]))
    folded = (states @ model.item_matrix().T)[0]
    tables, weights = model.tables(), weights_by_definition(model)
    parts = states[0].split([t.shape[1] for t in tables])
    direct = sum(
        weights[:, e] * (t @ u) for e, (u, t) in enumerate(zip(parts, tables, strict=True))
    )
    torch.testing.assert_close(folded[1:], direct[1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("kind", ["ce", "bce"])
@pytest.mark.parametrize("form", ITEM_FORMS)
def test_gradients_of_the_gate_are_finite_differences(form, kind, backend):
    model = make_model(form, backend=backend)
    packed = pack_ragged(Ragged.from_lists([[1, 2, 4], [6, 7]]), L)
    targets = torch.tensor([2, 4, 6, 7, 8])
    negatives = torch.tensor([[9, 1], [11, 14], [12, 9], [13, 13], [14, 2]])
    hidden = torch.zeros(N + 1, dtype=torch.bool)
    hidden[[7, 9]] = True

    def loss() -> torch.Tensor:
        return model.loss(
            packed, targets, negatives=negatives if kind == "bce" else None, hidden=hidden
        )

    (gradient,) = torch.autograd.grad(loss(), [model.gate.logit])
    assert gradient.abs().max() > 1e-4
    with torch.no_grad():
        flat = model.gate.logit.view(-1)
        for place in range(flat.numel()):
            before = flat[place].clone()
            values = []
            for step in (1e-5, -1e-5):
                flat[place] = before + step
                values.append(float(loss()))
            flat[place] = before
            numeric = (values[0] - values[1]) / 2e-5
            assert abs(numeric - float(gradient.view(-1)[place])) < 1e-8


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize("form", ITEM_FORMS)
def test_loss_of_a_plan_equals_that_of_the_whole_catalogue(form, hide):
    model = make_model(form)
    rng = np.random.default_rng(0)
    train = Ragged.from_lists([rng.integers(1, N + 1, size=n) for n in (2, 5, 1, 9, 3, 0, 4)])
    source = PlanSource(train, num_items=N, max_len=L, item_bins=make_bins().numpy())
    plan = BatchPlanner(source, negatives=3, seed=1).plan(np.array([1, 3, 6]), 0)
    hidden = None
    if hide:
        hidden = torch.zeros(N + 1, dtype=torch.bool)
        hidden[plan.unique[::2]] = True
    losses = [
        model.loss(plan.inputs, plan.targets, negatives=plan.negatives, hidden=hidden),
        model.plan_loss(plan, hidden=hidden),
    ]
    assert abs(float((losses[0] - losses[1]).detach())) < 1e-12
    left, right = (torch.autograd.grad(loss, [model.gate.logit])[0] for loss in losses)
    assert left.abs().max() > 1e-4
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


def test_knots_without_a_bin_of_unseen_items_reach_down_to_zero():
    counts, bins = make_counts(), torch.ones(N + 1, dtype=torch.int64)
    bins[0] = 0
    mix = knot_mix(counts, bins, 3).double()
    assert mix.shape == (N + 1, 4)
    torch.testing.assert_close(mix.sum(1), torch.ones(N + 1, dtype=torch.float64))
    values = torch.tensor([9.0, -1.0, 2.0, 0.5], dtype=torch.float64)
    places = np.log1p(counts[1:].numpy())
    knots = np.linspace(0, places.max(), 3)
    want = np.interp(places, knots, values[1:].numpy())
    np.testing.assert_allclose((mix @ values)[1:].numpy(), want, rtol=1e-6, atol=1e-6)
    assert float(mix[0] @ values) == 9.0


def test_knots_of_items_that_are_all_alike():
    bins = torch.tensor([0, 1, 1, 2])
    mix = knot_mix(torch.tensor([0, 5, 5, 0]), bins, 2, unseen_bin=2)
    assert mix.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("form", ["scale", "sigmoid", "uniform", *ITEM_FORMS])
def test_a_fresh_gate_has_equal_weights(form):
    gate = make_model(form).gate
    start = build_gate(
        form, make_bins(), 3, num_bins=UNSEEN, unseen_bin=UNSEEN, train_frequency=make_counts()
    )
    weights = start(make_bins())
    torch.testing.assert_close(weights, torch.full((N + 1, 3), 1 / 3))
    with torch.no_grad():
        gate.logit.copy_(gate.fresh())
    torch.testing.assert_close(gate(make_bins()).float(), weights)
    assert gate.logit.requires_grad == (form != "uniform")


def test_spread_is_the_mean_square_of_what_items_add():
    gate = make_model("per_item").gate
    own = gate.logit.detach()[UNSEEN + 2 :]
    want = sum(float(x) ** 2 for x in own.flatten()) / N
    assert float(gate.spread().detach()) == pytest.approx(want, rel=1e-12)
    gate.spread().backward()
    assert gate.logit.grad[: UNSEEN + 2].abs().max() == 0  # bins and padding


def test_weights_per_bin_are_means_of_their_items():
    model = make_model("continuous")
    bins = make_bins()
    table = model.gate.per_bin(bins, UNSEEN + 1)
    assert table.shape == (UNSEEN + 2, 3)
    weights = weights_by_definition(model)
    torch.testing.assert_close(table[2], weights[bins == 2].mean(0), rtol=1e-6, atol=0)
    assert table[UNSEEN + 1].abs().max() == 0  # empty
    plain = FrequencyGate(3)
    assert torch.equal(plain.per_bin(torch.tensor([0, 1]), 3), plain.weights())


# -- fits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ITEM_FORMS)
def test_a_fit_prefers_the_expert_that_predicts(form):
    """One expert knows the ring, the others are noise: the gate must find it."""
    phases = ring.make_phases(
        [GATE + f"form={form}", GATE + "steps=60", GATE + "lr=0.2", GATE + "pull=1"]
    )
    model = phases.build("pad").eval()
    data = held_out(model, phases.valid)
    rng = torch.Generator().manual_seed(0)
    for e in (0, 1):
        data.tables[e].copy_(torch.randn(data.tables[e].shape, generator=rng))
    before = model.gate.logit.detach().clone()
    logit = fit_gate(model, data, phases.config.disentangle.gate, seed=1)
    assert torch.equal(model.gate.logit, before)
    assert torch.equal(logit, fit_gate(model, data, phases.config.disentangle.gate, seed=1))
    set_gate(model, logit)
    widths = [table.shape[1] for table in data.tables]
    spread = torch.stack(
        [(u @ t.T).std() for u, t in zip(data.states.split(widths, 1), data.tables, strict=True)]
    )
    seen = torch.from_numpy(phases.candidates())
    say = (model.gate(model.item_bins)[seen] * spread).mean(0)
    assert say[2] > 2 * say[0]
    assert say[2] > 2 * say[1]


def test_pull_keeps_items_at_their_bins():
    spreads = []
    for pull in (0.0, 1.0, 1000.0):
        phases = ring.make_phases(
            [GATE + "form=per_item", GATE + f"pull={pull}", GATE + "steps=40", GATE + "lr=0.05"]
        )
        model = phases.build("pad").eval()
        phases.fit_gate(model)
        spreads.append(float(model.gate.spread().detach()))
    assert spreads[0] > spreads[1] > spreads[2]
    assert spreads[2] < 0.01 * spreads[0]


@pytest.mark.parametrize("form", ITEM_FORMS)
@pytest.mark.parametrize("tolerance", [0.001, 0.5])
def test_unseen_items_are_raised_as_far_as_the_tolerance_goes(form, tolerance):
    dataset, text = ring.make_dataset(users=60, items=150)
    overrides = [
        *ring.SMALL, GATE + f"form={form}", GATE + "steps=1", GATE + "lr=1e-9",
        GATE + f"cold_tolerance={tolerance}",
    ]  # fmt: skip
    config = RunConfig.preset("clean").with_overrides(overrides)
    split = ring.make_split(dataset, config.split)
    bins = ring.frequency_bins(split.train_frequency, config.num_bins, unseen=config.unseen)
    phases = ring.Phases.of(split, bins, ring.transform_text(text, config), config)
    model = phases.build("pad").eval()
    set_gate(model, torch.randn_like(model.gate.logit) - 1)
    row = model.gate.unseen_row(bins.unseen_bin)
    before = model.gate.logit.detach().clone()
    after = fit_gate(model, held_out(model, phases.valid), config.disentangle.gate, seed=1)
    want = ring.largest_within(phases, model, before, row, UNSEEN_FACTORS, tolerance)
    raised = (after - before).exp()
    torch.testing.assert_close(raised[row], torch.full((3,), want), rtol=1e-4, atol=0)
    rest = torch.arange(len(before)) != row
    torch.testing.assert_close(after[rest], before[rest], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["scale", *ITEM_FORMS])
def test_a_fit_that_hides_every_item_learns_the_unseen_row_alone(form):
    phases = ring.make_phases(
        [GATE + f"form={form}", GATE + "fit_hide=1", GATE + "hide_max_frequency=1000",
         GATE + "cold_tolerance=0", GATE + "rare_tolerance=0"]
    )  # fmt: skip
    model = phases.build("pad").eval()
    before = model.gate.logit.detach().clone()
    data = phases._held_out(model)
    seen = torch.from_numpy(phases.train_frequency > 0)
    assert torch.equal(data.rare, seen)
    assert data.cold[0].abs().max() == 0  # without an ID the ID expert has nothing
    phases.fit_gate(model)
    row = model.gate.unseen_row(phases.bins.unseen_bin)
    moved = (model.gate.logit.detach() - before).abs().sum(1)
    assert moved[row] > 0.01
    assert moved[torch.arange(len(before)) != row].max() == 0


def test_a_fit_hides_rare_items_alone_and_by_step():
    from padkern.pad.gate import _hidden

    phases = ring.make_phases([GATE + "fit_hide=0.5", GATE + "hide_max_frequency=5"])
    config = phases.config.disentangle.gate
    data = phases._held_out(phases.build("pad"))
    frequency = phases.train_frequency
    rare = (frequency > 0) & (frequency <= 5)
    assert 0 < rare.sum() < (frequency > 0).sum()
    draws = [_hidden(data, config, 1, step).numpy() for step in range(40)]
    assert not np.logical_or.reduce(draws)[~rare].any()
    assert np.logical_or.reduce(draws)[rare].all()
    assert abs(np.mean([d[rare].mean() for d in draws]) - 0.5) < 0.1
    assert np.array_equal(draws[3], _hidden(data, config, 1, 3).numpy())
    assert not np.array_equal(draws[3], draws[4])
    assert not np.array_equal(draws[3], _hidden(data, config, 2, 3).numpy())
    plain = ring.make_phases()
    assert _hidden(plain._held_out(phases.build("pad")), config, 1, 0) is None


# -- through the configuration ---------------------------------------------------------------------


def start_of_phase_three(overrides=(), **kw):
    phases = ring.make_phases(
        ["pretrain.epochs=0", "align.epochs=0", "language.epochs=0", "disentangle.epochs=1",
         "disentangle.restore_best=false", *overrides],
        **kw,
    )  # fmt: skip
    pretrained, _ = phases.pretrain()
    aligned, _ = phases.align(pretrained)
    language, _ = phases.language()
    return phases, (pretrained, aligned, language)


WAYS = [
    *([f"form={form}", f"learning={way}"] for form in ITEM_FORMS for way in ("heldout", "joint")),
    *([f"form={form}", "learning=heldout", "fit_hide=0.5"] for form in ("scale", *ITEM_FORMS)),
    *([f"form={form}", "learning=joint", "hide=0.7"] for form in ITEM_FORMS),
    ["form=sigmoid", "learning=heldout"],
    ["form=continuous", "learning=joint", "knots=2"],
]


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_every_gate_trains_a_phase(way, loss):
    overrides = [f"loss.kind={loss}", *(GATE + word for word in way)]
    phases, parts = start_of_phase_three(overrides)
    model, result = phases.disentangle(*parts)
    assert len(result.history) == 1
    assert math.isfinite(result.history[0]["loss"])
    start = phases.build("pad").gate.logit
    assert not torch.equal(model.gate.logit, start)
    assert torch.isfinite(model.gate.logit).all()
    assert len(phases.validation("pad", model).ranks) == len(phases.valid)


@pytest.mark.parametrize("form", ITEM_FORMS)
def test_parity_trains_with_gates_per_item(form):
    phases, parts = start_of_phase_three([GATE + f"form={form}"], preset="parity")
    model, result = phases.disentangle(*parts)
    assert phases.bins.unseen_bin is None
    assert math.isfinite(result.history[0]["loss"])
    assert not torch.equal(model.gate.logit, phases.build("pad").gate.logit)


def test_joint_learning_pays_for_logits_of_single_items():
    found = {}
    for pull in (0.0, 1e4):
        phases, parts = start_of_phase_three(
            [GATE + "form=per_item", GATE + "learning=joint", GATE + f"pull={pull}"]
        )
        model, _ = phases.disentangle(*parts)
        found[pull] = float(model.gate.spread().detach())
    assert 0 < found[1e4] < 0.5 * found[0.0]


def test_a_uniform_gate_is_the_same_by_form_and_by_learning():
    models = []
    for word in ("form=uniform", "learning=uniform"):
        phases, parts = start_of_phase_three([GATE + word])
        model, _ = phases.disentangle(*parts)
        models.append((phases, model))
    (phases, by_form), (other, by_learning) = models
    pairs = zip(by_form.parameters(), by_learning.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    torch.testing.assert_close(by_form.gate.weights(), torch.full((5, 3), 1 / 3))
    ranks = [p.validation("pad", m).ranks for p, m in models]
    assert np.array_equal(*ranks)
    # Not cross-fitted: there is no fit.
    assert np.array_equal(ranks[0], phases._evaluate(by_form).ranks)
    logit = fit_gate(
        by_form, held_out(by_form, phases.valid), other.config.disentangle.gate, seed=1
    )
    assert torch.equal(logit, by_form.gate.logit)


@pytest.mark.parametrize("way", [["form=continuous", "fit_hide=0.5"], ["form=per_item"]])
def test_whole_runs_open_and_show_their_gate(tmp_path, way):
    metrics = ring.run(tmp_path / "run", [GATE + word for word in way])
    with RunFolder(tmp_path / "run", create=False) as folder:
        loaded = load_run(folder)
        facts = json.loads((tmp_path / "run" / "gate.json").read_text())
    assert isinstance(loaded.model.gate, ItemGate)
    for part in ("valid", "test"):
        again = loaded.evaluate(part, "pad").metrics()["all"]
        stored = metrics["models"]["pad"][part]["all"]
        assert again == {k: v for k, v in stored.items() if k != "counters"}
    best = loaded.recommend([3, 4, 5], k=5)
    assert all(abs(sum(r["shares"].values()) - 1) < 1e-5 for r in best)
    assert facts["form"] == way[0].removeprefix("form=")
    assert len(facts["weights"]) == len(facts["labels"]) == loaded.bins.num_bins
    counts = facts["items_per_bin"]
    for weights, items in zip(facts["weights"], counts, strict=True):
        assert (min(weights) > 0) == (items > 0)


def test_resume_gives_the_same_bits(tmp_path):
    chosen = [GATE + "form=per_item", GATE + "learning=joint"]
    whole = ring.run(tmp_path / "whole", chosen)
    with pytest.raises(ring.Stop):
        ring.run(tmp_path / "cut", chosen, reporter=ring.StopAfter("pad", 1))
    assert ring.run(tmp_path / "cut", chosen, resume=True)["models"] == whole["models"]


@pytest.mark.parametrize("form", ITEM_FORMS)
def test_a_step_leaves_nothing_on_another_device(form):
    """The meta device stands for an accelerator: a tensor left on the CPU makes an op fail."""
    phases = ring.make_phases([GATE + f"form={form}"])
    model = phases.build("pad").to("meta")
    phases.device = "meta"
    hidden = phases._hidden(0)
    folded = model.fold(model.tables(hidden), hidden)
    assert folded.device.type == "meta"
    assert len(folded) == len(phases.train_frequency)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"form": "table"}, "gate_form must be one of scale, sigmoid, uniform, continuous, "
                            "per_item, got 'table'"),
        ({"form": "continuous", "train_frequency": None}, "'continuous' needs train_frequency"),
        ({"form": "continuous", "knots": 1}, "knots must be at least 2, got 1"),
        ({"form": "continuous", "train_frequency": torch.ones(3)},
         "train_frequency must have shape [31], got [3]"),
        ({"form": "continuous", "train_frequency": -torch.ones(31)},
         "train_frequency must be >= 0, got -1"),
    ],
)  # fmt: skip
def test_broken_gates_are_named(call, message):
    options = {"num_bins": UNSEEN, "train_frequency": make_counts()} | call
    form = options.pop("form")
    with pytest.raises(ValueError, match=re.escape(message)):
        build_gate(form, make_bins(), 3, **options)
    with pytest.raises(ValueError, match="form must be one of"):
        ItemGate(torch.ones(3, 2), form="scale")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([GATE + "form=table"], "--set: disentangle.gate.form: "),
        ([GATE + "knots=1"], "--set: disentangle.gate.knots: "),
        ([GATE + "pull=-1"], "--set: disentangle.gate.pull: "),
        ([GATE + "fit_hide=2"], "--set: disentangle.gate.fit_hide: "),
        ([GATE + "fit_hide=0.5", GATE + "learning=joint"],
         "--set: disentangle.gate: fit_hide hides items in a held-out fit, which joint learning "
         "has not"),
        ([GATE + "fit_hide=0.5", GATE + "form=uniform"], "which uniform learning has not"),
        ([GATE + "fit_hide=0.5", "unseen=last"],
         "disentangle.gate.fit_hide needs unseen to be own, got last"),
    ],
)  # fmt: skip
def test_broken_choices_are_one_clear_error(overrides, message):
    with pytest.raises(UsageError) as error:
        RunConfig.preset("clean").with_overrides(overrides)
    assert message in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("unseen_bin", [UNSEEN, None])
@pytest.mark.parametrize("form", ["scale", "sigmoid", "uniform", "continuous", "per_item"])
@torch.no_grad()
def test_items_added_later_read_the_unseen_row(form, unseen_bin):
    model = make_model(form, unseen_bin=unseen_bin)
    unseen = int(torch.nonzero(make_bins() == UNSEEN)[0])
    text = torch.stack([model.text[unseen], torch.randn(E)])
    grown = add_items(model, text)
    matrix = grown.item_matrix()
    assert torch.equal(matrix[: N + 1], model.item_matrix())
    if unseen_bin is not None:
        assert torch.equal(matrix[N + 1], matrix[unseen])
    again = add_items(grown, text[:1])
    assert torch.equal(again.item_matrix()[: N + 3], matrix)
    assert again.gate.logit.requires_grad == model.gate.logit.requires_grad
    copied = add_items(add_items(model, text), text[:1])
    copied.load_state_dict(again.state_dict())
