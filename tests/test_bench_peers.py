"""What the benchmarks compare with must itself be right, and so must what bounds it."""

from __future__ import annotations

import pytest
import torch
from machine_limits import Limits
from peers import budget, catalogue, exact, flash, libraries, torch_forms
from roofline import Device, roofline

from padkern.ops.catalogue_loss import catalogue_cross_entropy_ref
from padkern.testing import exact_mkmmd, make_mkmmd_inputs, relative_error, value_and_gradients

PLAIN = {
    "broadcast": (torch_forms.broadcast, "tllib"),
    "gemm": (torch_forms.gemm, "unbiased"),
    "ladder": (torch_forms.ladder, "unbiased"),
    "strips": (torch_forms.strips(7), "unbiased"),
}


@pytest.mark.parametrize("estimator", ["unbiased", "biased", "tllib"])
def test_strips_of_the_exact_loss_match_the_reference(estimator):
    n, m = (13, 13) if estimator == "tllib" else (13, 10)
    source, target = make_mkmmd_inputs(n, m, 5)
    found = exact.combine(exact.block_sums(source, target, rows=4), estimator)
    for actual, wanted in zip(found, exact_mkmmd(source, target, estimator=estimator), strict=True):
        assert relative_error(actual, wanted) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", list(PLAIN))
def test_torch_peers_match_the_reference(name, dtype):
    loss, estimator = PLAIN[name]
    source, target = make_mkmmd_inputs(17, 17, 9, dtype)
    wanted = exact.combine(exact.block_sums(source, target), estimator)
    exact.check(loss, source, target, wanted)
    exact.check(loss, source, target, wanted, gradient=False)


@pytest.mark.parametrize("name", ["keops", "geomloss"])
def test_libraries_match_the_reference(name, tmp_path, monkeypatch):
    for package in ("pykeops", "geomloss"):
        if libraries.missing(package):
            pytest.skip(libraries.missing(package))
    source, target = make_mkmmd_inputs(12, 12, 3)
    loss, estimator = {
        "keops": (libraries.keops, "unbiased"),
        "geomloss": (libraries.geomloss, "biased"),
    }[name]
    wanted = exact.combine(exact.block_sums(source, target), estimator)
    exact.check(loss, source, target, wanted)


def test_strips_scale_with_the_incoming_gradient():
    source, target = make_mkmmd_inputs(9, 11, 4, requires_grad=True)
    loss = torch_forms.strips(4)
    (once,) = torch.autograd.grad(loss(source, target), source)
    (scaled,) = torch.autograd.grad(3 * loss(source, target), source)
    torch.testing.assert_close(scaled, 3 * once)
    with torch.no_grad():
        assert not loss(source, target).requires_grad


@pytest.mark.parametrize("n", [6, 33])
def test_the_attention_composite_matches_the_reference(n):
    source, target = make_mkmmd_inputs(n, n + 3, 6)
    wanted = exact.combine(exact.block_sums(source, target), "unbiased")
    exact.check(flash.flash, source, target, wanted)
    exact.check(flash.flash, source, target, wanted, gradient=False)


def test_the_attention_composite_keeps_half_types_within_their_limits():
    source, target = make_mkmmd_inputs(64, 64, 16, torch.bfloat16)
    wanted = exact.combine(exact.block_sums(source, target), "unbiased")
    found = exact.errors(flash.flash, source, target, wanted)
    assert found.excess == ""
    # Norms rounded to one bfloat16 each, without their low parts, would not do.
    query, key = flash.widen(source)
    query[:, 19], key[:, 17] = 0, 0
    exponents = (query.float() @ key.float().T).diagonal()
    assert float(exponents.abs().max()) > 1e-3
    query, key = flash.widen(source)
    exponents = (query.float() @ key.float().T).diagonal()
    assert float(exponents.abs().max()) < 1e-3


def test_errors_beyond_the_limits_are_named():
    source, target = make_mkmmd_inputs(8, 8, 3)
    wanted = exact.combine(exact.block_sums(source, target), "unbiased")

    def shifted(x, y):
        return torch_forms.ladder(x, y) + 1e-4

    def stretched(x, y):
        value = torch_forms.ladder(x, y)
        return value + 1e-3 * (value - value.detach())

    def broken(x, y):
        return torch_forms.ladder(x, y) * float("nan")

    assert exact.errors(torch_forms.ladder, source, target, wanted).excess == ""
    assert exact.errors(shifted, source, target, wanted).excess.startswith("loss")
    assert exact.errors(stretched, source, target, wanted).excess.startswith("gradient")
    assert exact.errors(broken, source, target, wanted).excess.startswith("loss nan")
    for loss in (shifted, stretched, broken):
        with pytest.raises(AssertionError):
            exact.check(loss, source, target, wanted)


