"""Inputs and models of a run folder, and a finished run opened again."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from padkern.pad.added import grown_run, load_added
from padkern.pad.baselines import MostPop, TextKNN
from padkern.pad.config import RunConfig
from padkern.pad.evaluation import Evaluation, evaluate
from padkern.pad.folder import RunFolder
from padkern.pad.gate import cross_fitted, held_out, hidden_in_fit
from padkern.pad.phases import TRAINED_ROWS, Phases
from padkern.text.transform import FittedTransform, TextTransform

_EXACT_SHARE = 1e-12


def fit_text(matrix: np.ndarray, config: RunConfig) -> FittedTransform:
    """The transform of a run's text, measured in float64 on all items of its catalogue with text.

    Items that nobody took in training count too: their texts are known, and no interaction is used.
    Items that are added later do not count.
    """
    options = config.text
    room = max(min(matrix.shape[1], len(matrix) - 2) - options.all_but_top, 1)
    width = min(options.pca or room, room)
    transform = TextTransform(
        center=options.center,
        all_but_top=options.all_but_top,
        pca=None if options.pca is None else width,
        null_space=options.null_space,
        whiten=options.whiten,
        normalize=options.normalize,
    )
    return transform.fit(matrix)


def transform_text(matrix: np.ndarray, config: RunConfig) -> Tensor:
    """The text matrix that models see: ``[N + 1, E]`` float32 after centring, PCA and so on."""
    return torch.from_numpy(fit_text(matrix, config).apply(matrix))


def untrained_scorers(split: Split, text_matrix: np.ndarray, config: RunConfig) -> dict[str, Any]:
    """The rows ``most_pop`` and ``text_knn``."""
    return {
        "most_pop": MostPop(split.train_frequency),
        "text_knn": TextKNN(text_matrix, decay=config.text.knn_decay, max_len=config.model.max_len),
    }


def evaluate_row(
    scorer: Any, split: Split, part: EvalSplit, bins: FrequencyBins, config: RunConfig
) -> Evaluation:
    """Ranks of one row on one split, recommendations kept."""
    return evaluate(
        scorer, part, train_frequency=split.train_frequency, item_bins=bins.item_bins,
        mask_repeats=config.evaluation.mask_repeats, with_top=True,
    )  # fmt: skip


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


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, ready to evaluate and recommend.

    Attributes:
        dataset: users, items, texts and sequences of the run.
        split, bins: as trained.
        config: the resolved configuration.
        scorers: row -> scorer, all seven rows.
        transform: what made the models' text matrix of the raw one; added items take it too.
        text_source: encoder or matrix file of the run, None where it is not recorded.
        added: float32 ``[M, E]`` raw vectors of the items added after training, the last M of the
            catalogue; None: none.
        origin: the run as trained, where items were added.
        cold_tolerance: of the added items, where one was given.
    """

    dataset: Dataset
    split: Split
    bins: FrequencyBins
    config: RunConfig
    scorers: dict[str, Any]
    transform: FittedTransform
    text_source: str | None = None
    added: np.ndarray | None = None
    origin: LoadedRun | None = None
    cold_tolerance: float | None = None

    @property
    def model(self) -> ExpertModel:
        """The PAD model."""
        return self.scorers["pad"]

    @property
    def models(self) -> list[str]:
        """Names of the rows that can be evaluated."""
        return list(self.scorers)

    def evaluate(self, split_name: str = "test", row: str = "pad") -> Evaluation:
        """Ranks of one row on ``"valid"`` or ``"test"``, as in ``metrics.json``.

        A gate that was fitted on the validation targets is cross-fitted for their figures.

        Raises:
            UsageError: unknown row or split, or the validation figures of such a gate in a run with
                added items: its row of unseen items was fitted on these targets too.
        """
        if row not in self.scorers:
            raise UsageError(f"row must be one of {', '.join(self.scorers)}, got {row!r}")
        if split_name not in ("valid", "test"):
            raise UsageError(f"split must be valid or test, got {split_name!r}")
        part = self.split.valid if split_name == "valid" else self.split.test
        gate = self.config.disentangle.gate
        if (split_name, row, gate.learned) == ("valid", "pad", "heldout"):
            if self.added is not None:
                raise UsageError(
                    "split must be test for row pad of a run with added items, got valid: the "
                    "gate's weights of unseen items were fitted on the validation targets"
                )
            counts = self.split.train_frequency
            data = held_out(self.model, part, hidden_in_fit(counts, gate), counts)
            return cross_fitted(
                self.model, data, counts, gate,
                seed=self.config.seed, mask_repeats=self.config.evaluation.mask_repeats,
            )  # fmt: skip
        return evaluate_row(self.scorers[row], self.split, part, self.bins, self.config)

    def add_items(
        self,
        items: Sequence[str],
        *,
        vectors: np.ndarray | None = None,
        texts: Sequence[str] | None = None,
        cold_tolerance: float | None = None,
        device: str = "cpu",
    ) -> LoadedRun:
        """A run whose catalogue has M more items, known by text alone; no expert is trained.

        They pass through the run's own text transform and get zero ID vectors and the bin of unseen
        items: what every row gives an item that nobody took in training. A held-out gate's weights
        of unseen items are fitted to the larger catalogue
        (:func:`padkern.pad.gate.fit_new_items`). Scores of items seen in training do not change by
        a bit. Internal ids go on after the old ones; given vectors may be added in parts or at
        once.

        Args:
            items: external ids, new to the run.
            vectors: float ``[M, E]`` as the run's encoder gives them; default: ``texts``, embedded
                by the run's encoder.
            texts: shown in recommendations; needed where ``vectors`` are not given.
            cold_tolerance: relative NDCG@10 of the validation targets that raising unseen items
                may cost, the price of showing more of them; default: that of items added before,
                else as configured.
            device: of the encoder.

        Raises:
            ValueError: an id that is known, empty or there twice, vectors of another shape or with
                NaN or Inf, neither vectors nor an encoder to make them, or a tolerance out of
                [0, 1) or where no held-out gate raises unseen items.
            EnvError: the encoder cannot be used.
        """
        return grown_run(
            self, items, vectors=vectors, texts=texts,
            cold_tolerance=cold_tolerance, device=device,
        )  # fmt: skip

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


def load_run(folder: RunFolder, *, device: str = "cpu") -> LoadedRun:
    """Opens a finished run folder, with the items stored there by `padkern.pad.added.store_added`.

    Raises:
        CheckpointError: a part is missing, broken or does not fit the others.
    """
    config = RunConfig.from_yaml(folder.read_text("config.yaml"))
    dataset, matrix = load_inputs(folder)
    split = make_split(dataset, config.split)
    bins = frequency_bins(split.train_frequency, config.num_bins, unseen=config.unseen)
    fitted = fit_text(matrix, config)
    text = torch.from_numpy(fitted.apply(matrix))
    phases = Phases.of(split, bins, text, config, device=device)
    scorers = untrained_scorers(split, matrix, config)
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
    run = folder.read_json("run.json") if folder.exists("run.json") else {}
    source = run.get("request", {}).get("text")
    loaded = LoadedRun(dataset, split, bins, config, scorers, fitted, source)
    return load_added(folder, loaded)
