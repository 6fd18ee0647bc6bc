"""Record of :func:`padkern.ops.ranking.count_ranks`. A shape is (users, items, D).

Scores are small integers, exact in every dtype, so ranks must agree exactly, ties included.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from padkern.ops.ranking import count_ranks
from padkern.testing.mkmmd import Tolerance
from padkern.testing.opspec import Arguments, Case, ErrorCase, OpSpec, Options, RawOp, Shape

# Around the item tile of the options (64), panels of items (8, 12, 24 and 48 wide), strips (64) and
# blocks (256) of users, groups of columns (192), and searches of more than one stage.
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
    "panel_less_one": (9, 47, 3),
    "panel": (8, 48, 3),
    "panel_and_one": (7, 49, 3),
    "two_panels_and_one": (9, 97, 5),
    "strip_less_one": (63, 50, 3),
    "strip_and_one": (65, 50, 3),
    "no_column": (5, 9, 0),
    "group_of_columns": (9, 50, 192),
    "group_and_one": (9, 50, 193),
    "three_groups": (6, 50, 385),
    "wide": (5, 40, 200),
    "many_items": (20, 2000, 8),
    "many_users": (2100, 50, 4),
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
    at_most: int | None = None,
    order: Tensor | None = None,
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
        rank = 1 + float((others > own).sum()) + float((others == own).sum()) / 2
        ranks.append(rank if at_most is None or rank <= at_most else math.inf)
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
    ErrorCase("at_most", {"at_most": 0}, ValueError, "integer of at least 1, got 0"),
    ErrorCase("at_most_bool", {"at_most": True}, ValueError, "integer of at least 1, got True"),
    ErrorCase(
        "order_count", {"order": [1, 2]}, ValueError, r"permutation of 1..3, got shape \[2\]"
    ),
    ErrorCase("order_repeat", {"order": [1, 3, 3]}, ValueError, "permutation of 1..3"),
    ErrorCase("order_padding", {"order": [0, 1, 2]}, ValueError, "permutation of 1..3"),
    ErrorCase("integer", {"user_states": torch.zeros(2, 2).long()}, TypeError, "user_states"),
    ErrorCase("backend", {"backend": "fast"}, ValueError, "must be one of"),
)


def _shuffled(inputs: Arguments) -> Tensor:
    items = len(inputs["item_matrix"]) - 1
    return 1 + torch.from_numpy(np.random.default_rng(7).permutation(items))


def _pack(case: Case, backend: str) -> tuple[Any, ...]:
    return case.arguments["item_matrix"], case.arguments.get("order")


def _rank(case: Case, backend: str) -> tuple[Any, ...]:
    given = case.arguments
    packed = torch.ops.padkern.rank_pack_items.default(*_pack(case, backend))
    ids = (given["targets"], given["seen_values"], given["seen_offsets"])
    limits = (given.get("mask_repeats", True), 3, given.get("at_most") or 0)
    states, matrix = given["user_states"], given["item_matrix"]
    return states, matrix, *packed, given.get("order"), *ids, *limits


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
        Options("early", lambda inputs: {"at_most": 10}),
        Options("first", lambda inputs: {"at_most": 1, "mask_repeats": False}),
        Options("order", lambda inputs: {"order": _shuffled(inputs)}),
        Options("early_in_order", lambda inputs: {"at_most": 20, "order": _shuffled(inputs)}),
    ),
    tolerances={torch.float64: Tolerance(0, 0), torch.float32: Tolerance(0, 0)},
    backends=("reference", "native"),
    fixed=frozenset({"seen_values", "seen_offsets", "order"}),
    raw_ops=(
        RawOp(torch.ops.padkern.rank_pack_items.default, _pack),
        RawOp(torch.ops.padkern.rank_topk.default, _rank),
    ),
    heavy=frozenset({"many_users"}),
    deciding=("user_states", "item_matrix"),
    errors=ERRORS,
    parallel_shapes=((300, 700, 48), (40, 3000, 20)),
    check_shape=(5, 70, 3),
    far_shape=(70, 60, 3),
    error_shape=(2, 3, 2),
    second_order=(),
)
