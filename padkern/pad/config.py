"""Configuration of a run: typed sections, two presets, dotted overrides, no unknown keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from padkern.errors import UsageError
from padkern.models.registry import check_encoder_name


class Section(BaseModel):
    """One section of a configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


def _unfit(message: str) -> PydanticCustomError:
    """A validation error with this message and nothing before it."""
    return PydanticCustomError("unfit", "{message}", {"message": message})


class TextConfig(Section):
    """What happens to the text matrix before training."""

    center: bool = True
    all_but_top: int = Field(0, ge=0, description="leading components removed")
    pca: int | None = Field(256, ge=1, description="components kept; None keeps the width")
    null_space: int = Field(0, ge=0, description="smallest components kept in place of pca")
    whiten: bool = True
    normalize: bool = True
    knn_decay: float = Field(0.6, gt=0, le=1, description="history decay of the text_knn row")

    @model_validator(mode="after")
    def _one_choice(self) -> TextConfig:
        if self.null_space and self.pca is not None:
            raise _unfit(f"null_space needs pca=null, got {self.null_space} and pca={self.pca}")
        return self


class CaserConfig(Section):
    """Sizes of the encoder ``caser``; see :class:`padkern.models.caser.Caser`."""

    window: int = Field(5, ge=1, description="tokens that a state sees, at most model.max_len")
    horizontal: int = Field(16, ge=1, description="filters of each height")
    vertical: int = Field(4, ge=1, description="vertical filters")


class ModelConfig(Section):
    """Form and size of the experts; see :func:`padkern.models.build.build_expert`."""

    dim: int = Field(64, ge=1)
    id_init: Literal["scaled", "xavier", "text"] = Field(
        "scaled", description="free ID vectors start random (scaled, xavier) or as the text (text)"
    )
    max_len: int = Field(20, ge=1)
    encoder: str = Field("sasrec", description="sasrec, sasrec_pre_ln, gru4rec, caser, registered")
    num_layers: int = Field(2, ge=1, description="of every encoder but caser")
    num_heads: int = Field(2, ge=1, description="of sasrec and sasrec_pre_ln")
    caser: CaserConfig = CaserConfig()
    dropout: float = Field(0.2, ge=0, lt=1)
    fuse: Literal["sum", "cat", "null_space"] = Field(
        "sum", description="how the aligned expert joins IDs and text"
    )
    null_dim: int = Field(32, ge=1, description="coordinates of the IDs with fuse null_space")
    text_layers: int = Field(0, ge=0)
    text_maps: int = Field(1, ge=1, description="above 1: maps that an item's text mixes")
    pool_decay: float | None = Field(0.6, gt=0, le=1, description="recency path; None: none")
    pool_scale: float = Field(3.0, gt=0, description="starting factor of the fused recency path")
    language: Literal["text_space", "projected"] = Field(
        "text_space", description="language expert: scores in the text space, or projects text"
    )

    @property
    def encoder_options(self) -> dict[str, Any]:
        """Arguments of the encoder beyond those that every encoder takes."""
        return self.caser.model_dump() if self.encoder == "caser" else {}

    @field_validator("encoder")
    @classmethod
    def _known_encoder(cls, name: str) -> str:
        try:
            check_encoder_name(name)
        except ValueError as error:
            raise _unfit(str(error).partition(", got ")[0]) from None
        return name

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelConfig:
        if self.encoder in ("sasrec", "sasrec_pre_ln") and self.dim % self.num_heads:
            raise _unfit(f"dim must be divisible by num_heads, got {self.dim} and {self.num_heads}")
        if self.fuse == "null_space" and self.null_dim >= self.dim:
            raise _unfit(f"null_dim must be below dim ({self.dim}), got {self.null_dim}")
        if self.fuse == "null_space" and self.text_layers:
            raise _unfit(f"fuse null_space takes no text_layers, got {self.text_layers}")
        if self.text_maps > 1 and (self.text_layers or self.fuse == "null_space"):
            raise _unfit(
                "text_maps above 1 needs text_layers 0 and another fuse than null_space, "
                f"got {self.text_maps}, {self.text_layers} and {self.fuse}"
            )
        if self.encoder == "caser" and self.caser.window > self.max_len:
            raise _unfit(
                f"caser.window must be at most max_len ({self.max_len}), got {self.caser.window}"
            )
        return self


