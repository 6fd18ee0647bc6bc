"""MK-MMD as people write it in torch, from TLlib's broadcast to strips of a compiled formula.

Every function is ``loss(source, target)`` with the unbiased estimator (TLlib's own constant for
:func:`broadcast`), the five default kernels and the mean-distance bandwidth. Half inputs are
computed in float32, because the formula in bfloat16 arithmetic fails the check against the
reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ALPHAS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
Loss = Callable[[Tensor, Tensor], Tensor]


def mean_sq_distance(rows: Tensor) -> Tensor:
    """Mean squared distance over all pairs, in O(N D): what a careful author writes."""
    rows = rows.detach()
    return 2 * (rows - rows.mean(0)).square().sum(1).mean()


def _wide(*samples: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if t.dtype == torch.float64 else t.float() for t in samples)


def broadcast(source: Tensor, target: Tensor) -> Tensor:
    """TLlib's formula: differences of all pairs and their mean, again for every kernel."""
    source, target = _wide(source, target)
    n = source.shape[0]
    rows = torch.cat([source, target])
    total = torch.zeros((), dtype=rows.dtype, device=rows.device)
    for alpha in ALPHAS:
        distances = ((rows.unsqueeze(0) - rows.unsqueeze(1)) ** 2).sum(2)
        total = total + torch.exp(-distances / (2 * alpha * distances.detach().mean()))
    signs = torch.full((2 * n, 2 * n), 1 / (n * (n - 1)), dtype=rows.dtype, device=rows.device)
    signs[:n, n:] = signs[n:, :n] = -1 / (n * n)
    signs.fill_diagonal_(0)
    return (total * signs).sum() + 2 / (n - 1)


def _five_exponentials(distances: Tensor, sigma_sq: Tensor) -> Tensor:
    kernel = torch.exp(-distances / (2 * ALPHAS[0] * sigma_sq))
    for alpha in ALPHAS[1:]:
        kernel = kernel + torch.exp(-distances / (2 * alpha * sigma_sq))
    return kernel


def _one_exponential(distances: Tensor, sigma_sq: Tensor) -> Tensor:
    term = torch.exp(-distances / (4 * sigma_sq))
    kernel = term
    for _ in range(4):
        term = term * term
        kernel = kernel + term
    return kernel


def _distances(a: Tensor, b: Tensor) -> Tensor:
    squares = a.square().sum(1)[:, None] + b.square().sum(1)[None, :]
    return (squares - 2 * (a @ b.T)).clamp(min=0)


def _blocks(source: Tensor, target: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The blocks XX, YY and XY, 3 n^2 pairs; the pooled matrix has 4 n^2."""
    source, target = _wide(source, target)
    n, m = source.shape[0], target.shape[0]
    sigma_sq = mean_sq_distance(torch.cat([source, target]))
    same_x = kernel(_distances(source, source), sigma_sq)
    same_y = kernel(_distances(target, target), sigma_sq)
    return (
        (same_x.sum() - same_x.diagonal().sum()) / (n * (n - 1))
        + (same_y.sum() - same_y.diagonal().sum()) / (m * (m - 1))
        - 2 * kernel(_distances(source, target), sigma_sq).mean()
    )


def gemm(source: Tensor, target: Tensor) -> Tensor:
    """Distances from matrix products, one exponential per kernel."""
    return _blocks(source, target, _five_exponentials)


def ladder(source: Tensor, target: Tensor) -> Tensor:
    """The same with one exponential and four squarings."""
    return _blocks(source, target, _one_exponential)


def compiled(form: Loss) -> Loss:
    """torch.compile for one shape; earlier compilations of the process are forgotten."""
    torch._dynamo.reset()
    return torch.compile(form, dynamic=False)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, accumulated and given in at least float32, by tensor cores where there are any."""
    if a.dtype in (torch.bfloat16, torch.float16):
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()
    return a @ b


def strip_terms(
    gram: Tensor, squares_i: Tensor, squares: Tensor, weights: Tensor, first: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted kernel sum of one strip of pairs, and minus its derivative by scale * distance."""
    exponent = ((2 * gram - squares_i[:, None] - squares[None, :]) * scale).clamp(max=0)
    rows = torch.arange(gram.shape[0], device=gram.device) + first
    pairs = rows[:, None] != torch.arange(gram.shape[1], device=gram.device)[None, :]
    weight = torch.where(pairs, weights[None, :], 0)
    e = torch.exp(exponent)
    e2 = e * e
    e4 = e2 * e2
    e8 = e4 * e4
    value = e * (1 + e * (1 + e2 * (1 + e4 * (1 + e8))))
    slope = e * (1 + e * (2 + e2 * (4 + e4 * (8 + 16 * e8))))
    return (weight * value).sum(), weight * slope


class _Strips(torch.autograd.Function):
    """Rows in strips against all columns: the full square, 16 n^2 D operations, O(n D) memory."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, target: Tensor, rows: int, terms: Any) -> Tensor:
        n, m = source.shape[0], target.shape[0]
        points = torch.cat([source, target])
        (wide,) = _wide(points)
        squares = wide.square().sum(1)
        scale = 1 / (4 * mean_sq_distance(wide))
        gradient = any(ctx.needs_input_grad)
        value, out = squares.new_zeros((), dtype=torch.float64), torch.empty_like(wide)
        across = -1 / (n * m)
        for begin, end, left, right in (
            (0, n, 1 / (n * (n - 1)), across),
            (n, n + m, across, 1 / (m * (m - 1))),
        ):
            weights = torch.cat([squares.new_full((n,), left), squares.new_full((m,), right)])
            starts = torch.arange(begin, end, rows, device=points.device)
            for low, first in zip(range(begin, end, rows), starts, strict=True):
                part = slice(low, min(low + rows, end))
                gram = product(points[part], points.T)
                total, slope = terms(gram, squares[part], squares, weights, first, scale)
                value += total
                if gradient:
                    slope = slope.to(points.dtype)
                    sums = slope.sum(1, keepdim=True, dtype=wide.dtype)
                    out[part] = product(slope, points) - sums * wide[part]
        if gradient:
            ctx.save_for_backward(out.mul_(4 * scale), source, target)
        return value.to(wide.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, source, target = ctx.saved_tensors
        out = out * grad
        n = source.shape[0]
        return out[:n].to(source.dtype), out[n:].to(target.dtype), None, None


def strips(rows: int, terms: Callable[..., tuple[Tensor, Tensor]] = strip_terms) -> Loss:
    """Chunked form: per strip two matrix products and one fused formula, gradient by hand.

    Nobody publishes it for MMD; it is what padkern's own plan gives in torch, without the halving
    by symmetry. Pass ``torch.compile(strip_terms)`` as ``terms``.
    """
    return lambda source, target: _Strips.apply(source, target, rows, terms)
