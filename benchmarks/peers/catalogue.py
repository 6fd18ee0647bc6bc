"""Full-catalogue cross-entropy as people write it in torch: ``loss(users, items, targets)``.

All give the mean over the tokens. The chunked ones compute their gradients in the forward pass, as
the chunked losses of language models do; backward scales them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DIM = 192
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_inputs(items: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of order 1, targets drawn uniformly; every eighth token one of sixteen head items."""
    torch.manual_seed(items)
    users = torch.randn(tokens, DIM).requires_grad_()
    vectors = (torch.randn(items, DIM) / DIM**0.5).requires_grad_()
    targets = torch.randint(items, (tokens,))
    targets[::8] %= 16
    return users, vectors, targets


def plain(users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """All logits at once."""
    return F.cross_entropy(users @ items.T, targets)


def chunk_terms(users: Tensor, items: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses of a chunk, its residuals ``p - 1_y`` and the gradient by its states."""
    logits = users @ items.T
    lse = torch.logsumexp(logits, 1, keepdim=True)
    loss = (lse - logits.gather(1, targets[:, None])).sum()
    residual = torch.exp(logits - lse)
    residual = residual.scatter_add(1, targets[:, None], residual.new_full((len(targets), 1), -1.0))
    return loss, residual, residual @ items


def chunk_terms_in_place(
    users: Tensor, items: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`chunk_terms` in one buffer: what a careful author writes without a compiler."""
    logits = users @ items.T
    positive = logits.gather(1, targets[:, None])
    top = logits.amax(1, keepdim=True)
    residual = logits.sub_(top).exp_()
    mass = residual.sum(1, keepdim=True)
    loss = (mass.log() + top - positive).sum()
    residual.div_(mass)
    residual.scatter_add_(1, targets[:, None], positive.new_full(positive.shape, -1.0))
    return loss, residual, residual @ items


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, users: Tensor, items: Tensor, targets: Tensor, rows: int, terms: Any
    ) -> Tensor:
        d_users = torch.empty_like(users)
        d_items = torch.zeros_like(items)
        total = users.new_zeros(())
        for start in range(0, len(users), rows):
            part = slice(start, start + rows)
            loss, residual, d_users[part] = terms(users[part], items, targets[part])
            d_items.addmm_(residual.T, users[part])
            total += loss
        ctx.save_for_backward(d_users.div_(len(users)), d_items.div_(len(users)))
        return total / len(users)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_users, d_items = ctx.saved_tensors
        if grad.item() == 1.0:  # the same shortcut that padkern takes
            return d_users, d_items, None, None, None
        return grad * d_users, grad * d_items, None, None, None


def chunked(rows: int, *, compiled: bool = False) -> Loss:
    """Chunks of ``rows`` tokens; with ``compiled`` a chunk's formula goes through inductor."""
    return chunked_by(rows, torch.compile(chunk_terms) if compiled else chunk_terms_in_place)


def chunked_by(rows: int, terms: Callable[..., Any]) -> Loss:
    """The loss around one of the two formulas of a chunk."""
    return lambda users, items, targets: _Chunked.apply(users, items, targets, rows, terms)


def linear_cross_entropy(rows: int | None = None) -> Loss:
    """torch's own chunked loss with its default chunk, or ``rows`` tokens per chunk.

    Raises:
        AttributeError: this torch has none.
    """
    function, make = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions
    chosen = make() if rows is None else make(batch_chunk_size=rows, chunking_method=None)
    return lambda users, items, targets: function(users, items, targets, options=chosen)


def liger(users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """Liger Kernel's fused linear cross-entropy, at its defaults (CUDA)."""
    from liger_kernel.transformers.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyLoss,
    )

    return LigerFusedLinearCrossEntropyLoss()(items, users, targets)


def cut_cross_entropy(users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    """Cut cross-entropy without its gradient filter, which would drop most items (CUDA)."""
    from cut_cross_entropy import linear_cross_entropy as function

    return function(users, items, targets, impl="cce_exact")
