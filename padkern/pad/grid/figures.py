"""Figures of a comparison, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from padkern.pad.plots import new_figure, styled, svg_text
from padkern.pad.summary import group_title, percent

__all__ = ["group_map", "method_bars"]

_BEST, _OTHER, _INK = "#0f6b50", "#9aa3b2", "#2b3340"


@styled
def method_bars(
    methods: Mapping[str, Any], best: str, split: str = "test", metric: str = "ndcg@10"
) -> str | None:
    """A metric of every method, highest first, with its standard deviation over seeds.

    Args:
        methods: of one data set in ``table.json``.
        best: label drawn in green.
        split: held-out part.
        metric: a metric of the table.

    Returns:
        SVG, or None without methods.
    """
    cells = {label: entry[split]["all"] for label, entry in methods.items()}
    labels = [label for label, cell in cells.items() if cell.get(metric) is not None]
    labels.sort(key=lambda label: cells[label][metric], reverse=True)
    if not labels:
        return None
    figure, axes = new_figure(1, 1, 9.6, 0.9 + 0.3 * len(labels))
    places = list(range(len(labels)))
    values = [100 * cells[label][metric] for label in labels]
    deviations = [100 * (cells[label].get(f"{metric}_sd") or 0.0) for label in labels]
    colours = [_BEST if label == best else _OTHER for label in labels]
    bars = axes.barh(places, values, 0.7, color=colours, xerr=deviations, ecolor=_INK)
    axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=6, fontsize=8.5)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.08)
    axes.set_title(f"{split} {metric.upper()}, %")
    return svg_text(figure)


@styled
def group_map(
    methods: Mapping[str, Any],
    groups: Sequence[str],
    title: str,
    split: str = "test",
    metric: str = "ndcg@10",
) -> str | None:
    """A metric of every method in every group: the darker, the nearer to the group's best.

    Args:
        methods: of one data set in ``table.json``.
        groups: columns; empty ones are left out.
        title: what the groups are.
        split: held-out part.
        metric: a metric of the table.

    Returns:
        SVG, or None where no group has users.
    """
    labels = list(methods)
    cells = {label: methods[label][split] for label in labels}
    groups = [g for g in groups if any(cells[label][g]["count"] for label in labels)]
    if not groups:
        return None
    best = {g: max(cells[label][g][metric] for label in labels) for g in groups}
    shades = [
        [cells[label][g][metric] / best[g] if best[g] else 0.0 for g in groups] for label in labels
    ]
    figure, axes = new_figure(1, 1, 9.6, 1.1 + 0.3 * len(labels))
    axes.imshow(shades, cmap="Greens", vmin=0.0, vmax=2.0, aspect="auto")
    for y, label in enumerate(labels):
        for x, group in enumerate(groups):
            value = cells[label][group][metric]
            bold = "bold" if value == best[group] > 0 else "normal"
            axes.text(x, y, percent(value), ha="center", va="center", fontweight=bold, fontsize=9)
    counts = [cells[labels[0]][group]["count"] for group in groups]
    axes.set_xticks(
        range(len(groups)),
        [f"{group_title(g)}\n{n:,} users" for g, n in zip(groups, counts, strict=True)],
    )
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_title(f"{split} {metric.upper()}, %, by {title}")
    return svg_text(figure)
