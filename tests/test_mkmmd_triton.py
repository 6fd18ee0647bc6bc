"""The Triton backend of MK-MMD against the reference: on a GPU, or in Triton's interpreter.

Triton decides once per process which of the two it is. Under ``TRITON_INTERPRET=1`` these tests run
on the CPU (``test_mkmmd_triton_interpreter.py`` does that); otherwise they need a GPU, where sizes
are larger and what only a GPU can show is added.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from padkern import mkmmd_loss
from padkern.ops.mkmmd.reference import DEFAULT_ALPHAS, KERNELS, mkmmd_loss_ref
from padkern.testing import (
    assert_mkmmd_matches_reference,
    exact_mkmmd,
    make_mkmmd_inputs,
    relative_error,
    value_and_gradients,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        INTERPRETED or not torch.cuda.is_available(), reason="torch finds no usable CUDA device"
    ),
]
pytestmark = [] if INTERPRETED else on_gpu

triton_loss = partial(mkmmd_loss, backend="triton")


def inputs(n, m, dim, dtype=torch.float32, **options):
    return tuple(t.to(DEVICE) for t in make_mkmmd_inputs(n, m, dim, dtype, **options))


def run_op(x, y, *, per_kernel=False, **options):
    """``mkmmd_value_grad_triton`` by keyword."""
    from padkern.ops.mkmmd.triton_impl import mkmmd_value_grad_triton

    names = ("sigma_sq", "source_weight", "target_weight", "alphas_tensor", "betas")
    alphas = (
        () if options.get("alphas_tensor") is not None else options.get("alphas", DEFAULT_ALPHAS)
    )
    return mkmmd_value_grad_triton(
        x,
        y,
        *(options.get(name) for name in names),
        alphas,
        options.get("kernel", "gaussian"),
        options.get("estimator", "unbiased"),
        options.get("precision", "float32"),
        per_kernel,
    )


def assert_value_alone_agrees(x, y, **options):
    """The value-only kernels take another path than the gradient's."""
    expected = mkmmd_loss_ref(x.double(), y.double(), **options).item()
    with torch.no_grad():
        got = triton_loss(x, y, **options)
    assert got.item() == pytest.approx(expected, abs=5e-6 * max(1.0, abs(expected)))


# Sizes 1 and 2, odd, prime, around the tiles of 32 and 64, unequal; widths 1 to panels.
SHAPES = [
    (2, 2, 1),
    (2, 2, 8),
    (3, 5, 2),
    (7, 4, 17),
    (31, 33, 5),
    (32, 32, 16),
    (63, 65, 13),
    (64, 64, 3),
    (5, 97, 70),
    (37, 31, 257),
]
LARGE_SHAPES = [
    (672, 672, 128),
    (1000, 1301, 64),
    (1023, 1, 31),
    (2048, 2049, 256),
    (900, 700, 1000),
    (4096, 4096, 96),
    (3000, 2000, 512),
]


@pytest.mark.parametrize("shape", SHAPES if INTERPRETED else SHAPES + LARGE_SHAPES, ids=str)
def test_shapes(shape):
    x, y = inputs(*shape)
    options = {"estimator": "biased" if min(shape[:2]) < 2 else "unbiased"}
    assert_mkmmd_matches_reference(triton_loss, x, y, **options)
    assert_value_alone_agrees(x, y, **options)


def test_one_row_each():
    x, y = inputs(1, 1, 3)
    assert_mkmmd_matches_reference(triton_loss, x, y, estimator="biased")


DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float64),
    (torch.float64, torch.float64),
]


@pytest.mark.parametrize("dim", [12, 40] if INTERPRETED else [12, 64, 100, 140, 256, 700])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(dtypes, dim):
    n, m = (31, 21) if INTERPRETED else (700, 501)
    x, y = inputs(n, m, dim)
    x, y = x.to(dtypes[0]), y.to(dtypes[1])
    assert_mkmmd_matches_reference(triton_loss, x, y)
    if torch.float64 not in dtypes:
        assert_value_alone_agrees(x, y)


