"""Exact full-catalogue ranking by counting; see ``README.md`` for the definition."""

from __future__ import annotations

from padkern.ops.ranking.reference import (
    ItemTiles,
    RankResult,
    count_ranks,
    rank_chunk,
    ranks_from_scores,
)

__all__ = ["ItemTiles", "RankResult", "count_ranks", "rank_chunk", "ranks_from_scores"]
