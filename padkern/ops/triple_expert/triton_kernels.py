"""Triton kernels of the gated loss. Derivation: ``README.md``; launches: ``triton_impl.py``.

States, rows and gate are seen as one inner product of length F = E * d: column f belongs to expert
f // d. Scores are added and kept in float32, or float64 for float64 inputs (DOUBLE).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _columns(start, width, dim, stride_expert, BLOCK_F: tl.constexpr):
    """Of BLOCK_F columns: expert, whether they exist, and their offsets in a row of a tensor."""
    f = start + tl.arange(0, BLOCK_F)
    expert = f // tl.maximum(dim, 1)
    return expert, f < width, expert.to(tl.int64) * stride_expert + (f - expert * dim)


@triton.jit
def _states(
    users_ptr,
    stride_token,
    stride_expert,
    token,
    used,
    start,
    width,
    dim,
    DOUBLE: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """BLOCK_F columns of the states of each token, [BLOCK_T, BLOCK_F]; 0 where unused."""
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    _, exists, place = _columns(start, width, dim, stride_expert, BLOCK_F)
    pointers = users_ptr + token[:, None] * stride_token + place[None, :]
    return tl.load(pointers, mask=used[:, None] & exists[None, :], other=0).to(dtype)


@triton.jit
def _softplus(a):
    """log(1 + exp(a)) and its derivative; NaN stays NaN."""
    z = tl.exp(-tl.abs(a))
    # log(1 + z) without the rounding of 1 + z: their ratio repairs it.
    sum_ = 1 + z
    lost = sum_ - 1
    tail = tl.where(lost == 0, z, tl.log(sum_) * (z / tl.where(lost == 0, 1.0, lost)))
    slope = tl.where(a < 0, z, 1.0) / sum_
    return tl.where(a > 0, a, 0.0) + tail, slope


@triton.jit
def _candidate(positives_ptr, negatives_ptr, bins_ptr, token, used, slot, k, rows, bins):
    """Item and bin of one slot of each token, and whether both exist; 0 where they do not.

    Slot 0 is the positive. Nobody has read the ids: bad ones must not reach foreign memory.
    """
    if slot == 0:
        item = tl.load(positives_ptr + token, mask=used, other=0)
    else:
        item = tl.load(negatives_ptr + token * k + (slot - 1), mask=used, other=0)
    good = (item >= 0) & (item < rows)
    item = tl.where(good, item, 0)
    own = tl.load(bins_ptr + item, mask=used & good, other=0)
    good = good & (own >= 0) & (own < bins)
    return item, tl.where(good, own, 0), good


@triton.jit
def _weighted_row(
    tables_ptr,
    stride_row,
    gate_ptr,
    experts,
    item,
    own,
    read,
    expert,
    exists,
    offset,
    DOUBLE: tl.constexpr,
):
    """g v of each token's candidate, [BLOCK_T, BLOCK_F]."""
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    inside = read[:, None] & exists[None, :]
    row = tl.load(tables_ptr + item[:, None] * stride_row + offset[None, :], mask=inside, other=0)
    gate = tl.load(gate_ptr + own[:, None] * experts + expert[None, :], mask=inside, other=0)
    return gate.to(dtype) * row.to(dtype)