@pytest.mark.parametrize(
    ("shape", "precision", "loss", "gradient"),
    [
        ((2, 3, 2), "float32", 5e-7, 1e-6),
        ((350, 165, 24), "float32", 5e-6, 1e-5),
        ((40, 30, 24), "tf32", 1e-3, 2e-3),
    ],
    ids=["bfloat16x6", "bfloat16x3", "tfloat32"],
)
def test_product_classes_of_float32(shape, precision, loss, gradient):
    """The splits and roundings are explicit, so the interpreter shows their errors."""
    x, y = inputs(*shape)
    exact = exact_mkmmd(x, y)
    value, dx, dy, *_ = run_op(x, y, precision=precision)
    assert abs(value.item() - exact[0].item()) < loss
    assert relative_error(dx, exact[1]) < gradient
    assert relative_error(dy, exact[2]) < gradient


@pytest.mark.parametrize("offset", [100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_offset_of_all_rows_costs_no_digits(dtype, offset):
    """Half inputs keep their own values, or values whose shift is exact, so nothing is lost."""
    x, y = inputs(30, 25, 24)
    x, y = (x + offset).to(dtype), (y + offset).to(dtype)
    assert_mkmmd_matches_reference(triton_loss, x, y)


def layouts(x):
    """The same values in other memory layouts."""
    n, dim = x.shape
    wide = x.new_zeros(n, 2 * dim + 1)
    wide[:, 1::2] = x
    shifted = x.new_empty(n * dim + 1)[1:].view(n, dim).copy_(x)
    return {
        "transposed": x.t().contiguous().t(),
        "every second column": wide[:, 1::2],
        "every third row": x.repeat_interleave(3, 0)[::3],
        "misaligned": shifted,
    }


def test_layouts_change_no_bit():
    x, y = inputs(31, 30, 19)
    expected = run_op(x, y)
    for name, view in layouts(x).items():
        assert torch.equal(view, x)
        for got, want in zip(run_op(view, y), expected, strict=True):
            assert torch.equal(got, want), name


def test_expanded_rows():
    x = torch.randn(1, 6, device=DEVICE).expand(10, 6)
    _, y = inputs(3, 12, 6)
    assert_mkmmd_matches_reference(triton_loss, x, y)


def weights(n, kind):
    generator = torch.Generator().manual_seed(n)
    weight = torch.rand(n, generator=generator) * 2
    weight[::5] = 0
    if kind == "bool":
        return (weight > 0.7).to(DEVICE)
    if kind == "strided":
        return torch.stack([weight, weight], 1)[:, 0].to(DEVICE)
    return weight.to(kind).to(DEVICE)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, "bool", "strided"], ids=str)
