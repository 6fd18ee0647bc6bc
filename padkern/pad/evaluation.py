"""Exact full ranking of a split and the metrics read from it.

Every user counts. Scores are inner products of user states and item vectors; ranks are counted
(`padkern.ops.ranking`), so no users x items matrix exists and ties are neutral. (A scorer may bring
scores of its own, 256 users at a time.) Groups use training frequencies only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from padkern.ops.ranking import CHUNK, ItemTiles, rank_chunk, rank_scores
from padkern.pad.significance import metric_values, paired_bootstrap

if TYPE_CHECKING:
    from padkern.data.dataset import Ragged
    from padkern.data.split import EvalSplit

__all__ = [
    "FREQUENCY_GROUPS",
    "TOP_K",
    "Evaluation",
    "Scorer",
    "evaluate",
    "frequency_group",
    "metric_values",
    "paired_bootstrap",
]

#: Groups of targets by training frequency: name -> (lowest, highest) count, both included.
FREQUENCY_GROUPS: dict[str, tuple[int, int | None]] = {
    "freq_0": (0, 0),
    "freq_1_5": (1, 5),
    "freq_6_50": (6, 50),
    "freq_gt_50": (51, None),
}
#: Recommended items kept per user when asked for.
TOP_K = 20
_COVERAGE_K = 10


class Scorer(Protocol):
    """What `evaluate` ranks with.

    It may have a method ``frozen()`` that gives a scorer for many calls: `evaluate` asks that one.
    One whose states would be as wide as the catalogue may also have ``score_all(history)``, float
    ``[n, N + 1]``: `evaluate` then ranks these, and asks for neither states nor item matrix.
    """

    def user_states(self, history: Ragged) -> Tensor:
        """State of every row of ``history`` (item ids, oldest first): float ``[n, D]``."""

    def item_matrix(self) -> Tensor:
        """Item vectors, float ``[N + 1, D]``; row 0 is padding."""


def frequency_group(frequency: np.ndarray, group: str) -> np.ndarray:
    """Bool array: which training counts fall into ``group`` (a key of `FREQUENCY_GROUPS`)."""
    low, high = FREQUENCY_GROUPS[group]
    inside = np.asarray(frequency) >= low
    return inside if high is None else inside & (np.asarray(frequency) <= high)


@dataclass(frozen=True)
class Evaluation:
    """Ranks of one split under one scorer.

    Attributes:
        ranks: float64 ``[n]``; 1 is best, ``inf`` is a certain miss.
        targets: int64 ``[n]`` item ids.
        users: int64 ``[n]`` rows of the dataset's users.
        target_frequency: int64 ``[n]`` training count of the target.
        target_bin: int64 ``[n]`` frequency bin of the target.
        top: int64 ``[n, 20]`` recommended ids, 0 where there are no more; None if not asked for.
        counters: users whose target was masked (``masked_targets``), whose target score was NaN
            (``nan_targets``) or tied (``ties``), and the number of NaN scores of other candidates
            (``nan_others``).
        num_items: N.
        num_bins: highest frequency bin.
        ks: cut-offs of Hit and NDCG.
        cold_items: bool ``[N + 1]``, items with training count 0; padding is False.
    """

    ranks: np.ndarray
    targets: np.ndarray
    users: np.ndarray
    target_frequency: np.ndarray
    target_bin: np.ndarray
    top: np.ndarray | None
    counters: dict[str, int]
    num_items: int
    num_bins: int
    ks: tuple[int, ...] = (5, 10, 20)
    cold_items: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def groups(self) -> Iterator[tuple[str, np.ndarray]]:
        """Pairs (name, bool ``[n]``): ``all``, the frequency groups, then ``bin_1`` and on."""
        yield "all", np.ones(self.ranks.size, dtype=bool)
        for name in FREQUENCY_GROUPS:
            yield name, frequency_group(self.target_frequency, name)
        for number in range(1, self.num_bins + 1):
            yield f"bin_{number}", self.target_bin == number

    def group(self, name: str) -> np.ndarray:
        """Bool ``[n]``: the users of one group, for the ``subset`` of `paired_bootstrap`."""
        for key, members in self.groups():
            if key == name:
                return members
        raise KeyError(name)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Group -> metric -> value, as fractions; an empty group has count 0 and None metrics.

        Under ``all`` also ``coverage@10`` (share of the catalogue recommended to at least one user)
        and ``cold_share@10`` (share of recommended places held by items of training count 0), when
        the evaluation kept recommendations.
        """
        names = [f"{kind}@{k}" for k in self.ks for kind in ("hit", "ndcg")] + ["mrr"]
        values = {name: metric_values(self.ranks, name) for name in names}
        result: dict[str, dict[str, Any]] = {}
        for group, members in self.groups():
            count = int(members.sum())
            result[group] = {"count": count} | {
                name: float(values[name][members].mean()) if count else None for name in names
            }
        if self.top is not None:
            result["all"] |= self._exposure(self.top[:, :_COVERAGE_K])
        return result

    def _exposure(self, top: np.ndarray) -> dict[str, float | None]:
        places = top[top > 0]
        return {
            f"coverage@{_COVERAGE_K}": np.unique(places).size / self.num_items,
            f"cold_share@{_COVERAGE_K}": (
                float(self.cold_items[places].mean()) if places.size else None
            ),
        }


