"""Triton kernels that finish the statistics and write the table of the kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from padkern.ops.mkmmd.triton_common import packed_base, round_bfloat16, segment, totals


@triton.jit
def _table_entry(
    table_ptr, betas_ptr, bits, head, TERM: tl.constexpr, ORDER: tl.constexpr, BETAS: tl.constexpr
):
    alpha = tl.cast(bits, tl.float64, bitcast=True)
    tl.store(table_ptr + TERM, alpha)
    tl.store(table_ptr + 64 + TERM, tl.cast(head, tl.float64, bitcast=True) / alpha)
    if BETAS:
        tl.store(table_ptr + 128 + TERM, tl.load(betas_ptr + ORDER).to(tl.float64))
    else:
        tl.store(table_ptr + 128 + TERM, tl.full((), 1.0, tl.float64))
    tl.store(table_ptr + 192 + TERM, tl.full((), ORDER, tl.float64))


@triton.jit
def _fill_table(
    table_ptr,
    alphas_ptr,
    betas_ptr,
    a0,
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    a7,
    head,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    ORDER: tl.constexpr,
    ALPHAS: tl.constexpr,
    BETAS: tl.constexpr,
):
    """Writes terms FIRST to FIRST + 7 from numbers, or all of them from a tensor.

    A number comes as the bits of a float64, because float arguments of a kernel are float32.
    """
    if ALPHAS:
        term = tl.arange(0, 64)
        inside = term < COUNT
        alpha = tl.load(alphas_ptr + term, mask=inside, other=1).to(tl.float64)
        tl.store(table_ptr + term, alpha)
        tl.store(table_ptr + 64 + term, tl.load(alphas_ptr).to(tl.float64) / alpha)
        beta = tl.full([64], 1.0, tl.float64)
        if BETAS:
            beta = tl.load(betas_ptr + term, mask=inside, other=1).to(tl.float64)
        tl.store(table_ptr + 128 + term, beta)
        tl.store(table_ptr + 192 + term, term.to(tl.float64))
    else:
        if FIRST + 0 < COUNT:
            _table_entry(table_ptr, betas_ptr, a0, head, FIRST, (ORDER >> 0) & 63, BETAS)
        if FIRST + 1 < COUNT:
            _table_entry(table_ptr, betas_ptr, a1, head, FIRST + 1, (ORDER >> 6) & 63, BETAS)
        if FIRST + 2 < COUNT:
            _table_entry(table_ptr, betas_ptr, a2, head, FIRST + 2, (ORDER >> 12) & 63, BETAS)
        if FIRST + 3 < COUNT:
            _table_entry(table_ptr, betas_ptr, a3, head, FIRST + 3, (ORDER >> 18) & 63, BETAS)
        if FIRST + 4 < COUNT:
            _table_entry(table_ptr, betas_ptr, a4, head, FIRST + 4, (ORDER >> 24) & 63, BETAS)
        if FIRST + 5 < COUNT:
            _table_entry(table_ptr, betas_ptr, a5, head, FIRST + 5, (ORDER >> 30) & 63, BETAS)
        if FIRST + 6 < COUNT:
            _table_entry(table_ptr, betas_ptr, a6, head, FIRST + 6, (ORDER >> 36) & 63, BETAS)
        if FIRST + 7 < COUNT:
            _table_entry(table_ptr, betas_ptr, a7, head, FIRST + 7, (ORDER >> 42) & 63, BETAS)


@triton.jit(do_not_specialize=["a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7", "head"])
def table_kernel(
    table_ptr,
    alphas_ptr,
    betas_ptr,
    a0,
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    a7,
    head,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    ORDER: tl.constexpr,
    ALPHAS: tl.constexpr,
    BETAS: tl.constexpr,
):
    """``_fill_table`` for the terms that ``mean_kernel`` has no arguments for. Grid: (1,)."""
    _fill_table(
        table_ptr,
        alphas_ptr,
        betas_ptr,
        a0,
        a1,
        a2,
        a3,
        a4,
        a5,
        a6,
        a7,
        head,
        FIRST,
        COUNT,
        ORDER,
        ALPHAS,
        BETAS,
    )


@triton.jit
def _block_sums(
    sums_ptr,
    base,
    rows,
    column,
    dim,
    PAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The two sums of ``sum_kernel`` over all blocks of one sample."""
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float64)
    squares = tl.zeros([BLOCK_R, BLOCK_D], tl.float64)
    blocks = (rows + PAD - 1) // PAD
    for start in range(0, blocks, BLOCK_R):
        block = start + tl.arange(0, BLOCK_R)
        mask = (block < blocks)[:, None] & (column < dim)[None, :]
        pointers = sums_ptr + (base // PAD + block)[:, None] * (2 * dim) + column[None, :]
        sums += tl.load(pointers, mask=mask, other=0.0)
        squares += tl.load(pointers + dim, mask=mask, other=0.0)
    return tl.sum(sums, 0), tl.sum(squares, 0)


@triton.jit
def _mean_is_large(mean, variance):
    """More than four standard deviations from 0; false for NaN."""
    return mean * mean > 16 * variance


@triton.jit(
    do_not_specialize=[
        "n",
        "m",
        "first_target",
        "a0",
        "a1",
        "a2",
        "a3",
        "a4",
        "a5",
        "a6",
        "a7",
        "head",
    ]
)
def mean_kernel(
    stats_ptr,
    sums_ptr,
    shift_ptr,
    moment_ptr,
    table_ptr,
    alphas_ptr,
    betas_ptr,
    source_offsets_ptr,
    target_offsets_ptr,
    n,
    m,
    dim,
    first_target,
    a0,
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    a7,
    head,
    COUNT: tl.constexpr,
    ORDER: tl.constexpr,
    ALPHAS: tl.constexpr,
    BETAS: tl.constexpr,
    CLASS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RAGGED: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What is subtracted from every row, [problems, dim], the variance summed over BLOCK_D columns,
    [problems, pieces], and the table of the kernels.

    Half classes keep the input's own values, whose products are exact, and shift a column by a
    value of their dtype only where the mean exceeds four standard deviations: there the shifted
    values need fewer digits, not more.

    Grid: (problems * cdiv(dim, BLOCK_D),).
    """
    pieces = tl.cdiv(dim, BLOCK_D)
    piece = tl.program_id(0) % pieces
    problem = tl.program_id(0) // pieces
    source_begin, source_rows = segment(source_offsets_ptr, n, problem, RAGGED)
    target_begin, target_rows = segment(target_offsets_ptr, m, problem, RAGGED)
    source_base = packed_base(source_begin, problem, 0, RAGGED, PAD)
    target_base = packed_base(target_begin, problem, first_target, RAGGED, PAD)
    source_total, _, _ = totals(stats_ptr, source_rows, problem, 0, WEIGHTED)
    target_total, _, _ = totals(stats_ptr, target_rows, problem, 1, WEIGHTED)
    column = piece * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < dim
    shift = shift_ptr + problem.to(tl.int64) * dim + column
    first = tl.load(shift, mask=inside, other=0.0)
    source_sums, source_squares = _block_sums(
        sums_ptr, source_base, source_rows, column, dim, PAD, BLOCK_R, BLOCK_D
    )
    target_sums, target_squares = _block_sums(
        sums_ptr, target_base, target_rows, column, dim, PAD, BLOCK_R, BLOCK_D
    )
    total = source_total + target_total
    mean = (source_sums + target_sums) / total
    variance = (source_squares + target_squares) / total - mean * mean
    variance = tl.where(variance < 0, 0.0, variance)  # keeps NaN
    center = first + mean
    if CLASS == "bfloat16":
        near = round_bfloat16(center.to(tl.float32)).to(tl.float64)
        center = tl.where(_mean_is_large(center, variance), near, 0.0)
    elif CLASS == "float16":
        near = center.to(tl.float32).to(tl.float16).to(tl.float64)
        center = tl.where(_mean_is_large(center, variance), near, 0.0)
    tl.store(shift, center, mask=inside)
    moment = tl.sum(tl.where(inside, variance, 0.0), 0)
    tl.store(moment_ptr + problem.to(tl.int64) * pieces + piece, moment)
    if tl.program_id(0) == 0:
        _fill_table(
            table_ptr,
            alphas_ptr,
            betas_ptr,
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            head,
            0,
            COUNT,
            ORDER,
            ALPHAS,
            BETAS,
        )
