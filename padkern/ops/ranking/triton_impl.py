"""Launchers of the Triton backend: lists of masked positions, stages, merged results.

They run on the current stream of the tensors' device and read no value on the host; counts are
integers and lists of best items merge by a strict order, so no cut of the work changes a result.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from padkern.ops.ranking.common import check_arguments
from padkern.ops.ranking.triton_kernels import rank_kernel, target_kernel
from padkern.ops.triton_interpreter import INTERPRET, guard

#: Longest list of best items: it stays in registers.
MAX_TOP_K = 128
# Columns added up in one go; as in csrc/ranking/ranking_kernel.h.
_DEPTH = 192
_BLOCK_U, _BLOCK_N, _BLOCK_K, _WARPS = 64, 128, 16, 8
# Programs that keep a device busy, counted alike for every device.
_PROGRAMS = 264
# Positions of the first stage of a search that may end early; every other one is as long as all
# before it.
_FIRST = 2 * _BLOCK_N


def rank_pack_items_triton(item_matrix: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows ``[N, D, 1]`` of the items in the order of the walk, and their largest absolute value;
    that is not finite where one of them is not."""
    items = item_matrix.detach()[1:]
    rows = items.clone() if order is None else items.index_select(0, order - 1)
    largest = items.abs().amax() if items.numel() else items.new_zeros(())
    return rows.contiguous()[:, :, None], largest


class _Masks(NamedTuple):
    """Positions of the walk, from 0 to N - 1; N stands for padding.

    Attributes:
        lists: Positions of all users' seen items, ascending within each user.
        offsets: int64 ``[users + 1]`` of ``lists``.
        own: int32 ``[users]`` position of the target; -1 where it is masked.
        place: int32 ``[users]`` position of the target.
        masked: bool ``[users]``, the target is among the seen items.
    """

    lists: Tensor
    offsets: Tensor
    own: Tensor
    place: Tensor
    masked: Tensor


def _masks(
    users: int,
    items: int,
    order: Tensor | None,
    targets: Tensor | None,
    seen_values: Tensor,
    seen_offsets: Tensor,
) -> _Masks:
    device = seen_offsets.device
    position = torch.arange(-1, items, device=device)
    if order is not None:
        walk = torch.arange(items, device=device)
        position = torch.empty_like(position).scatter_(0, order, walk)
    position[0] = items
    every = torch.arange(users, device=device)
    rows = torch.repeat_interleave(every, seen_offsets.diff(), output_size=seen_values.numel())
    keys = (rows * (items + 1) + position[seen_values]).sort().values
    place = every if targets is None else position[targets]
    masked = torch.zeros(users, dtype=torch.bool, device=device)
    if keys.numel():
        wanted = every * (items + 1) + place
        found = torch.searchsorted(keys, wanted).clamp_(max=keys.numel() - 1)
        masked = keys[found] == wanted
    own = place.masked_fill(masked, -1).to(torch.int32)
    lists = (keys % (items + 1)).to(torch.int32)
    return _Masks(lists, seen_offsets.contiguous(), own, place.to(torch.int32), masked)


def _stages(items: int, early: bool) -> list[tuple[int, int]]:
    """Positions that are walked before users are sorted out again."""
    if not early:
        return [(0, items)]
    cuts = [0]
    while cuts[-1] < items:
        cuts.append(min(items, max(_FIRST, 2 * cuts[-1])))
    return list(pairwise(cuts))


