"""Triton kernel of loss and gradient in one pass, for rows of up to 256 features."""

from __future__ import annotations

import triton
import triton.language as tl

from padkern.ops.mkmmd.triton_common import (
    distances,
    dot,
    locate,
    owner,
    profile,
    round_tfloat32,
    split_bfloat16,
    to_bfloat16,
)
from padkern.ops.mkmmd.triton_kernels import (
    diagonal_positions,
    load_operands,
    off_diagonal,
    position_tile,
    product,
)


@triton.jit
def coefficients(slope, CLASS: tl.constexpr, INTERPRET: tl.constexpr):
    """The coefficients as the three operands of ``product``."""
    first = slope
    second = slope
    third = slope
    if CLASS == "tfloat32":
        first = round_tfloat32(slope)
    elif CLASS == "bfloat16x3":
        first, rest = split_bfloat16(slope)
        second = to_bfloat16(rest, INTERPRET)
    elif CLASS == "bfloat16x6":
        first, rest = split_bfloat16(slope)
        second, rest = split_bfloat16(rest)
        third = to_bfloat16(rest, INTERPRET)
    elif CLASS == "bfloat16":
        first = to_bfloat16(slope, INTERPRET)
    elif CLASS == "float16":
        first = slope.to(tl.float16)  # scaled to fit, see ``pack_kernel``
    return first, second, third


