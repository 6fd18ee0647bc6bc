"""What is in a data set and in its split, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from padkern.data.dataset import Dataset, Ragged
from padkern.data.split import EvalSplit, Split

__all__ = ["audit", "format_audit"]

_GROUPS = (("freq_0", 0, 0), ("freq_1_5", 1, 5), ("freq_6_50", 6, 50), ("freq_gt_50", 51, np.inf))


def audit(dataset: Dataset, split: Split, max_len: int) -> dict[str, Any]:
    """Facts that decide what results can mean.

    Args:
        dataset: the data set.
        split: its split.
        max_len: inputs per sequence that the model will see.

    Returns:
        A JSON-serialisable dictionary: sizes, length and frequency distributions, repeats,
        duplicates, per held-out part the cold targets, the ceiling (share of users whose target is
        not in their masked history) and ties in time at the target, the padding share of a padded
        batch of ``max_len`` slots, digests, and what the reader dropped. Entries that need
        timestamps are None without them.

    Raises:
        ValueError: if ``max_len`` is below 1 or the split is of another data set.
    """
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1, got {max_len}")
    if len(split.train) != dataset.num_users or len(split.train_frequency) != len(dataset.items):
        raise ValueError("split does not belong to this data set")
    sequences = dataset.sequences
    lengths = sequences.lengths
    frequency = split.train_frequency
    pairs = np.maximum(split.train.lengths - 1, 0)
    slots = int(np.count_nonzero(pairs)) * max_len
    used = int(np.minimum(pairs, max_len).sum())
    return {
        "dataset": dataset.name,
        "users": dataset.num_users,
        "items": dataset.num_items,
        "interactions": int(sequences.values.size),
        "density": sequences.values.size / (dataset.num_users * dataset.num_items),
        "length": _distribution(lengths),
        "train_frequency": {
            **_distribution(frequency[1:]),
            "groups": _groups(frequency[1:]),
        },
        "texts": {
            "empty": dataset.texts[1:].count(""),
            "duplicates": _duplicate_texts(dataset.texts[1:]),
        },
        "repeats": _repeats(dataset),
        "split": {
            "kind": split.kind,
            **split.info,
            "users_not_evaluated": _not_evaluated(dataset, split),
            "train_interactions": int(split.train.values.size),
            "train_pairs": int(pairs.sum()),
            "valid": _part(dataset, split.valid, frequency, max_len),
            "test": _part(dataset, split.test, frequency, max_len),
        },
        "padding": {
            "max_len": max_len,
            "slots": slots,
            "used": used,
            "share": 1 - used / slots if slots else None,
        },
        "input": dict(dataset.provenance),
        "sha256": dataset.sha256(),
    }


def format_audit(facts: Mapping[str, Any]) -> str:
    """The audit as a plain text table, one fact per line."""
    split = facts["split"]
    length, frequency = facts["length"], facts["train_frequency"]
    repeats, padding = facts["repeats"], facts["padding"]
    rows: list[tuple[str, str]] = [
        ("data set", facts["dataset"]),
        ("users / items", f"{facts['users']:,} / {facts['items']:,}"),
        ("interactions", f"{facts['interactions']:,} (density {facts['density']:.4%})"),
        ("sequence length", _spread(length)),
        ("", _bars(length)),
        ("training frequency", _spread(frequency)),
        ("items by frequency", _counts(frequency["groups"])),
        ("items without text", f"{facts['texts']['empty']:,}"),
        (
            "repeats",
            f"{repeats['interactions']:,} of {repeats['transitions']:,} transitions go to an item "
            f"seen before, {repeats['consecutive']:,} at once, {repeats['users']:,} users",
        ),
        ("exact duplicates", _or_unknown(repeats["exact_duplicates"])),
        ("split", f"{split['kind']}, {split['train_interactions']:,} training interactions"),
        ("users not evaluated", f"{split['users_not_evaluated']:,}"),
    ]
    for name in ("valid", "test"):
        part = split[name]
        rows += [
            (f"{name} targets", f"{part['users']:,} ({_counts(part['targets'])})"),
            (f"{name} cold targets", f"{part['cold_targets']:,}"),
            (
                f"{name} ceiling",
                f"{part['ceiling']:.2%} ({part['masked_targets']:,} targets are in their history)",
            ),
            (f"{name} ties in time", _or_unknown(part["timestamp_ties"])),
        ]
    share = "none" if padding["share"] is None else f"{padding['share']:.1%}"
    rows.append(("padding share", f"{share} of the slots at length {padding['max_len']}"))
    for file in facts["input"].get("files", ()):
        bad = ", ".join(f"{count:,} {reason}" for reason, count in file["bad_rows"].items())
        rows.append((file["name"], f"{file['rows_read']:,} rows, dropped: {bad or 'none'}"))
        rows.append(("", f"SHA-256 {file['sha256']}"))
    for step in facts["input"].get("filters", ()):
        dropped = ", ".join(
            f"{step['dropped_' + what]:,} {what}" for what in ("interactions", "users", "items")
        )
        rows.append((f"filter {step['filter']}", f"{step['value']}: dropped {dropped}"))
    rows.append(("processed table", f"SHA-256 {facts['sha256']}"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def _distribution(values: np.ndarray) -> dict[str, Any]:
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "max": int(values.max()),
        "histogram": _histogram(values),
    }


def _histogram(values: np.ndarray) -> list[dict[str, int]]:
    """Counts per value up to 30 different steps, else in ranges that double."""
    most = int(values.max())
    starts = list(range(most + 1)) if most <= 30 else [0, 1]
    while starts[-1] * 2 <= most and most > 30:
        starts.append(starts[-1] * 2)
    counts, _ = np.histogram(values, bins=[*starts, most + 1])
    ends = [start - 1 for start in starts[1:]] + [most]
    return [
        {"from": low, "to": high, "count": int(count)}
        for low, high, count in zip(starts, ends, counts, strict=True)
        if count
    ]


def _groups(frequency: np.ndarray) -> dict[str, int]:
    return {
        name: int(np.count_nonzero((frequency >= low) & (frequency <= high)))
        for name, low, high in _GROUPS
    }


def _duplicate_texts(texts: list[str]) -> int:
    present = [text for text in texts if text]
    return len(present) - len(set(present))


def _repeats(dataset: Dataset) -> dict[str, int | None]:
    sequences = dataset.sequences
    users, items = sequences.row_index(), sequences.values
    key = users * len(dataset.items) + items
    first = np.zeros(key.size, dtype=bool)
    first[np.unique(key, return_index=True)[1]] = True
    duplicates = None
    if dataset.timestamps is not None:
        rows = np.lexsort((dataset.timestamps, key))
        same = (np.diff(key[rows]) == 0) & (np.diff(dataset.timestamps[rows]) == 0)
        duplicates = int(np.count_nonzero(same))
    return {
        "transitions": int(np.maximum(sequences.lengths - 1, 0).sum()),
        "interactions": int(np.count_nonzero(~first)),
        "users": int(np.unique(users[~first]).size),
        "consecutive": int(np.count_nonzero(np.diff(key) == 0)),
        "exact_duplicates": duplicates,
    }


def _not_evaluated(dataset: Dataset, split: Split) -> int:
    return dataset.num_users - int(np.union1d(split.valid.users, split.test.users).size)


def _part(dataset: Dataset, part: EvalSplit, frequency: np.ndarray, max_len: int) -> dict[str, Any]:
    masked = _target_in_history(part.history, part.targets)
    targets = frequency[part.targets]
    return {
        "users": len(part),
        "targets": _groups(targets),
        "cold_targets": int(np.count_nonzero(targets == 0)),
        "masked_targets": int(masked.sum()),
        "ceiling": 1 - float(masked.mean()),
        "histories_cut": int(np.count_nonzero(part.history.lengths > max_len)),
        "timestamp_ties": _ties(dataset, part),
    }


def _target_in_history(history: Ragged, targets: np.ndarray) -> np.ndarray:
    rows = history.row_index()
    hits = rows[history.values == targets[rows]]
    return np.bincount(hits, minlength=len(history)) > 0


def _ties(dataset: Dataset, part: EvalSplit) -> int | None:
    """Users whose target shares its time with a neighbour, so that file order chose the target."""
    times = dataset.timestamps
    if times is None:
        return None
    starts = dataset.sequences.offsets[:-1][part.users]
    ends = dataset.sequences.offsets[1:][part.users]
    # A history is always the part of the user's row before the target.
    at = starts + part.history.lengths
    before = (at > starts) & (times[np.maximum(at - 1, 0)] == times[at])
    after = (at + 1 < ends) & (times[np.minimum(at + 1, times.size - 1)] == times[at])
    return int(np.count_nonzero(before | after))


def _spread(facts: Mapping[str, Any]) -> str:
    return (
        f"min {facts['min']:,}, median {facts['median']:g}, mean {facts['mean']:.2f}, "
        f"max {facts['max']:,}"
    )


def _bars(facts: Mapping[str, Any]) -> str:
    shown = []
    for step in facts["histogram"]:
        span = str(step["from"]) if step["from"] == step["to"] else f"{step['from']}-{step['to']}"
        shown.append(f"{span}:{step['count']}")
    return " ".join(shown)


def _counts(groups: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in groups.items())


def _or_unknown(count: int | None) -> str:
    return "unknown, no timestamps" if count is None else f"{count:,}"
