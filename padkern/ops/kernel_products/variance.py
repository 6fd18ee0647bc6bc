"""Variance of the unbiased MMD^2 estimate from row sums of the kernel matrix. See ``README.md``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from padkern.ops.kernel_products.op import kernel_apply
from padkern.ops.mkmmd.reference import compute_dtype


class KernelArguments(NamedTuple):
    """Checked arguments of the kernel sum, in the order in which the kernel products take them."""

    sigma_sq: Tensor
    alphas: tuple[float, ...]
    betas: Tensor | None
    kernel: str
    backend: str


class RowSums(NamedTuple):
    """Row sums of one power of the kernel matrix without its diagonal, in float64."""

    xx: Tensor  # [n], over the other source rows
    xy: Tensor  # [n], over the target rows
    yx: Tensor  # [m]
    yy: Tensor  # [m]


def row_sums(source: Tensor, target: Tensor, k: KernelArguments, power: int = 1) -> RowSums:
    """Row sums of k^power over each sample, a row's own value left out."""
    dtype = compute_dtype(source, target)
    rows = torch.cat([source.to(dtype), target.to(dtype)])
    n = source.shape[0]
    sides = torch.zeros(rows.shape[0], 2, dtype=dtype, device=rows.device)
    sides[:n, 0] = 1
    sides[n:, 1] = 1
    sums = kernel_apply(rows, rows, sides, *k, power=power, skip_diagonal=True)
    return RowSums(sums[:n, 0], sums[:n, 1], sums[n:, 0], sums[n:, 1])


def first_order(source: Tensor, target: Tensor, k: KernelArguments) -> tuple[Tensor, Tensor]:
    """The unbiased MMD^2 and the variance of its first-order (Hajek) projection."""
    n, m = source.shape[0], target.shape[0]
    sums = row_sums(source, target, k)
    on_source = sums.xx / (n - 1) - sums.xy / m
    on_target = sums.yy / (m - 1) - sums.yx / n
    variance = 4 * (on_source.var() / n + on_target.var() / m)
    return on_source.mean() + on_target.mean(), variance


def unbiased(source: Tensor, target: Tensor, k: KernelArguments) -> tuple[Tensor, Tensor]:
    """The unbiased MMD^2 and the unbiased estimate of its variance."""
    n, m = source.shape[0], target.shape[0]
    sums = row_sums(source, target, k)
    squares = row_sums(source, target, k, power=2)
    xy, square_xy = sums.xy.sum(), squares.xy.sum()
    value = -2 * xy / (n * m)
    variance = torch.zeros_like(value)
    # Means over distinct rows: p of k(x,x')k(x,x''), q of k(x,x')^2, r of k(x,x')k(x'',x'''), so
    # that p - r and q - r estimate the two variances of a U-statistic of degree 2.
    for count, own, cross, other, square in (
        (n, sums.xx, sums.xy, m, squares.xx.sum()),
        (m, sums.yy, sums.yx, n, squares.yy.sum()),
    ):
        total, rows = own.sum(), own.square().sum()
        value = value + total / (count * (count - 1))
        p = (rows - square) / (count * (count - 1) * (count - 2))
        q = square / (count * (count - 1))
        r = total.square() - 4 * rows + 2 * square
        r = r / (count * (count - 1) * (count - 2) * (count - 3))
        variance = variance + (4 * (count - 2) * (p - r) + 2 * (q - r)) / (count * (count - 1))
        # Covariance of k(x, x') and k(x, y).
        mixed = (own * cross).sum()
        covariance = mixed / (count * (count - 1) * other)
        covariance = covariance - (total * xy - 2 * mixed) / (
            count * (count - 1) * (count - 2) * other
        )
        variance = variance - 8 * covariance / count
    by_x, by_y = sums.xy.square().sum(), sums.yx.square().sum()
    apart = (xy.square() - by_x - by_y + square_xy) / (n * (n - 1) * m * (m - 1))
    same_x = (by_x - square_xy) / (n * m * (m - 1)) - apart
    same_y = (by_y - square_xy) / (m * n * (n - 1)) - apart
    same = square_xy / (n * m) - apart
    variance = variance + 4 * ((m - 1) * same_x + (n - 1) * same_y + same) / (n * m)
    return value, variance
