"""A made-up data set on a ring of items, and runs on it, for the tests of training."""

from __future__ import annotations

import numpy as np

from padkern.data.bins import frequency_bins
from padkern.data.dataset import Dataset, Ragged
from padkern.data.split import make_split
from padkern.pad.config import RunConfig
from padkern.pad.folder import RunFolder
from padkern.pad.gate import set_gate
from padkern.pad.phases import Phases
from padkern.pad.progress import Reporter
from padkern.pad.run import run_experiment
from padkern.pad.stored import transform_text

SMALL = [
    "model.dim=8",
    "model.num_layers=1",
    "model.dropout=0.1",
    "model.max_len=6",
    "text.pca=8",
    "num_bins=3",
    "evaluation.resamples=200",
    "disentangle.gate.steps=8",
    *(
        f"{phase}.{key}"
        for phase in ("pretrain", "language", "id_plus_text", "align", "disentangle")
        for key in ("epochs=2", "batch_size=16", "warmup_steps=2")
    ),
]


def make_dataset(users: int = 60, items: int = 40, seed: int = 0) -> tuple[Dataset, np.ndarray]:
    """Users walk along a ring of items; text vectors lie on the ring too."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(users):
        steps = np.cumsum(rng.integers(1, 3, size=rng.integers(5, 9))) + rng.integers(items)
        rows.append(steps % items + 1)
    angle = 2 * np.pi * np.arange(items) / items
    waves = [f(k * angle) for k in range(1, 7) for f in (np.sin, np.cos)]
    text = np.zeros((items + 1, 12), dtype=np.float32)
    text[1:] = np.stack(waves, 1) + 0.01 * rng.normal(size=(items, 12))
    dataset = Dataset(
        name="ring",
        users=[f"u{i}" for i in range(users)],
        items=["", *(f"i{i}" for i in range(1, items + 1))],
        sequences=Ragged.from_lists(rows),
        timestamps=None,
        texts=["", *(f"item {i}" for i in range(1, items + 1))],
    )
    return dataset, text


def make_phases(overrides=(), preset="clean", **kw) -> Phases:
    dataset, text = make_dataset()
    config = RunConfig.preset(preset).with_overrides([*SMALL, *overrides])
    split = make_split(dataset, config.split)
    bins = frequency_bins(split.train_frequency, config.num_bins, unseen=config.unseen)
    return Phases.of(split, bins, transform_text(text, config), config, **kw)


def run(path, overrides=(), *, reporter=None, resume=False, preset="clean"):
    dataset, text = make_dataset()
    config = RunConfig.preset(preset).with_overrides([*SMALL, *overrides])
    with RunFolder(path) as folder:
        return run_experiment(
            dataset, text, config, folder, audit={}, reporter=reporter, resume=resume
        )


class Stop(Exception):
    pass


class StopAfter(Reporter):
    """Interrupts a run at the end of an epoch, as a kill between two epochs would."""

    def __init__(self, phase: str, epoch: int) -> None:
        self.phase, self.epoch = phase, epoch

    def end_epoch(self, record) -> None:
        if (record["phase"], record["epoch"]) == (self.phase, self.epoch):
            raise Stop


def largest_within(phases: Phases, model, before, rows, factors, tolerance: float) -> float:
    """By hand: the largest factor on rows of a gate whose validation NDCG@10 is near the best.

    The factors must not all be alike, or the answer would mean nothing.
    """
    scores = {}
    for factor in factors:
        trial = before.clone()
        trial[rows] += np.log(factor)
        set_gate(model, trial)
        scores[factor] = phases._evaluate(model).metrics()["all"]["ndcg@10"]
    assert len({round(score, 9) for score in scores.values()}) > 1
    floor = (1 - tolerance) * max(scores.values())
    return max(factor for factor, score in scores.items() if score >= floor - 1e-12)
