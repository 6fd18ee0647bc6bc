"""The command ``padkern tune``: the same number of trials for every method, on validation alone.

A trial trains one configuration with the first seed of the grid and is judged by validation
NDCG@10; test targets are not ranked. What a trial tries depends on the trials before it and on its
number, never on when the search was interrupted.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from padkern.data.random_streams import stream_seed
from padkern.errors import EnvError, UsageError
from padkern.pad.folder import RunFolder
from padkern.pad.grid.cells import train_and_rank
from padkern.pad.grid.runner import one_line, open_folder, read_all_data
from padkern.pad.grid.space import Range, read_search, space_of
from padkern.pad.grid.spec import Cell, Grid, digest, known_methods, read_grid
from padkern.pad.progress import Reporter

__all__ = ["tune"]

_METRIC = "ndcg@10"


def tune(
    path: str | Path,
    out: str | Path,
    *,
    trials: int,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> Path:
    """Searches every method of a grid on every data set.

    Args:
        path: the grid; its key ``search`` may set ranges.
        out: folder of the search, new or of an earlier call, which it continues.
        trials: for every method with anything to tune; pruned and failed ones count.
        device: torch device, or ``"auto"``.
        reporter: progress.

    Returns:
        ``best.yaml`` in ``out``: the grid with the best values under ``tuned``, for
        ``padkern compare``. A method keeps its own values where no trial was better: the first
        trial is these.

    Raises:
        EnvError: optuna is not installed.
        UsageError: a mistake in the grid or an argument.
        DataError: a data set cannot be read.
    """
    from padkern.pad.workflow import pick_device

    optuna = _optuna()
    reporter = reporter or Reporter()
    if trials < 1:
        raise UsageError(f"--trials must be at least 1, got {trials}")
    grid = read_grid(path)
    search = read_search(grid.search, grid.source)
    spaces = {pair: _space(grid, pair, search) for pair in grid.pairs()}
    unused = set(search) - {key for space, _ in spaces.values() for key in space}
    if unused:
        raise UsageError(f"{grid.source}: search.{min(unused)}: no method of the grid can tune it")
    device = pick_device(device)
    out = Path(out)
    tuned: dict[str, dict[str, Any]] = {}
    summary: list[dict[str, Any]] = []
    with open_folder(out, grid) as folder:
        for error in read_all_data(grid, out, device, reporter).values():
            raise error
        for (dataset, label), (space, unknown) in spaces.items():
            cell = grid.cell(dataset, label, grid.seeds[0])
            record: dict[str, Any] = {
                "dataset": dataset, "method": label, "space": _plain(space), "not_tuned": unknown,
            }  # fmt: skip
            if space:
                study = _Study(optuna, cell, space, folder, device, reporter)
                record |= study.run(trials)
                tuned.setdefault(dataset, {})[label] = record["values"]
            else:
                record |= {"trials": 0, "why": "nothing to tune"}
            summary.append(record)
        folder.write_json("tuning.json", {"trials": trials, "metric": _METRIC, "studies": summary})
        best = folder.write_yaml("best.yaml", _best_grid(grid, tuned, trials))
        for record in summary:
            value = record.get("best")
            said = "nothing to tune" if value is None else f"best valid {_METRIC} {value:.4f}"
            name = f"{record['dataset']} / {record['method']}"
            reporter.message(f"{name}: {record['trials']} trials, {said}")
        reporter.message(f"grid with the best values: {best}")
    return best


class _Stopped(Exception):
    """The trial was pruned."""


class _Watch(Reporter):
    """Reports the epochs of the method's own phase to the trial and ends it when that says so.

    The phases before are not comparable between trials and not reported.
    """

    def __init__(self, trial: Any, phase: str) -> None:
        self._trial, self._phase = trial, phase
        self.values: dict[int, float] = {}

    def end_epoch(self, record: Mapping[str, Any]) -> None:
        if record["phase"] != self._phase:
            return
        epoch, value = int(record["epoch"]), float(record[_METRIC])
        self.values[epoch] = value
        self._trial.report(value, epoch)
        if self._trial.should_prune():
            raise _Stopped


class _Study:
    """The trials of one method on one data set, kept line by line."""

    def __init__(
        self,
        optuna: Any,
        cell: Cell,
        space: dict[str, Range],
        folder: RunFolder,
        device: str,
        reporter: Reporter,
    ) -> None:
        self._optuna, self._cell, self._space = optuna, cell, space
        self._folder, self._device, self._reporter = folder, device, reporter
        # Trials of other ranges would not fit.
        self._file = f"trials/{cell.name}-{digest(_plain(space))}.jsonl"

    def run(self, trials: int) -> dict[str, Any]:
        """Runs what is missing; returns the record of the study."""
        optuna = self._optuna
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1)
        study = optuna.create_study(direction="maximize", pruner=pruner)
        # A search for more trials continues one for fewer.
        records = self._folder.read_jsonl(self._file)[:trials]
        for record in records:
            study.add_trial(self._stored(record))
        for number in range(len(records), trials):
            record = self._trial(study, number)
            self._folder.append_jsonl(self._file, record)
            records.append(record)
        finished = [record for record in records if record["state"] == "complete"]
        best = max(finished, key=lambda r: (r["value"], -r["number"]), default=None)
        states = [record["state"] for record in records]
        return {
            "trials": len(records),
            **{state: states.count(state) for state in ("complete", "pruned", "failed")},
            "best": None if best is None else best["value"],
            "best_trial": None if best is None else best["number"],
            "values": {} if best is None else best["values"],
        }

    def _trial(self, study: Any, number: int) -> dict[str, Any]:
        """One trial, told to the study."""
        seed = stream_seed(self._cell.seed, "tune", self._cell.name, number)
        # A sampler of its own, so that the draws of a trial do not depend on the process's past.
        study.sampler = self._optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=5)
        trial = study.ask()
        # The first trial is the configuration as it stands: tuning cannot make a method worse.
        values = {key: _suggest(trial, key, r) for key, r in self._space.items()} if number else {}
        state, value, error = "complete", None, None
        watch = _Watch(trial, self._cell.method)
        began = time.perf_counter()
        try:
            config = self._cell.config.with_values(values, "tune")
            cell = replace(self._cell, config=config)
            _, ranked = train_and_rank(
                cell, self._folder.path, device=self._device, reporter=watch, parts=("valid",)
            )
            value = ranked["valid"][1].metrics()["all"][_METRIC]
            study.tell(trial, value)
        except _Stopped:
            state = "pruned"
            study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)
        except Exception as failure:
            state, error = "failed", one_line(failure)
            study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        self._reporter.message(
            f"{self._cell.dataset} / {self._cell.label} trial {number + 1}: "
            + (state if value is None else f"valid {_METRIC} {value:.4f}")
            + (f": {error}" if error else "")
        )
        return {
            "number": number,
            "values": values,
            "state": state,
            "value": value,
            "epochs": [[epoch, v] for epoch, v in watch.values.items()],
            "error": error,
            "seconds": time.perf_counter() - began,
        }

    def _stored(self, record: Mapping[str, Any]) -> Any:
        """A trial of an earlier call."""
        states = self._optuna.trial.TrialState
        state = {"complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}
        values, epochs = record["values"], record["epochs"]
        # As study.tell does: a pruned trial counts with the last value it reported.
        value = epochs[-1][1] if record["state"] == "pruned" else record["value"]
        return self._optuna.trial.create_trial(
            state=state[record["state"]],
            value=value,
            params=values,
            distributions={k: _distribution(self._optuna, self._space[k]) for k in values},
            intermediate_values={int(epoch): v for epoch, v in epochs},
        )


def _suggest(trial: Any, key: str, entry: Range) -> Any:
    if entry.choices is not None:
        return trial.suggest_categorical(key, entry.choices)
    if entry.scale == "integer":
        return trial.suggest_int(key, *entry.ends())
    return trial.suggest_float(key, entry.low, entry.high, log=entry.scale == "log")


def _distribution(optuna: Any, entry: Range) -> Any:
    kinds = optuna.distributions
    if entry.choices is not None:
        return kinds.CategoricalDistribution(entry.choices)
    if entry.scale == "integer":
        return kinds.IntDistribution(*entry.ends())
    return kinds.FloatDistribution(entry.low, entry.high, log=entry.scale == "log")


def _space(
    grid: Grid, pair: tuple[str, str], search: Mapping[str, Range]
) -> tuple[dict[str, Range], list[str]]:
    method = known_methods()[grid.methods[pair[1]].method or pair[1]]
    return space_of(method.tunable, grid.config(*pair), search, grid.source)


def _plain(space: Mapping[str, Range]) -> dict[str, Any]:
    return {key: entry.model_dump(exclude_none=True) for key, entry in space.items()}


def _best_grid(grid: Grid, tuned: Mapping[str, Any], trials: int) -> str:
    """The grid's own YAML with the best values and the number of trials behind them."""
    found = copy.deepcopy(grid.found)
    for dataset, labels in tuned.items():
        # A copy: YAML anchors make several data sets share one mapping.
        entry = found["datasets"][dataset] = dict(found["datasets"][dataset])
        before = entry.get("tuned", {})
        entry["tuned"] = before | {
            label: (before.get(label) or {}) | values for label, values in labels.items()
        }
    found["tuning"] = {"trials": trials, "metric": f"valid {_METRIC}", "seed": grid.seeds[0]}
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise EnvError(
            "padkern tune needs the package optuna; install it with: pip install 'padkern[tune]'"
        ) from None
    return optuna
