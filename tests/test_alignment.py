"""Alignment losses against naive loops, and every choice of them through the configuration."""

from __future__ import annotations

import functools
import math
import re

import numpy as np
import pytest
import small_ring as ring
import torch
import yaml

from padkern import mkmmd_loss
from padkern.errors import UsageError
from padkern.models.build import build_expert
from padkern.models.expert import ItemTower
from padkern.pad.alignment import (
    alignment_loss,
    coral_loss,
    cosine_loss,
    infonce_loss,
    mse_loss,
)
from padkern.pad.config import AlignConfig, RunConfig
from padkern.pad.folder import RunFolder
from padkern.pad.phases import Phases
from padkern.pad.stored import load_run

LOSSES = {
    "infonce": infonce_loss,
    "coral": coral_loss,
    "cosine": cosine_loss,
    "mse": mse_loss,
}
KERNELS = ["gaussian", "laplacian", "inverse_multiquadric", "rational_quadratic", "energy"]
SHAPES = [(2, 1), (3, 5), (7, 3), (33, 8)]


def rows(n: int, d: int, seed: int = 0, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    text = torch.randn(n, d, generator=rng, dtype=torch.float64)
    ids = 0.5 * torch.randn(n, d, generator=rng, dtype=torch.float64) + 0.3
    return text.to(dtype), ids.to(dtype)


# -- by loops --------------------------------------------------------------------------------------


def cosine(x: list[float], y: list[float]) -> float:
    lengths = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / lengths if lengths else 0.0


def infonce_by_loops(text, ids, temperature=0.07) -> float:
    total = 0.0
    for i in range(len(text)):
        there = [math.exp(cosine(text[i], ids[j]) / temperature) for j in range(len(ids))]
        back = [math.exp(cosine(text[j], ids[i]) / temperature) for j in range(len(ids))]
        total -= math.log(there[i] / sum(there)) + math.log(back[i] / sum(back))
    return total / (2 * len(text))


def covariance_by_loops(x) -> list[list[float]]:
    n, d = len(x), len(x[0])
    mean = [sum(row[a] for row in x) / n for a in range(d)]
    return [
        [sum((r[a] - mean[a]) * (r[b] - mean[b]) for r in x) / (n - 1) for b in range(d)]
        for a in range(d)
    ]


def coral_by_loops(text, ids) -> float:
    left, right = covariance_by_loops(text), covariance_by_loops(ids)
    d = len(left)
    gap = sum((left[a][b] - right[a][b]) ** 2 for a in range(d) for b in range(d))
    return gap / (4 * d * d)


def cosine_by_loops(text, ids) -> float:
    return sum(1 - cosine(x, y) for x, y in zip(text, ids, strict=True)) / len(text)


def mse_by_loops(text, ids) -> float:
    pairs = zip(text, ids, strict=True)
    return sum((a - b) ** 2 for x, y in pairs for a, b in zip(x, y, strict=True)) / len(text)


BY_LOOPS = {
    "infonce": infonce_by_loops,
    "coral": coral_by_loops,
    "cosine": cosine_by_loops,
    "mse": mse_by_loops,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula(name, shape):
    text, ids = rows(*shape)
    want = BY_LOOPS[name](text.tolist(), ids.tolist())
    assert float(LOSSES[name](text, ids)) == pytest.approx(want, rel=1e-12, abs=1e-14)
    single = LOSSES[name](text.float(), ids.float())
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(want, rel=1e-5, abs=1e-6)
    for dtype in (torch.float16, torch.bfloat16):  # read as they are, computed in float32
        text_half, ids_half = text.to(dtype), ids.to(dtype)
        got = LOSSES[name](text_half, ids_half)
        assert got.dtype == torch.float32
        exact = LOSSES[name](text_half.double(), ids_half.double())
        assert float(got) == pytest.approx(float(exact), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 3.0])
def test_infonce_temperature(temperature):
    text, ids = rows(9, 4)
    want = infonce_by_loops(text.tolist(), ids.tolist(), temperature)
    assert float(infonce_loss(text, ids, temperature=temperature)) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("shape", [(2, 1), (5, 3), (6, 8)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_differences(name, shape):
    text, ids = (x.requires_grad_() for x in rows(*shape, seed=1))
    loss = LOSSES[name]
    if name == "infonce":
        loss = functools.partial(loss, temperature=0.5)
    assert torch.autograd.gradcheck(loss, (text, ids), eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_order_a_stride_and_autocast_change_nothing(name):
    text, ids = rows(12, 5, dtype=torch.float32)
    want = LOSSES[name](text, ids)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(LOSSES[name](text[order], ids[order]), want, rtol=1e-5, atol=1e-7)
    wide = torch.zeros(12, 10)
    wide[:, ::2] = text
    assert torch.equal(LOSSES[name](wide[:, ::2], ids), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LOSSES[name](text, ids), want)


def test_what_a_loss_does_not_see():
    text, ids = rows(12, 5)
    scale = torch.linspace(0.1, 1e9, 12, dtype=torch.float64)[:, None]
    for name in ("infonce", "cosine"):  # lengths
        torch.testing.assert_close(LOSSES[name](text * scale, ids), LOSSES[name](text, ids))
    torch.testing.assert_close(coral_loss(text + 7, ids), coral_loss(text, ids))  # means
    assert float(coral_loss(text.flip(0), text)) < 1e-28  # who is who
    assert float(infonce_loss(text.flip(0), text)) > float(infonce_loss(text, text))


def test_cosine_is_half_the_distance_of_unit_rows():
    text, ids = rows(12, 5)
    units = [x / x.norm(dim=1, keepdim=True) for x in (text, ids)]
    torch.testing.assert_close(cosine_loss(text, ids), mse_loss(*units) / 2)


def test_a_single_row():
    text, ids = (x.requires_grad_() for x in rows(1, 4))
    loss = infonce_loss(text, ids)
    loss.backward()
    assert float(loss.detach()) == 0
    assert text.grad.abs().max() == ids.grad.abs().max() == 0
    want = mse_by_loops(text.tolist(), ids.tolist())
    assert float(mse_loss(text, ids).detach()) == pytest.approx(want)
    with pytest.raises(ValueError, match="text_rows must have at least 2 rows, got 1"):
        coral_loss(text, ids)


@pytest.mark.parametrize("name", ["infonce", "cosine"])
def test_zero_tiny_and_huge_rows(name):
    text, ids = rows(6, 3)
    text[2] = 0.0
    factors = torch.tensor([1e-200, 1, 1, 1e200, 1, 1], dtype=torch.float64)
    scaled = text * factors[:, None]
    scaled.requires_grad_()
    loss = LOSSES[name](scaled, ids)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(BY_LOOPS[name](text.tolist(), ids.tolist()))
    assert scaled.grad[2].abs().max() == 0
    assert torch.isfinite(scaled.grad).all()
    assert (scaled.grad[[0, 1, 3]].abs().sum(1) > 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_nan_and_inf_never_look_good(name, value):
    text, ids = rows(6, 3)
    text[4, 1] = value
    assert not math.isfinite(float(LOSSES[name](text, ids)))


@pytest.mark.parametrize("name", LOSSES)
def test_threads_change_no_bit(name):
    text, ids = rows(700, 64, dtype=torch.float32)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            inputs = [x.clone().requires_grad_() for x in (text, ids)]
            loss = LOSSES[name](*inputs)
            found.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("text", "ids", "error", "message"),
    [
        ([[1.0]], X, TypeError, "text_rows must be a Tensor, got list"),
        (X, X.long(), TypeError, "id_rows must be float64"),
        (X[0], X, ValueError, "text_rows must have shape [rows, D], got [3]"),
        (X[:0], X[:0], ValueError, "text_rows must not be empty, got shape [0, 3]"),
        (X, X[:, :2], ValueError, "id_rows must have shape [4, 3] like text_rows, got [4, 2]"),
        (X, X[:3], ValueError, "id_rows must have shape [4, 3] like text_rows, got [3, 3]"),
        (X, X.to("meta"), ValueError, "id_rows must be on cpu, got meta"),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_wrong_rows_are_named(name, text, ids, error, message):
    with pytest.raises(error, match=re.escape(message)):
        LOSSES[name](text, ids)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_wrong_temperatures_are_named(temperature):
    with pytest.raises(ValueError, match="temperature must be positive and finite, got"):
        infonce_loss(*rows(3, 2), temperature=temperature)


# -- through the configuration ---------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ["unbiased", "tllib"])
def test_mkmmd_takes_kernel_estimator_and_bandwidths(kernel, estimator):
    text, ids = rows(9, 4, dtype=torch.float32)
    options = {"kernel": kernel, "estimator": estimator}
    got = alignment_loss(text, ids, AlignConfig(**options))
    assert torch.equal(got, mkmmd_loss(text, ids, **options))
    if kernel != "energy":
        config = AlignConfig(alphas=(0.3, 2.0), **options)
        want = mkmmd_loss(text, ids, alphas=(0.3, 2.0), **options)
        assert torch.equal(alignment_loss(text, ids, config), want)
        assert not torch.equal(want, got)


@pytest.mark.parametrize("name", LOSSES)
def test_the_configuration_names_the_loss(name):
    text, ids = rows(9, 4)
    options = {"temperature": 0.3} if name == "infonce" else {}
    got = alignment_loss(text, ids, AlignConfig(loss=name, **options))
    assert torch.equal(got, LOSSES[name](text, ids, **options))
    with pytest.raises(ValueError, match="loss must name an alignment loss, got 'none'"):
        alignment_loss(text, ids, AlignConfig(loss="none"))


SHORT = ("pretrain.epochs=1", "align.epochs=1", "align.restore_best=false")


@functools.cache
def aligned(*overrides: str, preset: str = "clean"):
    """The aligned model after one epoch, and its records."""
    phases = ring.make_phases([*SHORT, *overrides], preset=preset)
    pretrained, _ = phases.pretrain()
    model, result = phases.align(pretrained)
    return model, result


def same_weights(left, right) -> bool:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "choice",
    [*(f"align.loss={name}" for name in LOSSES), *(f"align.kernel={name}" for name in KERNELS[1:])],
)
def test_every_choice_trains_a_phase_of_its_own(choice):
    model, result = aligned(choice)
    assert len(result.history) == 1
    assert math.isfinite(result.history[0]["loss"])
    for other in ((), ("align.loss=none",)):
        assert not same_weights(model, aligned(*other)[0])


def test_none_is_the_anchor_alone():
    model, result = aligned("align.loss=none")
    unweighted, records = aligned("align.gamma=0")
    assert same_weights(model, unweighted)
    assert [r["loss"] for r in result.history] == [r["loss"] for r in records.history]


def test_defaults_are_the_mkmmd_of_before():
    model, _ = aligned()
    named, _ = aligned("align.loss=mkmmd", "align.kernel=gaussian")
    assert same_weights(model, named)


@pytest.mark.parametrize("name", ["mkmmd", "coral", "cosine", "mse"])
def test_parity_rows_train_with_every_loss_that_takes_them(name):
    _, result = aligned(f"align.loss={name}", preset="parity")
    assert math.isfinite(result.history[0]["loss"])


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_pulls_text_towards_collaborative_vectors(name):
    # CORAL is divided by 4 d^2 and of fourth order in the vectors, whose norm is about 1/2.
    weight = 1e4 if name == "coral" else 5.0
    distance = {}
    for gamma in (0.0, weight):
        phases = ring.make_phases(
            [f"align.loss={name}", f"align.gamma={gamma}", "align.epochs=8", "align.lr=0.01",
             "align.restore_best=false"]
        )  # fmt: skip
        pretrained, _ = phases.pretrain()
        model, _ = phases.align(pretrained)
        warm = torch.from_numpy(phases.candidates())
        words = model.experts["aligned"].tower.projected_text(model.text)[warm]
        distance[gamma] = float(LOSSES[name](words, pretrained.tables()[0][warm]).detach())
    assert distance[weight] < 0.9 * distance[0.0]


@pytest.mark.parametrize(("start", "moves"), [("copy", True), ("encoder", False), ("fresh", False)])
def test_copied_ids_move_with_the_text_and_fixed_ones_do_not(monkeypatch, start, moves):
    """With ``copy`` the loss reaches the expert's own IDs, else phase 1's, which stay."""
    seen = []

    def spy(words, vectors, config):
        seen.append((words.requires_grad, vectors.requires_grad, vectors.shape == words.shape))
        return alignment_loss(words, vectors, config)

    monkeypatch.setattr("padkern.pad.phases.alignment_loss", spy)
    phases = ring.make_phases([*SHORT, f"align.start={start}", "align.loss=mse"])
    pretrained, _ = phases.pretrain()
    before = pretrained.tables()[0].detach().clone()
    phases.align(pretrained)
    assert set(seen) == {(True, moves, True)}
    assert torch.equal(pretrained.tables()[0], before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["align.loss=kl"], "--set: align.loss: "),
        (["align.kernel=linear"], "--set: align.kernel: "),
        (["align.temperature=0"], "--set: align.temperature: "),
        (["align.anchor=-1"], "--set: align.anchor: "),
        (["align.anchor=0", "align.gamma=0"], "anchor 0 without an alignment loss leaves nothing"),
        (["align.kernel=energy", "align.alphas=[1.0]"],
         "--set: align: kernel energy has no bandwidth and takes no alphas"),
        (["align.loss=infonce", "align.mmd_rows=all_slots"],
         "--set: align: loss infonce takes each item once: mmd_rows must be unique_items, "
         "got all_slots"),
        (["model.fuse=concat"], "--set: model.fuse: "),
        (["model.fuse=null_space", "model.null_dim=64"],
         "--set: model: null_dim must be below dim (64), got 64"),
        (["model.fuse=null_space", "model.text_layers=2", "align.loss=none"],
         "--set: model: fuse null_space takes no text_layers, got 2"),
        (["model.fuse=null_space"], "align.loss must be none, got mkmmd"),
        (["model.fuse=null_space", "align.loss=none", "text.pca=null"],
         "needs text.pca of at least dim - null_dim (32), got None"),
        (["model.fuse=null_space", "align.loss=none", "text.pca=31"],
         "needs text.pca of at least dim - null_dim (32), got 31"),
        (["model.fuse=null_space", "align.loss=none", "align.start=copy"],
         "align.start must be encoder or fresh, got copy"),
    ],
)  # fmt: skip
def test_broken_choices_are_one_clear_error(overrides, message):
    with pytest.raises(UsageError) as error:
        RunConfig.preset("clean").with_overrides(overrides)
    assert message in str(error.value)
    assert len(str(error.value)) < 250


LATER = (
    ("model", "null_dim"),
    ("align", "loss"),
    ("align", "kernel"),
    ("align", "temperature"),
    ("align", "anchor"),
    ("disentangle", "experts"),
    ("disentangle", "gate", "knots"),
    ("disentangle", "gate", "pull"),
    ("disentangle", "gate", "fit_hide"),
)


@pytest.mark.parametrize("preset", ["clean", "parity"])
def test_configurations_stored_before_these_choices_open(preset):
    config = RunConfig.preset(preset)
    values = yaml.safe_load(config.to_yaml())
    for *parents, leaf in LATER:
        place = values
        for key in parents:
            place = place[key]
        del place[leaf]
    assert RunConfig.from_yaml(yaml.safe_dump(values)) == config
    assert (config.align.loss, config.align.kernel) == ("mkmmd", "gaussian")
    assert config.disentangle.gate.fit_hide == 0


# -- null space, start from text -------------------------------------------------------------------

NULL_SPACE = ["model.fuse=null_space", "model.null_dim=3", "align.loss=none"]


def test_null_space_keeps_the_text_and_adds_ids_beside_it():
    text = torch.randn(7, 6)
    tower = ItemTower("fused", 6, 6, 8, fuse="null_space", null_dim=3)
    assert [name for name, _ in tower.named_parameters()] == ["id"]
    assert tower.id.shape == (7, 3)
    with torch.no_grad():
        tower.id.normal_()
    scale = torch.tensor([0.0, 1, 1, 0, 1, 1, 1])
    vectors = tower(text, scale)
    assert torch.equal(vectors[:, :5], text[:, :5])
    assert torch.equal(vectors[:, 5:], tower.id * scale[:, None])
    some = torch.tensor([2, 3])
    assert torch.equal(tower(text[some], scale, some), vectors[some])


@pytest.mark.parametrize(("null_dim", "width"), [(0, 6), (8, 6), (1, 6), (2, 5)])
def test_a_null_space_that_does_not_fit_is_named(null_dim, width):
    with pytest.raises(ValueError, match=f"null_dim must be from 1 to 7 .*got {null_dim}"):
        ItemTower("fused", 6, width, 8, fuse="null_space", null_dim=null_dim)


def test_text_narrower_than_the_null_space_needs_stops_before_training():
    phases = ring.make_phases(NULL_SPACE)
    config = phases.config.with_overrides(["text.pca=5"])
    with pytest.raises(UsageError, match=r"at least dim - null_dim \(5\) columns, got 4"):
        Phases(
            phases.train, phases.valid, phases.train_frequency, phases.bins,
            phases.text[:, :4], config,
        )  # fmt: skip


@pytest.mark.parametrize("overrides", [NULL_SPACE, ["model.id_init=text"]], ids=["null", "text"])
def test_whole_runs_train_and_open(tmp_path, overrides):
    metrics = ring.run(tmp_path / "run", overrides)
    with RunFolder(tmp_path / "run", create=False) as folder:
        loaded = load_run(folder)
    for row in ("aligned", "pad"):
        again = loaded.evaluate("test", row).metrics()["all"]
        stored = metrics["models"][row]["test"]["all"]
        assert again == {k: v for k, v in stored.items() if k != "counters"}
    if overrides is NULL_SPACE:
        tower = loaded.model.experts["aligned"].tower
        text, ids = loaded.model.text, tower.id
        assert ids.abs().max() > 0
        assert torch.equal(tower(text)[:, :5], text[:, :5])


@pytest.mark.parametrize("width", [12, 5])
def test_ids_start_as_the_text(width):
    rng = torch.Generator().manual_seed(0)
    text = torch.randn(31, width, generator=rng)
    text[0] = text[9] = 0
    torch.manual_seed(1)
    ids = build_expert("id", 30, text, dim=8, max_len=4, id_init="text").tower.id.detach()
    torch.manual_seed(1)
    plain = build_expert("id", 30, text, dim=8, max_len=4).tower.id.detach()
    part = min(width, 8)
    told = torch.tensor([i for i in range(1, 31) if i != 9])
    cosines = torch.nn.functional.cosine_similarity(ids[told, :part], text[told, :part])
    torch.testing.assert_close(cosines, torch.ones(29))
    lengths = ids[told, :part].norm(dim=1)
    assert float(lengths.mean()) == pytest.approx(0.5 * math.sqrt(part / 8), rel=1e-5)
    assert torch.equal(ids[:, part:], plain[:, part:])
    assert torch.equal(ids[9], plain[9])  # no text: random, or all such items were one
    assert ids[0].abs().max() == 0
    no_text = build_expert("id", 30, torch.zeros(31, width), dim=8, max_len=4, id_init="text")
    assert np.isfinite(no_text.tower.id.detach().numpy()).all()
