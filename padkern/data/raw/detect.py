"""Which files belong to a data set, in which published form, and what each of them holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from padkern.data.raw.jsonlines import parse_object
from padkern.data.raw.stream import first_lines
from padkern.errors import DataError

__all__ = ["FORMATS", "Files", "find_files"]

FORMATS = ("amazon2018", "amazon2023", "mind", "movielens", "recbole", "sasrec")

EVENTS, CATALOG = "events", "catalog"
_JSON = r"\.(jsonl|json|ndjson)"
# By name, for a format that was asked for: the catalogue, then the interactions.
_NAMES = {
    "amazon2018": (rf"meta_.*{_JSON}", rf".*({_JSON}|\.csv)"),
    "amazon2023": (rf"meta_.*{_JSON}", rf".*({_JSON}|\.csv)"),
    "mind": (r"news\.tsv", r"behaviors\.tsv"),
    "movielens": (r"movies\.csv", r"ratings\.csv"),
    "recbole": (r".*\.item", r".*\.inter"),
    "sasrec": (r"(?!)", r".*\.txt"),
}
_MIND_TIME = re.compile(r"\d{1,2}/\d{1,2}/\d{4} \d{1,2}:\d{2}:\d{2} [AP]M")
_NUMBER = re.compile(r"-?\d+(\.\d*)?")


@dataclass(frozen=True)
class Files:
    """Files of one data set.

    Attributes:
        format: one of ``FORMATS``.
        events: files with interactions, at least one.
        catalogs: files with items.
    """

    format: str
    events: tuple[Path, ...]
    catalogs: tuple[Path, ...]


def find_files(sources: Sequence[Path], format: str | None) -> Files:
    """Sorts files and folders into interactions and items.

    Without a format the first line of each file decides, and files that no format knows are passed
    over, as a folder may hold anything; with one, names decide before the first line does.

    Args:
        sources: files, and folders that are looked into (not into their folders).
        format: one of ``FORMATS``, or None.

    Raises:
        DataError: if a source is missing, files of more than one format or no interactions are
            found, or a named file belongs to no known format.
        ValueError: on an unknown format.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not sources:
        raise ValueError("sources must name at least one file or folder")
    found: dict[str, dict[str, list[Path]]] = {}
    for source in sources:
        if not source.exists():
            raise DataError(f"{source}: no such file or folder")
        inside = sorted(source.iterdir()) if source.is_dir() else [source]
        for path in inside:
            if not path.is_file() or path.name.startswith("."):
                continue
            kind = _by_content(path) if format is None else _asked_for(path, format)
            if kind is None:
                if source.is_dir():
                    continue
                which = "any known format" if format is None else f"format {format}"
                raise DataError(
                    f"{path}: does not look like a file of {which}"
                    + ("; name it with --format" if format is None else "")
                )
            paths = found.setdefault(kind[0], {EVENTS: [], CATALOG: []})[kind[1]]
            if path not in paths:
                paths.append(path)
    places = ", ".join(str(source) for source in sources)
    if len(found) > 1:
        each = "; ".join(
            f"{name}: {', '.join(path.name for paths in roles.values() for path in paths)}"
            for name, roles in sorted(found.items())
        )
        raise DataError(f"{places}: files of several formats ({each}); choose with --format")
    if not found:
        known = ", ".join(FORMATS)
        raise DataError(f"{places}: no file of a known format ({known}); name it with --format")
    ((name, roles),) = found.items()
    if not roles[EVENTS]:
        raise DataError(f"{places}: items of format {name}, but no file with interactions")
    _refuse_twins(roles[EVENTS], sources)
    return Files(name, tuple(roles[EVENTS]), tuple(roles[CATALOG]))


def _refuse_twins(paths: Sequence[Path], sources: Sequence[Path]) -> None:
    """Raises DataError where a folder holds the same interactions in two forms.

    Such are a file beside its compressed or otherwise encoded copy, a category beside its k-core,
    and a whole beside its parts.
    """
    seen: dict[tuple[Path, str], Path] = {}
    for path in paths:
        if path in sources:
            continue  # named one by one, so meant
        stem = re.sub(r"\.gz$", "", path.name, flags=re.IGNORECASE)
        stem = re.sub(rf"({_JSON}|\.csv|\.inter|\.txt)$", "", stem, flags=re.IGNORECASE)
        stem = re.sub(r"(_\d+|\.(train|valid|test))$", "", stem, flags=re.IGNORECASE)
        stem = stem.removeprefix("reviews_").removeprefix("ratings_").lower()
        twin = seen.setdefault((path.parent, stem), path)
        parts = {p.name.lower().rsplit(".", 2)[-2] for p in (twin, path)}
        if twin is not path and not parts <= {"train", "valid", "test"}:
            raise DataError(
                f"{twin} and {path.name} look like the same interactions in two forms; name the "
                "files to read instead of their folder"
            )


def _asked_for(path: Path, format: str) -> tuple[str, str] | None:
    name = path.name.removesuffix(".gz")
    catalog, events = _NAMES[format]
    if re.fullmatch(catalog, name, re.IGNORECASE):
        return format, CATALOG
    kind = _by_content(path)
    if kind is not None and kind[0] == format:
        return kind
    if re.fullmatch(events, name, re.IGNORECASE):
        return format, kind[1] if kind is not None and kind[0][:6] == format[:6] else EVENTS
    return None


def _by_content(path: Path) -> tuple[str, str] | None:
    """Format and role by the first line, or None."""
    line = next(iter(first_lines(path)), "")
    if line.lstrip().startswith("{"):
        return _json(path.name, parse_object(line))
    tabs, commas = line.split("\t"), [cell.strip(' "') for cell in line.split(",")]
    if re.fullmatch(r"[^\t:]+:(token|float)(_seq)?", tabs[0]):
        fields = {cell.partition(":")[0] for cell in tabs}
        if "item_id" in fields or "item_id_list" in fields:
            return "recbole", EVENTS if "user_id" in fields else CATALOG
        return None
    if len(tabs) == 5 and _MIND_TIME.fullmatch(tabs[2]):
        return "mind", EVENTS
    if len(tabs) == 8 and re.fullmatch(r"N\d+", tabs[0]):
        return "mind", CATALOG
    if "movieId" in commas:
        if "userId" in commas and "rating" in commas:
            return "movielens", EVENTS
        return ("movielens", CATALOG) if {"title", "genres"} <= set(commas) else None
    if {"user_id", "parent_asin"} <= set(commas):
        return "amazon2023", EVENTS
    if len(commas) == 4 and _NUMBER.fullmatch(commas[2]) and commas[3].isdecimal():
        return "amazon2018", EVENTS
    if re.fullmatch(r"\d+[ \t]\d+ *", line) and ".txt" in path.name.lower():
        return "sasrec", EVENTS
    return None


def _json(name: str, record: dict | None) -> tuple[str, str] | None:
    if record is None:
        return None
    if "parent_asin" in record:
        return "amazon2023", EVENTS if "user_id" in record else CATALOG
    if "asin" in record:
        return "amazon2018", EVENTS if "reviewerID" in record else CATALOG
    return None
