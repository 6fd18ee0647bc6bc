"""Public ranking functions, the registered ops under them, and the choice between backends.

``padkern::rank_pack_items`` and ``padkern::rank_topk`` are functional; ranks and ids have no
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from padkern import _backends
from padkern.ops.ranking import reference
from padkern.ops.ranking.reference import CHUNK, ITEM_TILE, IntArray, RankResult

define("padkern::rank_pack_items", "(Tensor item_matrix, Tensor? order) -> (Tensor, Tensor)")
define(
    "padkern::rank_topk",
    "(Tensor user_states, Tensor item_matrix, Tensor panels, Tensor largest, Tensor? order, "
    "Tensor? targets, Tensor seen_values, Tensor seen_offsets, bool mask_repeats, int top_k, "
    "int at_most) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@impl("padkern::rank_pack_items", "CPU")
def _pack_cpu(item_matrix: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    from padkern.ops.ranking.native import rank_pack_items_native

    return rank_pack_items_native(item_matrix, order)


@impl("padkern::rank_topk", "CPU")
def _topk_cpu(*args: Any) -> tuple[Tensor, ...]:
    from padkern.ops.ranking.native import rank_topk_native

    return rank_topk_native(*args)


def _pack_triton(item_matrix: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    from padkern.ops.ranking.triton_impl import rank_pack_items_triton

    return rank_pack_items_triton(item_matrix, order)


def _topk_triton(*args: Any) -> tuple[Tensor, ...]:
    from padkern.ops.ranking.triton_impl import rank_topk_triton

    return rank_topk_triton(*args)


impl("padkern::rank_pack_items", "CUDA")(_pack_triton)
impl("padkern::rank_topk", "CUDA")(_topk_triton)


@register_fake("padkern::rank_pack_items")
def _pack_fake(item_matrix: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    from padkern.ops.ranking.native import panel_width

    width = 1 if item_matrix.is_cuda else panel_width(item_matrix.dtype)
    panels = (item_matrix.shape[0] - 2) // width + 1
    return (
        item_matrix.new_empty(panels, item_matrix.shape[1], width),
        item_matrix.new_empty(()),
    )


@register_fake("padkern::rank_topk")
def _topk_fake(
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
) -> tuple[Tensor, ...]:
    users = user_states.shape[0]
    counted = 0 if targets is None else users
    return (
        user_states.new_empty(counted, dtype=torch.float64),
        *(user_states.new_empty(counted, dtype=torch.bool) for _ in range(3)),
        user_states.new_empty(counted, dtype=torch.int64),
        user_states.new_empty(users, top_k, dtype=torch.int64),
        user_states.new_empty(users, top_k),
    )


_PACK = torch.ops.padkern.rank_pack_items.default
_TOPK = torch.ops.padkern.rank_topk.default
#: Longest list of best items of the Triton backend.
MAX_TRITON_TOP_K = 128


def _runs(backend: str, x: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What packs and what ranks; Triton's interpreter takes tensors on the CPU, which the
    registered ops give to the native backend."""
    return (_pack_triton, _topk_triton) if backend == "triton" and x.is_cpu else (_PACK, _TOPK)


