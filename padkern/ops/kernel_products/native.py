"""Launchers over ``padkern._C``: allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from padkern import _native
from padkern.ops.kernel_products.reference import PARTS
from padkern.ops.mkmmd.reference import KERNELS, compute_dtype

_DTYPES = {torch.float32: 0, torch.float64: 1}
_Matrix = tuple[int, int, int, int]


def _core() -> ModuleType:
    core, reason, _ = _native.load()
    if core is None:
        raise RuntimeError(reason)
    return core


def _matrix(x: Tensor) -> _Matrix:
    return x.data_ptr(), x.shape[0], x.stride(0), x.stride(1)


def _double(x: Tensor) -> Tensor:
    return x.detach().to(torch.float64).contiguous()


def _sum(
    kernel: str, alphas: Sequence[float], betas: Tensor | None, sigma_sq: Tensor
) -> tuple[int, list[float], int, int]:
    """The arguments of the kernel sum; the caller keeps the double tensors alive."""
    beta = 0 if betas is None else betas.data_ptr()
    return KERNELS.index(kernel), list(alphas), beta, sigma_sq.data_ptr()


def kernel_quadratic_native(
    rows: Tensor,
    membership: Tensor,
    sigma_sq: Tensor,
    alphas: Sequence[float],
    betas: Tensor | None,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quadratic forms [P], linear forms [P] and row sums [N] in float64, on CPU tensors."""
    dtype = compute_dtype(rows)
    rows, sigma_sq = rows.detach().to(dtype), _double(sigma_sq)
    betas = None if betas is None else _double(betas)
    count, columns = membership.shape
    if membership.dtype == torch.bool:
        membership = membership.view(torch.uint8)
    quadratic, linear = (torch.empty(columns, dtype=torch.float64) for _ in range(2))
    row_sums = torch.empty(count, dtype=torch.float64)
    error = _core().kernel_quadratic_cpu(
        _DTYPES[dtype],
        _sum(kernel, alphas, betas, sigma_sq),
        _matrix(rows),
        rows.shape[1],
        (membership.data_ptr(), columns, membership.stride(0), membership.stride(1)),
        (quadratic.data_ptr(), linear.data_ptr(), row_sums.data_ptr()),
    )
    if error:
        raise ValueError(error)
    return quadratic, linear, row_sums


def kernel_apply_native(
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
    """part(k(query, rows)) vectors: [Q, V] in float64, on CPU tensors of any strides."""
    dtype = compute_dtype(query, rows)
    query, rows, vectors = (x.detach().to(dtype) for x in (query, rows, vectors))
    sigma_sq = _double(sigma_sq)
    betas = None if betas is None else _double(betas)
    out = torch.empty(query.shape[0], vectors.shape[1], dtype=torch.float64)
    error = _core().kernel_apply_cpu(
        _DTYPES[dtype],
        _sum(kernel, alphas, betas, sigma_sq),
        (PARTS.index(part), power, skip_diagonal),
        _matrix(query),
        _matrix(rows),
        _matrix(vectors),
        (query.shape[1], vectors.shape[1]),
        out.data_ptr(),
    )
    if error:
        raise ValueError(error)
    return out


def draw_memberships_native(seeds: Tensor, rows: int, chosen: int) -> Tensor:
    """[rows, 1 + P] uint8 on the CPU: the first ``chosen`` rows, then a subset for each seed."""
    seeds = seeds.contiguous()
    out = torch.empty(rows, 1 + seeds.shape[0], dtype=torch.uint8)
    error = _core().draw_memberships_cpu(
        seeds.data_ptr(), seeds.shape[0], rows, chosen, out.data_ptr()
    )
    if error:
        raise ValueError(error)
    return out
