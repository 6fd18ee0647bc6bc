"""Helpers of the Triton kernels: where a problem's rows lie, roundings, products, kernels."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Scaled squared distance of padding rows: Gaussian and Laplacian kernels are 0 there.
FAR = tl.constexpr(1e30)


@triton.jit
def segment(offsets_ptr, total, problem, RAGGED: tl.constexpr):
    """First row (int64) and number of rows (int32) of one sample of a problem."""
    total = tl.cast(total, tl.int64)
    if RAGGED:
        # Clamped, because nobody has read the offsets: bad ones must not reach foreign memory.
        begin = tl.minimum(tl.maximum(tl.load(offsets_ptr + problem), 0), total)
        end = tl.minimum(tl.load(offsets_ptr + problem + 1), total)
        rows = tl.maximum(end - begin, 0).to(tl.int32)
    else:
        begin = tl.full((), 0, tl.int64)
        rows = total.to(tl.int32)
    return begin, rows


@triton.jit
def packed_base(begin, problem, first, RAGGED: tl.constexpr, PAD: tl.constexpr):
    """Packed row at which a sample starts; ``first`` is where the samples of its side start."""
    base = tl.cast(first, tl.int64)
    if RAGGED:
        base += (begin // PAD + problem) * PAD
    return base


@triton.jit
def round_bfloat16(x):
    """float32 rounded to the nearest bfloat16 value, still float32; NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def round_tfloat32(x):
    """float32 rounded to the nearest TF32 value (10 fraction bits), half away from zero."""
    bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def locate(
    source_offsets_ptr,
    target_offsets_ptr,
    n,
    m,
    first_target,
    problem,
    RAGGED: tl.constexpr,
    PAD: tl.constexpr,
):
    """Rows of a problem's two samples (int32) and the packed rows where they start (int64)."""
    source_begin, source_rows = segment(source_offsets_ptr, n, problem, RAGGED)
    target_begin, target_rows = segment(target_offsets_ptr, m, problem, RAGGED)
    source_base = packed_base(source_begin, problem, 0, RAGGED, PAD)
    target_base = packed_base(target_begin, problem, first_target, RAGGED, PAD)
    return source_rows, target_rows, source_base, target_base


