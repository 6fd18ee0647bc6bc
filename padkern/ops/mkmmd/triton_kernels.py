"""Triton kernel of the loss alone, and what it shares with those of the gradient.

A program owns a tile of rows and walks tiles of columns. Both are "positions": the tiles of the
source, then those of the target, so a tile never mixes samples and the factor of its pairs is one
number. Padding rows and columns are at distance FAR, where Gaussian and Laplacian kernels are 0;
with WEIGHTED (weights, or a kernel with a tail) their weight of 0 removes them. Tiles on the
diagonal are taken apart from the others, which then need no test. No atomics: a program writes
slots of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from padkern.ops.mkmmd.triton_common import (
    distances,
    dot,
    exact_distances,
    locate,
    owner,
    profile,
    profile_term,
)


@triton.jit
def position_tile(
    position, source_tiles, source_rows, target_rows, source_base, target_base, BLOCK: tl.constexpr
):
    """Of a position: whether it is in the source, its first row in its sample and packed, and the
    rows of its sample."""
    in_source = position < source_tiles
    local = tl.where(in_source, position, position - source_tiles) * BLOCK
    base = tl.where(in_source, source_base, target_base) + local
    return in_source, local, base, tl.where(in_source, source_rows, target_rows)


@triton.jit
def diagonal_positions(
    in_source,
    row_local,
    rows,
    source_columns,
    begin,
    end,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The positions in [begin, end) whose columns are among a row tile's rows: first, end."""
    offset = tl.where(in_source, 0, source_columns)
    first = row_local // BLOCK_N
    last = tl.minimum(tl.cdiv(row_local + BLOCK_M, BLOCK_N), tl.cdiv(rows, BLOCK_N))
    first = tl.minimum(tl.maximum(offset + first, begin), end)
    return first, tl.maximum(tl.minimum(offset + last, end), first)