class PhaseConfig(Section):
    """Budget and optimiser of one phase."""

    epochs: int = Field(10, ge=0)
    batch_size: int = Field(128, ge=1, description="users per step")
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    norm_weight_decay: float = Field(0.0, ge=0, description="on norms, biases and scalars")
    gate_weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(100, ge=0)
    min_lr_factor: float = Field(0.05, ge=0, le=1)
    clip_norm: float = Field(0.0, ge=0, description="0: no clipping")
    patience: int = Field(3, ge=0, description="epochs without a better validation; 0: never stop")
    restore_best: bool = True
    select: Literal["ndcg@10", "hit@10"] = Field("ndcg@10", description="stops and selects")


#: Experts of PAD, in the order of the gate's columns.
EXPERTS: tuple[Literal["rec", "aligned", "language"], ...] = ("rec", "aligned", "language")
_ALPHAS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)


class AlignConfig(PhaseConfig):
    """Phase 2: the alignment beside the recommendation loss; see :mod:`padkern.pad.alignment`."""

    loss: Literal["mkmmd", "infonce", "coral", "cosine", "mse", "none"] = "mkmmd"
    gamma: float = Field(1.0, ge=0, description="weight of the alignment loss")
    anchor: float = Field(1.0, ge=0, description="weight of the recommendation loss beside it")
    mmd_rows: Literal["unique_items", "all_slots"] = Field(
        "unique_items", description="rows that the alignment loss compares"
    )
    mmd_users: int | None = Field(
        None, ge=2, description="users per alignment loss; None: the whole batch"
    )
    estimator: Literal["unbiased", "biased", "tllib"] = "unbiased"
    alphas: tuple[float, ...] = _ALPHAS
    kernel: Literal[
        "gaussian", "laplacian", "inverse_multiquadric", "rational_quadratic", "energy"
    ] = Field("gaussian", description="of the MK-MMD")
    temperature: float = Field(0.07, gt=0, description="of InfoNCE")
    start: Literal["encoder", "copy", "fresh"] = Field(
        "encoder",
        description="taken from pre-training: the encoder, IDs and encoder (copy), nothing (fresh)",
    )

    @property
    def aligns(self) -> bool:
        """Whether anything stands beside the recommendation loss."""
        return self.gamma > 0 and self.loss != "none"

    @model_validator(mode="after")
    def _loss_fits(self) -> AlignConfig:
        if self.kernel == "energy" and self.alphas != _ALPHAS:
            raise _unfit("kernel energy has no bandwidth and takes no alphas")
        if not (self.anchor or self.aligns):
            raise _unfit("anchor 0 without an alignment loss leaves nothing to train")
        if self.loss == "infonce" and self.mmd_rows == "all_slots":
            raise _unfit(
                "loss infonce takes each item once: mmd_rows must be unique_items, got all_slots"
            )
        return self


