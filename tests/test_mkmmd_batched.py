"""Batched MK-MMD: every backend against a loop of the reference, and the laws of a batch."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from padkern import mkmmd_loss, mkmmd_loss_batched
from padkern.ops.mkmmd.reference import KERNELS, mkmmd_loss_ref
from padkern.ops.mkmmd_batched import op  # noqa: F401 - registers the ops
from padkern.testing import MKMMD_TOLERANCES, make_mkmmd_inputs, relative_error

# (source rows, target rows) of each problem: sizes 1 and 2, one block and several, unequal.
RAGGED = [(2, 2), (7, 3), (1, 1), (49, 97), (2, 130), (3, 1), (100, 2), (13, 13)]
PAIRED = [(n, m) for n, m in RAGGED if min(n, m) > 1]


def _offsets(sizes, dtype=torch.int64):
    return torch.tensor([0, *sizes]).cumsum(0).to(dtype)


def _ragged(sizes, dim, dtype=torch.float64, seed=0):
    """Packed rows and offsets of both samples."""
    problems = [
        make_mkmmd_inputs(n, m, dim, dtype, seed=seed + i) for i, (n, m) in enumerate(sizes)
    ]
    source, target = (torch.cat([p[i] for p in problems]) for i in (0, 1))
    return source, target, _offsets([n for n, _ in sizes]), _offsets([m for _, m in sizes])


def _loop(source, target, source_offsets, target_offsets, factors, **options):
    """Values and gradients of sum_b factors_b loss_b, problem by problem, in float64."""
    x = source.detach().double().requires_grad_()
    y = target.detach().double().requires_grad_()
    sigma_sq = options.pop("sigma_sq", None)
    weights = [options.pop(name, None) for name in ("source_weight", "target_weight")]
    values = []
    cuts = zip(
        source_offsets[:-1],
        source_offsets[1:],
        target_offsets[:-1],
        target_offsets[1:],
        strict=True,
    )
    for b, (s0, s1, t0, t1) in enumerate(cuts):
        own = sigma_sq[b] if isinstance(sigma_sq, torch.Tensor) and sigma_sq.dim() else sigma_sq
        values.append(
            mkmmd_loss_ref(
                x[s0:s1],
                y[t0:t1],
                sigma_sq=own,
                source_weight=None if weights[0] is None else weights[0][s0:s1].double(),
                target_weight=None if weights[1] is None else weights[1][t0:t1].double(),
                **options,
            )
        )
    values = torch.stack(values)
    return values.detach(), *torch.autograd.grad((values * factors.double()).sum(), (x, y))


def _run(source, target, factors, **options):
    x, y = source.detach().requires_grad_(), target.detach().requires_grad_()
    values = mkmmd_loss_batched(x, y, **options)
    return values.detach(), *torch.autograd.grad(values, (x, y), factors.to(values.dtype))


def _assert_close(got, want, dtypes):
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    tolerance = MKMMD_TOLERANCES[dtype]
    assert got[0].dtype == dtype
    limit = tolerance.loss * want[0].abs().clamp(min=1)
    assert ((got[0].double() - want[0]).abs() <= limit).all()
    for gradient, exact, sample_dtype in zip(got[1:], want[1:], dtypes, strict=True):
        assert gradient.dtype == sample_dtype
        rounding = 0.0 if sample_dtype == dtype else torch.finfo(sample_dtype).eps
        exact = exact.reshape(gradient.shape)
        assert relative_error(gradient, exact) <= tolerance.gradient + rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_ragged_equals_a_loop(estimator, dtype, backend, poisoned_empty):
    sizes = PAIRED if estimator == "unbiased" else RAGGED
    source, target, s_off, t_off = _ragged(sizes, 9, dtype)
    factors = torch.linspace(-1, 2, len(sizes))
    want = _loop(source, target, s_off, t_off, factors, estimator=estimator)
    for index_dtype in (torch.int32, torch.int64):
        got = _run(
            source,
            target,
            factors,
            source_offsets=s_off.to(index_dtype),
            target_offsets=t_off.to(index_dtype),
            estimator=estimator,
            backend=backend,
        )
        _assert_close(got, want, (dtype, dtype))


@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 1), (3, 7, 5, 8), (4, 50, 130, 17), (2, 1, 3, 4)], ids=str
)
def test_equal_sizes_equal_a_loop(shape, backend, poisoned_empty):
    problems, n, m, dim = shape
    estimator = "unbiased" if min(n, m) > 1 else "biased"
    pairs = [make_mkmmd_inputs(n, m, dim, seed=b) for b in range(problems)]
    source, target = (torch.stack([p[i] for p in pairs]) for i in (0, 1))
    factors = torch.arange(1.0, problems + 1)
    packed = (source.reshape(-1, dim), target.reshape(-1, dim))
    cuts = (_offsets([n] * problems), _offsets([m] * problems))
    want = _loop(*packed, *cuts, factors, estimator=estimator)
    got = _run(source, target, factors, estimator=estimator, backend=backend)
    _assert_close(got, want, (torch.float32, torch.float32))


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(kernel, backend):
    source, target, s_off, t_off = _ragged(PAIRED, 5)
    factors = torch.linspace(1, 2, len(PAIRED))
    alphas = (1.0,) if kernel == "energy" else (0.3, 1.0, 2.0)
    given = {} if kernel == "energy" else {"alphas": alphas}
    want = _loop(source, target, s_off, t_off, factors, kernel=kernel, alphas=alphas)
    got = _run(
        source,
        target,
        factors,
        source_offsets=s_off,
        target_offsets=t_off,
        kernel=kernel,
        backend=backend,
        **given,
    )
    _assert_close(got, want, (torch.float64, torch.float64))


def test_tllib_estimator(backend):
    sizes = [(5, 5), (2, 2), (60, 60)]
    source, target, s_off, t_off = _ragged(sizes, 4)
    factors = torch.ones(3)
    want = _loop(source, target, s_off, t_off, factors, estimator="tllib")
    got = _run(
        source,
        target,
        factors,
        source_offsets=s_off,
        target_offsets=t_off,
        estimator="tllib",
        backend=backend,
    )
    _assert_close(got, want, (torch.float64, torch.float64))


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float64),
    ],
    ids=str,
)
def test_half_and_mixed_dtypes(dtypes, backend):
    source, target, s_off, t_off = _ragged(PAIRED, 12)
    source, target = source.to(dtypes[0]), target.to(dtypes[1])
    factors = torch.linspace(1, 2, len(PAIRED))
    want = _loop(source, target, s_off, t_off, factors)
    got = _run(source, target, factors, source_offsets=s_off, target_offsets=t_off, backend=backend)
    _assert_close(got, want, dtypes)


@pytest.mark.parametrize("kind", ["float64", "float16", "bool", "strided"])
def test_weights(kind, backend):
    sizes = [(9, 12), (30, 4), (50, 61)]
    source, target, s_off, t_off = _ragged(sizes, 6)
    weights = [torch.rand(len(rows), dtype=torch.float64) * 3 + 0.1 for rows in (source, target)]
    for weight in weights:
        weight[3::5] = 0
    if kind == "bool":
        weights = [weight > 1e-9 for weight in weights]
    elif kind == "float16":
        weights = [weight.half() for weight in weights]
    elif kind == "strided":
        weights = [torch.stack([weight, -weight], 1)[:, 0] for weight in weights]
    factors = torch.tensor([1.0, -2.0, 0.5])
    options = {"source_weight": weights[0], "target_weight": weights[1]}
    want = _loop(source, target, s_off, t_off, factors, **options)
    got = _run(
        source,
        target,
        factors,
        source_offsets=s_off,
        target_offsets=t_off,
        backend=backend,
        **options,
    )
    _assert_close(got, want, (torch.float64, torch.float64))


def test_weights_of_equal_sizes_and_nan_rows_under_a_mask(backend):
    source, target = torch.randn(3, 8, 4, dtype=torch.float64), torch.randn(3, 6, 4).double()
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[0, 2] = mask[2, 5:] = False
    dirty = torch.where(mask[..., None], source, float("nan"))
    got = mkmmd_loss_batched(dirty, target, source_weight=mask, backend=backend)
    want = [mkmmd_loss_ref(source[b][mask[b]], target[b]).item() for b in range(3)]
    assert got.tolist() == pytest.approx(want, abs=1e-13)
    # The same mask, expanded and with the batch as its last stride.
    columns = mask.t().contiguous().t()
    again = mkmmd_loss_batched(dirty, target, source_weight=columns, backend=backend)
    assert torch.equal(again, got)


@pytest.mark.parametrize("form", ["float", "scalar", "one", "vector"])
def test_bandwidths(form, backend):
    source, target, s_off, t_off = _ragged([(5, 7), (20, 3), (6, 6)], 5)
    factors = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    values = torch.tensor([2.0, 3.5, 0.7], dtype=torch.float64)
    sigma_sq = {
        "float": 2.5,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "one": torch.tensor([2.5]),
        "vector": values,
    }[form]
    gradients, losses = [], []
    for which in ("reference", backend):
        sigma = sigma_sq
        if isinstance(sigma, torch.Tensor):
            sigma = sigma.clone().requires_grad_()
        loss = mkmmd_loss_batched(
            source,
            target,
            source_offsets=s_off,
            target_offsets=t_off,
            sigma_sq=sigma,
            backend=which,
        )
        losses.append(loss.detach())
        if isinstance(sigma, torch.Tensor):
            (gradient,) = torch.autograd.grad(loss, sigma, factors)
            assert gradient.shape == sigma.shape
            assert gradient.dtype == sigma.dtype
            gradients.append(gradient)
    own = values if form == "vector" else 2.5
    want = _loop(source, target, s_off, t_off, factors, sigma_sq=own)[0]
    for loss in losses:
        assert loss.tolist() == pytest.approx(want.tolist(), abs=1e-12)
    if gradients:
        assert relative_error(gradients[1], gradients[0]) < 1e-7 * (form == "one") + 1e-10


def test_degenerate_bandwidths_stay_in_their_problem(backend):
    source, target = make_mkmmd_inputs(5, 6, 3)
    source, target = (t.expand(4, *t.shape) for t in (source, target))
    sigma = torch.tensor([1.0, 0.0, -1.0, float("nan")])
    x = source.detach().clone().requires_grad_()
    value = mkmmd_loss_batched(x, target, sigma_sq=sigma, backend=backend)
    (gradient,) = torch.autograd.grad(value, x, torch.ones(4))
    single = mkmmd_loss(source[0], target[0], sigma_sq=1.0, backend=backend)
    assert value[0].item() == pytest.approx(single.item(), abs=1e-7)
    assert abs(value[1].item()) < 1e-6
    assert (gradient[1] == 0).all()
    assert value[2:].isnan().all()
    assert torch.isfinite(gradient[0]).all()


def test_nan_stays_in_its_problem(backend):
    source, target, s_off, t_off = _ragged([(5, 7), (20, 3), (6, 6)], 5)
    source[7, 1] = float("nan")
    x = source.requires_grad_()
    value = mkmmd_loss_batched(
        x, target, source_offsets=s_off, target_offsets=t_off, backend=backend
    )
    assert value.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(value, x, torch.ones(3, dtype=torch.float64))
    rows = gradient.isnan().any(1)
    assert not rows[:5].any()
    assert rows[5:25].any()
    assert not rows[25:].any()


def test_layouts_change_no_bit(native_core):
    pairs = [make_mkmmd_inputs(11, 9, 6, seed=b) for b in range(5)]
    source, target = (torch.stack([p[i] for p in pairs]) for i in (0, 1))
    factors = torch.arange(1.0, 6)
    expected = _run(source, target, factors, backend="native")
    for order in ((0, 2, 1), (1, 0, 2), (2, 1, 0)):
        view = source.permute(order).contiguous().permute([order.index(i) for i in range(3)])
        assert torch.equal(view, source)
        assert not view.is_contiguous()
        for g, e in zip(_run(view, target, factors, backend="native"), expected, strict=True):
            assert torch.equal(g, e)
    packed = _run(
        source.reshape(-1, 6),
        target.reshape(-1, 6),
        factors,
        source_offsets=_offsets([11] * 5),
        target_offsets=_offsets([9] * 5),
        backend="native",
    )
    for g, e in zip(packed, expected, strict=True):
        assert torch.equal(g, e.reshape(g.shape))


def test_expanded_batch(backend):
    source, target = make_mkmmd_inputs(8, 9, 4, torch.float64)
    shared = source.clone().requires_grad_()
    targets = torch.stack([target, target + 1, target * 2])
    value = mkmmd_loss_batched(shared.expand(3, 8, 4), targets, backend=backend)
    want = [mkmmd_loss_ref(source, t).item() for t in targets]
    assert value.tolist() == pytest.approx(want, abs=1e-13)
    (gradient,) = torch.autograd.grad(value.sum(), shared)
    exact = source.clone().requires_grad_()
    sum(mkmmd_loss_ref(exact, t) for t in targets).backward()
    assert relative_error(gradient, exact.grad) < 1e-12


@pytest.mark.parametrize("large", [False, True])
def test_thread_count_changes_no_bit(large, native_core, restore_threads):
    sizes = [(3 + 7 * i % 90, 2 + 11 * i % 70) for i in range(300)]
    if large:  # one problem that runs alone, on all threads
        sizes[17] = (900, 1100)
    source, target, s_off, t_off = _ragged(sizes, 24, torch.float32)
    factors = torch.linspace(-1, 1, len(sizes))
    results = []
    for threads in (1, 2, 4, 2, 1):
        torch.set_num_threads(threads)
        results.append(
            _run(
                source,
                target,
                factors,
                source_offsets=s_off,
                target_offsets=t_off,
                backend="native",
            )
        )
    for other in results[1:]:
        for got, first in zip(other, results[0], strict=True):
            assert torch.equal(got, first)
    single = mkmmd_loss(source[: s_off[1]], target[: t_off[1]], backend="native")
    assert single.item() == results[0][0][0].item()


def test_gradcheck(backend):
    source, target, s_off, t_off = _ragged([(3, 2), (4, 5)], 3)
    sigma_sq = torch.tensor([2.3, 1.1], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0], dtype=torch.float64)
    for estimator in ("unbiased", "biased"):

        def run(x, y, s, estimator=estimator):
            return mkmmd_loss_batched(
                x,
                y,
                source_offsets=s_off,
                target_offsets=t_off,
                sigma_sq=s,
                estimator=estimator,
                source_weight=weight,
                backend=backend,
            )

        inputs = (source.requires_grad_(), target.requires_grad_(), sigma_sq)
        assert torch.autograd.gradcheck(run, inputs)


def test_second_derivatives_are_refused_by_native(native_core):
    x, y = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 5, 3)
    (dx,) = torch.autograd.grad(
        mkmmd_loss_batched(x, y, backend="native").sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


def test_second_derivatives_of_the_reference():
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, 2, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x: mkmmd_loss_batched(x, y, sigma_sq=1.5, backend="reference"), (x,)
    )


def test_large_grad_output_keeps_half_gradients(backend):
    x, y = torch.randn(2, 300, 32), torch.randn(2, 300, 32)
    half = x.half().requires_grad_()
    (mkmmd_loss_batched(half, y, backend=backend).sum() * 65536.0).backward()
    exact = x.half().double().requires_grad_()
    mkmmd_loss_batched(exact, y.double(), backend="reference").sum().backward()
    assert half.grad.dtype == torch.float16
    assert relative_error(half.grad.double() / 65536.0, exact.grad) < 2e-3


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_partial_requires_grad(wanted, backend):
    x, y = torch.randn(2, 6, 3), torch.randn(2, 7, 3)
    _, *full = _run(x, y, torch.ones(2), backend=backend)
    x.requires_grad_(wanted[0])
    y.requires_grad_(wanted[1])
    mkmmd_loss_batched(x, y, backend=backend).sum().backward()
    for tensor, want, gradient in zip((x, y), wanted, full, strict=True):
        if want:
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_autocast_stays_in_float32(backend):
    x, y = torch.randn(2, 33, 12), torch.randn(2, 20, 12)
    outside = mkmmd_loss_batched(x, y, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mkmmd_loss_batched(x, y, backend=backend)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


def _raw(source, target, s_off, t_off, sigma, weight, estimator="unbiased"):
    most = (int(s_off.diff().max()), int(t_off.diff().max()))
    options = ([0.5, 1.0], "gaussian", estimator, *most, "native")
    return (source, target, s_off, t_off, sigma, weight, None, *options)


def test_opcheck(native_core):
    source, target, s_off, t_off = _ragged([(5, 7), (20, 3), (6, 6)], 5, torch.float32)
    sigma = torch.tensor([1.0, 2.0, 3.0])
    for args in (
        _raw(source, target, s_off, t_off, None, None),
        _raw(source.half(), target.double(), s_off.int(), t_off, sigma, torch.rand(31) > 0.1),
        _raw(source.t().contiguous().t(), target, s_off, t_off, sigma, torch.rand(31), "biased"),
    ):
        opcheck(torch.ops.padkern.mkmmd_batched_value.default, args)
        opcheck(torch.ops.padkern.mkmmd_batched_value_grad.default, args)
        for out in torch.ops.padkern.mkmmd_batched_value_grad.default(*args):
            assert out.is_contiguous()


def test_raw_op_gives_nan_to_small_problems_and_nothing_to_rows_past_the_end(
    native_core, poisoned_empty
):
    source, target = make_mkmmd_inputs(12, 9, 3)
    s_off, t_off = torch.tensor([0, 4, 4, 5, 9]), torch.tensor([0, 3, 6, 6, 8])
    values, dx, dy, d_sigma = torch.ops.padkern.mkmmd_batched_value_grad(
        *_raw(source, target, s_off, t_off, None, None)
    )
    want = [mkmmd_loss(source[a:b], target[c:d], alphas=[0.5, 1.0], backend="native").item()
            for a, b, c, d in ((0, 4, 0, 3), (5, 9, 6, 8))]  # fmt: skip
    assert values[[0, 3]].tolist() == pytest.approx(want, abs=1e-7)
    assert values[[1, 2]].isnan().all()
    assert d_sigma.isnan().tolist() == [False, True, True, False]
    assert (dx[9:] == 0).all()
    assert (dy[8:] == 0).all()
    assert dx[4:5].isnan().all()
    assert torch.isfinite(dx[:4]).all()
    assert torch.isfinite(dx[5:9]).all()


@pytest.mark.parametrize(
    ("offsets", "match"),
    [
        ([1, 4, 12], "source_offsets must start at 0, got 1"),
        ([0, 7, 5], "source_offsets must not decrease, got 5 after 7 at problem 1"),
        ([0, 4, 13], "source_offsets must end at 12, the rows of source, got 13"),
    ],
)
def test_raw_op_never_reads_outside_its_rows(offsets, match, native_core):
    source, target = make_mkmmd_inputs(12, 9, 3)
    args = _raw(source, target, torch.tensor(offsets), torch.tensor([0, 4, 9]), None, None)
    for name in ("mkmmd_batched_value", "mkmmd_batched_value_grad"):
        with pytest.raises(ValueError, match=match):
            getattr(torch.ops.padkern, name)(*args)


def test_compiled_equals_eager(native_core):
    def step(x, y, s_off, t_off, w):
        loss = mkmmd_loss_batched(
            torch.tanh(x), y, source_offsets=s_off, target_offsets=t_off, source_weight=w
        )
        return loss.sum() * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in (PAIRED, PAIRED[:3], [(4, 5), (6, 7)]):
        x, y, s_off, t_off = _ragged(sizes, 6, torch.float32)
        w = torch.rand(len(x)) + 0.1
        x.requires_grad_()
        y.requires_grad_()
        expected = torch.autograd.grad(step(x, y, s_off, t_off, w), (x, y))
        got = torch.autograd.grad(compiled(x, y, s_off, t_off, w), (x, y))
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e)


def test_compiled_batch_of_equal_sizes(native_core):
    def step(x, y, s):
        return mkmmd_loss_batched(x * 2, y, sigma_sq=s).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for problems, n, m in ((2, 5, 6), (3, 8, 4), (4, 3, 9)):
        x = torch.randn(problems, n, 5, requires_grad=True)
        y, s = torch.randn(problems, m, 5), torch.rand(problems, requires_grad=True)
        expected = torch.autograd.grad(step(x, y, s), (x, s))
        got = torch.autograd.grad(compiled(x, y, s), (x, s))
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e)


@pytest.mark.slow
def test_inductor_equals_eager(native_core):
    compiled = torch.compile(lambda x, y: mkmmd_loss_batched(x * 2, y).sum(), fullgraph=True)
    x, y = torch.randn(3, 20, 6, requires_grad=True), torch.randn(3, 31, 6, requires_grad=True)
    got = torch.autograd.grad(compiled(x, y), (x, y))
    expected = torch.autograd.grad(mkmmd_loss_batched(x * 2, y).sum(), (x, y))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def _call(x=(6, 3), y=(7, 3), s=(0, 2, 6), t=(0, 3, 7), **options):
    source, target = torch.randn(*x), torch.randn(*y)
    if s is not None:
        options.setdefault("source_offsets", torch.tensor(s))
    if t is not None:
        options.setdefault("target_offsets", torch.tensor(t))
    return mkmmd_loss_batched(source, target, **options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"t": None}, ValueError, "must be given together"),
        ({"s": None, "t": None}, ValueError, r"source must have shape \[B, n, D\], got \[6, 3\]"),
        ({"x": (6, 0)}, ValueError, "source must not be empty"),
        ({"y": (7, 4)}, ValueError, r"target must have shape \[total, 3\], got \[7, 4\]"),
        ({"s": (0,)}, ValueError, "source_offsets must have shape"),
        ({"s": (0.0, 6.0)}, TypeError, "source_offsets must be int32 or int64"),
        ({"t": (0, 7)}, ValueError, r"target_offsets must have shape \[3\] like source_offsets"),
        ({"s": (1, 2, 6)}, ValueError, "source_offsets must start at 0, got 1"),
        ({"s": (0, 2, 5)}, ValueError, "source_offsets must end at 6, the rows of source, got 5"),
        ({"t": (0, 9, 7)}, ValueError, "must not decrease, got 7 after 9 at problem 1"),
        ({"s": (0, 1, 6)}, ValueError, "problem 0: source must have at least 2 rows for est"),
        ({"t": (0, 7, 7)}, ValueError, "problem 1: target must have at least 2 rows for est"),
        (
            {"t": (0, 7, 7), "estimator": "biased"},
            ValueError,
            "problem 1: target must have at least 1 row for estimator 'biased', got 0",
        ),
        ({"estimator": "tllib"}, ValueError, "problem 0: estimator 'tllib' needs equal sizes"),
        ({"estimator": "cross"}, ValueError, "estimator must be one of"),
        ({"kernel": "linear"}, ValueError, "kernel must be one of"),
        ({"kernel": "energy", "sigma_sq": 1.0}, ValueError, "takes no sigma_sq"),
        ({"sigma_sq": "median"}, ValueError, "takes a number or a Tensor as sigma_sq"),
        ({"sigma_sq": -1.0}, ValueError, "sigma_sq must be positive"),
        ({"sigma_sq": torch.ones(3)}, ValueError, r"one value or have shape \[2\]"),
        ({"alphas": torch.ones(2)}, TypeError, "alphas must be a sequence of numbers"),
        ({"alphas": [0.0]}, ValueError, "alphas must be positive"),
        ({"source_weight": torch.ones(5)}, ValueError, r"source_weight must have shape \[6\]"),
        ({"target_weight": torch.ones(7).int()}, TypeError, "target_weight must be floating"),
        (
            {"source_weight": torch.tensor([1.0, 1, 1, -2, 1, 1])},
            ValueError,
            "problem 1: source_weight must be >= 0, got -2 at row 1",
        ),
        (
            {"target_weight": torch.tensor([1.0, 0, 0, 1, 1, 1, 1])},
            ValueError,
            "problem 0: target_weight must leave at least 2 rows, leaves 1",
        ),
        ({"max_rows": 3}, ValueError, "max_rows must be at least .* 4, got 3"),
        ({"max_rows": 1.5}, TypeError, "max_rows must be an int"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
    ids=str,
)
def test_errors(options, error, match, backend):
    with pytest.raises(error, match=match):
        _call(**{"backend": backend, **options})


def test_errors_of_equal_sizes(backend):
    x = torch.randn(3, 4, 2)
    for y, match in (
        (torch.randn(2, 4, 2), r"target must have shape \[3, m, 2\], got \[2, 4, 2\]"),
        (torch.randn(3, 1, 2), "target must have at least 2 rows for estimator 'unbiased', got 1"),
        (torch.randn(3, 0, 2), "target must not be empty"),
    ):
        with pytest.raises(ValueError, match=match):
            mkmmd_loss_batched(x, y, backend=backend)
    with pytest.raises(TypeError, match="source must be a Tensor, got list"):
        mkmmd_loss_batched([1.0], x, backend=backend)
    with pytest.raises(TypeError, match="target must be float64"):
        mkmmd_loss_batched(x, x.int(), backend=backend)


def test_the_lowest_failing_problem_is_named(native_core, restore_threads):
    torch.set_num_threads(4)
    weight = torch.ones(400, 30)
    weight[[77, 78, 300], 3] = -1.0
    x = torch.randn(400, 30, 8)
    with pytest.raises(ValueError, match="problem 77: source_weight must be >= 0"):
        mkmmd_loss_batched(x, x, source_weight=weight, backend="native")


def test_weights_that_require_a_gradient_go_to_the_reference(native_core):
    x, w = torch.randn(2, 5, 3), torch.rand(2, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(mkmmd_loss_batched(x, x + 1, source_weight=w).sum(), w)
    assert gradient.abs().sum() > 0
    with pytest.raises(RuntimeError, match="source_weight requires a gradient"):
        mkmmd_loss_batched(x, x, source_weight=w, backend="native")
