"""Per-class, block and random-feature MK-MMD against the reference and their own laws."""

from __future__ import annotations

import math

import pytest
import torch

from padkern import mkmmd_block, mkmmd_fourier, mkmmd_loss, mkmmd_per_class
from padkern.ops.mkmmd.reference import (
    KERNELS,
    kernel_profile,
    mean_sq_distance,
    mkmmd_loss_ref,
)
from padkern.ops.mkmmd_batched import class_pairs
from padkern.ops.mkmmd_fourier import estimate
from padkern.ops.mkmmd_fourier.estimate import FOURIER_KERNELS, draw_frequencies
from padkern.ops.mkmmd_fourier.reference import fourier_loss_ref
from padkern.testing import make_mkmmd_inputs, relative_error

ESTIMATORS = ["unbiased", "biased"]


def _labelled(n, m, dim, classes, dtype=torch.float64):
    """Samples with labels from -1 on; class 2 has one source row, class 3 no target row."""
    source, target = make_mkmmd_inputs(n, m, dim, dtype)
    s_lab, t_lab = torch.randint(-1, classes, (n,)), torch.randint(-1, classes, (m,))
    s_lab[s_lab == 2] = 1
    s_lab[n // 2] = 2
    t_lab[t_lab == 3] = 0
    return source, target, s_lab, t_lab


def _loop(source, target, s_lab, t_lab, classes, estimator, pairs=False, pooled=True, **options):
    """Losses of every class, or pair of classes, by the reference; 0 where rows are missing."""
    weights = [options.pop(name, None) for name in ("source_weight", "target_weight")]
    x_w, y_w = (
        torch.ones(len(t), dtype=torch.float64) if w is None else w.double()
        for t, w in zip((source, target), weights, strict=True)
    )
    x_in, y_in = (s_lab >= 0) & (x_w > 0), (t_lab >= 0) & (y_w > 0)
    if pooled and "sigma_sq" not in options and options.get("kernel") != "energy":
        options["sigma_sq"] = mean_sq_distance(
            source[x_in], target[y_in], x_w[x_in], y_w[y_in]
        ).detach()
    need = 2 if estimator == "unbiased" else 1
    losses = []
    for a in range(classes):
        for b in range(classes) if pairs else [a]:
            x, y = x_in & (s_lab == a), y_in & (t_lab == b)
            if min(x.sum(), y.sum()) < need:
                losses.append((source.sum() + target.sum()) * 0)
                continue
            own = dict(options)
            sigma_sq = own.get("sigma_sq")
            if isinstance(sigma_sq, torch.Tensor) and sigma_sq.dim():
                own["sigma_sq"] = sigma_sq[a]
            losses.append(
                mkmmd_loss_ref(
                    source[x],
                    target[y],
                    estimator=estimator,
                    source_weight=x_w[x],
                    target_weight=y_w[y],
                    **own,
                )
            )
    return torch.stack(losses).reshape((classes, classes) if pairs else (classes,))


def _assert_same(got, want, factors, *leaves, loss=1e-12, gradient=1e-10):
    """Values and the gradients of the weighted sum by the leaves."""
    assert ((got.double() - want).abs() <= loss * want.abs().clamp(min=1)).all()
    actual = torch.autograd.grad((got * factors).sum(), leaves, retain_graph=True)
    exact = torch.autograd.grad((want * factors).sum(), leaves)
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == e.dtype
        assert relative_error(a, e) <= gradient


# ---- per class -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bandwidth", ["pooled", "per_class"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_per_class(estimator, bandwidth, backend, poisoned_empty):
    x, y, s_lab, t_lab = _labelled(60, 75, 7, 6)
    x.requires_grad_()
    y.requires_grad_()
    got = mkmmd_per_class(
        x, y, s_lab, t_lab, 6, estimator=estimator, bandwidth=bandwidth, backend=backend
    )
    want = _loop(x, y, s_lab, t_lab, 6, estimator, pooled=bandwidth == "pooled")
    assert got.present.tolist() == [True, True, estimator == "biased", False, True, True]
    assert got.losses[3] == 0
    _assert_same(got.losses, want, torch.linspace(-1, 2, 6), x, y)
    (dx,) = torch.autograd.grad(got.losses.sum(), x)
    assert (dx[(s_lab == -1) | (s_lab == 3)] == 0).all()
    assert (dx[s_lab == 0] != 0).any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_per_class_kernels(kernel, backend):
    x, y, s_lab, t_lab = _labelled(40, 50, 4, 4)
    got = mkmmd_per_class(x, y, s_lab, t_lab, 4, kernel=kernel, backend=backend)
    want = _loop(x, y, s_lab, t_lab, 4, "unbiased", kernel=kernel)
    torch.testing.assert_close(got.losses, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kind", ["float", "bool"])
def test_per_class_weights(kind, pairs, backend):
    x, y, s_lab, t_lab = _labelled(60, 75, 7, 5)
    weights = [torch.rand(len(rows)).double() + 0.1 for rows in (x, y)]
    for weight in weights:
        weight[::4] = 0
    if kind == "bool":
        weights = [weight > 0 for weight in weights]
    # A masked row may hold anything, and so may one of no class.
    x[::4] = float("nan")
    y[t_lab == -1] = float("inf")
    x.requires_grad_()
    y.requires_grad_()
    options = {"source_weight": weights[0], "target_weight": weights[1]}
    chosen = {"native": "auto"}.get(backend, backend) if pairs else backend
    got = mkmmd_per_class(x, y, s_lab, t_lab, 5, pairs=pairs, backend=chosen, **options)
    want = _loop(x, y, s_lab, t_lab, 5, "unbiased", pairs=pairs, **options)
    used_x, used_y = ~torch.isnan(x).any(1), ~torch.isinf(y).any(1)
    factors = torch.rand(want.shape).double()
    want = torch.where(want.isnan(), 0, want)  # a sum of NaN rows times 0 where a class is missing
    assert (got.losses - want).abs().max() < 1e-12
    dx, dy = torch.autograd.grad((got.losses * factors).sum(), (x, y))
    ex, ey = torch.autograd.grad((want * factors).sum(), (x, y))
    assert relative_error(dx[used_x], ex[used_x]) < 1e-10
    assert relative_error(dy[used_y], ey[used_y]) < 1e-10
    assert (dx[~used_x] == 0).all()
    assert (dy[~used_y] == 0).all()


def test_per_class_bandwidth_gradients(backend):
    x, y, s_lab, t_lab = _labelled(60, 75, 3, 6)
    for values in (torch.tensor(2.0), torch.linspace(1, 3, 6)):
        sigma = values.double().requires_grad_()
        got = mkmmd_per_class(x, y, s_lab, t_lab, 6, sigma_sq=sigma, backend=backend)
        want = _loop(x, y, s_lab, t_lab, 6, "unbiased", sigma_sq=sigma)
        _assert_same(got.losses, want, torch.linspace(-1, 2, 6), sigma)
        (gradient,) = torch.autograd.grad(got.losses.sum(), sigma)
        assert torch.isfinite(gradient).all()
        assert gradient.dim() == 0 or (gradient[2:4] == 0).all()


@pytest.mark.parametrize("pairs", [False, True])
def test_per_class_without_any_class(pairs):
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)
    got = mkmmd_per_class(x, y, torch.full((5,), -1), torch.zeros(4).long(), 3, pairs=pairs)
    assert not got.present.any()
    assert got.losses.shape == ((3, 3) if pairs else (3,))
    assert got.losses.dtype == torch.float32
    assert (got.losses == 0).all()
    (gradient,) = torch.autograd.grad(got.losses.sum(), x)
    assert (gradient == 0).all()


def test_per_class_in_half_precision(backend):
    x, y, s_lab, t_lab = _labelled(60, 75, 7, 4, torch.float16)
    x.requires_grad_()
    got = mkmmd_per_class(x, y, s_lab, t_lab, 4, backend=backend)
    assert got.losses.dtype == torch.float32
    want = _loop(x.double(), y.double(), s_lab, t_lab, 4, "unbiased")
    assert (got.losses - want).abs().max() < 5e-6
    (gradient,) = torch.autograd.grad(got.losses.sum(), x)
    (exact,) = torch.autograd.grad(want.sum(), x)
    assert gradient.dtype == torch.float16
    assert relative_error(gradient, exact) < 2e-3


def test_per_class_compiles(native_core):
    def step(x, y, s_lab, t_lab):
        losses, present = mkmmd_per_class(torch.tanh(x), y, s_lab, t_lab, 5)
        return losses.sum() / present.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, m in ((40, 50), (31, 77)):
        x, y, s_lab, t_lab = _labelled(n, m, 6, 5, torch.float32)
        x.requires_grad_()
        (expected,) = torch.autograd.grad(step(x, y, s_lab, t_lab), x)
        (got,) = torch.autograd.grad(compiled(x, y, s_lab, t_lab), x)
        torch.testing.assert_close(got, expected)


# ---- pairs of classes ----------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [5, 16, 1024])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_pairs_equal_a_loop(estimator, kernel, tile, monkeypatch):
    monkeypatch.setattr(class_pairs, "TILE_ROWS", (tile, tile))
    x, y, s_lab, t_lab = _labelled(60, 43, 6, 5)
    x.requires_grad_()
    y.requires_grad_()
    options = {"kernel": kernel, "estimator": estimator}
    got = mkmmd_per_class(x, y, s_lab, t_lab, 5, pairs=True, **options)
    want = _loop(x, y, s_lab, t_lab, 5, estimator, pairs=True, kernel=kernel)
    present = torch.ones(5, 5, dtype=torch.bool)
    present[2] = estimator == "biased"
    present[:, 3] = False
    assert torch.equal(got.present, present)
    _assert_same(got.losses, want, torch.randn(5, 5).double(), x, y, loss=1e-11, gradient=1e-9)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "energy"])
