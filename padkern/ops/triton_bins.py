"""Sums of per-item numbers over the items of a bin, in a fixed order, without atomics.

A program takes a block of items and a tile of bins and adds what falls into each of them; blocks
are then added in their order. Work is items x bins comparisons: meant for bins by frequency, of
which there are tens, at most thousands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
MOST_BLOCKS = 256
# Of block sums, so that many bins do not make them larger than what they are sums of.
MOST_SUMS = 2**20


@triton.jit
def bin_kernel(
    values_ptr,
    bins_ptr,
    sums_ptr,
    items,
    bins,
    steps,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums[block, expert, bin]: of ``steps`` runs of BLOCK items."""
    block = tl.program_id(0)
    expert = tl.program_id(2)
    bin_ids = tl.program_id(1) * BINS + tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.float64)
    first = block.to(tl.int64) * steps * BLOCK
    values_ptr += expert.to(tl.int64) * items
    for step in range(0, steps):
        item = first + step * BLOCK + tl.arange(0, BLOCK)
        inside = item < items
        own = tl.load(bins_ptr + item, mask=inside, other=-1)
        value = tl.load(values_ptr + item, mask=inside, other=0).to(tl.float64)
        # Selected, not multiplied by 0: a NaN belongs to its own bin.
        total += tl.sum(tl.where(own[None, :] == bin_ids[:, None], value[None, :], 0.0), 1)
    experts = tl.num_programs(2)
    out = sums_ptr + (block.to(tl.int64) * experts + expert) * bins + bin_ids
    tl.store(out, total, mask=bin_ids < bins)


def bin_sums(values: Tensor, item_bins: Tensor, bins: int) -> Tensor:
    """``out[b, e]``: the sum of ``values[e, i]`` over the items i of bin b.

    Args:
        values: ``[E, N]`` contiguous, float32 or float64.
        item_bins: ``[N]`` contiguous int64; items of no bin are left out.
        bins: How many there are.

    Returns:
        ``[bins, E]`` of the dtype of ``values``; added in float64.
    """
    experts, items = values.shape
    if items == 0:
        return values.new_zeros(bins, experts)
    blocks = max(1, min(MOST_BLOCKS, triton.cdiv(items, BLOCK), MOST_SUMS // (bins * experts)))
    steps = triton.cdiv(triton.cdiv(items, blocks), BLOCK)
    blocks = triton.cdiv(items, steps * BLOCK)
    tile = min(64, max(2, triton.next_power_of_2(bins)))
    sums = torch.empty(blocks, experts, bins, dtype=torch.float64, device=values.device)
    grid = (blocks, triton.cdiv(bins, tile), experts)
    bin_kernel[grid](values, item_bins, sums, items, bins, steps, tile, BLOCK, num_warps=4)
    return sums.sum(0).T.to(values.dtype).contiguous()
