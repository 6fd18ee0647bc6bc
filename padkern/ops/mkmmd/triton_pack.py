"""Triton kernel that writes the rows as operands of the pair loops, and a problem's scalars."""

from __future__ import annotations

import triton
import triton.language as tl

from padkern.ops.mkmmd.triton_common import (
    FAR,
    LOG2E,
    load_rows,
    owner,
    packed_base,
    round_bfloat16,
    round_tfloat32,
    segment,
    totals,
)


@triton.jit
def _scalars(
    params_ptr,
    sigma_sq_ptr,
    stats_ptr,
    moment_ptr,
    table_ptr,
    problem,
    source_rows,
    target_rows,
    KERNEL: tl.constexpr,
    COUNT: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    CLASS: tl.constexpr,
    GIVEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    pieces,
    store,
    BLOCK_P: tl.constexpr,
):
    """Returns a problem's scale, rounded to the compute dtype; if ``store``, writes its scalars:

    0 scale: x = -scale * squared distance
    1, 2, 3 factors of the pairs inside the source, inside the target, across, times 1 / factor 4
    4 common factor of all pairs (weights over their mean)
    5 derivative of a row: this * (z_i sum_j G_ij - sum_j G_ij z_j)
    6 derivative by sigma_sq: this * sum of factors * slope * x
    7 weight of the diagonal
    8 sigma_sq; 9 product of the total weights
    10 what slopes are multiplied by, for float16 to hold them; 5 and 6 undo it
    """
    piece = tl.arange(0, BLOCK_P)
    moments = moment_ptr + problem.to(tl.int64) * pieces + piece
    moment = tl.sum(tl.load(moments, mask=piece < pieces, other=0.0), 0)
    sigma_sq = 2 * moment
    if GIVEN:
        sigma_sq = tl.load(sigma_sq_ptr + problem).to(tl.float64)
    if CLASS != "float64":
        sigma_sq = sigma_sq.to(tl.float32).to(tl.float64)
        moment = moment.to(tl.float32).to(tl.float64)
    source_total, source_squares, _ = totals(stats_ptr, source_rows, problem, 0, WEIGHTED)
    target_total, target_squares, _ = totals(stats_ptr, target_rows, problem, 1, WEIGHTED)
    rows_s = source_rows.to(tl.float64)
    rows_t = target_rows.to(tl.float64)
    # Sums of squares of the weights over their mean, over the square of the number of rows.
    source_square = source_squares / (source_total * source_total)
    target_square = target_squares / (target_total * target_total)
    diagonal = tl.full((), 0.0, tl.float64)
    common = 1 / (rows_s * rows_t)
    across = tl.full((), -1.0, tl.float64)
    if ESTIMATOR == "cross":
        inside_s = diagonal
        inside_t = diagonal
        across = tl.full((), 0.5, tl.float64)  # every pair is met from both sides
        common = (source_total / rows_s) * (target_total / rows_t)
        defined = moment == moment
    elif ESTIMATOR == "biased":
        diagonal = source_square + target_square
        inside_s = rows_t / rows_s
        inside_t = rows_s / rows_t
        defined = diagonal == diagonal
    else:
        inside_s = rows_t / rows_s / (1 - source_square)
        inside_t = rows_s / rows_t / (1 - target_square)
        defined = (source_square < 1) & (target_square < 1)
        if ESTIMATOR == "tllib":
            defined = defined & (source_rows == target_rows)
    if KERNEL == "energy":
        scale = tl.full((), 1.0, tl.float64)
        per_sigma = tl.full((), 0.0, tl.float64)
        regular = defined
        unit = scale
    else:
        unit = tl.minimum(1 / (2 * tl.load(table_ptr) * sigma_sq), 3e38)
        zero = sigma_sq == 0
        scale = tl.where(zero, 0.0, unit)
        unit = scale
        per_sigma = tl.where(zero, 0.0, -common / sigma_sq)
        if KERNEL == "gaussian":
            scale = scale * LOG2E
            per_sigma = per_sigma / LOG2E
        regular = defined & (sigma_sq >= 0)
    # Not finite: some used row is not, or its square is not.
    regular = regular & (moment - moment == 0)
    scale = tl.where(regular, scale, float("nan"))
    slope_scale = tl.full((), 1.0, tl.float64)
    if CLASS == "float16":
        # The largest slope is at distance 0. float16 then has full precision down to 2^-28 of it.
        term = tl.arange(0, 64)
        ratios = tl.load(table_ptr + 64 + term, mask=term < COUNT, other=0.0)
        betas = tl.load(table_ptr + 128 + term, mask=term < COUNT, other=0.0)
        largest = tl.sum(tl.abs(ratios * betas), 0)
        largest *= tl.maximum(tl.maximum(tl.abs(inside_s), tl.abs(inside_t)), 1.0)
        slope_scale = tl.where(largest > 0, 16384 / largest, 1.0)
    if CLASS != "float64":
        scale = scale.to(tl.float32).to(tl.float64)
    if store:
        params = params_ptr + problem.to(tl.int64) * 16
        tl.store(params, scale)
        tl.store(params + 1, inside_s)
        tl.store(params + 2, inside_t)
        tl.store(params + 3, across)
        tl.store(params + 4, common)
        tl.store(params + 5, -4 * common * unit / slope_scale)
        tl.store(params + 6, per_sigma / slope_scale)
        tl.store(params + 7, diagonal)
        tl.store(params + 8, tl.where(regular, sigma_sq, float("nan")))
        tl.store(params + 9, source_total * target_total)
        tl.store(params + 10, slope_scale)
    return scale


