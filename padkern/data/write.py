"""Write a data set as the folder that the readers take."""

from __future__ import annotations

import re
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
    write_atomic(
        folder / "items.tsv",
        [
            "item\ttext\n",
            *(
                f"{item}\t{text}\n"
                for item, text in zip(dataset.items[1:], dataset.texts[1:], strict=True)
            ),
        ],
    )
    rows = (dataset.sequences.row(user).tolist() for user in range(dataset.num_users))
    items = dataset.items
    if dataset.timestamps is None:
        lines = ["user\titems\n"]
        for user, row in zip(dataset.users, rows, strict=True):
            if row:
                lines.append(f"{user}\t{' '.join([items[item] for item in row])}\n")
        write_atomic(folder / "sequences.tsv", lines)
    else:
        owners = dataset.sequences.row_index().tolist()
        lines = ["user\titem\ttimestamp\n"]
        for owner, item, time in zip(
            owners, dataset.sequences.values.tolist(), dataset.timestamps.tolist(), strict=True
        ):
            # repr of a float is the shortest text that reads back as the same number.
            lines.append(f"{dataset.users[owner]}\t{items[item]}\t{time!r}\n")
        write_atomic(folder / "interactions.tsv", lines)
    return folder