def test_pairs_bandwidth_gradient_and_alphas(kernel):
    x, y, s_lab, t_lab = _labelled(60, 43, 6, 5)
    sigma = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    for alphas in ([0.5, 2.0, 1.0], [0.3, 1.0], [2.0**k for k in range(-5, 5)]):
        options = {"kernel": kernel, "alphas": alphas}
        got = mkmmd_per_class(x, y, s_lab, t_lab, 5, pairs=True, sigma_sq=sigma, **options)
        options["sigma_sq"] = sigma.reshape(())
        want = _loop(x, y, s_lab, t_lab, 5, "unbiased", pairs=True, **options)
        _assert_same(got.losses, want, torch.randn(5, 5).double(), sigma, loss=1e-11)


def test_pairs_reference_and_gradcheck():
    x, y, s_lab, t_lab = _labelled(14, 12, 2, 4)
    x.requires_grad_()
    y.requires_grad_()
    exact = mkmmd_per_class(x, y, s_lab, t_lab, 4, pairs=True, backend="reference")
    _assert_same(
        mkmmd_per_class(x, y, s_lab, t_lab, 4, pairs=True).losses,
        exact.losses,
        torch.randn(4, 4).double(),
        x,
        y,
    )
    sigma = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def run(x, y, sigma):
        return mkmmd_per_class(x, y, s_lab, t_lab, 4, pairs=True, sigma_sq=sigma).losses

    assert torch.autograd.gradcheck(run, (x, y, sigma))


