"""What ``make bench-report`` knows: benchmark JSON as records, best peers, shares and warnings."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

OURS = ("native", "triton", "cuda")
# Peers that ran this much slower, relative to the machine's matrix products, than in the figures
# below would make padkern look better than it is.
SUSPICIOUS = 1.5


class Case(NamedTuple):
    """Inputs and conditions that implementations share."""

    mode: str
    n: int
    m: int
    dim: int
    dtype: str
    threads: int
    malloc: str

    def label(self, usual_threads: int = 0) -> str:
        """Short name for tables; what is usual (float32, all threads, plain malloc) is left out."""
        size = f"{self.n}" if self.n == self.m else f"{self.n}+{self.m}"
        text = f"{size} × {self.dim}"
        if self.dtype != "float32":
            text += f" {self.dtype}"
        if usual_threads and self.threads != usual_threads:
            text += f", {self.threads} thread" + ("s" if self.threads != 1 else "")
        return text + (", memory kept" if self.malloc == "kept" else "")


@dataclass(frozen=True)
class Entry:
    """One timed implementation of one case."""

    case: Case
    name: str
    kind: str  # padkern, peer, or hand (a peer nobody publishes)
    median_ms: float
    info: dict[str, Any] = field(repr=False)

    @property
    def gflops(self) -> float:
        """Useful GFLOP/s: 12 N^2 D forward+backward, 4 N^2 D forward."""
        return float(self.info["gflop"]) / self.median_ms * 1e3


@dataclass
class Suite:
    """One JSON file of MK-MMD figures."""

    path: Path
    machine: dict[str, Any]
    commit: str
    date: str
    limits: dict[str, Any]
    skipped: list[dict[str, Any]]
    entries: list[Entry]

    @property
    def cases(self) -> list[Case]:
        """Cases in order of size."""
        key = lambda c: (c.mode, c.n, c.dim, c.dtype != "float32", c.dtype, c.malloc)  # noqa: E731
        return sorted({entry.case for entry in self.entries}, key=key)

    def of(self, case: Case) -> dict[str, Entry]:
        """The implementations timed on a case, fastest first."""
        found = [entry for entry in self.entries if entry.case == case]
        return {e.name: e for e in sorted(found, key=lambda e: e.median_ms)}

    @property
    def usual_threads(self) -> int:
        """The largest thread count used."""
        return max((entry.case.threads for entry in self.entries), default=0)

    def rate(self, case: Case) -> float | None:
        """The better of the two float32 product rates at a case's width, in GFLOP/s."""
        rates = self.limits.get(str(case.threads), {})
        found = [
            rates.get(name, {}).get(str(case.dim))
            for name in ("sgemm_gflops", "coefficient_gflops")
        ]
        known = [rate for rate in found if rate]
        return max(known) if known and case.dtype == "float32" else None

    def floor_ms(self, case: Case, gflop: float) -> float | None:
        """Time of the products at that rate and, one after the other, one exponential a pair."""
        rate, exp = self.rate(case), self.limits.get(str(case.threads), {}).get("exp_gelems")
        if rate is None or not exp:
            return None
        total = case.n + case.m
        return gflop / rate * 1e3 + total * (total - 1) / 2 / exp / 1e6


def _entry(raw: dict[str, Any]) -> Entry | None:
    info = raw["extra_info"]
    if info.get("op", "") == "mkmmd":
        name, mode = info["implementation"], info["mode"]
    elif (raw.get("group") or "").startswith("mkmmd ") and "name" in (raw.get("params") or {}):
        name, mode = raw["params"]["name"], raw["params"]["mode"]  # files of version 0.1
    else:
        return None
    case = Case(
        mode,
        info["n"],
        info["m"],
        info["D"],
        info["dtype"],
        info.get("threads", 0),
        info.get("malloc", "default"),
    )
    kind = info.get("kind") or ("padkern" if name in OURS else "peer")
    median = info.get("event_median_ms") or raw["stats"]["median"] * 1e3
    return Entry(case, name, kind, float(median), info)


def load(path: Path) -> tuple[Suite, list[dict[str, Any]]]:
    """One file: its MK-MMD figures and, raw, the benchmarks of other ops."""
    content = json.loads(path.read_text())
    entries, others = [], []
    for raw in content["benchmarks"]:
        entry = _entry(raw)
        if entry is not None:
            # The specification is no peer; it was timed up to version 0.1.
            entries += [entry] if entry.name != "reference" else []
        elif raw.get("group") != "machine":
            others.append(raw)
    machine = next((e.info for e in entries), None)
    if machine is None:
        machine = next((raw["extra_info"] for raw in others), {})
    suite = Suite(
        path,
        machine,
        content.get("commit_info", {}).get("id") or "unknown",
        content.get("datetime", "unknown"),
        content.get("machine_limits", {}),
        content.get("skipped", []),
        entries,
    )
    return suite, others


def best(entries: dict[str, Entry], *kinds: str) -> Entry | None:
    """The fastest implementation of the given kinds."""
    return next((entry for entry in entries.values() if entry.kind in kinds), None)


# Forward+backward at 2 threads, ms, and the rate of the product [4096, D] x [D, 4096] there.
# Source: EPYC Zen 3, torch 2.13, 2 threads. The forms are pooled ones, 4 n^2 pairs.
PEER_FIGURES_SOURCE = "EPYC Zen 3, torch 2.13, 2 threads"
PEER_FIGURES_SGEMM = {128: 75.0}
PEER_FIGURES = {
    (336, 128): {
        "broadcast": 612.0,
        "eager_gemm": 14.1,
        "eager_ladder": 8.6,
        "compile_gemm": 9.0,
        "compile_ladder": 21.0,
        "keops": 762.0,
    },
    (1024, 128): {
        "broadcast": 11900.0,
        "eager_gemm": 123.0,
        "eager_ladder": 109.0,
        "compile_gemm": 77.8,
        "compile_ladder": 277.0,
        "keops": 6723.0,
    },
    (4096, 128): {
        "eager_gemm": 6521.0,
        "eager_ladder": 5216.0,
        "compile_gemm": 1930.0,
        "compile_ladder": 3705.0,
    },
}


def peer_warnings(suite: Suite) -> list[str]:
    """Peers that are more than 1.5 times slower, in units of sgemm time, than the known figures.

    The better of the two malloc conditions counts.
    """
    fastest: dict[tuple[int, int, str], Entry] = {}
    for entry in suite.entries:
        case = entry.case
        known = PEER_FIGURES.get((case.n, case.dim), {})
        if case.mode != "fwd_bwd" or case.dtype != "float32" or entry.name not in known:
            continue
        key = (case.n, case.dim, entry.name)
        if key not in fastest or entry.median_ms < fastest[key].median_ms:
            fastest[key] = entry
    found = []
    for (n, dim, name), entry in sorted(fastest.items()):
        rates = suite.limits.get(str(entry.case.threads), {})
        here = rates.get("sgemm_gflops", {}).get(str(dim))
        if not here:
            continue
        there = PEER_FIGURES_SGEMM[dim]
        slower = entry.median_ms * here / (PEER_FIGURES[n, dim][name] * there)
        if slower > SUSPICIOUS:
            found.append(
                f"{name} at n = {n}, D = {dim} takes {entry.median_ms:.3g} ms, {slower:.1f} times "
                f"as long relative to sgemm ({here:.0f} GFLOP/s) as on {PEER_FIGURES_SOURCE} "
                f"({PEER_FIGURES[n, dim][name]:g} ms at {there:.0f} GFLOP/s)"
            )
    return found