class GateConfig(Section):
    """How the gate is learned; see :mod:`padkern.pad.gate`."""

    learning: Literal["heldout", "joint", "uniform"] = "heldout"
    form: Literal["scale", "sigmoid", "uniform", "continuous", "per_item"] = "scale"
    knots: int = Field(6, ge=2, description="of the continuous form")
    pull: float = Field(
        10.0, ge=0, description="weight of the distance from the bin's logits (per_item)"
    )
    steps: int = Field(60, ge=1, description="optimiser steps of a held-out fit")
    lr: float = Field(0.1, gt=0, description="of a held-out fit")
    users_per_step: int = Field(1024, ge=1)
    cold_tolerance: float = Field(
        0.01, ge=0, lt=1, description="relative NDCG@10 that raising unseen items may cost"
    )
    rare_tolerance: float = Field(
        0.005, ge=0, lt=1, description="relative NDCG@10 that raising rare items may cost"
    )
    train_lr: float = Field(1e-2, ge=0, description="of a gate trained with the experts")
    hide: float = Field(0.5, ge=0, le=1, description="share of rare items unseen in a step")
    hide_max_frequency: int = Field(5, ge=0, description="training count up to which one is rare")
    fit_hide: float = Field(
        0.0, ge=0, le=1, description="share of rare items unseen in a step of a held-out fit"
    )

    @property
    def learned(self) -> str:
        """The way it is learned: a uniform gate has nothing to learn."""
        return "uniform" if self.form == "uniform" else self.learning

    @model_validator(mode="after")
    def _hides_in_a_fit(self) -> GateConfig:
        if self.fit_hide and self.learned != "heldout":
            raise _unfit(
                f"fit_hide hides items in a held-out fit, which {self.learned} learning has not"
            )
        return self


