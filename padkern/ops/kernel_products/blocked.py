"""Kernel products in torch by blocks of the kernel matrix: any device, never [N, N] memory.

Sums are taken in float64, without a synchronisation with the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from padkern.ops.kernel_products.reference import (
    centre_of,
    centred,
    draw_memberships_ref,
    kernel_part,
    near_zero_removed,
)
from padkern.ops.mkmmd.reference import compute_dtype, squared_distances

BLOCK = 2048  # rows and columns of the kernel matrix at once
PANEL = 512  # membership columns at once


def _block(
    a: Tensor,
    b: Tensor,
    alphas: Sequence[float],
    sigma_sq: Tensor,
    kernel: str,
    betas: Tensor | None,
    part: str = "value",
    power: int = 1,
) -> Tensor:
    distances = near_zero_removed(squared_distances(a, b), a, b, kernel)
    return kernel_part(distances, alphas, sigma_sq, kernel, betas, part, power)


def kernel_quadratic_blocked(
    rows: Tensor,
    membership: Tensor,
    sigma_sq: Tensor,
    alphas: Sequence[float],
    betas: Tensor | None,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`kernel_quadratic_ref` in blocks; each pair of blocks is computed once."""
    points = centred(rows, centre_of(rows), compute_dtype(rows))
    sigma_sq = sigma_sq.to(points.dtype).reshape(())
    betas = None if betas is None else betas.to(points.dtype)
    count, columns = membership.shape
    row_sums = torch.zeros(count, dtype=torch.float64, device=rows.device)
    quadratic, linear = row_sums.new_zeros(columns), row_sums.new_zeros(columns)
    for i in range(0, count, BLOCK):
        for j in range(i, count, BLOCK):
            left, right = slice(i, i + BLOCK), slice(j, j + BLOCK)
            values = _block(points[left], points[right], alphas, sigma_sq, kernel, betas)
            values = values.to(torch.float64)
            if i == j:
                values.fill_diagonal_(0)
            else:
                row_sums[right] += values.sum(0)
            row_sums[left] += values.sum(1)
            for p in range(0, columns, PANEL):
                panel = slice(p, p + PANEL)
                own = (membership[left, panel] != 0).to(torch.float64)
                other = own if i == j else (membership[right, panel] != 0).to(torch.float64)
                quadratic[panel] += (1 if i == j else 2) * ((values @ other) * own).sum(0)
    for i in range(0, count, BLOCK):
        left = slice(i, i + BLOCK)
        for p in range(0, columns, PANEL):
            panel = slice(p, p + PANEL)
            linear[panel] += row_sums[left] @ (membership[left, panel] != 0).to(torch.float64)
    return quadratic, linear, row_sums


def kernel_apply_blocked(
    query: Tensor,
    rows: Tensor,
    vectors: Tensor,
    sigma_sq: Tensor,
    alphas: Sequence[float],
    betas: Tensor | None,
    kernel: str,
    part: str,
    power: int,
    skip_diagonal: bool,
) -> Tensor:
    """:func:`kernel_apply_ref` in blocks, each multiplied in the compute dtype."""
    dtype = compute_dtype(query, rows)
    centre = centre_of(rows)
    sigma_sq = sigma_sq.to(dtype).reshape(())
    betas = None if betas is None else betas.to(dtype)
    out = torch.zeros(query.shape[0], vectors.shape[1], dtype=torch.float64, device=query.device)
    for i in range(0, query.shape[0], BLOCK):
        a = centred(query[i : i + BLOCK], centre, dtype)
        for j in range(0, rows.shape[0], BLOCK):
            b = centred(rows[j : j + BLOCK], centre, dtype)
            values = _block(a, b, alphas, sigma_sq, kernel, betas, part, power)
            if skip_diagonal and i == j:
                values.fill_diagonal_(0)
            out[i : i + BLOCK] += (values @ vectors[j : j + BLOCK].to(dtype)).to(torch.float64)
    return out


def draw_memberships_blocked(seeds: Tensor, rows: int, chosen: int) -> Tensor:
    """:func:`draw_memberships_ref`."""
    return draw_memberships_ref(seeds, rows, chosen)
