"""Figures of the HTML report, as SVG text: matplotlib's Agg family, no display needed."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from padkern.pad.summary import GROUPS, group_title, ordered_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "frequency_bars",
    "gate_weights",
    "interval_plot",
    "new_figure",
    "styled",
    "svg_text",
    "training_curves",
]

_COLOURS = {
    "most_pop": "#c9ced6",
    "text_knn": "#9aa3b2",
    "pretrain": "#5b8db8",
    "text": "#e0b15a",
    "id_plus_text": "#c9772e",
    "aligned": "#7fb39a",
    "pad": "#0f6b50",
}
_SPARE = ("#7a5ea8", "#b0526a", "#4d7c8a", "#8a7a4d")
_EXPERTS = ("#5b8db8", "#7fb39a", "#e0a33a", *_SPARE)
_INK = "#2b3340"
_RULE = "#dfe3e8"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "figure.titlesize": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#9aa3b2",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.8,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "padkern",
}


def styled(draw: Callable[..., str | None]) -> Callable[..., str | None]:
    """Draws under this module's style and leaves the process's own as it was."""

    @functools.wraps(draw)
    def styled(*args: Any, **options: Any) -> str | None:
        from matplotlib import rc_context

        with rc_context(_STYLE):
            return draw(*args, **options)

    return styled


@styled
def training_curves(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Validation NDCG@10 and training loss per epoch, one line a phase.

    Args:
        records: epoch records with phase, epoch, loss, ndcg@10 and best.

    Returns:
        SVG, or None without records.
    """
    phases: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        phases.setdefault(str(record.get("phase")), []).append(record)
    if not phases:
        return None
    figure, (left, right) = new_figure(1, 2, 9.6, 3.4)
    for place, (phase, rows) in enumerate(phases.items()):
        style = {
            "color": _colour(phase, place),
            "linewidth": 2.4 if phase in ("pad", "disentangle") else 1.6,
        }
        epochs = [row.get("epoch", index + 1) for index, row in enumerate(rows)]
        values = [_percent(row.get("ndcg@10")) for row in rows]
        left.plot(epochs, values, label=phase, **style)
        best = [index for index, row in enumerate(rows) if row.get("best")]
        if best:
            left.plot(epochs[best[-1]], values[best[-1]], "o", color=style["color"], markersize=5.5)
        right.plot(epochs, [_number(row.get("loss")) for row in rows], label=phase, **style)
    left.set_title("validation NDCG@10, % (dot: epoch kept)")
    right.set_title("training loss")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg_text(figure)


