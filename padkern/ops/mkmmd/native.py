"""Launchers over ``padkern._C``: checks, allocation, then raw pointers, sizes and strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from padkern import _native
from padkern.ops.mkmmd.reference import compute_dtype

_DTYPES = {torch.float32: 0, torch.float64: 1}
_ESTIMATORS = {"unbiased": 0, "biased": 1, "tllib": 2}


def _launch(
    source: Tensor,
    target: Tensor,
    sigma_sq: Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    alphas: Sequence[float],
    estimator: str,
    gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    core, reason, _ = _native.load()
    if core is None:
        raise RuntimeError(reason)
    dtype = compute_dtype(source, target)
    code = _DTYPES[dtype]
    n, dim = source.shape
    m = target.shape[0]
    source, target = source.detach().to(dtype), target.detach().to(dtype)
    value = torch.empty((), dtype=dtype)
    sigma = None if sigma_sq is None else sigma_sq.detach().to(torch.float64)
    d_sigma = torch.empty((), dtype=torch.float64) if gradient else None
    size = core.mkmmd_workspace_bytes(code, n, m, dim, gradient)
    # torch aligns its CPU memory to 64 bytes, which is what the core asks for.
    workspace = torch.empty(size, dtype=torch.uint8)
    samples, gradients, keep = [], [], []
    for rows, weight in ((source, source_weight), (target, target_weight)):
        out = torch.empty(rows.shape, dtype=dtype) if gradient else None
        weight = None if weight is None else weight.detach().to(dtype)
        keep.append(weight)
        gradients.append(out)
        samples.append(
            (
                rows.data_ptr(),
                0 if weight is None else weight.data_ptr(),
                rows.shape[0],
                rows.stride(0),
                rows.stride(1),
                0 if weight is None else weight.stride(0),
                0 if out is None else out.data_ptr(),
            )
        )
    error = core.mkmmd_cpu(
        code,
        _ESTIMATORS[estimator],
        samples[0],
        samples[1],
        dim,
        alphas,
        0 if sigma is None else sigma.data_ptr(),
        gradient,
        value.data_ptr(),
        0 if d_sigma is None else d_sigma.data_ptr(),
        workspace.data_ptr(),
        size,
    )
    if error:
        raise ValueError(error)
    return value, gradients[0], gradients[1], d_sigma


def mkmmd_value_native(
    source: Tensor,
    target: Tensor,
    sigma_sq: Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    alphas: Sequence[float],
    estimator: str,
) -> Tensor:
    """The loss: scalar of the compute dtype. CPU tensors of any strides."""
    return _launch(
        source, target, sigma_sq, source_weight, target_weight, alphas, estimator, False
    )[0]


def mkmmd_value_grad_native(
    source: Tensor,
    target: Tensor,
    sigma_sq: Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    alphas: Sequence[float],
    estimator: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its derivatives: (value, [n, D], [m, D], d loss / d sigma_sq in float64)."""
    value, d_source, d_target, d_sigma = _launch(
        source, target, sigma_sq, source_weight, target_weight, alphas, estimator, True
    )
    assert d_source is not None
    assert d_target is not None
    assert d_sigma is not None
    return value, d_source, d_target, d_sigma
