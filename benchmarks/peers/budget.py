"""Which peers are left out: those that would take too long or too much memory, by estimate."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# An entry costs about four calls: the check, the memory run and the rounds.
CALLS = 4
SECONDS = 60.0
GIB = 16.0


class Estimate(NamedTuple):
    """What one call would take."""

    estimated_ms: float
    estimated_gib: float


class Probe(NamedTuple):
    """One small call: rows per sample, width, seconds, GiB."""

    n: int
    dim: int
    seconds: float
    gib: float

    def at(self, n: int, dim: int) -> Estimate:
        """Scaled to another size: pairs grow with n^2; beyond the probe's width, work with D.

        Memory is scaled alike, which overstates it for forms that hold no [n, n, D] array.
        """
        factor = (n / self.n) ** 2 * dim / self.dim
        return Estimate(round(1e3 * factor * self.seconds, 3), round(factor * self.gib, 3))


def probe(
    run: Callable[[], object], n: int, dim: int, peak_mib: Callable[[Callable[[], object]], float]
) -> Probe:
    """Times a warmed call (the better of three) and measures its memory."""
    run()
    seconds = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        run()
        seconds = min(seconds, time.perf_counter() - started)
    return Probe(n, dim, seconds, peak_mib(run) / 1024)


def available_gib() -> float:
    """Memory that can be had without swapping; infinite where the system does not say."""
    path = Path("/proc/meminfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    return float("inf")


def refusal(estimate: Estimate) -> str:
    """Why a peer with this estimate does not run; empty when it does."""
    seconds = CALLS * estimate.estimated_ms / 1e3
    if seconds > SECONDS:
        return (
            f"{CALLS} calls would take about {seconds:.0f} s, more than {SECONDS:.0f} s "
            f"({estimate.estimated_ms / 1e3:.1f} s each)"
        )
    if estimate.estimated_gib > GIB:
        return f"would need about {estimate.estimated_gib:.1f} GiB, more than {GIB:.0f} GiB"
    if estimate.estimated_gib > 0.8 * available_gib():
        return (
            f"would need about {estimate.estimated_gib:.1f} GiB, "
            f"{available_gib():.1f} GiB are available"
        )
    return ""
