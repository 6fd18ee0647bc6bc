"""The command ``padkern convert``: published files in, the folder that ``--data`` takes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from padkern.errors import UsageError
from padkern.pad.progress import Reporter
from padkern.pad.workflow import settings

__all__ = ["convert"]


def convert(
    sources: Sequence[Path],
    out: Path,
    *,
    filters: list[str],
    on_bad_rows: str,
    options: dict[str, Any],
    reporter: Reporter,
) -> None:
    """Reads, filters and writes a data set; arguments as on the command line.

    Args:
        sources: files and folders.
        out: folder to make; must be new or empty.
        filters: ``name=value`` of :class:`padkern.data.Filters`.
        on_bad_rows: ``"error"``, ``"skip"`` or ``"quarantine"`` (beside ``out``).
        options: of :func:`padkern.data.read_raw`.
        reporter: where the summary goes.

    Raises:
        UsageError: an option is not accepted, or ``out`` holds something.
        DataError, EnvError: see the exit codes of the command line.
    """
    from padkern.data import Filters, convert_raw, read_raw

    if on_bad_rows not in ("error", "skip", "quarantine"):
        raise UsageError(f"--on-bad-rows must be error, skip or quarantine, got {on_bad_rows!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: exists already; take another name or remove it")
    kept = settings(Filters, "--filter", filters)
    aside = out.with_name(f"{out.name}.quarantine.jsonl")
    try:
        dataset = read_raw(
            *sources,
            filters=kept,
            on_bad_rows=on_bad_rows,  # type: ignore[arg-type]
            quarantine=aside if on_bad_rows == "quarantine" else None,
            **options,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    convert_raw(dataset, out)
    facts = dataset.provenance
    for file in facts["files"]:
        bad = sum(file["bad_rows"].values())
        note = f", {bad:,} bad" if bad else ""
        reporter.message(f"{file['name']}: {file['rows_read']:,} rows{note}")
    for step in facts["filters"]:
        reporter.message(
            f"{step['filter']}={step['value']} dropped {step['dropped_interactions']:,} "
            f"interactions, {step['dropped_users']:,} users, {step['dropped_items']:,} items"
        )
    reporter.message(
        f"{out} ({facts['format']}): {dataset.num_users:,} users, {dataset.num_items:,} items, "
        f"{dataset.sequences.values.size:,} interactions"
    )
