"""The command ``padkern compare``: the cells of a grid one after the other, then their table.

Whatever ends the process, finished cells stay and an unfinished one goes on at its last epoch; a
cell that fails is recorded with its error, and the others run on.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from padkern.errors import CheckpointError, PadkernError, UsageError
from padkern.pad.folder import RunFolder
from padkern.pad.grid import budget as budgets
from padkern.pad.grid.cells import (
    drop_work,
    has_result,
    read_result,
    run_cell,
    store_data,
    train_and_rank,
)
from padkern.pad.grid.shared import phase_name, phases_of
from padkern.pad.grid.spec import Cell, Grid, read_grid
from padkern.pad.progress import Reporter

__all__ = ["attempt", "compare", "one_line", "open_folder", "planned_cells", "read_all_data"]


def compare(
    path: str | Path,
    out: str | Path,
    *,
    budget: float | None = None,
    jobs: int = 1,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Runs what is missing of a grid and writes ``table.json``, ``table.md`` and ``report.html``.

    Args:
        path: the grid, a YAML file.
        out: folder of the comparison, new or of an earlier call. Cells that are finished there are
            not repeated, also when the grid has grown since.
        budget: minutes; a grid that is estimated to take longer is trimmed, see
            :mod:`padkern.pad.grid.budget`. The same grid and budget are trimmed once, so that a
            call that continues another runs the same cells.
        jobs: cells trained at the same time, each in a process of its own.
        device: torch device, or ``"auto"``.
        reporter: progress.

    Returns:
        The content of ``table.json``. It holds no times, so it is the same for every call with the
        same grid, data, device and number of threads.

    Raises:
        UsageError: a mistake in the grid or an argument.
        CheckpointError: another process writes to ``out``.
        EnvError: ``out`` cannot be written.
    """
    from padkern.pad.grid.report import show, write_tables
    from padkern.pad.workflow import pick_device

    reporter = reporter or Reporter()
    grid = read_grid(path)
    if budget is not None and not 0 < budget < float("inf"):
        raise UsageError(f"--budget must be a positive number of minutes, got {budget:g}")
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    device = pick_device(device)
    out = Path(out)
    with open_folder(out, grid) as folder:
        unread = read_all_data(grid, out, device, reporter)
        plan = _plan(grid, folder, budget, unread, device, reporter)
        cells = planned_cells(grid, plan)
        failures = _run(cells, out, folder, unread, jobs, device, reporter)
        results = [read_result(cell, out) for cell in cells if cell.name not in failures]
        reporter.message(f"comparing {len(results)} finished cells")
        table = write_tables(
            folder, grid, results, [failures[c.name] for c in cells if c.name in failures], plan
        )
        reporter.close()
        show(table, reporter)
        reporter.message(f"tables and report: {out}")
    return table


@contextmanager
def open_folder(out: Path, grid: Grid) -> Iterator[RunFolder]:
    """The folder of a comparison or search, locked, with a copy of the grid.

    Raises:
        UsageError: it holds something else.
    """
    found = set(os.listdir(out)) if out.is_dir() else set()
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file")
    if found - {".lock"} and not any(name.startswith("grid.yaml") for name in found):
        raise UsageError(f"--out {out}: the folder holds something else than a grid's results")
    with RunFolder(out) as folder:
        folder.write_text("grid.yaml", grid.text)
        yield folder


def read_all_data(grid: Grid, out: Path, device: str, reporter: Reporter) -> dict[str, Exception]:
    """Stores every data set of the grid; returns the errors of those that cannot be read."""
    failed: dict[str, Exception] = {}
    for name, entry in grid.datasets.items():
        try:
            store_data(
                out, entry, grid.source_of(name), grid.data_id(name),
                device=device, reporter=reporter,
            )  # fmt: skip
        except Exception as error:
            failed[name] = error
            reporter.message(f"{name}: {one_line(error)}")
    return failed


def planned_cells(grid: Grid, plan: dict[str, Any] | None) -> list[Cell]:
    """The cells that a plan leaves; all without one."""
    if plan is None:
        return list(grid.cells())
    return [
        replace(cell, config=budgets.with_share(cell.config, plan["epoch_share"]))
        for cell in grid.cells(plan["seeds"])
    ]