def test_pairs_in_float32_half_and_autocast():
    x, y, s_lab, t_lab = _labelled(300, 280, 24, 4, torch.float32)
    want = _loop(x.double(), y.double(), s_lab, t_lab, 4, "unbiased", pairs=True)
    got = mkmmd_per_class(x, y, s_lab, t_lab, 4, pairs=True).losses
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 5e-6
    ladder = [2.0**k for k in range(-6, 7)]  # longer than one chain of squarings
    got_ladder = mkmmd_per_class(x, y, s_lab, t_lab, 4, pairs=True, alphas=ladder).losses
    exact = _loop(x.double(), y.double(), s_lab, t_lab, 4, "unbiased", pairs=True, alphas=ladder)
    assert (got_ladder - exact).abs().max() < 1.3e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mkmmd_per_class(x, y, s_lab, t_lab, 4, pairs=True).losses
    assert torch.equal(inside, got)
    half = x.bfloat16().requires_grad_()
    losses = mkmmd_per_class(half, y, s_lab, t_lab, 4, pairs=True).losses
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (gradient,) = torch.autograd.grad(losses.sum(), half)
    wide = x.bfloat16().double().requires_grad_()
    want = _loop(wide, y.double(), s_lab, t_lab, 4, "unbiased", pairs=True)
    (exact,) = torch.autograd.grad(want.sum(), wide)
    assert gradient.dtype == torch.bfloat16
    assert relative_error(gradient, exact) < 4e-3


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_pairs_bandwidths_without_a_positive_value(sigma):
    x, y, s_lab, t_lab = _labelled(60, 43, 6, 3)
    x.requires_grad_()
    got = mkmmd_per_class(x, y, s_lab, t_lab, 3, pairs=True, sigma_sq=torch.tensor(sigma))
    (gradient,) = torch.autograd.grad(got.losses.sum(), x)
    if sigma == 0.0:
        assert (got.losses == 0).all()
        assert (gradient == 0).all()
    else:
        assert torch.equal(got.losses.isnan(), got.present)


