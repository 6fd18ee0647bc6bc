"""One optimiser step of PAD's phase 3 (three experts) at Prime Pantry's shape, on the CPU.

Run with ``pytest benchmarks/bench_training.py --benchmark-only``. 512 users whose input lengths are
drawn from Prime Pantry's histogram (mean 5.9 of 20), 8,347 items, text width 4096, d = 128, 5
blocks, 2 heads, one negative, AdamW. About 3,800 different items, as 512 users of Prime Pantry
have. The padded forms get their text vectors gathered beforehand; padkern's batch is planned
beforehand too (0.3 ms, in a thread).
All contenders are forms of one model: without dropout their losses and gradients must agree in
float64 before they are timed with it. ``epoch_s`` is the step times the 26 steps of an epoch of
12,871 users: extrapolated, not run.
"""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import pytest
import torch
from peers import training
from peers.pantry import HISTOGRAM, lengths_like

from padkern import _native
from padkern.data.dataset import Ragged
from padkern.data.plan import BatchPlanner, PlanSource

USERS, ITEMS, TEXT, LENGTH, EPOCH_STEPS = 512, 8347, 4096, 20, 26
CONTENDERS = ("padkern", "packed_eager", "packed_unique", "padded_authors", "padded_compiled")


@lru_cache(maxsize=1)
def setting():
    """The model and one batch."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    text = torch.randn(ITEMS + 1, TEXT) / TEXT**0.5
    text[0] = 0
    bins = torch.from_numpy(rng.integers(1, 11, ITEMS + 1))
    bins[0] = 0
    model = training.parity_model(text, bins, dim=128, length=LENGTH, layers=5, heads=2)
    lengths = lengths_like(HISTOGRAM, USERS, seed=1)
    popularity = 1 / (np.arange(ITEMS) + 30.0)
    rows = [
        rng.choice(ITEMS, n + 1, replace=False, p=popularity / popularity.sum()) + 1
        for n in lengths
    ]
    source = PlanSource(
        Ragged.from_lists(rows),
        num_items=ITEMS,
        max_len=LENGTH,
        item_bins=bins,
        candidates=np.arange(1, ITEMS + 1),
    )
    plan = BatchPlanner(source, negatives=1, seed=1).plan(np.arange(USERS), 0)
    return model, training.make_batch(plan, LENGTH, text)


def loss_of(contender: str):
    """The contender as a function of model and batch."""
    if contender == "padkern":
        return lambda model, batch: model.plan_loss(batch.plan.keyed(1, 1))
    if contender == "padded_compiled":
        torch._dynamo.reset()
        return torch.compile(training.padded_stacked, dynamic=False)
    return getattr(training, contender)


@lru_cache(maxsize=1)
def expected():
    """The setting in float64, and loss and gradients of the authors' form without dropout.

    In float32 a unit of the feed-forward layers that is 0 but for rounding is on in one form and
    off in another: gradients of the same form differ from float64 by 1e-3.
    """
    model, batch = setting()
    wide = copy.deepcopy(model).double().eval()
    batch = batch._replace(features=batch.features.double())
    loss = training.padded_authors(wide, batch)
    return wide, batch, loss.item(), training.gradients(wide, loss)


def check(contender: str, run) -> None:
    """Without dropout the contender computes the same: in float64, and its loss in float32."""
    wide, batch, want, want_gradients = expected()
    loss = run(wide, batch)
    assert abs(loss.item() - want) < 1e-9 * abs(want)
    for name, gradient in training.gradients(wide, loss).items():
        size = want_gradients[name].norm()
        assert (gradient - want_gradients[name]).norm() < 1e-7 * size + 1e-12, name
    model, narrow = setting()
    assert abs(run(model.eval(), narrow).item() - want) < 1e-5 * abs(want)


@pytest.mark.parametrize("contender", CONTENDERS)
def bench_training_step(benchmark, contender):
    reason = _native.load().reason
    if contender == "padkern" and reason:
        pytest.skip(reason)
    model, batch = setting()
    run = loss_of(contender)
    check(contender, run)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    model.train()

    def step():
        optimizer.zero_grad(set_to_none=True)
        run(model, batch).backward()
        optimizer.step()

    benchmark.group = f"training step, {USERS} users, {batch.targets.numel()} tokens, d=128"
    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
    model.load_state_dict(state)
    fastest = benchmark.stats.stats.min if benchmark.stats else float("nan")
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "contender": contender,
        "unique_items": len(batch.plan.unique),
        "epoch_s": round(EPOCH_STEPS * fastest, 2),
    }
