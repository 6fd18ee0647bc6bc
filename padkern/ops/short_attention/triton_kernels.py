"""Triton kernels of attention within short packed sequences. See ``README.md``.

A program owns some whole sequences, in one tile of at most BLOCK tokens, and one head: nothing it
writes is written by another, so there are no atomics and every sum has a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from padkern.ops.short_attention.triton_tiles import store_lost, store_rows, tile_tokens


@triton.jit
def _load(ptr, token, valid, head, chunk, dim, strides, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """[BLOCK, BLOCK_D] of one head, zeros where there is nothing."""
    feature = chunk + tl.arange(0, BLOCK_D)
    at = token[:, None] * strides[0] + head.to(tl.int64) * strides[1]
    at += feature[None, :].to(tl.int64) * strides[2]
    mask = valid[:, None] & (feature < dim)[None, :]
    return tl.load(ptr + at, mask=mask, other=0).to(ACC)


@triton.jit
def _clean(x, same, WINDOWS: tl.constexpr):
    """x without what is not finite, and which rows share a sequence with such a number.

    0 times infinity is NaN: without this a number would reach other sequences of the tile.
    """
    if WINDOWS:
        odd = (x - x) != 0
        rows = tl.max(odd.to(tl.int32), 1)
        touched = tl.max(tl.where(same, rows[None, :], 0), 1) != 0
        x = tl.where(odd, 0.0, x)
    else:
        touched = tl.zeros([x.shape[0]], tl.int1)
    return x, touched


@triton.jit
def _round_tfloat32(x):
    bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _dot(a, b, acc, ACC: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a @ b; float32 in three TF32 products of two-part operands.

    The interpreter does not know of TF32: there the parts are made by hand, to show their error.
    """
    if tl.float64 == ACC:
        acc = tl.dot(a, b, acc, out_dtype=ACC)
    elif INTERPRET:
        a0 = _round_tfloat32(a)
        b0 = _round_tfloat32(b)
        a1 = tl.where(a - a == 0, _round_tfloat32(a - a0), 0.0)
        b1 = tl.where(b - b == 0, _round_tfloat32(b - b0), 0.0)
        acc = tl.dot(a1, b0, acc)
        acc = tl.dot(a0, b1, acc)
        acc = tl.dot(a0, b0, acc)
    else:
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    return acc


@triton.jit
def _keep_factors(
    step, seed, threshold, keep_bits, row, place, head, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """[BLOCK, BLOCK] of 0 or 1 / (1 - p), from the words that the other backends draw."""
    query = place.to(tl.uint32)[:, None]
    key = place.to(tl.uint32)[None, :]
    nothing = tl.zeros([BLOCK, BLOCK], tl.uint32)
    counter0 = nothing + tl.cast(step, tl.uint32)
    counter1 = nothing + row.to(tl.uint32)[:, None]
    counter2 = ((query >> 2) << 16) | key
    counter3 = nothing + head.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.cast(seed, tl.int64), counter0, counter1, counter2, counter3)
    which = query & 3
    word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    factor = tl.cast(tl.cast(keep_bits, tl.int64), tl.float64, bitcast=True).to(ACC)
    return tl.where(word >= tl.cast(threshold, tl.uint32), factor, 0.0)