@triton.jit(do_not_specialize=["weight_bits"])
def token_kernel(
    users_ptr,
    stride_token,
    stride_user_expert,
    tables_ptr,
    stride_table,
    stride_row,
    gate_ptr,
    bins_ptr,
    positives_ptr,
    negatives_ptr,
    valid_ptr,
    count_ptr,
    losses_ptr,
    delta_ptr,
    d_users_ptr,
    tokens,
    experts,
    dim,
    rows,
    bins,
    k,
    weight_bits,
    VALID: tl.constexpr,
    GRADIENT: tl.constexpr,
    WHOLE: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Scores, loss sums and, with GRADIENT, the derivative by every score.

    WHOLE: F fits one tile, and the user gradient is formed while the rows are in registers.
    losses[program]: its tokens' part of the loss.
    weight_bits: the weight of the positives, a float64.
    """
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < tokens
    used = inside
    if VALID:
        used = inside & (tl.load(valid_ptr + token, mask=inside, other=0) != 0)
    count = tl.cast(tokens, tl.int64)
    if VALID:
        count = tl.maximum(tl.load(count_ptr), 1)
    one = 1.0 / count.to(tl.float64)
    of_positive = tl.cast(tl.cast(weight_bits, tl.int64), tl.float64, bitcast=True)
    of_negative = 1.0 / tl.cast(k, tl.float64)
    width = experts * dim
    total = tl.zeros([BLOCK_T], tl.float64)
    d_user = tl.zeros([BLOCK_T, BLOCK_F], dtype)
    if WHOLE:
        expert, exists, offset = _columns(0, width, dim, stride_table, BLOCK_F)
        user = _states(
            users_ptr, stride_token, stride_user_expert, token, used, 0, width, dim, DOUBLE, BLOCK_F
        )
    for slot in range(0, k + 1):
        item, own, good = _candidate(
            positives_ptr, negatives_ptr, bins_ptr, token, used, slot, k, rows, bins
        )
        read = used & good
        if WHOLE:
            row = _weighted_row(
                tables_ptr,
                stride_row,
                gate_ptr,
                experts,
                item,
                own,
                read,
                expert,
                exists,
                offset,
                DOUBLE,
            )
            score = tl.sum(user * row, 1)
        else:
            score = tl.zeros([BLOCK_T], dtype)
            for start in range(0, width, BLOCK_F):
                place = _columns(start, width, dim, stride_table, BLOCK_F)
                part = _weighted_row(
                    tables_ptr,
                    stride_row,
                    gate_ptr,
                    experts,
                    item,
                    own,
                    read,
                    place[0],
                    place[1],
                    place[2],
                    DOUBLE,
                )
                states = _states(
                    users_ptr,
                    stride_token,
                    stride_user_expert,
                    token,
                    used,
                    start,
                    width,
                    dim,
                    DOUBLE,
                    BLOCK_F,
                )
                score += tl.sum(states * part, 1)
        score = tl.where(good, score, float("nan"))
        sign = tl.where(slot == 0, -1.0, 1.0).to(dtype)
        loss, slope = _softplus(sign * score)
        weight = one * tl.where(slot == 0, of_positive, of_negative)
        total += tl.where(used, loss.to(tl.float64) * weight, 0.0)
        if GRADIENT:
            delta = tl.where(used, sign * weight.to(dtype) * slope, 0.0).to(dtype)
            tl.store(delta_ptr + token * (k + 1) + slot, delta, mask=inside)
            if WHOLE:
                d_user += delta[:, None] * row
    tl.store(losses_ptr + tl.program_id(0), tl.sum(total, 0))
    if GRADIENT and WHOLE:
        f = tl.arange(0, BLOCK_F)
        out = d_users_ptr + token[:, None] * width + f[None, :]
        tl.store(out, d_user, mask=inside[:, None] & (f < width)[None, :])


@triton.jit
def user_gradient_kernel(
    tables_ptr,
    stride_table,
    stride_row,
    gate_ptr,
    bins_ptr,
    positives_ptr,
    negatives_ptr,
    valid_ptr,
    delta_ptr,
    d_users_ptr,
    tokens,
    experts,
    dim,
    rows,
    bins,
    k,
    VALID: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The user gradient where F does not fit one tile; a program owns one tile of it."""
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < tokens
    used = inside
    if VALID:
        used = inside & (tl.load(valid_ptr + token, mask=inside, other=0) != 0)
    width = experts * dim
    start = tl.program_id(1) * BLOCK_F
    expert, exists, offset = _columns(start, width, dim, stride_table, BLOCK_F)
    d_user = tl.zeros([BLOCK_T, BLOCK_F], dtype)
    for slot in range(0, k + 1):
        item, own, good = _candidate(
            positives_ptr, negatives_ptr, bins_ptr, token, used, slot, k, rows, bins
        )
        read = used & good
        row = _weighted_row(
            tables_ptr,
            stride_row,
            gate_ptr,
            experts,
            item,
            own,
            read,
            expert,
            exists,
            offset,
            DOUBLE,
        )
        d_user += tl.load(delta_ptr + token * (k + 1) + slot, mask=inside, other=0)[:, None] * row
    f = start + tl.arange(0, BLOCK_F)
    out = d_users_ptr + token[:, None] * width + f[None, :]
    tl.store(out, d_user, mask=inside[:, None] & exists[None, :])


@triton.jit
def _slots(
    order_ptr,
    delta_ptr,
    users_ptr,
    stride_token,
    place,
    exists,
    begin,
    end,
    per_token,
    total,
    STEP: tl.constexpr,
):
    """total + the sum of delta u over the sorted slots begin..end, STEP slots at a time."""
    for first in range(begin, end, STEP):
        position = first + tl.arange(0, STEP)
        inside = position < end
        slot = tl.load(order_ptr + position, mask=inside, other=0)
        delta = tl.load(delta_ptr + slot, mask=inside, other=0)
        token = slot // per_token
        user = tl.load(
            users_ptr + token[:, None] * stride_token + place[None, :],
            mask=inside[:, None] & exists[None, :],
            other=0,
        )
        total += tl.sum(delta[:, None] * user.to(total.dtype), 0)
    return total


@triton.jit
def piece_kernel(
    users_ptr,
    stride_token,
    stride_user_expert,
    ids_ptr,
    order_ptr,
    delta_ptr,
    pieces_ptr,
    rows,
    experts,
    dim,
    per_token,
    DOUBLE: tl.constexpr,
    PIECE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """pieces[p]: sum of delta u over a run of PIECE sorted slots, where all are of one item."""
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    begin = tl.program_id(0).to(tl.int64) * PIECE
    item = tl.load(ids_ptr + begin)
    width = experts * dim
    start = tl.program_id(1) * BLOCK_F
    _, exists, place = _columns(start, width, dim, stride_user_expert, BLOCK_F)
    if (item == tl.load(ids_ptr + begin + PIECE - 1)) & (item < rows):
        total = tl.zeros([BLOCK_F], dtype)
        total = _slots(
            order_ptr,
            delta_ptr,
            users_ptr,
            stride_token,
            place,
            exists,
            begin,
            begin + PIECE,
            per_token,
            total,
            STEP,
        )
        out = pieces_ptr + tl.program_id(0).to(tl.int64) * width + start
        tl.store(out + tl.arange(0, BLOCK_F), total, mask=exists)


@triton.jit
def item_kernel(
    users_ptr,
    stride_token,
    stride_user_expert,
    tables_ptr,
    stride_table,
    stride_row,
    gate_ptr,
    bins_ptr,
    starts_ptr,
    order_ptr,
    delta_ptr,
    pieces_ptr,
    d_tables_ptr,
    inner_ptr,
    rows,
    experts,
    dim,
    bins,
    per_token,
    DOUBLE: tl.constexpr,
    PIECE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of BLOCK_I item rows of one expert, and per row <v, sum delta u>.

    A row is the sum over its slots in their order: those up to the first whole piece, the pieces,
    those behind the last.
    """
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    expert = tl.program_id(1).to(tl.int64)
    for local in range(0, BLOCK_I):
        item = tl.program_id(0).to(tl.int64) * BLOCK_I + local
        if item < rows:
            begin = tl.load(starts_ptr + item)
            end = tl.load(starts_ptr + item + 1)
            own = tl.load(bins_ptr + item)
            good = (own >= 0) & (own < bins)
            gate = tl.load(gate_ptr + own * experts + expert, mask=good, other=0).to(dtype)
            first_piece = (begin + PIECE - 1) // PIECE
            last_piece = tl.maximum(end // PIECE, first_piece)
            head = tl.minimum(end, first_piece * PIECE)
            tail = tl.maximum(head, last_piece * PIECE)
            inner = tl.zeros([BLOCK_D], dtype)
            for start in range(0, dim, BLOCK_D):
                column = start + tl.arange(0, BLOCK_D)
                exists = column < dim
                place = expert * stride_user_expert + column
                total = tl.zeros([BLOCK_D], dtype)
                total = _slots(
                    order_ptr,
                    delta_ptr,
                    users_ptr,
                    stride_token,
                    place,
                    exists,
                    begin,
                    head,
                    per_token,
                    total,
                    STEP,
                )
                for first in range(first_piece, last_piece, STEP):
                    piece = first + tl.arange(0, STEP)
                    sums = pieces_ptr + piece[:, None] * (experts * dim)
                    sums += (expert * dim + column)[None, :]
                    inside = (piece < last_piece)[:, None] & exists[None, :]
                    total += tl.sum(tl.load(sums, mask=inside, other=0), 0)
                total = _slots(
                    order_ptr,
                    delta_ptr,
                    users_ptr,
                    stride_token,
                    place,
                    exists,
                    tail,
                    end,
                    per_token,
                    total,
                    STEP,
                )
                if end > begin:
                    row = tables_ptr + expert * stride_table + item * stride_row + column
                    inner += total * tl.load(row, mask=exists, other=0).to(dtype)
                out = d_tables_ptr + (expert * rows + item) * dim + column
                # Not read: an exact 0, whatever its gate.
                tl.store(out, tl.where(end > begin, gate * total, 0.0), mask=exists)
            tl.store(inner_ptr + expert * rows + item, tl.sum(inner, 0))
