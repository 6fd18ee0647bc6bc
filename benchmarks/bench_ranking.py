"""Exact ranks, ranks up to 20 and best items: native against torch, FAISS and a sort per user.

Every implementation is checked before it is timed, on small integers of the same catalogue, where
all of them are exact.
"""

from __future__ import annotations

import pytest
import torch
from peers import ranking as peers
from peers.libraries import missing

from padkern import _native
from padkern.ops.ranking import count_ranks, top_k_items

SIZES = {
    "pantry_192": (12871, 8347, 192),
    "pantry_384": (12871, 8347, 384),
    "large_192": (4096, 100_000, 192),
}
CHECKED, CUT, BEST, SORTED = 300, 20, 10, 200


def _ranks(problem: peers.Problem, backend: str = "native", **options) -> torch.Tensor:
    ids = (problem.targets, problem.seen, problem.offsets)
    return count_ranks(problem.states, problem.matrix, *ids, backend=backend, **options)


def _early(problem: peers.Problem) -> torch.Tensor:
    return _ranks(problem, at_most=CUT, order=problem.popular)


def _top(problem: peers.Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return top_k_items(
        *(problem.states, problem.matrix, BEST, problem.seen, problem.offsets), backend="native"
    )


def _info(problem: peers.Problem, **more: object) -> dict[str, object]:
    (users, dim), rows = problem.states.shape, len(problem.matrix)
    work = 2e-9 * users * (rows - 1) * dim
    return {"users": users, "items": rows - 1, "D": dim, "useful_gflop": round(work, 2), **more}


@pytest.mark.parametrize("name", ["native", "native_at_most_20", "mm_count", "compile_mm_count"])
@pytest.mark.parametrize("size", list(SIZES))
def bench_ranks(measure, benchmark, skip_peer, size, name):
    """Ranks of all users, packing included."""
    if name.startswith("native") and _native.load().core is None:
        pytest.skip(_native.load().reason)
    problem, exact = peers.make(*SIZES[size]), peers.make(CHECKED, *SIZES[size][1:], True)
    benchmark.group = f"ranks {size}, the first {SORTED} users alone"
    want = _ranks(exact, "reference")
    if name == "native":
        assert torch.equal(_ranks(exact), want)
        hits = float((_ranks(problem) <= CUT).double().mean())
        measure(lambda: _ranks(problem), **_info(problem, hit_at_20=round(hits, 4)))
        return
    if name == "native_at_most_20":
        assert torch.equal(_early(exact), want.masked_fill(want > CUT, torch.inf))
        full = _ranks(problem)
        assert torch.equal(_early(problem), full.masked_fill(full > CUT, torch.inf))
        measure(lambda: _early(problem), **_info(problem))
        return
    run = peers.mm_count if name == "mm_count" else peers.mm_count_compiled()
    chunk = peers.best_chunk(run, problem, 20.0)
    assert torch.equal(run(exact, chunk).double(), want)
    run(problem, chunk)  # its shapes may have to be compiled
    measure(lambda: run(problem, chunk), **_info(problem, chunk=chunk))


@pytest.mark.parametrize("name", ["native", "mm_topk", "faiss"])
@pytest.mark.parametrize("size", list(SIZES))
def bench_best_items(measure, benchmark, skip_peer, size, name):
    """The ten best unseen items of all users; packing and FAISS's index are made inside."""
    if name == "native" and _native.load().core is None:
        pytest.skip(_native.load().reason)
    if name == "faiss" and missing("faiss"):
        skip_peer(missing("faiss"))
    problem, exact = peers.make(*SIZES[size]), peers.make(CHECKED, *SIZES[size][1:], True)
    benchmark.group = f"best items {size}"
    chunk = 0
    if name == "native":
        run = _top
    elif name == "mm_topk":
        chunk = peers.best_chunk(lambda p, c: peers.mm_topk(p, c, BEST), problem, 20.0)

        def run(p: peers.Problem) -> tuple[torch.Tensor, torch.Tensor]:
            return peers.mm_topk(p, chunk, BEST)

    else:

        def run(p: peers.Problem) -> tuple[torch.Tensor, torch.Tensor]:
            return peers.faiss_topk(p, peers.faiss_index(p.matrix), BEST)

    ids, scores = run(exact)
    want = top_k_items(
        *(exact.states, exact.matrix, BEST, exact.seen, exact.offsets), backend="reference"
    )
    assert torch.equal(scores, want.scores)  # which of tied items, only padkern promises
    assert torch.equal((exact.matrix[ids] * exact.states[:, None]).sum(2), scores)
    measure(lambda: run(problem), **_info(problem, k=BEST, chunk=chunk))


@pytest.mark.parametrize("size", ["pantry_192", "pantry_384"])
def bench_sort_per_user(measure, benchmark, size):
    """The released evaluation's form on the first users; all of them take `users` / 200 times."""
    problem, exact = peers.make(*SIZES[size]), peers.make(CHECKED, *SIZES[size][1:], True)
    benchmark.group = f"ranks {size}, the first {SORTED} users alone"
    want = _ranks(exact, "reference")[:SORTED]
    got = peers.sort_per_user(exact, SORTED)
    sure = want.isfinite() & (want % 1 == 0)
    # A sort breaks ties anyhow: a whole rank alone may lie between two ties.
    candidates = (exact.matrix @ exact.states[:SORTED].T).T
    own = candidates.gather(1, exact.targets[:SORTED, None])
    alone = sure & ((candidates == own).sum(1) == 1)
    assert alone.any()
    assert torch.equal(got[alone], want[alone])
    measure(
        lambda: peers.sort_per_user(problem, SORTED),
        **_info(
            problem,
            contender="sort_per_user",
            users_timed=SORTED,
            factor=round(SIZES[size][0] / SORTED, 2),
        ),
    )
