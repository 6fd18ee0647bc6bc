"""The YAML file of a grid: data sets x methods x seeds, checked before anything runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from padkern.data.filters import Filters
from padkern.data.io import Columns
from padkern.errors import UsageError
from padkern.pad.config import RunConfig, Section
from padkern.pad.workflow import Request, settings

__all__ = [
    "Cell",
    "DatasetEntry",
    "Grid",
    "MethodEntry",
    "digest",
    "flat",
    "known_methods",
    "parse_grid",
    "read_grid",
]

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
#: What decides who is evaluated and how: the same for every method of a data set.
_SHARED = ("split", "evaluation")
_FORMAT = 1


class DatasetEntry(Section):
    """One data set of a grid; the keys mean what the options of ``padkern run`` mean."""

    data: str | None = Field(None, description="folder, file or name; default: the entry's key")
    text: str | None = Field(None, description="encoder or matrix file")
    columns: dict[str, str] = Field({}, description="column names")
    filters: dict[str, Any] = Field({}, description="of padkern.data.Filters")
    on_bad_rows: Literal["error", "skip"] = "error"
    methods: list[str] | None = Field(None, description="labels; default: every method")
    values: dict[str, Any] = Field({}, alias="set", description="configuration, dotted or nested")
    tuned: dict[str, dict[str, Any]] = Field({}, description="label -> configuration")


class MethodEntry(Section):
    """One method of a grid: a name of the registry with configuration values of its own."""

    method: str | None = Field(None, description="registered name; default: the entry's key")
    values: dict[str, Any] = Field({}, alias="set", description="configuration, dotted or nested")


class _File(Section):
    title: str | None = None
    preset: Literal["clean", "parity"] = "clean"
    datasets: dict[str, DatasetEntry] = Field(min_length=1)
    methods: dict[str, MethodEntry] = Field(min_length=1)
    seeds: list[int] = Field([1, 2, 3], min_length=1)
    values: dict[str, Any] = Field({}, alias="set")
    search: dict[str, Any] = Field({}, description="ranges for `padkern tune`")
    tuning: dict[str, Any] | None = Field(None, description="what `padkern tune` recorded")


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        dataset, label: keys of the grid's data sets and methods.
        method: registered name.
        seed: root of its random draws.
        config: everything that decides the run, the seed included.
        data_id: identifies the data set's entry.
    """

    dataset: str
    label: str
    method: str
    seed: int
    config: RunConfig
    data_id: str

    @property
    def pair(self) -> tuple[str, str]:
        """Data set and label."""
        return self.dataset, self.label

    @property
    def name(self) -> str:
        """Readable, and unlike that of any cell with another configuration: a folder's name."""
        config = self.config
        gate = config.disentangle.gate
        raises = gate.learned == "heldout" and gate.form != "sigmoid"
        if self.method != "pad" or not raises:  # nothing that this could act on
            config = config.with_values({"disentangle.gate.rare_tolerance": 0.0}, "name")
        facts = [_FORMAT, self.method, self.data_id, config.facts()]
        return f"{self.dataset}--{self.label}--seed-{self.seed}--{digest(facts)}"

    def __str__(self) -> str:
        return f"{self.dataset} / {self.label} / seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """A checked grid.

    Attributes:
        source: the file, as named in messages.
        text: its content.
        title: heading of the table.
        preset: of the configuration.
        datasets, methods: by key and label, in the file's order.
        seeds: distinct, at least one.
        values: configuration values for all, flat: dotted key -> value.
        found: the mapping read, lists of names and empty entries as mappings.
        search: ranges for ``padkern tune``, as given.
        tuning: what ``padkern tune`` recorded of the search behind the values ``tuned``, or None.
    """

    source: str
    text: str
    title: str
    preset: str
    datasets: dict[str, DatasetEntry]
    methods: dict[str, MethodEntry]
    seeds: tuple[int, ...]
    values: dict[str, Any]
    found: dict[str, Any]
    search: dict[str, Any]
    tuning: dict[str, Any] | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """Every (data set, label), data set by data set."""
        return [
            (name, label)
            for name, entry in self.datasets.items()
            for label in self.methods
            if entry.methods is None or label in entry.methods
        ]

    def cells(self, seeds: int | None = None) -> Iterator[Cell]:
        """The cells of the first ``seeds`` seeds (None: all), seed by seed, so that whatever is
        finished at any time is even over data sets and methods."""
        for seed in self.seeds[:seeds]:
            for pair in self.pairs():
                yield self.cell(*pair, seed)

    def cell(self, dataset: str, label: str, seed: int) -> Cell:
        """One cell with its configuration."""
        method = self.methods[label].method or label
        config = self.config(dataset, label).with_values({"seed": seed}, self.source)
        return Cell(dataset, label, method, seed, config, self.data_id(dataset))

    def config(self, dataset: str, label: str) -> RunConfig:
        """Preset, then the values of the grid, the data set, the method, and of tuning.

        Raises:
            UsageError: an unknown key or a value that does not fit, naming where it stands.
        """
        entry = self.datasets[dataset]
        tuned = f"datasets.{dataset}.tuned.{label}"
        config = RunConfig.preset(self.preset)
        for place, values in (
            ("set", self.values),
            (f"datasets.{dataset}.set", entry.values),
            (f"methods.{label}.set", self.methods[label].values),
            (tuned, entry.tuned.get(label, {})),
        ):
            config = config.with_values(flat(values), f"{self.source}: {place}")
        return config

    def source_of(self, dataset: str) -> tuple[str, str]:
        """Data and text source of a data set, defaults filled in."""
        entry = self.datasets[dataset]
        data = entry.data or dataset
        return data, Request(data, text=entry.text).source

    def data_id(self, dataset: str) -> str:
        """Digest of all that decides a data set's content and text matrix."""
        entry = self.datasets[dataset]
        return digest([*self.source_of(dataset), entry.columns, entry.filters, entry.on_bad_rows])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def known_methods() -> Mapping[str, Any]:
    """The registry of methods."""
    from padkern.pad.methods import METHODS

    return METHODS