def test_weights(kind, estimator):
    n, m = (27, 31) if estimator == "biased" else (37, 50)
    x, y = inputs(n, m, 9)
    options = {"source_weight": weights(n, kind), "estimator": estimator}
    if kind != "bool":
        options["target_weight"] = weights(m, kind) * 1e-6
    assert_mkmmd_matches_reference(triton_loss, x, y, **options)
    assert_value_alone_agrees(x, y, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("sigma_sq", [None, 2.5], ids=str)
def test_masked_rows_may_hold_anything(sigma_sq, dtype):
    x, y = inputs(32, 30, 8, dtype)
    keep_x, keep_y = weights(32, "bool"), weights(30, "bool")
    assert not keep_x[0]
    dirty_x = torch.where(keep_x[:, None], x, float("nan"))
    dirty_y = torch.where(keep_y[:, None], y, float("inf"))
    options = {"sigma_sq": sigma_sq}
    expected = exact_mkmmd(x[keep_x], y[keep_y], **options)
    got = value_and_gradients(
        triton_loss, dirty_x, dirty_y, source_weight=keep_x, target_weight=keep_y, **options
    )
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert got[0].item() == pytest.approx(expected[0].item(), abs=tolerance)
    for gradient, keep, want in zip(got[1:], (keep_x, keep_y), expected[1:], strict=True):
        assert relative_error(gradient[keep], want) < max(torch.finfo(dtype).eps, 1e-10)
        assert (gradient[~keep] == 0).all()


KERNEL_CASES = [
    (kernel, dtype, dim)
    for kernel in KERNELS
    for dtype, dim in ((torch.float32, 7), (torch.bfloat16, 40), (torch.float64, 5))
]


@pytest.mark.parametrize(("kernel", "dtype", "dim"), KERNEL_CASES, ids=str)
def test_kernels(kernel, dtype, dim):
    n = 34 if dim == 7 else 30
    x, y = inputs(n, 30, dim, dtype)
    if dim == 7:
        y[3] = x[5]  # a pair at distance 0, where roots have no derivative
    assert_mkmmd_matches_reference(triton_loss, x, y, kernel=kernel)
    if dtype == torch.float32:
        weight = weights(n, torch.float32)
        options = {"kernel": kernel, "source_weight": weight, "estimator": "biased"}
        assert_mkmmd_matches_reference(triton_loss, x, y, **options)
        assert_value_alone_agrees(x, y, **options)


ALPHAS = {
    "two ladders": (8.0, 4.0, 3.0, 1.5, 1.0),
    "long": tuple(2.0**k for k in range(-4, 5)),
    "repeated and unordered": (1.0, 0.25, 1.0, 8.0, 1 / 3),
    "one": (0.7,),
    "eighteen": tuple(0.3 * 1.37**k for k in range(18)),
}


@pytest.mark.parametrize("name", ALPHAS)
def test_alphas(name):
    x, y = inputs(20, 31, 6)
    assert_mkmmd_matches_reference(triton_loss, x, y, alphas=ALPHAS[name])
    assert_value_alone_agrees(x, y, alphas=ALPHAS[name])
    double = [t.double() for t in (x, y)]
    assert_mkmmd_matches_reference(triton_loss, *double, alphas=ALPHAS[name])


@pytest.mark.parametrize(
    ("kernel", "learned"),
    [(kernel, "both") for kernel in KERNELS[:4]] + [("gaussian", "betas"), ("laplacian", "alphas")],
)
def test_derivatives_by_alphas_betas_and_bandwidth(kernel, learned):
    x, y = inputs(33, 15, 5, torch.float64)
    alphas = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64, device=DEVICE)
    betas = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, device=DEVICE)
    sigma_sq = torch.tensor(3.0, dtype=torch.float64, device=DEVICE)
    weight = weights(33, torch.float64)
    results = []
    for backend in ("triton", "reference"):
        a, b, s = (t.clone().requires_grad_() for t in (alphas, betas, sigma_sq))
        leaves = {"alphas": (s, a), "betas": (s, b), "both": (s, a, b)}[learned]
        loss = mkmmd_loss(
            x,
            y,
            alphas=a if learned != "betas" else tuple(alphas.tolist()),
            betas=b if learned != "alphas" else None,
            kernel=kernel,
            sigma_sq=s,
            source_weight=weight,
            estimator="biased",
            backend=backend,
        )
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


