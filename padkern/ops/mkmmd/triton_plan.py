"""What the Triton launchers decide on the host, from shapes, dtypes and the alphas alone."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Squarings in a row, each of which doubles the relative error.
MAX_SQUARINGS = 6


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for a >= 0 and b > 0."""
    return -(-a // b)


class Terms(NamedTuple):
    """The kernels in the order in which a pair evaluates them.

    Attributes:
        bits: Each alpha as the bits of a float64; empty when the alphas are a tensor.
        order: Six bits per term: its position in the caller's order.
        ladder: Ten bits per term, see ``profile`` in ``triton_common.py``.
    """

    bits: tuple[int, ...]
    order: int
    ladder: int
    number: int


def terms(alphas: Sequence[float], kernel: str) -> Terms:
    """Sorts the alphas in descending order and finds the ladders among them.

    exp(-d / (2 alpha sigma_sq)) of half the alpha is the square. A Gaussian term is taken by zero
    to three squarings of the term before it when its alpha is 1, 1/2, 1/4 or 1/8 of that one.
    """
    order = sorted(range(len(alphas)), key=lambda u: -alphas[u])
    ladder, chained = 0, 0
    for position, u in enumerate(order[1:], 1):
        ratio = alphas[order[position - 1]] / alphas[u]
        squarings = {1.0: 0, 2.0: 1, 4.0: 2, 8.0: 3}.get(ratio)
        step = 0
        if kernel == "gaussian" and squarings is not None and chained + squarings <= MAX_SQUARINGS:
            step = squarings + 1
            chained += squarings
        else:
            chained = 0
        fraction, exponent = math.frexp(alphas[order[0]] / alphas[u])
        exact = fraction == 0.5 and exponent - 1 < 64
        code = step | (8 | (exponent - 1) << 4 if exact else 0)
        ladder |= code << (10 * position)
    bits = tuple(struct.unpack("<q", struct.pack("<d", alphas[u]))[0] for u in order)
    packed_order = sum(u << (6 * position) for position, u in enumerate(order))
    return Terms(bits, packed_order, ladder, len(alphas))


# Below this many rows per problem, or up to this width, rounding does not average out.
FEW_ROWS = 512
NARROW = 16


def product_class(
    source: Tensor, target: Tensor, precision: str, problems: int, bounded: bool
) -> str:
    """How inner products are formed; the accuracy of each class is in ``TRITON.md``.

    Args:
        bounded: Coefficients fit float16.
    """
    dtypes = {source.dtype, target.dtype}
    if torch.float64 in dtypes:
        return "float64"
    if dtypes == {torch.bfloat16}:
        return "bfloat16"
    if dtypes == {torch.float16} and bounded:
        return "float16"
    if precision == "tf32" and torch.float32 in dtypes:
        return "tfloat32"
    rows = (source.shape[0] + target.shape[0]) // problems
    return "bfloat16x6" if rows <= FEW_ROWS or source.shape[1] <= NARROW else "bfloat16x3"


# Dtype of the packed rows and of a panel of coefficients, and how many parts they have.
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "bfloat16x3": torch.bfloat16,
    "bfloat16x6": torch.bfloat16,
    "tfloat32": torch.float32,
    "float64": torch.float64,
}
COPIES = {"bfloat16x3": 2, "bfloat16x6": 3}
PANEL_BYTES = 32 * 2**20
# Counted on whatever the device, so that a result does not depend on it.
PROCESSORS = 132


