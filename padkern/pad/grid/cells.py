"""One cell of a grid: trained, evaluated, and stored as a folder that appears in one rename.

``cells/<name>`` holds ``cell.json`` (what it was, how long it took), ``config.yaml``,
``metrics.json``, the ranks of every user in ``ranks_valid.parquet`` and ``ranks_test.parquet``, and
a manifest of sizes and digests. While it trains, checkpoints stand in ``work/<name>``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from padkern.errors import CheckpointError, EnvError
from padkern.pad.folder import RunFolder
from padkern.pad.grid.shared import adopt, publish
from padkern.pad.grid.spec import Cell, DatasetEntry
from padkern.pad.progress import Reporter
from padkern.pad.tensor_files import MANIFEST, plain, reason, sync_folder, write_file

if TYPE_CHECKING:
    from padkern.data.dataset import Dataset
    from padkern.data.split import EvalSplit
    from padkern.pad.evaluation import Evaluation
    from padkern.pad.phases import Phases

__all__ = [
    "PARTS",
    "Result",
    "drop_work",
    "has_result",
    "read_result",
    "run_cell",
    "store_data",
    "train_and_rank",
]

PARTS = ("valid", "test")
_COLUMNS = ("user", "target", "frequency", "history_length", "rank")


@dataclass(frozen=True)
class Result:
    """A finished cell.

    Attributes:
        cell: what it is the result of.
        metrics: split -> group -> metric -> value, as :meth:`Evaluation.metrics` gives them.
        ranks: split -> column (user, target, frequency, history_length, rank) -> array ``[n]``.
        seconds: training and evaluation, of the last attempt if it was interrupted; phases taken
            from other cells count with what their training took there.
    """

    cell: Cell
    metrics: dict[str, Any]
    ranks: dict[str, dict[str, np.ndarray]]
    seconds: float


def store_data(
    root: Path, entry: DatasetEntry, source: tuple[str, str], data_id: str, **kw: Any
) -> None:
    """Reads a data set and its text matrix once for all cells; does nothing where that is done.

    Args:
        root: folder of the comparison.
        entry: of the grid.
        source: data and text.
        data_id: names the folder under ``data``.
        **kw: device and reporter.

    Raises:
        DataError, EnvError, UsageError: as in ``padkern run``.
    """
    from padkern.pad.stored import store_inputs
    from padkern.pad.workflow import read_data, text_matrix

    with RunFolder(root / "data" / data_id) as folder:
        if folder.has("dataset"):
            return
        dataset = read_data(
            source[0],
            on_bad_rows=entry.on_bad_rows,
            columns=[f"{name}={column}" for name, column in entry.columns.items()],
            filters=[f"{name}={value}" for name, value in entry.filters.items()],
        )
        store_inputs(folder, dataset, text_matrix(source[1], dataset, **kw))


def run_cell(cell: Cell, root: Path, *, device: str, reporter: Reporter) -> None:
    """Trains, evaluates and stores one cell, from its last finished epoch if it was interrupted.

    Args:
        cell: what to run; its data must be stored.
        root: folder of the comparison.
        device: torch device.
        reporter: progress.

    Raises:
        Exception: whatever the method raises.
        EnvError: the result cannot be written.
    """
    import torch

    from padkern import __version__

    work = root / "work" / cell.name
    resumed = work.is_dir()
    began = time.perf_counter()
    with RunFolder(work) as folder:
        adopted = adopt(cell, root, folder, device)
        dataset, evaluations = train_and_rank(
            cell, root, device=device, reporter=reporter, folder=folder
        )
    facts = {
        "dataset": cell.dataset,
        "label": cell.label,
        "method": cell.method,
        "seed": cell.seed,
        "seconds": time.perf_counter() - began + sum(adopted.values()),
        "resumed": resumed,
        "phases_of_other_cells": adopted,
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"padkern": __version__, "torch": torch.__version__},
    }
    metrics = {
        part: result.metrics() | {"counters": result.counters}
        for part, (_, result) in evaluations.items()
    }
    files = {
        "cell.json": _json(facts),
        "config.yaml": cell.config.to_yaml().encode("utf-8"),
        "metrics.json": _json(metrics),
    }
    for part, (split, result) in evaluations.items():
        files[f"ranks_{part}.parquet"] = _parquet(dataset, split, result)
    _write(root / "cells" / cell.name, files)
    publish(cell, root, RunFolder(work, create=False), device)
    drop_work(cell, root)


def train_and_rank(
    cell: Cell,
    root: Path,
    *,
    device: str,
    reporter: Reporter,
    folder: RunFolder | None = None,
    parts: tuple[str, ...] = PARTS,
) -> tuple[Dataset, dict[str, tuple[EvalSplit, Evaluation]]]:
    """Trains the method of a cell and ranks the held-out targets of ``parts``.

    Returns:
        The data set, and per part its split and evaluation. The test part is not given to the
        method; of a gate fitted on the validation targets their figures are cross-fitted.
    """
    from padkern.data.bins import frequency_bins
    from padkern.data.split import make_split
    from padkern.pad.methods import train_method
    from padkern.pad.phases import Phases
    from padkern.pad.stored import evaluate_row, load_inputs, transform_text

    config = cell.config
    dataset, matrix = load_inputs(RunFolder(root / "data" / cell.data_id, create=False))
    split = make_split(dataset, config.split)
    bins = frequency_bins(split.train_frequency, config.num_bins, unseen=config.unseen)
    phases: Phases = Phases.of(
        split, bins, transform_text(matrix, config), config,
        device=device, reporter=reporter, folder=folder, resume=folder is not None,
        raw_text=matrix,
    )  # fmt: skip
    scorer = train_method(cell.method, phases)
    result: dict[str, tuple[EvalSplit, Evaluation]] = {}
    if "valid" in parts:
        result["valid"] = split.valid, phases.validation(cell.method, scorer)
    if "test" in parts:
        result["test"] = split.test, evaluate_row(scorer, split, split.test, bins, config)
    return dataset, result


def has_result(cell: Cell, root: Path) -> bool:
    """Whether the cell is finished and its files are whole."""
    try:
        _verified(root / "cells" / cell.name)
    except CheckpointError:
        return False
    return True


def read_result(cell: Cell, root: Path) -> Result:
    """Reads a finished cell.

    Raises:
        CheckpointError: it is missing or a file was changed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = _verified(root / "cells" / cell.name)
    ranks = {}
    for part in PARTS:
        table = pq.read_table(pa.BufferReader(files[f"ranks_{part}.parquet"]))
        ranks[part] = {name: table[name].to_numpy() for name in _COLUMNS}
    facts = json.loads(files["cell.json"])
    return Result(cell, json.loads(files["metrics.json"]), ranks, facts["seconds"])


