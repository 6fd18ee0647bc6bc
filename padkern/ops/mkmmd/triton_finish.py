"""Triton kernel that adds the parts: the loss, the derivatives by scalars, the rows' gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from padkern.ops.mkmmd.triton_common import LOG2E, locate, owner, packed_base, segment


@triton.jit
def _add_slots(out_ptr, first, count, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the first and of the last output of ``count`` slots."""
    firsts = tl.zeros([BLOCK], tl.float64)
    lasts = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        place = out_ptr + (first + slot) * OUTPUTS
        firsts += tl.load(place, mask=slot < count, other=0.0)
        lasts += tl.load(place + OUTPUTS - 1, mask=slot < count, other=0.0)
    return tl.sum(firsts, 0), tl.sum(lasts, 0)


@triton.jit
def _scalars(
    out_ptr,
    params_ptr,
    table_ptr,
    value_ptr,
    d_sigma_ptr,
    source_rows,
    target_rows,
    source_base,
    target_base,
    parts,
    problem,
    KERNEL: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    COUNT: tl.constexpr,
    GRADIENT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss, and derivative by sigma_sq, from the programs' sums."""
    outputs: tl.constexpr = 2 if GRADIENT else 1
    source_slots = tl.cdiv(source_rows, TILE) * parts
    target_slots = tl.cdiv(target_rows, TILE) * parts
    total, bend = _add_slots(out_ptr, source_base // TILE * parts, source_slots, outputs, BLOCK)
    more, bends = _add_slots(out_ptr, target_base // TILE * parts, target_slots, outputs, BLOCK)
    params = params_ptr + problem.to(tl.int64) * 16
    sigma_sq = tl.load(params + 8)
    value = tl.load(params + 4) * (total + more)
    if KERNEL != "energy":
        term = tl.arange(0, 64)
        betas = tl.load(table_ptr + 128 + term, mask=term < COUNT, other=0.0)
        at_zero = tl.sum(betas, 0)
        value += tl.load(params + 7) * at_zero
        # Every kernel is 1 then, exactly.
        flat = at_zero * tl.load(params + 9) if ESTIMATOR == "cross" else at_zero * 0
        value = tl.where(sigma_sq == 0, flat, value)
    if ESTIMATOR == "tllib":
        value += 2 / (source_rows - 1).to(tl.float64)
    empty = (source_rows == 0) | (target_rows == 0)
    value = tl.where(empty, float("nan"), value)
    tl.store(value_ptr + problem, value.to(value_ptr.dtype.element_ty))
    if GRADIENT:
        d_sigma = tl.load(params + 6) * (bend + bends)
        tl.store(d_sigma_ptr + problem, tl.where(empty, float("nan"), d_sigma))


@triton.jit
def _gradient_rows(
    z_ptr,
    weight_ptr,
    moved_ptr,
    row_sum_ptr,
    gradient_ptr,
    base,
    begin,
    local,
    rows,
    factor,
    dim,
    total_rows,
    parts,
    CLASS: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """factor * w_i * (z_i sum_j G_ij - sum_j G_ij z_j), the sums added over the parts."""
    row = local + tl.arange(0, BLOCK_R)
    valid = row < rows
    dtype: tl.constexpr = gradient_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + base + row, mask=valid, other=0.0)
    row_sum = tl.zeros([BLOCK_R], dtype)
    for part in range(0, parts):
        offset = tl.cast(part, tl.int64) * total_rows
        row_sum += tl.load(row_sum_ptr + offset + base + row, mask=valid, other=0.0)
    scale = factor.to(dtype) * weight
    for start in range(0, dim, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        mask = valid[:, None] & (column < dim)[None, :]
        place = (base + row)[:, None] * WIDTH + column[None, :]
        packed = z_ptr + (base + row)[:, None] * STRIDE + column[None, :]
        z = tl.load(packed, mask=mask, other=0.0).to(dtype)
        if CLASS == "bfloat16x3" or CLASS == "bfloat16x6":
            z += tl.load(packed + WIDTH, mask=mask, other=0.0).to(dtype)
        if CLASS == "bfloat16x6":
            z += tl.load(packed + 2 * WIDTH, mask=mask, other=0.0).to(dtype)
        moved = tl.zeros([BLOCK_R, BLOCK_D], dtype)
        for part in range(0, parts):
            offset = tl.cast(part, tl.int64) * total_rows * WIDTH
            moved += tl.load(moved_ptr + offset + place, mask=mask, other=0.0)
        gradient = scale[:, None] * (z * row_sum[:, None] - moved)
        # A row of weight 0 has no part in the loss, not even in one that is NaN.
        gradient = tl.where((weight == 0)[:, None], 0.0, gradient)
        out = gradient_ptr + (begin + row)[:, None] * dim + column[None, :]
        tl.store(out, gradient, mask=mask)


@triton.jit(do_not_specialize=["n", "m", "first_target", "total_rows", "problems", "parts"])
def finish_kernel(
    out_ptr,
    params_ptr,
    table_ptr,
    z_ptr,
    weight_ptr,
    moved_ptr,
    row_sum_ptr,
    value_ptr,
    d_sigma_ptr,
    d_source_ptr,
    d_target_ptr,
    map_ptr,
    source_offsets_ptr,
    target_offsets_ptr,
    n,
    m,
    dim,
    first_target,
    total_rows,
    problems,
    parts,
    KERNEL: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    COUNT: tl.constexpr,
    GRADIENT: tl.constexpr,
    CLASS: tl.constexpr,
    RAGGED: tl.constexpr,
    PAD: tl.constexpr,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The first ``problems`` programs add the scalars, the others finish BLOCK_R packed rows each.

    TILE is the height of the pair kernel's row tiles.

    Grid: (problems + total_rows // BLOCK_R,), without GRADIENT (problems,).
    """
    if tl.program_id(0) < problems:
        problem = tl.program_id(0)
        source_rows, target_rows, source_base, target_base = locate(
            source_offsets_ptr, target_offsets_ptr, n, m, first_target, problem, RAGGED, PAD
        )
        _scalars(
            out_ptr,
            params_ptr,
            table_ptr,
            value_ptr,
            d_sigma_ptr,
            source_rows,
            target_rows,
            source_base,
            target_base,
            parts,
            problem,
            KERNEL,
            ESTIMATOR,
            COUNT,
            GRADIENT,
            TILE,
            BLOCK,
        )
        return
    row_base = (tl.program_id(0) - problems).to(tl.int64) * BLOCK_R
    problem, exists = owner(map_ptr, row_base, RAGGED, PAD)
    if not exists:
        return
    source_begin, source_rows = segment(source_offsets_ptr, n, problem, RAGGED)
    target_begin, target_rows = segment(target_offsets_ptr, m, problem, RAGGED)
    factor = tl.load(params_ptr + problem.to(tl.int64) * 16 + 5)
    if (source_rows == 0) | (target_rows == 0):
        factor = tl.full((), float("nan"), tl.float64)
    if row_base < first_target:
        base = packed_base(source_begin, problem, 0, RAGGED, PAD)
        _gradient_rows(
            z_ptr,
            weight_ptr,
            moved_ptr,
            row_sum_ptr,
            d_source_ptr,
            base,
            source_begin,
            (row_base - base).to(tl.int32),
            source_rows,
            factor,
            dim,
            total_rows,
            parts,
            CLASS,
            STRIDE,
            WIDTH,
            BLOCK_R,
            BLOCK_D,
        )
    else:
        base = packed_base(target_begin, problem, first_target, RAGGED, PAD)
        _gradient_rows(
            z_ptr,
            weight_ptr,
            moved_ptr,
            row_sum_ptr,
            d_target_ptr,
            base,
            target_begin,
            (row_base - base).to(tl.int32),
            target_rows,
            factor,
            dim,
            total_rows,
            parts,
            CLASS,
            STRIDE,
            WIDTH,
            BLOCK_R,
            BLOCK_D,
        )


@triton.jit(do_not_specialize=["slots"])
def kernel_sums_kernel(
    out_ptr,
    params_ptr,
    table_ptr,
    d_alphas_ptr,
    d_betas_ptr,
    slots,
    KERNEL: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Derivatives by alphas and betas from the sums of ``value_kernel``. One problem, grid (1,)."""
    term = tl.arange(0, BLOCK_U)
    values = tl.zeros([BLOCK_U], tl.float64)
    slopes = tl.zeros([BLOCK_U], tl.float64)
    for start in range(0, slots, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        place = slot.to(tl.int64)[:, None] * (2 * BLOCK_U) + term[None, :]
        mask = (slot < slots)[:, None] & (term < BLOCK_U)[None, :]
        values += tl.sum(tl.load(out_ptr + place, mask=mask, other=0.0), 0)
        slopes += tl.sum(tl.load(out_ptr + place + BLOCK_U, mask=mask, other=0.0), 0)
    inside = term < COUNT
    order = tl.load(table_ptr + 192 + term, mask=inside, other=0).to(tl.int32)
    alpha = tl.load(table_ptr + term, mask=inside, other=1.0)
    beta = tl.load(table_ptr + 128 + term, mask=inside, other=0.0)
    common = tl.load(params_ptr + 4)
    sigma_sq = tl.load(params_ptr + 8)
    d_betas = common * values
    d_alphas = -common * beta * slopes / alpha
    if KERNEL == "gaussian":
        d_alphas = d_alphas / LOG2E
    if KERNEL != "energy":
        d_betas += tl.load(params_ptr + 7)
        flat = tl.load(params_ptr + 9) if ESTIMATOR == "cross" else sigma_sq * 0
        d_betas = tl.where(sigma_sq == 0, flat, d_betas)
        d_alphas = tl.where(sigma_sq == 0, 0.0, d_alphas)
    tl.store(d_alphas_ptr + order, d_alphas, mask=inside)
    tl.store(d_betas_ptr + order, d_betas, mask=inside)