def test_derivatives_by_alphas_and_betas_in_float32():
    x, y = inputs(40, 30, 150)
    betas = torch.tensor([0.3, 1.0, 2.0], device=DEVICE)
    *_, d_sigma, d_alphas, d_betas = run_op(
        x, y, alphas=(1.0, 0.5, 4.0), betas=betas, per_kernel=True
    )
    alphas = torch.tensor([1.0, 0.5, 4.0], dtype=torch.float64, device=DEVICE, requires_grad=True)
    exact_betas = betas.double().requires_grad_()
    loss = mkmmd_loss_ref(x.double(), y.double(), alphas=alphas, betas=exact_betas)
    wanted = torch.autograd.grad(loss, (alphas, exact_betas))
    assert d_sigma.dtype == torch.float64
    torch.testing.assert_close(d_alphas, wanted[0], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(d_betas, wanted[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("given", [True, False])
def test_cross_estimator(given):
    x, y = inputs(1, 30, 6)
    options = {"estimator": "cross", "source_weight": torch.tensor([0.7], device=DEVICE)}
    options |= {"target_weight": weights(30, torch.float32)}
    options |= {"sigma_sq": torch.tensor(2.0, device=DEVICE)} if given else {}
    exact = exact_mkmmd(x, y, **options)
    value, dx, dy, *_ = run_op(x, y, **options)
    assert value.item() == pytest.approx(exact[0].item(), rel=1e-6)
    assert relative_error(dx, exact[1]) < 1e-5
    assert relative_error(dy, exact[2]) < 1e-5


@pytest.mark.parametrize("sigma_sq", [2.0, 1e-3, 1e4])
def test_bandwidth_gradient(sigma_sq):
    x, y = inputs(30, 25, 7)
    s = torch.tensor([sigma_sq], device=DEVICE, requires_grad=True)
    exact = torch.tensor(s.item(), dtype=torch.float64, device=DEVICE, requires_grad=True)
    mkmmd_loss_ref(x.double(), y.double(), sigma_sq=exact).backward()
    triton_loss(x, y, sigma_sq=s).backward()
    assert s.grad.shape == (1,)
    assert s.grad.item() == pytest.approx(exact.grad.item(), rel=1e-5, abs=1e-9 / sigma_sq)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("row", [0.1, 1e4])
def test_identical_rows(row, dtype):
    x = torch.full((23, 5), row, dtype=dtype, device=DEVICE)
    y = torch.full((31, 5), row, dtype=dtype, device=DEVICE)
    for estimator in ("unbiased", "biased"):
        got = value_and_gradients(triton_loss, x, y, estimator=estimator)
        assert got[0].item() == 0
        assert (got[1] == 0).all()
        assert (got[2] == 0).all()
    tllib = triton_loss(x, x, estimator="tllib")
    assert tllib.item() == pytest.approx(2 / 22)
    given = value_and_gradients(triton_loss, x, y, sigma_sq=2.0)
    assert abs(given[0].item()) < 1e-6
    assert (given[1] == 0).all()
    energy = value_and_gradients(triton_loss, x, y, kernel="energy")
    assert energy[0].item() == 0
    assert (energy[1] == 0).all()


@pytest.mark.parametrize("sigma_sq", [0.0, -1.0, float("nan")])
def test_bandwidth_without_a_positive_value(sigma_sq):
    x, y = inputs(5, 6, 3)
    betas = torch.tensor([1.0, 2.0], device=DEVICE)
    sigma = torch.tensor(sigma_sq, device=DEVICE)
    value, dx, dy, d_sigma, d_alphas, d_betas = run_op(
        x, y, sigma_sq=sigma, betas=betas, alphas=(1.0, 3.0), per_kernel=True
    )
    derivatives = (dx, dy, d_sigma, d_alphas, d_betas)
    if sigma_sq == 0.0:
        assert all((t == 0).all() for t in (value, *derivatives))
    else:
        assert all(t.isnan().all() for t in (value, *derivatives))
    cross = run_op(x, y, sigma_sq=sigma, estimator="cross")[0].item()
    assert cross == 5 * 5 * 6 if sigma_sq == 0.0 else cross != cross


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("sigma_sq", [None, 3.0], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_give_nan(bad, sigma_sq, dtype):
    for which, row in ((0, 0), (1, 24)):
        samples = list(inputs(30, 25, 4, dtype))
        samples[which][row, 2] = bad
        value, dx, dy = value_and_gradients(triton_loss, *samples, sigma_sq=sigma_sq)
        assert value.isnan()
        assert dx.isnan().all()
        assert dy.isnan().all()
        assert triton_loss(*samples, sigma_sq=sigma_sq).isnan()


def test_an_undefined_estimate_is_nan():
    x, y = inputs(5, 6, 3)
    one = torch.tensor([0, 1, 0, 0, 0], dtype=torch.bool, device=DEVICE)
    assert run_op(x, y, source_weight=one)[0].isnan()
    assert not run_op(x, y, source_weight=one, estimator="biased")[0].isnan()


def test_large_grad_output_keeps_half_gradients():
    x, y = inputs(31, 30, 32)
    half = x.half().requires_grad_()
    (triton_loss(half, y) * 65536.0).backward()
    _, exact, _ = exact_mkmmd(x.half(), y)
    assert half.grad.dtype == torch.float16
    # Unscaled, many of these gradients would be subnormal in float16 and lose their digits.
    assert relative_error(half.grad.double() / 65536.0, exact) < 1e-3


def test_autocast_and_second_derivative():
    x, y = inputs(20, 20, 6)
    outside = triton_loss(x, y)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = triton_loss(x, y)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(triton_loss(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


@pytest.mark.parametrize("dim", [24, 150])
def test_same_inputs_same_bits(dim, poisoned_empty):
    n, m = (34, 30) if INTERPRETED else (3001, 2500)
    for dtype in (torch.bfloat16, torch.float32):
        x, y = inputs(n, m, dim, dtype)
        betas = torch.tensor([1.0, 2.0], device=DEVICE)
        results = [run_op(x, y, alphas=(1.0, 3.0), betas=betas, per_kernel=True) for _ in range(2)]
        for first, second in zip(*results, strict=True):
            assert first.isfinite().all()
            assert torch.equal(first, second)


# ---- batched and ragged --------------------------------------------------------------------------


def batch(sizes, dim, dtype=torch.float32, tail=0):
    """Packed rows of problems of the given (n, m), and their offsets."""
    pairs = [make_mkmmd_inputs(n, m, dim, dtype, seed=b) for b, (n, m) in enumerate(sizes)]
    sides = []
    for side in (0, 1):
        rows = torch.cat([pair[side] for pair in pairs] + [torch.full((tail, dim), float("nan"))])
        counts = torch.tensor([0] + [size[side] for size in sizes])
        sides.append((rows.to(dtype).to(DEVICE), counts.cumsum(0).to(DEVICE)))
    (x, x_offsets), (y, y_offsets) = sides
    return x, y, x_offsets, y_offsets


def run_batch(x, y, x_offsets, y_offsets, *, slack=0, **options):
    from padkern.ops.mkmmd.triton_impl import (
        mkmmd_batched_value_grad_triton,
        mkmmd_batched_value_triton,
    )

    args = (
        x,
        y,
        x_offsets,
        y_offsets,
        *(options.get(name) for name in ("sigma_sq", "source_weight", "target_weight")),
        options.get("alphas", DEFAULT_ALPHAS),
        options.get("kernel", "gaussian"),
        options.get("estimator", "unbiased"),
        int(x_offsets.diff().max()) + slack,
        int(y_offsets.diff().max()) + slack,
    )
    return mkmmd_batched_value_triton(*args), *mkmmd_batched_value_grad_triton(*args)


def assert_batch_matches_single_problems(x, y, x_offsets, y_offsets, slack=0, **options):
    alone, value, dx, dy, d_sigma = run_batch(x, y, x_offsets, y_offsets, slack=slack, **options)
    eps = 0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    for b in range(len(value)):
        i, j = (slice(int(o[b]), int(o[b + 1])) for o in (x_offsets, y_offsets))
        single = {"estimator": options.get("estimator", "unbiased")}
        single["kernel"] = options.get("kernel", "gaussian")
        for name, part in (("source_weight", i), ("target_weight", j)):
            if options.get(name) is not None:
                single[name] = options[name][part]
        sigma_sq = options.get("sigma_sq")
        if sigma_sq is not None:
            single["sigma_sq"] = sigma_sq[b]
        want = exact_mkmmd(x[i], y[j], **single)
        if want[0].isnan():
            assert value[b].isnan()
            assert alone[b].isnan()
            assert dx[i].isnan().any()
            continue
        assert value[b].item() == pytest.approx(want[0].item(), abs=5e-6)
        assert alone[b].item() == pytest.approx(want[0].item(), abs=5e-6)
        assert relative_error(dx[i], want[1]) < 1e-5 + eps
        assert relative_error(dy[j], want[2]) < 1e-5 + eps
        if sigma_sq is not None:
            s = sigma_sq[b].double().requires_grad_()
            single["sigma_sq"] = s
            mkmmd_loss_ref(x[i].double(), y[j].double(), **single).backward()
            assert d_sigma[b].item() == pytest.approx(s.grad.item(), rel=1e-4, abs=1e-8)
    return value, dx, dy


SIZES = [(5, 3), (33, 20), (2, 2), (3, 1)]


@pytest.mark.parametrize(
    ("dim", "slack"),
    [(6, 100), (150, 0)] + ([] if INTERPRETED else [(40, 0), (128, 900), (300, 0), (300, 500)]),
)
def test_ragged(dim, slack):
    """Problems of size 1 have no unbiased estimate and disturb no other; max_rows is a bound."""
    assert_batch_matches_single_problems(*batch(SIZES, dim), slack=slack)


@pytest.mark.parametrize("kernel", ["laplacian", "inverse_multiquadric"])
def test_ragged_with_weights_and_bandwidths(kernel):
    x, y, x_offsets, y_offsets = batch(SIZES, 5)
    generator = torch.Generator().manual_seed(3)
    assert_batch_matches_single_problems(
        x,
        y,
        x_offsets,
        y_offsets,
        sigma_sq=torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE),
        source_weight=(torch.rand(x.shape[0], generator=generator) + 0.1).to(DEVICE),
        target_weight=(torch.rand(y.shape[0], generator=generator) + 0.1).to(DEVICE),
        kernel=kernel,
        estimator="biased",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_sizes_in_half_precision(dtype):
    count = 3 if INTERPRETED else 100
    assert_batch_matches_single_problems(*batch([(20, 20)] * count, 33, dtype))


def test_rows_of_no_problem_and_empty_problems():
    x, y, x_offsets, y_offsets = batch([(9, 8), (0, 4), (6, 7)], 4, tail=2)
    _, value, dx, dy, _ = run_batch(x, y, x_offsets, y_offsets)
    assert value.isnan().tolist() == [False, True, False]
    assert (dx[-2:] == 0).all()
    assert dy[8:12].isnan().all()
    assert dx[:15].isfinite().all()
    # Offsets that begin late, and one bandwidth that is not a number.
    sigma_sq = torch.tensor([float("nan"), 2.0], device=DEVICE)
    _, value, dx, *_ = run_batch(x, y, x_offsets[1:], y_offsets[1:], sigma_sq=sigma_sq)
    assert value.isnan().tolist() == [True, False]
    assert (dx[:9] == 0).all()
    assert dx[9:15].isfinite().all()


def test_a_batch_agrees_with_itself_bit_for_bit(poisoned_empty):
    for dim in (6,) if INTERPRETED else (6, 150, 300):
        first, second = (run_batch(*batch(SIZES[:3], dim)) for _ in range(2))
        for got, want in zip(first, second, strict=True):
            assert torch.equal(got, want)


# ---- what only a GPU shows -----------------------------------------------------------------------


def gpu_cases():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for dim in (64, 128, 256, 768):
            yield dtype, dim


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="captures a CUDA graph")
@pytest.mark.parametrize(("dtype", "dim"), list(gpu_cases()), ids=str)
def test_cuda_graph_replays_with_new_inputs(dtype, dim):
    n, m = 1200, 1000
    x, y = inputs(n, m, dim, dtype)
    sigma_sq = torch.tensor(float(dim), device=DEVICE)
    run_op(x, y, sigma_sq=sigma_sq)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_op(x, y, sigma_sq=sigma_sq)
    for seed in (1, 2, 3):
        fresh = inputs(n, m, dim, dtype, seed=seed)
        x.copy_(fresh[0])
        y.copy_(fresh[1])
        sigma_sq.fill_(float(dim + seed))
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, run_op(x, y, sigma_sq=sigma_sq), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA stream")
def test_no_host_synchronisation():
    x, y = inputs(500, 400, 64)
    wide_x, wide_y = inputs(500, 400, 700)
    ragged = batch([(200, 100), (150, 170)], 32)
    sigma_sq = torch.tensor(3.0, device=DEVICE)
    weight = weights(500, torch.float32)
    betas = torch.tensor([1.0, 2.0], device=DEVICE)
    from padkern.ops.mkmmd.triton_impl import mkmmd_batched_value_grad_triton as batched

    def everything():
        run_op(x, y, sigma_sq=sigma_sq, source_weight=weight)
        run_op(wide_x, wide_y, betas=betas, alphas=(1.0, 2.0), per_kernel=True)
        run_op(x, y, alphas_tensor=betas)
        batched(*ragged, None, None, None, DEFAULT_ALPHAS, "gaussian", "unbiased", 200, 170)

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA stream")
def test_runs_on_the_current_stream():
    x, y = inputs(600, 600, 64)
    expected = run_op(x, y)
    stream = torch.cuda.Stream()
    late = torch.empty_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        got = run_op(late, y)
    stream.synchronize()
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="large")
@pytest.mark.parametrize("dim", [16, 64, 128, 256, 1024])
@pytest.mark.parametrize("n", [100, 700, 4096])
def test_accuracy_of_the_float32_class(n, dim):
    """Loss within 1e-6 per kernel, gradients within 1e-5, with tensor cores' own accumulation."""
    x, y = inputs(n, n, dim)
    exact = exact_mkmmd(x, y)
    value, dx, dy, *_ = run_op(x, y)
    assert abs(value.item() - exact[0].item()) < 1e-6 * len(DEFAULT_ALPHAS)
    assert relative_error(dx, exact[1]) < 1e-5
    assert relative_error(dy, exact[2]) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="large")
@pytest.mark.parametrize("dim", [64, 128, 256, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_no_worse_than_eager(dtype, dim):
    x, y = inputs(1500, 1400, dim, dtype)
    exact = exact_mkmmd(x, y)

    def eager(a, b):
        z = torch.cat([a, b])
        squares = z.square().sum(1)
        d = (squares[:, None] + squares[None, :] - 2 * z @ z.T).clamp(min=0)
        bandwidth = d.detach().mean()
        k = sum(torch.exp(-d / (2 * alpha * bandwidth)) for alpha in DEFAULT_ALPHAS)
        n, m = a.shape[0], b.shape[0]
        k = k - torch.diag_embed(torch.diagonal(k))
        same = k[:n, :n].sum() / (n * (n - 1)) + k[n:, n:].sum() / (m * (m - 1))
        return same - 2 * k[:n, n:].mean()

    naive = value_and_gradients(eager, x, y)
    value, dx, dy, *_ = run_op(x, y)
    error = abs(value.item() - exact[0].item())
    assert error < 1e-4 * len(DEFAULT_ALPHAS)
    assert error <= abs(naive[0].item() - exact[0].item()) + 1e-6
    for got, bad, want in zip((dx, dy), naive[1:], exact[1:], strict=True):
        assert relative_error(got, want) < 1e-2
        assert not relative_error(got, want) > relative_error(bad, want)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="measures device memory")
@pytest.mark.parametrize("dim", [64, 128, 1024])
def test_memory_is_linear_in_the_rows(dim):
    """Whatever the rows: at most 6 times the inputs, and the panels' fixed budget."""
    x, y = inputs(16384, 16384, dim)
    run_op(x, y)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_op(x, y)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 6 * (x.nbytes + y.nbytes) + 64 * 2**20
