"""Full-catalogue cross-entropy of a PAD training step: native, torch forms, torch's chunked loss.

Run with ``pytest benchmarks/bench_catalogue_loss.py --benchmark-only``. A batch of 512 users of
Prime Pantry has 3,098 tokens, D = 192; its catalogue has 8,347 items, and 100,000 stand for a
larger one. Forward and backward. Every contender is checked against float64 before it is timed: its
value and its gradients by every 49th token and every 197th item. A chunked peer runs with each of
several chunk sizes; its best is what to compare with.

torch's ``linear_cross_entropy`` with its default options takes 4 tokens per chunk at 100,000 items,
so that a call runs for tens of seconds. ``PADKERN_BENCH_DEFAULT_CHUNK=1`` checks it once and times
one round; else the figures list it under ``skipped`` with an estimate from some of its chunks. A
million items are in ``bench_scaling.py``.
"""

from __future__ import annotations

import time
from functools import lru_cache

import pytest
import torch
from conftest import peak_resident_mib
from peers import catalogue
from settings import switched_on

from padkern import _native
from padkern.ops.catalogue_loss import catalogue_cross_entropy

TOKENS, DIM = 3098, catalogue.DIM
ROWS = (32, 64, 128, 256, 512, 1024)
CONTENDERS = (
    "native",
    "eager",
    "compile",
    *(f"chunked_{rows}" for rows in ROWS),
    *(f"chunked_compile_{rows}" for rows in (64, 256, 1024)),
    "linear_cross_entropy",
    *(f"linear_cross_entropy_{rows}" for rows in ROWS),
)
SOME_TOKENS, SOME_ITEMS = slice(0, None, 49), slice(0, None, 197)


@lru_cache(maxsize=1)
def expected(items: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Value, gradients by some states and some items in float64, token chunk by token chunk."""
    users, vectors, targets = (x.detach() for x in catalogue.make_inputs(items, TOKENS))
    wide = vectors.double()
    total, d_users = 0.0, []
    d_items = torch.zeros(len(wide[SOME_ITEMS]), DIM, dtype=torch.float64)
    for part, wanted in zip(users.split(64), targets.split(64), strict=True):
        logits = part.double() @ wide.T
        lse = logits.logsumexp(1, keepdim=True)
        total += float((lse - logits.gather(1, wanted[:, None])).sum())
        residual = logits.sub_(lse).exp_()
        residual[torch.arange(len(wanted)), wanted] -= 1
        d_users.append(residual @ wide)
        d_items += residual[:, SOME_ITEMS].T @ part.double()
    return total / TOKENS, torch.cat(d_users)[SOME_TOKENS] / TOKENS, d_items / TOKENS


def loss_of(name: str):
    """The contender; skips where it cannot run."""
    if name == "native":
        if _native.load().reason:
            pytest.skip(_native.load().reason)
        return lambda *args: catalogue_cross_entropy(*args, backend="native")
    if name == "eager":
        return catalogue.plain
    if name == "compile":
        torch._dynamo.reset()
        return torch.compile(catalogue.plain, fullgraph=True, dynamic=False)
    kind, _, rows = name.rpartition("_")
    if kind == "chunked":
        return catalogue.chunked(int(rows))
    if kind == "chunked_compile":
        torch._dynamo.reset()
        return catalogue.chunked(int(rows), compiled=True)
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    return catalogue.linear_cross_entropy(int(rows) if rows.isdigit() else None)


def default_chunk_ms(items: int, chunks: int = 16) -> float:
    """Estimate of a call with the default options, from some chunks of 4 tokens.

    4 is what the documented rule ``aspect_ratio:2`` gives for 3,098 tokens and 100,000 items.
    """
    rows = 4
    users, vectors, targets = catalogue.make_inputs(items, rows * chunks)
    loss_fn = catalogue.linear_cross_entropy(rows)
    best = float("inf")
    for _ in range(2):  # the first one warms up
        users.grad = vectors.grad = None
        started = time.perf_counter()
        loss_fn(users, vectors, targets).backward()
        best = min(best, time.perf_counter() - started)
    return round(1e3 * best * TOKENS / (rows * chunks), 1)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("items", [8347, 100_000])
def bench_catalogue_loss(benchmark, measure, machine, skip_peer, items, contender):
    users, vectors, targets = catalogue.make_inputs(items, TOKENS)
    loss_fn = loss_of(contender)
    slow = contender == "linear_cross_entropy" and items > 8347
    if slow and not switched_on("PADKERN_BENCH_DEFAULT_CHUNK"):
        estimate = default_chunk_ms(items)
        skip_peer(
            f"a call takes about {estimate / 1e3:.0f} s; PADKERN_BENCH_DEFAULT_CHUNK=1 runs it",
            estimated_ms=estimate,
        )

    def step():
        users.grad = vectors.grad = None
        loss = loss_fn(users, vectors, targets)
        loss.backward()
        return loss.detach()

    value, d_users, d_items = expected(items)
    benchmark.group = f"catalogue_loss forward_backward T={TOKENS} N={items} D={DIM}"
    values: list[torch.Tensor] = []
    memory = peak_resident_mib(lambda: values.append(step()))
    assert abs(float(values[0]) - value) < 1e-5 * value
    assert (users.grad[SOME_TOKENS] - d_users).norm() < 1e-5 * d_users.norm()
    assert (vectors.grad[SOME_ITEMS] - d_items).norm() < 1e-5 * d_items.norm()
    if slow:
        benchmark.extra_info |= machine() | {"contender": contender, "resident_mib": memory}
        benchmark.pedantic(step, rounds=1)
        return
    measure(step, contender=contender, resident_mib=peak_resident_mib(step))