def test_pairs_identical_rows():
    x = torch.full((12, 3), 0.1, requires_grad=True)
    labels = torch.arange(12) % 3
    for estimator in ESTIMATORS:
        got = mkmmd_per_class(x, x.detach(), labels, labels, 3, pairs=True, estimator=estimator)
        assert got.losses.abs().max() < 1e-6
        (gradient,) = torch.autograd.grad(got.losses.sum(), x)
        assert (gradient == 0).all()


def test_pairs_second_derivative_is_refused():
    x, y, s_lab, t_lab = _labelled(20, 20, 3, 4)
    x.requires_grad_()
    losses = mkmmd_per_class(x, y, s_lab, t_lab, 4, pairs=True).losses
    (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"source_labels": torch.zeros(6)}, TypeError, "source_labels must be int64"),
        ({"source_labels": [0] * 6}, TypeError, "source_labels must be a Tensor, got list"),
        ({"target_labels": torch.zeros(6).long()}, ValueError, r"must have shape \[5\]"),
        (
            {"source_labels": torch.tensor([0, 1, 3, 0, 0, 0])},
            ValueError,
            "source_labels must be -1 .ignored. or from 0 to 2, got 3 at row 2",
        ),
        ({"target_labels": torch.tensor([0, 0, 0, 0, -2])}, ValueError, "got -2 at row 4"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int"),
        ({"bandwidth": "median"}, ValueError, "bandwidth must be one of pooled, per_class"),
        ({"bandwidth": "per_class", "pairs": True}, ValueError, "no meaning with pairs=True"),
        ({"backend": "native", "pairs": True}, ValueError, "backend must be one of auto, ref"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"estimator": "tllib"}, ValueError, "estimator must be one of unbiased, biased"),
        ({"sigma_sq": torch.ones(3), "pairs": True}, ValueError, "sigma_sq must hold one value"),
        ({"sigma_sq": "median"}, ValueError, "takes a number or a Tensor as sigma_sq"),
        ({"kernel": "energy", "sigma_sq": 1.0}, ValueError, "takes no sigma_sq"),
        ({"source_weight": -torch.ones(6)}, ValueError, "source_weight must be >= 0, got -1"),
        ({"target": torch.ones(5, 3)}, ValueError, r"target must have shape \[m, 2\]"),
    ],
    ids=str,
)
def test_per_class_errors(options, error, match):
    arguments = {
        "source": torch.randn(6, 2),
        "target": torch.randn(5, 2),
        "source_labels": torch.zeros(6, dtype=torch.int64),
        "target_labels": torch.zeros(5, dtype=torch.int64),
        "num_classes": 3,
    }
    with pytest.raises(error, match=match):
        mkmmd_per_class(**{**arguments, **options})


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y, labels: mkmmd_per_class(x, y, labels, labels, 2).losses.sum(),
        lambda x, y, labels: mkmmd_per_class(x, y, labels, labels, 2, pairs=True).losses.sum(),
        lambda x, y, labels: mkmmd_block(x, y, block_size=3),
        lambda x, y, labels: mkmmd_fourier(x, y, num_features=8),
    ],
    ids=["per_class", "pairs", "block", "fourier"],
)
def test_torch_func_grad(loss):
    x, y = make_mkmmd_inputs(10, 10, 3, torch.float64)
    labels = torch.arange(10) % 2
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf, y, labels), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x, y, labels), want)


