"""The batch plan of 512 users of Prime Pantry: C++, numpy, and the released loop over users.

Run with ``pytest benchmarks/bench_plan.py --benchmark-only``; the data are those of
``bench_epoch.py``. ``native`` and ``reference`` (numpy) give the whole plan: packed tokens,
negatives, unique items and where each slot finds its own; they must give the same numbers.
``python_loop`` is the released data set: left-padded lists and negatives redrawn while the user
owns them. It makes no unique items and gathers no text vectors here, so it does less. With 8
negatives it draws 8 per target.
"""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
import pytest
import torch
from peers import epoch, pantry
from settings import SMALL

from padkern import _native
from padkern.data.plan import BatchPlan, BatchPlanner

USERS, ITEMS, BATCH = (96, 300, 32) if SMALL else (pantry.USERS, pantry.ITEMS, 512)
SEED = 1


@lru_cache(maxsize=1)
def setting():
    """Name, training rows as batches are made of them, and padkern's view."""
    found = pantry.synthetic(USERS, ITEMS) if SMALL else pantry.load()
    text = torch.zeros(len(found.bins), 1)
    data = epoch.Data(found.train, text, found.bins, pantry.LENGTH, BATCH)
    return found.name, data, data.source()


def python_loop(rows: list[list[int]], num_items: int, negatives: int, rng: random.Random):
    """Slots ``[B, L + 1]`` and negatives ``[B, L + 1, k]`` of some users."""
    made = [epoch.authors_slots(row, pantry.LENGTH, num_items, rng, negatives) for row in rows]
    slots, other = zip(*made, strict=True)
    return torch.tensor(slots), torch.tensor(other)


def same(a: BatchPlan, b: BatchPlan) -> bool:
    """Whether two plans hold the same numbers."""

    def tensors(plan: BatchPlan):
        packed = plan.inputs
        yield from (packed.items, packed.offsets, packed.positions, packed.grid)
        yield from (plan.targets, plan.negatives, plan.unique, plan.bins, plan.counts)
        yield from (plan.input_rows, plan.target_rows, plan.negative_rows)
        yield from (*plan.starts, *plan.slots)

    pairs = zip(tensors(a), tensors(b), strict=True)
    return np.array_equal(a.users, b.users) and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("contender", ["native", "reference", "python_loop"])
@pytest.mark.parametrize("negatives", [1, 8])
def bench_batch_plan(measure, benchmark, negatives, contender):
    if contender == "native" and _native.load().reason:
        pytest.skip(_native.load().reason)
    name, data, source = setting()
    users = data.parts(SEED)[0]
    planners = {
        backend: BatchPlanner(source, negatives=negatives, seed=SEED, backend=backend)
        for backend in ("reference", *(["native"] if contender == "native" else []))
    }
    want = planners["reference"].plan(users, 3)
    if contender == "python_loop":
        rows = [data.train.row(int(user)).tolist() for user in users]
        rng = random.Random(SEED)

        def run():
            return python_loop(rows, data.num_items, negatives, rng)

        slots, other = run()
        packed, targets, found = epoch.packed_from_slots(slots, other, data.length)
        assert torch.equal(packed.items, want.inputs.items)
        assert torch.equal(targets, want.targets)
        lengths = want.inputs.offsets.diff().numpy()
        owner = np.repeat(users, lengths * negatives)
        assert found.shape == want.negatives.shape
        assert not source.owns(owner, found.reshape(-1).numpy()).any()
    else:
        planner = planners[contender]

        def run():
            return planner.plan(users, 3)

        assert same(run(), want)
    benchmark.group = f"batch plan, {BATCH} users of {name}, k={negatives}"
    tokens = want.targets.numel()
    info = {"contender": contender, "users": BATCH, "tokens": tokens, "small": SMALL}
    measure(run, **info, data=name, unique_items=len(want.unique))
