"""MK-MMD from FlashAttention, one call per bandwidth and pair of samples.

With rows widened by their squared norms, the scaled inner product of attention is the exponent of
the Gaussian kernel: the log-sum-exp of a row gives its kernel sum, the output the kernel's product
with the rows. Not found in public code; it is the best use of an existing tensor-core kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .torch_forms import ALPHAS, mean_sq_distance

# FlashAttention takes heads up to this width, in multiples of 8; four columns hold the norms.
WIDEST = 252


def widen(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key rows whose inner product is -|a - b|^2 / 2, norms split into high and low."""
    half = rows.detach().double().square().sum(1) / 2
    high = half.to(rows.dtype)
    low = (half - high.double()).to(rows.dtype)
    one = torch.ones_like(high)
    padding = rows.new_zeros(rows.shape[0], -(rows.shape[1] + 4) % 8)
    query = torch.cat([rows, torch.stack([one, one, high, low], 1), padding], 1)
    key = torch.cat([rows, torch.stack([-high, -low, -one, -one], 1), padding], 1)
    return query, key


def attend(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Kernel sum of every query row, float32 [n], and its weighted mean of the keys [n, D + ...].

    Args:
        query: ``[n, E]`` from :func:`widen`.
        key: ``[m, E]``.
        scale: 1 / (alpha sigma_sq).
    """
    q, k = query[None, None], key[None, None]
    if query.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, k, scale=scale)[:2]
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, scale=scale)
    return lse[0, 0, : query.shape[0]].float().exp(), out[0, 0].float()


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, target: Tensor) -> Tensor:
        sizes = source.shape[0], target.shape[0]
        dim = source.shape[1]
        gradient = any(ctx.needs_input_grad)
        # The scale of attention is a number on the host: one synchronisation.
        sigma_sq = float(mean_sq_distance(torch.cat([source, target]).float()))
        samples = source, target
        wide = [widen(rows) for rows in samples]
        value = source.new_zeros((), dtype=torch.float64)
        slopes = [torch.zeros(t.shape, device=t.device) for t in samples]
        for alpha in ALPHAS:
            scale = 1 / (alpha * sigma_sq)
            for i, j in ((0, 0), (1, 1), (0, 1), (1, 0)):
                if (i, j) == (1, 0) and not gradient:
                    continue
                count = sizes[i]
                weight = 1 / (count * (count - 1)) if i == j else -1 / (sizes[0] * sizes[1])
                sums, means = attend(wide[i][0], wide[j][1], scale)
                if i == j:
                    value += weight * (sums.sum(dtype=torch.float64) - count)
                elif i == 0:
                    value += 2 * weight * sums.sum(dtype=torch.float64)
                if gradient:
                    step = sums[:, None] * (samples[i].float() - means[:, :dim])
                    slopes[i] -= (2 * weight * scale) * step
        if gradient:
            ctx.save_for_backward(*slopes, source, target)
        return value.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        d_source, d_target, source, target = ctx.saved_tensors
        return (d_source * grad).to(source.dtype), (d_target * grad).to(target.dtype)


def flash(source: Tensor, target: Tensor) -> Tensor:
    """The unbiased loss with its first derivative; D at most 252, half types on a GPU."""
    return _Flash.apply(source, target)
