"""Amazon Prime Pantry as prepared by the authors of PAD (arXiv 2412.04107).

Their repository publishes the cleaned histories, the titles and the training frequencies; this
module turns them into the ``sequences.tsv`` and ``items.tsv`` that the readers take.
"""

from __future__ import annotations

import ast
import html
from pathlib import Path

from padkern.data.badrows import write_atomic
from padkern.data.tables import read_table
from padkern.errors import DataError

__all__ = ["COMMIT", "FILES", "SOURCE_URL", "convert_folder"]

COMMIT = "506c72d8650c205e96b006aa21e8c476d69f44de"
SOURCE_URL = f"https://raw.githubusercontent.com/Applied-Machine-Learning-Lab/PAD/{COMMIT}/dataset"

HISTORY = "Prime_Pantry_cleaned_history.csv"
METADATA = "metadata_Prime_Pantry.csv"
FREQUENCY = "Prime_Pantry_fre.csv"

# SHA-256 of the files at that commit.
FILES = {
    HISTORY: "9087dcb1c800b1270840fa7f5a037177fcb485e48c12aa04296203476fd69485",
    METADATA: "539a936c75d982305eb82b28f8f8e4a85cf88c002b492045d26e4f86502c85d0",
    FREQUENCY: "32a624102f826e37ced14924650415390bc88b3af543541740f0612e709ac678",
}


def convert_folder(raw: Path, target: Path) -> None:
    """Write ``sequences.tsv`` and ``items.tsv`` from the authors' files.

    Users keep the order of the history file, items that of the metadata file, so that internal item
    ids are the authors' own (row number + 1). HTML entities in titles (``&amp;``) are resolved.

    Args:
        raw: folder with the history and metadata files.
        target: folder to write to; exists.

    Raises:
        DataError: if a file does not have the expected form.
    """
    items = read_table(raw / METADATA, ("asin", "title"))
    history = read_table(raw / HISTORY, ("user", "history"))
    for table in (items, history):
        if table.faults:
            line, _ = table.locate([table.faults[0].number])[table.faults[0].number]
            raise DataError(f"{table.path} line {line}: {table.faults[0].rule}")

    def sequence_rows() -> list[str]:
        rows = ["user\titems\n"]
        users, lists = (history.columns[name].to_pylist() for name in ("user", "history"))
        for number, user, text in zip(history.numbers, users, lists, strict=True):
            parsed = _parse(text)
            if parsed is None:
                line, _ = history.locate([int(number)])[int(number)]
                raise DataError(
                    f"{history.path} line {line}, column 'history': must be a list of item ids "
                    f"(got {text[:60]!r})"
                )
            rows.append(f"{user}\t{' '.join(parsed)}\n")
        return rows

    write_atomic(target / "sequences.tsv", sequence_rows())
    pairs = zip(items.columns["asin"].to_pylist(), items.columns["title"].to_pylist(), strict=True)
    write_atomic(
        target / "items.tsv",
        ["item\ttext\n", *(f"{item}\t{_title(text)}\n" for item, text in pairs)],
    )


def _title(text: str) -> str:
    return " ".join(html.unescape(text).split())


def _parse(text: str) -> list[str] | None:
    """The list of strings that the text spells out, or None; nothing is executed."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(value, list) or not value:
        return None
    good = all(isinstance(item, str) and item and not set(item) & set(" \t\r\n") for item in value)
    return value if good else None
