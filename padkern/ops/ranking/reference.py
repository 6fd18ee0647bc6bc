"""Rank of one target item per user among the whole catalogue, by counting, never by sorting.

``rank = 1 + #greater + #equal / 2`` over the candidates; ``README.md`` derives the rule and states
what happens to seen items, NaN scores and ties. Plain torch on any device, float32 or float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

#: Users scored together. Fixed, so that a user's scores come from matrix products of one shape.
CHUNK = 256
#: Items per tile: 256 x 16384 float32 scores are 16 MiB, the largest block ever held.
ITEM_TILE = 16384
# The last tile is filled up to a multiple of this with zero vectors: matrix-product kernels treat
# odd edges in separate code, which may round the same dot product differently.
_ALIGN = 64

IntArray = Tensor | np.ndarray


@dataclass(frozen=True)
class RankResult:
    """Ranks of ``B`` targets and what was unusual about them.

    Attributes:
        ranks: float64 ``[B]``, 1 is best, half-integers possible, ``inf`` is a certain miss.
        tied: bool ``[B]``, another candidate has exactly the target's score.
        masked: bool ``[B]``, the target is in its user's seen list, hence a miss.
        nan_target: bool ``[B]``, the target is a candidate and its score is NaN, hence a miss.
        nan_others: int64 ``[B]``, number of other candidates with a NaN score.
        top: int64 ``[B, top_k]`` best candidates, ties in id order, 0 where there are no more
            candidates with a score above ``-inf``; None when not asked for.
    """

    ranks: Tensor
    tied: Tensor
    masked: Tensor
    nan_target: Tensor
    nan_others: Tensor
    top: Tensor | None


@dataclass(frozen=True)
class ItemTiles:
    """The item matrix cut into tiles of one shape, made once and used for every chunk of users.

    Attributes:
        tiles: float tensors ``[width, D]``, all ``item_tile`` wide; the last one may be narrower.
        num_items: N, the matrix has N + 1 rows, row 0 is padding.
    """

    tiles: tuple[Tensor, ...]
    num_items: int

    @staticmethod
    def build(item_matrix: Tensor, item_tile: int = ITEM_TILE) -> ItemTiles:
        """Cut ``item_matrix`` ``[N + 1, D]``; half precision is widened to float32."""
        check_items(item_matrix, item_tile)
        matrix = at_least_float32(item_matrix, "item_matrix")
        rows = matrix.shape[0]
        fill = -rows % _ALIGN
        if fill:
            matrix = torch.cat([matrix, matrix.new_zeros(fill, matrix.shape[1])])
        return ItemTiles(tuple(matrix.contiguous().split(item_tile)), rows - 1)


def check_items(item_matrix: Tensor, item_tile: int) -> None:
    """Raises ValueError for a shape or a tile size that cannot be."""
    if item_matrix.ndim != 2 or item_matrix.shape[0] < 2:
        raise ValueError(
            f"item_matrix must be [num_items + 1, D] with num_items >= 1, "
            f"got {list(item_matrix.shape)}"
        )
    if item_tile < _ALIGN or item_tile % _ALIGN:
        raise ValueError(f"item_tile must be a positive multiple of {_ALIGN}, got {item_tile}")


def at_least_float32(x: Tensor, name: str = "scores") -> Tensor:
    """Half precision widened; TypeError for what is no floating-point tensor."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_ids(
    targets: Tensor, seen_values: Tensor, seen_offsets: Tensor, batch: int, num_items: int
) -> None:
    """Raises ValueError for wrong shapes, ids outside the catalogue and offsets that fall."""
    if targets.shape != (batch,):
        raise ValueError(f"targets must have shape [{batch}], got {list(targets.shape)}")
    if seen_offsets.shape != (batch + 1,):
        raise ValueError(
            f"seen_offsets must have shape [{batch + 1}], got {list(seen_offsets.shape)}"
        )
    if batch == 0:
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 1 or high > num_items:
        raise ValueError(f"targets must lie in 1..{num_items}, got {low}..{high}")
    if (
        int(seen_offsets[0]) != 0
        or int(seen_offsets[-1]) != seen_values.numel()
        or bool((seen_offsets[1:] < seen_offsets[:-1]).any())
    ):
        raise ValueError(
            f"seen_offsets must rise from 0 to len(seen_values) = {seen_values.numel()}"
        )
    if seen_values.numel():
        low, high = int(seen_values.min()), int(seen_values.max())
        if low < 0 or high > num_items:
            raise ValueError(f"seen_values must lie in 0..{num_items}, got {low}..{high}")