class PadConfig(PhaseConfig):
    """Phase 3: the triple expert and its gate."""

    gate: GateConfig = GateConfig()
    start_language: Literal["trained", "random"] = "trained"
    experts: tuple[Literal["rec", "aligned", "language"], ...] = Field(
        EXPERTS, min_length=2, description="which of the three, in this order"
    )

    @field_validator("experts")
    @classmethod
    def _in_order(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names != tuple(name for name in EXPERTS if name in names):
            raise _unfit(f"each of {', '.join(EXPERTS)} at most once, in this order")
        return names


class LossConfig(Section):
    """Recommendation loss: full-catalogue cross-entropy, or binary cross-entropy with sampled
    negatives, plain or calibrated (:func:`padkern.ops.triple_expert.gbce_beta`)."""

    kind: Literal["ce", "bce", "gbce"] = "ce"
    negatives: int = Field(1, ge=1, description="sampled per token of bce and gbce")
    calibration: float = Field(0.75, ge=0, le=1, description="t of the gbce; 1: fully calibrated")
    sampling: Literal["uniform", "popularity", "in_batch"] = "uniform"
    popularity_power: float = Field(0.75, ge=0, description="exponent of the training count")

    @property
    def sampled(self) -> bool:
        """Whether the loss needs negatives."""
        return self.kind != "ce"


class RivalsConfig(Section):
    """Options of the methods that PAD is compared with (:mod:`padkern.pad.methods`).

    Learning rate, epochs and the like of those that are trained stand in ``id_plus_text``. No row
    of ``padkern run`` reads this section.
    """

    recency_path: bool = Field(False, description="trained rivals have the recency path too")
    adaptor_experts: int = Field(8, ge=1, description="whitening maps of unisrec")
    null_dim: int | None = Field(
        None, ge=1, description="coordinates with IDs in alphafuse; None: half of model.dim"
    )
    knn_neighbours: int = Field(100, ge=1, description="of item_knn, per item")
    knn_shrinkage: float = Field(10.0, ge=0, description="of item_knn, added to the norms")
    knn_decay: float = Field(1.0, gt=0, le=1, description="history decay of item_knn")
    ease_l2: float = Field(100.0, gt=0, description="ridge penalty of ease")
    ease_max_items: int = Field(20_000, ge=1, description="items seen in training that it takes")
    ials_sweeps: int = Field(16, ge=1, description="of ials over users and items")
    ials_unobserved: float = Field(0.1, gt=0, description="weight of every pair in ials")
    ials_l2: float = Field(0.003, gt=0, description="penalty of ials")
    ials_exponent: float = Field(1.0, ge=0, description="of the frequency in that penalty")


class EvaluationConfig(Section):
    """Treatment of repeats and number of bootstrap resamples."""

    mask_repeats: bool = True
    resamples: int = Field(10_000, ge=100)


class RunConfig(Section):
    """Everything that decides a run, together with the data and the text source."""

    preset_name: Literal["clean", "parity"] = "clean"
    seed: int = Field(1, ge=0)
    split: Literal["leave_one_out", "global_time"] = "leave_one_out"
    num_bins: int = Field(10, ge=1, description="frequency bins of equal training mass")
    unseen: Literal["own", "last"] = "own"
    text: TextConfig = TextConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    pretrain: PhaseConfig = PhaseConfig(lr=5e-3)
    language: PhaseConfig = PhaseConfig(lr=2e-4)
    id_plus_text: PhaseConfig = PhaseConfig(lr=1.5e-3)
    align: AlignConfig = AlignConfig(lr=1.5e-3)
    disentangle: PadConfig = PadConfig(lr=1e-4, epochs=2)
    evaluation: EvaluationConfig = EvaluationConfig()
    rivals: RivalsConfig = RivalsConfig()

    @model_validator(mode="after")
    def _sections_fit(self) -> RunConfig:
        if self.model.fuse == "null_space":
            self._null_space_fits()
        if self.disentangle.gate.fit_hide and self.unseen != "own":
            raise _unfit(f"disentangle.gate.fit_hide needs unseen to be own, got {self.unseen}")
        return self

    def _null_space_fits(self) -> None:
        text = self.model.dim - self.model.null_dim
        if self.text.pca is None or self.text.pca < text:
            raise _unfit(
                f"model.fuse null_space needs text.pca of at least dim - null_dim ({text}), "
                f"got {self.text.pca}"
            )
        if self.align.aligns:
            raise _unfit(
                "model.fuse null_space keeps text and IDs apart: align.loss must be none, "
                f"got {self.align.loss}"
            )
        if self.align.start == "copy":
            raise _unfit(
                "model.fuse null_space has IDs of width null_dim: align.start must be encoder or "
                "fresh, got copy"
            )

    @classmethod
    def preset(cls, name: str) -> RunConfig:
        """``"clean"`` (what the method should be) or ``"parity"`` (what the release does)."""
        if name == "clean":
            return cls()
        if name == "parity":
            return cls.model_validate(PARITY)
        raise UsageError(f"preset must be clean or parity, got {name!r}")

    def with_overrides(self, assignments: Sequence[str]) -> RunConfig:
        """A copy with ``a.b=value`` assignments applied; values are read as YAML.

        Raises:
            UsageError: an assignment without ``=``, an unknown key or a value that does not fit.
        """
        values = self.model_dump()
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals:
                raise UsageError(f"--set {assignment}: expected key=value")
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise UsageError(f"--set {assignment}: {text!r} is not YAML") from error
            _place(values, key.strip(), value, f"--set {assignment}")
        return _validated(values, "--set")

    def with_values(self, changes: Mapping[str, Any], source: str) -> RunConfig:
        """A copy with the values of dotted keys replaced; ``source`` names them in messages.

        Raises:
            UsageError: an unknown key or a value that does not fit.
        """
        values = self.model_dump()
        for key, value in changes.items():
            _place(values, key, value, source)
        return _validated(values, source)

    def facts(self, exclude: set[str] | None = None) -> dict[str, Any]:
        """What names the results of this configuration: every value that can change them.

        Keys in :data:`_SILENT` are left out where they say what was done before they came: results
        of that time keep their names.

        Args:
            exclude: whole sections that the result does not depend on.
        """
        values = self.model_dump(mode="json", exclude=exclude)
        # Decides the intervals of a table, not the result.
        values.get("evaluation", {}).pop("resamples", None)
        for key, before in _SILENT.items():
            *sections, leaf = key.split(".")
            place: Any = values
            for section in sections:
                place = place.get(section, {})
            if place.get(leaf, None) == before:
                del place[leaf]
        return values

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> RunConfig:
        """Reads :meth:`to_yaml`; UsageError for unknown or missing keys and unfit values."""
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"configuration is not YAML: {error}") from error
        config = _validated(values, "configuration")
        for key, before in _SILENT.items():
            if isinstance(values, dict) and not _has(values, key):
                config = config.with_values({key: before}, "configuration")
        missing = _missing(config.model_dump(), values)
        if missing:
            raise UsageError(f"configuration: {missing} is missing")
        return config


