"""Weighted kernel sums between two blocks of rows, with derivatives, on any backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from padkern.ops.mkmmd import op  # noqa: F401 - registers the ops
from padkern.ops.mkmmd.reference import compute_dtype, mkmmd_loss_ref


def cross_sums(
    a: Tensor,
    b: Tensor,
    a_weight: Tensor | None,
    b_weight: Tensor | None,
    *,
    alphas: Sequence[float] | Tensor,
    betas: Tensor | None,
    kernel: str,
    sigma_sq: Tensor | None,
    precision: str,
    backend: str,
    gradient: bool,
    per_kernel: bool,
) -> tuple[Tensor, ...]:
    """sum_ij w_i w_j k(a_i, b_j), and its derivatives when ``gradient`` is set.

    Returns:
        tuple: (value,), or (value, d_a, d_b, d_sigma_sq, d_alphas, d_betas). The last three are
        float64, the last two empty unless ``per_kernel``; the others have the compute dtype.
    """
    if backend == "reference":
        with torch.set_grad_enabled(gradient):
            return _reference(
                a, b, a_weight, b_weight, alphas, betas, kernel, sigma_sq, gradient, per_kernel
            )
    given = isinstance(alphas, Tensor)
    tensor, numbers = (alphas, ()) if given else (None, alphas)
    options = (tensor, betas, numbers, kernel, "cross", precision, backend)
    if gradient:
        return torch.ops.padkern.mkmmd_value_grad(
            a, b, sigma_sq, a_weight, b_weight, *options, per_kernel
        )
    return (torch.ops.padkern.mkmmd_value(a, b, sigma_sq, a_weight, b_weight, *options),)


def _reference(
    a: Tensor,
    b: Tensor,
    a_weight: Tensor | None,
    b_weight: Tensor | None,
    alphas: Sequence[float] | Tensor,
    betas: Tensor | None,
    kernel: str,
    sigma_sq: Tensor | None,
    gradient: bool,
    per_kernel: bool,
) -> tuple[Tensor, ...]:
    dtype, device = compute_dtype(a, b), a.device
    alphas = torch.as_tensor(alphas, dtype=dtype, device=device)
    ones = torch.ones(alphas.shape, dtype=dtype, device=device)
    bandwidth = ones[0] if sigma_sq is None else sigma_sq
    # Copies: a block may meet itself, and each side has its own gradient.
    leaves = [t.detach().clone() for t in (a.to(dtype), b.to(dtype), bandwidth, alphas)]
    leaves.append((ones if betas is None else betas).detach().clone())
    leaves = [t.requires_grad_(gradient) for t in leaves]
    value = mkmmd_loss_ref(
        leaves[0],
        leaves[1],
        alphas=leaves[3],
        betas=leaves[4],
        kernel=kernel,
        sigma_sq=None if sigma_sq is None else leaves[2],
        estimator="cross",
        source_weight=a_weight,
        target_weight=b_weight,
    )
    if not gradient:
        return (value,)
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    d = [
        torch.zeros_like(leaf) if one is None else one
        for leaf, one in zip(leaves, found, strict=True)
    ]
    d_alphas, d_betas = (t.double()[: len(t) if per_kernel else 0] for t in d[3:])
    return value.detach(), d[0], d[1], d[2].double(), d_alphas, d_betas
