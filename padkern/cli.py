"""The command line. Everything heavy is imported inside the commands, so ``--help`` stays fast.

Exit codes: 0 done, 1 another failure, 2 usage, 3 data, 4 checkpoint or run folder, 5 environment,
130 interrupted, 143 terminated.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from padkern import cli_grid
from padkern.cli_options import (
    BadRows,
    Columns,
    Data,
    Device,
    Filter,
    NoMaskRepeats,
    OptionalData,
    Overrides,
    Preset,
    Quiet,
    Resume,
    Run,
    Seed,
    ShuffleText,
    Text,
)
from padkern.cli_reporting import reporting as _reporter
from padkern.errors import EnvError, PadkernError, UsageError

app = typer.Typer(
    name="padkern",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="PAD for sequential recommendation: train in three phases, evaluate honestly, recommend.",
    epilog="Exit codes: 0 done, 1 failure, 2 usage, 3 data, 4 checkpoint, 5 environment.",
)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere.")
    ] = False,
) -> None:
    """Both are handled before parsing; they are declared here for ``--help``."""


@app.command()
def run(
    out: Annotated[Path, typer.Option(metavar="RUN", help="Run folder to make.")],
    data: OptionalData = None,
    text: Text = None,
    preset: Preset = None,
    device: Device = "auto",
    seed: Seed = None,
    resume: Resume = False,
    set_: Overrides = None,
    on_bad_rows: BadRows = "error",
    columns: Columns = None,
    filter_: Filter = None,
    no_mask_repeats: NoMaskRepeats = False,
    shuffle_text: ShuffleText = False,
    quiet: Quiet = False,
) -> None:
    """Train PAD, compare it with six rivals, write a report."""
    from padkern.pad import workflow

    request = workflow.Request(
        data=data,
        text=text,
        preset=preset,
        seed=seed,
        overrides=list(set_ or ()) + (["evaluation.mask_repeats=false"] if no_mask_repeats else []),
        device=device,
        on_bad_rows=on_bad_rows,
        columns=list(columns or ()),
        filters=list(filter_ or ()),
        shuffle_text=shuffle_text,
    )
    with _reporter(quiet) as reporter:
        workflow.train(request, out, resume=resume, reporter=reporter)


@app.command()
def coldtest(
    out: Annotated[Path, typer.Option(metavar="RUN", help="Run folder to make.")],
    data: OptionalData = None,
    share: Annotated[
        float, typer.Option(metavar="S", help="Share of the items held out, drawn by the seed.")
    ] = 0.1,
    text: Text = None,
    preset: Preset = None,
    device: Device = "auto",
    seed: Seed = None,
    resume: Resume = False,
    set_: Overrides = None,
    on_bad_rows: BadRows = "error",
    columns: Columns = None,
    filter_: Filter = None,
    no_mask_repeats: NoMaskRepeats = False,
    shuffle_text: ShuffleText = False,
    quiet: Quiet = False,
) -> None:
    """Train without a share of the items, add them by text alone, rank among all."""
    from padkern.pad.coldtest import run_cold_test
    from padkern.pad.workflow import Request

    request = Request(
        data=data,
        text=text,
        preset=preset,
        seed=seed,
        overrides=list(set_ or ()) + (["evaluation.mask_repeats=false"] if no_mask_repeats else []),
        device=device,
        on_bad_rows=on_bad_rows,
        columns=list(columns or ()),
        filters=list(filter_ or ()),
        shuffle_text=shuffle_text,
        cold_share=share,
    )
    with _reporter(quiet) as reporter:
        run_cold_test(request, out, resume=resume, reporter=reporter)


@app.command()
def embed(
    data: Data,
    text: Annotated[
        str, typer.Option(metavar="MODEL", help="wordllama, minilm, a folder or a hub name.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help=".npy, .safetensors or .parquet.")],
    pooling: Annotated[
        str, typer.Option(metavar="mean|weighted|last|cls", help="Token pooling.")
    ] = "mean",
    attention: Annotated[
        str,
        typer.Option(
            metavar="model|bidirectional", help="As trained, or a decoder that sees whole texts."
        ),
    ] = "model",
    max_tokens: Annotated[int | None, typer.Option(help="Longer texts are cut.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens per batch.")] = 4096,
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16|float16", help="Of the encoder.")
    ] = "float32",
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    normalize: Annotated[bool, typer.Option(help="Unit length for each vector.")] = True,
    center: Annotated[bool, typer.Option("--center", help="Subtract the mean vector.")] = False,
    all_but_top: Annotated[int, typer.Option(help="Leading components removed.")] = 0,
    pca: Annotated[int | None, typer.Option(help="Principal components kept.")] = None,
    null_space: Annotated[
        int, typer.Option(help="Smallest components kept, in place of --pca.")
    ] = 0,
    whiten: Annotated[
        float, typer.Option(help="0 none to 1 full whitening; above 0 it also centres.")
    ] = 0.0,
    device: Device = "auto",
    on_bad_rows: BadRows = "error",
    columns: Columns = None,
    cache: Annotated[bool, typer.Option(help="Reuse and keep finished vectors.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    quiet: Quiet = False,
) -> None:
    """Turn item texts into a matrix file."""
    from padkern.pad import workflow

    with _reporter(quiet) as reporter:
        workflow.embed(
            data,
            text,
            out,
            options={
                "pooling": pooling,
                "attention": attention,
                "max_tokens": max_tokens,
                "batch_tokens": batch_tokens,
                "dtype": dtype,
                "revision": revision,
                "normalize": normalize,
            },
            transform={
                "center": center,
                "all_but_top": all_but_top,
                "pca": pca,
                "null_space": null_space,
                "whiten": whiten,
            },
            device=device,
            on_bad_rows=on_bad_rows,
            columns=list(columns or ()),
            cache=cache,
            force=force,
            reporter=reporter,
        )


@app.command()
def convert(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="Files and folders of one data set.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to make, for --data.")],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="F",
            help="amazon2018, amazon2023, mind, movielens, recbole or sasrec. Default: by the "
            "first lines.",
        ),
    ] = None,
    authors: Annotated[
        bool,
        typer.Option("--authors", help="The filters of the paper's authors (Amazon, MIND)."),
    ] = False,
    filter_: Filter = None,
    text_fields: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Fields of an item that make its text. Default: title; MovieLens: title,genres; "
            "RecBole: every token_seq.",
        ),
    ] = None,
    unknown_items: Annotated[
        str | None,
        typer.Option(
            metavar="drop|keep|error",
            help="Interactions with items that the items file lacks. Default: drop for Amazon, "
            "else error.",
        ),
    ] = None,
    history: Annotated[
        bool,
        typer.Option(help="MIND: histories before the clicks; without them, clicks have times."),
    ] = True,
    user_first: Annotated[
        bool | None,
        typer.Option(
            "--user-first/--item-first", help="Amazon ratings without a header: the first column."
        ),
    ] = None,
    keep_unused_items: Annotated[
        bool, typer.Option("--keep-unused-items", help="Keep items that nobody took.")
    ] = False,
    on_bad_rows: BadRows = "error",
    quiet: Quiet = False,
) -> None:
    """Turn a published data set into the folder that --data takes."""
    from padkern.pad.conversion import convert as convert_sources

    with _reporter(quiet) as reporter:
        convert_sources(
            sources,
            out,
            filters=list(filter_ or ()),
            on_bad_rows=on_bad_rows,
            options={
                "format": format_,
                "authors": authors,
                "text_fields": None if text_fields is None else text_fields.split(","),
                "unknown_items": unknown_items,
                "history": history,
                "user_first": user_first,
                "keep_unused_items": keep_unused_items,
            },
            reporter=reporter,
        )


@app.command()
def evaluate(
    run: Run,
    split: Annotated[str, typer.Option(metavar="test|valid", help="Held-out part.")] = "test",
    row: Annotated[str, typer.Option(help="Row of the comparison table.")] = "pad",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every metric of a stored model."""
    from padkern.pad.show import show_evaluation

    show_evaluation(run, split, row, as_json)


