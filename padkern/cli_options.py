"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DATA_OPTION = typer.Option(
    "--data",
    metavar="DIR|NAME",
    help="Folder or file of a data set, or a name: completejourney, prime_pantry, or a folder "
    "under PADKERN_DATA.",
)
Data = Annotated[str, DATA_OPTION]
OptionalData = Annotated[str | None, DATA_OPTION]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
Device = Annotated[
    str, typer.Option(metavar="D", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=COLUMN",
        help="Column of the input tables: user, item, timestamp (or none), rating, items, "
        "catalog_item, text.",
    ),
]
Filter = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="NAME=VALUE",
        help="min_rating, first_only, drop_consecutive_repeats, k_core, user_core, item_core, "
        "min_user_length, keep_last, cut_above, max_users.",
    ),
]
BadRows = Annotated[
    str,
    typer.Option(
        metavar="error|skip|quarantine",
        help="Stop at the first bad input row, drop bad rows, or drop them into a file.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override configuration values."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Text = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL|MATRIX",
        help="Text encoder (wordllama, minilm, a folder or a hub name) or a matrix file (.npy, "
        ".safetensors, .parquet). Default: wordllama for completejourney, else minilm.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="clean|parity",
        help="clean: the method at its best (default); parity: what the authors' code does.",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Root of all random draws.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run, with the same result.")
]
NoMaskRepeats = Annotated[
    bool, typer.Option("--no-mask-repeats", help="Keep a user's own history as candidates.")
]
ShuffleText = Annotated[
    bool,
    typer.Option("--shuffle-text", help="Control: permute the text vectors among the items."),
]
