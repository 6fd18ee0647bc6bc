"""Write a data set as the folder that the readers take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from padkern.data.badrows import write_atomic
from padkern.data.dataset import Dataset

__all__ = ["write_dataset"]

_BLANK = re.compile(r"[\x00-\x20\x7f]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def write_dataset(dataset: Dataset, folder: str | Path) -> Path:
    """Write ``items.tsv`` and ``sequences.tsv``, or ``interactions.tsv`` with timestamps.

    Reading the folder again gives the same users, sequences and timestamps; items keep their ids
    if all of them occur in a sequence.

    Args:
        dataset: the data set; users without interactions are left out.
        folder: created if need be.

    Returns:
        The folder.

    Raises:
        ValueError: if an id or a text cannot be written: empty id, control characters, blanks at
            the ends, or blanks in an item id of a data set without timestamps.
    """
    folder = Path(folder)
    inside = _BLANK if dataset.timestamps is None else _CONTROL
    for what, names, pattern in (
        ("user", dataset.users, _CONTROL),
        ("item", dataset.items[1:], inside),
    ):
        for name in names:
            if not name or name != name.strip() or pattern.search(name):
                raise ValueError(f"{what} id {name!r} cannot be written to a TSV file")
    for text in dataset.texts:
        if text != text.strip() or _CONTROL.search(text):
            raise ValueError(f"text {text!r} cannot be written to a TSV file")
    folder.mkdir(parents=True, exist_ok=True)
    pairs = zip(dataset.items[1:], dataset.texts[1:], strict=True)
    write_atomic(
        folder / "items.tsv",
        chain(["item\ttext\n"], (f"{item}\t{text}\n" for item, text in pairs)),
    )
    if dataset.timestamps is None:
        write_atomic(folder / "sequences.tsv", _sequence_lines(dataset))
    else:
        write_atomic(folder / "interactions.tsv", _interaction_lines(dataset))
    return folder


def _sequence_lines(dataset: Dataset) -> Iterator[str]:
    items = dataset.items
    yield "user\titems\n"
    for number, user in enumerate(dataset.users):
        row = dataset.sequences.row(number).tolist()
        if row:
            yield f"{user}\t{' '.join([items[item] for item in row])}\n"


def _interaction_lines(dataset: Dataset) -> Iterator[str]:
    items, offsets, timestamps = (
        dataset.items,
        dataset.sequences.offsets.tolist(),
        dataset.timestamps,
    )
    assert timestamps is not None
    yield "user\titem\ttimestamp\n"
    for number, user in enumerate(dataset.users):
        row = dataset.sequences.row(number).tolist()
        times = timestamps[offsets[number] : offsets[number + 1]].tolist()
        for item, time in zip(row, times, strict=True):
            # repr of a float is the shortest text that reads back as the same number.
            yield f"{user}\t{items[item]}\t{time!r}\n"
