"""Launchers over ``padkern._C``: checks, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from padkern import _native
from padkern.ops.mkmmd.reference import KERNELS, compute_dtype

# Codes of csrc/mkmmd/mkmmd.h.
_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
}
# Rows from which memory matters more than one more view.
_LARGE = 1536
_ESTIMATORS = {"unbiased": 0, "biased": 1, "tllib": 2, "cross": 3}
_KERNELS = {name: code for code, name in enumerate(KERNELS)}


def _sample(rows: Tensor, weight: Tensor | None, gradient: Tensor | None) -> tuple[int, ...]:
    d_rows, d_stride = (0, 0) if gradient is None else (gradient.data_ptr(), gradient.stride(0))
    if weight is None:
        at_weight = weight_code = weight_stride = 0
    else:
        at_weight, weight_code = weight.data_ptr(), _DTYPES[weight.dtype]
        weight_stride = weight.stride(0)
    code, count = _DTYPES[rows.dtype], rows.shape[0]
    at_rows, strides = rows.data_ptr(), rows.stride()
    return at_rows, code, at_weight, weight_code, count, *strides, weight_stride, d_rows, d_stride


def _launch(
    source: Tensor,
    target: Tensor,
    sigma_sq: Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    alphas_tensor: Tensor | None,
    betas: Tensor | None,
    alphas: Sequence[float],
    kernel: str,
    estimator: str,
    gradient: bool,
    per_kernel: bool,
) -> tuple[Any, ...]:
    core, reason, _ = _native.load()
    if core is None:
        raise RuntimeError(reason)
    dtype = compute_dtype(source, target)
    code, source_code, target_code = _DTYPES[dtype], _DTYPES[source.dtype], _DTYPES[target.dtype]
    n, dim = source.shape
    m = target.shape[0]
    if alphas_tensor is not None:
        alphas = alphas_tensor.tolist()
    value = torch.empty((), dtype=dtype)
    d_source = d_target = d_sigma = d_alphas = d_betas = None
    at_sigma = at_alphas = at_betas = stride = 0
    if gradient:
        # Rows a multiple of the vector width apart let the core accumulate in place.
        stride = dim if max(n, m) < _LARGE else -(-dim // 16) * 16
        d_source = torch.empty((n, stride), dtype=dtype)
        d_target = torch.empty((m, stride), dtype=dtype)
        if stride != dim:
            d_source, d_target = d_source[:, :dim], d_target[:, :dim]
        d_sigma = torch.empty((), dtype=torch.float64)
        at_sigma = d_sigma.data_ptr()
        if per_kernel:
            d_alphas = torch.empty(len(alphas), dtype=torch.float64)
            d_betas = torch.empty(len(alphas), dtype=torch.float64)
            at_alphas, at_betas = d_alphas.data_ptr(), d_betas.data_ptr()
    size = core.mkmmd_workspace_bytes(code, source_code, target_code, n, m, dim, stride)
    # torch aligns its CPU memory to 64 bytes, which is what the core asks for.
    workspace = torch.empty(size, dtype=torch.uint8)
    error = core.mkmmd_cpu(
        (code, _ESTIMATORS[estimator], _KERNELS[kernel]),
        _sample(source, source_weight, d_source),
        _sample(target, target_weight, d_target),
        dim,
        alphas,
        () if betas is None else betas.tolist(),
        0 if sigma_sq is None else sigma_sq.data_ptr(),
        0 if sigma_sq is None else _DTYPES[sigma_sq.dtype],
        gradient,
        (value.data_ptr(), at_sigma, at_alphas, at_betas),
        workspace.data_ptr(),
        size,
    )
    if error:
        raise ValueError(error)
    return value, d_source, d_target, d_sigma, d_alphas, d_betas


def mkmmd_value_native(
    source: Tensor,
    target: Tensor,
    sigma_sq: Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    alphas_tensor: Tensor | None,
    betas: Tensor | None,
    alphas: Sequence[float],
    kernel: str,
    estimator: str,
    precision: str,
) -> Tensor:
    """The loss: scalar of the compute dtype. CPU tensors of any strides."""
    return _launch(
        source,
        target,
        sigma_sq,
        source_weight,
        target_weight,
        alphas_tensor,
        betas,
        alphas,
        kernel,
        estimator,
        False,
        False,
    )[0]


def mkmmd_value_grad_native(
    source: Tensor,
    target: Tensor,
    sigma_sq: Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    alphas_tensor: Tensor | None,
    betas: Tensor | None,
    alphas: Sequence[float],
    kernel: str,
    estimator: str,
    precision: str,
    per_kernel: bool,
) -> tuple[Any, ...]:
    """The loss and its derivatives.

    Returns:
        (value, [n, D], [m, D]) in the compute dtype, the rows of large samples possibly padded;
        then in float64 the derivatives by sigma_sq, alphas [K] and betas [K], the last two None
        without ``per_kernel``.
    """
    return _launch(
        source,
        target,
        sigma_sq,
        source_weight,
        target_weight,
        alphas_tensor,
        betas,
        alphas,
        kernel,
        estimator,
        True,
        per_kernel,
    )
