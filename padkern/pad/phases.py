"""PAD's phases, and the single-expert rivals, as functions from data and config to a model.

1. ``pretrain``: a recommender on IDs. The language model's side is the text matrix.
2. ``aligned``: ID and text in one expert, recommendation loss + gamma * alignment of projected
   text with collaborative vectors (MK-MMD, or a rival of :mod:`padkern.pad.alignment`).
3. ``pad``: recommendation, aligned and language expert under a frequency gate, fine-tuned together.

``text`` (the language expert alone) and ``id_plus_text`` (one encoder on zero-initialised ID vector
+ projected text, no alignment) are trained with the same budget for the comparison, and so are
the experts of other methods (:mod:`padkern.pad.methods`), by :meth:`Phases.train_expert`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padkern.data.batch import stream_key
from padkern.data.bins import FrequencyBins
from padkern.data.dataset import Ragged
from padkern.data.plan import BatchPlan, PlanSource, TrainBatches
from padkern.data.random_streams import stream_seed
from padkern.data.split import EvalSplit, Split
from padkern.errors import UsageError
from padkern.models.build import build_expert
from padkern.models.triple_expert import ExpertModel, TripleExpert
from padkern.ops.triple_expert import gbce_positive_weight
from padkern.pad.alignment import alignment_loss
from padkern.pad.config import AlignConfig, PhaseConfig, RunConfig
from padkern.pad.evaluation import Evaluation, Scorer, evaluate
from padkern.pad.folder import RunFolder
from padkern.pad.gate import (
    HeldOut,
    cross_fitted,
    fit_gate,
    held_out,
    hidden_in_fit,
    rare_items,
    set_gate,
)
from padkern.pad.progress import Reporter
from padkern.pad.trainer import FitResult, fit

#: Trained rows of the comparison table, in the order in which they are trained.
TRAINED_ROWS = ("pretrain", "text", "id_plus_text", "aligned", "pad")
#: Section of the configuration with a row's budget; every other method has _RIVALS_SECTION.
_CONFIG_OF_ROW = {
    "pretrain": "pretrain",
    "text": "language",
    "id_plus_text": "id_plus_text",
    "aligned": "align",
    "pad": "disentangle",
}
_RIVALS_SECTION = "id_plus_text"


@dataclass
class Phases:
    """Everything a phase needs; holds the training rows and the validation split, never the test.

    Attributes:
        train: training rows, one per user.
        valid: validation split, for selection.
        train_frequency: ``[N + 1]`` training counts.
        bins: frequency bins of the items.
        text: ``[N + 1, E]`` transformed text matrix.
        config: the run's configuration.
        device: where models live.
        reporter, folder, resume: passed on to :func:`padkern.pad.trainer.fit`.
        raw_text: ``[N + 1, E0]`` text matrix as it came from the encoder, for methods that make
            their own of it; ``None``: they refuse to be trained.
    """

    train: Ragged
    valid: EvalSplit
    train_frequency: np.ndarray
    bins: FrequencyBins
    text: Tensor
    config: RunConfig
    device: str = "cpu"
    reporter: Reporter = field(default_factory=Reporter)
    folder: RunFolder | None = None
    resume: bool = False
    raw_text: np.ndarray | None = None

    @classmethod
    def of(cls, split: Split, bins: FrequencyBins, text: Tensor, config: RunConfig, **kw) -> Phases:
        """From a split: the test part is not kept."""
        return cls(split.train, split.valid, split.train_frequency, bins, text, config, **kw)

    def __post_init__(self) -> None:
        model = self.config.model
        if model.fuse == "null_space" and self.text.shape[1] < model.dim - model.null_dim:
            raise UsageError(
                "model.fuse null_space needs text of at least dim - null_dim "
                f"({model.dim - model.null_dim}) columns, got {self.text.shape[1]}"
            )

    # -- models ------------------------------------------------------------------------------

    def options(self, **other: Any) -> dict[str, Any]:
        """Keyword arguments of :func:`build_expert` as configured, some replaced by ``other``."""
        model = self.config.model
        return {
            "dim": model.dim,
            "max_len": model.max_len,
            "encoder": model.encoder,
            "encoder_options": model.encoder_options,
            "num_layers": model.num_layers,
            "num_heads": model.num_heads,
            "dropout": model.dropout,
            "fuse": model.fuse,
            "null_dim": model.null_dim,
            "text_layers": model.text_layers,
            "text_maps": model.text_maps,
            "pool_decay": model.pool_decay,
            "pool_scale": model.pool_scale,
            "language": model.language,
            "id_init": model.id_init,
            **other,
        }

    def build(self, row: str) -> ExpertModel:
        """A fresh model of one row; weights depend on (seed, row)."""
        torch.manual_seed(stream_seed(self.config.seed, row, "init"))
        options = self.options()
        num_items = self.text.shape[0] - 1
        item_bins = torch.from_numpy(self.bins.item_bins)
        if row == "pad":
            gate, names = self.config.disentangle.gate, self.config.disentangle.experts
            of_gate: dict[str, Any] = {
                "unseen_bin": self.bins.unseen_bin,
                "gate_form": gate.form,
                "gate_knots": gate.knots,
                "train_frequency": torch.from_numpy(self.train_frequency),
            }
            net: ExpertModel
            if names == TripleExpert.NAMES:
                net = TripleExpert(num_items, self.text, item_bins, **of_gate, **options)
            else:
                experts: dict[str, nn.Module] = {
                    name: build_expert(TripleExpert.KINDS[name], num_items, self.text, **options)
                    for name in names
                }
                net = ExpertModel(experts, self.text, item_bins, **of_gate)
            if net.gate.form == "sigmoid":
                net.gate.reset_parity(columns=[TripleExpert.NAMES.index(name) for name in names])
        else:
            name, kind = {
                "pretrain": ("rec", "id"),
                "text": ("language", "text"),
                "id_plus_text": ("aligned", "fused"),
                "aligned": ("aligned", "fused"),
            }[row]
            if row == "id_plus_text":
                options["id_init"] = "scaled"  # the rival starts from text alone in every preset
            expert = build_expert(kind, num_items, self.text, **options)
            net = ExpertModel({name: expert}, self.text, item_bins, unseen_bin=self.bins.unseen_bin)
        return net.to(self.device)

    def raw(self, method: str) -> np.ndarray:
        """The text matrix before its transform.

        Raises:
            ValueError: the phases do not hold it.
        """
        if self.raw_text is None:
            raise ValueError(f"raw_text must be given to Phases to train {method}, got None")
        if len(self.raw_text) != len(self.text):
            raise ValueError(
                f"raw_text must have {len(self.text)} rows like text, got {len(self.raw_text)}"
            )
        return self.raw_text

    # -- phases ------------------------------------------------------------------------------

    def pretrain(self) -> tuple[ExpertModel, FitResult]:
        """Phase 1: the ID recommender."""
        model = self.build("pretrain")
        return model, self._fit(model, "pretrain")

    def language(self) -> tuple[ExpertModel, FitResult]:
        """The language expert alone (row ``text``)."""
        model = self.build("text")
        # The start is the text nearest-neighbour ranker; training has to beat it on validation.
        return model, self._fit(model, "text", keep_start=self.config.language.restore_best)

    def id_plus_text(self) -> tuple[ExpertModel, FitResult]:
        """The simple rival: one encoder on zero-initialised ID vector + projected text."""
        model = self.build("id_plus_text")
        return model, self._fit(model, "id_plus_text")

    def train_expert(
        self, name: str, make: Callable[[], nn.Module], *, text: Tensor | None = None
    ) -> tuple[ExpertModel, FitResult]:
        """One expert of any make, trained alone with the budget of ``id_plus_text``.

        Args:
            name: of the method; names its random streams, its expert and its checkpoint.
            make: gives the expert; what it draws depends on (seed, name).
            text: ``[N + 1, E]`` matrix that the expert's tower is given, row 0 zero; default the
                transformed one.
        """
        torch.manual_seed(stream_seed(self.config.seed, name, "init"))
        model = ExpertModel(
            {name: make()},
            self.text if text is None else text,
            torch.from_numpy(self.bins.item_bins),
            unseen_bin=self.bins.unseen_bin,
        ).to(self.device)
        return model, self._fit(model, name)

    def align(self, pretrained: ExpertModel) -> tuple[ExpertModel, FitResult]:
        """Phase 2: anchor * recommendation loss + gamma * alignment of projected text and IDs.

        ``align.start`` says what comes from phase 1: ``copy`` takes ID vectors and encoder (the
        authors' way; the copied IDs are then the alignment's other side and move too), ``encoder``
        takes the encoder and keeps phase 1's ID vectors as a fixed target of the alignment,
        ``fresh`` only the target. The loss is ``align.loss``; ``none`` leaves the anchor alone.
        """
        config = self.config.align
        model = self.build("aligned")
        source, expert = pretrained.experts["rec"], model.experts["aligned"]
        if config.start != "fresh":
            expert.encoder.load_state_dict(source.encoder.state_dict())
        if config.start == "copy":
            expert.tower.id.data.copy_(source.tower.id.data)
        target = pretrained.tables()[0].detach()

        def alignment(batch: BatchPlan, step: int) -> Tensor | None:
            ids = expert.tower.id if config.start == "copy" else target
            losses = []
            for rows in self._mmd_rows(batch, step, config):
                vectors = ids.index_select(0, rows)
                # Padding takes no gradient, as with the release's padding_idx.
                vectors = torch.where((rows == 0)[:, None], vectors.detach(), vectors)
                words = expert.tower.projected_text(model.text.index_select(0, rows))
                losses.append(alignment_loss(words, vectors, config))
            return torch.stack(losses).mean() if losses else None

        def loss(batch: BatchPlan, step: int) -> Tensor:
            if not config.anchor:
                # What the anchor alone would train gets no gradient, and so no decay either.
                alone = alignment(batch, step)
                if alone is None:
                    alone = 0.0 * expert.tower.projected_text(model.text[1:2]).sum()
                return config.gamma * alone
            recommendation = config.anchor * self._loss(
                model, batch, step, "aligned", model.tables()
            )
            beside = alignment(batch, step) if config.aligns else None
            return recommendation if beside is None else recommendation + config.gamma * beside

        return model, self._fit(model, "aligned", loss)

    def disentangle(
        self, pretrained: ExpertModel, aligned: ExpertModel, language: ExpertModel | None
    ) -> tuple[ExpertModel, FitResult]:
        """Phase 3: the triple expert, started from the phases before.

        ``disentangle.experts`` may leave one of the three out (an ablation).

        Args:
            pretrained: gives the recommendation expert.
            aligned: gives the aligned expert.
            language: gives the language expert; ``None`` leaves it at its start.
        """
        config = self.config.disentangle
        model = self.build("pad")
        parts = {"rec": pretrained, "aligned": aligned}
        if language is not None:
            parts["language"] = language
        for name in parts.keys() & set(config.experts):
            part = parts[name]
            model.experts[name].load_state_dict(part.experts[name].state_dict())
        learned = config.gate.learned
        if learned == "heldout":
            self.fit_gate(model)

        def loss(batch: BatchPlan, step: int) -> Tensor:
            recommendation = self._loss(model, batch, step, "pad")
            if learned != "joint" or model.gate.form != "per_item":
                return recommendation
            return recommendation + config.gate.pull * model.gate.spread()

        result = self._fit(
            model, "pad", loss,
            gate_lr=config.gate.train_lr if learned == "joint" else 0.0,
            keep_start=config.restore_best,
        )  # fmt: skip
        if learned == "heldout" and config.epochs:
            self.fit_gate(model)
        return model, result

    # -- gate --------------------------------------------------------------------------------

    def fit_gate(self, model: ExpertModel) -> None:
        """Fits the gate on the validation targets, experts frozen."""
        config = self.config.disentangle.gate
        logit = fit_gate(
            model, self._held_out(model), config,
            seed=self.config.seed, mask_repeats=self.config.evaluation.mask_repeats,
        )  # fmt: skip
        set_gate(model, logit)

    def validation(self, row: str, model: Scorer) -> Evaluation:
        """Validation ranks; of a gate fitted on these targets the cross-fitted ones."""
        fitted = row == "pad" and self.config.disentangle.gate.learned == "heldout"
        if fitted and isinstance(model, ExpertModel):
            return cross_fitted(
                model, self._held_out(model), self.train_frequency,
                self.config.disentangle.gate, seed=self.config.seed,
                mask_repeats=self.config.evaluation.mask_repeats,
            )  # fmt: skip
        return self._evaluate(model, with_top=True)

    def _held_out(self, model: ExpertModel) -> HeldOut:
        hidden = hidden_in_fit(self.train_frequency, self.config.disentangle.gate)
        return held_out(model, self.valid, hidden, self.train_frequency)

    # -- parts -------------------------------------------------------------------------------

    def candidates(self) -> np.ndarray:
        """Items that training may rank or draw: all but the unseen ones (``clean``)."""
        if self.bins.unseen_bin is None:
            return np.arange(1, len(self.train_frequency))
        return np.flatnonzero(self.train_frequency > 0)

    @cached_property
    def positive_weight(self) -> float:
        """Weight of the positives in the sampled loss; the negatives are those of
        :meth:`candidates`."""
        loss = self.config.loss
        if loss.kind != "gbce":
            return 1.0
        return gbce_positive_weight(loss.negatives, len(self.candidates()), loss.calibration)

    def _evaluate(self, model: Scorer, *, with_top: bool = False) -> Evaluation:
        return evaluate(
            model, self.valid, train_frequency=self.train_frequency,
            item_bins=self.bins.item_bins, with_top=with_top,
            mask_repeats=self.config.evaluation.mask_repeats,
        )  # fmt: skip

    def _fit(
        self,
        model: ExpertModel,
        row: str,
        loss=None,
        *,
        gate_lr: float | None = None,
        keep_start: bool = False,
    ) -> FitResult:
        section = _CONFIG_OF_ROW.get(row, _RIVALS_SECTION)
        config: PhaseConfig = getattr(self.config, section)
        seed = self.config.seed
        loss_config = self.config.loss
        drawn = row == "aligned" and self.config.align.mmd_rows == "all_slots"
        negatives = loss_config.negatives if loss_config.sampled else int(drawn)
        source = PlanSource(
            self.train, num_items=len(self.train_frequency) - 1,
            max_len=self.config.model.max_len, item_bins=self.bins.item_bins,
            candidates=self.candidates(), sampling=loss_config.sampling,
            power=loss_config.popularity_power,
        )  # fmt: skip
        batches = TrainBatches(
            source, batch_size=config.batch_size, seed=seed, phase=row, negatives=negatives
        )
        if not len(batches):
            raise ValueError("no user has two or more training interactions")

        def validate() -> dict[str, float]:
            metrics = self._evaluate(model).metrics()["all"]
            return {"ndcg@10": metrics["ndcg@10"], "hit@10": metrics["hit@10"]}

        return fit(
            model, batches, loss or (lambda batch, step: self._loss(model, batch, step, row)),
            validate, config, phase=row, section=section, seed=seed,
            gate_lr=gate_lr, keep_start=keep_start, reporter=self.reporter,
            folder=self.folder, resume=self.resume,
        )  # fmt: skip

    def _loss(self, model, batch: BatchPlan, step: int, row: str, tables=None) -> Tensor:
        batch = batch.keyed(stream_seed(self.config.seed, row, "dropout"), step)
        hidden = self._hidden(step) if row == "pad" else None
        sampled, weight = self.config.loss.sampled, self.positive_weight
        if sampled and tables is None:
            plan = batch.to(self.device)
            return model.plan_loss(plan, hidden=hidden, positive_weight=weight)
        packed, targets = batch.inputs.to(self.device), batch.targets.to(self.device)
        tables = model.tables(hidden) if tables is None else tables
        states = model.encode(tables, packed)
        negatives = batch.negatives.to(self.device) if sampled else None
        candidates = torch.from_numpy(self.candidates()).to(self.device)
        return model.loss_from(
            tables, states, targets, candidates=candidates, negatives=negatives, hidden=hidden,
            positive_weight=weight,
        )  # fmt: skip

    def _hidden(self, step: int) -> Tensor | None:
        gate = self.config.disentangle.gate
        if gate.hide == 0 or self.bins.unseen_bin is None:
            return None
        rng = np.random.default_rng(stream_key(self.config.seed, "hide", step))
        rare = rare_items(self.train_frequency, gate)
        return torch.from_numpy(rare & (rng.random(len(rare)) < gate.hide)).to(self.device)

    def _mmd_rows(self, batch: BatchPlan, step: int, config: AlignConfig) -> list[Tensor]:
        """Item ids whose text and ID vectors are compared, one tensor per group of users.

        ``unique_items``: every item of the group once. ``all_slots``: as released, every slot of
        the padded positives and negatives, padding included. A group of a single item has no
        distribution to compare and is left out.
        """
        users, offsets = len(batch.users), batch.inputs.offsets
        size = config.mmd_users or users
        slots = self.config.model.max_len + 1
        drawn = config.mmd_rows == "all_slots"
        negatives = batch.negatives[:, 0] if drawn else None
        groups = []
        for low in range(0, users, size):
            high = min(low + size, users)
            part = slice(int(offsets[low]), int(offsets[high]))
            inputs, targets = batch.inputs.items[part], batch.targets[part]
            if negatives is None:
                rows = torch.unique(torch.cat([inputs, targets]))
            else:
                first = batch.inputs.items[offsets[low:high]]
                real = torch.cat([first, targets, negatives[part]])
                rows = F.pad(real, (0, 2 * (high - low) * slots - len(real)))
            if len(rows) >= 2:
                groups.append(rows.to(self.device))
        return groups
