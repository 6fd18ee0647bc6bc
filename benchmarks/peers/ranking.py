"""Ranking and best items as people write them: matrix product in chunks, FAISS, a sort per user."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

CHUNKS = (32, 128, 256, 1024)


@dataclass(frozen=True)
class Problem:
    """States, item matrix, targets, seen lists, and the items from popular to rare."""

    states: Tensor
    matrix: Tensor
    targets: Tensor
    seen: Tensor
    offsets: Tensor
    popular: Tensor

    def first(self, users: int) -> Problem:
        """The same with the first users only."""
        offsets = self.offsets[: users + 1]
        return Problem(
            self.states[:users],
            self.matrix,
            self.targets[:users],
            self.seen[: int(offsets[-1])],
            offsets,
            self.popular,
        )


@lru_cache(maxsize=2)
def make(users: int, items: int, dim: int, integers: bool = False) -> Problem:
    """Items of Zipf popularity, a bias for it, histories of mean length 8, and a weak signal.

    With integers every product and sum is exact in float32, so every method must agree.
    """
    rng = np.random.default_rng([users, items, dim])
    weights = 1.0 / np.arange(20, items + 20)
    popular = 1 + rng.permutation(items)
    draw = rng.choice(items, size=users, p=weights / weights.sum())
    targets = popular[draw]
    lengths = 1 + rng.geometric(1 / 7, users)
    seen = popular[rng.choice(items, size=lengths.sum(), p=weights / weights.sum())]
    if integers:
        states = rng.integers(-2, 3, (users, dim)).astype(np.float32)
        matrix = rng.integers(-2, 3, (items + 1, dim)).astype(np.float32)
    else:
        states = rng.normal(size=(users, dim)).astype(np.float32)
        matrix = rng.normal(size=(items + 1, dim)).astype(np.float32) / dim**0.5
        bias = np.log(weights)
        matrix[popular, -1] = 0.5 * (bias - bias.mean())
        states[:, -1] = 1.0
        states[:, :-1] += 0.6 * matrix[targets, :-1]
    return Problem(
        torch.from_numpy(states),
        torch.from_numpy(matrix),
        torch.from_numpy(targets),
        torch.from_numpy(seen),
        torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])),
        torch.from_numpy(popular),
    )


def _count(states: Tensor, matrix: Tensor, targets: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
    scores = states @ matrix.T
    own = scores.gather(1, targets[:, None])
    scores[:, 0] = torch.nan
    scores[rows, seen] = torch.nan
    greater, equal = (scores > own).sum(1), (scores == own).sum(1)
    # The target is among the equal ones, unless it was masked too.
    masked = scores.gather(1, targets[:, None])[:, 0].isnan()
    return torch.where(masked, torch.inf, 0.5 + greater + 0.5 * equal)


def _count_into(
    states: Tensor, matrix: Tensor, targets: Tensor, rows: Tensor, seen: Tensor, out: list[Tensor]
) -> Tensor:
    """The same in two buffers. Comparisons written as float32 are summed several times faster."""
    scores, flags = out
    torch.mm(states, matrix.T, out=scores)
    own = scores.gather(1, targets[:, None])
    scores[:, 0] = torch.nan
    scores[rows, seen] = torch.nan
    greater = torch.gt(scores, own, out=flags).sum(1)
    equal = torch.eq(scores, own, out=flags).sum(1)
    masked = scores.gather(1, targets[:, None])[:, 0].isnan()
    return torch.where(masked, torch.inf, 0.5 + greater + 0.5 * equal)


def _best(
    states: Tensor, matrix: Tensor, rows: Tensor, seen: Tensor, out: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    scores = torch.mm(states, matrix.T, out=out)
    scores[:, 0] = -torch.inf
    scores[rows, seen] = -torch.inf
    return scores.topk(k)


def _chunks(problem: Problem, chunk: int):
    for low in range(0, len(problem.states), chunk):
        high = min(low + chunk, len(problem.states))
        offsets = problem.offsets[low : high + 1]
        rows = torch.repeat_interleave(torch.arange(high - low), offsets[1:] - offsets[:-1])
        yield low, high, rows, problem.seen[int(offsets[0]) : int(offsets[-1])]


def mm_count(problem: Problem, chunk: int) -> Tensor:
    """Product into a buffer, mask, count; NaN marks what is no candidate."""
    wide = problem.matrix.dtype
    buffers = [torch.empty(chunk, len(problem.matrix), dtype=wide) for _ in range(2)]
    return torch.cat(
        [
            _count_into(
                *(problem.states[low:high], problem.matrix, problem.targets[low:high]),
                *(rows, seen, [buffer[: high - low] for buffer in buffers]),
            )
            for low, high, rows, seen in _chunks(problem, chunk)
        ]
    )


def mm_count_compiled() -> Callable[[Problem, int], Tensor]:
    """The same compiled; the seen lists of a chunk are filled up, so that shapes repeat."""
    torch._dynamo.reset()
    compiled = torch.compile(_count, dynamic=False)

    def run(problem: Problem, chunk: int) -> Tensor:
        parts = list(_chunks(problem, chunk))
        most = max(len(rows) for _, _, rows, _ in parts)
        results = []
        for low, high, rows, seen in parts:
            fill = most - len(rows)
            rows = torch.cat([rows, rows.new_zeros(fill)])
            seen = torch.cat([seen, seen.new_zeros(fill)])  # the padding item, masked anyway
            states, targets = problem.states[low:high], problem.targets[low:high]
            short = chunk - len(states)
            if short:
                states = torch.cat([states, states[:1].expand(short, -1)])
                targets = torch.cat([targets, targets[:1].expand(short)])
            out = compiled(states, problem.matrix, targets, rows, seen)
            results.append(out[: high - low])
        return torch.cat(results)

    return run


def mm_topk(problem: Problem, chunk: int, k: int) -> tuple[Tensor, Tensor]:
    """Product into one buffer, mask, topk: ids and scores."""
    buffer = torch.empty(chunk, len(problem.matrix))
    parts = [
        _best(problem.states[low:high], problem.matrix, rows, seen, buffer[: high - low], k)
        for low, high, rows, seen in _chunks(problem, chunk)
    ]
    return torch.cat([part[1] for part in parts]), torch.cat([part[0] for part in parts])


def best_chunk(run: Callable[[Problem, int], object], problem: Problem, seconds: float) -> int:
    """The fastest of `CHUNKS` on the first users; of those that the time allows."""
    part = problem.first(min(1024, len(problem.states)))
    times: dict[int, float] = {}
    for chunk in CHUNKS:
        started = time.perf_counter()
        run(part, chunk)
        if time.perf_counter() - started < seconds:  # a second time: the first may have compiled
            started = time.perf_counter()
            run(part, chunk)
        times[chunk] = time.perf_counter() - started
    return min(times, key=lambda chunk: times[chunk])


def faiss_index(matrix: Tensor):
    """An exact inner-product index of the items; position 0 is item 1."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(matrix.shape[1])
    index.add(matrix[1:].numpy())
    return index