@torch.no_grad()
def evaluate(
    scorer: Scorer,
    split: EvalSplit,
    *,
    train_frequency: np.ndarray,
    item_bins: np.ndarray,
    ks: Sequence[int] = (5, 10, 20),
    chunk: int = CHUNK,
    mask_repeats: bool = True,
    with_top: bool = False,
    states: Tensor | None = None,
    backend: str = "auto",
) -> Evaluation:
    """Rank every target of ``split`` among all items.

    Args:
        scorer: see `Scorer`; it is asked for chunks of exactly ``chunk`` histories, the last one
            filled up by repeating its last row. One with a method ``frozen()`` is replaced by what
            that returns, a scorer that need not compute item vectors again for every chunk.
        split: histories (all of a history is masked), targets and user rows.
        train_frequency: int64 ``[N + 1]`` training counts, index 0 is padding.
        item_bins: int64 ``[N + 1]`` frequency bin of every item, 0 for padding.
        ks: cut-offs of Hit and NDCG.
        chunk: users encoded and scored together.
        mask_repeats: mask the history; a target inside it is then a certain miss (counted). False
            masks nothing: every item stays a candidate, repeats can be hit and recommended.
        with_top: keep the 20 best candidates per user (for coverage and cold share).
        states: ``[n, D]`` states of the split's histories where they are known already; the scorer
            is then asked for its item matrix alone.
        backend: of the ranking, as in `padkern.ops.ranking.count_ranks`; given scores are ranked in
            plain torch.

    Returns:
        The `Evaluation`.

    Raises:
        ValueError: arrays that do not fit each other, or ids outside the catalogue.
    """
    ks = tuple(int(k) for k in ks)
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be positive integers, got {ks}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if callable(getattr(scorer, "frozen", None)):
        scorer = scorer.frozen()  # type: ignore[attr-defined]
    frequency, bins = np.asarray(train_frequency), np.asarray(item_bins)
    score_all: Any = getattr(scorer, "score_all", None) if states is None else None
    items = None if score_all else ItemTiles.build(scorer.item_matrix())
    rows = frequency.size if items is None else items.num_items + 1
    for name, array in (("train_frequency", frequency), ("item_bins", bins)):
        if array.shape != (rows,):
            raise ValueError(
                f"{name} must have shape [{rows}] like the item matrix, got {list(array.shape)}"
            )
    n = len(split.targets)
    if len(split.history) != n:
        raise ValueError(f"split.history must have {n} rows like targets, got {len(split.history)}")
    if states is not None and len(states) != n:
        raise ValueError(f"states must have {n} rows like targets, got {len(states)}")
    ranks = np.empty(n, dtype=np.float64)
    top = np.zeros((n, TOP_K), dtype=np.int64) if with_top else None
    counters = dict.fromkeys(("masked_targets", "nan_targets", "nan_others", "ties"), 0)
    for low in range(0, n, chunk):
        real = min(chunk, n - low)
        index = np.minimum(np.arange(low, low + chunk), n - 1)
        history = split.history.take(index)
        ids = (np.asarray(split.targets)[index], history.values, history.offsets)
        top_k = TOP_K if with_top else 0
        if items is None:
            scores = score_all(history)
            if scores.shape != (chunk, rows):
                raise ValueError(
                    f"scorer.score_all must return [{chunk}, {rows}], got {list(scores.shape)}"
                )
            result = rank_scores(scores, *ids, mask_repeats=mask_repeats, top_k=top_k)
        else:
            part = scorer.user_states(history) if states is None else states[index]
            if part.shape[0] != chunk:
                raise ValueError(
                    f"scorer.user_states must return {chunk} rows, got {list(part.shape)}"
                )
            result = rank_chunk(
                part.to(items.matrix.device), items, *ids,
                mask_repeats=mask_repeats, top_k=top_k, backend=backend,
            )  # fmt: skip
        ranks[low : low + real] = result.ranks[:real].cpu().numpy()
        if top is not None and result.top is not None:
            top[low : low + real] = result.top[:real].cpu().numpy()
        counters["masked_targets"] += int(result.masked[:real].sum())
        counters["nan_targets"] += int(result.nan_target[:real].sum())
        counters["nan_others"] += int(result.nan_others[:real].sum())
        counters["ties"] += int(result.tied[:real].sum())
    targets = np.asarray(split.targets, dtype=np.int64)
    cold = frequency == 0
    cold[0] = False
    return Evaluation(
        ranks=ranks,
        targets=targets,
        users=np.asarray(split.users, dtype=np.int64),
        target_frequency=frequency[targets],
        target_bin=bins[targets],
        top=top,
        counters=counters,
        num_items=rows - 1,
        num_bins=int(bins.max()),
        ks=ks,
        cold_items=cold,
    )