@styled
def frequency_bars(
    models: Mapping[str, Any], split: str = "test", metric: str = "ndcg@10"
) -> str | None:
    """A metric by frequency group of the target, one bar a row of the comparison table.

    Args:
        models: the ``models`` of ``metrics.json``.
        split: held-out part.
        metric: a metric of that file.
    """
    rows = [row for row in ordered_rows(models) if split in models[row]]
    groups = [g for g in GROUPS if any(_count(models[row][split], g) for row in rows)]
    if not rows or not groups:
        return None
    figure, axes = new_figure(1, 1, 9.6, 3.6)
    width = 0.84 / len(rows)
    for place, row in enumerate(rows):
        values = [_percent(models[row][split].get(group, {}).get(metric)) for group in groups]
        at = [index + (place - (len(rows) - 1) / 2) * width for index in range(len(groups))]
        bars = axes.bar(at, values, width * 0.92, color=_colour(row, place), label=row)
        if row == "pad":
            texts = ["" if math.isnan(value) else f"{value:.1f}" for value in values]
            axes.bar_label(bars, texts, padding=2, fontsize=8, fontweight="bold")
    counts = [_count(models[rows[0]][split], group) for group in groups]
    axes.set_xticks(
        range(len(groups)),
        [f"{group_title(g)}\n{n:,} users" for g, n in zip(groups, counts, strict=True)],
    )
    axes.tick_params(axis="x", length=0)
    axes.set_title(f"{split} {metric.upper()}, %, by training occurrences of the target")
    axes.legend(ncols=1, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg_text(figure)


@styled
def interval_plot(
    comparison: Mapping[str, Any], split: str = "test", metric: str = "ndcg@10"
) -> str | None:
    """Differences between rows with their 95 % intervals, one panel a difference.

    Args:
        comparison: content of ``comparison.json``.
        split: held-out part.
        metric: ``"ndcg@10"`` or ``"hit@10"``.
    """
    panels = {
        name: [
            (group, groups[group][metric])
            for group in GROUPS
            if groups.get(group, {}).get(metric, {}).get("difference") is not None
        ]
        for name, groups in comparison.get(split, {}).items()
    }
    panels = {name: entries for name, entries in panels.items() if entries}
    if not panels:
        return None
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure, grid = new_figure(lines, columns, 9.6, 2.4 * lines + 0.2, sharey=True, squeeze=False)
    axes_list = list(grid.flat)
    for spare in axes_list[len(panels) :]:
        spare.set_axis_off()
    for axes, (name, entries) in zip(axes_list, panels.items(), strict=False):
        axes.axvline(0, color=_INK, linewidth=1)
        for group, entry in entries:
            y = GROUPS.index(group)
            low, middle, high = (100 * entry[key] for key in ("low", "difference", "high"))
            colour = "#0f6b50" if low > 0 else "#b0526a" if high < 0 else "#7d8694"
            axes.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
            axes.plot(middle, y, "o", color=colour, markersize=6.5 if group == "all" else 5)
        axes.set_title(name)
        axes.set_xlabel(f"{metric.upper()}, percentage points")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
    axes_list[0].set_yticks(range(len(GROUPS)), [group_title(group) for group in GROUPS])
    axes_list[0].set_ylim(len(GROUPS) - 0.5, -0.5)
    return svg_text(figure)


@styled
def gate_weights(gate: Mapping[str, Any]) -> str | None:
    """Weight of each expert per frequency bin, hottest bin first.

    Args:
        gate: content of ``gate.json``: experts, labels, weights [bins][experts], and optionally
            vector_norm_shares [bins][experts].
    """
    experts, labels, weights = (gate.get(key) or [] for key in ("experts", "labels", "weights"))
    if not experts or not labels or len(labels) != len(weights):
        return None
    shares = gate.get("vector_norm_shares") or []
    panels = [("gate weight", weights)]
    if len(shares) == len(labels):
        panels.append(("share of the item vector's length", shares))
    figure, grid = new_figure(1, len(panels), 9.6, 3.4, squeeze=False)
    spread = range(len(labels))
    for axes, (title, table) in zip(grid.flat, panels, strict=True):
        bottom = [0.0] * len(labels)
        for place, expert in enumerate(experts):
            values = [_number(row[place]) for row in table]
            colour = _EXPERTS[place % len(_EXPERTS)]
            if table is shares:
                axes.bar(spread, values, 0.86, bottom=bottom, color=colour, label=expert)
                bottom = [low + value for low, value in zip(bottom, values, strict=True)]
            else:
                axes.plot(spread, values, "o-", color=colour, linewidth=2, label=expert)
        axes.set_xticks(spread, labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.set_xlabel("training occurrences of the item")
        axes.set_title(title)
    grid.flat[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg_text(figure)


def new_figure(rows: int, columns: int, width: float, height: float, **options: Any) -> Any:
    """A figure of width x height inches and its axes, without a display."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(rows, columns, **options)


def svg_text(figure: Figure) -> str:
    """The figure as an SVG element, the same text for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :]


def _colour(name: str, place: int) -> str:
    return _COLOURS.get(name, _SPARE[place % len(_SPARE)])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _percent(value: float | None) -> float:
    return 100 * _number(value)


def _count(values: Mapping[str, Any], group: str) -> int:
    return int(values.get(group, {}).get("count") or 0)