class Tiles(NamedTuple):
    """Tile sizes and compiler options of one kernel; ``k`` is the step along the summed index."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class Config(NamedTuple):
    """Tiles of one call.

    Attributes:
        width: Row length of the packed operands.
        pad: Rows of a sample are padded to a multiple of this.
        value: Of ``value_kernel``.
        gradient: Of ``gradient_kernel``, or of ``panel_kernel``.
        resident: Programs of ``gradient_kernel`` that a processor holds at a time.
        product: Of ``product_kernel``, whose columns are features; None: not the panel route.
    """

    width: int
    pad: int
    value: Tiles
    gradient: Tiles
    resident: int
    product: Tiles | None


# Rows, columns, warps, stages and resident programs of gradient_kernel by device class, product
# class and width. What is missing does not fit into registers or shared memory: panels.
_Resident = dict[int, tuple[int, int, int, int, int]]
_SMALL: dict[str, _Resident] = {
    "bfloat16": {64: (64, 64, 4, 2, 2), 128: (64, 64, 4, 2, 2), 256: (64, 64, 8, 2, 1)},
    "float16": {64: (64, 64, 4, 2, 2), 128: (64, 64, 4, 2, 2), 256: (64, 64, 8, 2, 1)},
    "bfloat16x3": {64: (64, 64, 4, 2, 2), 128: (128, 32, 8, 2, 1)},
    "bfloat16x6": {64: (64, 32, 4, 2, 2)},
    "tfloat32": {64: (64, 32, 4, 2, 2), 128: (64, 64, 8, 2, 1)},
    "float64": {},
}
_RESIDENT: dict[str, dict[str, _Resident]] = {
    "large": {
        "bfloat16": {64: (64, 64, 4, 3, 3), 128: (64, 64, 4, 2, 2), 256: (128, 64, 8, 2, 1)},
        "float16": {64: (64, 64, 4, 3, 3), 128: (64, 64, 4, 2, 2), 256: (128, 64, 8, 2, 1)},
        "bfloat16x3": {64: (64, 64, 4, 2, 2), 128: (64, 32, 4, 2, 2), 256: (128, 32, 8, 2, 1)},
        "bfloat16x6": {64: (64, 32, 4, 2, 2), 128: (32, 32, 4, 2, 2)},
        "tfloat32": {64: (128, 64, 8, 2, 1), 128: (64, 32, 4, 2, 2)},
        "float64": {},
    },
    "medium": _SMALL,
    "small": _SMALL,
}


def device_class(device: torch.device) -> str:
    """By the shared memory of a program: "large" 227 KiB, "medium" 163 KiB, "small" 99 KiB."""
    if device.type != "cuda":
        return "large"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] in (9, 10):
        return "large"
    return "medium" if capability in ((8, 0), (8, 7)) else "small"


def config(
    product: str, dim: int, max_rows: tuple[int, int], total_rows: int, gradient: bool, device: str
) -> Config:
    """Tiles for rows of ``dim`` features and problems of at most ``max_rows`` rows."""
    width = max(16, 2 ** math.ceil(math.log2(dim)))
    resident = _RESIDENT[device][product].get(max(64, width)) if gradient else None
    if product == "float64":
        tiles = Tiles(32, 32, 16, 4, 2)
        return Config(ceil_div(dim, 16) * 16, 32, tiles, tiles, 1, tiles)
    if width > 256 or (gradient and resident is None):
        width = ceil_div(dim, 64) * 64
    tiny = max(max_rows) <= 32
    few = total_rows <= 2048
    half = product in ("bfloat16", "float16")
    if tiny:
        value = Tiles(32, 32, min(width, 32), 4, 2)
    elif product == "bfloat16x6" and width > 16:
        value = Tiles(64, 32, 32, 4, 3)
    elif width <= 128:
        value = Tiles(64, 64, width, 4, 2) if few else Tiles(128, 64, width, 8, 2)
    elif few:
        value = Tiles(64, 64, 32, 4, 3)
    else:
        value = Tiles(128, 128, 64 if half and device == "large" else 32, 8, 3)
    if resident is not None:
        rows, columns, *options = resident
        warps, stages, programs = options
        if tiny:
            rows, columns, warps = 32, 32, 4
        tiles = Tiles(rows, columns, width, warps, stages)
        return Config(width, max(rows, columns, value.m), value, tiles, programs, None)
    across = Tiles(value.m, min(value.m, 128), min(value.k, value.n), value.warps, 3)
    return Config(width, value.m, value, value, 1, across)


def value_parts(positions: int) -> int:
    """Parts into which ``value_kernel`` cuts the columns of a row tile."""
    return min(16, positions)


def parts(row_tiles: int, positions: int, resident: int, rows: int) -> int:
    """Parts into which ``gradient_kernel`` cuts the columns, to fill the processors evenly.

    Each part has its own sums, so few rows may have many.
    """
    slots = PROCESSORS * resident

    def cost(count: int) -> float:
        return ceil_div(row_tiles * count, slots) / count * (1 + 0.05 * count)

    return min(range(1, max(1, min(16, positions, 2**15 // rows)) + 1), key=cost)


def panel(row_tiles: int, positions: int, tile_bytes: int) -> tuple[int, int]:
    """Tiles of a panel, down and across: nearly square, at most PANEL_BYTES."""
    tiles = max(1, PANEL_BYTES // tile_bytes)
    rows = min(row_tiles, math.isqrt(tiles))
    columns = min(positions, tiles // rows)
    return min(row_tiles, tiles // columns), columns
