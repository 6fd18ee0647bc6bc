"""Which tokens a program of short attention owns, and what is stored for tokens of nobody."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_offset(offsets_ptr, index, tokens):
    # Clamped, because nobody has read the offsets: bad ones must not reach foreign memory.
    return tl.minimum(tl.maximum(tl.load(offsets_ptr + index), 0), tl.cast(tokens, tl.int64))


@triton.jit
def _sequence_of(offsets_ptr, token, sequences, steps):
    """The last sequence that starts at or before each token, the first one if there is none."""
    low = (token * 0).to(tl.int32)
    high = low + sequences
    for _ in range(0, steps):
        middle = (low + high) // 2
        before = tl.load(offsets_ptr + middle) <= token
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def tile_tokens(
    offsets_ptr,
    tile,
    tokens,
    sequences,
    steps,
    longest,
    window,
    BLOCK: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """Tokens of a tile (int64), number of their sequence, place in it, whether they belong here,
    and whether they belong to nobody because offsets or bound are wrong.

    With WINDOWS the tile has the sequences that start in ``window`` tokens from ``tile * window``
    on; none of them reaches beyond BLOCK tokens from there, because ``window`` is
    BLOCK + 1 - longest. Otherwise it is the sequence of that number.
    """
    index = tl.arange(0, BLOCK)
    if WINDOWS:
        first = tile.to(tl.int64) * window
        token = first + index
        row = _sequence_of(offsets_ptr, token, sequences, steps)
        begin = _load_offset(offsets_ptr, row, tokens)
        inside = (token >= begin) & (token < _load_offset(offsets_ptr, row + 1, tokens))
        place = (token - begin).to(tl.int32)
        inside = inside & (place < longest)
        valid = inside & (begin >= first) & (begin < first + window)
        lost = (index < window) & (token < tokens) & (inside == 0)
    else:
        begin = _load_offset(offsets_ptr, tile, tokens)
        end = _load_offset(offsets_ptr, tile + 1, tokens)
        token = begin + index
        row = index * 0 + tile
        place = index
        valid = token < end
        lost = index < 0
    # What belongs elsewhere is a sequence of its own that attends to itself.
    row = tl.where(valid, row, -1 - index)
    return token, row, place, valid, lost


@triton.jit
def store_rows(ptr, x, token, valid, chunk, dim, stride, BLOCK_D: tl.constexpr):
    """Columns [chunk, chunk + BLOCK_D) of the valid tokens' rows."""
    feature = chunk + tl.arange(0, BLOCK_D)
    at = token[:, None] * stride + feature[None, :]
    tl.store(ptr + at, x, mask=valid[:, None] & (feature < dim)[None, :])


@triton.jit
def _store_nan(ptr, begin, end, dim, stride, parts: tl.constexpr, part, BLOCK: tl.constexpr):
    """NaN for tokens of nobody: their memory must not pass for a result."""
    feature = tl.arange(0, BLOCK)
    for token in range(begin, end):
        for chunk in range(0, dim, BLOCK):
            for number in tl.static_range(parts):
                at = ptr + tl.cast(token, tl.int64) * stride + number * part + chunk + feature
                nan = (feature * 0).to(ptr.dtype.element_ty) + float("nan")
                tl.store(at, nan, mask=chunk + feature < dim)


@triton.jit
def store_lost(
    ptr,
    offsets_ptr,
    tile,
    token,
    lost,
    tokens,
    sequences,
    longest,
    dim,
    stride,
    parts: tl.constexpr,
    part,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """Nothing to do where the offsets rise from 0 to the tokens by at most ``longest``."""
    if WINDOWS:
        if tl.max(lost.to(tl.int32), 0) != 0:
            nan = tl.zeros([BLOCK, BLOCK_D], ptr.dtype.element_ty) + float("nan")
            for chunk in range(0, dim, BLOCK_D):
                for number in tl.static_range(parts):
                    store_rows(ptr + number * part, nan, token, lost, chunk, dim, stride, BLOCK_D)
    else:
        begin = _load_offset(offsets_ptr, tile, tokens)
        end = _load_offset(offsets_ptr, tile + 1, tokens)
        _store_nan(ptr, begin + longest, end, dim, stride, parts, part, BLOCK)
        if tile == 0:
            _store_nan(ptr, begin * 0, begin, dim, stride, parts, part, BLOCK)
        if tile == sequences - 1:
            _store_nan(ptr, tl.maximum(begin, end), tokens, dim, stride, parts, part, BLOCK)