def _parts(blocks: int, positions: int) -> tuple[int, int]:
    """Number of parts of a stage and their length, whole tiles of items."""
    tiles = -(-positions // _BLOCK_N)
    parts = max(1, min(-(-_PROGRAMS // blocks), tiles))
    length = -(-tiles // parts) * _BLOCK_N
    return -(-positions // length), length


def _merge(best: Tensor, ids: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The best of the parts' lists ``[parts, users, width]``: scores fall, equal ones by id."""
    best, ids = (x.transpose(0, 1).flatten(1) for x in (best, ids))
    ids, order = ids.sort(dim=1, stable=True)
    # Adding 0 makes one number of the two zeros, which a sort by bits would tell apart.
    best, order = (best.gather(1, order) + 0.0).sort(dim=1, descending=True, stable=True)
    best, ids = best[:, :top_k], ids.gather(1, order)[:, :top_k].long()
    return ids.masked_fill(best == -torch.inf, 0), best


def rank_topk_triton(
    user_states: Tensor,
    item_matrix: Tensor,
    panels: Tensor,
    largest: Tensor,
    order: Tensor | None,
    targets: Tensor | None,
    seen_values: Tensor,
    seen_offsets: Tensor,
    mask_repeats: bool,
    top_k: int,
    at_most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ranks, tied, masked, nan_target, nan_others, best ids and their scores."""
    check_arguments(1, user_states, item_matrix, panels, largest, order, targets, seen_offsets)
    if top_k > MAX_TOP_K:
        raise ValueError(f"top_k must be at most {MAX_TOP_K}, got {top_k}")
    states = user_states.detach()
    with guard(states):
        return _Run(states, panels, largest, order, top_k, at_most).ranks(
            targets, seen_values, seen_offsets, mask_repeats
        )


class _Run:
    """One call: users, items and tiles."""

    def __init__(
        self,
        states: Tensor,
        panels: Tensor,
        largest: Tensor,
        order: Tensor | None,
        top_k: int,
        at_most: int,
    ) -> None:
        self.states, self.top_k, self.at_most = states, top_k, at_most
        self.order = None if order is None else order.contiguous()
        self.items = panels.contiguous()
        self.users, self.dim = states.shape
        self.number = panels.shape[0]
        self.blocks = -(-self.users // _BLOCK_U)
        self.groups = max(1, -(-self.dim // _DEPTH))
        self.width = triton.next_power_of_2(top_k) if top_k else 0
        acc = tl.float64 if states.dtype == torch.float64 else tl.float32
        self.tile = (_BLOCK_U, _BLOCK_N, _BLOCK_K, acc, INTERPRET)
        sizes = states.abs().amax(1) if states.numel() else states.new_zeros(self.users)
        bound = 2.0 * (self.dim + 1) * sizes.double() * largest.double()
        # Sums that stay below the largest number cannot become NaN; a NaN fails the comparison.
        self.wild = ~(bound < torch.finfo(states.dtype).max)

    def _new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.states.device)

    def _target_scores(self, masks: _Masks) -> Tensor:
        scores = self._new(self.users, dtype=self.states.dtype)
        target_kernel[(self.blocks,)](
            self.states,
            *self.states.stride(),
            self.items,
            masks.place,
            scores,
            self.users,
            self.dim,
            self.groups,
            *self.tile,
            num_warps=_WARPS,
        )
        return scores

    def _stage(
        self,
        span: tuple[int, int],
        masks: _Masks,
        scores: Tensor,
        wanted: Tensor,
        before: Tensor,
        counting: bool,
        early: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Counts ``[3, users]``, and the parts' lists, of the wanted users in a stage."""
        parts, length = _parts(self.blocks, span[1] - span[0])
        counts = self._new(parts, 3, self.users if counting else 0, dtype=torch.int32)
        lists = (parts, self.users if self.width else 0, max(self.width, 1))
        best = torch.full(lists, -torch.inf, dtype=self.states.dtype, device=self.states.device)
        best_id = self._new(*lists, dtype=torch.int32)
        active = wanted.logical_not().sort(stable=True).indices.to(torch.int32)
        rank_kernel[(self.blocks * parts,)](
            self.states,
            *self.states.stride(),
            self.items,
            masks.lists if self.order is None else self.order,
            active,
            wanted.sum(dtype=torch.int32),
            scores,
            masks.own,
            masks.lists,
            masks.offsets,
            self.wild,
            before,
            counts,
            best,
            best_id,
            self.users,
            self.blocks,
            self.dim,
            self.groups,
            *span,
            length,
            masks.lists.numel().bit_length(),
            self.at_most,
            self.top_k,
            counting,
            early,
            self.order is not None,
            self.width,
            *self.tile,
            num_warps=_WARPS,
        )
        return counts.sum(0), best, best_id

    def ranks(
        self,
        targets: Tensor | None,
        seen_values: Tensor,
        seen_offsets: Tensor,
        mask_repeats: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The results of ``rank_topk_triton``."""
        counted = 0 if targets is None else self.users
        if self.users == 0:
            best = self.states.new_empty(0, self.top_k)
            nothing = self._new(0, dtype=torch.bool)
            count = self._new(0, dtype=torch.int64)
            return (
                count.double(),
                nothing,
                nothing.clone(),
                nothing.clone(),
                count,
                best.long(),
                best,
            )
        if not mask_repeats:
            seen_values, seen_offsets = seen_values[:0], torch.zeros_like(seen_offsets)
        masks = _masks(self.users, self.number, self.order, targets, seen_values, seen_offsets)
        counting, listing = targets is not None, self.width > 0
        early = self.at_most > 0 and counting and not listing
        scores = self._target_scores(masks) if counting else self.states.new_zeros(1)
        # A masked target is a miss whatever the others score; only NaN scores remain to be counted.
        wanted = self.wild | ~masks.masked
        if listing:
            wanted = torch.ones_like(wanted)
        sums = self._new(3, counted, dtype=torch.int64)
        before = self._new(self.users, dtype=torch.int64)
        for span in _stages(self.number, early):
            counts, best, best_id = self._stage(
                span, masks, scores, wanted, before, counting, early
            )
            sums += counts
            if early:
                before = 2 * sums[0] + sums[1]
                wanted = wanted & (self.wild | (before <= 2 * self.at_most - 2))
        top = self._new(self.users, 0, dtype=torch.int64), self.states.new_zeros(self.users, 0)
        if listing:
            top = _merge(best, best_id, self.top_k)
        if not counting:
            flags = (self._new(0, dtype=torch.bool) for _ in range(3))
            return sums[0].double(), *flags, sums[2], *top  # type: ignore[return-value]
        lost = scores.isnan() & ~masks.masked
        ranks = 1.0 + sums[0].double() + 0.5 * sums[1].double()
        missed = masks.masked | lost
        if self.at_most:
            missed = missed | (ranks > self.at_most)
        ranks = ranks.masked_fill(missed, torch.inf)
        tied = (sums[1] > 0) & ~missed
        return ranks, tied, masks.masked, lost, sums[2], *top
