"""Permutation test: padkern against what people write in torch, at P = 1000, n = m = 1000, D = 64.

Every implementation is compared with the float64 reference before it is timed. The labellings are
given, but for ``mkmmd_test``, which draws its own; all use the default alphas, the unbiased
estimator and the mean-distance bandwidth, in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from padkern import _native, mkmmd_test
from padkern.ops.kernel_products.op import kernel_quadratic
from padkern.ops.mkmmd.reference import DEFAULT_ALPHAS, mean_sq_distance
from padkern.testing import make_mkmmd_inputs
from padkern.two_sample import _labellings

ROWS, DIM, PERMUTATIONS = 1000, 64, 1000
# Largest error of a statistic; the null distribution's spread is about 4e-4. The forms in torch add
# up millions of values in float32.
TOLERANCE = 3e-5
TOLERANCE_NATIVE = 2e-6


def _kernel_matrix(x: Tensor, y: Tensor) -> Tensor:
    """[2n, 2n] with a zero diagonal: one product, one exponential, four squarings."""
    z = torch.cat([x, y])
    z = z - z.mean(0)
    squares = z.square().sum(1)
    distances = (squares[:, None] + squares[None, :] - 2 * (z @ z.T)).clamp(min=0)
    term = torch.exp(-distances / (4 * distances.mean()))
    kernel = term
    for _ in range(4):
        term = term * term
        kernel = kernel + term
    return kernel.fill_diagonal_(0)


def _statistics(xx: Tensor, linear: Tensor, total: Tensor, n: int) -> Tensor:
    xy = linear - xx
    yy = total - linear - xy
    return (xx + yy) / (n * (n - 1)) - 2 * xy / (n * n)


def reindex(x: Tensor, y: Tensor, members: Tensor) -> Tensor:
    """The kernel matrix, rearranged for every permutation."""
    kernel, n = _kernel_matrix(x, y), x.shape[0]
    order = torch.sort(members, dim=0, descending=True, stable=True).indices
    out = torch.empty(members.shape[1])
    for p in range(members.shape[1]):
        permuted = kernel[order[:, p]][:, order[:, p]]
        same = permuted[:n, :n].sum() + permuted[n:, n:].sum()
        out[p] = same / (n * (n - 1)) - 2 * permuted[:n, n:].mean()
    return out


def matrix(x: Tensor, y: Tensor, members: Tensor) -> Tensor:
    """All permutations in one matrix product with their 0/1 columns."""
    kernel, columns = _kernel_matrix(x, y), members.to(x.dtype)
    xx = ((kernel @ columns) * columns).sum(0)
    row_sums = kernel.sum(1)
    return _statistics(xx, row_sums @ columns, row_sums.sum(), x.shape[0])


def native(x: Tensor, y: Tensor, members: Tensor) -> Tensor:
    """The fused quadratic forms, with the bandwidth found first."""
    sigma_sq = mean_sq_distance(x, y)
    args = (sigma_sq, DEFAULT_ALPHAS, None, "gaussian", "native")
    xx, linear, row_sums = kernel_quadratic(torch.cat([x, y]), members, *args)
    return _statistics(xx, linear, row_sums.sum(), x.shape[0])


def whole_test(x: Tensor, y: Tensor, members: Tensor) -> Tensor:
    """The public function, which draws the same labellings itself."""
    result = mkmmd_test(x, y, permutations=members.shape[1] - 1, backend="native")
    return torch.cat([torch.tensor([result.statistic], dtype=torch.float64), result.null])


def _compiled() -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(matrix, dynamic=False)


IMPLEMENTATIONS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "reindex": lambda: reindex,
    "matrix": lambda: matrix,
    "compile_matrix": _compiled,
    "native": lambda: native,
    "mkmmd_test": lambda: whole_test,
}


@lru_cache(maxsize=1)
def _problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = make_mkmmd_inputs(ROWS, ROWS, DIM)
    y = y / 1.2 - 0.25  # nearly the source's distribution
    members = _labellings(PERMUTATIONS, 2 * ROWS, ROWS, 0)
    return x, y, members, matrix(x.double(), y.double(), members)


@pytest.mark.parametrize("name", list(IMPLEMENTATIONS))
def bench_permutation_test(measure, benchmark, name):
    if name in ("native", "mkmmd_test") and _native.load().core is None:
        pytest.skip(_native.load().reason)
    x, y, members, expected = _problem()
    run_one = IMPLEMENTATIONS[name]()
    info = {"n": ROWS, "m": ROWS, "D": DIM, "permutations": PERMUTATIONS, "dtype": "float32"}
    benchmark.group = f"permutation test P={PERMUTATIONS} n=m={ROWS} D={DIM}"
    few = members[:, :5]
    tolerance = TOLERANCE_NATIVE if name in ("native", "mkmmd_test") else TOLERANCE
    assert (run_one(x, y, few) - expected[:5]).abs().max() < tolerance
    if name == "reindex":
        started = time.perf_counter()
        run_one(x, y, few)
        estimate = (time.perf_counter() - started) * PERMUTATIONS / 5
        if estimate > 60:
            pytest.skip(f"one call would take {estimate:.0f} s, more than a minute")
    else:
        assert (run_one(x, y, members) - expected).abs().max() < tolerance
    measure(lambda: run_one(x, y, members), **info)