def faiss_topk(problem: Problem, index, k: int, groups: int = 4) -> tuple[Tensor, Tensor]:
    """Fetches k + |seen| and filters, for users in groups of similar history lengths.

    FAISS has one filter for all queries of a search, so every user's own list means fetching more.
    """
    lengths = (problem.offsets[1:] - problem.offsets[:-1]).numpy()
    users, items = len(lengths), len(problem.matrix)
    keys = np.sort(np.repeat(np.arange(users), lengths) * items + problem.seen.numpy())
    ids = np.empty((users, k), dtype=np.int64)
    scores = np.empty((users, k), dtype=np.float32)
    states = problem.states.numpy()
    for group in np.array_split(np.argsort(lengths, kind="stable"), groups):
        fetch = min(k + int(lengths[group].max()), items - 1)
        found_scores, found = index.search(states[group], fetch)
        found += 1
        wanted = group[:, None] * items + found
        place = np.searchsorted(keys, wanted)
        kept = keys[np.minimum(place, len(keys) - 1)] != wanted
        order = np.argsort(~kept, axis=1, kind="stable")[:, :k]
        ids[group] = np.take_along_axis(found, order, 1)
        scores[group] = np.take_along_axis(found_scores, order, 1)
    return torch.from_numpy(ids), torch.from_numpy(scores)


def sort_per_user(problem: Problem, users: int) -> Tensor:
    """As PAD's released evaluation does it: per user float64 scores, a mask, a full sort."""
    ranks = torch.empty(users, dtype=torch.float64)
    places = torch.arange(1, len(problem.matrix) + 1, dtype=torch.float64)
    for user in range(users):
        scores = (problem.matrix @ problem.states[user]).double()
        low, high = problem.offsets[user].item(), problem.offsets[user + 1].item()
        scores[problem.seen[low:high]] = -torch.inf
        scores[0] = -torch.inf
        label = torch.zeros(len(scores), dtype=torch.float64)
        label[problem.targets[user]] = 1.0
        order = torch.argsort(scores, descending=True)
        ranks[user] = (label.take(order) * places).sum()
    return ranks
