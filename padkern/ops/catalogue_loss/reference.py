"""Cross-entropy over a catalogue in plain torch: the specification, and the same in chunks.

Both work on any device. The chunked form computes value and gradients together, token chunk by
token chunk; memory beyond the gradients is one ``[chunk, N]`` tile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from padkern.ops.first_order import once_differentiable


def excluded_mask(
    targets: Tensor,
    num_items: int,
    excluded_values: Tensor,
    excluded_offsets: Tensor,
    start: int = 0,
) -> Tensor:
    """``[len(targets), num_items]`` bool, true for the items that tokens ``start...`` leave out."""
    counts = torch.diff(excluded_offsets)
    token = torch.repeat_interleave(
        torch.arange(len(counts), device=targets.device),
        counts,
        output_size=excluded_values.shape[0],
    )
    inside = (token >= start) & (token < start + targets.shape[0])
    # Counted, not assigned: entries outside of the chunk add nothing to its first row.
    cell = torch.where(inside, (token - start) * num_items + excluded_values, 0)
    hits = torch.zeros(targets.shape[0] * num_items, dtype=torch.int32, device=targets.device)
    hits = hits.scatter_add(0, cell, inside.to(torch.int32))
    mask = (hits > 0).reshape(targets.shape[0], num_items)
    own = torch.zeros_like(mask).scatter(1, targets[:, None], True)
    return mask & ~own


def catalogue_cross_entropy_ref(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    candidates: Tensor | None = None,
    excluded_values: Tensor | None = None,
    excluded_offsets: Tensor | None = None,
) -> Tensor:
    """``F.cross_entropy(users @ items.T + bias, targets)``: the specification, all logits at once.

    Args:
        users: ``[T, D]`` states.
        items: ``[N, D]`` item vectors.
        targets: ``[T]`` int64 rows of ``items``.
        bias: ``[N]`` added to every token's logits, for example ``-inf`` to leave items out.
        candidates: ``[C]`` int64, the items of the softmax, ascending; default: all.
        excluded_values: ``[E]`` int64 items left out of single tokens' softmax, token after token.
        excluded_offsets: ``[T + 1]`` int64, where each token's items begin and end.
    """
    chosen = items if candidates is None else items.index_select(0, candidates)
    logits = users @ chosen.T
    if bias is not None:
        logits = logits + (bias if candidates is None else bias.index_select(0, candidates))
    if excluded_values is not None and excluded_offsets is not None:
        mask = excluded_mask(targets, items.shape[0], excluded_values, excluded_offsets)
        mask = mask if candidates is None else mask.index_select(1, candidates)
        logits = logits.masked_fill(mask, -torch.inf)
    if candidates is not None:
        targets = torch.searchsorted(candidates.contiguous(), targets.contiguous())
    return F.cross_entropy(logits, targets)


# Terms of a float32 logit that a matrix library may add in a row: where columns are equal all its
# roundings go in one direction.
_DEPTH = 64


def _products(users: Tensor, items: Tensor) -> Tensor:
    """``users @ items.T``; in float32 on the CPU summed in pieces."""
    dim = users.shape[1]
    if users.dtype != torch.float32 or not users.is_cpu or dim <= _DEPTH:
        return users @ items.T
    logits = users[:, :_DEPTH] @ items[:, :_DEPTH].T
    for low in range(_DEPTH, dim, _DEPTH):
        piece = slice(low, low + _DEPTH)
        logits.addmm_(users[:, piece], items[:, piece].T)
    return logits


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        users: Tensor,
        items: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        excluded_values: Tensor | None,
        excluded_offsets: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = users.shape[0]
        d_users = torch.empty_like(users)
        d_items = torch.zeros_like(items)
        d_bias = users.new_zeros(items.shape[0])
        total = users.new_zeros((), dtype=torch.float64)
        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            logits = _products(users[part], items)
            if bias is not None:
                logits += bias
            if excluded_values is not None and excluded_offsets is not None:
                mask = excluded_mask(
                    targets[part], items.shape[0], excluded_values, excluded_offsets, start
                )
                logits.masked_fill_(mask, -torch.inf)
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
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, d_users, d_items, d_bias = output
        ctx.has_bias = inputs[3] is not None
        ctx.mark_non_differentiable(d_users, d_items, d_bias)
        ctx.save_for_backward(d_users, d_items, d_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_users, d_items, d_bias = ctx.saved_tensors
        return (
            grad_out * d_users,
            grad_out * d_items,
            None,
            grad_out * d_bias if ctx.has_bias else None,
            *[None] * 3,
        )


def chunked_cross_entropy(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    candidates: Tensor | None,
    excluded_values: Tensor | None,
    excluded_offsets: Tensor | None,
    chunk: int,
) -> Tensor:
    """:func:`catalogue_cross_entropy_ref` in chunks of tokens, with its gradients beside it.

    Args:
        users, items, targets, bias, candidates, excluded_values, excluded_offsets: as there, the
            floating ones of one dtype.
        chunk: tokens per tile of ``chunk * N`` logits.
    """
    if candidates is not None:
        # The rows that a token leaves out become columns; -1 where they are no candidates.
        place = torch.full((items.shape[0],), -1, dtype=torch.int64, device=items.device)
        place = place.scatter(0, candidates, torch.arange(len(candidates), device=items.device))
        items = items.index_select(0, candidates)
        bias = None if bias is None else bias.index_select(0, candidates)
        targets = place[targets]
        if excluded_values is not None and excluded_offsets is not None:
            columns = place[excluded_values]
            # An item that is no candidate is out anyway: the target, which never is, stands in.
            token = torch.repeat_interleave(
                torch.arange(len(targets), device=items.device),
                torch.diff(excluded_offsets),
                output_size=excluded_values.shape[0],
            )
            excluded_values = torch.where(columns < 0, targets[token], columns)
    wanted = users.requires_grad or items.requires_grad or (bias is not None and bias.requires_grad)
    if wanted and torch.is_grad_enabled():
        return _ChunkedCrossEntropy.apply(
            users, items, targets, bias, excluded_values, excluded_offsets, chunk
        )[0]
    with torch.no_grad():
        total = users.new_zeros((), dtype=torch.float64)
        for start in range(0, users.shape[0], chunk):
            part = slice(start, min(start + chunk, users.shape[0]))
            logits = _products(users[part], items)
            logits = logits if bias is None else logits + bias
            if excluded_values is not None and excluded_offsets is not None:
                mask = excluded_mask(
                    targets[part], items.shape[0], excluded_values, excluded_offsets, start
                )
                logits = logits.masked_fill(mask, -torch.inf)
            losses = F.cross_entropy(logits, targets[part], reduction="none")
            total = total + losses.sum(dtype=torch.float64)
        return (total / users.shape[0]).to(users.dtype)
