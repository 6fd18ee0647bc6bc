"""The tables a run ends with, as plain texts: shared by the terminal and the HTML report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "GROUPS",
    "HEADLINES",
    "ROWS",
    "comparison_table",
    "group_title",
    "interval_table",
    "interval_text",
    "ordered_rows",
    "percent",
]

#: Rows of the comparison table, weakest information first.
ROWS = ("most_pop", "text_knn", "pretrain", "text", "id_plus_text", "aligned", "pad")
#: Groups of targets by training frequency.
GROUPS = ("all", "freq_0", "freq_1_5", "freq_6_50", "freq_gt_50")
#: The differences that a run is judged by.
HEADLINES = ("pad - pretrain", "pad - id_plus_text")
_TITLES = {
    "all": "all",
    "freq_0": "cold (0)",
    "freq_1_5": "1-5",
    "freq_6_50": "6-50",
    "freq_gt_50": ">50",
    "hist_1_4": "1-4 long",
    "hist_5_9": "5-9 long",
    "hist_10_19": "10-19 long",
    "hist_gt_19": ">19 long",
}


def group_title(group: str) -> str:
    """Short heading of a group: training occurrences of the target, or length of the history."""
    return _TITLES.get(group, group)


def ordered_rows(names: Iterable[str]) -> list[str]:
    """The usual rows in the usual order, then any others."""
    names = list(names)
    return [row for row in ROWS if row in names] + [row for row in names if row not in ROWS]


def percent(value: float | None, digits: int = 2) -> str:
    """A fraction as a number of percent, or a dash."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def comparison_table(
    metrics: Mapping[str, Any], split: str = "test"
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of Hit@10 / NDCG@10 in percent, overall and by frequency group.

    Args:
        metrics: content of ``metrics.json``.
        split: ``"test"`` or ``"valid"``.

    Returns:
        Headings and rows; the first row counts the users of each group.
    """
    models = {
        row: values[split] for row, values in metrics.get("models", {}).items() if split in values
    }
    names = ordered_rows(models)
    groups = [group for group in GROUPS if any(group in models[row] for row in names)]
    columns = ["row", *(group_title(group) for group in groups)]
    rows = []
    if names:
        counts = [models[names[0]].get(group, {}).get("count") for group in groups]
        rows.append(["users", *("-" if count is None else f"{count:,}" for count in counts)])
    for row in names:
        cells = [models[row].get(group, {}) for group in groups]
        rows.append([row, *(_pair(cell) for cell in cells)])
    return columns, rows


def _pair(cell: Mapping[str, Any]) -> str:
    if cell.get("hit@10") is None:
        return "-"
    return f"{percent(cell['hit@10'])} / {percent(cell.get('ndcg@10'))}"


def interval_text(entry: Mapping[str, Any] | None) -> str:
    """``+1.23 [0.98, 1.48]`` in percentage points, or a dash."""
    if not entry or entry.get("difference") is None:
        return "-"
    low, high = percent(entry.get("low")), percent(entry.get("high"))
    return f"{100 * entry['difference']:+.2f} [{low}, {high}]"


def interval_table(
    comparison: Mapping[str, Any], split: str = "test", names: Iterable[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the differences between rows, with 95 % intervals.

    Args:
        comparison: content of ``comparison.json``.
        split: ``"test"`` or ``"valid"``.
        names: the differences wanted; None for all.
    """
    wanted = None if names is None else set(names)
    columns = ["difference", "targets", "NDCG@10", "p", "Hit@10", "p"]
    rows = []
    for name, groups in comparison.get(split, {}).items():
        if wanted is not None and name not in wanted:
            continue
        for group in (group for group in GROUPS if group in groups):
            cells = []
            for metric in ("ndcg@10", "hit@10"):
                entry = groups[group].get(metric)
                p = (entry or {}).get("p")
                cells += [interval_text(entry), "-" if p is None else f"{p:.4f}"]
            rows.append([name, group_title(group), *cells])
    return columns, rows
