"""One run: split, train every row of the comparison table, evaluate, compare, store."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from padkern.data.bins import FrequencyBins, frequency_bins
from padkern.data.dataset import Dataset
from padkern.data.split import make_split
from padkern.errors import CheckpointError
from padkern.models.triple_expert import ExpertModel
from padkern.pad.config import RunConfig
from padkern.pad.evaluation import FREQUENCY_GROUPS, Evaluation
from padkern.pad.folder import RunFolder
from padkern.pad.phases import TRAINED_ROWS, Phases
from padkern.pad.progress import Reporter
from padkern.pad.significance import paired_bootstrap
from padkern.pad.stored import evaluate_row, store_inputs, transform_text, untrained_scorers

ROWS = ("most_pop", "text_knn", *TRAINED_ROWS)
#: Pairs of rows whose difference gets an interval.
PAIRS = (
    ("pad", "pretrain"),
    ("pad", "id_plus_text"),
    ("pad", "aligned"),
    ("pad", "text_knn"),
    ("id_plus_text", "pretrain"),
)
_METRICS = ("ndcg@10", "hit@10")


def run_experiment(
    dataset: Dataset,
    text_matrix: np.ndarray,
    config: RunConfig,
    folder: RunFolder,
    *,
    audit: dict[str, Any],
    reporter: Reporter | None = None,
    device: str = "cpu",
    resume: bool = False,
) -> dict[str, Any]:
    """Trains and evaluates all rows of the comparison table.

    Args:
        dataset: the interactions.
        text_matrix: ``[N + 1, E]`` text vectors of the items as they come from the encoder.
        config: the resolved configuration; stored.
        folder: an open run folder.
        audit: facts about the data; stored.
        reporter: progress.
        device: torch device of the models.
        resume: take over finished rows and the last epoch of an unfinished one.

    Returns:
        The content of ``metrics.json``.

    Raises:
        CheckpointError: the folder holds a run of another configuration.
    """
    reporter = reporter or Reporter()
    if resume and folder.exists("config.yaml"):
        stored = folder.read_text("config.yaml")
        # Equal values may be written differently: a key may be newer than the run.
        if stored != config.to_yaml() and RunConfig.from_yaml(stored) != config:
            raise CheckpointError(
                f"{folder.file('config.yaml')}: holds another configuration; "
                "resume with the same options or choose a new run folder"
            )
        resume_rows = True
    else:
        folder.write_yaml("config.yaml", config.to_yaml())
        resume_rows = False
    folder.write_json("audit.json", audit)
    if not (resume_rows and folder.has("dataset")):
        store_inputs(folder, dataset, text_matrix)
    split = make_split(dataset, config.split)
    bins = frequency_bins(split.train_frequency, config.num_bins, unseen=config.unseen)
    text = transform_text(text_matrix, config)
    phases = Phases.of(
        split, bins, text, config,
        device=device, reporter=reporter, folder=folder, resume=resume_rows,
    )  # fmt: skip
    scorers = untrained_scorers(split, text_matrix, config)
    seconds: dict[str, float] = {}
    evaluations: dict[str, dict[str, Evaluation]] = {}
    for row in ROWS:
        began = time.perf_counter()
        if row in TRAINED_ROWS:
            scorers[row], seconds[row] = _train_row(row, scorers, phases, folder, resume_rows)
            began = time.perf_counter()
            valid = phases.validation(row, scorers[row])
        else:
            valid = evaluate_row(scorers[row], split, split.valid, bins, config)
        test = evaluate_row(scorers[row], split, split.test, bins, config)
        evaluations[row] = {"valid": valid, "test": test}
        seconds[f"{row}/evaluation"] = time.perf_counter() - began
    metrics = {
        "dataset": dataset.name,
        "seed": config.seed,
        "seconds": seconds,
        "models": {
            row: {
                part: result.metrics() | {"counters": result.counters}
                for part, result in parts.items()
            }
            for row, parts in evaluations.items()
        },
    }
    folder.save_tensors("ranks", _ranks(evaluations), {"rows": list(ROWS)})
    folder.write_json("gate.json", _gate_facts(scorers["pad"], bins, config))
    folder.write_json("comparison.json", compare(evaluations, config))
    folder.write_json("metrics.json", metrics)
    for row in TRAINED_ROWS:
        folder.remove(f"checkpoints/{row}")
    return metrics


def _train_row(
    row: str, done: dict[str, Any], phases: Phases, folder: RunFolder, resume: bool
) -> tuple[ExpertModel, float]:
    where = f"models/{row}"
    if resume and folder.has(where):
        tensors, meta = folder.load_tensors(where)
        model = phases.build(row)
        model.load_state_dict(tensors, strict=False)
        model.eval()
        return model, float(meta["seconds"])
    began = time.perf_counter()
    if row == "pretrain":
        model, result = phases.pretrain()
    elif row == "text":
        model, result = phases.language()
    elif row == "id_plus_text":
        model, result = phases.id_plus_text()
    elif row == "aligned":
        model, result = phases.align(done["pretrain"])
    else:
        warm = phases.config.disentangle.start_language == "trained"
        model, result = phases.disentangle(
            done["pretrain"], done["aligned"], done["text"] if warm else None
        )
    spent = result.seconds if resume else time.perf_counter() - began
    meta = {"seconds": spent, "best_epoch": result.best_epoch + 1, "epochs": len(result.history)}
    folder.save_tensors(where, _weights(model), meta)
    return model, spent


def _weights(model: ExpertModel) -> dict[str, Tensor]:
    """Parameters alone: text, bins and scales are rebuilt from the stored data."""
    return {name: value.detach().contiguous() for name, value in model.named_parameters()}


def compare(
    evaluations: dict[str, dict[str, Evaluation]], config: RunConfig
) -> dict[str, dict[str, Any]]:
    """95 % paired-bootstrap intervals of the differences in :data:`PAIRS`, per split and group."""
    result: dict[str, dict[str, Any]] = {}
    for part in ("valid", "test"):
        result[part] = {}
        for first, second in PAIRS:
            a, b = evaluations[first][part], evaluations[second][part]
            result[part][f"{first} - {second}"] = {
                group: {
                    metric: paired_bootstrap(
                        a.ranks, b.ranks, metric, subset=a.group(group),
                        resamples=config.evaluation.resamples, seed=config.seed,
                    )
                    for metric in _METRICS
                }
                for group in ("all", *FREQUENCY_GROUPS)
                if a.group(group).any()
            }  # fmt: skip
    return result


def _ranks(evaluations: dict[str, dict[str, Evaluation]]) -> dict[str, Tensor]:
    return {
        f"{row}/{part}": torch.from_numpy(result.ranks)
        for row, parts in evaluations.items()
        for part, result in parts.items()
    }


@torch.no_grad()
def _gate_facts(model: ExpertModel, bins: FrequencyBins, config: RunConfig) -> dict[str, Any]:
    """Gate weights per bin, and each expert's share of the score's spread within the bin."""
    weights = model.gate.per_bin(model.item_bins, bins.num_bins).cpu()
    norms = [table.norm(dim=1).cpu() for table in model.tables()]
    item_bins = torch.from_numpy(bins.item_bins)
    shares = []
    for b in range(1, bins.num_bins + 1):
        inside = item_bins == b
        parts = [
            float(weights[b, e] * norm[inside].mean()) if bool(inside.any()) else 0.0
            for e, norm in enumerate(norms)
        ]
        total = sum(parts)
        shares.append([p / total if total > 0 else 0.0 for p in parts])
    return {
        "experts": list(model.experts),
        "labels": list(bins.labels[1:]),
        "weights": weights[1:].tolist(),
        "vector_norm_shares": shares,
        "items_per_bin": [int((item_bins == b).sum()) for b in range(1, bins.num_bins + 1)],
        "method": config.disentangle.gate.learned,
        "form": config.disentangle.gate.form,
    }


def shuffled_text(matrix: np.ndarray, seed: int) -> np.ndarray:
    """Text vectors permuted among the items (row 0 stays): the control without text knowledge."""
    order = np.random.default_rng(seed).permutation(len(matrix) - 1) + 1
    return np.concatenate([matrix[:1], matrix[order]])


__all__ = ["PAIRS", "ROWS", "compare", "run_experiment", "shuffled_text"]
