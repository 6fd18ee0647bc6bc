"""How times grow with the size of the problem: a table and ``scaling.png``.

An entry takes part when its ``extra_info`` names a ``growth`` (the task), a ``size`` and a
``size_unit``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter


class Point(NamedTuple):
    """One measured size: seconds, and MiB of memory growth and in total where recorded."""

    size: int
    seconds: float
    resident_mib: float | None
    total_mib: float | None


class Growth(NamedTuple):
    """One task at several sizes, smallest first."""

    task: str
    unit: str
    points: list[Point]

    @property
    def exponent(self) -> float | None:
        """See :func:`exponent`."""
        return exponent([p.size for p in self.points], [p.seconds for p in self.points])


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Slope of log(seconds) over log(size), by least squares; 1 is linear growth.

    None with fewer than two different sizes, or a time that is no positive number.
    """
    if len(set(sizes)) < 2 or not all(value > 0 for value in seconds):
        return None
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in seconds]
    middle, height = sum(x) / len(x), sum(y) / len(y)
    spread = sum((v - middle) ** 2 for v in x)
    return sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / spread


def growths(entries: Sequence[dict[str, Any]]) -> list[Growth]:
    """The tasks among raw benchmark entries, in their order."""
    found: dict[tuple[str, str], list[Point]] = {}
    for raw in entries:
        info = raw["extra_info"]
        if "growth" not in info:
            continue
        point = Point(
            int(info["size"]),
            float(raw["stats"]["median"]),
            info.get("resident_mib"),
            info.get("total_mib"),
        )
        found.setdefault((info["growth"], info["size_unit"]), []).append(point)
    return [Growth(task, unit, sorted(points)) for (task, unit), points in found.items()]


def rows(found: Sequence[Growth]) -> list[list[str]]:
    """Cells: task, size, seconds, times the first, growth of memory, memory, fitted exponent."""

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"

    lines = []
    for one in found:
        first = one.points[0]
        for point in one.points:
            lines.append(
                [
                    one.task,
                    f"{point.size:,} {one.unit}",
                    cell(point.seconds),
                    f"{cell(point.size / first.size)}×",
                    f"{cell(point.seconds / first.seconds)}×",
                    cell(point.resident_mib),
                    cell(point.total_mib),
                    "–" if one.exponent is None else f"{one.exponent:.2f}",
                ]
            )
    return lines


HEADER = ["task", "size", "s", "size ×", "time ×", "growth MiB", "in total MiB", "exponent"]


def plot_growth(found: Sequence[Growth], path: Path, where: str) -> None:
    """Draws every task on logarithmic axes, with the line of slope 1 through its first point.

    Args:
        found: at least one task.
        path: PNG to write.
        where: the machine, for the title.
    """
    figure, grid = plt.subplots(
        1, len(found), figsize=(4.4 * len(found), 4), squeeze=False, layout="constrained"
    )
    for axes, one in zip(grid[0], found, strict=True):
        sizes, seconds = [p.size for p in one.points], [p.seconds for p in one.points]
        line = [seconds[0] * size / sizes[0] for size in sizes]
        axes.plot(sizes, line, "--", color="#6c757d", label="slope 1 through the first point")
        axes.plot(sizes, seconds, "D", color="#c1121f", label="measured median")
        axes.set(xscale="log", yscale="log", xlabel=one.unit, ylabel="seconds")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_formatter(NullFormatter())
        slope = "" if one.exponent is None else f", exponent {one.exponent:.2f}"
        axes.set_title(f"{one.task}{slope}", fontsize=10)
        axes.grid(which="both", color="#eeeeee", zorder=0)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"padkern on {where}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