def test_peers_are_left_out_by_estimate():
    small = budget.Probe(n=128, dim=64, seconds=0.01, gib=0.002)
    estimate = small.at(1024, 128)
    assert estimate.estimated_ms == pytest.approx(1280)
    assert estimate.estimated_gib == pytest.approx(0.256)
    assert budget.refusal(estimate) == ""
    slow = small.at(4096, 128)
    assert "82 s, more than 60 s (20.5 s each)" in budget.refusal(slow)
    large = budget.Estimate(10.0, 17.0)
    assert "17.0 GiB, more than 16 GiB" in budget.refusal(large)


def test_limits_keep_the_best_of_their_runs(monkeypatch):
    import machine_limits

    rates = iter([100.0, 80.0])
    monkeypatch.setattr(machine_limits, "sgemm_gflops", lambda dim: next(rates))
    monkeypatch.setattr(machine_limits, "coefficient_gflops", lambda dim: 90.0)
    monkeypatch.setattr(machine_limits, "exp_gelems", lambda: 2.0)
    limits = Limits()
    before = torch.get_num_threads()
    limits.measure(64, 1)
    limits.measure(64, 1)
    assert torch.get_num_threads() == before
    assert limits.to_json() == {
        "1": {
            "sgemm_gflops": {"64": 100.0},
            "coefficient_gflops": {"64": 90.0},
            "exp_gelems": 2.0,
        }
    }


def test_rates_are_positive():
    import machine_limits

    assert machine_limits.sgemm_gflops(8, rows=64) > 0
    assert machine_limits.coefficient_gflops(8, rows=64) > 0
    assert machine_limits.exp_gelems(elements=4096) > 0


# 132 multiprocessors at 1.755 GHz: worked out by hand from 800 TFLOP/s, 128 lanes, 16 exponentials.
H100 = Device(132, 1.755e9, 90)


@pytest.mark.parametrize(
    ("n", "dim", "dtype", "gradient", "expected", "bound"),
    [
        (4096, 64, "bfloat16", False, 0.0124, "fp32_ms"),
        (4096, 64, "bfloat16", True, 0.0215, "fp32_ms"),
        (4096, 128, "bfloat16", True, 0.0322, "tensor_ms"),
        (4096, 128, "float32", True, 0.0966, "tensor_ms"),
        (16384, 1024, "float32", True, 12.4, "tensor_ms"),
    ],
)
def test_roofline_of_an_h100(n, dim, dtype, gradient, expected, bound):
    found = roofline(n, n, dim, dtype, gradient, H100)
    assert found.ms == pytest.approx(expected, rel=0.01)
    assert getattr(found, bound) == found.ms


def test_roofline_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32"):
        roofline(8, 8, 8, "float64", True, H100)
    with pytest.raises(ValueError, match="capability must be 80 or 90, got 75"):
        roofline(8, 8, 8, "float32", True, Device(40, 1e9, 75))


def test_half_products_are_given_in_float32():
    a, b = torch.randn(5, 4).bfloat16(), torch.randn(4, 3).bfloat16()
    out = torch_forms.product(a, b)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, a.float() @ b.float())


def test_strips_leave_a_weighted_diagonal_out():
    source, target = make_mkmmd_inputs(6, 5, 2, torch.float64)
    whole = value_and_gradients(torch_forms.strips(100), source, target)
    parts = value_and_gradients(torch_forms.strips(2), source, target)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["plain", "chunked", "compiled", "torch"])
def test_catalogue_peers_match_the_reference(name):
    if name == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    users, items = torch.randn(13, 6).requires_grad_(), torch.randn(31, 6).requires_grad_()
    targets = torch.randint(31, (13,))
    losses = {
        "plain": lambda: catalogue.plain,
        "chunked": lambda: catalogue.chunked(5),
        "compiled": lambda: catalogue.chunked_by(5, catalogue.chunk_terms),
        "torch": lambda: catalogue.linear_cross_entropy(5),
    }
    loss = losses[name]()(users, items, targets)
    want = catalogue_cross_entropy_ref(users, items, targets)
    torch.testing.assert_close(loss, want)
    pairs = zip(
        torch.autograd.grad(2 * loss, (users, items)),
        torch.autograd.grad(2 * want, (users, items)),
        strict=True,
    )
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)
