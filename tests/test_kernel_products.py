"""Kernel products: every backend against the reference, exact sums, gradients, ops."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from padkern.ops.kernel_products.op import (
    draw_memberships,
    kernel_apply,
    kernel_quadratic,
)
from padkern.ops.mkmmd.reference import KERNELS

ALPHAS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
SHAPES = [(1, 1, 1), (2, 1, 3), (47, 3, 5), (48, 16, 64), (49, 65, 7), (97, 131, 33), (400, 9, 40)]
APPLY = torch.ops.padkern.kernel_apply.default


@pytest.fixture(params=["native", "blocked"])
def backend(request):
    """The backends that hold no kernel matrix."""
    if request.param == "native":
        request.getfixturevalue("native_core")
    return request.param


def _rows(count, dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, dim, generator=generator, dtype=torch.float64) + 3).to(dtype)


def _members(count, columns, seed=1):
    return torch.rand(count, columns, generator=torch.Generator().manual_seed(seed)) < 0.5


def _kernel(kernel, betas=None):
    return {"alphas": (1.0,) if kernel == "energy" else ALPHAS, "betas": betas, "kernel": kernel}


def _close(got, want, tolerance):
    scale = max(float(want.abs().max()), 1e-300)
    assert got.dtype == torch.float64
    assert float((got - want).abs().max()) <= tolerance * scale


def test_by_definition(backend):
    rows, members = _rows(7, 3), _members(7, 4)
    got = kernel_quadratic(rows, members, torch.tensor(2.0), ALPHAS, None, "gaussian", backend)
    for p in range(4):
        chosen = [i for i in range(7) if members[i, p]]
        quadratic = linear = 0.0
        for i, j in itertools.product(chosen, range(7)):
            if i == j:
                continue
            d = float((rows[i] - rows[j]).square().sum())
            value = sum(math.exp(-d / (2 * a * 2.0)) for a in ALPHAS)
            linear += value
            quadratic += value if j in chosen else 0.0
        assert float(got[0][p]) == pytest.approx(quadratic, abs=1e-12)
        assert float(got[1][p]) == pytest.approx(linear, abs=1e-12)
    assert float(got[2].sum()) == pytest.approx(float(got[2] @ torch.ones(7).double()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_quadratic(kernel, dtype, backend, poisoned_empty):
    for count, dim, columns in SHAPES:
        rows, members = _rows(count, dim, dtype), _members(count, columns)
        sigma = torch.tensor(1.5 * dim)
        for betas in (None, torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])):
            if kernel == "energy" and betas is not None:
                continue
            args = (sigma, *_kernel(kernel, betas).values())
            want = kernel_quadratic(rows.double(), members, *args, "reference")
            got = kernel_quadratic(rows, members, *args, backend)
            for g, w in zip(got, want, strict=True):
                _close(g, w, 1e-12 if dtype == torch.float64 else 4e-6)


def test_many_columns_and_a_partial_panel(backend):
    rows, members = _rows(60, 4), _members(60, 2085)
    args = (torch.tensor(3.0), ALPHAS, None, "gaussian")
    got = kernel_quadratic(rows, members, *args, backend)
    want = kernel_quadratic(rows, members, *args, "reference")
    for g, w in zip(got, want, strict=True):
        _close(g, w, 1e-12)


def test_values_far_below_the_largest_possible_keep_their_digits(backend):
    rows, members = _rows(70, 40, torch.float32), _members(70, 50)
    # The widest kernel is about exp(-20) even between neighbours.
    args = (torch.tensor(0.5), ALPHAS, None, "gaussian")
    want = kernel_quadratic(rows.double(), members, *args, "reference")
    got = kernel_quadratic(rows, members, *args, backend)
    assert 0 < float(want[2].max()) < 1e-4
    for g, w in zip(got, want, strict=True):
        _close(g, w, 5e-5)  # of exponents of about 20


def test_values_that_a_sample_of_them_does_not_foresee(native_core):
    # Blocks have 48 rows. Far apart within blocks, close across two of them, or the reverse.
    line = torch.arange(48.0)[:, None] * 40
    members = _members(96, 30)
    args = (torch.tensor(1.0), (1.0,), None, "gaussian")
    for step in (1e-3, 4.0):
        rows = torch.cat([line, line + step])
        want = kernel_quadratic(rows.double(), members, *args, "reference")
        assert float(want[2].max()) == pytest.approx(math.exp(-(step**2) / 2), rel=1e-6)
        for g, w in zip(kernel_quadratic(rows, members, *args, "native"), want, strict=True):
            _close(g, w, 1e-5)
    rows = torch.cat([line[:24], line[:24] + 10.0, line[24:], line[24:] + 0.5])
    want = kernel_quadratic(rows.double(), members, *args, "reference")
    for g, w in zip(kernel_quadratic(rows, members, *args, "native"), want, strict=True):
        _close(g, w, 1e-5)


def test_equal_rows_have_the_distance_zero(backend):
    # 65 columns away from 0: inner products and norms round.
    rows = (_rows(60, 300, torch.float32) * 7 + 0.1).repeat(2, 1)
    ones = torch.ones(120, 1)
    got = kernel_apply(rows, rows, ones, torch.tensor(1e-9), (1.0,), None, "gaussian", backend)
    if backend == "native":
        assert (got == 2).all()
    args = (torch.tensor(1.0), (1.0,), None, "energy", "slope", 1, True, backend)
    assert APPLY(rows[[0, 60, 0]], rows[[60, 0, 60]], torch.ones(3, 1), *args).abs().max() == 0


def test_labellings_of_equal_multisets_give_equal_bits(native_core):
    rows = _rows(90, 6, torch.float32).repeat(2, 1)[torch.randperm(180)]
    same = (rows[:, None] == rows[None]).all(2).to(torch.int8)
    twin = (same - torch.eye(180, dtype=torch.int8)).argmax(1)
    members = _members(180, 300)
    args = (torch.tensor(9.0), ALPHAS, None, "gaussian", "native")
    for first, second in zip(
        kernel_quadratic(rows, members, *args)[:2],
        kernel_quadratic(rows, members[twin], *args)[:2],
        strict=True,
    ):
        assert torch.equal(first, second)


def test_a_labelling_and_its_complement_add_up_exactly(native_core):
    rows, members = _rows(333, 20, torch.float32), _members(333, 200)
    args = (torch.tensor(30.0), ALPHAS, None, "gaussian", "native")
    xx, linear, row_sums = kernel_quadratic(rows, members, *args)
    yy, other, _ = kernel_quadratic(rows, ~members, *args)
    assert torch.equal(linear + other, row_sums.sum().expand(200))
    assert torch.equal(row_sums.sum() - linear - (linear - xx), yy)


@pytest.mark.parametrize("kernel", ["gaussian", "rational_quadratic", "laplacian"])
def test_bandwidth_zero_and_below(kernel, backend):
    rows, members = _rows(50, 3), _members(50, 7)
    counts = members.sum(0).double()
    for value in (0.0, -1.0, float("nan")):
        args = (torch.tensor(value), ALPHAS, None, kernel)
        got = kernel_quadratic(rows, members, *args, backend)
        applied = [
            APPLY(rows, rows, torch.ones(50, 1), *args, part, 1, True, backend)
            for part in ("value", "slope", "spread")
        ]
        if value == 0.0:
            assert torch.equal(got[0], 5 * counts * (counts - 1))
            assert torch.equal(got[1], 5 * counts * 49)
            assert torch.equal(got[2], torch.full((50,), 5 * 49.0).double())
            assert (applied[0] == 5 * 49).all()
            assert (applied[1] == 0).all()
            assert (applied[2] == 0).all()
        else:
            assert all(x.isnan().all() for x in (*got, *applied))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_rows_that_are_not_finite_give_nan(bad, backend):
    rows = _rows(60, 4, torch.float32)
    rows[55, 1] = bad
    args = (torch.tensor(3.0), ALPHAS, None, "gaussian")
    for x in kernel_quadratic(rows, _members(60, 5), *args, "native" if bad == 1e30 else backend):
        assert x.isnan().all()
    if bad != 1e30:
        assert kernel_apply(rows[:3], rows, torch.ones(60, 2), *args, backend).isnan().all()


def test_a_query_that_is_not_finite_gives_nan_at_its_place(backend):
    rows, query = _rows(60, 4), _rows(50, 4, seed=5)
    query[7, 0], query[49, 3] = float("nan"), float("inf")
    for args in ((torch.tensor(3.0), ALPHAS, None, "gaussian"),):
        got = kernel_apply(query, rows, torch.ones(60, 2).double(), *args, backend)
        assert got.isnan().all(1).nonzero().flatten().tolist() == [7, 49]
        assert int(got.isnan().sum()) == 4


def test_strides_and_membership_types_change_no_bit(native_core):
    rows, members = _rows(70, 9, torch.float32), _members(70, 40)
    args = (torch.tensor(9.0), ALPHAS, None, "gaussian", "native")
    want = kernel_quadratic(rows, members, *args)
    wide = torch.full((140, 20), float("nan"))
    wide[::2, 1:19:2] = rows
    for other_rows, other_members in (
        (wide[::2, 1:19:2], members),
        (rows.t().contiguous().t(), members.t().contiguous().t()),
        (rows, members.to(torch.uint8) * 7),
        (rows, torch.stack([members, ~members], 2)[:, :, 0]),
    ):
        for g, w in zip(kernel_quadratic(other_rows, other_members, *args), want, strict=True):
            assert torch.equal(g, w)
    vectors = torch.randn(70, 3)
    applied = kernel_apply(rows, rows, vectors, *args)
    other = kernel_apply(wide[::2, 1:19:2], wide[::2, 1:19:2], vectors.t().contiguous().t(), *args)
    assert torch.equal(applied, other)


def test_thread_count_changes_no_bit(native_core, restore_threads):
    rows, members = _rows(1000, 12, torch.float32), _members(1000, 1100)
    vectors = torch.randn(1000, 3)
    args = (torch.tensor(12.0), ALPHAS, None, "gaussian", "native")
    seeds = torch.arange(150)
    results = []
    for threads in (1, 2, 4, 1):
        torch.set_num_threads(threads)
        results.append(
            (
                *kernel_quadratic(rows, members, *args),
                kernel_apply(rows, rows, vectors, *args),
                kernel_apply(rows[:100], rows, vectors, *args),
                draw_memberships(seeds, 1000, 400, "native"),
            )
        )
    for other in results[1:]:
        for got, first in zip(other, results[0], strict=True):
            assert torch.equal(got, first)


@pytest.mark.parametrize("part", ["value", "slope", "spread"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_apply(kernel, part, backend, poisoned_empty):
    for queries, count, dim, columns in ((1, 2, 1, 1), (50, 101, 33, 5), (97, 48, 130, 49)):
        for power, skip in itertools.product((1, 2), (False, True)):
            rows = _rows(count, dim)
            query = rows if skip else _rows(queries, dim, seed=3)
            vectors = _rows(count, columns, seed=4) - 3
            args = (torch.tensor(1.5 * dim), *_kernel(kernel).values(), part, power, skip)
            want = APPLY(query, rows, vectors, *args, "reference")
            _close(APPLY(query, rows, vectors, *args, backend), want, 1e-11)
            got = APPLY(query.float(), rows.float(), vectors.float(), *args, backend)
            # A root's slope magnifies the rounding of small distances.
            _close(got, want, 1e-5 if kernel not in ("laplacian", "energy") else 1e-4)


def test_apply_over_several_strips_of_rows(backend):
    count = 6500 if backend == "native" else 2100  # more than two strips, more than a block
    rows, query = _rows(count, 3), _rows(130, 3, seed=8)
    vectors = _rows(count, 2, seed=9)
    args = (torch.tensor(3.0), ALPHAS, None, "gaussian")
    want = kernel_apply(query, rows, vectors, *args, "reference")
    _close(kernel_apply(query, rows, vectors, *args, backend), want, 1e-12)
    # Skipping the diagonal far from the first strip: compare a few rows of the whole product.
    got = kernel_apply(rows, rows, vectors, *args, backend, skip_diagonal=True)
    some = torch.tensor([0, 47, count // 2, 2047, 2048, 3071, 3072, count - 1]).clamp(max=count - 1)
    want = kernel_apply(rows[some], rows, vectors, *args, "reference") - 5 * vectors[some]
    _close(got[some], want, 1e-12)


def test_draws_are_the_same_everywhere_and_of_the_right_size(native_core):
    seeds = torch.randint(-(2**63), 2**63 - 1, (130,))
    for rows, chosen in ((1, 0), (1, 1), (5, 2), (101, 40), (300, 299)):
        native = draw_memberships(seeds, rows, chosen, "native")
        assert torch.equal(native, draw_memberships(seeds, rows, chosen, "reference"))
        assert (native.sum(0) == chosen).all()
        assert (native[:chosen, 0] == 1).all()


def test_draws_are_uniform_over_subsets(native_core):
    drawn = draw_memberships(torch.arange(20000), 6, 3, "native")[:, 1:]
    codes = (drawn.long() * (2 ** torch.arange(6))[:, None]).sum(0)
    counts = codes.bincount(minlength=64)
    counts = counts[counts > 0]
    assert counts.numel() == 20
    chi_square = float(((counts - 1000.0) ** 2 / 1000).sum())
    assert chi_square < 43.8  # the 0.999 quantile for 19 degrees of freedom


@pytest.mark.parametrize("name", ["native", "blocked", "reference"])
def test_opcheck(name, native_core):
    rows, members = _rows(9, 5, torch.float32), _members(9, 6)
    sigma, betas = torch.tensor(2.0), torch.rand(5)
    ops = torch.ops.padkern
    opcheck(ops.kernel_quadratic.default, (rows, members, sigma, ALPHAS, None, "gaussian", name))
    opcheck(
        ops.kernel_quadratic.default,
        (rows.double(), members.byte(), sigma, ALPHAS, betas, "laplacian", name),
    )
    args = (sigma, ALPHAS, betas, "gaussian", "slope", 2, False, name)
    opcheck(ops.kernel_apply.default, (rows[:3].half(), rows.double(), torch.ones(9, 2), *args))
    opcheck(ops.draw_memberships.default, (torch.arange(5), 9, 4, name))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets_agree(isa, native_core):
    levels = ["baseline", "avx2", "avx512"]
    if isa not in levels[: levels.index(native_core.isa()["detected"]) + 1]:
        pytest.skip(f"this CPU has no {isa}")
    code = (
        "import torch\n"
        "from padkern.ops.kernel_products.op import *\n"
        "for dtype, tolerance in ((torch.float32, 4e-6), (torch.float64, 1e-12)):\n"
        "    z = torch.randn(205, 70, generator=torch.Generator().manual_seed(0)).to(dtype)\n"
        "    s = draw_memberships(torch.arange(90), 205, 100, 'native')\n"
        "    assert torch.equal(s, draw_memberships(torch.arange(90), 205, 100, 'reference'))\n"
        "    args = (torch.tensor(100.0), (0.5, 1.0), None, 'gaussian')\n"
        "    for name, run in (('quadratic', lambda b: kernel_quadratic(z, s, *args, b)),\n"
        "                      ('apply', lambda b: (kernel_apply(z, z, z, *args, b),))):\n"
        "        for g, w in zip(run('native'), run('reference')):\n"
        "            assert (g - w).abs().max() <= tolerance * w.abs().max(), name\n"
        "print('agree')"
    )
    import os

    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PADKERN_ISA": isa},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.strip() == "agree", result.stderr


@pytest.mark.slow
def test_no_kernel_matrix_is_held(native_core):
    # 20 000 rows: one matrix of floats would be 1.6 GB.
    code = (
        "import resource, torch\n"
        "from padkern.ops.kernel_products.op import *\n"
        "z, args = torch.randn(20000, 4), (torch.tensor(4.0), (1.0,), None, 'gaussian', 'native')\n"
        "seeds = torch.arange(63)\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\n"
        "kernel_quadratic(z, draw_memberships(seeds, 20000, 9000, 'native'), *args)\n"
        "kernel_apply(z, z, z[:, :1].clone(), *args)\n"
        "print(peak() - before)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 60


def test_the_core_checks_again(native_core):
    sigma = torch.ones((), dtype=torch.float64)
    rows = torch.zeros(4, 3)
    total = (0, [1.0], 0, sigma.data_ptr())
    matrix = (rows.data_ptr(), 4, 3, 1)
    run = native_core.kernel_quadratic_cpu
    assert run(0, total, (0, 4, 3, 1), 3, matrix, (0, 0, 0)) == "null pointer for rows"
    assert run(0, total, matrix, 3, (0, 4, 3, 1), (0, 0, 0)).startswith("null pointer for member")
    assert "positive sizes" in run(0, total, (0, -1, 3, 1), 3, matrix, (0, 0, 0))
    assert "alphas must hold" in run(0, (0, [], 0, 1), matrix, 3, matrix, (0, 0, 0))
    assert "alphas must be positive" in run(0, (0, [-1.0], 0, 1), matrix, 3, matrix, (0, 0, 0))
    assert run(0, (0, [1.0], 0, 0), matrix, 3, matrix, (0, 0, 0)) == "null pointer for sigma_sq"
    assert "compute type" in run(7, total, matrix, 3, matrix, (0, 0, 0))
    out = torch.zeros(4, 3, dtype=torch.float64)
    apply = native_core.kernel_apply_cpu
    few = (rows.data_ptr(), 2, 3, 1)
    options = ((0, 1, False), matrix, matrix, few, (3, 3), out.data_ptr())
    assert apply(0, total, *options) == "vectors must have 4 rows, got 2"
    options = ((0, 1, True), few, matrix, matrix, (3, 3), out.data_ptr())
    assert apply(0, total, *options) == "skip_diagonal needs as many queries as rows, got 2 and 4"
    options = ((0, 3, False), matrix, matrix, matrix, (3, 3), out.data_ptr())
    assert apply(0, total, *options) == "power must be 1 or 2, got 3"
    assert "out of range" in native_core.draw_memberships_cpu(0, 0, 4, 5, out.data_ptr())