def drop_work(cell: Cell, root: Path) -> None:
    """Removes what an unfinished attempt left."""
    shutil.rmtree(root / "work" / cell.name, ignore_errors=True)


def _parquet(dataset: Dataset, split: EvalSplit, result: Evaluation) -> bytes:
    """Rank of every user: external ids, training count of the target, length of the history."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "user": pa.array([dataset.users[user] for user in result.users], pa.string()),
            "target": pa.array([dataset.items[item] for item in result.targets], pa.string()),
            "frequency": pa.array(result.target_frequency, pa.int64()),
            "history_length": pa.array(split.history.lengths, pa.int64()),
            "rank": pa.array(result.ranks, pa.float64()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _json(obj: Any) -> bytes:
    return (json.dumps(plain(obj), indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Stages the folder beside its place, the manifest last, and renames it."""
    stage = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    entries = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    try:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        for name, data in [*files.items(), (MANIFEST, _json(entries))]:
            write_file(stage / name, data)
        sync_folder(stage)
        shutil.rmtree(folder, ignore_errors=True)  # there only if its files are not whole
        os.rename(stage, folder)
        sync_folder(folder.parent)
    except OSError as error:
        shutil.rmtree(stage, ignore_errors=True)
        raise EnvError(f"{folder}: cannot be written: {reason(error)}") from None


def _verified(folder: Path) -> dict[str, bytes]:
    """The files of a finished cell, sizes and digests checked."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (folder / name).read_bytes() for name in entries}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a finished cell: {reason(error)}") from None
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != entries[name]["sha256"]:
            raise CheckpointError(f"{folder / name}: was changed after it was written")
    return files
