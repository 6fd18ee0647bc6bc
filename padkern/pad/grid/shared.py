"""Phases that several cells of a grid have in common, trained once.

``pad`` needs the phases that ``pretrain``, ``text`` and ``aligned`` are; under the same data, seed
and configuration they end with the same bits. A finished cell leaves the last checkpoint of these
phases under ``phases``, and a cell that needs one resumes from it as from its own.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from padkern.errors import CheckpointError
from padkern.pad.folder import RunFolder
from padkern.pad.grid.spec import Cell, digest

__all__ = ["adopt", "missing_phases", "phase_name", "phases_of", "publish"]

_NOTE = "adopted.json"
#: Parts of the configuration that a phase does not read.
_UNREAD = {
    "pretrain": ("language", "id_plus_text", "align", "disentangle", "rivals"),
    "text": ("pretrain", "id_plus_text", "align", "disentangle", "rivals"),
    "aligned": ("language", "id_plus_text", "disentangle", "rivals"),
}


def phases_of(cell: Cell) -> tuple[str, ...]:
    """The phases that a cell trains and others may too."""
    if cell.method in ("pretrain", "text"):
        return (cell.method,)
    if cell.method == "aligned":
        return ("pretrain", "aligned")
    if cell.method != "pad":
        return ()
    config = cell.config.disentangle
    found = ["pretrain"]
    if "aligned" in config.experts:
        found.append("aligned")
    if "language" in config.experts and config.start_language == "trained":
        found.append("text")
    return tuple(found)


def phase_name(cell: Cell, phase: str, device: str, threads: int | None = None) -> str:
    """Folder of a phase: unlike that of any other that may end with other bits.

    Args:
        cell: that needs it.
        phase: one of :func:`phases_of`.
        device: of the cell.
        threads: of the process that trains it; default this one's.
    """
    import torch

    from padkern import __version__

    config = cell.config.facts(exclude=set(_UNREAD[phase]))
    facts = [phase, cell.data_id, config, device, threads or torch.get_num_threads()]
    facts += [__version__, torch.__version__]
    return f"{cell.dataset}--{phase}--seed-{cell.seed}--{digest(facts)}"


def missing_phases(cell: Cell, root: Path, device: str, threads: int | None = None) -> set[str]:
    """Names of the phases that a cell would have to train and others might too."""
    names = {phase_name(cell, phase, device, threads) for phase in phases_of(cell)}
    return {name for name in names if not _place(root, name).is_dir()}


def adopt(cell: Cell, root: Path, folder: RunFolder, device: str) -> dict[str, float]:
    """Puts the phases that are there into a cell's working folder.

    Args:
        cell: about to be trained.
        root: folder of the comparison.
        folder: working folder of the cell; a phase that it has is left alone.
        device: of the cell.

    Returns:
        Seconds that the training of each adopted phase took, those of earlier attempts included.
    """
    taken: dict[str, float] = folder.read_json(_NOTE) if folder.exists(_NOTE) else {}
    for phase in phases_of(cell):
        source = _place(root, phase_name(cell, phase, device))
        where = f"checkpoints/{phase}"
        if folder.has(where) or not source.is_dir():
            continue
        target = folder.file(where)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _copy(source, target)
            _, meta = folder.load_tensors(where)
        except OSError:  # another process has just put it aside, or there is no room
            continue
        except CheckpointError:
            # Whatever broke it, training it again is always right.
            folder.remove(where)
            _discard(source)
            continue
        taken[phase] = float(meta["seconds"])
        folder.write_json(_NOTE, taken)
    return taken


def publish(cell: Cell, root: Path, folder: RunFolder, device: str) -> None:
    """Leaves the phases of a finished cell for others; where there is no room, it does not."""
    for phase in phases_of(cell):
        target = _place(root, phase_name(cell, phase, device))
        source = folder.file(f"checkpoints/{phase}")
        if source.is_dir() and not target.exists():
            with suppress(OSError):
                target.parent.mkdir(parents=True, exist_ok=True)
                _copy(source, target)


def _place(root: Path, name: str) -> Path:
    return root / "phases" / name


def _discard(place: Path) -> None:
    """Removes a folder in one step, so that no other process takes a part of it."""
    aside = place.with_name(f"{place.name}.tmp-{os.getpid()}")
    with suppress(OSError):
        os.rename(place, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Copies a folder so that it appears whole or not at all."""
    stage = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        shutil.copytree(source, stage)
        os.rename(stage, target)
    except OSError:
        shutil.rmtree(stage, ignore_errors=True)
        if not target.exists():  # else another process was first
            raise