class TopItems(NamedTuple):
    """Best items per user.

    Attributes:
        ids: int64 ``[B, k]``, best first, equal scores in id order, 0 where there are no more.
        scores: ``[B, k]``, ``-inf`` where there are no more.
    """

    ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class ItemTiles:
    """The item matrix made ready once and used for every chunk of users.

    What a backend needs is made on its first use and kept. The matrix must not change meanwhile.

    Attributes:
        matrix: ``[N + 1, D]``, at least float32; row 0 is padding.
        item_tile: items per product of the reference.
        order: int64 ``[N]`` in which the native and Triton backends walk the items, or None for id
            order.
    """

    matrix: Tensor
    item_tile: int = ITEM_TILE
    order: Tensor | None = None
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_items(self) -> int:
        """N; the matrix has N + 1 rows."""
        return self.matrix.shape[0] - 1

    @staticmethod
    def build(
        item_matrix: Tensor, item_tile: int = ITEM_TILE, *, order: IntArray | None = None
    ) -> ItemTiles:
        """Check and keep ``item_matrix`` ``[N + 1, D]``; half precision is widened to float32.

        Raises:
            TypeError: item_matrix is not floating point.
            ValueError: wrong shape, item_tile no multiple of 64, or order no permutation of 1..N.
        """
        reference.check_items(item_matrix, item_tile)
        matrix = reference.at_least_float32(item_matrix, "item_matrix").detach()
        num_items = matrix.shape[0] - 1
        if order is not None:
            order = torch.as_tensor(order, dtype=torch.int64, device="cpu").contiguous()
            every = torch.arange(1, num_items + 1)
            if order.shape != every.shape or not torch.equal(order.sort().values, every):
                raise ValueError(
                    f"order must be a permutation of 1..{num_items}, got shape {list(order.shape)}"
                )
        return ItemTiles(matrix, item_tile, order)

    def _tiles(self) -> reference.ItemTiles:
        if "tiles" not in self._made:
            self._made["tiles"] = reference.ItemTiles.build(self.matrix, self.item_tile)
        return self._made["tiles"]

    def _packed(
        self, dtype: torch.dtype, backend: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The matrix in a dtype, its panels, its largest absolute value, and the order."""
        if (dtype, backend) not in self._made:
            matrix = self.matrix.to(dtype)
            order = None if self.order is None else self.order.to(matrix.device)
            packed = _runs(backend, matrix)[0](matrix, order)
            self._made[dtype, backend] = (matrix, *packed, order)
        return self._made[dtype, backend]


def _check_at_most(at_most: int | None) -> int:
    if at_most is None:
        return 0
    if isinstance(at_most, bool) or not isinstance(at_most, int) or at_most < 1:
        raise ValueError(f"at_most must be None or an integer of at least 1, got {at_most!r}")
    return at_most


def _check_states(user_states: Tensor, items: ItemTiles) -> Tensor:
    """The states, widened to the dtype that they share with the items."""
    dim = items.matrix.shape[1]
    states = reference.at_least_float32(user_states, "user_states")
    if states.ndim != 2 or states.shape[1] != dim:
        raise ValueError(f"user_states must be [B, {dim}], got {list(user_states.shape)}")
    return states.to(torch.promote_types(states.dtype, items.matrix.dtype))


def _choose(backend: str, states: Tensor, items: ItemTiles, top_k: int) -> str:
    def why_not_triton() -> str | None:
        if top_k > MAX_TRITON_TOP_K:
            return f"lists of best items must have at most {MAX_TRITON_TOP_K} places, got {top_k}"
        return _backends.why_not_triton(states, items.matrix)

    return _backends.choose_backend(
        backend,
        _backends.TRITON_BACKENDS,
        {
            "native": lambda: _backends.why_not_native(states, items.matrix),
            "triton": why_not_triton,
        },
        ("native",),
    )


def _rank(
    backend: str,
    states: Tensor,
    items: ItemTiles,
    ids: tuple[Tensor, Tensor, Tensor],
    mask_repeats: bool,
    top_k: int,
    at_most: int,
) -> RankResult:
    packed = items._packed(states.dtype, backend)
    ranks, tied, masked, nan_target, nan_others, top, _ = _runs(backend, states)[1](
        states.detach(), *packed, *ids, bool(mask_repeats), top_k, at_most
    )
    return RankResult(ranks, tied, masked, nan_target, nan_others, top if top_k else None)


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
    at_most: int | None = None,
    backend: str = "auto",
) -> RankResult:
    """Rank some users by inner product; see `count_ranks` for the arguments.

    Args:
        user_states: float ``[B, D]``; the reference scores all ``B`` rows in one product per tile.
        items: the item matrix from `ItemTiles.build`.
        top_k: also return this many best candidates per user (0: none).
    """
    limit = _check_at_most(at_most)
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, got {top_k}")
    states = _check_states(user_states, items)
    ids = reference.as_ids(targets, seen_values, seen_offsets, states.device)
    reference.check_ids(*ids, batch=states.shape[0], num_items=items.num_items)
    chosen = _choose(backend, states, items, top_k)
    if chosen != "reference":
        return _rank(chosen, states, items, ids, mask_repeats, top_k, limit)
    with torch.autocast(states.device.type, enabled=False):
        result = reference.rank_chunk(
            states, items._tiles(), *ids, mask_repeats=mask_repeats, top_k=top_k
        )
    return reference.capped(result, at_most)


@torch.no_grad()
def count_ranks(
    user_states: Tensor,
    item_matrix: Tensor,
    targets: IntArray,
    seen_values: IntArray,
    seen_offsets: IntArray,
    *,
    mask_repeats: bool = True,
    chunk: int = CHUNK,
    item_tile: int = ITEM_TILE,
    at_most: int | None = None,
    order: IntArray | None = None,
    backend: str = "auto",
) -> Tensor:
    """Ranks of the targets under ``score = <user state, item vector>``.

    No users x items matrix exists in any backend. A user's rank does not depend on how many others
    are asked for: the reference scores users in chunks of one size (the last one filled up by
    repeating its last row), the others add up every score in the same order wherever it stands, so
    that equal item vectors tie exactly.

    Args:
        user_states: float ``[B, D]``.
        item_matrix: float ``[N + 1, D]``, row 0 is padding.
        targets: int64 ``[B]`` in ``1..N``.
        seen_values: int64 ``[nnz]`` seen items of all users, in any order, repeats and 0 allowed.
        seen_offsets: int64 ``[B + 1]``; user b's seen items are
            ``seen_values[seen_offsets[b]:seen_offsets[b + 1]]``.
        mask_repeats: exclude seen items, and make a seen target a miss; False ranks every item.
        chunk: users per product of the reference.
        item_tile: items per product of the reference, a multiple of 64.
        at_most: return ranks above this as ``inf``, a miss at every cut-off up to it. All but the
            reference then stop scanning for a user whose rank is known to be above.
        order: permutation of ``1..N`` in which all but the reference walk the items; it changes no
            rank. With ``at_most``, popular items first let most users stop early.
        backend: "auto", "reference" (plain torch, any device), "native" (CPU) or "triton" (GPU; up
            to 128 best items). A named backend never falls back; "auto" may.

    Returns:
        float64 ``[B]``, 1 is best, half-integers possible; ``inf`` is a miss (seen target, NaN
        score of the target, or above ``at_most``).

    Raises:
        TypeError: an input is not floating point.
        ValueError: wrong shape, an id outside the catalogue, or another argument out of range.
        RuntimeError: the named backend cannot run; the message says why.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    limit = _check_at_most(at_most)
    items = ItemTiles.build(item_matrix, item_tile, order=order)
    states = _check_states(user_states, items)
    ids = reference.as_ids(targets, seen_values, seen_offsets, states.device)
    reference.check_ids(*ids, batch=states.shape[0], num_items=items.num_items)
    chosen = _choose(backend, states, items, 0)
    if chosen != "reference":
        return _rank(chosen, states, items, ids, mask_repeats, 0, limit).ranks
    with torch.autocast(states.device.type, enabled=False):
        ranks = reference.count_ranks(
            states, items._tiles(), *ids, mask_repeats=mask_repeats, chunk=chunk
        )
    return ranks if at_most is None else ranks.masked_fill(ranks > at_most, torch.inf)


@torch.no_grad()
def top_k_items(
    user_states: Tensor,
    item_matrix: Tensor | ItemTiles,
    k: int,
    seen_values: IntArray | None = None,
    seen_offsets: IntArray | None = None,
    *,
    backend: str = "auto",
) -> TopItems:
    """The ``k`` items with the highest inner products per user, without those seen.

    Exact, ties in id order; no users x items matrix exists. NaN and ``-inf`` scores are never among
    them.

    Args:
        user_states: float ``[B, D]``.
        item_matrix: float ``[N + 1, D]``, row 0 is padding and never returned; or the result of
            `ItemTiles.build`, made once for many calls.
        k: items per user, at least 1.
        seen_values, seen_offsets: items to leave out, as in `count_ranks`; both or neither.
        backend: as in `count_ranks`.

    Returns:
        The `TopItems`.

    Raises:
        TypeError: an input is not floating point.
        ValueError: wrong shape, k below 1, an id outside the catalogue.
        RuntimeError: the named backend cannot run; the message says why.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")
    if (seen_values is None) != (seen_offsets is None):
        raise ValueError("seen_values and seen_offsets must be given together")
    items = item_matrix if isinstance(item_matrix, ItemTiles) else ItemTiles.build(item_matrix)
    states = _check_states(user_states, items)
    batch = states.shape[0]
    if seen_values is None or seen_offsets is None:
        seen_values, seen_offsets = torch.zeros(0).long(), torch.zeros(batch + 1).long()
    some = torch.ones(batch, dtype=torch.int64)
    targets, values, offsets = reference.as_ids(some, seen_values, seen_offsets, states.device)
    reference.check_ids(targets, values, offsets, batch, items.num_items)
    chosen = _choose(backend, states, items, k)
    if chosen != "reference":
        packed = items._packed(states.dtype, chosen)
        run = _runs(chosen, states)[1]
        return TopItems(*run(states.detach(), *packed, None, values, offsets, True, k, 0)[5:])
    with torch.autocast(states.device.type, enabled=False):
        return TopItems(*reference.top_items(states, items._tiles(), k, values, offsets))
