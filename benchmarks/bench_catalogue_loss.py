"""Full-catalogue cross-entropy of a PAD training step: native, torch forms, torch's chunked loss.

Run with ``pytest benchmarks/bench_catalogue_loss.py --benchmark-only``. A batch of 512 users of
Prime Pantry has 3,098 tokens, D = 192; its catalogue has 8,347 items, and 100,000 stand for a
larger one. Forward and backward. Every contender is checked against float64 before it is timed: its
value and its gradients by every 49th token and every 197th item. A chunked peer runs with each of
several chunk sizes; its best is what to compare with.

``PADKERN_BENCH_MILLION=1`` adds 1,000,000 items x 4,096 tokens, with the growth of resident memory.
"""

from __future__ import annotations

import os
from functools import lru_cache

import pytest
import torch
from conftest import peak_resident_mib
from peers import catalogue

from padkern import _native
from padkern.ops.catalogue_loss import catalogue_cross_entropy

TOKENS, DIM = 3098, 192
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


def make_inputs(items: int, tokens: int = TOKENS) -> tuple[torch.Tensor, ...]:
    """Logits of order 1, targets drawn uniformly; every eighth token one of sixteen head items."""
    torch.manual_seed(items)
    users = torch.randn(tokens, DIM).requires_grad_()
    vectors = (torch.randn(items, DIM) / DIM**0.5).requires_grad_()
    targets = torch.randint(items, (tokens,))
    targets[::8] %= 16
    return users, vectors, targets


@lru_cache(maxsize=1)
def expected(items: int) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Value, gradients by some states and some items in float64, token chunk by token chunk."""
    users, vectors, targets = (x.detach() for x in make_inputs(items))
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


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("items", [8347, 100_000])
def bench_catalogue_loss(benchmark, measure, items, contender):
    users, vectors, targets = make_inputs(items)
    loss_fn = loss_of(contender)

    def step():
        users.grad = vectors.grad = None
        loss = loss_fn(users, vectors, targets)
        loss.backward()
        return loss.detach()

    value, d_users, d_items = expected(items)
    assert abs(float(step()) - value) < 1e-5 * value
    assert (users.grad[SOME_TOKENS] - d_users).norm() < 1e-5 * d_users.norm()
    assert (vectors.grad[SOME_ITEMS] - d_items).norm() < 1e-5 * d_items.norm()
    benchmark.group = f"catalogue_loss forward_backward T={TOKENS} N={items} D={DIM}"
    measure(step, contender=contender, resident_mib=peak_resident_mib(step))


@pytest.mark.skipif(
    os.environ.get("PADKERN_BENCH_MILLION") != "1", reason="set PADKERN_BENCH_MILLION=1"
)
def bench_a_million_items(benchmark):
    users, vectors, targets = make_inputs(1_000_000, 4096)
    loss_fn = loss_of("native")

    def step():
        users.grad = vectors.grad = None
        loss_fn(users, vectors, targets).backward()

    benchmark.group = "catalogue_loss forward_backward T=4096 N=1000000 D=192"
    step()
    users.grad = vectors.grad = None
    memory = peak_resident_mib(step)
    benchmark.extra_info |= {"contender": "native", "resident_mib": memory}
    benchmark.pedantic(step, rounds=2)
