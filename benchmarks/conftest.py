"""Shared by all benchmarks: one way to time, and what is recorded beside the time."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from padkern import _native

# Wall-clock seconds one benchmark may spend on its rounds.
SECONDS = float(os.environ.get("PADKERN_BENCH_SECONDS", "0.5"))


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine_info() -> dict[str, object]:
    """CPU, cores, thread count, versions and instruction set of this run."""
    native = _native.load()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "padkern_isa": native.core.isa()["chosen"] if native.core else native.reason,
        "python": platform.python_version(),
    }


def peak_extra_mib(run: Callable[[], object]) -> float:
    """Highest sum of torch CPU allocations alive at once during one call, in MiB (2**20 bytes)."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = run()
    del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = alive = 0
    for event in events:
        alive += event.nbytes()
        peak = max(peak, alive)
    return round(peak / 2**20, 3)


@pytest.fixture(scope="session", autouse=True)
def _threads():
    """PADKERN_BENCH_THREADS sets torch's thread count; the default is torch's own."""
    value = os.environ.get("PADKERN_BENCH_THREADS")
    if value:
        torch.set_num_threads(int(value))


@pytest.fixture
def measure(benchmark):
    """measure(run, **info): warms up, records memory and machine, times for about SECONDS."""

    def run_benchmark(run: Callable[[], object], **info: object) -> None:
        run()
        run()
        started = time.perf_counter()
        run()
        once = max(time.perf_counter() - started, 1e-6)
        benchmark.extra_info.update(machine_info(), **info, peak_extra_mib=peak_extra_mib(run))
        rounds = max(3, min(200, int(SECONDS / once)))
        benchmark.pedantic(run, rounds=rounds, iterations=1)

    return run_benchmark