@pytest.mark.parametrize("pairs", [False, True])
def test_gradients_by_weights_come_from_the_reference(pairs):
    x, y, s_lab, t_lab = _labelled(30, 30, 3, 4)
    weight = (torch.rand(30).double() + 0.1).requires_grad_()
    losses = mkmmd_per_class(x, y, s_lab, t_lab, 4, pairs=pairs, source_weight=weight).losses
    want = _loop(x, y, s_lab, t_lab, 4, "unbiased", pairs=pairs, pooled=True, source_weight=weight)
    _assert_same(losses, want, torch.ones(()), weight)


def test_autocast_changes_nothing():
    x, y = make_mkmmd_inputs(60, 60, 8)
    labels = torch.arange(60) % 3
    for loss in (
        lambda: mkmmd_per_class(x, y, labels, labels, 3).losses,
        lambda: mkmmd_block(x, y, block_size=10),
    ):
        outside = loss()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = loss()
        assert inside.dtype == torch.float32
        assert torch.equal(inside, outside)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y, labels: mkmmd_per_class(x, y, labels, labels, 2).losses.sum(),
        lambda x, y, labels: mkmmd_per_class(x, y, labels, labels, 2, pairs=True).losses.sum(),
        lambda x, y, labels: mkmmd_block(x, y, block_size=3),
        lambda x, y, labels: mkmmd_fourier(x, y, num_features=8),
    ],
    ids=["per_class", "pairs", "block", "fourier"],
)
def test_partial_requires_grad(loss, wanted):
    x, y = make_mkmmd_inputs(10, 10, 3, torch.float64)
    labels = torch.arange(10) % 2
    full = [t.clone().requires_grad_() for t in (x, y)]
    want = torch.autograd.grad(loss(*full, labels), full)
    leaves = [t.requires_grad_(w) for t, w in zip((x, y), wanted, strict=True)]
    loss(*leaves, labels).backward()
    for leaf, flag, gradient in zip(leaves, wanted, want, strict=True):
        if flag:
            torch.testing.assert_close(leaf.grad, gradient)
        else:
            assert leaf.grad is None


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation gave."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.values = max(self.values, tensor.numel())
        return out


def test_pairs_and_fourier_never_build_a_large_matrix(monkeypatch):
    monkeypatch.setattr(class_pairs, "TILE_ROWS", (64, 64))
    monkeypatch.setattr(estimate, "CHUNK_VALUES", 64 * 32)
    n, dim = 3000, 4
    x, y = make_mkmmd_inputs(n, n, dim, requires_grad=True)
    labels = torch.arange(n) % 3
    for loss in (
        lambda: mkmmd_per_class(x, y, labels, labels, 3, pairs=True).losses.sum(),
        lambda: mkmmd_fourier(x, y, num_features=64),
    ):
        with _LargestTensor() as largest:
            torch.autograd.grad(loss(), (x, y))
        assert n * dim <= largest.values <= 2 * n * dim  # against n * n, and n * 64


