"""From command-line options to a run: inputs read and checked, texts embedded, rows trained."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from padkern.errors import EnvError, UsageError
from padkern.pad.folder import RunFolder
from padkern.pad.progress import PlainReporter, Reporter, RichReporter

if TYPE_CHECKING:
    import numpy as np

    from padkern.data.dataset import Dataset
    from padkern.pad.config import RunConfig

__all__ = [
    "Request",
    "embed",
    "resolve_config",
    "settings",
    "train",
]

_QUARANTINE = "quarantine.jsonl"
_LINE_EVERY_S = 5.0


@dataclass(frozen=True)
class Request:
    """What to train, as asked for on the command line.

    Attributes:
        data: folder, file or name of the data set; may be None to resume.
        text: encoder or matrix file; None for the data set's default.
        preset: ``"clean"`` or ``"parity"``; None for clean.
        seed: root of all random draws; None for the preset's.
        overrides: ``a.b=c`` configuration values.
        device: torch device, or ``"auto"``.
        on_bad_rows: ``"error"``, ``"skip"`` or ``"quarantine"``.
        columns: ``name=column`` of the input tables.
        filters: ``name=value`` of :class:`padkern.data.Filters`.
        shuffle_text: permute the text vectors among the items (a control).
        cold_share: share of the items held out for a cold test; None: an ordinary run.
    """

    data: str | None
    text: str | None = None
    preset: str | None = None
    seed: int | None = None
    overrides: list[str] = field(default_factory=list)
    device: str = "auto"
    on_bad_rows: str = "error"
    columns: list[str] = field(default_factory=list)
    filters: list[str] = field(default_factory=list)
    shuffle_text: bool = False
    cold_share: float | None = None

    @property
    def source(self) -> str:
        """The encoder or matrix file, the default filled in."""
        return self.text or ("wordllama" if self.data == "completejourney" else "minilm")


def train(request: Request, out: Path, *, resume: bool, reporter: Reporter) -> dict[str, Any]:
    """Reads, audits and embeds a data set, trains every row and writes tables and report.

    Args:
        request: what to train.
        out: the run folder; it must not hold anything unless ``resume``.
        resume: continue the run of that folder.
        reporter: where progress and tables go.

    Returns:
        The content of ``metrics.json``.

    Raises:
        UsageError: the folder is in use, or an option or configuration value is not accepted.
        DataError, CheckpointError, EnvError: see the exit codes of the command line.
    """
    from padkern.pad.coldtest import hold_out, store_cold
    from padkern.pad.report import write_report
    from padkern.pad.run import run_experiment, shuffled_text
    from padkern.pad.show import show_tables
    from padkern.pad.stored import load_inputs, store_inputs

    config = _run_config(request, out, resume)
    device = pick_device(request.device)
    cold = None
    stored = RunFolder(out, create=False) if resume and out.is_dir() else None
    if stored is not None and stored.has("dataset"):
        _same_request(stored, request)
        dataset, matrix = load_inputs(stored)
        facts = stored.read_json("audit.json")
        reporter.message(f"resuming {out}: {dataset.name}, {dataset.num_users:,} users")
    else:
        if request.data is None:
            raise UsageError("--data is needed")
        dataset = read_data(
            request.data,
            on_bad_rows=request.on_bad_rows,
            columns=request.columns,
            filters=request.filters,
            quarantine=out / _QUARANTINE,
        )
        facts = _audited(dataset, config, reporter)
        matrix = text_matrix(request.source, dataset, device=device, reporter=reporter)
        if request.shuffle_text:
            matrix = shuffled_text(matrix, config.seed)
            reporter.message("control: the text vectors are permuted among the items")
        if request.cold_share is not None:
            dataset, matrix, cold = hold_out(dataset, matrix, config, request.cold_share)
            reporter.message(f"cold test: {len(cold.items):,} items are held out; without them:")
            facts = _audited(dataset, config, reporter)
    with RunFolder(out) as folder:
        if not resume and folder.exists("config.yaml"):
            raise UsageError(f"--out {out}: another process started a run there")
        if not folder.has("dataset"):
            folder.write_yaml("config.yaml", config.to_yaml())
            folder.write_json("run.json", _record(request, device, matrix.shape[1]))
            folder.write_json("audit.json", facts)
            if cold is not None:
                store_cold(folder, cold)
            store_inputs(folder, dataset, matrix)
        metrics = run_experiment(
            dataset,
            matrix,
            config,
            folder,
            audit=facts,
            reporter=reporter,
            device=device,
            resume=resume,
        )
        reporter.close()
        show_tables(folder, reporter)
        reporter.message(f"report: {write_report(folder)}")
    return metrics


def embed(
    data: str,
    model: str,
    out: Path,
    *,
    options: dict[str, Any],
    transform: dict[str, Any],
    device: str,
    on_bad_rows: str,
    columns: list[str],
    cache: bool,
    force: bool,
    reporter: Reporter,
) -> None:
    """Writes the text matrix of a data set's items; arguments as on the command line."""
    from padkern.text import TextTransform, is_matrix_file, save_matrix

    if not is_matrix_file(out):
        raise UsageError(f"--out must end in .npy, .safetensors or .parquet, got {out.name}")
    if out.exists() and not force:
        raise UsageError(f"{out}: exists already; take another name or --force")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder")
    try:
        fitted = ("whiten", "pca", "all_but_top", "null_space")
        wanted = TextTransform(
            **{**transform, "center": transform["center"] or any(transform[key] for key in fitted)}
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    dataset = read_data(
        data,
        on_bad_rows=on_bad_rows,
        columns=columns,
        quarantine=out.with_name(f"{out.stem}.{_QUARANTINE}"),
    )
    began = time.perf_counter()
    try:
        matrix = text_matrix(
            model, dataset, device=pick_device(device), reporter=reporter, cache=cache, **options
        )
        if wanted.center:
            matrix = wanted.fit_apply(matrix)
    except ValueError as error:
        raise UsageError(str(error)) from None
    save_matrix(out, matrix, dataset.items)
    seconds = time.perf_counter() - began
    rows, width = matrix.shape
    reporter.message(f"{out}: {rows - 1:,} items x {width} in {seconds:.1f} s")


def resolve_config(preset: str | None, seed: int | None, overrides: list[str]) -> RunConfig:
    """A preset with overrides.

    Raises:
        UsageError: an unknown preset or key, or a value out of its range.
    """
    from padkern.pad.config import RunConfig

    if preset not in (None, "clean", "parity"):
        raise UsageError(f"--preset must be clean or parity, got {preset!r}")
    chosen = RunConfig.preset(preset or "clean")
    return chosen.with_overrides(overrides + ([] if seed is None else [f"seed={seed}"]))


def read_data(
    name: str,
    *,
    on_bad_rows: str = "error",
    columns: list[str] | None = None,
    filters: list[str] | None = None,
    quarantine: Path | None = None,
) -> Dataset:
    """Reads a data set by folder, file or name, with options as on the command line."""
    from padkern.data.filters import Filters
    from padkern.data.io import Columns, read_dataset

    if on_bad_rows not in ("error", "skip", "quarantine"):
        raise UsageError(f"--on-bad-rows must be error, skip or quarantine, got {on_bad_rows!r}")
    chosen = settings(Columns, "--columns", columns or [])
    kept = settings(Filters, "--filter", filters or [])
    if name == "completejourney" and not Path(name).exists():
        from padkern.data.demo import completejourney

        if columns or filters:
            raise UsageError("--columns and --filter have no effect on --data completejourney")
        return completejourney()
    if on_bad_rows == "quarantine" and quarantine is not None:
        quarantine.parent.mkdir(parents=True, exist_ok=True)
    return read_dataset(
        name,
        columns=chosen,
        filters=kept,
        on_bad_rows=on_bad_rows,  # type: ignore[arg-type]
        quarantine=quarantine if on_bad_rows == "quarantine" else None,
    )


def text_matrix(
    source: str,
    dataset: Dataset,
    *,
    device: str,
    reporter: Reporter,
    cache: bool = True,
    **options: Any,
) -> np.ndarray:
    """float32 ``[N + 1, E]``, row 0 zero, with progress; see :func:`padkern.text.load_text`."""
    from padkern.text import default_cache_dir, load_text

    reporter.message(f"text: {source}")
    with embedding_progress(reporter) as tick:
        return load_text(
            source,
            dataset,
            device=device,
            cache_dir=default_cache_dir() if cache else None,
            progress=tick,
            **options,
        )


def pick_device(name: str) -> str:
    """A torch device that is here; ``"auto"`` takes the first GPU, else the CPU."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UsageError(f"--device {name!r} is not a torch device (auto, cpu, cuda)") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise EnvError(f"--device {name}: torch {torch.__version__} finds no usable CUDA device")
    return name


@contextmanager
def embedding_progress(reporter: Reporter) -> Iterator[Callable[[int, int], None] | None]:
    """A callback (texts done, texts in all): a bar on a terminal, else a line every few seconds."""
    if isinstance(reporter, RichReporter):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), Remaining())
        with Progress(*columns, console=reporter.console, transient=True) as bar:
            task = bar.add_task("embedding", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    elif isinstance(reporter, PlainReporter):
        last = time.perf_counter()

        def tick(done: int, total: int) -> None:
            nonlocal last
            if time.perf_counter() - last >= _LINE_EVERY_S:
                last = time.perf_counter()
                reporter.message(f"embedding: {done:,} of {total:,} texts")

        yield tick
    else:
        yield None


def _run_config(request: Request, out: Path, resume: bool) -> RunConfig:
    """The configuration to run with; refuses to touch a folder that is not meant.

    Raises:
        UsageError: ``out`` holds something and ``resume`` is off, or an option contradicts the
            configuration of the run to resume.
    """
    from padkern.pad.config import RunConfig

    found = set(os.listdir(out)) if out.is_dir() else set()
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file")
    if "config.yaml" not in found:
        if resume and found - {".lock", _QUARANTINE}:
            raise UsageError(f"--out {out}: holds no config.yaml, so it is no run to resume")
        if found - {".lock", _QUARANTINE} and not resume:
            raise UsageError(f"--out {out}: the folder is not empty")
        return resolve_config(request.preset, request.seed, request.overrides)
    if not resume:
        raise UsageError(f"--out {out}: holds a run; add --resume, or take another folder")
    stored = RunConfig.from_yaml(RunFolder(out, create=False).read_text("config.yaml"))
    if request.preset not in (None, stored.preset_name):
        raise UsageError(f"--preset {request.preset}: the run to resume has {stored.preset_name}")
    seed = [] if request.seed is None else [f"seed={request.seed}"]
    if stored.with_overrides(request.overrides + seed) != stored:
        raise UsageError(
            f"--resume continues {out} with its own config.yaml, and the options given now differ "
            "from it; leave them away or start another run"
        )
    return stored


def _audited(dataset: Dataset, config: RunConfig, reporter: Reporter) -> dict[str, Any]:
    """The audit of a data set and its split, shown."""
    from padkern.data import audit, format_audit, make_split

    facts = audit(dataset, make_split(dataset, config.split), config.model.max_len)
    reporter.message(format_audit(facts))
    return facts


def _same_request(folder: RunFolder, request: Request) -> None:
    """Raises UsageError where an option contradicts the inputs stored in the run to resume."""
    before = folder.read_json("run.json").get("request", {})
    for name, value in (("data", request.data), ("text", request.text)):
        if value is not None and value != before.get(name):
            raise UsageError(f"--{name} {value}: the run to resume has {before.get(name)}")
    if request.shuffle_text != before.get("shuffle_text", False):
        raise UsageError("--shuffle-text must be given as in the run to resume")
    if request.cold_share != before.get("cold_share"):
        raise UsageError(f"--share: the run to resume has {before.get('cold_share')}")


def _record(request: Request, device: str, width: int) -> dict[str, Any]:
    """What is needed to do the run again, for ``run.json``."""
    from padkern.environment import facts

    return {
        "command": shlex.join(["padkern", *sys.argv[1:]]),
        "request": {**asdict(request), "text": request.source, "device": device},
        "text_width": width,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": facts(),
    }


def settings(model: type[Any], flag: str, pairs: list[str]) -> Any:
    """``name=value`` words as a settings model.

    Raises:
        UsageError: a word without ``=``, an unknown name, or a value that the model refuses.
    """
    from pydantic import ValidationError

    values: dict[str, Any] = {}
    for pair in pairs:
        name, mark, value = pair.partition("=")
        if not mark:
            raise UsageError(f"{flag} takes NAME=VALUE, got {pair!r}")
        if name not in model.model_fields:
            known = ", ".join(model.model_fields)
            raise UsageError(f"{flag}: unknown name {name!r}; known: {known}")
        values[name] = None if value.lower() == "none" else value
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UsageError(f"{flag} {name}={first['input']}: {first['msg']}") from None
