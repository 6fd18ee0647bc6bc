"""Triton kernels around the pair loops: statistics, packing and the final sums. See ``TRITON.md``.

Every sum has a fixed order: a program adds its own block, one program adds the blocks. Statistics
and final sums are float64. Memory layout:

- Packed rows. A problem's sample starts at a multiple of ``PAD`` and ends with zero rows up to one,
  so the pair kernels load without masks. ``z0`` and ``z1`` [rows, WIDTH] are the operands of the
  products, ``norm`` their squared norms, ``weight`` the row weights over their mean, 0 for unused
  rows.
- ``params`` [problems, 16] float64: see ``_store_params``.
- ``table`` [256] float64: alphas in the order of the terms, their ratios to the first (64), betas
  (128), the position of each term in the caller's order (192).
"""

from __future__ import annotations

import triton
import triton.language as tl

from padkern.ops.mkmmd.triton_common import load_rows, owner, packed_base, segment, totals


@triton.jit
def _weight_sums(
    weight_ptr,
    stride,
    stats_ptr,
    offsets_ptr,
    total,
    problem,
    WEIGHTED: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin, rows = segment(offsets_ptr, total, problem, RAGGED)
    if WEIGHTED:
        sums = tl.zeros([BLOCK], tl.float64)
        squares = tl.zeros([BLOCK], tl.float64)
        first = tl.zeros([BLOCK], tl.int32) + rows
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            valid = row < rows
            weight = tl.load(weight_ptr + (begin + row) * stride, mask=valid, other=0)
            weight = weight.to(tl.float64)
            sums += weight
            squares += weight * weight
            first = tl.minimum(first, tl.where(weight != 0, row, rows))
        tl.store(stats_ptr, tl.sum(sums, 0))
        tl.store(stats_ptr + 1, tl.sum(squares, 0))
        tl.store(stats_ptr + 2, tl.min(first, 0).to(tl.float64))
    else:
        tl.store(stats_ptr, rows.to(tl.float64))
        tl.store(stats_ptr + 1, rows.to(tl.float64))
        tl.store(stats_ptr + 2, (rows * 0).to(tl.float64))


@triton.jit(do_not_specialize=["n", "m"])
def weight_kernel(
    source_weight_ptr,
    target_weight_ptr,
    stats_ptr,
    source_offsets_ptr,
    target_offsets_ptr,
    n,
    m,
    stride_source_weight,
    stride_target_weight,
    SOURCE_WEIGHTED: tl.constexpr,
    TARGET_WEIGHTED: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum, sum of squares and first non-zero row of each sample's weights: [problems, 2, 4].

    Grid: (problems * 2,).
    """
    problem = tl.program_id(0) // 2
    side = tl.program_id(0) % 2
    stats = stats_ptr + problem.to(tl.int64) * 8 + side * 4
    if side == 0:
        _weight_sums(
            source_weight_ptr,
            stride_source_weight,
            stats,
            source_offsets_ptr,
            n,
            problem,
            SOURCE_WEIGHTED,
            RAGGED,
            BLOCK,
        )
    else:
        _weight_sums(
            target_weight_ptr,
            stride_target_weight,
            stats,
            target_offsets_ptr,
            m,
            problem,
            TARGET_WEIGHTED,
            RAGGED,
            BLOCK,
        )


@triton.jit
def _map_side(
    map_ptr,
    offsets_ptr,
    total,
    problem,
    problems,
    first,
    last,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin, rows = segment(offsets_ptr, total, problem, True)
    base = packed_base(begin, problem, first, True, PAD) // PAD
    # Up to the next problem's first block: those in between belong to nobody.
    end = tl.cast(last, tl.int64) // PAD
    if problem + 1 < problems:
        following, _ = segment(offsets_ptr, total, problem + 1, True)
        end = tl.minimum(packed_base(following, problem + 1, first, True, PAD) // PAD, end)
    used = tl.cdiv(rows, PAD)
    for start in range(0, (end - base).to(tl.int32), BLOCK):
        block = start + tl.arange(0, BLOCK)
        owner = tl.where(block < used, problem, -1)
        tl.store(map_ptr + base + block, owner, mask=base + block < end)
    if problem == 0:
        # Offsets need not begin at 0.
        for start in range((tl.cast(first, tl.int64) // PAD).to(tl.int32), base.to(tl.int32)):
            tl.store(map_ptr + start, -1)


@triton.jit(do_not_specialize=["n", "m", "problems", "first_target", "total_rows"])
def map_kernel(
    map_ptr,
    source_offsets_ptr,
    target_offsets_ptr,
    n,
    m,
    problems,
    first_target,
    total_rows,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The problem of each block of PAD packed rows, int32, -1 for none. Grid: (problems * 2,)."""
    problem = tl.program_id(0) // 2
    if tl.program_id(0) % 2 == 0:
        _map_side(map_ptr, source_offsets_ptr, n, problem, problems, 0, first_target, PAD, BLOCK)
    else:
        _map_side(
            map_ptr,
            target_offsets_ptr,
            m,
            problem,
            problems,
            first_target,
            total_rows,
            PAD,
            BLOCK,
        )


@triton.jit
def _first_row(
    source_ptr,
    target_ptr,
    stride_source,
    stride_source_dim,
    stride_target,
    stride_target_dim,
    source_begin,
    target_begin,
    source_first,
    target_first,
    source_rows,
    target_rows,
    column,
    dim,
):
    """The first used pooled row in float64. Differences to it are 0 when all rows are equal."""
    in_source = source_first < source_rows
    in_target = (target_first < target_rows) & (source_first >= source_rows)
    inside = column < dim
    column = column.to(tl.int64)
    from_source = tl.load(
        source_ptr + (source_begin + source_first) * stride_source + column * stride_source_dim,
        mask=inside & in_source,
        other=0,
    )
    from_target = tl.load(
        target_ptr + (target_begin + target_first) * stride_target + column * stride_target_dim,
        mask=inside & in_target,
        other=0,
    )
    return tl.where(in_source, from_source.to(tl.float64), from_target.to(tl.float64))


@triton.jit(do_not_specialize=["n", "m", "first_target"])
def sum_kernel(
    source_ptr,
    target_ptr,
    source_weight_ptr,
    target_weight_ptr,
    stats_ptr,
    sums_ptr,
    shift_ptr,
    map_ptr,
    source_offsets_ptr,
    target_offsets_ptr,
    n,
    m,
    dim,
    first_target,
    stride_source,
    stride_source_dim,
    stride_target,
    stride_target_dim,
    stride_source_weight,
    stride_target_weight,
    SOURCE_WEIGHTED: tl.constexpr,
    TARGET_WEIGHTED: tl.constexpr,
    RAGGED: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Weighted column sums of x - first and of its square over PAD rows, [blocks, 2, dim], and the
    first used row itself, [problems, dim].

    Grid: (total_rows // PAD * cdiv(dim, BLOCK_D),).
    """
    pieces = tl.cdiv(dim, BLOCK_D)
    piece = tl.program_id(0) % pieces
    block = tl.program_id(0) // pieces
    row_base = block.to(tl.int64) * PAD
    problem, exists = owner(map_ptr, row_base, RAGGED, PAD)
    if exists:
        source_begin, source_rows = segment(source_offsets_ptr, n, problem, RAGGED)
        target_begin, target_rows = segment(target_offsets_ptr, m, problem, RAGGED)
        in_source = row_base < first_target
        base = tl.where(
            in_source,
            packed_base(source_begin, problem, 0, RAGGED, PAD),
            packed_base(target_begin, problem, first_target, RAGGED, PAD),
        )
        local = (row_base - base).to(tl.int32)
        weighted: tl.constexpr = SOURCE_WEIGHTED or TARGET_WEIGHTED
        _, _, source_first = totals(stats_ptr, source_rows, problem, 0, weighted)
        _, _, target_first = totals(stats_ptr, target_rows, problem, 1, weighted)
        column = piece * BLOCK_D + tl.arange(0, BLOCK_D)
        first = _first_row(
            source_ptr,
            target_ptr,
            stride_source,
            stride_source_dim,
            stride_target,
            stride_target_dim,
            source_begin,
            target_begin,
            source_first,
            target_first,
            source_rows,
            target_rows,
            column,
            dim,
        )
        if in_source & (local == 0):
            tl.store(shift_ptr + problem.to(tl.int64) * dim + column, first, mask=column < dim)
        sums = tl.zeros([BLOCK_D], tl.float64)
        squares = tl.zeros([BLOCK_D], tl.float64)
        for start in range(0, PAD, BLOCK_R):
            row = local + start + tl.arange(0, BLOCK_R)
            if in_source:
                values, weight = load_rows(
                    source_ptr,
                    stride_source,
                    stride_source_dim,
                    source_weight_ptr,
                    stride_source_weight,
                    source_begin,
                    row,
                    source_rows,
                    column,
                    dim,
                    SOURCE_WEIGHTED,
                )
            else:
                values, weight = load_rows(
                    target_ptr,
                    stride_target,
                    stride_target_dim,
                    target_weight_ptr,
                    stride_target_weight,
                    target_begin,
                    row,
                    target_rows,
                    column,
                    dim,
                    TARGET_WEIGHTED,
                )
            shifted = tl.where((weight != 0)[:, None], values - first[None, :], 0.0)
            weighted_values = weight[:, None] * shifted
            sums += tl.sum(weighted_values, 0)
            squares += tl.sum(weighted_values * shifted, 0)
        out = sums_ptr + row_base // PAD * (2 * dim) + column
        tl.store(out, sums, mask=column < dim)
        tl.store(out + dim, squares, mask=column < dim)