#: Keys that came after runs had been stored: without them a run did what their defaults say, or
#: :data:`_SILENT`.
_LATER = (
    "model.caser",
    "model.null_dim",
    "model.text_maps",
    "text.all_but_top",
    "text.null_space",
    "loss.calibration",
    "align.loss",
    "align.kernel",
    "align.temperature",
    "align.anchor",
    "disentangle.experts",
    "disentangle.gate.knots",
    "disentangle.gate.pull",
    "disentangle.gate.fit_hide",
    "disentangle.gate.rare_tolerance",
    "rivals",
)

#: Later keys with the value that says what was done before they came.
_SILENT: dict[str, Any] = {"model.text_maps": 1, "disentangle.gate.rare_tolerance": 0.0}


def _has(values: dict[str, Any], key: str) -> bool:
    """Whether a dotted key is there."""
    place: Any = values
    for part in key.split("."):
        if not isinstance(place, dict) or part not in place:
            return False
        place = place[part]
    return True


def _missing(wanted: dict[str, Any], found: Any, prefix: str = "") -> str | None:
    """The first key of ``wanted`` that ``found`` lacks, dotted."""
    for key, value in wanted.items():
        if key not in found:
            if prefix + key in _LATER:
                continue
            return prefix + key
        if isinstance(value, dict):
            deeper = _missing(value, found[key], f"{prefix}{key}.")
            if deeper:
                return deeper
    return None


def _place(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Replaces the value of a dotted key in place."""
    place: Any = values
    *parents, leaf = key.split(".")
    for part in parents:
        place = place.get(part) if isinstance(place, dict) else None
    if not isinstance(place, dict) or leaf not in place:
        raise UsageError(f"{source}: unknown key {key!r}")
    place[leaf] = value


def _validated(values: Any, source: str) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "top level"
        # Of a whole section the message names the values itself.
        given = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
        raise UsageError(f"{source}: {key}: {first['msg']}{given}") from error


_PARITY_PHASE = {
    "epochs": 400,
    "batch_size": 128,
    "lr": 1e-5,
    "weight_decay": 0.1,
    "norm_weight_decay": 0.1,
    "gate_weight_decay": 0.01,
    "warmup_steps": 0,
    "min_lr_factor": 1.0,
    "patience": 21,
    "restore_best": False,
    "select": "hit@10",
}

#: What the released code does (``pad.md`` numbers its quirks): BCE with one uniform negative, MMD
#: over all slots with padding and negatives, sigmoid gate trained with the experts, last epoch.
PARITY: dict[str, Any] = {
    "preset_name": "parity",
    "unseen": "last",
    "text": {"center": False, "pca": None, "whiten": False, "normalize": False},
    "model": {
        "dim": 128,
        "id_init": "xavier",
        "num_layers": 5,
        "dropout": 0.1,
        "fuse": "cat",
        "text_layers": 4,
        "pool_decay": None,
        "language": "projected",
    },
    "loss": {"kind": "bce", "negatives": 1},
    "pretrain": _PARITY_PHASE,
    "language": _PARITY_PHASE,
    "id_plus_text": _PARITY_PHASE,
    "align": _PARITY_PHASE
    | {
        "gamma": 0.2,
        "mmd_rows": "all_slots",
        "mmd_users": 16,
        "estimator": "tllib",
        "start": "copy",
    },
    "disentangle": _PARITY_PHASE
    | {
        "lr": 1e-4,
        "gate": {"learning": "joint", "form": "sigmoid", "train_lr": 1e-4, "hide": 0.0},
        "start_language": "random",
    },
}
