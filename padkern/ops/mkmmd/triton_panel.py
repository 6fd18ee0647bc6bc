"""Triton kernels of the gradient of wide rows: panels of coefficients, then their product.

A panel is sized for the L2 cache and used once, so memory stays O((n + m) D).
"""

from __future__ import annotations

import triton
import triton.language as tl

from padkern.ops.mkmmd.triton_common import locate, owner
from padkern.ops.mkmmd.triton_gradient import coefficients, pair_coefficients
from padkern.ops.mkmmd.triton_kernels import position_tile, product, tile_distances


@triton.jit(
    do_not_specialize=["n", "m", "first_target", "first_row", "first_column", "height", "breadth"]
)
def panel_kernel(
    z_ptr,
    norm_ptr,
    weight_ptr,
    params_ptr,
    table_ptr,
    panel_ptr,
    panel_sum_ptr,
    panel_out_ptr,
    map_ptr,
    source_offsets_ptr,
    target_offsets_ptr,
    n,
    m,
    dim,
    first_target,
    first_row,
    first_column,
    height,
    breadth,
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
    BLOCK_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One panel of the coefficients, [height * BLOCK_M, breadth * BLOCK_N], and its sums.

    Its row tiles are those of the packed rows from ``first_row``, its column tiles those of each
    row's own problem from ``first_column``. The split classes have a panel for each part. Row sums
    go to [breadth, height * BLOCK_M], the sums of the kernels and of slope times x to [height,
    breadth, 2].

    Grid: (height * breadth,).
    """
    group = tl.program_id(0) // (8 * breadth)
    members = tl.minimum(height - group * 8, 8)
    panel_row = group * 8 + (tl.program_id(0) % (8 * breadth)) % members
    panel_column = (tl.program_id(0) % (8 * breadth)) // members
    position = first_column + panel_column
    row_base = (first_row + panel_row).to(tl.int64) * BLOCK_M
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
    if position >= all_columns:
        return
    from_source, local, base, _ = position_tile(
        position, source_columns, source_rows, target_rows, source_base, target_base, BLOCK_N
    )
    params = params_ptr + problem.to(tl.int64) * 16
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    scale = tl.load(params).to(norm_ptr.dtype.element_ty)
    x = tile_distances(
        z_ptr,
        norm_ptr,
        tl.load(norm_ptr + row_base + row),
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
    same = from_source == in_source
    inside = tl.where(in_source, tl.load(params + 1), tl.load(params + 2))
    factor = tl.where(same, inside, tl.load(params + 3))
    value, slope = pair_coefficients(
        x,
        factor * tl.load(params + 10),
        weight_ptr,
        base,
        row_local,
        # Rows and columns meet on the diagonal only: across samples columns count below 0.
        tl.where(same, local, -BLOCK_N),
        table_ptr,
        True,
        KERNEL,
        COUNT,
        LADDER,
        BETAS,
        WEIGHTED,
        BLOCK_M,
        BLOCK_N,
    )
    values = tl.sum(value, 1).to(tl.float64) * factor
    bends = tl.sum(slope * x, 1).to(tl.float64)
    if WEIGHTED:
        row_weight = tl.load(weight_ptr + row_base + row).to(tl.float64)
        values *= row_weight
        bends *= row_weight
    out = panel_out_ptr + (panel_row * breadth + panel_column) * 2
    tl.store(out, tl.sum(values, 0))
    tl.store(out + 1, tl.sum(bends, 0))
    g0, g1, g2 = coefficients(slope, CLASS, INTERPRET)
    if CLASS == "bfloat16" or CLASS == "float16":
        # As in ``gradient_kernel``: the sums of what the product will see.
        slope = g0.to(tl.float32)
    sums = panel_sum_ptr + (panel_column * height + panel_row) * BLOCK_M
    tl.store(sums + row, tl.sum(slope, 1))
    line = breadth * BLOCK_N
    first = panel_ptr + panel_row.to(tl.int64) * BLOCK_M * line
    place = row[:, None] * line + (panel_column * BLOCK_N + column)[None, :]
    copy = height.to(tl.int64) * BLOCK_M * line
    tl.store(first + place, g0)
    if CLASS == "bfloat16x3" or CLASS == "bfloat16x6":
        tl.store(first + copy + place, g1)
    if CLASS == "bfloat16x6":
        tl.store(first + 2 * copy + place, g2)


@triton.jit(
    do_not_specialize=["n", "m", "first_target", "first_row", "first_column", "height", "breadth"]
)
def product_kernel(
    z_ptr,
    panel_ptr,
    panel_sum_ptr,
    panel_out_ptr,
    moved_ptr,
    row_sum_ptr,
    out_ptr,
    map_ptr,
    source_offsets_ptr,
    target_offsets_ptr,
    n,
    m,
    first_target,
    first_row,
    first_column,
    height,
    breadth,
    CLASS: tl.constexpr,
    RAGGED: tl.constexpr,
    PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Adds a panel times its columns' rows to ``moved``, its sums to ``row_sum`` and ``out``.

    The first panel of a row sets them. BLOCK_M and BLOCK_N are those of ``panel_kernel``; BLOCK_K
    divides BLOCK_N.

    Grid: (height * cdiv(WIDTH, BLOCK_D),).
    """
    pieces: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    piece = tl.program_id(0) % pieces
    panel_row = tl.program_id(0) // pieces
    row_base = (first_row + panel_row).to(tl.int64) * BLOCK_M
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
    columns = tl.maximum(tl.minimum(all_columns - first_column, breadth), 0)
    row = tl.arange(0, BLOCK_M)
    feature = piece * BLOCK_D + tl.arange(0, BLOCK_D)
    line = breadth * BLOCK_N
    panel = panel_ptr + panel_row.to(tl.int64) * BLOCK_M * line
    copy = height.to(tl.int64) * BLOCK_M * line
    dtype: tl.constexpr = moved_ptr.dtype.element_ty
    inside = (feature < WIDTH)[None, :]
    out = moved_ptr + row_base * WIDTH + (row[:, None] * WIDTH + feature[None, :])
    everywhere = inside & (row >= 0)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype)
    if CLASS == "float64":
        for column in range(0, columns * BLOCK_N):
            _, _, base, _ = position_tile(
                first_column + column // BLOCK_N,
                source_columns,
                source_rows,
                target_rows,
                source_base,
                target_base,
                BLOCK_N,
            )
            z = z_ptr + (base + column % BLOCK_N) * STRIDE + feature
            z = tl.load(z, mask=feature < WIDTH, other=0)
            acc += tl.load(panel + row * line + column)[:, None] * z[None, :]
    else:
        steps: tl.constexpr = BLOCK_N // BLOCK_K
        k = tl.arange(0, BLOCK_K)
        for step in range(0, columns * steps):
            _, _, base, _ = position_tile(
                first_column + step // steps,
                source_columns,
                source_rows,
                target_rows,
                source_base,
                target_base,
                BLOCK_N,
            )
            base += (step % steps) * BLOCK_K
            here = row[:, None] * line + (step * BLOCK_K + k)[None, :]
            there = z_ptr + base * STRIDE + (k[:, None] * STRIDE + feature[None, :])
            g0 = tl.load(panel + here)
            b0 = tl.load(there, mask=inside, other=0)
            g1 = g0
            g2 = g0
            b1 = b0
            b2 = b0
            if CLASS == "bfloat16x3" or CLASS == "bfloat16x6":
                g1 = tl.load(panel + copy + here)
                b1 = tl.load(there + WIDTH, mask=inside, other=0)
            if CLASS == "bfloat16x6":
                g2 = tl.load(panel + 2 * copy + here)
                b2 = tl.load(there + 2 * WIDTH, mask=inside, other=0)
            acc = product(g0, g1, g2, b0, b1, b2, acc, CLASS, INTERPRET)
    if first_column > 0:
        acc += tl.load(out, mask=everywhere, other=0)
    tl.store(out, acc, mask=everywhere)
    if piece == 0:
        row_sum = tl.zeros([BLOCK_M], dtype)
        value = tl.full((), 0.0, tl.float64)
        bend = tl.full((), 0.0, tl.float64)
        sums = out_ptr + (first_row + panel_row).to(tl.int64) * 2
        if first_column > 0:
            row_sum = tl.load(row_sum_ptr + row_base + row)
            value = tl.load(sums)
            bend = tl.load(sums + 1)
        for column in range(0, columns):
            row_sum += tl.load(panel_sum_ptr + (column * height + panel_row) * BLOCK_M + row)
            value += tl.load(panel_out_ptr + (panel_row * breadth + column) * 2)
            bend += tl.load(panel_out_ptr + (panel_row * breadth + column) * 2 + 1)
        tl.store(row_sum_ptr + row_base + row, row_sum)
        tl.store(sums, value)
        tl.store(sums + 1, bend)
