"""Cells in processes of their own, several at a time (``--jobs``).

A process that is killed, for want of memory say, costs its own cell alone. Processes end with the
one that started them, so a killed comparison leaves nothing that writes.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence, Set
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from padkern.pad.grid.shared import missing_phases, phases_of
from padkern.pad.grid.spec import Cell
from padkern.pad.progress import Reporter

__all__ = ["first_free", "run_in_processes"]


def run_in_processes(
    cells: list[Cell], out: Path, jobs: int, device: str
) -> Iterator[tuple[Cell, tuple[str, str] | None]]:
    """Runs cells, at most ``jobs`` at a time, each with its share of the processors.

    Cells that need few phases go first, and a cell waits for one that trains a phase it needs: it
    will find it there.

    Yields:
        As cells end, the cell and None, or one line of what went wrong and the traceback.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting = sorted(cells, key=lambda cell: len(phases_of(cell)))
    running: dict[Connection, tuple[Cell, Any, set[str]]] = {}
    try:
        while waiting or running:
            while len(running) < jobs:
                trained = set().union(*(phases for _, _, phases in running.values()))
                wanted = [missing_phases(cell, out, device, threads) for cell in waiting]
                place = first_free(wanted, trained)
                if place is None:
                    break
                cell, phases = waiting.pop(place), wanted[place]
                here, there = context.Pipe(duplex=False)
                process = context.Process(
                    target=_work, args=(cell, out, device, threads, there), daemon=True
                )
                process.start()
                there.close()  # the other end is the process's alone: it ends with the process
                running[here] = cell, process, phases
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                cell, process, _ = running.pop(ready)
                try:
                    error = ready.recv()
                    process.join()
                except EOFError:
                    process.join()
                    error = f"the process ended with exit code {process.exitcode}", ""
                ready.close()
                yield cell, error
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.join()


def first_free(wanted: Sequence[Set[str]], trained: Set[str]) -> int | None:
    """Place of the first cell that needs none of the phases in training; None: all wait."""
    return next((n for n, phases in enumerate(wanted) if not phases & trained), None)


def _work(cell: Cell, out: Path, device: str, threads: int, pipe: Connection) -> None:
    """The life of one process: sends None, or what went wrong."""
    import torch

    from padkern.pad.grid.runner import attempt

    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(threads)
    pipe.send(attempt(cell, out, device, Reporter()))


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