@triton.jit
def product(a0, a1, a2, b0, b1, b2, acc, CLASS: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a b, small terms first. The factors are a0 + a1 (+ a2) and b0 + b1 (+ b2) in the split
    classes, and what is less than about 2^-17 (2^-25) of the product is left out."""
    if CLASS == "bfloat16x6":
        acc = dot(a2, b0, acc, CLASS, INTERPRET)
        acc = dot(a0, b2, acc, CLASS, INTERPRET)
        acc = dot(a1, b1, acc, CLASS, INTERPRET)
    if CLASS == "bfloat16x3" or CLASS == "bfloat16x6":
        acc = dot(a1, b0, acc, CLASS, INTERPRET)
        acc = dot(a0, b1, acc, CLASS, INTERPRET)
    return dot(a0, b0, acc, CLASS, INTERPRET)


@triton.jit
def load_operands(
    z_ptr,
    base,
    column,
    CLASS: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[BLOCK, len(column)] packed rows from ``base`` in up to three parts, which follow one another
    in a row; offsets inside a tile fit 32 bits."""
    row = tl.arange(0, BLOCK)
    pointers = z_ptr + base * STRIDE + (row[:, None] * STRIDE + column[None, :])
    first = tl.load(pointers)
    second = first
    third = first
    if CLASS == "bfloat16x3" or CLASS == "bfloat16x6":
        second = tl.load(pointers + WIDTH)
    if CLASS == "bfloat16x6":
        third = tl.load(pointers + 2 * WIDTH)
    return first, second, third


@triton.jit
def tile_distances(
    z_ptr,
    norm_ptr,
    row_norm,
    row_base,
    base,
    scale,
    dim,
    KERNEL: tl.constexpr,
    CLASS: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """x of ``distances`` for a tile, BLOCK_K features at a time."""
    column_norm = tl.load(norm_ptr + base + tl.arange(0, BLOCK_N))
    if CLASS == "float64":
        x = exact_distances(
            z_ptr + row_base * STRIDE, z_ptr + base * STRIDE, dim, STRIDE, BLOCK_M, BLOCK_N
        )
        # The norms are 0 or FAR.
        x = -scale * x - (row_norm[:, None] + column_norm[None, :])
    else:
        gram = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a0, a1, a2 = load_operands(z_ptr, row_base, k, CLASS, STRIDE, WIDTH, BLOCK_M)
            b0, b1, b2 = load_operands(z_ptr, base, k, CLASS, STRIDE, WIDTH, BLOCK_N)
            b0, b1, b2 = tl.trans(b0), tl.trans(b1), tl.trans(b2)
            gram = product(a0, a1, a2, b0, b1, b2, gram, CLASS, INTERPRET)
        x = distances(gram, row_norm, column_norm, scale, KERNEL, WIDTH)
    return x


@triton.jit
def off_diagonal(x, row_local, local, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """x with 0 where a row meets itself."""
    row = row_local + tl.arange(0, BLOCK_M)
    column = local + tl.arange(0, BLOCK_N)
    return tl.where(row[:, None] == column[None, :], 0.0, x)


@triton.jit
def _value_tile(
    total,
    slopes,
    position,
    in_source,
    a0,
    a1,
    a2,
    row_norm,
    row_base,
    row_local,
    inside,
    across,
    scale,
    source_columns,
    source_rows,
    target_rows,
    source_base,
    target_base,
    z_ptr,
    norm_ptr,
    weight_ptr,
    table_ptr,
    dim,
    DIAGONAL: tl.constexpr,
    KERNEL: tl.constexpr,
    COUNT: tl.constexpr,
    LADDER: tl.constexpr,
    BETAS: tl.constexpr,
    PER_KERNEL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CLASS: tl.constexpr,
    RESIDENT: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_U: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """``total`` (and ``slopes``) with a tile's pairs added."""
    from_source, local, base, _ = position_tile(
        position, source_columns, source_rows, target_rows, source_base, target_base, BLOCK_N
    )
    if RESIDENT:
        k = tl.arange(0, WIDTH)
        b0, b1, b2 = load_operands(z_ptr, base, k, CLASS, STRIDE, WIDTH, BLOCK_N)
        b0, b1, b2 = tl.trans(b0), tl.trans(b1), tl.trans(b2)
        gram = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        gram = product(a0, a1, a2, b0, b1, b2, gram, CLASS, INTERPRET)
        column_norm = tl.load(norm_ptr + base + tl.arange(0, BLOCK_N))
        x = distances(gram, row_norm, column_norm, scale, KERNEL, WIDTH)
    else:
        x = tile_distances(
            z_ptr,
            norm_ptr,
            row_norm,
            row_base,
            base,
            scale,
            dim,
            KERNEL,
            CLASS,
            STRIDE,
            WIDTH,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            INTERPRET,
        )
    factor = tl.where(from_source == in_source, inside, across)
    if not DIAGONAL:
        factor *= 2  # a tile on the diagonal holds both orders of its pairs, this one does not
    if PER_KERNEL:
        weights = tl.load(weight_ptr + row_base + tl.arange(0, BLOCK_M))[:, None]
        weights = weights * tl.load(weight_ptr + base + tl.arange(0, BLOCK_N))[None, :]
        if DIAGONAL:
            weights = off_diagonal(weights, row_local, local, BLOCK_M, BLOCK_N)
        for u in range(0, COUNT):
            ratio = tl.load(table_ptr + 64 + u).to(x.dtype)
            value, slope = profile_term(x, ratio, KERNEL)
            here = tl.arange(0, BLOCK_U) == u
            value_sum = tl.sum(tl.sum(value * weights, 1).to(tl.float64), 0) * factor
            slope_sum = tl.sum(tl.sum(slope * x * weights, 1).to(tl.float64), 0) * factor
            total += tl.where(here, value_sum, 0.0)
            slopes += tl.where(here, slope_sum, 0.0)
    else:
        value, _ = profile(x, table_ptr, KERNEL, COUNT, LADDER, BETAS)
        if DIAGONAL:
            value = off_diagonal(value, row_local, local, BLOCK_M, BLOCK_N)
        if WEIGHTED:
            value = value * tl.load(weight_ptr + base + tl.arange(0, BLOCK_N))[None, :]
        total += tl.sum(value, 1).to(tl.float64) * factor
    return total, slopes


@triton.jit(do_not_specialize=["n", "m", "first_target", "row_tiles", "parts"])
def value_kernel(
    z_ptr,
    norm_ptr,
    weight_ptr,
    params_ptr,
    table_ptr,
    out_ptr,
    map_ptr,
    source_offsets_ptr,
    target_offsets_ptr,
    n,
    m,
    dim,
    first_target,
    row_tiles,
    parts,
    KERNEL: tl.constexpr,
    COUNT: tl.constexpr,
    LADDER: tl.constexpr,
    BETAS: tl.constexpr,
    PER_KERNEL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CLASS: tl.constexpr,
    RAGGED: tl.constexpr,
    PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_U: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Sums over unordered pairs, each counted twice: [row_tiles * parts, outputs].

    A row tile's columns start at the tile itself and are cut into parts. One output, the kernels'
    weighted sum; PER_KERNEL: BLOCK_U sums of the kernels, BLOCK_U of slope times x. BLOCK_N divides
    BLOCK_M.

    Grid: (row_tiles * parts,), the row tiles those of all packed rows.
    """
    # Eight neighbouring row tiles run together: their programs meet the same columns in L2.
    group = tl.program_id(0) // (8 * parts)
    members = tl.minimum(row_tiles - group * 8, 8)
    row_tile = group * 8 + (tl.program_id(0) % (8 * parts)) % members
    part = (tl.program_id(0) % (8 * parts)) // members
    row_base = row_tile.to(tl.int64) * BLOCK_M
    problem, exists = owner(map_ptr, row_base, RAGGED, PAD)
    source_rows, target_rows, source_base, target_base = locate(
        source_offsets_ptr, target_offsets_ptr, n, m, first_target, problem, RAGGED, PAD
    )
    in_source = row_base < first_target
    row_local = (row_base - tl.where(in_source, source_base, target_base)).to(tl.int32)
    rows = tl.where(in_source, source_rows, target_rows)
    exists = exists & (row_local < rows)
    source_columns = tl.cdiv(source_rows, BLOCK_N)
    all_columns = source_columns + tl.cdiv(target_rows, BLOCK_N)
    chunk = tl.cdiv(all_columns, parts)
    begin = row_local // BLOCK_N + tl.where(in_source, 0, source_columns) + part * chunk
    begin = tl.where(exists, begin, all_columns)
    end = tl.minimum(begin + chunk, all_columns)
    begin = tl.minimum(begin, end)
    _, middle = diagonal_positions(
        in_source, row_local, rows, source_columns, begin, end, BLOCK_M, BLOCK_N
    )
    params = params_ptr + problem.to(tl.int64) * 16
    scale = tl.load(params).to(norm_ptr.dtype.element_ty)
    inside = tl.where(in_source, tl.load(params + 1), tl.load(params + 2))
    across = tl.load(params + 3)
    resident: tl.constexpr = WIDTH <= BLOCK_K and CLASS != "float64"
    a0 = 0
    a1 = 0
    a2 = 0
    if resident:
        k = tl.arange(0, WIDTH)
        a0, a1, a2 = load_operands(z_ptr, row_base, k, CLASS, STRIDE, WIDTH, BLOCK_M)
    row_norm = tl.load(norm_ptr + row_base + tl.arange(0, BLOCK_M))
    total = tl.zeros([BLOCK_U if PER_KERNEL else BLOCK_M], tl.float64)
    slopes = tl.zeros([BLOCK_U], tl.float64)
    for position in range(begin, middle):
        total, slopes = _value_tile(
            total,
            slopes,
            position,
            in_source,
            a0,
            a1,
            a2,
            row_norm,
            row_base,
            row_local,
            inside,
            across,
            scale,
            source_columns,
            source_rows,
            target_rows,
            source_base,
            target_base,
            z_ptr,
            norm_ptr,
            weight_ptr,
            table_ptr,
            dim,
            True,
            KERNEL,
            COUNT,
            LADDER,
            BETAS,
            PER_KERNEL,
            WEIGHTED,
            CLASS,
            resident,
            STRIDE,
            WIDTH,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            BLOCK_U,
            INTERPRET,
        )
    for position in range(middle, end):
        total, slopes = _value_tile(
            total,
            slopes,
            position,
            in_source,
            a0,
            a1,
            a2,
            row_norm,
            row_base,
            row_local,
            inside,
            across,
            scale,
            source_columns,
            source_rows,
            target_rows,
            source_base,
            target_base,
            z_ptr,
            norm_ptr,
            weight_ptr,
            table_ptr,
            dim,
            False,
            KERNEL,
            COUNT,
            LADDER,
            BETAS,
            PER_KERNEL,
            WEIGHTED,
            CLASS,
            resident,
            STRIDE,
            WIDTH,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            BLOCK_U,
            INTERPRET,
        )
    slot = row_tile.to(tl.int64) * parts + part
    out = out_ptr + slot * (2 * BLOCK_U if PER_KERNEL else 1)
    if PER_KERNEL:
        tl.store(out + tl.arange(0, BLOCK_U), total)
        tl.store(out + BLOCK_U + tl.arange(0, BLOCK_U), slopes)
    else:
        if WEIGHTED:
            total *= tl.load(weight_ptr + row_base + tl.arange(0, BLOCK_M)).to(tl.float64)
        tl.store(out, tl.sum(total, 0))
