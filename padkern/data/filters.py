"""Filters over an interactions table, in one fixed order."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

__all__ = ["Filters", "apply_filters", "distinct"]


class Filters(BaseModel):
    """Which interactions to keep; nothing is dropped by default.

    They run in the order of the fields, each on what the one before left:

    Attributes:
        min_rating: drop interactions rated lower (needs a rating column).
        first_only: keep a user's first interaction with each item.
        drop_consecutive_repeats: of a run of the same item keep the first interaction.
        k_core: keep only users and items with at least this many interactions, repeated until
            nothing changes.
        user_core: the same bound for users alone; takes the place of ``k_core`` for them.
        item_core: the same bound for items alone; takes the place of ``k_core`` for them.
        min_user_length: drop shorter users, once; items are not looked at again.
        keep_last: keep each user's last interactions, this many.
        cut_above: with ``keep_last``, leave users of at most this many interactions whole.
        max_users: keep the first users in file order, this many.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_rating: float | None = Field(default=None, allow_inf_nan=False)
    first_only: bool = False
    drop_consecutive_repeats: bool = False
    k_core: int | None = Field(default=None, ge=1)
    user_core: int | None = Field(default=None, ge=1)
    item_core: int | None = Field(default=None, ge=1)
    min_user_length: int | None = Field(default=None, ge=1)
    keep_last: int | None = Field(default=None, ge=1)
    cut_above: int | None = Field(default=None, ge=1)
    max_users: int | None = Field(default=None, ge=1)

    @field_validator("cut_above")
    @classmethod
    def _needs_a_length(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("keep_last") is None:
            raise ValueError("cut_above needs keep_last")
        return value


def apply_filters(
    users: np.ndarray, items: np.ndarray, ratings: np.ndarray | None, filters: Filters
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Choose the interactions that remain.

    Args:
        users: integer ``[nnz]`` codes in file order of the users, sorted (rows of a user together,
            oldest first).
        items: integer ``[nnz]`` codes.
        ratings: float ``[nnz]`` or None.
        filters: what to apply.

    Returns:
        Positions that remain (int64, rising), and one JSON-serialisable record per filter with the
        interactions, users and items it dropped.

    Raises:
        ValueError: if ``min_rating`` is set and there are no ratings.
    """
    keep = np.arange(users.size, dtype=np.int64)
    steps: list[dict[str, Any]] = []

    def step(name: str, value: Any, mask: np.ndarray, **extra: int) -> None:
        nonlocal keep
        after = keep[mask]
        steps.append(
            {
                "filter": name,
                "value": value,
                "dropped_interactions": int(keep.size - after.size),
                "dropped_users": distinct(users[keep]) - distinct(users[after]),
                "dropped_items": distinct(items[keep]) - distinct(items[after]),
                **extra,
            }
        )
        keep = after

    if filters.min_rating is not None:
        if ratings is None:
            raise ValueError("min_rating needs ratings")
        step("min_rating", filters.min_rating, ratings[keep] >= filters.min_rating)
    if filters.first_only:
        step("first_only", True, _first_only(users[keep], items[keep]))
    if filters.drop_consecutive_repeats:
        u, i = users[keep], items[keep]
        again = np.zeros(keep.size, dtype=bool)
        again[1:] = (u[1:] == u[:-1]) & (i[1:] == i[:-1])
        step("drop_consecutive_repeats", True, ~again)
    user_core = filters.user_core or filters.k_core or 1
    item_core = filters.item_core or filters.k_core or 1
    if max(user_core, item_core) > 1:
        mask, rounds = _core(users[keep], items[keep], user_core, item_core)
        step("k_core", {"users": user_core, "items": item_core}, mask, rounds=rounds)
    if filters.min_user_length is not None:
        u = users[keep]
        enough = np.bincount(u) >= filters.min_user_length
        step("min_user_length", filters.min_user_length, enough[u])
    if filters.keep_last is not None:
        u = users[keep]
        from_end = np.searchsorted(u, u, side="right") - np.arange(u.size)
        last = from_end <= filters.keep_last
        if filters.cut_above is None:
            step("keep_last", filters.keep_last, last)
        else:
            short = (np.bincount(u) <= filters.cut_above)[u]
            value = {"keep_last": filters.keep_last, "cut_above": filters.cut_above}
            step("keep_last", value, last | short)
    if filters.max_users is not None:
        _, rank = np.unique(users[keep], return_inverse=True)
        step("max_users", filters.max_users, rank < filters.max_users)
    return keep, steps


def distinct(values: np.ndarray) -> int:
    """Number of different codes (integers from 0)."""
    return int(np.count_nonzero(np.bincount(values)))


def _first_only(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    key = users.astype(np.int64) * (int(items.max(initial=0)) + 1) + items
    first = np.zeros(key.size, dtype=bool)
    first[np.unique(key, return_index=True)[1]] = True
    return first


def _core(
    users: np.ndarray, items: np.ndarray, user_core: int, item_core: int
) -> tuple[np.ndarray, int]:
    mask = np.ones(users.size, dtype=bool)
    rounds = 0
    while True:
        rounds += 1
        before = int(mask.sum())
        mask &= (np.bincount(users[mask], minlength=1 + users.max(initial=0)) >= user_core)[users]
        mask &= (np.bincount(items[mask], minlength=1 + items.max(initial=0)) >= item_core)[items]
        if int(mask.sum()) == before:
            return mask, rounds