# ---- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bandwidth", ["pooled", "per_block"])
@pytest.mark.parametrize("shape", [(40, 40, 10), (43, 61, 10), (9, 30, 9)], ids=str)
def test_block_is_the_mean_over_blocks(shape, bandwidth, backend):
    n, m, size = shape
    x, y = make_mkmmd_inputs(n, m, 5, torch.float64, requires_grad=True)
    blocks = min(n, m) // size
    pooled = mean_sq_distance(x.detach(), y.detach()) if bandwidth == "pooled" else None
    losses = []
    for b in range(blocks):
        rows = slice(b * n // blocks, (b + 1) * n // blocks)
        columns = slice(b * m // blocks, (b + 1) * m // blocks)
        assert rows.stop - rows.start >= size
        losses.append(mkmmd_loss_ref(x[rows], y[columns], sigma_sq=pooled))
    want = torch.stack(losses)
    got = mkmmd_block(x, y, block_size=size, bandwidth=bandwidth, backend=backend)
    _assert_same(got, want.mean(), torch.ones(()), x, y)
    if blocks > 1:
        result = mkmmd_block(
            x, y, block_size=size, bandwidth=bandwidth, return_std=True, backend=backend
        )
        assert result.loss.item() == got.item()
        error = want.std().item() / math.sqrt(blocks)
        assert result.std_error.item() == pytest.approx(error, rel=1e-10)
        assert not result.std_error.requires_grad


def test_block_shuffle():
    x, y = make_mkmmd_inputs(60, 60, 4, torch.float64)
    plain = mkmmd_block(x, y, block_size=6)
    first = mkmmd_block(x, y, block_size=6, seed=1)
    assert first.item() == mkmmd_block(x, y, block_size=6, seed=1).item()
    assert len({plain.item(), first.item(), mkmmd_block(x, y, block_size=6, seed=2).item()}) == 3
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mkmmd_block(leaf, y, block_size=6, seed=1), leaf)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    shuffled = x[order].requires_grad_()
    generator = torch.Generator().manual_seed(1)
    torch.randperm(60, generator=generator)
    other = y[torch.randperm(60, generator=generator)]
    value = mkmmd_block(shuffled, other, block_size=6)
    assert value.item() == pytest.approx(first.item(), abs=1e-14)
    (exact,) = torch.autograd.grad(value, shuffled)
    assert relative_error(gradient[order], exact) < 1e-12


def test_block_estimates_the_loss_without_bias():
    # Over shuffles, the mean of the blocks is the full unbiased estimate.
    x, y = make_mkmmd_inputs(48, 48, 3, torch.float64)
    full = mkmmd_loss(x, y).item()
    draws = torch.tensor([mkmmd_block(x, y, block_size=8, seed=s).item() for s in range(300)])
    error = draws.std().item() / math.sqrt(len(draws))
    assert abs(draws.mean().item() - full) < 4 * error
    assert error < abs(full)


def test_block_bandwidth_gradient(backend):
    x, y = make_mkmmd_inputs(20, 23, 3, torch.float64)
    sigma = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s: mkmmd_block(x, y, block_size=5, sigma_sq=s, backend=backend), (sigma,)
    )


def test_block_compiles(native_core):
    compiled = torch.compile(
        lambda x, y: mkmmd_block(x, y, block_size=7), fullgraph=True, backend="aot_eager"
    )
    x, y = make_mkmmd_inputs(30, 41, 5, requires_grad=True)
    got = torch.autograd.grad(compiled(x, y), (x, y))
    expected = torch.autograd.grad(mkmmd_block(x, y, block_size=7), (x, y))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"block_size": 1}, ValueError, "block_size must be at least 2, got 1"),
        ({"block_size": 2.5}, TypeError, "block_size must be an int, got float"),
        ({"block_size": 6}, ValueError, "at most the rows of the smaller sample, 5, got 6"),
        ({"block_size": 3, "return_std": True}, ValueError, "return_std needs at least 2 blocks"),
        ({"bandwidth": "shared"}, ValueError, "bandwidth must be one of pooled, per_block"),
        ({"estimator": "tllib"}, ValueError, "estimator must be one of unbiased, biased"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"sigma_sq": "median"}, ValueError, "takes a number or a Tensor as sigma_sq"),
        ({"kernel": "energy", "alphas": [1.0]}, ValueError, "takes no alphas"),
    ],
    ids=str,
)
def test_block_errors(options, error, match):
    with pytest.raises(error, match=match):
        mkmmd_block(torch.randn(8, 2), torch.randn(5, 2), **{"block_size": 2, **options})