@triton.jit
def pair_coefficients(
    x,
    slope_factor,
    weight_ptr,
    base,
    row_local,
    local,
    table_ptr,
    DIAGONAL: tl.constexpr,
    KERNEL: tl.constexpr,
    COUNT: tl.constexpr,
    LADDER: tl.constexpr,
    BETAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of a tile: the weighted sums of the kernels, and their slopes times weight and factor."""
    value, slope = profile(x, table_ptr, KERNEL, COUNT, LADDER, BETAS)
    if DIAGONAL:
        value = off_diagonal(value, row_local, local, BLOCK_M, BLOCK_N)
        slope = off_diagonal(slope, row_local, local, BLOCK_M, BLOCK_N)
    slope_factor = slope_factor.to(x.dtype)
    if WEIGHTED:
        weight = tl.load(weight_ptr + base + tl.arange(0, BLOCK_N))
        value = value * weight[None, :]
        slope = slope * (weight * slope_factor)[None, :]
    else:
        slope = slope * slope_factor
    return value, slope


@triton.jit
def _gradient_tile(
    values,
    bends,
    row_sum,
    moved,
    position,
    in_source,
    a0,
    a1,
    a2,
    row_norm,
    row_local,
    inside,
    across,
    slope_scale,
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
    DIAGONAL: tl.constexpr,
    KERNEL: tl.constexpr,
    COUNT: tl.constexpr,
    LADDER: tl.constexpr,
    BETAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CLASS: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The four sums of a row tile with a column tile's part added."""
    from_source, local, base, _ = position_tile(
        position, source_columns, source_rows, target_rows, source_base, target_base, BLOCK_N
    )
    k = tl.arange(0, WIDTH)
    b0, b1, b2 = load_operands(z_ptr, base, k, CLASS, STRIDE, WIDTH, BLOCK_N)
    c0, c1, c2 = tl.trans(b0), tl.trans(b1), tl.trans(b2)
    gram = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gram = product(a0, a1, a2, c0, c1, c2, gram, CLASS, INTERPRET)
    column_norm = tl.load(norm_ptr + base + tl.arange(0, BLOCK_N))
    x = distances(gram, row_norm, column_norm, scale, KERNEL, WIDTH)
    factor = tl.where(from_source == in_source, inside, across)
    value, slope = pair_coefficients(
        x,
        factor * slope_scale,
        weight_ptr,
        base,
        row_local,
        local,
        table_ptr,
        DIAGONAL,
        KERNEL,
        COUNT,
        LADDER,
        BETAS,
        WEIGHTED,
        BLOCK_M,
        BLOCK_N,
    )
    values += tl.sum(value, 1).to(tl.float64) * factor
    bends += tl.sum(slope * x, 1).to(tl.float64)
    g0, g1, g2 = coefficients(slope, CLASS, INTERPRET)
    if CLASS == "bfloat16" or CLASS == "float16":
        # The row sums must be those of the rounded coefficients, or a common offset of the rows
        # would not cancel. A product with ones spares converting them back.
        ones = tl.full([BLOCK_N, 16], 1.0, tl.float32).to(g0.dtype)
        row_sum = dot(g0, ones, row_sum, CLASS, INTERPRET)
    else:
        row_sum += tl.sum(slope, 1)
    moved = product(g0, g1, g2, b0, b1, b2, moved, CLASS, INTERPRET)
    return values, bends, row_sum, moved


@triton.jit(do_not_specialize=["n", "m", "first_target", "total_rows", "parts"])
def gradient_kernel(
    z_ptr,
    norm_ptr,
    weight_ptr,
    params_ptr,
    table_ptr,
    out_ptr,
    moved_ptr,
    row_sum_ptr,
    map_ptr,
    source_offsets_ptr,
    target_offsets_ptr,
    n,
    m,
    first_target,
    total_rows,
    parts,
    KERNEL: tl.constexpr,
    COUNT: tl.constexpr,
    LADDER: tl.constexpr,
    BETAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CLASS: tl.constexpr,
    RAGGED: tl.constexpr,
    PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """A row tile against one part of all columns: with G the coefficients, sum_j G_ij z_j in
    [parts, total_rows, WIDTH], sum_j G_ij in [parts, total_rows], and per program the sums of the
    kernels and of slope times x over ordered pairs, [row_tiles * parts, 2].

    Grid: (row_tiles * parts,), the row tiles those of all packed rows.
    """
    row_tile = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
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
    if not exists:
        return
    chunk = tl.cdiv(all_columns, parts)
    begin = tl.minimum(part * chunk, all_columns)
    end = tl.minimum(begin + chunk, all_columns)
    params = params_ptr + problem.to(tl.int64) * 16
    scale = tl.load(params).to(tl.float32)
    inside = tl.where(in_source, tl.load(params + 1), tl.load(params + 2))
    across = tl.load(params + 3)
    slope_scale = tl.load(params + 10)
    k = tl.arange(0, WIDTH)
    row = tl.arange(0, BLOCK_M)
    a0, a1, a2 = load_operands(z_ptr, row_base, k, CLASS, STRIDE, WIDTH, BLOCK_M)
    row_norm = tl.load(norm_ptr + row_base + row)
    first, last = diagonal_positions(
        in_source, row_local, rows, source_columns, begin, end, BLOCK_M, BLOCK_N
    )
    half: tl.constexpr = CLASS == "bfloat16" or CLASS == "float16"
    values = tl.zeros([BLOCK_M], tl.float64)
    bends = tl.zeros([BLOCK_M], tl.float64)
    row_sum = tl.zeros([BLOCK_M, 16] if half else [BLOCK_M], tl.float32)
    moved = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for index in range(begin, end - (last - first)):
        position = index + tl.where(index >= first, last - first, 0)
        values, bends, row_sum, moved = _gradient_tile(
            values,
            bends,
            row_sum,
            moved,
            position,
            in_source,
            a0,
            a1,
            a2,
            row_norm,
            row_local,
            inside,
            across,
            slope_scale,
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
            False,
            KERNEL,
            COUNT,
            LADDER,
            BETAS,
            WEIGHTED,
            CLASS,
            STRIDE,
            WIDTH,
            BLOCK_M,
            BLOCK_N,
            INTERPRET,
        )
    for position in range(first, last):
        values, bends, row_sum, moved = _gradient_tile(
            values,
            bends,
            row_sum,
            moved,
            position,
            in_source,
            a0,
            a1,
            a2,
            row_norm,
            row_local,
            inside,
            across,
            slope_scale,
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
            True,
            KERNEL,
            COUNT,
            LADDER,
            BETAS,
            WEIGHTED,
            CLASS,
            STRIDE,
            WIDTH,
            BLOCK_M,
            BLOCK_N,
            INTERPRET,
        )
    if half:
        row_sum = tl.sum(row_sum, 1) / 16  # sixteen times the same
    if WEIGHTED:
        row_weight = tl.load(weight_ptr + row_base + row).to(tl.float64)
        values *= row_weight
        bends *= row_weight
    out = out_ptr + tl.program_id(0).to(tl.int64) * 2
    tl.store(out, tl.sum(values, 0))
    tl.store(out + 1, tl.sum(bends, 0))
    base = part.to(tl.int64) * total_rows + row_base
    tl.store(row_sum_ptr + base + row, row_sum)
    tl.store(moved_ptr + base * WIDTH + (row[:, None] * WIDTH + k[None, :]), moved)