def _seen(seen_values: Tensor, seen_offsets: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Row index of every seen entry, and whether each row's target is among its entries."""
    lengths = seen_offsets[1:] - seen_offsets[:-1]
    rows = torch.repeat_interleave(
        torch.arange(targets.numel(), device=targets.device), lengths, output_size=len(seen_values)
    )
    masked = torch.zeros(targets.numel(), dtype=torch.bool, device=targets.device)
    masked[rows[seen_values == targets[rows]]] = True
    return rows, masked


def _merge_top(
    best: tuple[Tensor, Tensor] | None, scores: Tensor, start: int, k: int
) -> tuple[Tensor, Tensor]:
    """Running top ``k`` of (values, ids); equal scores keep the lower id."""
    scores = scores.masked_fill(scores.isnan(), -torch.inf)  # topk would put NaN first
    take = min(k, scores.shape[1])
    values, ids = scores.topk(take, dim=1)
    # topk leaves the choice among equal scores open; redo the few rows cut inside a tie.
    cut = values[:, -1:]
    open_rows = ((scores >= cut).sum(1) > take) & (cut[:, 0] > -torch.inf)
    if bool(open_rows.any()):
        full_values, full_ids = scores[open_rows].sort(dim=1, descending=True, stable=True)
        values[open_rows], ids[open_rows] = full_values[:, :take], full_ids[:, :take]
    ids, order = ids.sort(dim=1)
    values, ids = values.gather(1, order), ids + start
    if best is not None:  # earlier tiles hold lower ids, so a stable sort keeps the id order
        values, ids = torch.cat([best[0], values], 1), torch.cat([best[1], ids], 1)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, order)[:, :k]


def _rank_tiles(
    tiles: Iterable[tuple[int, Tensor]],
    target_scores: Tensor,
    targets: Tensor,
    seen_values: Tensor,
    seen_offsets: Tensor,
    mask_repeats: bool,
    top_k: int,
) -> RankResult:
    """Count over score tiles ``(first item id, scores [B, width])``; the tiles are overwritten."""
    batch, device = targets.numel(), targets.device
    rows, masked = _seen(seen_values, seen_offsets, targets)
    if not mask_repeats:
        rows, seen_values, masked = rows[:0], seen_values[:0], torch.zeros_like(masked)
    every = torch.arange(batch, device=device)
    greater = torch.zeros(batch, dtype=torch.int64, device=device)
    equal, nan_others = torch.zeros_like(greater), torch.zeros_like(greater)
    cut = target_scores[:, None]
    best: tuple[Tensor, Tensor] | None = None
    for start, scores in tiles:
        stop = start + scores.shape[1]
        inside = (seen_values >= start) & (seen_values < stop)
        own = (targets >= start) & (targets < stop)
        gone_rows = torch.cat([rows[inside], every[own]])
        gone = (gone_rows, torch.cat([seen_values[inside], targets[own]]) - start)
        # A finite sum proves that the tile has no NaN; only otherwise is it searched.
        if not bool(torch.isfinite(scores.sum())):
            nans = scores.isnan()
            nans[gone] = False
            if start == 0:
                nans[:, 0] = False
            nan_others += nans.sum(1)
        # NaN marks what is no candidate: it is neither greater than nor equal to anything, which
        # no finite mark and no infinity can promise.
        if start == 0:
            scores[:, 0] = torch.nan
        scores[rows[inside], seen_values[inside] - start] = torch.nan
        if top_k:
            best = _merge_top(best, scores, start, top_k)
        scores[gone] = torch.nan
        greater += (scores > cut).sum(1)
        equal += (scores == cut).sum(1)
    nan_target = target_scores.isnan() & ~masked
    ranks = 1.0 + greater.double() + 0.5 * equal.double()
    ranks[masked | nan_target] = torch.inf
    top = None
    if top_k and best is not None:
        values, ids = best
        top = torch.zeros(batch, top_k, dtype=torch.int64, device=device)
        top[:, : ids.shape[1]] = ids.masked_fill(values == -torch.inf, 0)
    return RankResult(
        ranks, (equal > 0) & ~masked & ~nan_target, masked, nan_target, nan_others, top
    )


