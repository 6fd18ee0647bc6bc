"""MK-MMD in plain torch: the specification every other implementation is compared with.

Builds the [n + m, n + m] matrices and is differentiable to any order. float64 inputs are computed
in float64, all others in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _pool(
    source: Tensor, target: Tensor, source_weight: Tensor | None, target_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Centred pooled rows [N, D] (rows of weight 0 become 0), weights [N] and the weights' total.

    MMD does not change under a shift of all rows; centring removes the cancellation that a common
    offset would cause in |a|^2 + |b|^2 - 2ab. The first row goes first: differences to it are
    exactly zero when all rows are identical.
    """
    dtype = compute_dtype(source, target)
    rows = torch.cat([source.to(dtype), target.to(dtype)])
    parts = []
    for sample, weight in ((source, source_weight), (target, target_weight)):
        ones = torch.ones(sample.shape[0], dtype=dtype, device=sample.device)
        parts.append(ones if weight is None else weight.to(dtype))
    weights = torch.cat(parts)
    used = (weights != 0)[:, None]
    first = torch.where(used, rows, 0)[used[:, 0].to(torch.int8).argmax()].detach()
    shifted = torch.where(used, rows - first, 0)
    total = weights.sum()
    mean = ((weights[:, None] * shifted).sum(0) / total).detach()
    return torch.where(used, shifted - mean, 0), weights, total


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances [n, m] of the rows of a [n, D] and b [m, D], never negative."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)[None, :]
    distances = squares - 2 * (a @ b.T)
    # Rounding may give a small negative value. Shift it without touching the derivatives.
    return distances + (distances.clamp(min=0) - distances).detach()


def mean_sq_distance(
    source: Tensor,
    target: Tensor,
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
) -> Tensor:
    """Mean squared distance over all pairs of pooled rows, diagonal included, in O(N D).

    Weights count a row as that many rows, so a 0/1 weight gives the mean over the rows kept.
    """
    points, weights, total = _pool(source, target, source_weight, target_weight)
    mean = (weights[:, None] * points).sum(0) / total
    return 2 * ((weights * points.square().sum(1)).sum() / total - mean.square().sum())


def median_sq_distance(
    source: Tensor,
    target: Tensor,
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
) -> Tensor:
    """Lower median of the squared distances over unordered pairs of pooled rows of weight > 0.

    Equals the mean when more than half of the pairs coincide, because a bandwidth of 0 would say
    nothing about the others. Weights select rows here, they do not count them. Detached.
    """
    with torch.no_grad():
        points, weights, _ = _pool(source, target, source_weight, target_weight)
        if source_weight is not None or target_weight is not None:
            points = points[weights != 0]
        mean = mean_sq_distance(source, target, source_weight, target_weight)
        if points.shape[0] < 2:
            return mean
        # From differences, not from inner products: identical rows must give exactly 0.
        median = torch.nn.functional.pdist(points).square().median()
        return torch.where(median == 0, mean, median)


def _kernel_sum(distances: Tensor, alphas: Sequence[float], sigma_sq: Tensor) -> Tensor:
    """sum_u exp(-d / (2 alpha_u sigma_sq)); all ones per kernel at sigma_sq 0, NaN below 0."""
    regular = sigma_sq > 0
    safe = torch.where(regular, sigma_sq, 1)
    total = torch.zeros_like(distances)
    for alpha in alphas:
        total = total + torch.exp(-distances / (2 * alpha * safe))
    degenerate = torch.where(sigma_sq == 0, float(len(alphas)), float("nan")).to(total.dtype)
    return torch.where(regular, total, degenerate)


def mkmmd_loss_ref(
    source: Tensor,
    target: Tensor,
    *,
    alphas: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 1, 2),
    sigma_sq: float | Tensor | str | None = None,
    estimator: str = "unbiased",
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
) -> Tensor:
    """The loss of :func:`padkern.mkmmd_loss`, with the same arguments, in O((n + m)^2) memory.

    Arguments are taken as already checked.
    """
    n = source.shape[0]
    points, weights, _ = _pool(source, target, source_weight, target_weight)
    if sigma_sq is None:
        bandwidth = mean_sq_distance(source, target, source_weight, target_weight).detach()
    elif isinstance(sigma_sq, str):
        bandwidth = median_sq_distance(source, target, source_weight, target_weight)
    else:
        bandwidth = torch.as_tensor(sigma_sq, dtype=points.dtype, device=points.device).reshape(())

    # A NaN in any row must reach the loss, as it does in the closed-form bandwidth.
    x, y = points[:n], points[n:]
    wx, wy = weights[:n], weights[n:]
    same = []
    for rows, weight in ((x, wx), (y, wy)):
        kernel = _kernel_sum(squared_distances(rows, rows), alphas, bandwidth)
        count = rows.shape[0]
        diagonal = torch.eye(count, dtype=torch.bool, device=rows.device)
        # Every kernel is 1 at distance 0: the diagonal is added or left out, never computed.
        off = torch.where(diagonal, torch.zeros_like(kernel), kernel)
        total, squares = weight.sum(), weight.square().sum()
        pairs = weight @ off @ weight
        if estimator == "biased":
            same.append((pairs + len(alphas) * squares) / total.square())
        else:
            same.append(pairs / (total.square() - squares))
    cross = wx @ _kernel_sum(squared_distances(x, y), alphas, bandwidth) @ wy
    loss = same[0] + same[1] - 2 * cross / (wx.sum() * wy.sum())
    if estimator == "tllib":
        loss = loss + 2 / (n - 1)
    return loss
