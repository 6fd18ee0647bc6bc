"""Cross-entropy over a catalogue, value and gradients in one pass over token chunks.

Memory beyond the gradients is one ``[chunk, N]`` tile. The reference for any faster kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def catalogue_cross_entropy_ref(
    users: Tensor, items: Tensor, targets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``F.cross_entropy(users @ items.T + bias, targets)``: the specification, all logits at once.

    Args:
        users: ``[T, D]`` states.
        items: ``[N, D]`` item vectors.
        targets: ``[T]`` int64 rows of ``items``.
        bias: ``[N]`` added to every token's logits, for example ``-inf`` to leave items out.
    """
    logits = users @ items.T
    return F.cross_entropy(logits if bias is None else logits + bias, targets)


class _CatalogueCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        users: Tensor, items: Tensor, targets: Tensor, bias: Tensor | None, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = users.shape[0]
        d_users = torch.empty_like(users)
        d_items = torch.zeros_like(items)
        d_bias = users.new_zeros(items.shape[0])
        total = users.new_zeros((), dtype=torch.float64)
        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            logits = users[part] @ items.T
            if bias is not None:
                logits += bias
            target = targets[part, None]
            top = logits.amax(1, keepdim=True)
            positive = logits.gather(1, target)
            logits.sub_(top).exp_()
            mass = logits.sum(1, keepdim=True)
            total += (mass.log() + top - positive).sum(dtype=torch.float64)
            logits.div_(mass)
            logits.scatter_add_(1, target, torch.full_like(positive, -1.0))
            torch.mm(logits, items, out=d_users[part])
            d_items.addmm_(logits.T, users[part])
            if bias is not None:
                d_bias += logits.sum(0)
        scale = 1.0 / tokens
        return (total * scale).to(users.dtype), d_users * scale, d_items * scale, d_bias * scale

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, d_users, d_items, d_bias = output
        ctx.has_bias = inputs[3] is not None
        ctx.mark_non_differentiable(d_users, d_items, d_bias)
        ctx.save_for_backward(d_users, d_items, d_bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out: Tensor, *_unused: Tensor):
        d_users, d_items, d_bias = ctx.saved_tensors
        return (
            grad_out * d_users,
            grad_out * d_items,
            None,
            grad_out * d_bias if ctx.has_bias else None,
            None,
        )


def catalogue_cross_entropy(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Mean cross-entropy of ``users @ items.T`` against ``targets``, without keeping the logits.

    The gradients are computed beside the value, so backward only scales them.

    Args:
        users: ``[T, D]`` states, T >= 1; half precision is widened to fp32, also under autocast.
        items: ``[N, D]`` item vectors.
        targets: ``[T]`` int64 rows of ``items``.
        bias: optional ``[N]``, added to the logits of every token.
        chunk: tokens per tile; the tile holds ``chunk * N`` numbers.

    Returns:
        Scalar, fp64 if ``users`` or ``items`` are, else fp32.

    Raises:
        ValueError: shapes do not fit or there is no token.
    """
    if users.ndim != 2 or items.ndim != 2 or users.shape[1] != items.shape[1]:
        raise ValueError(
            f"users and items must be [T, D] and [N, D], got {list(users.shape)} and "
            f"{list(items.shape)}"
        )
    if targets.shape != users.shape[:1] or users.shape[0] == 0:
        raise ValueError(
            f"targets must be [{users.shape[0]}] with T >= 1, got {list(targets.shape)}"
        )
    dtype = torch.float64 if torch.float64 in (users.dtype, items.dtype) else torch.float32
    users, items = users.to(dtype), items.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    wanted = users.requires_grad or items.requires_grad or (bias is not None and bias.requires_grad)
    with torch.autocast(users.device.type, enabled=False):
        if wanted and torch.is_grad_enabled():
            return _CatalogueCrossEntropy.apply(users, items, targets, bias, chunk)[0]
        with torch.no_grad():
            parts = [
                catalogue_cross_entropy_ref(u, items, t, bias) * len(t)
                for u, t in zip(users.split(chunk), targets.split(chunk), strict=True)
            ]
            return torch.stack(parts).sum() / len(targets)
