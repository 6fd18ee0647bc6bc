"""Launchers of the Triton backend: tiles from shapes and the bound alone, one launch per pass.

They run on the current stream of the tensors' device and read no value on the host. Tiles and
precision: ``README.md``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from padkern.ops.short_attention.triton_kernels import attention_grad_kernel, attention_kernel
from padkern.ops.triton_arguments import float64_bits
from padkern.ops.triton_interpreter import INTERPRET, guard

# Features of one step of the products; wider steps spill registers on sm_80.
FEATURES = 16
# In units of a pair of tokens: what a tile costs besides its pairs.
_TILE_COST = 512


class Tiles(NamedTuple):
    """How the tokens are cut.

    Attributes:
        block: Tokens of a tile.
        window: A tile holds the sequences that start within so many tokens; 0: one sequence each.
        warps: Warps of a program.
    """

    block: int
    window: int
    warps: int


def tiles(longest: int) -> Tiles:
    """The cut for sequences of at most ``longest`` tokens, 1..64."""
    blocks = [block for block in (16, 32, 64) if block >= longest]
    if longest > 32:
        block, window = 64, 0
    else:
        block = min(blocks, key=lambda b: (b * b + _TILE_COST) / (b + 1 - longest))
        window = block + 1 - longest
    warps = {16: 2, 32: 4, 64: 8}[block]
    return Tiles(block, window, warps)


def _launch(kernel: Any, inputs: tuple[Tensor, ...], offsets: Tensor, out: Tensor,
            options: tuple[Any, ...]) -> Tensor:  # fmt: skip
    scale, dropout, seed, step, longest = options
    tokens, heads, dim = inputs[0].shape
    sequences = offsets.numel() - 1
    if out.numel() == 0:
        return out
    if sequences == 0:  # tokens of nobody
        return out.fill_(torch.nan)
    cut = tiles(min(longest, 64))
    count = -(-tokens // cut.window) if cut.window else sequences
    threshold = min(int(dropout * 4294967296.0 + 0.5), 0xFFFFFFFF)
    with guard(out):
        kernel[(count * heads,)](
            *inputs,
            offsets.contiguous(),
            out,
            *(stride for x in inputs for stride in x.stride()),
            tokens,
            heads,
            dim,
            sequences,
            sequences.bit_length(),
            min(longest, 64),
            cut.window,
            float64_bits(scale),
            float64_bits(1.0 / (1.0 - dropout)),
            threshold,
            seed,
            step,
            dropout > 0,
            tl.float64 if out.dtype == torch.float64 else tl.float32,
            cut.block,
            FEATURES,
            cut.window > 0,
            INTERPRET,
            num_warps=cut.warps,
            num_stages=1,
        )
    return out


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def short_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *options: Any
) -> Tensor:
    """States ``[T, H, d]``, float64 or float32; inputs of one float dtype.

    Args:
        q, k, v: ``[T, H, d]``, any strides.
        offsets: int64 ``[B + 1]``. Nobody reads them on the host: tokens beyond ``longest`` in
            their sequence, or of no sequence, are NaN.
        *options: scale, dropout, seed, step, longest.
    """
    out = torch.empty(q.shape, dtype=_result_dtype(q), device=q.device)
    return _launch(attention_kernel, (q, k, v), offsets, out, options)


def short_attention_grad_triton(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *options: Any
) -> Tensor:
    """Gradients by q, k and v, side by side: ``[T, 3, H, d]``, float64 or float32."""
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, 3, heads, dim), dtype=_result_dtype(q), device=q.device)
    return _launch(attention_grad_kernel, (d_out, q, k, v), offsets, out, options)
