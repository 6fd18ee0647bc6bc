"""What happens to rows that break a rule: stop, skip, or set aside in a quarantine file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from padkern.errors import DataError

__all__ = ["BadRowPolicy", "Fault", "OnBadRows", "write_atomic"]

OnBadRows = Literal["error", "skip", "quarantine"]


@dataclass(frozen=True)
class Fault:
    """One broken rule.

    Attributes:
        number: record number in its table: counted from 1 at the header (text) or at the first row
            (Parquet).
        column: column name, or None where the whole row is at fault.
        value: the offending value as text, or None.
        reason: short key used for counting, such as ``"bad_timestamp"``.
        rule: the rule in words.
    """

    number: int
    column: str | None
    value: str | None
    reason: str
    rule: str


class Located(Protocol):
    """The part of a table that a policy needs."""

    path: Path
    unit: str
    faults: list[Fault]

    def locate(self, numbers: Sequence[int]) -> dict[int, tuple[int, str]]:
        """Physical line (or row) and raw text of each record number."""


@dataclass
class BadRowPolicy:
    """Applies one rule to the faults of every table of a data set.

    Attributes:
        mode: ``"error"`` stops at the first bad row, ``"skip"`` drops and counts them,
            ``"quarantine"`` also writes them to a file.
        quarantine: path of the quarantine file (JSON lines), needed by that mode.
        max_bad_rows: more bad rows than this stop the reading in any mode.

    Raises:
        ValueError: on an unknown mode, or quarantine without a path.
    """

    mode: OnBadRows = "error"
    quarantine: Path | None = None
    max_bad_rows: int | None = None
    _entries: list[dict[str, object]] = field(default_factory=list)
    _total: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("error", "skip", "quarantine"):
            raise ValueError(
                f'on_bad_rows must be "error", "skip" or "quarantine", got {self.mode!r}'
            )
        if self.mode == "quarantine" and self.quarantine is None:
            raise ValueError('on_bad_rows="quarantine" needs the path of the quarantine file')

    def settle(self, table: Located) -> dict[str, int]:
        """Treat the faults of one table; returns the number of faults per reason.

        Raises:
            DataError: in mode ``"error"`` if there is any, else above ``max_bad_rows``.
        """
        faults = sorted(table.faults, key=lambda fault: fault.number)
        if not faults:
            return {}
        if self.mode == "error":
            raise DataError(_message(table, faults))
        self._total += len(faults)
        if self.mode == "quarantine":
            places = table.locate(sorted({fault.number for fault in faults}))
            for fault in faults:
                number, raw = places[fault.number]
                self._entries.append(
                    {
                        "file": table.path.name,
                        table.unit: number,
                        "column": fault.column,
                        "value": fault.value,
                        "reason": fault.reason,
                        "rule": fault.rule,
                        "raw": raw,
                    }
                )
        if self.max_bad_rows is not None and self._total > self.max_bad_rows:
            self.finish()
            raise DataError(
                f"{table.path}: {self._total} bad rows are more than the {self.max_bad_rows} "
                f"allowed; the first here: {_message(table, faults[:1])}"
            )
        return dict(sorted(Counter(fault.reason for fault in faults).items()))

    def finish(self) -> None:
        """Write the quarantine file (also when it is empty, so that no old one remains)."""
        if self.mode == "quarantine" and self.quarantine is not None:
            write_atomic(
                self.quarantine,
                (json.dumps(entry, ensure_ascii=False) + "\n" for entry in self._entries),
            )


def write_atomic(path: Path, lines: Iterable[str]) -> None:
    """Write UTF-8 text beside the target and rename it, so that no half file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8", newline="") as stream:
            stream.writelines(lines)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _message(table: Located, faults: Sequence[Fault]) -> str:
    first = faults[0]
    number, _ = table.locate([first.number])[first.number]
    column = f", column {first.column!r}" if first.column is not None else ""
    text = f"{table.path} {table.unit} {number}{column}: {first.rule}"
    if first.value is not None:
        value = first.value if len(first.value) <= 60 else first.value[:57] + "..."
        text += f" (got {value!r})"
    if len(faults) > 1:
        scope = getattr(table, "scope", "this file")
        text += f"; {len(faults) - 1} more bad row{'s' if len(faults) > 2 else ''} in {scope}"
    return text
