"""Triton kernels and launcher of the segment sums.

Segments are cut into pieces of 64 slots; a piece adds its rows by eights, a segment its pieces in
their order. Long segments so take many programs, and the bits depend on the arguments alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from padkern.ops.triton_interpreter import guard

PIECE = 64
_ROWS = 8
# With fewer slots than this one program takes all pieces of a segment, in the same order.
_FEW_SLOTS = 1024


@triton.jit
def _piece(
    values_ptr,
    stride_row,
    stride_column,
    slots_ptr,
    begin,
    end,
    rows,
    column,
    inside,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of the rows of slots [begin, end); a slot without a row is NaN."""
    total = tl.zeros([BLOCK_D], ACC)
    for first in range(begin, end, ROWS):
        place = first + tl.arange(0, ROWS)
        slot = tl.load(slots_ptr + place, mask=place < end, other=0)
        good = (slot >= 0) & (slot < rows)
        at = slot[:, None] * stride_row + column[None, :].to(tl.int64) * stride_column
        row = tl.load(values_ptr + at, mask=good[:, None] & inside[None, :], other=float("nan"))
        total += tl.sum(tl.where((place < end)[:, None], row.to(ACC), 0.0), 0)
    return total


@triton.jit
def sum_kernel(
    values_ptr,
    slots_ptr,
    starts_ptr,
    ends_ptr,
    out_ptr,
    parts_ptr,
    rows,
    dim,
    segments,
    num_slots,
    steps,
    stride_row,
    stride_column,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A segment's first piece, or all of them without SPLIT; programs beyond take one more each.

    ``ends`` has the running number of pieces beyond the first.

    Grid: (segments, or segments + pieces with SPLIT, columns).
    """
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < dim
    segment = program
    piece = tl.full((), 0, tl.int64)
    exists = program < segments
    if SPLIT:
        extra = (program - segments).to(tl.int64)
        if program >= segments:
            exists = extra < tl.load(ends_ptr + segments - 1)
            low = tl.full((), 0, tl.int32)
            high = low + segments
            for _ in range(0, steps):
                middle = (low + high) // 2
                below = (low < high) & (tl.load(ends_ptr + middle, mask=low < high) <= extra)
                high = tl.where((low < high) & (below == 0), middle, high)
                low = tl.where(below, middle + 1, low)
            segment = tl.minimum(low, segments - 1)
            before = tl.load(ends_ptr + segment - 1, mask=segment > 0, other=0)
            piece = 1 + extra - before
    if exists:
        # Clamped, because nobody has read them: bad ones must not reach foreign memory.
        most = tl.cast(num_slots, tl.int64)
        begin = tl.minimum(tl.maximum(tl.load(starts_ptr + segment), 0), most)
        end = tl.minimum(tl.load(starts_ptr + segment + 1), most)
        total = tl.zeros([BLOCK_D], ACC)
        if SPLIT:
            begin = begin + piece * PIECE
            end = tl.minimum(end, begin + PIECE)
        for first in range(begin, end, PIECE):
            last = tl.minimum(first + PIECE, end)
            total += _piece(
                values_ptr, stride_row, stride_column, slots_ptr, first, last, rows, column,
                inside, ACC, ROWS, BLOCK_D,
            )  # fmt: skip
        if program < segments:
            tl.store(out_ptr + segment.to(tl.int64) * dim + column, total, mask=inside)
        else:
            at = (program - segments).to(tl.int64) * dim + column
            tl.store(parts_ptr + at, total, mask=inside)


@triton.jit
def join_kernel(
    ends_ptr,
    out_ptr,
    parts_ptr,
    dim,
    segments,
    steps,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds a segment's further pieces to its first; done by the program of the first of them.

    Grid: (pieces, columns).
    """
    extra = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < dim
    if extra < tl.load(ends_ptr + segments - 1):
        low = tl.full((), 0, tl.int32)
        high = low + segments
        for _ in range(0, steps):
            middle = (low + high) // 2
            below = (low < high) & (tl.load(ends_ptr + middle, mask=low < high) <= extra)
            high = tl.where((low < high) & (below == 0), middle, high)
            low = tl.where(below, middle + 1, low)
        before = tl.load(ends_ptr + low - 1, mask=low > 0, other=0)
        if extra == before:
            at = out_ptr + low.to(tl.int64) * dim + column
            total = tl.load(at, mask=inside, other=0)
            for part in range(before, tl.load(ends_ptr + low)):
                total += tl.load(parts_ptr + part * dim + column, mask=inside, other=0)
            tl.store(at, total, mask=inside)


def segment_sum_triton(values: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
    """``[U, d]``, float64 or float32. Nothing is read on the host."""
    values, slots, starts = values.detach(), slots.contiguous(), starts.contiguous()
    rows, dim = values.shape
    segments, count = starts.numel() - 1, slots.numel()
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    if segments == 0 or dim == 0 or count == 0:
        return values.new_zeros(segments, dim, dtype=dtype)
    out = torch.empty(segments, dim, dtype=dtype, device=values.device)
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    block = min(128, triton.next_power_of_2(dim))
    columns = triton.cdiv(dim, block)
    split = count > _FEW_SLOTS
    # A segment of n slots has at most n / PIECE pieces beyond its first.
    pieces = count // PIECE if split else 0
    parts = torch.empty(max(pieces, 1), dim, dtype=dtype, device=values.device)
    ends, steps = starts, segments.bit_length()
    with guard(values):
        if split:
            ends = ((starts.diff() + (PIECE - 1)) // PIECE - 1).clamp_(min=0).cumsum(0)
        sum_kernel[(segments + pieces, columns)](
            values,
            slots,
            starts,
            ends,
            out,
            parts,
            rows,
            dim,
            segments,
            count,
            steps,
            *values.stride(),
            split,
            acc,
            PIECE,
            _ROWS,
            block,
            num_warps=1,
        )
        if split:
            join_kernel[(pieces, columns)](
                ends, out, parts, dim, segments, steps, acc, block, num_warps=1
            )
    return out
