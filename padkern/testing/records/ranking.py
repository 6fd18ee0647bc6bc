"""Record of :func:`padkern.ops.ranking.count_ranks`. A shape is (users, items, D).

Scores are small integers, exact in every dtype, so ranks must agree exactly, ties included.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from padkern.ops.ranking import count_ranks
from padkern.testing.mkmmd import Tolerance
from padkern.testing.opspec import Arguments, ErrorCase, OpSpec, Options, Shape

# Around the item tile of the options (64) and the chunk of users (256).
SHAPES: dict[str, Shape] = {
    "no_user": (0, 3, 2),
    "ones": (1, 1, 1),
    "two": (2, 2, 2),
    "odd": (7, 5, 3),
    "primes": (13, 101, 5),
    "tile_less_one": (9, 62, 3),
    "tile": (9, 63, 3),
    "tile_and_one": (9, 64, 3),
    "two_tiles": (40, 127, 4),
    "chunk_less_one": (255, 30, 3),
    "chunk": (256, 30, 3),
    "chunk_and_one": (257, 30, 3),
    "wide": (5, 40, 200),
    "many_items": (20, 2000, 8),
}


def _inputs(shape: Shape, dtype: torch.dtype, seed: int) -> Arguments:
    users, items, dim = shape
    rng = np.random.default_rng([seed, *shape])
    targets = rng.integers(1, items + 1, users)
    lists = [rng.integers(0, items + 1, rng.integers(0, 6)) for _ in range(users)]
    for row in range(0, users, 4):
        lists[row] = np.append(lists[row], targets[row])
    seen = np.concatenate([np.zeros(0, dtype=np.int64), *lists])
    return {
        "user_states": torch.from_numpy(rng.integers(-2, 3, (users, dim))).to(dtype),
        "item_matrix": torch.from_numpy(rng.integers(-2, 3, (items + 1, dim))).to(dtype),
        "targets": torch.from_numpy(targets),
        "seen_values": torch.from_numpy(seen),
        "seen_offsets": torch.from_numpy(np.cumsum([0] + [len(row) for row in lists])),
    }


def count_ranks_oracle(
    user_states: Tensor,
    item_matrix: Tensor,
    targets: Tensor,
    seen_values: Tensor,
    seen_offsets: Tensor,
    *,
    mask_repeats: bool = True,
    chunk: int | None = None,
    item_tile: int | None = None,
) -> Tensor:
    """Mean position of each target over all orders of its ties, from explicit lists."""
    ranks = []
    scores = (user_states.double() @ item_matrix.double().T).numpy()
    for user, target in enumerate(targets.tolist()):
        low, high = int(seen_offsets[user]), int(seen_offsets[user + 1])
        seen = set(seen_values[low:high].tolist()) if mask_repeats else set()
        own = scores[user, target]
        if target in seen or math.isnan(own):
            ranks.append(math.inf)
            continue
        others = np.array([i for i in range(1, len(item_matrix)) if i not in seen | {target}])
        others = scores[user, others] if len(others) else np.zeros(0)
        ranks.append(1 + float((others > own).sum()) + float((others == own).sum()) / 2)
    return torch.tensor(ranks, dtype=torch.float64)


ERRORS = (
    ErrorCase("target_padding", {"targets": [0, 1]}, ValueError, "must lie in 1..3, got 0"),
    ErrorCase("target_high", {"targets": [1, 4]}, ValueError, r"must lie in 1..3, got 1\.\.4"),
    ErrorCase("target_count", {"targets": [1]}, ValueError, r"must have shape \[2\], got \[1\]"),
    ErrorCase("seen_high", {"seen_values": [1, 4], "seen_offsets": [0, 1, 2]}, ValueError, "0..3"),
    ErrorCase("offsets_count", {"seen_offsets": [0, 1]}, ValueError, r"\[3\], got \[2\]"),
    ErrorCase("offsets_fall", {"seen_offsets": [0, 2, 1]}, ValueError, "must rise"),
    ErrorCase("offsets_end", {"seen_offsets": [0, 1, 99]}, ValueError, "must rise from 0"),
    ErrorCase("width", {"user_states": torch.zeros(2, 3)}, ValueError, r"must be \[B, 2\], got"),
    ErrorCase("no_item", {"item_matrix": torch.zeros(1, 2)}, ValueError, "num_items >= 1"),
    ErrorCase("chunk", {"chunk": 0}, ValueError, "at least 1, got 0"),
    ErrorCase("item_tile", {"item_tile": 100}, ValueError, "multiple of 64, got 100"),
)

RANKING = OpSpec(
    name="count_ranks",
    public=count_ranks,
    reference=count_ranks_oracle,
    make_inputs=_inputs,
    shapes=SHAPES,
    shape_text="users, items, D",
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    options=(
        Options("default"),
        Options("repeats_count", lambda inputs: {"mask_repeats": False}),
        Options("tiles", lambda inputs: {"chunk": 7, "item_tile": 64}),
    ),
    tolerances={torch.float64: Tolerance(0, 0), torch.float32: Tolerance(0, 0)},
    fixed=frozenset({"seen_values", "seen_offsets"}),
    deciding=("user_states", "item_matrix"),
    errors=ERRORS,
    parallel_shapes=((300, 700, 48),),
    error_shape=(2, 3, 2),
    second_order=(),
)
