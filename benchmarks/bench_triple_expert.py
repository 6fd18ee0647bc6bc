"""Gated loss of three experts at a PAD training step: reference, torch.compile and native.

Run with ``pytest benchmarks/bench_triple_expert.py --benchmark-only``. The sizes are those of a
batch of 512 users of Prime Pantry: 3,098 tokens, 8,347 items, d = 128. Every contender is checked
against the float64 reference before it is timed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from padkern import _native
from padkern.ops.triple_expert import gated_bce_loss, gated_bce_loss_ref

TOKENS, EXPERTS, DIM, ITEMS, BINS = 3098, 3, 128, 8347, 12
CONTENDERS = ("reference", "compile", "native")


def make_inputs(k: int):
    """Scores of order 1; item ids drawn like a long-tailed catalogue, with many repeats."""
    rng = np.random.default_rng(k)
    users = rng.normal(size=(TOKENS, EXPERTS, DIM))
    tables = rng.normal(size=(EXPERTS, ITEMS + 1, DIM)) / np.sqrt(DIM)
    gate = rng.random((BINS, EXPERTS))
    bins = rng.integers(1, BINS, ITEMS + 1)
    positives = np.minimum(rng.zipf(1.3, TOKENS), ITEMS)
    negatives = rng.integers(1, ITEMS + 1, (TOKENS, k))
    floats = [torch.from_numpy(x).float().requires_grad_() for x in (users, tables, gate)]
    return floats, [torch.from_numpy(x) for x in (bins, positives, negatives)]


def loss_of(contender: str):
    if contender == "reference":
        return gated_bce_loss_ref
    if contender == "compile":
        # One size only: a second one would otherwise be compiled with dynamic shapes.
        torch._dynamo.reset()
        return torch.compile(gated_bce_loss_ref, fullgraph=True, dynamic=False)
    return lambda *args: gated_bce_loss(*args, backend="native")


@lru_cache(maxsize=2)
def expected(k: int):
    floats, ids = make_inputs(k)
    leaves = [x.detach().double().requires_grad_() for x in floats]
    loss = gated_bce_loss_ref(*leaves, *ids)
    return loss.item(), torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize("k", [1, 8])
def bench_gated_bce(benchmark, k, step, contender):
    reason = _native.load().reason
    if contender == "native" and reason:
        pytest.skip(reason)
    floats, ids = make_inputs(k)
    loss_fn = loss_of(contender)

    def forward():
        with torch.no_grad():
            return loss_fn(*floats, *ids)

    def forward_backward():
        for x in floats:
            x.grad = None
        loss = loss_fn(*floats, *ids)
        loss.backward()
        return loss

    run = forward if step == "forward" else forward_backward
    want, want_grads = expected(k)
    assert abs(run().item() - want) < 1e-5 * abs(want)
    if step == "forward_backward":
        for x, grad in zip(floats, want_grads, strict=True):
            assert (x.grad - grad).norm() < 1e-5 * grad.norm()
    benchmark.group = f"gated_bce {step} T={TOKENS} d={DIM} N={ITEMS} k={k}"
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "contender": contender}
    benchmark.pedantic(run, rounds=15, warmup_rounds=2)