@triton.jit
def _weights(
    q_ptr,
    k_ptr,
    q_strides,
    k_strides,
    token,
    row,
    place,
    valid,
    head,
    dim,
    scale,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Probabilities [BLOCK, BLOCK], 0 outside the second result, which pairs may be together, and
    which are of one sequence."""
    scores = tl.zeros([BLOCK, BLOCK], ACC)
    for chunk in range(0, dim, BLOCK_D):
        q = _load(q_ptr, token, valid, head, chunk, dim, q_strides, BLOCK_D, ACC)
        k = _load(k_ptr, token, valid, head, chunk, dim, k_strides, BLOCK_D, ACC)
        scores = _dot(q, tl.trans(k), scores, ACC, INTERPRET)
    same = row[:, None] == row[None, :]
    allowed = same & (place[None, :] <= place[:, None])
    scores = tl.where(allowed, scores * scale, float("-inf"))
    weights = tl.where(allowed, tl.exp(scores - tl.max(scores, 1)[:, None]), 0.0)
    # Masked again: a row whose sum is NaN would be NaN for the keys of other sequences too.
    return tl.where(allowed, weights / tl.sum(weights, 1)[:, None], 0.0), allowed, same


@triton.jit(do_not_specialize=["seed", "step", "threshold", "keep_bits", "scale_bits", "tokens",
                               "sequences", "steps", "longest", "window"])  # fmt: skip
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    offsets_ptr,
    out_ptr,
    stride_q_t,
    stride_q_h,
    stride_q_d,
    stride_k_t,
    stride_k_h,
    stride_k_d,
    stride_v_t,
    stride_v_h,
    stride_v_d,
    tokens,
    heads,
    dim,
    sequences,
    steps,
    longest,
    window,
    scale_bits,
    keep_bits,
    threshold,
    seed,
    step,
    DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """States ``[T, H, d]``. Grid: (tiles * heads,)."""
    q_strides = (stride_q_t, stride_q_h, stride_q_d)
    k_strides = (stride_k_t, stride_k_h, stride_k_d)
    v_strides = (stride_v_t, stride_v_h, stride_v_d)
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    token, row, place, valid, lost = tile_tokens(
        offsets_ptr, tile, tokens, sequences, steps, longest, window, BLOCK, WINDOWS
    )
    valid = valid & (place < longest)
    scale = tl.cast(tl.cast(scale_bits, tl.int64), tl.float64, bitcast=True).to(ACC)
    weights, _, same = _weights(
        q_ptr, k_ptr, q_strides, k_strides, token, row, place, valid, head, dim, scale,
        ACC, BLOCK, BLOCK_D, INTERPRET,
    )  # fmt: skip
    if DROPOUT:
        weights *= _keep_factors(step, seed, threshold, keep_bits, row, place, head, ACC, BLOCK)
    stride = tl.cast(heads, tl.int64) * dim
    out = out_ptr + head.to(tl.int64) * dim
    for chunk in range(0, dim, BLOCK_D):
        v = _load(
            v_ptr,
            token,
            valid,
            head,
            chunk,
            dim,
            v_strides,
            BLOCK_D,
            ACC,
        )
        v, touched = _clean(v, same, WINDOWS)
        x = _dot(weights, v, tl.zeros([BLOCK, BLOCK_D], ACC), ACC, INTERPRET)
        x = tl.where(touched[:, None], float("nan"), x)
        store_rows(out, x, token, valid, chunk, dim, stride, BLOCK_D)
    store_lost(
        out, offsets_ptr, tile, token, lost, tokens, sequences, longest, dim, stride, 1, 0,
        BLOCK, BLOCK_D, WINDOWS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["seed", "step", "threshold", "keep_bits", "scale_bits", "tokens",
                               "sequences", "steps", "longest", "window"])  # fmt: skip
def attention_grad_kernel(
    d_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    offsets_ptr,
    out_ptr,
    stride_d_out_t,
    stride_d_out_h,
    stride_d_out_d,
    stride_q_t,
    stride_q_h,
    stride_q_d,
    stride_k_t,
    stride_k_h,
    stride_k_d,
    stride_v_t,
    stride_v_h,
    stride_v_d,
    tokens,
    heads,
    dim,
    sequences,
    steps,
    longest,
    window,
    scale_bits,
    keep_bits,
    threshold,
    seed,
    step,
    DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWS: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Gradients by q, k and v side by side, ``[T, 3, H, d]``. Grid: (tiles * heads,)."""
    d_out_strides = (stride_d_out_t, stride_d_out_h, stride_d_out_d)
    q_strides = (stride_q_t, stride_q_h, stride_q_d)
    k_strides = (stride_k_t, stride_k_h, stride_k_d)
    v_strides = (stride_v_t, stride_v_h, stride_v_d)
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads
    token, row, place, valid, lost = tile_tokens(
        offsets_ptr, tile, tokens, sequences, steps, longest, window, BLOCK, WINDOWS
    )
    valid = valid & (place < longest)
    scale = tl.cast(tl.cast(scale_bits, tl.int64), tl.float64, bitcast=True).to(ACC)
    weights, allowed, same = _weights(
        q_ptr, k_ptr, q_strides, k_strides, token, row, place, valid, head, dim, scale,
        ACC, BLOCK, BLOCK_D, INTERPRET,
    )  # fmt: skip
    slopes = tl.zeros([BLOCK, BLOCK], ACC)
    for chunk in range(0, dim, BLOCK_D):
        g = _load(
            d_out_ptr,
            token,
            valid,
            head,
            chunk,
            dim,
            d_out_strides,
            BLOCK_D,
            ACC,
        )
        v = _load(
            v_ptr,
            token,
            valid,
            head,
            chunk,
            dim,
            v_strides,
            BLOCK_D,
            ACC,
        )
        slopes = _dot(g, tl.trans(v), slopes, ACC, INTERPRET)
    dropped = weights
    if DROPOUT:
        keep = _keep_factors(step, seed, threshold, keep_bits, row, place, head, ACC, BLOCK)
        dropped = weights * keep
        slopes *= keep
    slopes = tl.where(allowed, slopes, 0.0)
    slopes = scale * weights * (slopes - tl.sum(weights * slopes, 1)[:, None])
    slopes = tl.where(allowed, slopes, 0.0)
    part = tl.cast(heads, tl.int64) * dim
    stride = 3 * part
    out = out_ptr + head.to(tl.int64) * dim
    for chunk in range(0, dim, BLOCK_D):
        k = _load(
            k_ptr,
            token,
            valid,
            head,
            chunk,
            dim,
            k_strides,
            BLOCK_D,
            ACC,
        )
        k, touched = _clean(k, same, WINDOWS)
        x = _dot(slopes, k, tl.zeros([BLOCK, BLOCK_D], ACC), ACC, INTERPRET)
        x = tl.where(touched[:, None], float("nan"), x)
        store_rows(out, x, token, valid, chunk, dim, stride, BLOCK_D)
        q = _load(
            q_ptr,
            token,
            valid,
            head,
            chunk,
            dim,
            q_strides,
            BLOCK_D,
            ACC,
        )
        q, touched = _clean(q, same, WINDOWS)
        x = _dot(tl.trans(slopes), q, tl.zeros([BLOCK, BLOCK_D], ACC), ACC, INTERPRET)
        x = tl.where(touched[:, None], float("nan"), x)
        store_rows(out + part, x, token, valid, chunk, dim, stride, BLOCK_D)
        g = _load(
            d_out_ptr,
            token,
            valid,
            head,
            chunk,
            dim,
            d_out_strides,
            BLOCK_D,
            ACC,
        )
        g, touched = _clean(g, same, WINDOWS)
        x = _dot(tl.trans(dropped), g, tl.zeros([BLOCK, BLOCK_D], ACC), ACC, INTERPRET)
        x = tl.where(touched[:, None], float("nan"), x)
        store_rows(out + 2 * part, x, token, valid, chunk, dim, stride, BLOCK_D)
    store_lost(
        out, offsets_ptr, tile, token, lost, tokens, sequences, longest, dim, stride, 3, part,
        BLOCK, BLOCK_D, WINDOWS,
    )  # fmt: skip
