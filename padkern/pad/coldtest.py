"""The cold test: items that training never saw, added by text alone and ranked among all.

A run is trained on a data set from which a share of the items is gone: catalogue, sequences and
text transform know nothing of them. Then they are added (:meth:`LoadedRun.add_items`) and every
user's test target is ranked in the full catalogue. Whoever promotes new items pays on the old ones,
so both sides are reported, with the share of places that the new items take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from padkern.data.cold import cold_targets, hold_out_items
from padkern.data.dataset import Dataset, Ragged
from padkern.data.split import EvalSplit, make_split
from padkern.errors import UsageError
from padkern.ops.ranking import count_ranks
from padkern.pad.config import RunConfig
from padkern.pad.evaluation import CHUNK, Evaluation, Scorer, evaluate
from padkern.pad.folder import RunFolder
from padkern.pad.progress import Reporter
from padkern.pad.significance import metric_values, paired_bootstrap
from padkern.pad.stored import LoadedRun, load_run
from padkern.pad.summary import interval_text, ordered_rows, percent
from padkern.pad.workflow import Request, pick_device, train

__all__ = [
    "ColdItems",
    "cold_table",
    "cold_test",
    "hold_out",
    "load_cold",
    "run_cold_test",
    "store_cold",
]

_NAME = "cold"
_METRICS = ("hit@5", "hit@10", "hit@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")
_COMPARED = ("ndcg@10", "hit@10")
_EXPOSURE_K = 10


@dataclass(frozen=True, eq=False)
class ColdItems:
    """What a cold test needs beside the run that was trained without the items.

    Attributes:
        items, texts: of the M held-out items.
        vectors: float32 ``[M, E]`` raw text vectors.
        targets: test target of every user, held-out or not, in ids of the grown catalogue (the
            run's items, then the held-out ones); histories hold no held-out item.
        whole: the same histories with held-out items, for the mask of the ranking.
        share: of the items that was held out.
    """

    items: list[str]
    texts: list[str]
    vectors: np.ndarray
    targets: EvalSplit
    whole: Ragged
    share: float


def hold_out(
    dataset: Dataset, matrix: np.ndarray, config: RunConfig, share: float
) -> tuple[Dataset, np.ndarray, ColdItems]:
    """Cuts a data set into what a cold test trains on and what it keeps back.

    Items without a text vector are never held out: there is nothing to add them by.

    Args:
        dataset: the whole data set.
        matrix: ``[N + 1, E]`` raw text vectors.
        config: gives the seed of the draw and the kind of split.
        share: of the items.

    Returns:
        Data set and text matrix without the held-out items, and the rest of the test.

    Raises:
        ValueError: the share is out of its range.
        DataError: too little is left, or no test target is held out.
    """
    data = hold_out_items(dataset, share, config.seed, eligible=np.asarray(matrix.any(axis=1)))
    targets, whole = cold_targets(data, make_split(data.kept, config.split))
    cold = ColdItems(data.items, data.texts, matrix[data.rows], targets, whole, share)
    return data.kept, matrix[data.kept_rows], cold


def store_cold(folder: RunFolder, cold: ColdItems) -> None:
    """Writes what :func:`cold_test` needs beside the run."""
    parts = {"history": cold.targets.history, "whole": cold.whole}
    tensors = {
        f"{name}/{kind}": torch.from_numpy(getattr(rows, kind))
        for name, rows in parts.items()
        for kind in ("values", "offsets")
    }
    tensors |= {
        "vectors": torch.from_numpy(np.ascontiguousarray(cold.vectors, dtype=np.float32)),
        "users": torch.from_numpy(cold.targets.users),
        "targets": torch.from_numpy(cold.targets.targets),
    }
    meta = {"items": cold.items, "texts": cold.texts, "share": cold.share}
    folder.save_tensors(_NAME, tensors, meta)


def load_cold(folder: RunFolder) -> ColdItems:
    """Reads back what :func:`store_cold` wrote.

    Raises:
        CheckpointError: the folder holds no cold test, or it is damaged.
    """
    tensors, meta = folder.load_tensors(_NAME)
    history, whole = (
        Ragged(tensors[f"{name}/values"].numpy(), tensors[f"{name}/offsets"].numpy())
        for name in ("history", "whole")
    )
    part = EvalSplit("test", tensors["users"].numpy(), history, tensors["targets"].numpy())
    vectors = tensors["vectors"].numpy()
    return ColdItems(meta["items"], meta["texts"], vectors, part, whole, meta["share"])


def run_cold_test(
    request: Request, out: Path, *, resume: bool, reporter: Reporter
) -> dict[str, Any]:
    """The command ``padkern coldtest``: trains without the items, then tests.

    Args:
        request: as of :func:`padkern.pad.workflow.train`, with ``cold_share``.
        out: the run folder.
        resume: continue the cold test of that folder.
        reporter: where progress and tables go.

    Returns:
        The content of ``coldtest.json``: see :func:`cold_test`.

    Raises:
        UsageError: the share is not between 0 and 1, or as of ``train``.
        DataError, CheckpointError, EnvError: see the exit codes of the command line.
    """
    if request.cold_share is None or not 0.0 < request.cold_share < 1.0:
        raise UsageError(f"--share must be above 0 and below 1, got {request.cold_share}")
    train(request, out, resume=resume, reporter=reporter)
    with RunFolder(out) as folder:
        result = cold_test(folder, device=pick_device(request.device))
        folder.write_json("coldtest.json", result)
    counts = result["targets"]
    title = (
        f"cold test, Hit@10 / NDCG@10 in percent of {counts['cold']:,} cold and "
        f"{counts['warm']:,} warm targets among all items"
    )
    reporter.table(title, *cold_table(result))
    return result


def cold_test(folder: RunFolder, *, device: str = "cpu") -> dict[str, Any]:
    """Adds the held-out items to a finished run and ranks every test target among all items.

    Args:
        folder: a finished run that was trained on what :func:`hold_out` left, with the rest stored
            by :func:`store_cold`.
        device: torch device of the models.

    Returns:
        JSON-serialisable: counts, what chance would give, and for each row ``cold`` (metrics of
        held-out targets among all items), ``among_cold`` (the same among the held-out items
        alone), ``exposure@10`` (share of the ten best places of all users that held-out items
        take), ``warm`` and ``warm_before`` (metrics of the other targets with and without the added
        items) and ``warm_change`` (their difference with a 95 % interval over users).

    Raises:
        CheckpointError: a part is missing, broken or does not fit.
        UsageError: items were added to the stored run.
    """
    cold, run = load_cold(folder), load_run(folder, device=device)
    if run.added is not None:
        raise UsageError(f"{folder.path}: a cold test needs the run without added items")
    grown = run.add_items(cold.items, vectors=cold.vectors, texts=cold.texts)
    size, targets = len(run.dataset.items), cold.targets.targets
    is_cold = targets >= size
    count, total = len(cold.items), grown.dataset.num_items
    return {
        "dataset": run.dataset.name,
        "split": run.split.kind,
        "seed": run.config.seed,
        "share": cold.share,
        "items": {"trained": run.dataset.num_items, "held_out": count},
        "targets": {"cold": int(is_cold.sum()), "warm": int((~is_cold).sum())},
        "chance": {
            "hit@10": min(1.0, 10 / total),
            "among_cold": min(1.0, 10 / count),
            f"exposure@{_EXPOSURE_K}": count / total,
        },
        "rows": {row: _row(row, run, grown, cold, is_cold) for row in run.scorers},
    }


def cold_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a cold test, in percent; pairs are Hit@10 / NDCG@10.

    Args:
        result: of :func:`cold_test`.
    """
    columns = ["row", "cold", "cold among cold", "exposure@10", "warm before", "warm", "change"]
    chance = result["chance"]
    rows = [
        [
            "chance",
            percent(chance["hit@10"]),
            percent(chance["among_cold"]),
            percent(chance["exposure@10"]),
            "-",
            percent(chance["hit@10"]),
            "-",
        ]
    ]
    for name in ordered_rows(result["rows"]):
        row = result["rows"][name]
        cells = [_pair(row[key]) for key in ("cold", "among_cold")]
        cells.append(percent(row["exposure@10"]))
        cells += [_pair(row[key]) for key in ("warm_before", "warm")]
        rows.append([name, *cells, interval_text(row["warm_change"]["ndcg@10"])])
    return columns, rows


@torch.no_grad()
def _row(
    row: str, run: LoadedRun, grown: LoadedRun, cold: ColdItems, is_cold: np.ndarray
) -> dict[str, Any]:
    """The figures of one row."""
    before, after = _frozen(run.scorers[row]), _frozen(grown.scorers[row])
    # States see histories without held-out items, so the added items cannot change them.
    states = _states(before, cold.targets.history)
    part, size = cold.targets, len(run.dataset.items)
    full = _ranked(after, grown, replace(part, history=cold.whole), states)
    warm, chosen = np.flatnonzero(~is_cold), np.flatnonzero(is_cold)
    old = _ranked(before, run, _taken(part, part.history, warm), states[warm])
    top = full.top[:, :_EXPOSURE_K] if full.top is not None else np.zeros((0, 0), np.int64)
    places = top[top > 0]
    config = run.config.evaluation
    return {
        "cold": _figures(full.ranks[chosen]),
        "among_cold": _figures(
            _among_cold(
                after.item_matrix(), size, _taken(part, cold.whole, chosen), states[chosen],
                mask_repeats=config.mask_repeats,
            )
        ),
        f"exposure@{_EXPOSURE_K}": float((places >= size).mean()) if places.size else None,
        "warm": _figures(full.ranks[warm]),
        "warm_before": _figures(old.ranks),
        "warm_change": {
            metric: paired_bootstrap(
                full.ranks[warm], old.ranks, metric,
                resamples=config.resamples, seed=run.config.seed,
            )
            for metric in _COMPARED
        },
        "counters": full.counters,
    }  # fmt: skip


def _frozen(scorer: Any) -> Scorer:
    return scorer.frozen() if callable(getattr(scorer, "frozen", None)) else scorer


def _taken(part: EvalSplit, history: Ragged, rows: np.ndarray) -> EvalSplit:
    return EvalSplit(part.name, part.users[rows], history.take(rows), part.targets[rows])


def _states(scorer: Scorer, history: Ragged) -> Tensor:
    """States of all histories, in chunks as `evaluate` makes them."""
    parts = []
    for low in range(0, len(history), CHUNK):
        index = np.minimum(np.arange(low, low + CHUNK), len(history) - 1)
        parts.append(scorer.user_states(history.take(index))[: len(history) - low])
    return torch.cat(parts)


def _ranked(scorer: Scorer, run: LoadedRun, part: EvalSplit, states: Tensor) -> Evaluation:
    return evaluate(
        scorer, part,
        train_frequency=run.split.train_frequency, item_bins=run.bins.item_bins,
        mask_repeats=run.config.evaluation.mask_repeats, with_top=True, states=states,
    )  # fmt: skip


def _among_cold(
    matrix: Tensor, size: int, part: EvalSplit, states: Tensor, *, mask_repeats: bool
) -> np.ndarray:
    """Ranks of the held-out targets among the held-out items alone, ids ``size`` and up."""
    inside = part.history.values >= size
    lengths = np.bincount(part.history.row_index()[inside], minlength=len(part))
    history = Ragged.from_lengths(part.history.values[inside] - size + 1, lengths)
    items = torch.cat([torch.zeros_like(matrix[:1]), matrix[size:]])
    ranks = count_ranks(
        states, items, part.targets - size + 1, history.values, history.offsets,
        mask_repeats=mask_repeats,
    )  # fmt: skip
    return ranks.cpu().numpy()


def _figures(ranks: np.ndarray) -> dict[str, Any]:
    """Count and means; None without users."""
    if not ranks.size:
        return {"count": 0} | dict.fromkeys(_METRICS)
    return {"count": int(ranks.size)} | {
        metric: float(metric_values(ranks, metric).mean()) for metric in _METRICS
    }


def _pair(cell: Mapping[str, Any]) -> str:
    return f"{percent(cell['hit@10'])} / {percent(cell['ndcg@10'])}"
