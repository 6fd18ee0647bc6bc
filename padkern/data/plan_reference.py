"""The batch plan in numpy: the specification of ``csrc/batch_plan`` and the way without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from padkern.data.random_streams import philox_words, scaled, unit

if TYPE_CHECKING:
    from padkern.data.plan import PlanSource

#: Draws of one negative before the next free candidate is searched for.
ATTEMPTS = 64


def plan_arrays(
    source: PlanSource, users: np.ndarray, negatives: int, key: int
) -> dict[str, np.ndarray]:
    """The arrays of a plan by name; see :class:`padkern.data.plan.BatchPlan`."""
    window = source.window.take(users)
    lengths = window.lengths - 1
    first, last = window.offsets[:-1], window.offsets[1:] - 1
    keep = np.ones((2, len(window.values)), dtype=bool)
    keep[0, last] = keep[1, first] = False
    offsets = np.zeros(len(users) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    rows = np.repeat(np.arange(len(users)), lengths)
    within = np.arange(offsets[-1]) - offsets[rows]
    width = int(lengths.max(initial=0))
    out = {
        "offsets": offsets,
        "inputs": window.values[keep[0]],
        "positions": source.max_len - lengths[rows] + within,
        "grid": rows * width + within,
        "targets": window.values[keep[1]],
    }
    out["negatives"] = _negatives(source, users[rows], out, negatives, key)
    roles = [out["inputs"], out["targets"], out["negatives"].reshape(-1)]
    unique, inverse, counts = np.unique(
        np.concatenate(roles), return_inverse=True, return_counts=True
    )
    places = np.split(inverse, np.cumsum([len(role) for role in roles])[:-1])
    starts = [np.searchsorted(np.sort(p), np.arange(len(unique) + 1)) for p in places]
    return out | {
        "unique": unique,
        "rows": inverse,
        "starts": np.stack(starts),
        "slots": np.concatenate([np.argsort(p, kind="stable") for p in places]),
        "bins": source.bins[unique],
        "counts": counts,
    }


def _negatives(
    source: PlanSource, users: np.ndarray, out: dict[str, np.ndarray], count: int, key: int
) -> np.ndarray:
    """[T, count] ids, each not of the user's own items where there is another candidate."""
    shape = (len(users), count)
    counter = np.zeros((*shape, 4), dtype=np.int64)
    counter[..., 0] = (users & 0xFFFFFFFF)[:, None]
    counter[..., 1] = (users >> 32)[:, None]
    counter[..., 2] = out["positions"][:, None]
    counter[..., 3] = np.arange(count)[None, :] << 12
    owner = np.broadcast_to(users[:, None], shape)
    drawn = np.zeros(shape, dtype=np.int64)
    bad = np.ones(shape, dtype=bool)
    for attempt in range(ATTEMPTS):
        step = counter[bad] + np.array([0, 0, 0, attempt])
        drawn[bad] = _candidates(source, philox_words(key, step), out["targets"])
        bad[bad] = source.owns(owner[bad], drawn[bad])
        if not bad.any():
            return drawn
    # Nearly everything is the row's own: the next free candidate after a uniform place.
    pool = source.candidates
    for index in zip(*np.nonzero(bad), strict=True):
        place = int(scaled(philox_words(key, counter[index]), len(pool)))
        order = np.roll(pool, -place)
        free = ~source.owns(np.full(len(pool), owner[index]), order)
        drawn[index] = order[free.argmax()]
    return drawn


def _candidates(source: PlanSource, words: np.ndarray, targets: np.ndarray) -> np.ndarray:
    if source.sampling == "in_batch":
        return targets[scaled(words, len(targets))]
    if source.cumulative is None:
        return source.candidates[scaled(words, len(source.candidates))]
    at = unit(words) * source.cumulative[-1]
    place = np.searchsorted(source.cumulative, at, side="right")
    return source.candidates[np.minimum(place, len(source.candidates) - 1)]
