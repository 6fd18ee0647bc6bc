"""Triton kernels of exact ranking: tiles of scores, counts, best items. See ``README.md``.

A score is added up column by column, in groups that follow from the number of columns alone, for
every place in every tile and for the targets too: equal vectors tie exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

# No list holds it: the place beyond the end of a list of masked positions.
NO_POSITION = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _scores(
    users_ptr,
    stride_user,
    stride_column,
    user,
    user_exists,
    items_ptr,
    item,
    item_exists,
    dim,
    groups,
    BLOCK_U: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """[BLOCK_U, BLOCK_N] inner products of rows ``user`` of the states and ``item`` of the items.

    No tensor cores for float32: their products round more. The interpreter's products may add up in
    another order in another place, so there the columns are added one by one.
    """
    left = users_ptr + user.to(tl.int64)[:, None] * stride_user
    right = items_ptr + item.to(tl.int64)[:, None] * dim
    total = tl.zeros([BLOCK_U, BLOCK_N], ACC)
    for group in range(0, groups):
        first = (dim * group) // groups
        last = (dim * (group + 1)) // groups
        part = tl.zeros([BLOCK_U, BLOCK_N], ACC)
        if INTERPRET:
            for k in range(first, last):
                u = tl.load(left + k * stride_column, mask=user_exists[:, None], other=0)
                v = tl.load(right + k, mask=item_exists[:, None], other=0)
                part += u * tl.trans(v)
        else:
            for k in range(first, last, BLOCK_K):
                column = k + tl.arange(0, BLOCK_K)[None, :]
                here = column < last
                u = tl.load(
                    left + column.to(tl.int64) * stride_column,
                    mask=user_exists[:, None] & here,
                    other=0,
                )
                v = tl.load(right + column, mask=item_exists[:, None] & here, other=0)
                part = tl.dot(u, tl.trans(v), part, input_precision="ieee", out_dtype=ACC)
        total += part
    return total


@triton.jit
def target_kernel(
    users_ptr,
    stride_user,
    stride_column,
    items_ptr,
    position_ptr,
    score_ptr,
    users,
    dim,
    groups,
    BLOCK_U: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Scores of the targets: the diagonal of a tile like every other. Grid: (user blocks,)."""
    row = tl.arange(0, BLOCK_U)
    user = tl.program_id(0) * BLOCK_U + row
    column = tl.arange(0, BLOCK_N)
    other = tl.program_id(0) * BLOCK_U + column
    exists = (column < BLOCK_U) & (other < users)
    position = tl.load(position_ptr + other, mask=exists, other=0)
    scores = _scores(
        users_ptr, stride_user, stride_column, user, user < users, items_ptr, position, exists,
        dim, groups, BLOCK_U, BLOCK_N, BLOCK_K, ACC, INTERPRET,
    )  # fmt: skip
    own = tl.sum(tl.where(row[:, None] == column[None, :], scores, 0.0), 1)
    tl.store(score_ptr + user, own, mask=user < users)


@triton.jit
def _first_at(list_ptr, begin, end, position, steps):
    """Place of the first entry of each list that is not below a position."""
    low = begin
    high = end
    for _ in range(0, steps):
        middle = (low + high) // 2
        open_ = low < high
        entry = tl.load(list_ptr + middle, mask=open_, other=NO_POSITION)
        low = tl.where(open_ & (entry < position), middle + 1, low)
        high = tl.where(open_ & (entry >= position), middle, high)
    return low


@triton.jit
def _worst(best, best_id):
    score = tl.min(best, 1)
    return score, tl.max(tl.where(best == score[:, None], best_id, -1), 1)


@triton.jit
def _leader(scores, ids):
    score = tl.max(scores, 1)
    return score, tl.min(tl.where(scores == score[:, None], ids, NO_POSITION), 1)


@triton.jit
def _is_better(score, id, worst, worst_id):
    better = (score > worst) | ((score == worst) & (id < worst_id))
    return better & (score > float("-inf"))


@triton.jit
def _insert(scores, ids, best, best_id):
    """Puts what belongs there into the lists of the best, one candidate of each row at a time.

    A score and its id are a strict order, so the result is one set, whatever came first.
    """
    worst, worst_id = _worst(best, best_id)
    score, id = _leader(scores, ids)
    better = _is_better(score, id, worst, worst_id)
    while tl.max(better.to(tl.int32), 0) != 0:
        place = (best == worst[:, None]) & (best_id == worst_id[:, None]) & better[:, None]
        best = tl.where(place, score[:, None], best)
        best_id = tl.where(place, id[:, None], best_id)
        scores = tl.where(ids == id[:, None], float("-inf"), scores)
        worst, worst_id = _worst(best, best_id)
        score, id = _leader(scores, ids)
        better = _is_better(score, id, worst, worst_id)
    return best, best_id


