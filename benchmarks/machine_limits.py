"""What the machine itself reaches: single-precision matrix products and vector exponentials.

The rates are the best of several calls. They are measured again before every size of a suite, and
the best seen stands: a share of the limit is then never flattered by a slow moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

ROWS = 4096
# Element counts tried for the exponential: float32 input and output from 32 KiB to 2 MiB.
_EXP_SIZES = (4096, 16384, 65536, 262144)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets torch's thread count for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best_seconds(run: Callable[[], object], rounds: int = 5) -> float:
    run()
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def sgemm_gflops(dim: int, rows: int = ROWS) -> float:
    """Rate of a float32 product [rows, dim] x [dim, rows], in GFLOP/s."""
    a, b, out = torch.randn(rows, dim), torch.randn(dim, rows), torch.empty(rows, rows)
    return 2 * rows * rows * dim / _best_seconds(lambda: torch.mm(a, b, out=out)) / 1e9


def coefficient_gflops(dim: int, rows: int = ROWS) -> float:
    """Rate of a float32 product W @ Z, [rows, rows] x [rows, dim], in GFLOP/s."""
    w, z, out = torch.randn(rows, rows), torch.randn(rows, dim), torch.empty(rows, dim)
    return 2 * rows * rows * dim / _best_seconds(lambda: torch.mm(w, z, out=out)) / 1e9


def exp_gelems(elements: int = 2**22) -> float:
    """Rate of torch.exp on float32 in cache, in 10^9 elements/s, the best of several sizes."""
    rates = []
    for size in _EXP_SIZES:
        values = -torch.rand(size)
        out = torch.empty_like(values)
        calls = max(1, elements // size)

        def run(values=values, out=out, calls=calls) -> None:
            for _ in range(calls):
                torch.exp(values, out=out)

        rates.append(calls * size / _best_seconds(run, 3) / 1e9)
    return max(rates)


class Limits:
    """Best rates seen so far, per thread count."""

    def __init__(self) -> None:
        self.rates: dict[int, dict[str, dict[str, float]]] = {}

    def measure(self, dim: int, count: int) -> None:
        """Measures the rates for products over ``dim`` columns on ``count`` threads."""
        with threads(count):
            found = {
                "sgemm_gflops": {str(dim): sgemm_gflops(dim)},
                "coefficient_gflops": {str(dim): coefficient_gflops(dim)},
                "exp_gelems": {"": exp_gelems()},
            }
        kept = self.rates.setdefault(count, {})
        for name, values in found.items():
            best = kept.setdefault(name, {})
            for key, rate in values.items():
                best[key] = round(max(rate, best.get(key, 0.0)), 3)

    def to_json(self) -> dict[str, object]:
        """{threads: {sgemm_gflops: {D: rate}, coefficient_gflops: {D: rate}, exp_gelems: rate}}."""
        return {
            str(count): {**rates, "exp_gelems": rates["exp_gelems"][""]}
            for count, rates in self.rates.items()
        }
