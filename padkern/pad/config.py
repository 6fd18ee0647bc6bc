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
    pca: int | None = Field(256, ge=1, description="components kept; None keeps the width")
    whiten: bool = True
    normalize: bool = True
    knn_decay: float = Field(0.6, gt=0, le=1, description="history decay of the text_knn row")


class CaserConfig(Section):
    """Sizes of the encoder ``caser``; see :class:`padkern.models.caser.Caser`."""

    window: int = Field(5, ge=1, description="tokens that a state sees, at most model.max_len")
    horizontal: int = Field(16, ge=1, description="filters of each height")
    vertical: int = Field(4, ge=1, description="vertical filters")


class ModelConfig(Section):
    """Form and size of the experts; see :func:`padkern.models.build.build_expert`."""

    dim: int = Field(64, ge=1)
    id_init: Literal["scaled", "xavier"] = "scaled"
    max_len: int = Field(20, ge=1)
    encoder: str = Field("sasrec", description="sasrec, sasrec_pre_ln, gru4rec, caser, registered")
    num_layers: int = Field(2, ge=1, description="of every encoder but caser")
    num_heads: int = Field(2, ge=1, description="of sasrec and sasrec_pre_ln")
    caser: CaserConfig = CaserConfig()
    dropout: float = Field(0.2, ge=0, lt=1)
    fuse: Literal["sum", "cat"] = "sum"
    text_layers: int = Field(0, ge=0)
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
        if self.encoder.startswith("sasrec") and self.dim % self.num_heads:
            raise _unfit(f"dim must be divisible by num_heads, got {self.dim} and {self.num_heads}")
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


class AlignConfig(PhaseConfig):
    """Phase 2: the MK-MMD beside the recommendation loss."""

    gamma: float = Field(1.0, ge=0, description="weight of the MK-MMD")
    mmd_rows: Literal["unique_items", "all_slots"] = "unique_items"
    mmd_users: int | None = Field(None, ge=2, description="users per MMD; None: the whole batch")
    estimator: Literal["unbiased", "biased", "tllib"] = "unbiased"
    alphas: tuple[float, ...] = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
    start: Literal["encoder", "copy", "fresh"] = Field(
        "encoder",
        description="taken from pre-training: the encoder, IDs and encoder (copy), nothing (fresh)",
    )


class GateConfig(Section):
    """How the gate is learned; see :mod:`padkern.pad.gate`."""

    learning: Literal["heldout", "joint", "uniform"] = "heldout"
    form: Literal["scale", "sigmoid"] = "scale"
    steps: int = Field(60, ge=1, description="optimiser steps of a held-out fit")
    lr: float = Field(0.1, gt=0, description="of a held-out fit")
    users_per_step: int = Field(1024, ge=1)
    cold_tolerance: float = Field(
        0.01, ge=0, lt=1, description="relative NDCG@10 that raising unseen items may cost"
    )
    train_lr: float = Field(1e-2, ge=0, description="of a gate trained with the experts")
    hide: float = Field(0.5, ge=0, le=1, description="share of rare items unseen in a step")
    hide_max_frequency: int = Field(5, ge=0, description="training count up to which one is rare")


class PadConfig(PhaseConfig):
    """Phase 3: the triple expert and its gate."""

    gate: GateConfig = GateConfig()
    start_language: Literal["trained", "random"] = "trained"


class LossConfig(Section):
    """Recommendation loss: full-catalogue cross-entropy or sampled binary cross-entropy."""

    kind: Literal["ce", "bce"] = "ce"
    negatives: int = Field(1, ge=1, description="sampled negatives per token of the bce")
    sampling: Literal["uniform", "popularity", "in_batch"] = "uniform"
    popularity_power: float = Field(0.75, ge=0, description="exponent of the training count")


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
        missing = _missing(config.model_dump(), values)
        if missing:
            raise UsageError(f"configuration: {missing} is missing")
        return config


#: Keys that came after runs had been stored: without them a run did what their defaults say.
_LATER = ("model.caser",)


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