@triton.jit(do_not_specialize=["first", "last", "length", "at_most"])
def rank_kernel(
    users_ptr,
    stride_user,
    stride_column,
    items_ptr,
    order_ptr,
    active_ptr,
    number_ptr,
    target_ptr,
    own_ptr,
    list_ptr,
    offsets_ptr,
    wild_ptr,
    before_ptr,
    counts_ptr,
    best_ptr,
    best_id_ptr,
    users,
    blocks,
    dim,
    groups,
    first,
    last,
    length,
    steps,
    at_most,
    top_k,
    COUNT: tl.constexpr,
    EARLY: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Counts [parts, 3, users] of active users among positions [first, last), in parts of
    ``length`` positions: greater, equal and NaN scores of others; with BLOCK_T > 0 also the best
    ``top_k`` [parts, users, BLOCK_T].

    Grid: (blocks * parts,).
    """
    block = tl.program_id(0) % blocks
    part = tl.program_id(0) // blocks
    slot = block * BLOCK_U + tl.arange(0, BLOCK_U)
    exists = slot < tl.load(number_ptr)
    user = tl.load(active_ptr + slot, mask=exists, other=0)
    begin = first + part * length
    end = tl.minimum(begin + length, last)
    cursor = tl.load(offsets_ptr + user, mask=exists, other=0)
    stop = tl.load(offsets_ptr + user + 1, mask=exists, other=0)
    cursor = _first_at(list_ptr, cursor, stop, begin, steps)
    upcoming = tl.load(list_ptr + cursor, mask=cursor < stop, other=NO_POSITION)
    greater = tl.zeros([BLOCK_U], tl.int32)
    equal = tl.zeros([BLOCK_U], tl.int32)
    nans = tl.zeros([BLOCK_U], tl.int32)
    target = tl.zeros([BLOCK_U], ACC)
    own = tl.full([BLOCK_U], -1, tl.int32)
    if COUNT:
        target = tl.load(target_ptr + user, mask=exists, other=0)
        own = tl.load(own_ptr + user, mask=exists, other=-1)
    open_users = tl.max(exists.to(tl.int32), 0)
    # Twice what a rank is above 1: 2 greater + equal.
    before = tl.zeros([BLOCK_U], tl.int64)
    stays = tl.zeros([BLOCK_U], tl.int1)
    if EARLY:
        before = tl.load(before_ptr + user, mask=exists, other=0)
        stays = tl.load(wild_ptr + user, mask=exists, other=0) != 0
    if BLOCK_T > 0:
        place = tl.arange(0, BLOCK_T)[None, :] + tl.zeros([BLOCK_U, 1], tl.int32)
        # Ids that no item has, so that every place of a list is distinct.
        best_id = NO_POSITION - 1 - place
        best = tl.where(place < top_k, float("-inf"), float("inf")).to(ACC)
    while (begin < end) & (open_users != 0):
        position = begin + tl.arange(0, BLOCK_N)
        inside = position < end
        scores = _scores(
            users_ptr, stride_user, stride_column, user, exists, items_ptr, position, inside,
            dim, groups, BLOCK_U, BLOCK_N, BLOCK_K, ACC, INTERPRET,
        )  # fmt: skip
        gone = (exists == 0)[:, None] | (inside == 0)[None, :]
        following = tl.minimum(begin + BLOCK_N, end)
        while tl.min(upcoming, 0) < following:
            here = upcoming < following
            gone = gone | (upcoming[:, None] == position[None, :])
            cursor = tl.where(here, cursor + 1, cursor)
            again = tl.load(list_ptr + cursor, mask=here & (cursor < stop), other=NO_POSITION)
            upcoming = tl.where(here, again, upcoming)
        if BLOCK_T > 0:
            ids = position + 1
            if ORDERED:
                ids = tl.load(order_ptr + position, mask=inside, other=0).to(tl.int32)
            # NaN is among no best items.
            fit = tl.where(gone | (scores != scores), float("-inf"), scores)
            ids = ids[None, :] + tl.zeros([BLOCK_U, 1], tl.int32)
            best, best_id = _insert(fit, ids, best, best_id)
        if COUNT:
            gone = gone | (position[None, :] == own[:, None])
            nans += tl.sum(((scores != scores) & (gone == 0)).to(tl.int32), 1)
            # NaN is neither greater than nor equal to anything.
            scores = tl.where(gone, float("nan"), scores)
            greater += tl.sum((scores > target[:, None]).to(tl.int32), 1)
            equal += tl.sum((scores == target[:, None]).to(tl.int32), 1)
        if EARLY:
            within = before + 2 * greater + equal <= 2 * tl.cast(at_most, tl.int64) - 2
            open_users = tl.max((exists & (stays | within)).to(tl.int32), 0)
        begin += BLOCK_N
    if COUNT:
        at = counts_ptr + part.to(tl.int64) * 3 * users + user
        tl.store(at, greater, mask=exists)
        tl.store(at + users, equal, mask=exists)
        tl.store(at + 2 * users, nans, mask=exists)
    if BLOCK_T > 0:
        at = (part.to(tl.int64) * users + user)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        # Places nobody has taken.
        best = tl.where(best_id >= NO_POSITION - BLOCK_T, float("-inf"), best)
        tl.store(best_ptr + at, best, mask=exists[:, None])
        tl.store(best_id_ptr + at, best_id, mask=exists[:, None])
