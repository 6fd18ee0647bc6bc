"""Shared by all benchmarks: one way to time, and what is recorded beside the time."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from machine_limits import Limits

from padkern import _native

# Wall-clock seconds one benchmark may spend on its rounds.
SECONDS = float(os.environ.get("PADKERN_BENCH_SECONDS", "0.5"))
_LIMITS = Limits()
_SKIPPED: list[dict[str, object]] = []


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


@pytest.fixture
def machine() -> Callable[[], dict[str, object]]:
    """The function that describes this machine and run."""
    return machine_info


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


def _resident_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return 0.0


def peak_resident_mib(run: Callable[[], object]) -> float | None:
    """Growth of the process's peak resident memory during one call, in MiB; None off Linux.

    Counts what torch's allocator does not see, and what a library keeps afterwards.
    """
    peaks = resident_peaks(run)
    return None if peaks is None else peaks[0]


def resident_peaks(run: Callable[[], object]) -> tuple[float, float] | None:
    """The same, and the peak itself: what the whole process held, inputs included."""
    try:
        _malloc("malloc_trim", 0)
        before = _resident_mib("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
        result = run()
        peak = _resident_mib("VmHWM")
    except OSError:
        return None
    del result
    return round(peak - before, 3), round(peak, 3)


def _malloc(function: str, *arguments: int) -> None:
    """Calls glibc's malloc controls; OSError where the C library has none."""
    try:
        entry = getattr(ctypes.CDLL(None), function)
    except (AttributeError, TypeError) as error:
        raise OSError(f"the C library has no {function}") from error
    entry(*arguments)


@contextmanager
def kept_memory() -> Iterator[None]:
    """malloc keeps freed memory, as jemalloc and tcmalloc do; raises OSError without glibc.

    By default glibc hands every block above 32 MiB back to the kernel when it is freed. The next
    call then touches fresh pages, and peers that build n^2 matrices spend most of their time there.
    """
    trim, pad, mmap = -1, -2, -3  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
    _malloc("mallopt", mmap, 2**30)
    _malloc("mallopt", trim, -1)
    _malloc("mallopt", pad, 2**28)
    try:
        yield
    finally:  # where glibc's own adaption ends up in a program with large blocks
        _malloc("mallopt", mmap, 2**25)
        _malloc("mallopt", trim, 2**26)
        _malloc("mallopt", pad, 2**17)
        _malloc("malloc_trim", 0)


@pytest.fixture(scope="session", autouse=True)
def _threads():
    """PADKERN_BENCH_THREADS sets torch's thread count; the default is torch's own."""
    value = os.environ.get("PADKERN_BENCH_THREADS")
    if value:
        torch.set_num_threads(int(value))


@pytest.fixture(scope="session")
def limits() -> Limits:
    """The machine's own rates; they end up beside the figures, under ``machine_limits``."""
    return _LIMITS


@pytest.fixture
def skip_peer(request):
    """skip_peer(reason, **figures): skips, and records both beside the figures."""

    def skip(reason: str, **figures: object) -> None:
        _SKIPPED.append({"name": request.node.name, "reason": reason, **figures})
        pytest.skip(reason)

    return skip


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)  # every single round: megabytes that nobody reads
    output_json["machine_limits"] = _LIMITS.to_json()
    output_json["skipped"] = _SKIPPED


def pytest_terminal_summary(terminalreporter):
    if _SKIPPED:
        terminalreporter.section("peers left out")
    for one in _SKIPPED:
        terminalreporter.write_line(f"{one['name']}: {one['reason']}")


@pytest.fixture
def measure(benchmark):
    """measure(run, **info): warms up, records memory and machine, times for about SECONDS.

    A call of seconds is repeated less: the check before it and the memory run have warmed it up.
    """

    def run_benchmark(run: Callable[[], object], **info: object) -> None:
        started = time.perf_counter()
        run()
        once = time.perf_counter() - started
        if once < 1:
            run()
            started = time.perf_counter()
            run()
            once = max(time.perf_counter() - started, 1e-6)
        benchmark.extra_info.update(machine_info(), **info, peak_extra_mib=peak_extra_mib(run))
        rounds = max(3, min(2000, int(SECONDS / once))) if once < 4 else 1 if once > 8 else 2
        benchmark.pedantic(run, rounds=rounds, iterations=1)

    return run_benchmark
