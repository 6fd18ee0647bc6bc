"""Exact full-catalogue ranking by counting; see ``README.md`` for the definition."""

from __future__ import annotations

from padkern.ops.ranking.op import ItemTiles, TopItems, count_ranks, rank_chunk, top_k_items
from padkern.ops.ranking.reference import CHUNK, RankResult, rank_scores, ranks_from_scores

__all__ = [
    "CHUNK",
    "ItemTiles",
    "RankResult",
    "TopItems",
    "count_ranks",
    "rank_chunk",
    "rank_scores",
    "ranks_from_scores",
    "top_k_items",
]