@triton.jit
def owner(map_ptr, row_base, RAGGED: tl.constexpr, PAD: tl.constexpr):
    """The problem that a packed row belongs to, and whether there is one."""
    problem = tl.full((), 0, tl.int32)
    if RAGGED:
        problem = tl.load(map_ptr + row_base // PAD)
    return tl.maximum(problem, 0), problem >= 0


@triton.jit
def dot(a, b, acc, CLASS: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a @ b. The interpreter has no bfloat16 product; in float32 it is the same, exactly."""
    if INTERPRET:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    elif CLASS == "tfloat32":
        acc = tl.dot(a, b, acc, input_precision="tf32")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def to_bfloat16(x, INTERPRET: tl.constexpr):
    """Nearest bfloat16; the interpreter truncates."""
    if INTERPRET:
        x = round_bfloat16(x)
    return x.to(tl.bfloat16)


@triton.jit
def split_bfloat16(x):
    """The nearest bfloat16, and what is left of x. Rounding by hand spares a conversion back; what
    it makes of a NaN does not matter, the rest is NaN then."""
    bits = (x.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000
    high = bits.to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), x - high


@triton.jit
def distances(gram, row_norm, column_norm, scale, KERNEL: tl.constexpr, WIDTH: tl.constexpr):
    """x, minus the scaled squared distances, from inner products and norms times ``scale``.

    Never positive, NaN stays NaN. Kernels of the distance itself take what rounding may have left
    of identical rows as 0; the products' rounding grows with the number of terms.
    """
    norms = row_norm[:, None] + column_norm[None, :]
    x = (2 * scale) * gram - norms
    if KERNEL == "laplacian" or KERNEL == "energy":
        x = tl.where(x > (-4.8e-7 * (1 + WIDTH / 64)) * norms, 0.0, x)
    else:
        x = tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def exact_distances(
    first_ptr,
    second_ptr,
    dim,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Squared distances of float64 rows from differences, one feature at a time."""
    first = first_ptr + tl.arange(0, BLOCK_M) * WIDTH
    second = second_ptr + tl.arange(0, BLOCK_N) * WIDTH
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float64)
    for k in range(0, dim):
        difference = tl.load(first + k)[:, None] - tl.load(second + k)[None, :]
        total += difference * difference
    return total


@triton.jit
def profile_term(x, ratio, KERNEL: tl.constexpr):
    """One kernel, and its derivative by x = -d / (2 alpha_0 sigma_sq).

    ``ratio`` is alpha_0 / alpha. Gaussian: x carries a factor log2(e) and the derivative lacks
    it. Energy: x is -d.
    """
    if KERNEL == "gaussian":
        value = tl.exp2(x * ratio)
        slope = value * ratio
    elif KERNEL == "laplacian":
        root = tl.sqrt(-2 * x)
        width = tl.sqrt(ratio)
        value = tl.exp2(root * (width * -LOG2E))
        slope = tl.where(root == 0, 0.0, value * width / root)
    elif KERNEL == "inverse_multiquadric":
        value = 1 / tl.sqrt(1 - x * ratio)
        slope = 0.5 * ratio * value * value * value
    elif KERNEL == "rational_quadratic":
        value = 1 / (1 - x * ratio)
        slope = ratio * value * value
    else:
        tl.static_assert(KERNEL == "energy")
        value = -tl.sqrt(-x)
        slope = tl.where(x == 0, 0.0, -0.5 / value)
    return value, slope


@triton.jit
def _add_term(
    x,
    term,
    value,
    slope,
    table_ptr,
    KERNEL: tl.constexpr,
    BETAS: tl.constexpr,
    INDEX: tl.constexpr,
    STEP: tl.constexpr,
    EXACT: tl.constexpr,
    EXPONENT: tl.constexpr,
):
    """Adds term INDEX: a fresh kernel (STEP 0), or STEP - 1 squarings of the term before."""
    if EXACT:
        ratio = tl.full((), 1.0 * (1 << EXPONENT), x.dtype)
    else:
        ratio = tl.load(table_ptr + 64 + INDEX).to(x.dtype)
    beta = tl.full((), 1.0, x.dtype)
    if BETAS:
        beta = tl.load(table_ptr + 128 + INDEX).to(x.dtype)
    if STEP == 0:
        term, term_slope = profile_term(x, ratio, KERNEL)
        slope += beta * term_slope
    else:
        for _ in tl.static_range(STEP - 1):
            term = term * term
        # Written out: times two would become an addition, and then another.
        slope = tl.fma(term, beta * ratio, slope)
    return term, tl.fma(term, beta, value), slope


@triton.jit
def profile(
    x,
    table_ptr,
    KERNEL: tl.constexpr,
    COUNT: tl.constexpr,
    LADDER: tl.constexpr,
    BETAS: tl.constexpr,
):
    """Weighted sum of the kernels at x and its derivative by x (see ``profile_term``).

    LADDER has ten bits per term (``terms`` in ``triton_plan.py``): 0 to 2 the STEP of
    ``_add_term``, 3 whether the term's ratio is two to the power in bits 4 to 9.
    """
    term, slope = profile_term(x, tl.full((), 1.0, x.dtype), KERNEL)
    value = term
    if BETAS:
        beta = tl.load(table_ptr + 128).to(x.dtype)
        value = value * beta
        slope = slope * beta
    for u in tl.static_range(1, COUNT):
        term, value, slope = _add_term(
            x,
            term,
            value,
            slope,
            table_ptr,
            KERNEL,
            BETAS,
            u,
            (LADDER >> (10 * u)) & 7,
            (LADDER >> (10 * u + 3)) & 1,
            (LADDER >> (10 * u + 4)) & 63,
        )
    return value, slope


@triton.jit
def totals(stats_ptr, rows, problem, side, WEIGHTED: tl.constexpr):
    """Sum of weights, sum of squares, first used row (``rows`` if there is none)."""
    if WEIGHTED:
        stats = stats_ptr + problem.to(tl.int64) * 8 + side * 4
        total = tl.load(stats)
        squares = tl.load(stats + 1)
        first = tl.load(stats + 2).to(tl.int32)
    else:
        total = rows.to(tl.float64)
        squares = total
        first = rows * 0
    return total, squares, first


@triton.jit
def load_rows(
    rows_ptr,
    stride_row,
    stride_dim,
    weight_ptr,
    stride_weight,
    begin,
    row,
    rows,
    column,
    dim,
    WEIGHTED: tl.constexpr,
):
    """Rows in float64, 0 where unused, and their weights, 0 past the end."""
    valid = row < rows
    position = begin + row
    if WEIGHTED:
        weight = tl.load(weight_ptr + position * stride_weight, mask=valid, other=0)
        weight = weight.to(tl.float64)
    else:
        weight = tl.where(valid, 1.0, 0.0).to(tl.float64)
    used = weight != 0  # true for NaN
    pointers = rows_ptr + position[:, None] * stride_row
    pointers += column[None, :].to(tl.int64) * stride_dim
    # A row of weight 0 is not even read: it may hold NaN.
    values = tl.load(pointers, mask=used[:, None] & (column < dim)[None, :], other=0)
    return values.to(tl.float64), weight
