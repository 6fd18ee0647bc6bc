"""How much of a grid fits into a number of minutes: fewer seeds first, then fewer epochs.

What a cell costs is measured by a pilot: the method is trained with one epoch in every phase, timed
phase by phase, and the epochs of its configuration are added up; a phase that several cells have
in common counts once. Early stopping is not foreseen, so an estimate is what a grid takes at most,
as far as the machine stays as quick as it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from padkern.pad.config import PhaseConfig, RunConfig
from padkern.pad.progress import Reporter

__all__ = ["Estimate", "Pilot", "Trim", "total_seconds", "trim", "trimmed_epochs", "with_share"]


@dataclass(frozen=True)
class Estimate:
    """Cost of one cell.

    Attributes:
        fixed: seconds outside epochs: building, gates, evaluation.
        phases: (seconds of one epoch, epochs of the configuration) of every phase of its own.
        shared: the same of phases that other cells may need too, by a name that they have there.
    """

    fixed: float
    phases: tuple[tuple[float, int], ...] = ()
    shared: Mapping[str, tuple[float, int]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For ``plan.json``."""
        return {
            "fixed_s": self.fixed,
            "phases": [list(phase) for phase in self.phases],
            "shared": {name: list(phase) for name, phase in self.shared.items()},
        }


@dataclass(frozen=True)
class Trim:
    """What is kept of a grid.

    Attributes:
        seeds: the first seeds, the same number for every method and data set.
        share: of the epochs of every phase, the same for every method and data set.
        seconds: estimate of what is kept.
    """

    seeds: int
    share: float
    seconds: float


class Pilot(Reporter):
    """Ends every phase after its first epoch and keeps the time."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phase = ("", 0.0, 0)
        self._phases: dict[str, tuple[float, int]] = {}

    def start_phase(self, name: str, epochs: int, batches: int) -> None:
        self._phase = (name, time.perf_counter(), epochs)

    def end_epoch(self, record: Mapping[str, Any]) -> None:
        name, began, epochs = self._phase
        self._phases[name] = (time.perf_counter() - began, epochs)

    def wants_stop(self) -> bool:
        return True

    def estimate(self, shared: Mapping[str, str]) -> Estimate:
        """To be asked when the cell is done.

        Args:
            shared: phase -> the name under which other cells may need it.
        """
        total = time.perf_counter() - self._start
        fixed = max(0.0, total - sum(seconds for seconds, _ in self._phases.values()))
        own = tuple(cost for name, cost in self._phases.items() if name not in shared)
        common = {shared[name]: cost for name, cost in self._phases.items() if name in shared}
        return Estimate(fixed, own, common)


def total_seconds(estimates: Collection[Estimate], share: float = 1.0) -> float:
    """Seconds of cells with a share of their epochs, common phases once."""
    costs = [cost for estimate in estimates for cost in estimate.phases]
    common: dict[str, tuple[float, int]] = {}
    for estimate in estimates:
        for name, cost in estimate.shared.items():
            common[name] = max(cost, common.get(name, cost))
    costs += common.values()
    epochs = sum(seconds * trimmed_epochs(epochs, share) for seconds, epochs in costs)
    return epochs + sum(estimate.fixed for estimate in estimates)


def trimmed_epochs(epochs: int, share: float) -> int:
    """A share of a number of epochs, rounded down, but not to nothing."""
    return min(epochs, max(1, math.floor(epochs * share + 1e-9)))


def trim(estimates: Collection[Estimate], seeds: int, seconds: float) -> Trim:
    """The most even part of a grid that is estimated to take no more than ``seconds``.

    Every method on every data set keeps the same number of seeds, and, where a single seed is too
    much already, the same share of its epochs, the largest that fits. One epoch of one seed is
    always kept, even beyond ``seconds``.

    Args:
        estimates: one for every method on every data set.
        seeds: how many the grid asks for.
        seconds: what may be spent.
    """
    one = total_seconds(estimates)
    kept = seeds if one * seeds <= seconds else int(seconds // one)
    if kept:
        return Trim(kept, 1.0, kept * one)
    costs = [cost for e in estimates for cost in (*e.phases, *e.shared.values())]
    longest = max((epochs for _, epochs in costs), default=1)
    for keep in range(max(longest - 1, 1), 0, -1):
        total = total_seconds(estimates, keep / longest)
        if total <= seconds:
            break
    return Trim(1, keep / longest, total)


def with_share(config: RunConfig, share: float) -> RunConfig:
    """The configuration with a share of the epochs of every phase."""
    sections = {name: getattr(config, name) for name in type(config).model_fields}
    epochs = {
        f"{name}.epochs": trimmed_epochs(section.epochs, share)
        for name, section in sections.items()
        if isinstance(section, PhaseConfig)
    }
    return config.with_values(epochs, "--budget")
