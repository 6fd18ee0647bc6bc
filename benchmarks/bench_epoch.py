"""A training epoch of PAD's phase 3 (three experts) on Prime Pantry, batches and all, on the CPU.

Run with ``pytest benchmarks/bench_epoch.py --benchmark-only``; ``PADKERN_DATA`` names the folder
that holds ``prime_pantry``, without it users of the same length distribution are drawn. The model
is the released one: 12,871 users, 8,347 items, random text vectors of width 4096, d = 128, 5
blocks, 2 heads, 20 inputs, one negative, 512 users per step. The optimiser is torch's fused AdamW
for all. Every form makes its own batches, in a thread beside the step; their negatives are drawn
uniformly from the items that the user does not own.

Of the authors' form ``PADKERN_BENCH_EPOCH_STEPS`` whole steps are timed (default 4, 0: the epoch).
``whole_s`` is the time of all users: measured, or scaled by the number of users.

Without dropout, loss and gradients of every form on a batch that it made itself must agree in
float64 with the other way to compute them: those of packed forms with the authors' padded form,
those of the authors' form with padkern's reference.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from itertools import islice

import pytest
import torch
from peers import epoch, pantry, training
from settings import SMALL, count

from padkern import _native
from padkern.data.plan import TrainBatches

CONTENDERS = ("padkern", "packed_eager", "packed_unique", "padded_authors")
USERS, ITEMS, TEXT, DIM, LAYERS, BATCH, CHECKED = (
    (96, 300, 24, 16, 1, 32, 8) if SMALL else (pantry.USERS, pantry.ITEMS, 4096, 128, 5, 512, 64)
)
STEPS = count("PADKERN_BENCH_EPOCH_STEPS", 4)
SEED = 1


@lru_cache(maxsize=1)
def setting():
    """Name of the data, what batches are made with, and the model."""
    torch.manual_seed(0)
    found = pantry.synthetic(USERS, ITEMS) if SMALL else pantry.load()
    text = torch.randn(len(found.bins), TEXT) / TEXT**0.5
    text[0] = 0
    model = training.parity_model(
        *(text, torch.from_numpy(found.bins)), dim=DIM, length=pantry.LENGTH, layers=LAYERS, heads=2
    )
    return found.name, epoch.Data(found.train, text, found.bins, pantry.LENGTH, BATCH), model


def batches_of(contender: str, data: epoch.Data, seed: int = SEED):
    """The batches of an epoch."""
    if contender == "padkern":
        made = TrainBatches(
            data.source(), batch_size=data.batch, seed=seed, phase="bench", negatives=1
        )
        return epoch.padkern_batches(made, seed)
    if contender == "padded_authors":
        return epoch.authors_batches(data, seed)
    return epoch.packed_batches(data, seed)


def loss_of(contender: str):
    """Loss of a model on one of its batches."""
    if contender == "padkern":
        return lambda model, plan: model.plan_loss(plan)
    return getattr(training, contender)


def other_way(contender: str, model, batch, data: epoch.Data) -> torch.Tensor:
    """The loss of a contender's batch, computed by another form."""
    if contender == "padded_authors":
        parts = epoch.packed_from_slots(batch.slots, batch.other_slots, data.length)
        model.backend = "reference"
        return model.loss(parts[0], parts[1], negatives=parts[2][:, None])
    if contender == "padkern":
        parts = (batch.inputs, batch.targets, batch.negatives[:, 0])
    else:
        parts = (batch.packed, batch.targets, batch.negatives)
    return training.padded_authors(model, training.pad(*parts, data.length, data.text.double()))


def check(contender: str) -> None:
    """A batch of the contender, in float64 and without dropout, computed in two ways."""
    _, data, model = setting()
    small = data._replace(batch=CHECKED)
    batch, users, tokens = next(batches_of(contender, small))
    assert (users, tokens > 0) == (CHECKED, True)
    wide = copy.deepcopy(model).double().eval()
    if contender == "padded_authors":
        batch = batch._replace(features=batch.features.double())
    loss = loss_of(contender)(wide, batch)
    found = training.gradients(wide, loss)
    want = other_way(contender, wide, batch, data)
    assert abs(loss.item() - want.item()) < 1e-9 * abs(want.item())
    for name, gradient in training.gradients(wide, want).items():
        assert (found[name] - gradient).norm() < 1e-7 * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("contender", CONTENDERS)
def bench_training_epoch(benchmark, machine, contender):
    reason = _native.load().reason
    if contender == "padkern" and reason:
        pytest.skip(reason)
    check(contender)
    name, data, model = setting()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    loss_fn = loss_of(contender)
    steps = (STEPS or None) if contender == "padded_authors" else None
    model.train()

    def run(steps=steps):
        users = tokens = 0
        for batch, new_users, new_tokens in islice(batches_of(contender, data), steps):
            optimizer.zero_grad(set_to_none=True)
            loss_fn(model, batch).backward()
            optimizer.step()
            users, tokens = users + new_users, tokens + new_tokens
        return users, tokens

    run(2)  # warms up
    info = machine() | {"contender": contender, "data": name, "small": SMALL}
    # Peers that run whole epochs are warm after seconds; two rounds show whether that is so.
    benchmark.group = f"training epoch, {len(data.train)} users of {name}, d={DIM}"
    users, tokens = benchmark.pedantic(run, rounds=2)
    model.load_state_dict(state)
    seconds = benchmark.stats.stats.median if benchmark.stats else float("nan")
    benchmark.extra_info |= info | {
        "users_timed": users,
        "users_per_s": round(users / seconds, 1),
        "tokens_per_s": round(tokens / seconds, 1),
        "whole_s": round(seconds * len(data.train) / users, 6),
    }
