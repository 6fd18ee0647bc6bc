"""Permutation test, variance, power and witness: laws of the definitions, errors, backends."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from padkern import (
    MKMMDTest,
    mkmmd_power,
    mkmmd_test,
    mkmmd_variance,
    mkmmd_witness,
    two_sample,
)
from padkern.ops.kernel_products.op import kernel_quadratic
from padkern.ops.mkmmd.reference import KERNELS, kernel_distances, kernel_sum, mkmmd_loss_ref
from padkern.testing import make_mkmmd_inputs, relative_error

DEFAULT = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)


@pytest.fixture(params=["native", "blocked", "reference"])
def backend(request):
    """Every backend of the two-sample statistics."""
    if request.param == "native":
        request.getfixturevalue("native_core")
    return request.param


# ---- permutation test ----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_statistic_is_the_loss(kernel, estimator, backend):
    options = {"kernel": kernel, "estimator": estimator}
    if kernel != "energy":
        options |= {"betas": [1.0, 0.5, 2.0], "alphas": [0.3, 1.0, 2.0]}
    for sigma_sq in (None,) if kernel == "energy" else (None, "median", 3.0, torch.tensor(2.5)):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
            x, y = make_mkmmd_inputs(31, 58, 6, dtype)
            result = mkmmd_test(x, y, permutations=9, sigma_sq=sigma_sq, backend=backend, **options)
            given = sigma_sq.double() if isinstance(sigma_sq, torch.Tensor) else sigma_sq
            expected = mkmmd_loss_ref(x.double(), y.double(), sigma_sq=given, **options)
            assert isinstance(result, MKMMDTest)
            assert result.statistic == pytest.approx(float(expected), abs=tolerance)
            assert result.null.shape == (9,)
            assert result.null.dtype == torch.float64


@pytest.mark.parametrize("name", ["native", "blocked"])
@pytest.mark.parametrize("sizes", [(3, 4), (4, 4), (2, 6)])
def test_every_labelling_of_a_small_pool(sizes, name, native_core):
    n, m = sizes
    x, y = make_mkmmd_inputs(n, m, 3, torch.float64)
    pool = torch.cat([x, y])
    subsets = list(itertools.combinations(range(n + m), n))
    members = torch.zeros(n + m, len(subsets), dtype=torch.bool)
    expected = []
    for p, subset in enumerate(subsets):
        members[list(subset), p] = True
        rest = [i for i in range(n + m) if i not in subset]
        expected.append(float(mkmmd_loss_ref(pool[list(subset)], pool[rest], sigma_sq=2.0)))
    args = (torch.tensor(2.0), DEFAULT, None, "gaussian", name)
    xx, linear, row_sums = kernel_quadratic(pool, members, *args)
    xy = linear - xx
    yy = row_sums.sum() - xx - 2 * xy
    got = xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)
    expected_values = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, expected_values, rtol=0, atol=1e-12)
    # The exact p-value is what random labellings approach.
    exact = sum(value >= expected[0] - 1e-12 for value in expected) / len(expected)
    result = mkmmd_test(x, y, permutations=2000, sigma_sq=2.0, backend=name)
    assert result.p_value == pytest.approx(exact, abs=4 * math.sqrt(0.25 / 2000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_count(dtype, backend):
    # Three labellings up to exchange of equal rows: 0, 1 or 2 of the two ones in the source.
    x = torch.tensor([[1.0], [1.0], [0.0]], dtype=dtype)
    y = torch.zeros(5, 1, dtype=dtype)
    result = mkmmd_test(x, y, permutations=500, sigma_sq=0.7, backend=backend)
    tied = (result.null - result.statistic).abs() < 1e-5
    assert 20 < int(tied.sum()) < 120
    assert result.p_value == (1 + int(tied.sum())) / 501
    # n = m: a labelling and its complement have one value.
    x, y = make_mkmmd_inputs(2, 2, 3, dtype)
    result = mkmmd_test(x, y, permutations=300, sigma_sq=1.0, backend=backend)
    assert (result.null * 1e4).round().unique().numel() == 3
    tied = int(((result.null - result.statistic).abs() < 1e-5).sum())
    assert 60 < tied < 140
    assert result.p_value >= (1 + tied) / 301


def test_all_rows_identical(backend):
    x = torch.full((7, 3), 0.1)
    for sigma_sq in (None, 2.0):
        result = mkmmd_test(x, x[:4], permutations=50, sigma_sq=sigma_sq, backend=backend)
        assert abs(result.statistic) < 1e-6
        assert result.p_value == 1.0


def test_p_values_are_uniform_without_a_difference(native_core):
    generator = torch.Generator().manual_seed(3)
    p_values = []
    for seed in range(300):
        pool = torch.randn(33, 3, generator=generator)
        result = mkmmd_test(pool[:18], pool[18:], permutations=199, seed=seed)
        p_values.append(result.p_value)
    ordered = torch.tensor(p_values).sort().values
    steps = torch.arange(1, 301) / 300
    distance = max(float((steps - ordered).max()), float((ordered - steps + 1 / 300).max()))
    assert distance < 1.63 / math.sqrt(300)  # Kolmogorov-Smirnov at the level 0.01
    assert min(p_values) >= 1 / 200


def test_power_under_a_shift(native_core):
    rejected = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(60, 4, generator=generator)
        y = torch.randn(50, 4, generator=generator) + 0.8
        rejected += mkmmd_test(x, y, permutations=199, seed=seed).p_value <= 0.05
    assert rejected >= 19
    x, y = make_mkmmd_inputs(200, 200, 8)
    assert mkmmd_test(x, y, permutations=99).p_value == 1 / 100


def test_the_seed_fixes_the_test_on_every_backend(native_core, restore_threads):
    x, y = make_mkmmd_inputs(40, 30, 5, torch.float64)
    first = mkmmd_test(x, y, permutations=50, seed=7, backend="native")
    for name in ("blocked", "reference"):
        other = mkmmd_test(x, y, permutations=50, seed=7, backend=name)
        torch.testing.assert_close(other.null, first.null, rtol=0, atol=1e-12)
        assert other.p_value == first.p_value
    assert not torch.equal(first.null, mkmmd_test(x, y, permutations=50, seed=8).null)
    # More permutations continue the same sequence; other random draws do not disturb it.
    torch.manual_seed(123)
    longer = mkmmd_test(x, y, permutations=80, seed=7, backend="native")
    assert torch.equal(longer.null[:50], first.null)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        again = mkmmd_test(x, y, permutations=50, seed=7, backend="native")
        assert torch.equal(again.null, first.null)
        assert again.statistic == first.statistic


def test_without_the_core_the_labellings_are_the_same(native_core, monkeypatch):
    x, y = make_mkmmd_inputs(12, 15, 3, torch.float64)
    expected = mkmmd_test(x, y, permutations=30)
    monkeypatch.setattr(two_sample._backends, "native_reason", lambda: "blocked")
    got = mkmmd_test(x, y, permutations=30)
    torch.testing.assert_close(got.null, expected.null, rtol=0, atol=1e-12)


def test_the_estimators_order_labellings_alike_for_equal_sizes(backend):
    x, y = make_mkmmd_inputs(25, 25, 4)
    unbiased = mkmmd_test(x + 1.0, y, permutations=200, backend=backend)
    biased = mkmmd_test(x + 1.0, y, permutations=200, estimator="biased", backend=backend)
    assert unbiased.p_value == biased.p_value


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf(bad, backend):
    x, y = make_mkmmd_inputs(50, 60, 4)
    y[17, 2] = bad
    for sigma_sq in (None, 3.0, "median"):
        result = mkmmd_test(x, y, permutations=10, sigma_sq=sigma_sq, backend=backend)
        assert math.isnan(result.statistic)
        assert math.isnan(result.p_value)
        assert result.null.isnan().all()
        for estimator in ("unbiased", "first_order"):
            options = {"sigma_sq": sigma_sq, "estimator": estimator, "backend": backend}
            assert mkmmd_variance(x, y, **options).isnan()
        assert mkmmd_power(x, y, sigma_sq=sigma_sq, backend=backend).isnan()
        assert mkmmd_witness(x, x, y, sigma_sq=sigma_sq, backend=backend).isnan().all()


def test_half_strided_and_gradient_inputs(backend):
    x, y = make_mkmmd_inputs(33, 40, 6)
    wide = torch.full((66, 12), float("nan"), dtype=torch.float16)
    wide[::2, ::2] = x.half()
    strided = wide[::2, ::2]
    options = {"permutations": 20, "backend": backend}
    expected = mkmmd_test(x.half().float(), y.bfloat16().float(), **options)
    got = mkmmd_test(strided, y.bfloat16().requires_grad_(), **options)
    assert got.statistic == pytest.approx(expected.statistic, abs=1e-6)
    assert not got.null.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mkmmd_test(x, y, **options)
        variance = mkmmd_variance(x, y, backend=backend)
    assert inside.statistic == pytest.approx(mkmmd_test(x, y, **options).statistic, abs=1e-6)
    assert variance.item() == pytest.approx(mkmmd_variance(x, y, backend=backend).item(), rel=1e-5)


def test_alphas_and_betas_may_be_tensors(backend):
    x, y = make_mkmmd_inputs(20, 25, 3, torch.float64)
    numbers = mkmmd_test(x, y, alphas=[0.5, 1.0], betas=[1.0, 3.0], backend=backend)
    tensors = mkmmd_test(
        x, y, alphas=torch.tensor([0.5, 1.0]), betas=torch.tensor([1.0, 3.0]), backend=backend
    )
    assert numbers.statistic == pytest.approx(tensors.statistic, abs=1e-14)


# ---- variance and power --------------------------------------------------------------------------


def _brute_force_variance(x, y, sigma_sq):
    """The unbiased estimate from its definition: means over tuples of distinct rows."""

    def k(a, b):
        return float(kernel_sum((a - b).square().sum(), DEFAULT, torch.tensor(sigma_sq).double()))

    n, m = len(x), len(y)
    xy = [[k(a, b) for b in y] for a in x]

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    def tuples(count, size):
        return itertools.permutations(range(count), size)

    total = 0.0
    for own, count, cross in ((x, n, xy), (y, m, [list(c) for c in zip(*xy, strict=True)])):
        g = [[k(a, b) for b in own] for a in own]
        other = len(cross[0])
        r = mean(g[a][b] * g[c][d] for a, b, c, d in tuples(count, 4))
        p = mean(g[a][b] * g[a][c] for a, b, c in tuples(count, 3))
        q = mean(g[a][b] ** 2 for a, b in tuples(count, 2))
        total += (4 * (count - 2) * (p - r) + 2 * (q - r)) / (count * (count - 1))
        covariance = mean(g[a][b] * cross[a][j] for a, b in tuples(count, 2) for j in range(other))
        covariance -= mean(
            g[a][b] * cross[c][j] for a, b, c in tuples(count, 3) for j in range(other)
        )
        total -= 8 * covariance / count
    apart = mean(xy[a][i] * xy[b][j] for a, b in tuples(n, 2) for i, j in tuples(m, 2))
    by_x = mean(xy[a][i] * xy[a][j] for a in range(n) for i, j in tuples(m, 2)) - apart
    by_y = mean(xy[a][i] * xy[b][i] for a, b in tuples(n, 2) for i in range(m)) - apart
    same = mean(value**2 for row in xy for value in row) - apart
    return total + 4 * ((m - 1) * by_x + (n - 1) * by_y + same) / (n * m)


@pytest.mark.parametrize("sizes", [(4, 4), (4, 6), (7, 5)])
def test_variance_by_definition(sizes, backend):
    x, y = make_mkmmd_inputs(*sizes, 3, torch.float64)
    got = mkmmd_variance(x, y, sigma_sq=2.0, backend=backend)
    assert got.item() == pytest.approx(_brute_force_variance(x, y, 2.0), abs=1e-12)
    got = mkmmd_variance(x.float(), y.float(), sigma_sq=2.0, backend=backend)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(_brute_force_variance(x, y, 2.0), abs=2e-5)


@pytest.mark.parametrize("target", [(0.4, 0.6), (0.7, 0.3)], ids=["different", "equal"])
@pytest.mark.parametrize("sizes", [(4, 4), (4, 5)])
def test_the_expected_variance_estimate_is_the_variance(sizes, target, native_core):
    # Over all samples of two points, each with its probability: no sampling error.
    n, m = sizes
    points = torch.tensor([[0.0, 0.0], [1.0, 0.3]], dtype=torch.float64)
    first = second = estimate = 0.0
    for choice in itertools.product(range(2), repeat=n + m):
        weight = math.prod((0.7, 0.3)[c] for c in choice[:n])
        weight *= math.prod(target[c] for c in choice[n:])
        rows = points[list(choice)]
        value = float(mkmmd_loss_ref(rows[:n], rows[n:], sigma_sq=1.0))
        first += weight * value
        second += weight * value**2
        estimate += weight * float(mkmmd_variance(rows[:n], rows[n:], sigma_sq=1.0))
    assert estimate == pytest.approx(second - first**2, rel=1e-10)


def test_variance_matches_the_spread_of_many_draws(native_core):
    generator = torch.Generator().manual_seed(0)
    values, unbiased, first_order = [], [], []
    for _ in range(400):
        x = torch.randn(60, 2, generator=generator, dtype=torch.float64)
        y = 1.3 * torch.randn(80, 2, generator=generator, dtype=torch.float64) + 0.5
        values.append(mkmmd_loss_ref(x, y, sigma_sq=4.0))
        unbiased.append(mkmmd_variance(x, y, sigma_sq=4.0))
        first_order.append(mkmmd_variance(x, y, sigma_sq=4.0, estimator="first_order"))
    spread = float(torch.stack(values).var())
    # A sample variance of 400 draws has a standard error of about 7 %.
    assert float(torch.stack(unbiased).mean()) == pytest.approx(spread, rel=0.25)
    assert float(torch.stack(first_order).mean()) == pytest.approx(spread, rel=0.3)


def test_first_order_variance_is_not_negative_and_power_is_its_ratio(backend):
    x, y = make_mkmmd_inputs(30, 20, 4, torch.float64)
    options = {"sigma_sq": 5.0, "backend": backend}
    variance = mkmmd_variance(x, y, estimator="first_order", **options)
    assert variance > 0
    # The witness without a row's own kernel value, on each sample.
    k = {"alphas": DEFAULT, "sigma_sq": torch.tensor(5.0).double()}
    pool = torch.cat([x, y])
    values = kernel_sum(kernel_distances(pool, pool, "gaussian"), **k).fill_diagonal_(0)
    on_x = values[:30, :30].sum(1) / 29 - values[:30, 30:].mean(1)
    on_y = values[30:, 30:].sum(1) / 19 - values[30:, :30].mean(1)
    torch.testing.assert_close(variance, 4 * (on_x.var() / 30 + on_y.var() / 20))
    loss = mkmmd_loss_ref(x, y, sigma_sq=5.0)
    power = mkmmd_power(x, y, eps=1e-3, **options)
    torch.testing.assert_close(power, loss / (variance + 1e-3).sqrt())
    same = torch.ones(5, 2)
    assert mkmmd_power(same, same, backend=backend).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["native", "blocked"])
@pytest.mark.parametrize("kernel", ["gaussian", "rational_quadratic"])
def test_gradients_of_power_and_variance(kernel, name, native_core):
    x, y = make_mkmmd_inputs(7, 6, 3, torch.float64, requires_grad=True)
    sigma = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for function in (
        lambda backend: mkmmd_power(x, y, sigma_sq=sigma, kernel=kernel, backend=backend),
        lambda backend: mkmmd_variance(x, y, sigma_sq=sigma, kernel=kernel, backend=backend),
        lambda backend: mkmmd_variance(
            x, y, sigma_sq=sigma, kernel=kernel, estimator="first_order", backend=backend
        ),
    ):
        got = torch.autograd.grad(function(name), (x, y, sigma))
        want = torch.autograd.grad(function("reference"), (x, y, sigma))
        for g, w in zip(got, want, strict=True):
            assert relative_error(g, w) < 1e-10


def test_learned_betas_go_to_the_reference(native_core):
    x, y = make_mkmmd_inputs(9, 8, 3, torch.float64)
    betas = torch.ones(5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mkmmd_power(x, y, betas=betas), betas)
    assert gradient.abs().sum() > 0
    with pytest.raises(RuntimeError, match="betas requires a gradient"):
        mkmmd_power(x, y, betas=betas, backend="native")
    assert mkmmd_test(x, y, betas=betas, permutations=5, backend="native").p_value > 0
    with pytest.raises(ValueError, match="alphas must not require a gradient"):
        mkmmd_power(x, y, alphas=torch.ones(2, requires_grad=True))


# ---- witness -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_witness(kernel, backend):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x, y = make_mkmmd_inputs(55, 70, 6, dtype)
        query = torch.cat([x[:3] + 0.5, y[:4] - 0.5])
        sigma = torch.tensor(4.0).double()
        alphas = (1.0,) if kernel == "energy" else DEFAULT
        given = {} if kernel == "energy" else {"sigma_sq": 4.0}
        got = mkmmd_witness(query, x, y, kernel=kernel, backend=backend, **given)

        def mean(sample, query=query, alphas=alphas, sigma=sigma):
            d = kernel_distances(query.double(), sample.double(), kernel)
            return kernel_sum(d, alphas, sigma, kernel).mean(1)

        expected = mean(x) - mean(y)
        assert got.dtype == dtype
        assert float((got - expected).abs().max()) < tolerance * max(
            1.0, float(mean(x).abs().max())
        )


def test_witness_means_give_the_biased_loss(backend):
    x, y = make_mkmmd_inputs(40, 30, 5, torch.float64)
    pool = torch.cat([x, y])
    values = mkmmd_witness(pool, x, y, backend=backend)
    expected = mkmmd_loss_ref(x, y, estimator="biased")
    torch.testing.assert_close(values[:40].mean() - values[40:].mean(), expected)


@pytest.mark.parametrize("sigma_sq", [None, 3.0, "median"])
def test_witness_weights_and_masks(sigma_sq, backend):
    x, y = make_mkmmd_inputs(20, 16, 4, torch.float64)
    query = x[:5] + 0.1
    options = {"sigma_sq": sigma_sq, "backend": backend}
    keep = torch.arange(20) % 3 != 0
    dirty = torch.where(keep[:, None], x + 100, float("nan"))
    expected = mkmmd_witness(query + 100, x[keep] + 100, y + 100, **options)
    got = mkmmd_witness(query + 100, dirty, y + 100, source_weight=keep, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    counts = torch.arange(16) % 3 + 1.0
    if sigma_sq != "median":  # its pairs are of different rows
        repeated = mkmmd_witness(query, x, y.repeat_interleave(counts.long(), 0), **options)
        got = mkmmd_witness(query, x, y, target_weight=counts, **options)
        torch.testing.assert_close(got, repeated, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ["gaussian", "rational_quadratic"])
def test_witness_gradients(kernel, backend):
    x, y = make_mkmmd_inputs(6, 5, 3, torch.float64, requires_grad=True)
    query = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64) + 0.5
    weight[2] = 0
    sigma = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def run(q, x, y, s):
        return mkmmd_witness(
            q, x, y, sigma_sq=s, kernel=kernel, source_weight=weight, backend=backend
        )

    assert torch.autograd.gradcheck(run, (query, x, y, sigma))
    single = query.detach().float().requires_grad_()
    out = mkmmd_witness(single, x.float(), y.float(), kernel=kernel, backend=backend)
    (got,) = torch.autograd.grad(out.sum(), single)
    out = mkmmd_witness(query, x, y, kernel=kernel, backend="reference")
    (want,) = torch.autograd.grad(out.sum(), query)
    assert relative_error(got, want) < 1e-5