@app.command()
def recommend(
    run: Run,
    user: Annotated[str | None, typer.Option(metavar="ID", help="A user of the run.")] = None,
    history: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="Item ids, oldest first, in place of a user."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of items.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Recommend items, with the share of each expert."""
    from padkern.pad.show import show_recommendations

    if (user is None) == (history is None):
        raise UsageError("give either --user ID or --history A,B,C")
    show_recommendations(run, user, history, k, as_json)


@app.command()
def report(run: Run) -> None:
    """Write the HTML report of a run again."""
    from padkern.pad.folder import RunFolder
    from padkern.pad.report import write_report

    typer.echo(str(write_report(RunFolder(run, create=False))))


@app.command()
def config(
    preset: Annotated[str, typer.Option(metavar="clean|parity", help="Preset.")] = "clean",
    set_: Overrides = None,
) -> None:
    """Show a configuration as YAML."""
    from padkern.pad import workflow

    typer.echo(workflow.resolve_config(preset, None, list(set_ or ())).to_yaml(), nl=False)


@app.command()
def env() -> None:
    """Print facts to paste into a bug report."""
    from padkern.environment import facts, format_facts

    typer.echo(format_facts(facts()))


app.command()(cli_grid.compare)
app.command()(cli_grid.tune)


def _spread(argv: list[str]) -> list[str]:
    """Lets one ``--set`` take several ``a.b=c``."""
    spread: list[str] = []
    setting = False
    for word in argv:
        if setting and "=" in word and not word.startswith("-") and spread[-1] != "--set":
            spread.append("--set")
        if word == "--set":
            setting = True
        elif word.startswith("-") or "=" not in word:
            setting = False
        spread.append(word)
    return spread


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code; errors are one line on standard error."""
    words = _spread(list(sys.argv[1:] if argv is None else argv))
    if words[:1] == ["--version"]:
        from padkern import __version__

        print(f"padkern {__version__}")
        return 0
    debug = "--debug" in words
    _log_to_stderr()
    try:
        app(args=[word for word in words if word != "--debug"], prog_name="padkern")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except BrokenPipeError:  # the reader of our output went away, as with | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        if isinstance(error, PadkernError):
            return _fail(str(error), error.exit_code)
        if isinstance(error, ImportError):
            return _fail(f"a package is missing or broken: {error}", EnvError.exit_code)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return _fail(f"out of memory: {error}", EnvError.exit_code)
        return _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)
    return 0


def _log_to_stderr() -> None:
    """Shows the library's own warnings, and not what other packages have to say."""
    log = logging.getLogger("padkern")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("padkern: %(message)s"))
        log.addHandler(handler)
        log.propagate = False


def _fail(message: str, code: int) -> int:
    print(f"padkern: error: {' '.join(message.split())}", file=sys.stderr)
    return code
