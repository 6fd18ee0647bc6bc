"""The table of a grid: means and deviations over seeds, and whether differences are real.

Every figure is computed from the ranks of the finished cells, in a fixed order and with fixed
bootstrap draws, so the same cells give the same table to the last digit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from padkern.errors import CheckpointError
from padkern.pad.evaluation import FREQUENCY_GROUPS, frequency_group
from padkern.pad.grid.cells import PARTS, Result
from padkern.pad.grid.spec import Grid, known_methods
from padkern.pad.significance import holm, metric_values, paired_bootstrap

__all__ = ["GROUPS", "HISTORY_GROUPS", "METRICS", "TESTED", "build_table", "members"]

#: Groups of users by the length of their history: name -> (shortest, longest), both included.
HISTORY_GROUPS: dict[str, tuple[int, int | None]] = {
    "hist_1_4": (1, 4),
    "hist_5_9": (5, 9),
    "hist_10_19": (10, 19),
    "hist_gt_19": (20, None),
}
GROUPS = ("all", *FREQUENCY_GROUPS, *HISTORY_GROUPS)
METRICS = ("hit@5", "hit@10", "hit@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")
#: Metrics whose differences get intervals.
TESTED = ("ndcg@10", "hit@10")
_EXPOSURE = ("coverage@10", "cold_share@10")
_SELECT = "ndcg@10"


def members(ranks: Mapping[str, np.ndarray], group: str) -> np.ndarray:
    """Bool ``[n]``: the users of a group, from the columns of a cell's ranks."""
    if group == "all":
        return np.ones(len(ranks["rank"]), dtype=bool)
    if group in FREQUENCY_GROUPS:
        return frequency_group(ranks["frequency"], group)
    low, high = HISTORY_GROUPS[group]
    length = ranks["history_length"]
    return (length >= low) & (length <= (np.inf if high is None else high))


def build_table(
    grid: Grid,
    results: Sequence[Result],
    failures: Sequence[Mapping[str, Any]],
    plan: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of ``table.json``.

    Args:
        grid: what was asked for.
        results: finished cells.
        failures: records of the others: dataset, method, seed, error.
        plan: what ``--budget`` left of the grid, or None.

    Returns:
        JSON-serialisable: per data set the methods with mean and standard deviation over seeds of
        every metric in every group (fractions), the best method by mean validation NDCG@10, and on
        test the best method's difference to each other one with a 95 % interval, p and
        Holm-adjusted p.

    Raises:
        CheckpointError: cells of one data set rank different users.
    """
    registry = known_methods()
    datasets: dict[str, Any] = {}
    for name in grid.datasets:
        by_label: dict[str, list[Result]] = {}
        for result in results:
            if result.cell.dataset == name:
                by_label.setdefault(result.cell.label, []).append(result)
        ordered = {label: by_label[label] for label in grid.methods if label in by_label}
        _check_users(name, ordered)
        datasets[name] = _dataset(grid, name, ordered, registry)
    return {
        "title": grid.title,
        "preset": grid.preset,
        "seeds": list(grid.seeds),
        "cells": {"finished": len(results), "failed": len(failures)},
        "trimmed": _trimmed(grid, plan),
        "tuning": grid.tuning,
        "datasets": datasets,
        "failed": [dict(failure) for failure in failures],
    }


def _dataset(
    grid: Grid, name: str, by_label: Mapping[str, list[Result]], registry: Mapping[str, Any]
) -> dict[str, Any]:
    data, text = grid.source_of(name)
    methods = {}
    for label, runs in by_label.items():
        method = grid.methods[label].method or label
        methods[label] = {
            "method": method,
            "describe": registry[method].describe,
            "set": grid.methods[label].values | grid.datasets[name].tuned.get(label, {}),
            "seeds": [run.cell.seed for run in runs],
            **{part: _figures(runs, part) for part in PARTS},
        }
    best = max(methods, key=lambda m: methods[m]["valid"]["all"][_SELECT] or 0.0, default=None)
    resamples = max((r[0].cell.config.evaluation.resamples for r in by_label.values()), default=0)
    return {
        "data": data,
        "text": text,
        "best": best,
        "methods": methods,
        "differences": {} if best is None else _differences(by_label, best, resamples),
    }


def _figures(runs: Sequence[Result], part: str) -> dict[str, dict[str, Any]]:
    """Group -> count, and each metric's mean and, of several seeds, standard deviation."""
    figures: dict[str, dict[str, Any]] = {}
    per_seed = [{m: metric_values(run.ranks[part]["rank"], m) for m in METRICS} for run in runs]
    for group in GROUPS:
        inside = members(runs[0].ranks[part], group)
        count = int(inside.sum())
        cell: dict[str, Any] = {"count": count}
        for metric in METRICS:
            values = [float(seed[metric][inside].mean()) for seed in per_seed] if count else []
            cell |= _spread(metric, values)
        figures[group] = cell
    for name in _EXPOSURE:
        values = [run.metrics[part]["all"].get(name) for run in runs]
        figures["all"] |= _spread(name, [] if None in values else values)
    return figures


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {
        name: float(np.mean(values)) if values else None,
        f"{name}_sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }


def _differences(
    by_label: Mapping[str, list[Result]], best: str, resamples: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """``best - other`` -> group -> metric -> difference, low, high, p and p_holm, on test.

    Of each metric the overall differences are one family of tests, those in all groups another.
    """
    stacked = {
        label: np.stack([run.ranks["test"]["rank"] for run in runs])
        for label, runs in by_label.items()
    }
    columns = by_label[best][0].ranks["test"]
    subsets = {group: members(columns, group) for group in GROUPS}
    subsets = {group: inside for group, inside in subsets.items() if inside.any()}
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for label in (other for other in stacked if other != best):
        result[f"{best} - {label}"] = {
            group: {
                metric: paired_bootstrap(
                    stacked[best], stacked[label], metric, subset=inside, resamples=resamples
                )
                for metric in TESTED
            }
            for group, inside in subsets.items()
        }
    for metric in TESTED:
        for family in (["all"], [group for group in subsets if group != "all"]):
            tests = [groups[group][metric] for groups in result.values() for group in family]
            for test, adjusted in zip(tests, holm([t["p"] for t in tests]), strict=True):
                test["p_holm"] = adjusted
    return result


def _check_users(name: str, by_label: Mapping[str, list[Result]]) -> None:
    """A paired comparison needs the same users and targets everywhere."""
    runs = [run for part in by_label.values() for run in part]
    for run in runs[1:]:
        for part in PARTS:
            for column in ("user", "target"):
                if not np.array_equal(run.ranks[part][column], runs[0].ranks[part][column]):
                    raise CheckpointError(
                        f"{name}: {run.cell} ranks another {column} in {part} than {runs[0].cell}"
                    )


def _trimmed(grid: Grid, plan: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the budget took away, or None."""
    if plan is None or (plan["seeds"] == len(grid.seeds) and plan["epoch_share"] == 1.0):
        return None
    return {
        "budget_minutes": plan["budget_minutes"],
        "seeds_kept": list(grid.seeds[: plan["seeds"]]),
        "seeds_left_out": list(grid.seeds[plan["seeds"] :]),
        "epoch_share": plan["epoch_share"],
    }
