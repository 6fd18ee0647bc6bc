"""The commands over a grid of data sets, methods and seeds: ``compare`` and ``tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from padkern.cli_options import Device, Quiet
from padkern.cli_reporting import reporting

__all__ = ["compare", "tune"]

Grid = Annotated[
    Path, typer.Argument(metavar="GRID", help="YAML file: datasets, methods, seeds, values.")
]


def compare(
    grid: Grid,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the comparison; a call continues it.")
    ],
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            help="Trim the grid, alike for all: fewer seeds first, then fewer epochs.",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Cells at a time, each in its own process.")] = 1,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Run data sets x methods x seeds, write one table with tests."""
    from padkern.pad.grid.runner import compare as run_grid

    with reporting(quiet) as reporter:
        table = run_grid(grid, out, budget=budget, jobs=jobs, device=device, reporter=reporter)
    if table["failed"]:  # the table says which; a script should notice
        raise typer.Exit(1)


def tune(
    grid: Grid,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of the search; a call continues it.")
    ],
    trials: Annotated[int, typer.Option(help="Configurations tried for every method.")],
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Search configurations on validation, the same number for every method."""
    from padkern.pad.grid.tune import tune as search

    with reporting(quiet) as reporter:
        search(grid, out, trials=trials, device=device, reporter=reporter)
