"""Triton kernel of the gradients of the catalogue loss, by states or by items.

With r = p - [i = y], a program owns rows of one side and a tile of features, walks the other side
and adds r times its rows. Logits are computed again; nobody else writes what a program owns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from padkern.ops.catalogue_loss.triton_tile import (
    HALF_SCALE,
    dot,
    exclusions,
    first_key,
    item_columns,
    logits,
)


@triton.jit
def _token_rows(
    stride_user, targets_ptr, largest_ptr, inverse_ptr, first, tokens, BLOCK: tl.constexpr
):
    """Of BLOCK tokens: index, offset of their states, column of the target, largest logit,
    1 / mass."""
    row = first + tl.arange(0, BLOCK)
    token = tl.minimum(row, tokens - 1).to(tl.int64)
    return (
        row,
        token * stride_user,
        tl.load(targets_ptr + token),
        tl.load(largest_ptr + token),
        tl.load(inverse_ptr + token),
    )


@triton.jit
def _rounded(residual, like, CLASS: tl.constexpr, INTERPRET: tl.constexpr):
    """Residuals as operands of a product; the interpreter would truncate to bfloat16."""
    if CLASS == "half":
        if like.dtype == tl.float16:
            residual = (residual * HALF_SCALE).to(tl.float16)
        else:
            if INTERPRET:
                bits = residual.to(tl.uint32, bitcast=True)
                bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
                even = bits.to(tl.float32, bitcast=True)
                residual = tl.where(residual == residual, even, residual)
            residual = residual.to(tl.bfloat16)
    return residual


@triton.jit
def gradient_kernel(
    own_ptr,
    stride_own,
    walk_ptr,
    stride_walk,
    targets_ptr,
    bias_ptr,
    candidates_ptr,
    keys_ptr,
    largest_ptr,
    inverse_ptr,
    out_ptr,
    d_bias_ptr,
    tokens,
    columns,
    rows,
    dim,
    entries,
    steps,
    tiles,
    ITEMS: tl.constexpr,
    BIAS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    EXCLUDED: tl.constexpr,
    CLASS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out[part, own row] = 1/T sum over the walked rows of a part; ITEMS: items are owned."""
    dtype: tl.constexpr = tl.float64 if CLASS == "float64" else tl.float32
    own_first = tl.program_id(0) * BLOCK_M
    feature = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first_tile = tl.program_id(2) * tiles
    total = tl.zeros([BLOCK_M, BLOCK_D], dtype)
    bias_total = tl.zeros([BLOCK_M], tl.float64)
    if ITEMS:
        own_rows = columns
        walk_rows = tokens
        row, own_offset, bias_ = item_columns(
            stride_own,
            bias_ptr,
            candidates_ptr,
            own_first,
            columns,
            rows,
            BIAS,
            CANDIDATES,
            CLASS,
            BLOCK_M,
        )
        bias = bias_[:, None]
    else:
        own_rows = tokens
        walk_rows = columns
        row, own_offset, target_, largest_, inverse_ = _token_rows(
            stride_own, targets_ptr, largest_ptr, inverse_ptr, own_first, tokens, BLOCK_M
        )
        target = target_[:, None]
        largest = largest_[:, None]
        inverse = inverse_[:, None]
    last_tile = tl.minimum(first_tile + tiles, tl.cdiv(walk_rows, BLOCK_N))
    base = tl.minimum(row, own_rows - 1).to(tl.int64) * walk_rows
    cursor = base
    if EXCLUDED:
        cursor = first_key(keys_ptr, entries, steps, base + first_tile * BLOCK_N)
    for tile in range(first_tile, last_tile):
        if ITEMS:
            walked, walk_offset, target_, largest_, inverse_ = _token_rows(
                stride_walk, targets_ptr, largest_ptr, inverse_ptr, tile * BLOCK_N, tokens, BLOCK_N
            )
            target = target_[None, :]
            largest = largest_[None, :]
            inverse = inverse_[None, :]
            hit = row[:, None] == target
        else:
            walked, walk_offset, bias_ = item_columns(
                stride_walk,
                bias_ptr,
                candidates_ptr,
                tile * BLOCK_N,
                columns,
                rows,
                BIAS,
                CANDIDATES,
                CLASS,
                BLOCK_N,
            )
            bias = bias_[None, :]
            hit = walked[None, :] == target
        z = logits(
            own_ptr,
            own_offset,
            walk_ptr,
            walk_offset,
            dim,
            CLASS,
            EVEN,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            INTERPRET,
        )
        if BIAS or CANDIDATES:
            z += bias
        if EXCLUDED:
            cursor, excluded = exclusions(keys_ptr, entries, base, cursor, walked, BLOCK_M)
            z = tl.where(excluded & ~hit, float("-inf"), z)
        residual = tl.exp(z - largest) * inverse - tl.where(hit, 1.0, 0.0)
        residual = tl.where((walked < walk_rows)[None, :], residual, 0.0)
        if ITEMS and BIAS:
            bias_total += tl.sum(residual, 1).to(tl.float64)
        pointers = walk_ptr + walk_offset[:, None] + feature[None, :]
        values = tl.load(pointers, mask=(feature < dim)[None, :], other=0)
        total = dot(_rounded(residual, values, CLASS, INTERPRET), values, total, CLASS, INTERPRET)
    one = 1.0 / tl.cast(tokens, tl.float64)
    scale = one.to(dtype)
    if CLASS == "half" and own_ptr.dtype.element_ty == tl.float16:
        scale = scale / HALF_SCALE
    place = tl.program_id(2).to(tl.int64) * own_rows + row
    out = out_ptr + place[:, None] * dim + feature[None, :]
    tl.store(out, total * scale, mask=(row < own_rows)[:, None] & (feature < dim)[None, :])
    if ITEMS and BIAS:
        first = (row < own_rows) & (tl.program_id(1) == 0)
        tl.store(d_bias_ptr + place, bias_total * one, mask=first)
