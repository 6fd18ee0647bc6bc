"""One run: split, train every row of the comparison table, evaluate, compare, store."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from padkern.data.bins import FrequencyBins, frequency_bins
from padkern.data.dataset import Dataset, Ragged
from padkern.data.split import EvalSplit, Split, make_split
from padkern.errors import CheckpointError, UsageError
from padkern.models.triple_expert import ExpertModel
from padkern.pad.baselines import MostPop, TextKNN
from padkern.pad.config import RunConfig
from padkern.pad.evaluation import FREQUENCY_GROUPS, Evaluation, evaluate
from padkern.pad.folder import RunFolder
from padkern.pad.phases import TRAINED_ROWS, Phases
from padkern.pad.progress import Reporter
from padkern.pad.significance import paired_bootstrap
from padkern.text.transform import TextTransform

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
_EXACT_SHARE = 1e-12


def transform_text(matrix: np.ndarray, config: RunConfig) -> Tensor:
    """The text matrix that models see: ``[N + 1, E]`` float32 after centring, PCA and so on."""
    options = config.text
    width = min(options.pca or matrix.shape[1], matrix.shape[1], max(len(matrix) - 2, 1))
    transform = TextTransform(
        center=options.center,
        pca=None if options.pca is None else width,
        whiten=options.whiten,
        normalize=options.normalize,
    )
    return torch.from_numpy(transform.fit_apply(matrix))


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
        if folder.read_text("config.yaml") != config.to_yaml():
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
    scorers: dict[str, Any] = {
        "most_pop": MostPop(split.train_frequency),
        "text_knn": TextKNN(text_matrix, decay=config.text.knn_decay, max_len=config.model.max_len),
    }
    seconds: dict[str, float] = {}
    evaluations: dict[str, dict[str, Evaluation]] = {}
    for row in ROWS:
        began = time.perf_counter()
        if row in TRAINED_ROWS:
            scorers[row], seconds[row] = _train_row(row, scorers, phases, folder, resume_rows)
            began = time.perf_counter()
            valid = phases.validation(row, scorers[row])
        else:
            valid = _evaluate(scorers[row], split, split.valid, bins, config)
        test = _evaluate(scorers[row], split, split.test, bins, config)
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


def _evaluate(
    scorer: Any, split: Split, part: EvalSplit, bins: FrequencyBins, config: RunConfig
) -> Evaluation:
    return evaluate(
        scorer, part, train_frequency=split.train_frequency, item_bins=bins.item_bins,
        mask_repeats=config.evaluation.mask_repeats, with_top=True,
    )  # fmt: skip


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
    weights = model.gate.weights().cpu()
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
        "method": config.disentangle.gate.learning,
    }


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, ready to evaluate and recommend.

    Attributes:
        dataset: users, items, texts and sequences of the run.
        split, bins: as trained.
        config: the resolved configuration.
        scorers: row -> scorer, all seven rows.
    """

    dataset: Dataset
    split: Split
    bins: FrequencyBins
    config: RunConfig
    scorers: dict[str, Any]

    @property
    def model(self) -> ExpertModel:
        """The PAD model."""
        return self.scorers["pad"]

    @property
    def models(self) -> list[str]:
        """Names of the rows that can be evaluated."""
        return list(self.scorers)

    def evaluate(self, split_name: str = "test", row: str = "pad") -> Evaluation:
        """Ranks of one row on ``"valid"`` or ``"test"``.

        Raises:
            UsageError: unknown row or split.
        """
        if row not in self.scorers:
            raise UsageError(f"row must be one of {', '.join(self.scorers)}, got {row!r}")
        if split_name not in ("valid", "test"):
            raise UsageError(f"split must be valid or test, got {split_name!r}")
        part = self.split.valid if split_name == "valid" else self.split.test
        return _evaluate(self.scorers[row], self.split, part, self.bins, self.config)

    @torch.no_grad()
    def recommend(self, history_ids: list[int], k: int = 10) -> list[dict[str, Any]]:
        """The k best unseen items for a history.

        Args:
            history_ids: internal item ids, oldest first; the last ``max_len`` count.
            k: how many.

        Returns:
            Best first: ``item`` (external id), ``text``, ``score``, ``frequency`` and ``shares``:
            what each expert adds to the score above the mean of all items, as a share of the sum.

        Raises:
            UsageError: an empty history, an unknown id or k < 1.
        """
        if not history_ids:
            raise UsageError("a recommendation needs at least one item of history")
        if k < 1:
            raise UsageError(f"k must be at least 1, got {k}")
        low, high = min(history_ids), max(history_ids)
        if low < 1 or high > self.dataset.num_items:
            raise UsageError(f"item ids run from 1 to {self.dataset.num_items}, got {low}..{high}")
        model = self.model
        model.eval()
        state = model.user_states(Ragged.from_lists([history_ids]))[0]
        tables = model.tables()
        weights = model.gate(model.item_bins)
        parts = torch.stack(
            [
                weights[:, e] * (table @ piece)
                for e, (table, piece) in enumerate(
                    zip(tables, state.split([t.shape[1] for t in tables]), strict=True)
                )
            ],
            1,
        )
        score = parts.sum(1)
        score[0] = -math.inf
        score[torch.tensor(history_ids)] = -math.inf
        count = min(k, int(torch.isfinite(score).sum()))
        best = score.topk(count)
        lift = (parts - parts[1:].mean(0)).clamp_min(0)
        share = lift / lift.sum(1, keepdim=True).clamp_min(_EXACT_SHARE)
        return [
            {
                "item": self.dataset.items[i],
                "text": self.dataset.texts[i],
                "score": float(value),
                "frequency": int(self.split.train_frequency[i]),
                "shares": dict(zip(model.experts, share[i].tolist(), strict=True)),
            }
            for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def store_inputs(folder: RunFolder, dataset: Dataset, text_matrix: np.ndarray) -> None:
    """Writes what :func:`load_run` needs: the data as trained on, and the text matrix."""
    tensors = {
        "text": torch.from_numpy(np.ascontiguousarray(text_matrix, dtype=np.float32)),
        "sequences/values": torch.from_numpy(dataset.sequences.values),
        "sequences/offsets": torch.from_numpy(dataset.sequences.offsets),
    }
    if dataset.timestamps is not None:
        tensors["timestamps"] = torch.from_numpy(np.ascontiguousarray(dataset.timestamps))
    names = {
        "name": dataset.name,
        "users": dataset.users,
        "items": dataset.items,
        "texts": dataset.texts,
    }
    folder.save_tensors("dataset", tensors, names)


def load_inputs(folder: RunFolder) -> tuple[Dataset, np.ndarray]:
    """Reads back what :func:`store_inputs` wrote."""
    tensors, names = folder.load_tensors("dataset")
    times = tensors.get("timestamps")
    dataset = Dataset(
        name=names["name"],
        users=names["users"],
        items=names["items"],
        sequences=Ragged(tensors["sequences/values"].numpy(), tensors["sequences/offsets"].numpy()),
        timestamps=None if times is None else times.numpy(),
        texts=names["texts"],
    )
    return dataset, tensors["text"].numpy()


def load_run(folder: RunFolder, *, device: str = "cpu") -> LoadedRun:
    """Opens a finished run folder.

    Raises:
        CheckpointError: a part is missing, broken or does not fit the others.
    """
    config = RunConfig.from_yaml(folder.read_text("config.yaml"))
    dataset, matrix = load_inputs(folder)
    split = make_split(dataset, config.split)
    bins = frequency_bins(split.train_frequency, config.num_bins, unseen=config.unseen)
    text = transform_text(matrix, config)
    phases = Phases.of(split, bins, text, config, device=device)
    scorers: dict[str, Any] = {
        "most_pop": MostPop(split.train_frequency),
        "text_knn": TextKNN(matrix, decay=config.text.knn_decay, max_len=config.model.max_len),
    }
    for row in TRAINED_ROWS:
        tensors, _ = folder.load_tensors(f"models/{row}")
        model = phases.build(row)
        wanted = {name: value.shape for name, value in model.named_parameters()}
        found = {name: value.shape for name, value in tensors.items()}
        if wanted != found:
            wrong = sorted(wanted.items() ^ found.items())[0][0]
            raise CheckpointError(f"{folder.file(f'models/{row}')}: weight {wrong} does not fit")
        model.load_state_dict(tensors, strict=False)
        scorers[row] = model.eval()
    return LoadedRun(dataset, split, bins, config, scorers)


def with_seed(config: RunConfig, seed: int | None) -> RunConfig:
    """The configuration with another seed; ``None`` keeps it."""
    return config if seed is None else config.model_copy(update={"seed": seed})


def shuffled_text(matrix: np.ndarray, seed: int) -> np.ndarray:
    """Text vectors permuted among the items (row 0 stays): the control without text knowledge."""
    order = np.random.default_rng(seed).permutation(len(matrix) - 1) + 1
    return np.concatenate([matrix[:1], matrix[order]])


__all__ = [
    "PAIRS",
    "ROWS",
    "LoadedRun",
    "compare",
    "load_inputs",
    "load_run",
    "run_experiment",
    "shuffled_text",
    "store_inputs",
    "transform_text",
    "with_seed",
]