# ---- random features -----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", FOURIER_KERNELS)
def test_frequencies_are_those_of_the_kernel(kernel):
    frequencies = draw_frequencies(
        3, 200_000, kernel, torch.Generator().manual_seed(5), torch.device("cpu")
    )
    direction = torch.tensor([0.6, -0.48, 0.64], dtype=torch.float64)
    for length in (0.1, 0.7, 2.0, 5.0):
        waves = (length * direction @ frequencies).cos()
        distance = torch.tensor(length**2, dtype=torch.float64)
        want = kernel_profile(kernel, distance, 2.0).item()
        assert abs(waves.mean().item() - want) < 4 * waves.std().item() / math.sqrt(200_000)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("alphas", [(1 / 8, 1 / 4, 1 / 2, 1, 2), (0.7, 3.0)], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fourier_equals_its_matrix_form(estimator, alphas, weighted, monkeypatch):
    monkeypatch.setattr(estimate, "CHUNK_VALUES", 32 * 16)  # several chunks, the last one partial
    x, y = make_mkmmd_inputs(41, 53, 4, torch.float64, requires_grad=True)
    sigma = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    weights = {}
    if weighted:
        weights = {"source_weight": torch.rand(41).double(), "target_weight": torch.rand(53) > 0.3}
        weights["source_weight"][3] = 0
    got = mkmmd_fourier(
        x, y, num_features=32, alphas=alphas, sigma_sq=sigma, estimator=estimator, **weights
    )
    frequencies = draw_frequencies(
        4, 32, "gaussian", torch.Generator().manual_seed(0), torch.device("cpu")
    )
    want = fourier_loss_ref(
        x,
        y,
        frequencies,
        alphas=alphas,
        sigma_sq=sigma,
        biased=estimator == "biased",
        **weights,
    )
    _assert_same(got, want, torch.tensor(3.0), x, y, sigma)


@pytest.mark.parametrize("kernel", FOURIER_KERNELS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fourier_expectation_is_the_exact_loss(estimator, kernel):
    x, y = make_mkmmd_inputs(30, 40, 6, torch.float64)
    exact = mkmmd_loss_ref(x, y, kernel=kernel, estimator=estimator).item()
    options = {"kernel": kernel, "estimator": estimator}
    draws = {
        features: torch.tensor(
            [
                mkmmd_fourier(x, y, num_features=features, seed=seed, **options).item()
                for seed in range(60)
            ]
        )
        for features in (32, 512)
    }
    for values in draws.values():
        assert abs(values.mean().item() - exact) < 4 * values.std().item() / math.sqrt(60)
    # 16 times the features: a quarter of the error.
    ratio = (draws[32] - exact).square().mean().sqrt() / (draws[512] - exact).square().mean().sqrt()
    assert 2.7 < ratio.item() < 6.0


def test_fourier_default_bandwidth_is_the_mean_rule():
    x, y = make_mkmmd_inputs(30, 40, 6)
    weight = torch.rand(30)
    for options in ({}, {"source_weight": weight}):
        given = mean_sq_distance(x.double(), y.double(), options.get("source_weight")).item()
        assert mkmmd_fourier(x, y, **options).item() == pytest.approx(
            mkmmd_fourier(x, y, sigma_sq=given, **options).item(), abs=1e-6
        )


def test_fourier_gradcheck():
    x, y = make_mkmmd_inputs(4, 5, 2, torch.float64, requires_grad=True)
    sigma = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    for kernel in FOURIER_KERNELS:
        assert torch.autograd.gradcheck(
            lambda x, y, s, k=kernel: mkmmd_fourier(x, y, num_features=7, kernel=k, sigma_sq=s),
            (x, y, sigma),
        )


def test_fourier_dtypes_and_autocast():
    x, y = make_mkmmd_inputs(300, 200, 24)
    exact = x.double().requires_grad_()
    want = mkmmd_fourier(exact, y.double(), num_features=64)
    (gradient,) = torch.autograd.grad(want, exact)
    single = x.clone().requires_grad_()
    got = mkmmd_fourier(single, y, num_features=64)
    assert got.dtype == torch.float32
    assert abs(got.item() - want.item()) < 5e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mkmmd_fourier(x, y, num_features=64).item() == got.item()
        (inside,) = torch.autograd.grad(got, single)
    assert relative_error(inside, gradient) < 1e-5
    half = x.half().requires_grad_()
    loss = mkmmd_fourier(half, y.double(), num_features=64)
    assert loss.dtype == torch.float64
    (rounded,) = torch.autograd.grad(loss, half)
    assert rounded.dtype == torch.float16
    assert relative_error(rounded, gradient) < 5e-3


def test_fourier_seed_and_generator():
    x, y = make_mkmmd_inputs(30, 40, 6)
    first = mkmmd_fourier(x, y, num_features=16).item()
    assert mkmmd_fourier(x, y, num_features=16, seed=0).item() == first
    assert mkmmd_fourier(x, y, num_features=16, seed=1).item() != first
    generator = torch.Generator().manual_seed(0)
    assert mkmmd_fourier(x, y, num_features=16, generator=generator).item() == first
    assert mkmmd_fourier(x, y, num_features=16, generator=generator).item() != first


def test_fourier_degenerate_and_nan():
    rows = torch.full((9, 3), 0.1, requires_grad=True)
    for estimator in ESTIMATORS:
        for sigma_sq in (None, 2.0, torch.tensor(0.0)):
            value = mkmmd_fourier(rows, rows.detach()[:5], sigma_sq=sigma_sq, estimator=estimator)
            assert abs(value.item()) < 1e-6
            (gradient,) = torch.autograd.grad(value, rows)
            assert gradient.abs().max() < 1e-6
    x, y = make_mkmmd_inputs(9, 8, 3)
    assert mkmmd_fourier(x, y, sigma_sq=torch.tensor(-1.0)).isnan()
    x[4, 1] = float("nan")
    for sigma_sq in (None, 1.0):
        x.requires_grad_()
        value = mkmmd_fourier(x, y, sigma_sq=sigma_sq)
        assert value.isnan()
        assert torch.autograd.grad(value, x)[0].isnan().any()
    mask = torch.ones(9, dtype=torch.bool)
    mask[4] = False
    kept = mkmmd_fourier(x[mask], y).item()
    assert mkmmd_fourier(x, y, source_weight=mask).item() == pytest.approx(kept, abs=1e-6)


def test_fourier_biased_is_never_negative():
    x, _ = make_mkmmd_inputs(100, 2, 8)
    assert 0 <= mkmmd_fourier(x, x.clone(), estimator="biased").item() < 1e-12


def test_fourier_second_derivative_is_refused():
    x, y = make_mkmmd_inputs(9, 8, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(mkmmd_fourier(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kernel": "energy"}, ValueError, "'energy' has no spectral density"),
        ({"kernel": "linear"}, ValueError, "kernel must be one of gaussian"),
        ({"num_features": 0}, ValueError, "num_features must be at least 1"),
        ({"num_features": 1e3}, TypeError, "num_features must be an int"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"estimator": "tllib"}, ValueError, "estimator must be one of unbiased, biased"),
        ({"sigma_sq": "median"}, ValueError, "takes a number or a Tensor as sigma_sq"),
        ({"sigma_sq": 0.0}, ValueError, "sigma_sq must be positive"),
        ({"alphas": torch.ones(2)}, TypeError, "alphas must be a sequence of numbers"),
        ({"source_weight": torch.zeros(8)}, ValueError, "source_weight must leave at least 2"),
        (
            {"target_weight": torch.ones(5, requires_grad=True)},
            ValueError,
            "target_weight must not require a gradient",
        ),
    ],
    ids=str,
)
def test_fourier_errors(options, error, match):
    with pytest.raises(error, match=match):
        mkmmd_fourier(torch.randn(8, 2), torch.randn(5, 2), **options)