def as_ids(
    targets: IntArray, seen_values: IntArray, seen_offsets: IntArray, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The three as int64 tensors on a device."""

    def convert(ids: IntArray) -> Tensor:
        return torch.as_tensor(ids, dtype=torch.int64, device=device)

    return convert(targets), convert(seen_values), convert(seen_offsets)


@torch.no_grad()
def ranks_from_scores(
    scores: Tensor,
    targets: IntArray,
    seen_values: IntArray,
    seen_offsets: IntArray,
    *,
    mask_repeats: bool = True,
) -> Tensor:
    """Ranks of the targets in given scores.

    Args:
        scores: float ``[B, N + 1]``; column 0 is padding and never ranked.
        targets: int64 ``[B]`` in ``1..N``.
        seen_values: int64 ``[nnz]`` seen items of all rows, repeats and 0 allowed.
        seen_offsets: int64 ``[B + 1]``; row b's seen items are
            ``seen_values[seen_offsets[b]:seen_offsets[b + 1]]``.
        mask_repeats: exclude seen items, and make a seen target a miss; False ranks every item.

    Returns:
        float64 ``[B]``; ``inf`` is a miss (seen target, or NaN score of the target).

    Raises:
        TypeError: scores are not floating point.
        ValueError: wrong shape, or an id outside the catalogue.
    """
    return rank_scores(scores, targets, seen_values, seen_offsets, mask_repeats=mask_repeats).ranks


@torch.no_grad()
def rank_scores(
    scores: Tensor,
    targets: IntArray,
    seen_values: IntArray,
    seen_offsets: IntArray,
    *,
    mask_repeats: bool = True,
    top_k: int = 0,
) -> RankResult:
    """`ranks_from_scores` with flags and, on request, the ``top_k`` best candidates."""
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(
            f"scores must be [B, num_items + 1] with num_items >= 1, got {list(scores.shape)}"
        )
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}")
    work = at_least_float32(scores).clone()
    ids = as_ids(targets, seen_values, seen_offsets, scores.device)
    check_ids(*ids, batch=scores.shape[0], num_items=scores.shape[1] - 1)
    target_scores = work.gather(1, ids[0][:, None])[:, 0]
    return _rank_tiles([(0, work)], target_scores, *ids, mask_repeats, top_k)


@torch.no_grad()
def rank_chunk(
    user_states: Tensor,
    items: ItemTiles,
    targets: IntArray,
    seen_values: IntArray,
    seen_offsets: IntArray,
    *,
    mask_repeats: bool = True,
    top_k: int = 0,
) -> RankResult:
    """Rank one chunk of users by inner product, all of them in one product per tile."""
    states = at_least_float32(user_states, "user_states")
    if states.ndim != 2 or states.shape[1] != items.tiles[0].shape[1]:
        raise ValueError(
            f"user_states must be [B, {items.tiles[0].shape[1]}], got {list(user_states.shape)}"
        )
    ids = as_ids(targets, seen_values, seen_offsets, states.device)
    check_ids(*ids, batch=states.shape[0], num_items=items.num_items)
    dtype = torch.promote_types(states.dtype, items.tiles[0].dtype)
    states = states.to(dtype)
    columns = items.num_items + 1

    def score(tile: Tensor) -> Tensor:
        return states @ tile.to(dtype).T

    if len(items.tiles) == 1:
        first = score(items.tiles[0])[:, :columns]
        target_scores = first.gather(1, ids[0][:, None])[:, 0]
        return _rank_tiles([(0, first)], target_scores, *ids, mask_repeats, top_k)

    # The targets' scores are needed before the first tile is counted. They come from products of
    # the very shape of the tiles, so that equal vectors keep equal scores.
    width = items.tiles[0].shape[0]
    target_scores = torch.empty(len(states), dtype=dtype, device=states.device)
    for low in range(0, len(states), width):
        part = ids[0][low : low + width]
        block = items.tiles[0].new_zeros(width, states.shape[1])
        for number, tile in enumerate(items.tiles):
            hit = (part // width == number).nonzero()[:, 0]
            block[hit] = tile[part[hit] - number * width]
        target_scores[low : low + width] = score(block)[low : low + width].diagonal()
    tiles = ((n * width, score(t)[:, : columns - n * width]) for n, t in enumerate(items.tiles))
    return _rank_tiles(tiles, target_scores, *ids, mask_repeats, top_k)


def capped(result: RankResult, at_most: int | None) -> RankResult:
    """The result with ranks above ``at_most`` made infinite."""
    if at_most is None:
        return result
    ranks = result.ranks.masked_fill(result.ranks > at_most, torch.inf)
    return replace(result, ranks=ranks, tied=result.tied & ranks.isfinite())


@torch.no_grad()
def top_items(
    user_states: Tensor,
    items: ItemTiles,
    k: int,
    seen_values: Tensor,
    seen_offsets: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Ids and scores of the ``k`` best unseen items; 0 and ``-inf`` where there are no more.

    The arguments are those of `padkern.ops.ranking.top_k_items`, checked, of one dtype.
    """
    width, columns = items.tiles[0].shape[0], items.num_items + 1
    ids = torch.zeros(len(user_states), k, dtype=torch.int64, device=user_states.device)
    values = torch.full(ids.shape, -torch.inf, dtype=user_states.dtype, device=ids.device)
    for low in range(0, len(user_states), chunk):
        states = user_states[low : low + chunk]
        offsets = seen_offsets[low : low + len(states) + 1]
        seen = seen_values[offsets[0] : offsets[-1]]
        rows = torch.repeat_interleave(
            torch.arange(len(states), device=ids.device), offsets[1:] - offsets[:-1]
        )
        best: tuple[Tensor, Tensor] | None = None
        for number, tile in enumerate(items.tiles):
            start = number * width
            scores = (states @ tile.to(states.dtype).T)[:, : columns - start]
            inside = (seen >= start) & (seen < start + scores.shape[1])
            scores[rows[inside], seen[inside] - start] = torch.nan
            if start == 0:
                scores[:, 0] = torch.nan
            best = _merge_top(best, scores, start, k)
        assert best is not None
        found = best[0].shape[1]
        values[low : low + chunk, :found] = best[0]
        ids[low : low + chunk, :found] = best[1].masked_fill(best[0] == -torch.inf, 0)
    return ids, values


@torch.no_grad()
def count_ranks(
    user_states: Tensor,
    items: ItemTiles,
    targets: Tensor,
    seen_values: Tensor,
    seen_offsets: Tensor,
    *,
    mask_repeats: bool = True,
    chunk: int = CHUNK,
) -> Tensor:
    """Float64 ranks ``[B]``; the arguments of `padkern.ops.ranking.count_ranks`, checked.

    Users are scored in chunks of exactly ``chunk`` rows (the last one filled up by repeating its
    last row), items in tiles, so one ``[chunk, item_tile]`` block is the largest thing held and a
    user's rank does not depend on how many others are asked for.
    """
    batch = user_states.shape[0]
    ranks = torch.empty(batch, dtype=torch.float64, device=user_states.device)
    for low in range(0, batch, chunk):
        real = min(chunk, batch - low)
        index = torch.arange(low, low + chunk, device=targets.device).clamp_(max=batch - 1)
        begin, end = seen_offsets[low], seen_offsets[low + real]
        local = seen_offsets[low : low + real + 1] - begin
        # The filled-up rows have an empty seen list: their ranks are dropped.
        local = torch.cat([local, local[-1:].expand(chunk - real)])
        seen = (seen_values[begin:end], local)
        result = rank_chunk(
            user_states[index], items, targets[index], *seen, mask_repeats=mask_repeats
        )
        ranks[low : low + real] = result.ranks[:real]
    return ranks
