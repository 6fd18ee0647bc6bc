"""What a run says while it works: nothing, plain lines, or a live bar on a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

__all__ = ["PlainReporter", "Reporter", "RichReporter", "make_reporter"]

_REFRESH_S = 0.1


class Reporter:
    """Says nothing; the base of the others."""

    def message(self, text: str) -> None:
        """A line (or several) for the user."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of texts; the first column is left-aligned, the others are numbers."""

    def start_phase(self, name: str, epochs: int, batches: int) -> None:
        """A phase of at most ``epochs`` epochs of ``batches`` steps begins."""

    def step(self, loss: Any, users: int, tokens: int) -> None:
        """One optimiser step is done.

        Args:
            loss: a number or a scalar tensor; read only when something is drawn, so that a step
                costs no synchronisation.
            users: sequences in the batch.
            tokens: training pairs in the batch.
        """

    def end_epoch(self, record: Mapping[str, Any]) -> None:
        """An epoch and its validation are done.

        Args:
            record: phase, epoch, loss, ndcg@10, hit@10, seconds, users_per_s, tokens_per_s, best.
        """

    def wants_stop(self) -> bool:
        """Asked after every epoch: True ends the phase there."""
        return False

    def end_phase(self, name: str, summary: Mapping[str, Any]) -> None:
        """A phase is over; ``summary`` holds facts worth a line, such as epochs and seconds."""

    def close(self) -> None:
        """Restores the terminal; nothing is said afterwards."""


class PlainReporter(Reporter):
    """One line per epoch and event, for logs and pipes.

    Args:
        stream: where the lines go; standard output by default.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream

    def message(self, text: str) -> None:
        print(text, file=self._stream or sys.stdout, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.message(plain_table(title, columns, rows))

    def start_phase(self, name: str, epochs: int, batches: int) -> None:
        self.message(f"{name}: at most {epochs} epochs of {batches} steps")

    def end_epoch(self, record: Mapping[str, Any]) -> None:
        self.message(epoch_line(record))

    def end_phase(self, name: str, summary: Mapping[str, Any]) -> None:
        self.message(phase_line(name, summary))


class RichReporter(Reporter):
    """A live bar with users/s, tokens/s, loss and the validation metric.

    Args:
        console: a ``rich.console.Console``; by default one on standard output.
    """

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console

        self.console = console or Console(highlight=False)
        self._progress: Any = None
        self._task: Any = None
        self._metric = "ndcg@10 --"
        self._best = -1.0
        self._begin()

    def _begin(self) -> None:
        self._last_draw = self._since = time.perf_counter()
        self._users = self._tokens = self._steps = 0

    def message(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
        for place, column in enumerate(columns):
            table.add_column(Text(column), justify="right" if place else "left", no_wrap=True)
        for row in rows:
            style = "bold" if row and row[0] == "pad" else ""
            table.add_row(*(Text(cell, style=style) for cell in row))
        self.console.print(table)

    def start_phase(self, name: str, epochs: int, batches: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.close()
        self._metric, self._best = "ndcg@10 --", -1.0
        self._progress = Progress(
            TextColumn("[bold]{task.description:<13}", markup=True),
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[rate]}"),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[metric]}"),
            TimeElapsedColumn(),
            console=self.console,
            auto_refresh=False,
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task(
            name, total=batches, epoch=1, epochs=epochs, rate="", loss="--", metric=self._metric
        )
        self._begin()

    def step(self, loss: Any, users: int, tokens: int) -> None:
        if self._progress is None:
            return
        self._users += users
        self._tokens += tokens
        self._steps += 1
        now = time.perf_counter()
        if now - self._last_draw < _REFRESH_S:
            return
        self._last_draw = now
        seconds = max(now - self._since, 1e-9)
        rate = f"{self._users / seconds:,.0f} users/s {self._tokens / seconds:,.0f} tokens/s"
        self._progress.update(
            self._task, completed=self._steps, rate=rate, loss=f"{float(loss):.4f}", refresh=True
        )

    def end_epoch(self, record: Mapping[str, Any]) -> None:
        self.message(epoch_line(record))
        if self._progress is None:
            return
        value = record.get("ndcg@10")
        if value is not None and record.get("best"):
            self._best = float(value)
        if self._best >= 0:
            self._metric = f"best ndcg@10 {self._best:.4f}"
        self._progress.update(
            self._task,
            completed=0,
            epoch=int(record.get("epoch", 0)) + 1,
            metric=self._metric,
            refresh=True,
        )
        self._begin()

    def end_phase(self, name: str, summary: Mapping[str, Any]) -> None:
        self.close()
        self.message(phase_line(name, summary))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def make_reporter(quiet: bool = False) -> Reporter:
    """The reporter that fits where standard output goes.

    ``quiet`` says nothing. A terminal gets the live bar (without colours under ``NO_COLOR``);
    anything else, and ``TERM=dumb``, gets plain lines.
    """
    if quiet:
        return Reporter()
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        return RichReporter()
    return PlainReporter()


def epoch_line(record: Mapping[str, Any]) -> str:
    """One epoch as one line."""
    parts = [f"{record.get('phase', '')} epoch {record.get('epoch', '?')}"]
    if (loss := record.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    for name in ("ndcg@10", "hit@10"):
        if (value := record.get(name)) is not None:
            parts.append(f"{name} {value:.4f}")
    if (users := record.get("users_per_s")) is not None:
        parts.append(f"{users:,.0f} users/s")
    if (tokens := record.get("tokens_per_s")) is not None:
        parts.append(f"{tokens:,.0f} tokens/s")
    if (seconds := record.get("seconds")) is not None:
        parts.append(f"{seconds:.1f} s")
    return "  ".join(parts) + ("  *" if record.get("best") else "")


def phase_line(name: str, summary: Mapping[str, Any]) -> str:
    """The end of a phase as one line."""
    facts = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in summary.items()
        if value is not None
    ]
    return f"{name}: done" + (f" ({', '.join(facts)})" if facts else "")


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as aligned text."""
    cells = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title, lines[0], rule, *lines[1:]])
