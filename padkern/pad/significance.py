"""Per-user metric values, paired bootstrap intervals of their difference, Holm's adjustment."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

# Cells of one block of bootstrap draws: bounds memory to about 32 MiB.
_CELLS = 4_000_000
# Above this many distinct differences drawing the users themselves is quicker.
_MAX_DISTINCT = 500
_METRIC = re.compile(r"(hit|ndcg)@([1-9][0-9]*)")


def metric_values(ranks: np.ndarray, metric: str) -> np.ndarray:
    """Value of a metric for every rank.

    Args:
        ranks: float array of any shape; 1 is best, half-integers allowed, ``inf`` is a miss.
        metric: ``hit@K`` (1 if rank <= K), ``ndcg@K`` (1 / log2(rank + 1) if rank <= K) or ``mrr``
            (1 / rank).

    Returns:
        float64 array of the same shape, values in 0..1.

    Raises:
        ValueError: unknown metric, or a rank below 1 or NaN.
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    if not (ranks >= 1.0).all():
        raise ValueError("ranks must be at least 1 (inf for a miss), never NaN")
    if metric == "mrr":
        return 1.0 / ranks
    match = _METRIC.fullmatch(metric)
    if match is None:
        raise ValueError(f"metric must be hit@K, ndcg@K or mrr, got {metric!r}")
    inside = ranks <= int(match[2])
    if match[1] == "hit":
        return inside.astype(np.float64)
    return np.where(inside, 1.0 / np.log2(ranks + 1.0), 0.0)


def paired_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    metric: str = "ndcg@10",
    *,
    resamples: int = 10_000,
    seed: int = 0,
    subset: np.ndarray | None = None,
) -> dict[str, float | None]:
    """Difference ``metric(a) - metric(b)`` over the same users, with its uncertainty.

    Users are drawn with replacement. Only how often each distinct difference is drawn matters, so
    where these are few, one multinomial draw over them stands for a draw over the users: the same
    distribution at a fraction of the work. Several seeds of a model are averaged per user first;
    the interval then covers the choice of users, not the choice of seeds.

    Args:
        a: float ranks ``[n]`` or ``[seeds, n]`` of one model, ``inf`` is a miss.
        b: ranks of the other model for the same users; its number of seeds may differ.
        metric: see `metric_values`.
        resamples: number of bootstrap resamples.
        seed: seed of the draws; the same inputs and seed give the same result.
        subset: bool ``[n]`` or integer positions of the users that count (None: all).

    Returns:
        ``difference`` (mean over users), ``low`` and ``high`` (95 % percentile interval) and ``p``
        (two-sided, at least 2 / (resamples + 1)); all None when no user counts.

    Raises:
        ValueError: shapes that do not fit, no resamples, or an unknown metric.
    """
    values = []
    for name, ranks in (("a", a), ("b", b)):
        ranks = np.atleast_2d(np.asarray(ranks, dtype=np.float64))
        if ranks.ndim != 2 or ranks.shape[0] == 0:
            raise ValueError(f"{name} must be [n] or [seeds, n], got shape {list(ranks.shape)}")
        values.append(metric_values(ranks, metric).mean(axis=0))
    if values[0].shape != values[1].shape:
        raise ValueError(
            f"a and b must rank the same users, got {values[0].size} and {values[1].size}"
        )
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    difference = values[0] - values[1]
    if subset is not None:
        difference = difference[np.asarray(subset)]
    n = difference.size
    if n == 0:
        return {"difference": None, "low": None, "high": None, "p": None}
    distinct, counts = np.unique(difference, return_counts=True)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    few = distinct.size <= _MAX_DISTINCT
    step = max(1, _CELLS // (distinct.size if few else n))
    for low in range(0, resamples, step):
        size = min(step, resamples - low)
        if few:
            means[low : low + size] = rng.multinomial(n, counts / n, size=size) @ distinct / n
        else:
            means[low : low + size] = difference[rng.integers(0, n, (size, n))].mean(axis=1)
    below, above = int((means <= 0).sum()), int((means >= 0).sum())
    bounds = np.percentile(means, [2.5, 97.5])
    return {
        "difference": float(difference.mean()),
        "low": float(bounds[0]),
        "high": float(bounds[1]),
        "p": min(1.0, 2.0 * (min(below, above) + 1) / (resamples + 1)),
    }


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjustment for several tests at once (Holm 1979): a p below 0.05 after it holds the
    chance of even one false finding among them to 5 %, whatever their dependence.

    Args:
        p: p-values of one family of tests.

    Returns:
        The adjusted values in the same order: with the m values sorted, the i-th smallest (from 0)
        becomes the largest of (m - j) p_j over j <= i, at most 1.

    Raises:
        ValueError: a value outside 0..1 or NaN.
    """
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p must be a sequence of values from 0 to 1, got {list(p)}")
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * np.arange(values.size, 0, -1))
    result = np.empty_like(values)
    result[order] = np.minimum(steps, 1.0)
    return result.tolist()
