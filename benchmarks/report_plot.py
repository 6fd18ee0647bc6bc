"""The figure of ``make bench-report``: times, ratios, share of the limit, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter
from report_data import Entry, Suite, best

COLOURS = {
    "native": "#c1121f",
    "triton": "#c1121f",
    "cuda": "#780000",
    "broadcast": "#6c757d",
    "eager_gemm": "#8ecae6",
    "eager_ladder": "#219ebc",
    "compile_gemm": "#ffb703",
    "compile_ladder": "#fb8500",
    "strips": "#606c38",
    "flash": "#2a9d8f",
    "keops": "#7b2cbf",
    "geomloss": "#c77dff",
}
MARKERS = {"padkern": "D", "peer": "o", "hand": "s"}


def _plain(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _dots(axes: Any, rows: list[tuple[str, dict[str, Entry]]], value: Any) -> None:
    """One line per case, one mark per implementation; log scale."""
    for place, (_, entries) in enumerate(rows):
        points = {name: value(entry) for name, entry in entries.items()}
        known = [point for point in points.values() if point]
        if known:
            axes.plot([min(known), max(known)], [place, place], color="#dddddd", zorder=1)
        for name, point in points.items():
            if point:
                ours = entries[name].kind == "padkern"
                axes.scatter(
                    point,
                    place,
                    s=52 if ours else 34,
                    marker=MARKERS[entries[name].kind],
                    color=COLOURS.get(name, "#333333"),
                    edgecolors="white",
                    linewidths=0.5,
                    zorder=3 if ours else 2,
                )
    axes.set_xscale("log")
    _plain(axes.xaxis)


def _bars(axes: Any, groups: list[tuple[str, list[float | None], str]], unit: str) -> None:
    """Horizontal bars, several per case, each with its number."""
    height = 0.8 / max(len(groups), 1)
    for index, (label, values, colour) in enumerate(groups):
        for place, number in enumerate(values):
            if number is None:
                continue
            at = place + (index - (len(groups) - 1) / 2) * height
            axes.barh(at, number, height * 0.9, color=colour, label=label)
            axes.text(number, at, f" {number:.3g}{unit}", va="center", fontsize=7)
            label = "_"
    axes.margins(x=0.15)


def _peer_ratios(rows: list[tuple[str, dict[str, Entry]]], kind: str) -> list[float | None]:
    found: list[float | None] = []
    for _, entries in rows:
        ours, peer = best(entries, "padkern"), best(entries, kind)
        found.append(peer.median_ms / ours.median_ms if ours and peer else None)
    return found


def plot(suite: Suite, path: Path) -> None:
    """Draws the forward+backward figures of a suite into a PNG.

    Args:
        suite: At least one forward+backward case.
        path: File to write.
    """
    usual = suite.usual_threads
    cases = [case for case in suite.cases if case.mode == "fwd_bwd"]
    rows = [(case.label(usual), suite.of(case)) for case in reversed(cases)]
    height = max(3.4, 1.8 + 0.3 * len(rows))
    figure, grid = plt.subplots(
        1, 4, figsize=(17, height), sharey=True, width_ratios=[1.5, 1, 0.8, 1], layout="constrained"
    )
    times, ratios, shares, memory = grid
    _dots(times, rows, lambda entry: entry.median_ms)
    times.set_title("forward + backward, median ms")
    times.set_yticks(range(len(rows)), [label for label, _ in rows])
    groups = [("best published peer", _peer_ratios(rows, "peer"), "#fb8500")]
    by_hand = _peer_ratios(rows, "hand")
    if any(by_hand):
        groups.append(("best torch by hand", by_hand, COLOURS["strips"]))
    _bars(ratios, groups, "×")
    ratios.axvline(1, color="#333333", linewidth=0.8)
    ratios.set_title("peer / padkern")
    if any(any(values) for _, values, _ in groups):
        below = (0.5, -0.35 / height)
        ratios.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=below)
    share = _shares(suite, [*reversed(cases)])
    _bars(shares, [("", share, COLOURS["native"])], "%")
    shares.set_xlim(0, 1.25 * max(100.0, *(number or 0.0 for number in share)))
    shares.axvline(100, color="#333333", linewidth=0.8)
    shares.set_title("padkern, % of the limit")
    _dots(memory, rows, lambda entry: entry.info.get("peak_extra_mib"))
    memory.set_title("peak extra memory, MiB")
    for axes in grid:
        axes.grid(axis="x", color="#eeeeee", zorder=0)
        axes.set_axisbelow(True)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.spines[["top", "right"]].set_visible(False)
    names = [name for name in COLOURS if any(name in entries for _, entries in rows)]
    kinds = {name: e.kind for _, entries in rows for name, e in entries.items()}
    handles = [
        plt.Line2D([], [], marker=MARKERS[kinds[n]], color=COLOURS[n], linestyle="") for n in names
    ]
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    where = suite.machine.get("gpu") or suite.machine.get("cpu", "")
    count = "" if "gpu" in suite.machine else f", {usual} threads"
    title = f"MK-MMD, n = m × D, on {where}{count}, torch {suite.machine.get('torch')}"
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _shares(suite: Suite, cases: list[Any]) -> list[float | None]:
    found: list[float | None] = []
    for case in cases:
        ours = best(suite.of(case), "padkern")
        limit = None
        if ours:
            limit = ours.info.get("roofline_ms") or suite.floor_ms(case, ours.info["gflop"])
        found.append(100 * limit / ours.median_ms if ours and limit else None)
    return found