@triton.jit
def _store_rows(z, out, mask, CLASS: tl.constexpr, WIDTH: tl.constexpr):
    """Writes float64 rows in the form of their class; returns the norms its products agree with.

    float64: distances come from differences, norms are 0. The split classes leave out in the norms
    what their products leave out, so equal rows cancel.
    """
    if CLASS == "float64":
        tl.store(out, z, mask=mask)
        norm = tl.sum(tl.zeros_like(z), 1)
    elif CLASS == "bfloat16x3" or CLASS == "bfloat16x6":
        first = round_bfloat16(z.to(tl.float32))
        z -= first.to(tl.float64)
        second = round_bfloat16(z.to(tl.float32))
        tl.store(out, first.to(tl.bfloat16), mask=mask)
        tl.store(out + WIDTH, second.to(tl.bfloat16), mask=mask)
        first = first.to(tl.float64)
        norm = tl.sum(first * (first + 2 * second.to(tl.float64)), 1)
        if CLASS == "bfloat16x6":
            z -= second.to(tl.float64)
            third = round_bfloat16(z.to(tl.float32))
            tl.store(out + 2 * WIDTH, third.to(tl.bfloat16), mask=mask)
            second = second.to(tl.float64)
            norm += tl.sum(second * second + 2 * first * third.to(tl.float64), 1)
    else:
        z = z.to(tl.float32)
        if CLASS == "float16":
            rounded = z.to(tl.float16).to(tl.float32)
            tl.store(out, rounded.to(tl.float16), mask=mask)
        elif CLASS == "bfloat16":
            rounded = round_bfloat16(z)
            tl.store(out, rounded.to(tl.bfloat16), mask=mask)
        else:
            rounded = round_tfloat32(z)
            tl.store(out, rounded, mask=mask)
        norm = tl.sum(rounded.to(tl.float64) * rounded.to(tl.float64), 1)
    return norm


@triton.jit(do_not_specialize=["n", "m", "first_target"])
def pack_kernel(
    source_ptr,
    target_ptr,
    source_weight_ptr,
    target_weight_ptr,
    sigma_sq_ptr,
    stats_ptr,
    shift_ptr,
    moment_ptr,
    table_ptr,
    params_ptr,
    z_ptr,
    norm_ptr,
    weight_ptr,
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
    pieces,
    KERNEL: tl.constexpr,
    COUNT: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    CLASS: tl.constexpr,
    GIVEN: tl.constexpr,
    SOURCE_WEIGHTED: tl.constexpr,
    TARGET_WEIGHTED: tl.constexpr,
    RAGGED: tl.constexpr,
    PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Shifted rows as operands of the products, their norms and weights; the problem's scalars.

    Grid: (total_rows // BLOCK_R,).
    """
    row_base = tl.program_id(0).to(tl.int64) * BLOCK_R
    problem, exists = owner(map_ptr, row_base, RAGGED, PAD)
    if not exists:
        return
    weighted: tl.constexpr = SOURCE_WEIGHTED or TARGET_WEIGHTED
    source_begin, source_rows = segment(source_offsets_ptr, n, problem, RAGGED)
    target_begin, target_rows = segment(target_offsets_ptr, m, problem, RAGGED)
    in_source = row_base < first_target
    base = tl.where(
        in_source,
        packed_base(source_begin, problem, 0, RAGGED, PAD),
        packed_base(target_begin, problem, first_target, RAGGED, PAD),
    )
    local = (row_base - base).to(tl.int32)
    scale = _scalars(
        params_ptr,
        sigma_sq_ptr,
        stats_ptr,
        moment_ptr,
        table_ptr,
        problem,
        source_rows,
        target_rows,
        KERNEL,
        COUNT,
        ESTIMATOR,
        CLASS,
        GIVEN,
        weighted,
        pieces,
        in_source & (local == 0),
        BLOCK_P,
    )
    row = local + tl.arange(0, BLOCK_R)
    side = tl.where(in_source, 0, 1)
    rows = tl.where(in_source, source_rows, target_rows)
    total, _, _ = totals(stats_ptr, rows, problem, side, weighted)
    norm = tl.zeros([BLOCK_R], tl.float64)
    weight = tl.zeros([BLOCK_R], tl.float64)
    for start in range(0, WIDTH, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
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
        inside = column < dim
        shift = tl.load(shift_ptr + problem.to(tl.int64) * dim + column, mask=inside, other=0.0)
        kept = (weight != 0)[:, None] & inside[None, :]
        z = tl.where(kept, values - shift[None, :], 0.0)
        out = (base + row)[:, None] * STRIDE + column[None, :]
        mask = (column < WIDTH)[None, :] & (row < row + 1)[:, None]
        norm += _store_rows(z, z_ptr + out, mask, CLASS, WIDTH)
    scaled = tl.where(weight != 0, weight * (rows / total), 0.0)
    # Rows past the end are far from all others.
    norm = tl.where(row < rows, norm * scale, FAR)
    tl.store(norm_ptr + base + row, norm.to(norm_ptr.dtype.element_ty))
    tl.store(weight_ptr + base + row, scaled.to(weight_ptr.dtype.element_ty))
