"""What the Triton kernels of the catalogue loss share: items, exclusions, tiles of logits.

CLASS is "float64", "float32" (three TF32 products for one) or "half" (both operands of one half
dtype, products exact, sums in float32). One side of a tile, tokens or items, belongs to the program
("own"), the other is walked in ascending order. Items are known by their column: their place among
the candidates. Rows past the end repeat the last one.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Float16 residuals are scaled by it: from 2^-40 on they keep an absolute error below that.
HALF_SCALE = tl.constexpr(32768.0)


@triton.jit
def dot(a, b, acc, CLASS: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a @ b. The interpreter has no bfloat16 product; in float32 it is the same, exactly."""
    if CLASS == "float64":
        acc = tl.dot(a, b, acc, out_dtype=tl.float64)
    elif INTERPRET:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    elif CLASS == "float32":
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def item_columns(
    items_stride,
    bias_ptr,
    candidates_ptr,
    first,
    columns,
    rows,
    BIAS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CLASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of BLOCK columns: their index, the offset of their row of ``items``, and their bias.

    Nobody has read the candidates: bad ones must not reach foreign memory; their bias is NaN.
    """
    dtype: tl.constexpr = tl.float64 if CLASS == "float64" else tl.float32
    column = first + tl.arange(0, BLOCK)
    item = tl.minimum(column, columns - 1).to(tl.int64)
    bias = tl.zeros([BLOCK], dtype)
    good = column == column
    if CANDIDATES:
        item = tl.load(candidates_ptr + item)
        good = (item >= 0) & (item < rows)
        item = tl.where(good, item, 0)
    if BIAS:
        bias = tl.load(bias_ptr + item).to(dtype)
    if CANDIDATES:
        bias = tl.where(good, bias, float("nan"))
    return column, item * items_stride, bias


@triton.jit
def logits(
    own_ptr,
    own_offset,
    walk_ptr,
    walk_offset,
    dim,
    CLASS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Inner products of own and walked rows, [BLOCK_M, BLOCK_N]; offsets are those of the rows.

    EVEN: dim is a multiple of BLOCK_K.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float64 if CLASS == "float64" else tl.float32)
    for start in range(0, dim, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        own = own_ptr + own_offset[:, None] + k[None, :]
        walk = walk_ptr + walk_offset[None, :] + k[:, None]
        if EVEN:
            acc = dot(tl.load(own), tl.load(walk), acc, CLASS, INTERPRET)
        else:
            a = tl.load(own, mask=(k < dim)[None, :], other=0)
            b = tl.load(walk, mask=(k < dim)[:, None], other=0)
            acc = dot(a, b, acc, CLASS, INTERPRET)
    return acc


@triton.jit
def first_key(keys_ptr, entries, steps, wanted):
    """Of each number: the first of the ascending keys that is not below it."""
    low = wanted * 0
    high = low + entries
    for _ in range(0, steps):
        open_ = low < high
        middle = (low + high) // 2
        below = tl.load(keys_ptr + middle, mask=open_, other=0) < wanted
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & ~below, middle, high)
    return low


@triton.jit
def exclusions(keys_ptr, entries, base, cursor, walked, BLOCK_M: tl.constexpr):
    """Which pairs of a tile are among the keys, and where each own row's next key is.

    A key is ``base`` (the own row's index times the number of walked rows there are) plus the
    index of a walked row; ``walked`` holds those of the tile.
    """
    far: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    limit = base + walked.shape[0] + tl.min(walked, 0)
    excluded = tl.zeros([BLOCK_M, walked.shape[0]], tl.int1)
    key = tl.load(keys_ptr + cursor, mask=cursor < entries, other=far)
    while tl.max((key < limit).to(tl.int32), 0) > 0:
        inside = key < limit
        index = tl.where(inside, key - base, -1).to(tl.int32)
        excluded = excluded | (index[:, None] == walked[None, :])
        cursor += inside.to(tl.int64)
        key = tl.load(keys_ptr + cursor, mask=cursor < entries, other=far)
    return cursor, excluded