def _plan(
    grid: Grid,
    folder: RunFolder,
    budget: float | None,
    unread: dict[str, Exception],
    device: str,
    reporter: Reporter,
) -> dict[str, Any] | None:
    """What ``--budget`` leaves of the grid, from ``plan.json`` where it holds this grid's."""
    if budget is None:
        return None
    # The data that could be read are part of it: with more of them, less of each fits.
    key = {
        "budget_minutes": budget,
        "cells": [cell.name for cell in grid.cells() if cell.dataset not in unread],
    }
    plan: dict[str, Any]
    if folder.exists("plan.json"):
        plan = folder.read_json("plan.json")
        if {name: plan.get(name) for name in key} == key:
            return plan
    began = time.perf_counter()
    estimates: dict[str, budgets.Estimate] = {}
    for cell in grid.cells(1):
        if cell.dataset in unread:
            continue
        reporter.message(f"pilot: {cell}")
        pilot = budgets.Pilot()
        try:
            train_and_rank(cell, folder.path, device=device, reporter=pilot)
        except Exception as error:
            reporter.message(f"pilot failed: {one_line(error)}")
        common = {phase: phase_name(cell, phase, device) for phase in phases_of(cell)}
        estimates[f"{cell.dataset} / {cell.label}"] = pilot.estimate(common)
    spent = time.perf_counter() - began
    kept = budgets.trim(estimates.values(), len(grid.seeds), max(0.0, 60 * budget - spent))
    plan = {
        **key,
        "seeds": kept.seeds,
        "epoch_share": kept.share,
        "estimated_minutes": kept.seconds / 60,
        "pilot_minutes": spent / 60,
        "estimates": {name: estimate.record() for name, estimate in estimates.items()},
    }
    folder.write_json("plan.json", plan)
    reporter.message(
        f"budget {budget:g} min: {kept.seeds} of {len(grid.seeds)} seeds, "
        f"{100 * kept.share:.0f} % of the epochs, at most {kept.seconds / 60:.1f} min"
    )
    return plan


def _run(
    cells: list[Cell],
    out: Path,
    folder: RunFolder,
    unread: dict[str, Exception],
    jobs: int,
    device: str,
    reporter: Reporter,
) -> dict[str, dict[str, Any]]:
    """Runs the missing cells; returns the records of those that failed, by name."""
    failures: dict[str, dict[str, Any]] = {}

    def failed(cell: Cell, error: str, trace: str = "") -> None:
        record = {
            "dataset": cell.dataset, "method": cell.label, "seed": cell.seed, "error": error,
        }  # fmt: skip
        failures[cell.name] = record
        folder.write_json(f"failures/{cell.name}.json", record | {"traceback": trace})
        reporter.message(f"failed: {cell}: {error}")

    def done(cell: Cell) -> None:
        folder.file(f"failures/{cell.name}.json").unlink(missing_ok=True)

    pending = []
    for cell in cells:
        if cell.dataset in unread:
            failed(cell, one_line(unread[cell.dataset]))
        elif has_result(cell, out):
            drop_work(cell, out)
            done(cell)
        else:
            pending.append(cell)
    reporter.message(f"{len(cells)} cells, {len(pending)} to run")
    if jobs > 1:
        from padkern.pad.grid.workers import run_in_processes

        ended: Iterable[tuple[Cell, tuple[str, str] | None]]
        ended = run_in_processes(pending, out, jobs, device)
    else:
        ended = _one_after_the_other(pending, out, device, reporter)
    for number, (cell, error) in enumerate(ended, start=1):
        if error is None:
            done(cell)
            reporter.message(f"done {number}/{len(pending)}: {cell}")
        else:
            failed(cell, *error)
    return failures


def _one_after_the_other(
    cells: list[Cell], out: Path, device: str, reporter: Reporter
) -> Iterator[tuple[Cell, tuple[str, str] | None]]:
    for cell in cells:
        reporter.message(str(cell))
        yield cell, attempt(cell, out, device, reporter)


def attempt(cell: Cell, out: Path, device: str, reporter: Reporter) -> tuple[str, str] | None:
    """Runs one cell; returns one line and the traceback of what went wrong, or None."""
    try:
        run_cell(cell, out, device=device, reporter=reporter)
    except Exception as error:
        if isinstance(error, CheckpointError):  # else every later attempt would meet it again
            drop_work(cell, out)
        return one_line(error), traceback.format_exc()
    return None


def one_line(error: BaseException) -> str:
    """An error in one line, its type named where it is none of padkern's own."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PadkernError) else f"{type(error).__name__}: {text}"
