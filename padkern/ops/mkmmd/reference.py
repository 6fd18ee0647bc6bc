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
    at = used[:, 0].to(torch.int8).argmax(0, keepdim=True)
    first = torch.where(used, rows, 0).index_select(0, at).detach()
    shifted = torch.where(used, rows - first, 0)
    total = weights.sum()
    mean = ((weights[:, None] * shifted).sum(0) / total).detach()
    return torch.where(used, shifted - mean, 0), weights, total


# Columns whose products are added up at a time. Some libraries add one column after the other: with
# a thousand equal columns the rounding errors are equal too, and exceed the float32 class.
_DEPTH = 128


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances [n, m] of the rows of a [n, D] and b [m, D], never negative."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)[None, :]
    distances = squares
    for left, right in zip(a.split(_DEPTH, 1), b.split(_DEPTH, 1), strict=True):
        distances = distances - 2 * (left @ right.T)
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


DEFAULT_ALPHAS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
KERNELS = ("gaussian", "laplacian", "inverse_multiquadric", "rational_quadratic", "energy")
# Kernels of the distance itself: its square root has no derivative at 0, where 0 is taken.
ROOT_KERNELS = ("laplacian", "energy")


def _root(value: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0; NaN stays NaN."""
    positive = ~(value <= 0)
    return torch.where(positive, torch.where(positive, value, 1).sqrt(), 0)


def kernel_profile(kernel: str, distances: Tensor, scale: Tensor | float) -> Tensor:
    """k(d) of one kernel at squared distances d; ``scale`` is 2 alpha sigma_sq (unused by energy).

    gaussian exp(-d/s); laplacian exp(-sqrt(2 d/s)), that is exp(-|a - b| / (sqrt(alpha) sigma));
    inverse_multiquadric (1 + d/s)^(-1/2); rational_quadratic 1 / (1 + d/s); energy -sqrt(d).
    """
    if kernel == "gaussian":
        return torch.exp(-distances / scale)
    if kernel == "laplacian":
        return torch.exp(-_root(2 * distances / scale))
    if kernel == "inverse_multiquadric":
        return (1 + distances / scale).rsqrt()
    if kernel == "rational_quadratic":
        return (1 + distances / scale).reciprocal()
    assert kernel == "energy", kernel
    return -_root(distances)


def kernel_distances(a: Tensor, b: Tensor, kernel: str) -> Tensor:
    """Squared distances; from differences, in O(n m D) memory, where a root magnifies rounding."""
    if kernel in ROOT_KERNELS:
        return (a[:, None, :] - b[None, :, :]).square().sum(2)
    return squared_distances(a, b)


def kernel_sum(
    distances: Tensor,
    alphas: Sequence[float] | Tensor,
    sigma_sq: Tensor,
    kernel: str = "gaussian",
    betas: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """sum_u beta_u k_u(d); at sigma_sq 0 every k_u is 1, below it NaN. Energy has no bandwidth."""
    if kernel == "energy":
        return kernel_profile(kernel, distances, 1.0)
    regular = sigma_sq > 0
    safe = torch.where(regular, sigma_sq, 1)
    total = torch.zeros_like(distances)
    weight_sum = torch.zeros((), dtype=distances.dtype, device=distances.device)
    for u in range(len(alphas)):
        beta = 1.0 if betas is None else betas[u]
        total = total + beta * kernel_profile(kernel, distances, 2 * alphas[u] * safe)
        weight_sum = weight_sum + beta
    degenerate = torch.where(sigma_sq == 0, weight_sum, float("nan"))
    return torch.where(regular, total, degenerate)


def _sum(values: Tensor) -> Tensor:
    return values.sum(dtype=torch.float64)


def _weighted_sum(values: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum_ij left_i values_ij right_j in float64."""
    return _sum(left[:, None] * values * right[None, :])


def mkmmd_loss_ref(
    source: Tensor,
    target: Tensor,
    *,
    alphas: Sequence[float] | Tensor = DEFAULT_ALPHAS,
    betas: Sequence[float] | Tensor | None = None,
    kernel: str = "gaussian",
    sigma_sq: float | Tensor | str | None = None,
    estimator: str = "unbiased",
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
) -> Tensor:
    """The loss of :func:`padkern.mkmmd_loss`, with the same arguments, in O((n + m)^2) memory.

    Kernels of the distance itself take O((n + m)^2 D). Arguments are taken as already checked.
    One more estimator, a building block that is not public: "cross", sum_ij w_i w_j k(s_i, t_j).
    """
    n = source.shape[0]
    points, weights, _ = _pool(source, target, source_weight, target_weight)
    dtype, device = points.dtype, points.device
    if isinstance(alphas, Tensor):
        alphas = alphas.to(dtype)
    if isinstance(betas, Tensor):
        betas = betas.to(dtype)
    if sigma_sq is None:
        bandwidth = mean_sq_distance(source, target, source_weight, target_weight).detach()
    elif isinstance(sigma_sq, str):
        bandwidth = median_sq_distance(source, target, source_weight, target_weight)
    else:
        bandwidth = torch.as_tensor(sigma_sq, dtype=dtype, device=device).reshape(())

    def kernels(a: Tensor, b: Tensor) -> Tensor:
        return kernel_sum(kernel_distances(a, b, kernel), alphas, bandwidth, kernel, betas)

    # A NaN in any row must reach the loss, as it does in the closed-form bandwidth. The loss is a
    # small difference of means: they are added up, and subtracted, in double precision.
    x, y = points[:n], points[n:]
    wx, wy = weights[:n], weights[n:]
    cross = _weighted_sum(kernels(x, y), wx, wy)
    if estimator == "cross":
        return cross.to(dtype)
    # The diagonal's value is known: it is added or left out, never computed.
    nothing = torch.zeros((), dtype=dtype, device=device)
    at_zero = kernel_sum(nothing, alphas, bandwidth, kernel, betas)
    same = []
    for rows, weight in ((x, wx), (y, wy)):
        values = kernels(rows, rows)
        diagonal = torch.eye(rows.shape[0], dtype=torch.bool, device=device)
        off = torch.where(diagonal, torch.zeros_like(values), values)
        total, squares = _sum(weight), _sum(weight.square())
        pairs = _weighted_sum(off, weight, weight)
        if estimator == "biased":
            same.append((pairs + at_zero * squares) / total.square())
        else:
            same.append(pairs / (total.square() - squares))
    loss = same[0] + same[1] - 2 * cross / (_sum(wx) * _sum(wy))
    if estimator == "tllib":
        loss = loss + 2 / (n - 1)
    return loss.to(dtype)