def read_grid(path: str | Path) -> Grid:
    """Reads and checks a grid.

    Args:
        path: a YAML file; its keys are described in ``docs/compare.md``.

    Raises:
        UsageError: the first mistake, with file, key, rule and value. Every configuration of the
            grid is checked, so a cell cannot fail for its configuration's form.
    """
    source = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"{source}: cannot be read: {why}") from None
    return parse_grid(text, source)


def parse_grid(text: str, source: str) -> Grid:
    """:func:`read_grid` of a text; ``source`` names it in messages."""
    found = _load(text, source)
    if not isinstance(found, dict):
        raise UsageError(f"{source}: a grid is a mapping with the keys datasets and methods")
    _normalise(found, source)
    try:
        file = _File.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if part != "[key]") or "top level"
        given = "" if isinstance(first["input"], dict) else f", got {first['input']!r}"
        raise UsageError(f"{source}: {key}: {first['msg']}{given}") from None
    grid = Grid(
        source=source, text=text, title=file.title or Path(source).stem, preset=file.preset,
        datasets=file.datasets, methods=file.methods, seeds=tuple(file.seeds),
        values=flat(file.values), found=found, search=file.search, tuning=file.tuning,
    )  # fmt: skip
    _check(grid)
    return grid


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, Hashable):
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _load(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = "" if mark is None else f"line {mark.line + 1}: "
        raise UsageError(f"{source}: {line}{error.problem}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{source}: not YAML: {error}") from None


def _normalise(found: dict[str, Any], source: str) -> None:
    """The word all, lists of names and empty entries as mappings."""
    if found.get("methods") == "all":
        found["methods"] = list(known_methods())
    for key in ("datasets", "methods"):
        entries = found.get(key)
        if isinstance(entries, list) and all(isinstance(name, str) for name in entries):
            if len(set(entries)) < len(entries):
                raise UsageError(f"{source}: {key}: each name once, got {entries}")
            found[key] = entries = {name: {} for name in entries}
        if isinstance(entries, dict):
            found[key] = {name: {} if e is None else e for name, e in entries.items()}


def _check(grid: Grid) -> None:
    """What the types alone do not say."""
    where = grid.source
    for kind, labels in (("datasets", grid.datasets), ("methods", grid.methods)):
        for label in labels:
            if not _LABEL.fullmatch(label):
                raise UsageError(
                    f"{where}: {kind}: a key starts with a letter or digit and holds letters, "
                    f"digits, and any of _ . + -, got {label!r}"
                )
    for seed in grid.seeds:
        if seed < 0 or grid.seeds.count(seed) > 1:
            raise UsageError(
                f"{where}: seeds: must be different and not negative, got {list(grid.seeds)}"
            )
    registry = known_methods()
    for label, entry in grid.methods.items():
        if (entry.method or label) not in registry:
            key = f"methods.{label}" + (".method" if entry.method else "")
            raise UsageError(
                f"{where}: {key}: must be one of {', '.join(registry)}, "
                f"got {entry.method or label!r}"
            )
        _refuse_shared(entry.values, f"{where}: methods.{label}.set")
    _refuse(grid.values, ("seed", "preset_name"), f"{where}: set", "the keys seeds and preset")
    for name, data in grid.datasets.items():
        place = f"{where}: datasets.{name}"
        _refuse(data.values, ("seed", "preset_name"), f"{place}.set", "the keys seeds and preset")
        for key, named in (("methods", data.methods), ("tuned", list(data.tuned))):
            unknown = [label for label in named or [] if label not in grid.methods]
            if unknown:
                raise UsageError(
                    f"{place}.{key}: must be of {', '.join(grid.methods)}, got {unknown[0]!r}"
                )
        if data.methods is not None and not 0 < len(data.methods) == len(set(data.methods)):
            raise UsageError(f"{place}.methods: must be one or more, each once, got {data.methods}")
        for label, values in data.tuned.items():
            _refuse_shared(values, f"{place}.tuned.{label}")
        if data.columns or data.filters:
            settings(Columns, f"{place}.columns", [f"{k}={v}" for k, v in data.columns.items()])
            settings(Filters, f"{place}.filters", [f"{k}={v}" for k, v in data.filters.items()])
    for pair in grid.pairs():
        grid.config(*pair)


def _refuse_shared(values: Mapping[str, Any], place: str) -> None:
    _refuse(values, ("seed", "preset_name"), place, "the keys seeds and preset")
    _refuse(values, _SHARED, place, "a data set's set: it must be the same for every method")


def _refuse(values: Mapping[str, Any], sections: tuple[str, ...], place: str, instead: str) -> None:
    for key, value in flat(values).items():
        if key.split(".")[0] in sections:
            raise UsageError(f"{place}.{key}: belongs into {instead}, got {value!r}")


def digest(facts: Any) -> str:
    """Twelve hexadecimal digits of JSON-serialisable facts, the order of keys aside."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]
