"""Kernel products in plain torch, with the whole matrix: the specification of the other backends.

Differentiable to any order. float64 inputs are computed in float64, all others in float32; sums
over pairs are taken in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from padkern.ops.mkmmd.reference import (
    ROOT_KERNELS,
    compute_dtype,
    kernel_distances,
    kernel_profile,
    kernel_sum,
)

PARTS = ("value", "slope", "spread")


def centre_of(rows: Tensor) -> Tensor:
    """The mean row [D] in float64, detached: what points are shifted by before distances."""
    exact = rows.detach().to(torch.float64)
    return exact[0] + (exact - exact[0]).mean(0)


def centred(points: Tensor, centre: Tensor, dtype: torch.dtype) -> Tensor:
    """Points less the centre in ``dtype``; a row that is not finite becomes NaN throughout."""
    shifted = (points.to(torch.float64) - centre).to(dtype)
    # Added, not selected: the gradient of such a row is NaN too.
    return shifted + torch.where(shifted.isfinite().all(1, keepdim=True), 0.0, float("nan"))


def kernel_slope(kernel: str, distances: Tensor, scale: Tensor | float) -> Tensor:
    """Derivative of :func:`kernel_profile` by the squared distance; 0 where a root is 0."""
    if kernel == "gaussian":
        return kernel_profile(kernel, distances, scale) / -scale
    if kernel == "inverse_multiquadric":
        return (1 + distances / scale).pow(-1.5) / (-2 * scale)
    if kernel == "rational_quadratic":
        return (1 + distances / scale).pow(-2) / -scale
    positive = ~(distances <= 0)
    root = torch.where(positive, distances, 1).sqrt()
    if kernel == "energy":
        slope = -0.5 / root
    else:
        factor = (2 / torch.as_tensor(scale)).sqrt()
        slope = torch.exp(-factor * root) * factor / (-2 * root)
    return torch.where(positive, slope, 0)


def kernel_part(
    distances: Tensor,
    alphas: Sequence[float],
    sigma_sq: Tensor,
    kernel: str,
    betas: Tensor | None,
    part: str,
    power: int,
) -> Tensor:
    """k^power ("value"), its derivative by d ("slope"), or d times that ("spread").

    k is the sum of kernels at squared distances d. At sigma_sq 0 every kernel is 1 and its
    derivatives are 0; below it all is NaN.
    """
    value = kernel_sum(distances, alphas, sigma_sq, kernel, betas)
    if part == "value":
        return value if power == 1 else value.square()
    regular = sigma_sq > 0 if kernel != "energy" else torch.ones_like(sigma_sq, dtype=torch.bool)
    safe = torch.where(regular, sigma_sq, 1)
    slope = torch.zeros_like(distances)
    for u in range(len(alphas)):
        beta = 1.0 if betas is None else betas[u]
        slope = slope + beta * kernel_slope(kernel, distances, 2 * alphas[u] * safe)
    if power == 2:
        slope = 2 * value * slope
    slope = torch.where(regular, slope, torch.where(sigma_sq == 0, 0.0, float("nan")))
    return slope if part == "slope" else slope * distances


def near_zero_removed(distances: Tensor, a: Tensor, b: Tensor, kernel: str) -> Tensor:
    """Distances of inner products, with 0 where rounding would be magnified by a root."""
    if kernel not in ROOT_KERNELS:
        return distances
    squares = a.square().sum(1)[:, None] + b.square().sum(1)[None, :]
    return torch.where(distances <= 4 * torch.finfo(a.dtype).eps * squares, 0, distances)


def _arguments(
    points: Tensor, sigma_sq: Tensor, betas: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """sigma_sq as a scalar, and betas, in the dtype of the points."""
    return sigma_sq.to(points.dtype).reshape(()), None if betas is None else betas.to(points.dtype)


def kernel_quadratic_ref(
    rows: Tensor,
    membership: Tensor,
    sigma_sq: Tensor,
    alphas: Sequence[float],
    betas: Tensor | None,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_p' k x_p [P], x_p' k 1 [P] and k 1 [N] in float64, k without its diagonal.

    ``rows`` is [N, D]; ``membership`` [N, P], bool or uint8, holds the 0/1 columns x_p.
    """
    points = centred(rows, centre_of(rows), compute_dtype(rows))
    sigma_sq, betas = _arguments(points, sigma_sq, betas)
    distances = kernel_distances(points, points, kernel)
    values = kernel_sum(distances, alphas, sigma_sq, kernel, betas).to(torch.float64)
    diagonal = torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
    values = torch.where(diagonal, torch.zeros_like(values), values)
    members = (membership != 0).to(torch.float64)
    row_sums = values.sum(1)
    return ((values @ members) * members).sum(0), members.T @ row_sums, row_sums


def kernel_apply_ref(
    query: Tensor,
    rows: Tensor,
    vectors: Tensor,
    sigma_sq: Tensor,
    alphas: Sequence[float],
    betas: Tensor | None,
    kernel: str,
    part: str = "value",
    power: int = 1,
    skip_diagonal: bool = False,
) -> Tensor:
    """part(k(query, rows)) vectors: [Q, V] in float64, for [Q, D], [N, D] and [N, V]."""
    dtype = compute_dtype(query, rows)
    centre = centre_of(rows)
    a, b = centred(query, centre, dtype), centred(rows, centre, dtype)
    sigma_sq, betas = _arguments(a, sigma_sq, betas)
    distances = kernel_distances(a, b, kernel)
    values = kernel_part(distances, alphas, sigma_sq, kernel, betas, part, power)
    if skip_diagonal:
        diagonal = torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
        values = torch.where(diagonal, torch.zeros_like(values), values)
    return values.to(torch.float64) @ vectors.to(torch.float64)


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's output for int64 states, whose arithmetic wraps."""

    def shifted(z: Tensor, bits: int) -> Tensor:  # without the sign
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = (state ^ shifted(state, 30)) * -0x40A7B892E31B1A47
    z = (z ^ shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ shifted(z, 31)


def draw_memberships_ref(seeds: Tensor, rows: int, chosen: int) -> Tensor:
    """[rows, 1 + P] uint8: the first ``chosen`` rows, then one random subset for each of P seeds.

    Selection sampling: row i joins with probability (still to choose) / (still to come), from 52
    bits of number i + 1 of the seed's SplitMix64 stream. The same subsets in every backend.
    """
    out = torch.zeros(rows, 1 + seeds.shape[0], dtype=torch.uint8, device=seeds.device)
    out[:chosen, 0] = 1
    state = seeds.clone()
    left = torch.full(seeds.shape, float(chosen), dtype=torch.float64, device=seeds.device)
    for i in range(rows):
        state = state - 0x61C8864680B583EB
        unit = ((_mix(state) >> 12) & ((1 << 52) - 1)).to(torch.float64) * 2.0**-52
        take = unit * (rows - i) < left
        left = left - take.to(torch.float64)
        out[i, 1:] = take
    return out
