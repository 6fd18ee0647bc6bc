"""Every backend of MK-MMD against the reference, the official figures and the definition's laws."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from padkern import MKMMDLoss, mkmmd_loss
from padkern.ops.mkmmd import op
from padkern.ops.mkmmd.reference import KERNELS, ROOT_KERNELS, mkmmd_loss_ref
from padkern.testing import (
    assert_mkmmd_matches_reference,
    make_golden_mkmmd_inputs,
    make_mkmmd_inputs,
    relative_error,
    value_and_gradients,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mkmmd_tllib.json").read_text())
DEFAULT = [1 / 8, 1 / 4, 1 / 2, 1.0, 2.0]
# Sizes 1 and 2, odd, prime, and one below, at and above the block and vector widths.
SHAPES = [
    (2, 2, 1),
    (2, 3, 8),
    (1, 1, 3),
    (3, 1, 16),
    (7, 11, 5),
    (13, 29, 17),
    (47, 49, 15),
    (48, 48, 16),
    (49, 97, 33),
    (95, 96, 64),
    (97, 101, 31),
    (193, 50, 128),
    (5, 200, 257),
    (481, 96, 48),
    (487, 521, 7),
]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"n{c['n']}_d{c['d']}")
def test_golden_figures_of_the_official_code(case, backend):
    x, y = make_golden_mkmmd_inputs(case)
    value, dx, dy = value_and_gradients(
        mkmmd_loss, x, y, alphas=case["alphas"], estimator="tllib", backend=backend
    )
    assert abs(value.item() - case["loss"]) <= 1e-10
    assert dx.norm().item() == pytest.approx(case["gx_norm"], rel=1e-9)
    assert dy.norm().item() == pytest.approx(case["gy_norm"], rel=1e-9)
    scale = 1e-9 * case["gx_norm"]
    assert dx[0, 0].item() == pytest.approx(case["gx_00"], rel=1e-9, abs=scale)
    assert dx[-1, -1].item() == pytest.approx(case["gx_last"], rel=1e-9, abs=scale)
    assert dy[0, 0].item() == pytest.approx(case["gy_00"], rel=1e-9, abs=scale)
    assert dx.sum().item() == pytest.approx(case["gx_sum"], rel=1e-9, abs=scale)
    assert dy.sum().item() == pytest.approx(case["gy_sum"], rel=1e-9, abs=scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, native_core, poisoned_empty):
    n, m, dim = shape
    estimators = ["biased"] if min(n, m) < 2 else ["unbiased", "biased"]
    for estimator in estimators:
        x, y = make_mkmmd_inputs(n, m, dim, dtype)
        loss = partial(mkmmd_loss, backend="native")
        assert_mkmmd_matches_reference(loss, x, y, estimator=estimator)
        without = mkmmd_loss(x, y, estimator=estimator, backend="native")
        with_gradient = loss(x.requires_grad_(), y, estimator=estimator)
        assert without.item() == pytest.approx(with_gradient.item(), abs=1e-6)


@pytest.mark.parametrize(
    "alphas",
    [DEFAULT, [1.0], [2.0, 0.5], [0.1, 0.7, 3.0], [1.0] * 3, [2.0**k for k in range(-6, 7)]],
    ids=str,
)
@pytest.mark.parametrize("sigma_sq", [None, "median", 3.5], ids=str)
def test_alphas_and_bandwidths(alphas, sigma_sq, native_core):
    x, y = make_mkmmd_inputs(37, 53, 9)
    loss = partial(mkmmd_loss, backend="native")
    assert_mkmmd_matches_reference(loss, x, y, alphas=alphas, sigma_sq=sigma_sq)
    assert_mkmmd_matches_reference(loss, x.double(), y.double(), alphas=alphas, sigma_sq=sigma_sq)


def _layouts(t):
    n, dim = t.shape
    wide = torch.full((n, dim + 5), float("nan"), dtype=t.dtype)
    wide[:, 2 : 2 + dim] = t
    every_second = torch.full((2 * n, dim), float("nan"), dtype=t.dtype)
    every_second[::2] = t
    columns = torch.full((n, 2 * dim), float("nan"), dtype=t.dtype)
    columns[:, ::2] = t
    shifted = torch.full((n * dim + 1,), float("nan"), dtype=t.dtype)
    shifted[1:] = t.reshape(-1)
    return {
        "slice": wide[:, 2 : 2 + dim],
        "transposed": t.t().contiguous().t(),
        "every_second_row": every_second[::2],
        "every_second_column": columns[:, ::2],
        "misaligned": shifted[1:].reshape(n, dim),
        "flipped_batch": t.flip(0).contiguous().flip(0),
    }


def test_strides_change_no_bit(native_core):
    x, y = make_mkmmd_inputs(41, 33, 19)
    expected = value_and_gradients(mkmmd_loss, x, y, backend="native")
    for name, view in _layouts(x).items():
        assert torch.equal(view, x)
        got = value_and_gradients(mkmmd_loss, view, y, backend="native")
        for g, e in zip(got, expected, strict=True):
            assert torch.equal(g, e), name


def test_expanded_rows(backend):
    x = torch.randn(1, 6).expand(10, 6)
    _, y = make_mkmmd_inputs(3, 12, 6)
    assert_mkmmd_matches_reference(partial(mkmmd_loss, backend=backend), x, y)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_half_and_mixed_dtypes(dtypes, backend):
    x, y = make_mkmmd_inputs(65, 40, 24)
    assert_mkmmd_matches_reference(
        partial(mkmmd_loss, backend=backend), x.to(dtypes[0]), y.to(dtypes[1])
    )


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_weights(estimator, native_core):
    x, y = make_mkmmd_inputs(50, 61, 12, torch.float64)
    wx = torch.rand(50, dtype=torch.float64) * 3
    wx[::7] = 0
    wy = torch.rand(61, dtype=torch.float64) * 1e-3
    loss = partial(mkmmd_loss, backend="native")
    options = {"source_weight": wx, "target_weight": wy, "estimator": estimator}
    assert_mkmmd_matches_reference(loss, x, y, **options)
    assert_mkmmd_matches_reference(loss, x, y, sigma_sq=4.0, **options)
    wide = torch.stack([wx, wx], 1)[:, 0]  # strided weights
    assert_mkmmd_matches_reference(loss, x, y, source_weight=wide, estimator=estimator)


@pytest.mark.parametrize("sigma_sq", [None, "median", 2.5], ids=str)
def test_a_mask_is_the_removal_of_rows_even_of_nan_rows(sigma_sq, backend):
    x, y = make_mkmmd_inputs(40, 30, 8, torch.float64)
    keep_x, keep_y = torch.rand(40) < 0.6, torch.rand(30) < 0.6
    keep_x[0] = False
    dirty_x = torch.where(keep_x[:, None], x, float("nan"))
    dirty_y = torch.where(keep_y[:, None], y, float("inf"))
    options = {"backend": backend, "sigma_sq": sigma_sq}
    expected = value_and_gradients(mkmmd_loss, x[keep_x], y[keep_y], **options)
    got = value_and_gradients(
        mkmmd_loss, dirty_x, dirty_y, source_weight=keep_x, target_weight=keep_y, **options
    )
    assert got[0].item() == pytest.approx(expected[0].item(), abs=1e-12)
    for gradient, keep, want in zip(got[1:], (keep_x, keep_y), expected[1:], strict=True):
        assert relative_error(gradient[keep], want) < 1e-10
        assert (gradient[~keep] == 0).all()


def test_an_integer_weight_counts_a_row_that_often(backend):
    x, y = make_mkmmd_inputs(9, 7, 4, torch.float64)
    counts = torch.tensor([1, 2, 3, 1, 1, 4, 1, 2, 1])
    options = {"estimator": "biased", "backend": backend}
    repeated = mkmmd_loss(x.repeat_interleave(counts, 0), y, **options)
    weighted = mkmmd_loss(x, y, source_weight=counts.double(), **options)
    assert weighted.item() == pytest.approx(repeated.item(), abs=1e-13)


def test_symmetry_permutation_and_scale(backend):
    x, y = make_mkmmd_inputs(60, 45, 10, torch.float64)
    value = mkmmd_loss(x, y, backend=backend).item()
    assert mkmmd_loss(y, x, backend=backend).item() == pytest.approx(value, abs=1e-13)
    shuffled = mkmmd_loss(x[torch.randperm(60)], y[torch.randperm(45)], backend=backend)
    assert shuffled.item() == pytest.approx(value, abs=1e-13)
    for scale in (1e-6, 1e6):
        got = mkmmd_loss((x * scale).float(), (y * scale).float(), backend=backend).item()
        assert got == pytest.approx(value, abs=5e-6)


def test_an_offset_does_not_disturb_float32(backend):
    x, y = make_mkmmd_inputs(100, 120, 64)
    before = mkmmd_loss(x, y, backend=backend).item()
    after = mkmmd_loss(x + 100, y + 100, backend=backend).item()
    assert abs(after - before) < 1e-5


def test_equal_samples_give_zero_biased_loss(backend):
    x, _ = make_mkmmd_inputs(130, 2, 32)
    assert abs(mkmmd_loss(x, x.clone(), estimator="biased", backend=backend).item()) < 1e-6


@pytest.mark.parametrize("row", [0.0, 0.1, 1e6])
def test_identical_rows(row, backend):
    x = torch.full((23, 5), row)
    y = torch.full((31, 5), row)
    for estimator in ("unbiased", "biased"):
        for sigma_sq in (None, "median", 2.0):
            got = value_and_gradients(
                mkmmd_loss, x, y, estimator=estimator, sigma_sq=sigma_sq, backend=backend
            )
            assert abs(got[0].item()) < 1e-6
            assert (got[1] == 0).all()
            assert (got[2] == 0).all()
    assert mkmmd_loss(x, x, estimator="tllib", backend=backend).item() == pytest.approx(2 / 22)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sigma_sq", [None, 3.0], ids=str)
def test_nan_and_inf_give_nan(bad, sigma_sq, backend):
    for which, row in ((0, 0), (0, 49), (1, 17)):
        samples = [t.clone() for t in make_mkmmd_inputs(50, 60, 4)]
        samples[which][row, 2] = bad
        value, dx, dy = value_and_gradients(
            mkmmd_loss, *samples, sigma_sq=sigma_sq, backend=backend
        )
        assert torch.isnan(value)
        assert torch.isnan(dx).any()
        assert torch.isnan(dy).any()


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_bandwidth_tensors_without_a_positive_value(sigma, backend):
    x, y = make_mkmmd_inputs(5, 6, 3)
    value, dx, _ = value_and_gradients(
        mkmmd_loss, x, y, sigma_sq=torch.tensor(sigma), backend=backend
    )
    if sigma == 0.0:
        assert abs(value.item()) < 1e-6
        assert (dx == 0).all()
    else:
        assert torch.isnan(value)


@pytest.mark.parametrize("shape", [(2, 2, 8), (64, 50, 16), (500, 640, 24), (700, 100, 128)])
def test_thread_count_changes_no_bit(shape, native_core, restore_threads):
    x, y = make_mkmmd_inputs(*shape)
    results = []
    for threads in (1, 2, 4, 2, 1):
        torch.set_num_threads(threads)
        results.append(value_and_gradients(mkmmd_loss, x, y, backend="native"))
    for other in results[1:]:
        for got, first in zip(other, results[0], strict=True):
            assert torch.equal(got, first)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_partial_requires_grad(wanted, backend):
    x, y = make_mkmmd_inputs(20, 30, 6)
    _, *full = value_and_gradients(mkmmd_loss, x, y, backend=backend)
    x.requires_grad_(wanted[0])
    y.requires_grad_(wanted[1])
    mkmmd_loss(x, y, backend=backend).backward()
    for tensor, want, gradient in zip((x, y), wanted, full, strict=True):
        if want:
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_bandwidth_gradient(backend):
    x, y = make_mkmmd_inputs(30, 25, 7, torch.float64)
    exact = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    mkmmd_loss(x, y, sigma_sq=exact, backend="reference").backward()
    for dtype in (torch.float64, torch.float32):
        sigma = torch.tensor([3.0], dtype=dtype, requires_grad=True)
        mkmmd_loss(x, y, sigma_sq=sigma, backend=backend).backward()
        assert sigma.grad.dtype == dtype
        assert sigma.grad.shape == (1,)
        assert sigma.grad.item() == pytest.approx(exact.grad.item(), rel=1e-6)


def test_large_grad_output_keeps_half_gradients(backend):
    x, y = make_mkmmd_inputs(300, 300, 32)
    half = x.half().requires_grad_()
    (mkmmd_loss(half, y, backend=backend) * 65536.0).backward()
    _, exact, _ = value_and_gradients(mkmmd_loss, x.half().double(), y.double())
    assert half.grad.dtype == torch.float16
    # Unscaled, most of these gradients would be subnormal in float16 and lose their digits.
    assert relative_error(half.grad.double() / 65536.0, exact) < 2e-3


def test_expanded_grad_output_and_hooks(backend):
    x, y = make_mkmmd_inputs(8, 9, 3, requires_grad=True)
    value = mkmmd_loss(x, y, backend=backend)
    (dx,) = torch.autograd.grad(value.expand(5).sum(), x, retain_graph=True)
    (one,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(dx, 5 * one)


def test_gradcheck(native_core):
    x, y = make_mkmmd_inputs(5, 4, 3, torch.float64, requires_grad=True)
    sigma_sq = torch.tensor(2.3, dtype=torch.float64, requires_grad=True)
    wx = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    for estimator in ("unbiased", "biased"):
        for weight in (None, wx):

            def run(x, y, s, estimator=estimator, weight=weight):
                return mkmmd_loss(
                    x, y, sigma_sq=s, estimator=estimator, source_weight=weight, backend="native"
                )

            assert torch.autograd.gradcheck(run, (x, y, sigma_sq))


def test_double_backward_is_refused_by_native_and_works_in_the_reference():
    x, y = make_mkmmd_inputs(6, 6, 2, torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(
        mkmmd_loss(x, y, sigma_sq=1.0, backend="reference"), x, create_graph=True
    )
    dx.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_double_backward_of_native_raises(native_core):
    x, y = make_mkmmd_inputs(6, 6, 2, torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(mkmmd_loss(x, y, backend="native"), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


def test_opcheck(native_core):
    x, y = make_mkmmd_inputs(9, 12, 5)
    wx = torch.rand(9)
    sigma = torch.tensor(2.0)
    for args in (
        (x, y, None, None, None, None, None, DEFAULT, "gaussian", "unbiased"),
        (
            x.half(),
            y.double(),
            sigma,
            wx,
            None,
            sigma[None],
            sigma[None],
            (),
            "laplacian",
            "biased",
        ),
        (x.t().contiguous().t(), y[::2], sigma, wx, None, None, None, DEFAULT, "gaussian", "cross"),
    ):
        args += ("float32", "native")
        opcheck(torch.ops.padkern.mkmmd_value.default, args)
        opcheck(torch.ops.padkern.mkmmd_value_grad.default, (*args, True))
        for out in torch.ops.padkern.mkmmd_value_grad.default(*args, False):
            assert out.is_contiguous()


def test_torch_func_grad(backend):
    x, y = make_mkmmd_inputs(12, 10, 4, torch.float64)
    _, dx, _ = value_and_gradients(mkmmd_loss, x, y, backend=backend)
    got = torch.func.grad(lambda a: mkmmd_loss(a, y, backend=backend))(x)
    torch.testing.assert_close(got, dx)


def test_compiled_equals_eager(native_core):
    def step(x, y, w):
        return mkmmd_loss(torch.tanh(x), y, source_weight=w) * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (8, 17, 30):
        x, y = make_mkmmd_inputs(n, n + 3, 6, requires_grad=True)
        w = torch.rand(n)
        expected = torch.autograd.grad(step(x, y, w), (x, y))
        got = torch.autograd.grad(compiled(x, y, w), (x, y))
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e)


@pytest.mark.slow
def test_inductor_equals_eager(native_core):
    compiled = torch.compile(lambda x, y: mkmmd_loss(x * 2, y), fullgraph=True)
    x, y = make_mkmmd_inputs(20, 31, 6, requires_grad=True)
    got = torch.autograd.grad(compiled(x, y), (x, y))
    expected = torch.autograd.grad(mkmmd_loss(x * 2, y), (x, y))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_autocast_stays_in_float32(backend):
    x, y = make_mkmmd_inputs(33, 44, 12)
    outside = mkmmd_loss(x, y, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mkmmd_loss(x, y, backend=backend)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_module_passes_its_options_on():
    x, y = make_mkmmd_inputs(10, 10, 3)
    module = MKMMDLoss(alphas=(1.0, 3.0), sigma_sq=2.0, estimator="tllib")
    expected = mkmmd_loss(x, y, alphas=(1.0, 3.0), sigma_sq=2.0, estimator="tllib")
    assert module(x, y).item() == expected.item()
    assert "tllib" in repr(module)


def test_module_learns_its_kernels(backend):
    x, y = make_mkmmd_inputs(40, 30, 6, torch.float64)
    module = MKMMDLoss((0.5, 1.0, 2.0), learn_alphas=True, learn_betas=True, backend=backend)
    plain = mkmmd_loss(x, y, alphas=(0.5, 1.0, 2.0), backend=backend)
    assert module(x, y).item() == pytest.approx(plain.item(), rel=1e-6)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, maximize=True)
    before = module(x, y)
    before.backward()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())
    optimizer.step()
    assert module(x, y) > before
    assert module.kernel_betas().sum().item() == pytest.approx(3.0)
    assert set(module.state_dict()) == {"log_alphas", "beta_logits"}


def test_module_refuses_to_learn_what_is_not_there():
    with pytest.raises(ValueError, match="'energy' has no bandwidth"):
        MKMMDLoss(kernel="energy", learn_alphas=True)
    with pytest.raises(ValueError, match=r"betas must be positive to be learned, got 0\.0"):
        MKMMDLoss((1.0, 2.0), betas=(1.0, 0.0), learn_betas=True)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("estimator", ["unbiased", "biased", "cross"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7, 3), (50, 41, 20), (100, 130, 65)])
def test_every_kernel_with_weights_and_all_derivatives(
    native_core, kernel, estimator, dtype, shape
):
    n, m, dim = shape
    x, y = make_mkmmd_inputs(n, m, dim, dtype)
    # Identical rows inside a sample and across: no derivative there for kernels of the distance.
    x[1], y[0], y[m - 1] = x[0], x[2], y[1]
    weight = torch.rand(n).to(dtype)
    weight[n - 1] = 0
    mask = torch.arange(m) % 3 != 1
    energy = kernel == "energy"
    alphas = torch.tensor([1.0] if energy else [0.3, 0.6, 2.4, 1.1], dtype=torch.float64)
    betas = None if energy else torch.tensor([1.0, 0.5, 2.0, 0.25], dtype=torch.float64)
    results = []
    for exact in (True, False):
        leaves = [x.double() if exact else x.clone(), y.double() if exact else y.clone()]
        leaves += [torch.tensor(float(dim), dtype=torch.float64)]
        leaves += [] if energy else [alphas.clone(), betas.clone()]
        for leaf in leaves:
            leaf.requires_grad_()
        a, b = (tuple(alphas.tolist()), None) if energy else leaves[3:]
        if exact:
            value = mkmmd_loss_ref(
                leaves[0],
                leaves[1],
                alphas=a,
                betas=b,
                kernel=kernel,
                sigma_sq=leaves[2],
                estimator=estimator,
                source_weight=weight.double(),
                target_weight=mask.double(),
            )
        else:
            value = op.mkmmd_fused(
                *leaves[:3], weight, mask, a, b, kernel, estimator, "float32", "native"
            )
        results.append((value, torch.autograd.grad(value, leaves, allow_unused=True)))
    (expected, wanted), (value, found) = results
    # A root magnifies the rounding of a small distance.
    root = 20 if kernel in ROOT_KERNELS else 1
    limit = 1e-11 if dtype == torch.float64 else 5e-6
    assert abs(value.item() - expected.item()) <= root * limit * max(1.0, abs(expected.item()))
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    for k, (got, want) in enumerate(zip(found, wanted, strict=True)):
        if want is None or want.abs().max() == 0:
            assert got is None or got.abs().max() == 0
            continue
        # The derivatives by bandwidth and weights are differences of large sums.
        scale = 1.0 if k < 2 else float(max(1.0, 1.0 / want.norm()))
        rounding = torch.finfo(dtype).eps if k < 2 and dtype == torch.bfloat16 else 0.0
        assert relative_error(got, want) <= 2 * root * limit * scale + rounding, k
