"""Where tuning may look: a range for every configuration key that a method names as tunable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from padkern.errors import UsageError
from padkern.pad.config import RunConfig, Section

__all__ = ["Range", "read_search", "space_of", "value_of"]


class Range(Section):
    """Choices, or numbers from ``low`` to ``high``."""

    choices: list[Any] | None = Field(None, min_length=1)
    low: float | None = None
    high: float | None = None
    scale: Literal["linear", "log", "integer"] = "linear"

    @model_validator(mode="after")
    def _fits(self) -> Range:
        given = [self.low is not None, self.high is not None]
        if any(given) != all(given) or any(given) == (self.choices is not None):
            raise _unfit("give either choices, or both low and high")
        if self.low is not None and self.high is not None:
            if not self.low < self.high:
                raise _unfit(f"low must be below high, got {self.low:g} and {self.high:g}")
            if self.scale == "log" and self.low <= 0:
                raise _unfit(f"low must be positive on a log scale, got {self.low:g}")
        return self

    def ends(self) -> list[Any]:
        """The values that decide whether all fit the configuration."""
        if self.choices is not None:
            return self.choices
        ends = [self.low, self.high]
        return [int(end) for end in ends if end is not None] if self.scale == "integer" else ends


def _unfit(message: str) -> PydanticCustomError:
    return PydanticCustomError("unfit", "{message}", {"message": message})


#: Ranges by the last part of a key: a factor below and above the configured value, or fixed.
_AROUND = {
    "lr": 10.0,
    "gamma": 10.0,
    "knn_shrinkage": 10.0,
    "ease_l2": 30.0,
    "ials_unobserved": 10.0,
    "ials_l2": 10.0,
}
_FIXED = {
    "dim": Range(choices=[32, 64, 128]),
    "knn_neighbours": Range(choices=[50, 100, 200, 400]),
    "adaptor_experts": Range(choices=[4, 8, 16]),
    "ials_sweeps": Range(choices=[8, 16, 32]),
    "ials_exponent": Range(low=0.0, high=1.0),
    "recency_path": Range(choices=[False, True]),
    "epochs": Range(choices=[5, 10, 20]),
    "batch_size": Range(choices=[64, 128, 256]),
    "weight_decay": Range(low=1e-3, high=0.5, scale="log"),
    "dropout": Range(low=0.0, high=0.5),
    "knn_decay": Range(low=0.3, high=1.0),
}
#: Keys that may not exceed the configured width of the models: shares of it.
_SHARES = {"rivals.null_dim": (1 / 4, 1 / 2, 3 / 4)}


def read_search(found: Mapping[str, Any], source: str) -> dict[str, Range]:
    """The key ``search`` of a grid: configuration key -> list of choices, or low, high, scale.

    Raises:
        UsageError: an entry that is no range, or a key that no configuration has.
    """
    ranges = {}
    for key, entry in found.items():
        place = f"{source}: search.{key}"
        try:
            value = {"choices": entry} if isinstance(entry, list) else entry
            ranges[key] = Range.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            part = ".".join(str(part) for part in first["loc"])
            given = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
            raise UsageError(f"{place}{'.' if part else ''}{part}: {first['msg']}{given}") from None
        value_of(RunConfig(), key, place)
    return ranges


def space_of(
    tunable: Sequence[str], config: RunConfig, search: Mapping[str, Range], source: str
) -> tuple[dict[str, Range], list[str]]:
    """The ranges of a method's tunable keys, and the keys for which none is known.

    Args:
        tunable: dotted keys.
        config: the method's configuration, the centre of relative ranges.
        search: ranges given in the grid; they go before the built-in ones.
        source: names the grid in messages.

    Raises:
        UsageError: the end of a range does not fit the configuration.
    """
    space: dict[str, Range] = {}
    unknown = []
    for key in tunable:
        leaf = key.rsplit(".", 1)[-1]
        value = value_of(config, key, source)
        if key in search:
            space[key] = search[key]
        elif leaf in _AROUND and isinstance(value, (int, float)) and value > 0:
            factor = _AROUND[leaf]
            space[key] = Range(low=value / factor, high=value * factor, scale="log")
        elif leaf in _FIXED:
            space[key] = _FIXED[leaf]
        elif key in _SHARES:
            widths = {max(round(share * config.model.dim), 1) for share in _SHARES[key]}
            space[key] = Range(choices=sorted(widths))
        else:
            unknown.append(key)
            continue
        for end in space[key].ends():
            config.with_values({key: end}, f"{source}: search.{key}")
    return space, unknown


def value_of(config: RunConfig, key: str, source: str) -> Any:
    """The configured value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        if part not in getattr(type(value), "model_fields", {}):
            raise UsageError(f"{source}: unknown key {key!r}")
        value = getattr(value, part)
    return value
