"""Triton kernels of the catalogue loss: sums of exponentials, and their combination.

Derivation: ``README.md``; launches: ``triton_impl.py``; helpers: ``triton_tile.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from padkern.ops.catalogue_loss.triton_tile import (
    exclusions,
    first_key,
    item_columns,
    logits,
)


@triton.jit
def mass_kernel(
    users_ptr,
    stride_user,
    items_ptr,
    stride_item,
    targets_ptr,
    bias_ptr,
    candidates_ptr,
    keys_ptr,
    top_ptr,
    mass_ptr,
    positive_ptr,
    tokens,
    columns,
    rows,
    dim,
    entries,
    steps,
    tiles,
    BIAS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    EXCLUDED: tl.constexpr,
    CLASS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Of a tile of tokens and ``tiles`` tiles of items: largest logit and sum of exp(z - largest).

    The program that meets a token's target stores its logit.
    """
    dtype: tl.constexpr = tl.float64 if CLASS == "float64" else tl.float32
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.minimum(row, tokens - 1).to(tl.int64)
    target = tl.load(targets_ptr + token)
    top = tl.full([BLOCK_M], float("-inf"), dtype)
    mass = tl.zeros([BLOCK_M], tl.float64)
    positive = tl.zeros([BLOCK_M], dtype)
    first_tile = tl.program_id(1) * tiles
    last_tile = tl.minimum(first_tile + tiles, tl.cdiv(columns, BLOCK_N))
    base = token * columns
    cursor = base
    if EXCLUDED:
        cursor = first_key(keys_ptr, entries, steps, base + first_tile * BLOCK_N)
    for tile in range(first_tile, last_tile):
        column, offset, bias = item_columns(
            stride_item,
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
        z = logits(
            users_ptr,
            token * stride_user,
            items_ptr,
            offset,
            dim,
            CLASS,
            EVEN,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            INTERPRET,
        )
        if BIAS or CANDIDATES:
            z += bias[None, :]
        hit = column[None, :] == target[:, None]
        positive += tl.sum(tl.where(hit, z, 0.0), 1)
        left_out = (column >= columns)[None, :]
        if EXCLUDED:
            cursor, excluded = exclusions(keys_ptr, entries, base, cursor, column, BLOCK_M)
            left_out = left_out | (excluded & ~hit)
        z = tl.where(left_out, float("-inf"), z)
        new = tl.maximum(top, tl.max(z, 1))
        # Of logits that are all -Inf so far the sum is 0, not NaN.
        safe = tl.where(new == float("-inf"), 0.0, new)
        part = tl.sum(tl.exp(z - safe[:, None]), 1).to(tl.float64)
        mass = mass * tl.exp(top - safe).to(tl.float64) + part
        top = new
    place = tl.program_id(1).to(tl.int64) * tokens + row
    tl.store(top_ptr + place, top, mask=row < tokens)
    tl.store(mass_ptr + place, mass, mask=row < tokens)
    met = (target >= first_tile * BLOCK_N) & (target < last_tile * BLOCK_N)
    tl.store(positive_ptr + row, positive, mask=(row < tokens) & met)


@triton.jit
def combine_kernel(
    top_ptr,
    mass_ptr,
    positive_ptr,
    largest_ptr,
    inverse_ptr,
    loss_ptr,
    tokens,
    parts,
    BLOCK_M: tl.constexpr,
):
    """Joins the parts in their order: largest logit, 1 / mass and loss of every token."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < tokens
    largest = tl.load(top_ptr + token, mask=inside, other=0)
    for part in range(1, parts):
        top = tl.load(top_ptr + tl.cast(part, tl.int64) * tokens + token, mask=inside, other=0)
        largest = tl.maximum(largest, top)
    mass = tl.zeros([BLOCK_M], tl.float64)
    for part in range(0, parts):
        place = tl.cast(part, tl.int64) * tokens + token
        top = tl.load(top_ptr + place, mask=inside, other=0).to(tl.float64)
        # A part without a logit above -Inf has no mass: not NaN unless all are such.
        factor = tl.where(top == float("-inf"), 0.0, tl.exp(top - largest.to(tl.float64)))
        mass += tl.load(mass_ptr + place, mask=inside, other=0) * factor
    positive = tl.load(positive_ptr + token, mask=inside, other=0).to(tl.float64)
    loss = tl.log(mass) + (largest.to(tl.float64) - positive)
    dtype = largest_ptr.dtype.element_ty
    tl.store(largest_ptr + token, largest, mask=inside)
    tl.store(inverse_ptr + token, (1.0 / mass).to(dtype), mask=inside)
    tl.store(loss_ptr + token, loss, mask=inside)
