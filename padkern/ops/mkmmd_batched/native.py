"""Launchers over ``padkern._C``: allocation, then raw pointers, sizes, strides and type codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from padkern import _native
from padkern.ops.mkmmd.reference import KERNELS, compute_dtype

# MkmmdDtype, MkmmdEstimator and MkmmdKernel of csrc/mkmmd/mkmmd.h.
_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
}
_ESTIMATORS = {"unbiased": 0, "biased": 1, "tllib": 2, "cross": 3}
_KERNELS = {name: code for code, name in enumerate(KERNELS)}


def _sample(
    rows: Tensor, offsets: Tensor, weight: Tensor | None, out: Tensor | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """(data, dtype, problem, row and column stride), (weight, dtype, problem and row stride),
    (offsets or 0, bytes of one, total rows, rows of a problem), gradient."""
    batched = rows.dim() == 3
    # Packed rows have no stride from one problem to the next.
    data = (rows.data_ptr(), _DTYPES[rows.dtype], *(() if batched else (0,)), *rows.stride())
    weights: tuple[int, ...] = (0, 0, 0, 0)
    if weight is not None:
        strides = weight.stride() if batched else (0, *weight.stride())
        weights = (weight.data_ptr(), _DTYPES[weight.dtype], *strides)
    if batched:
        cut = (0, offsets.element_size(), rows.shape[0] * rows.shape[1], rows.shape[1])
    else:
        cut = (offsets.data_ptr(), offsets.element_size(), rows.shape[0], 0)
    return data, weights, cut, 0 if out is None else out.data_ptr()


def _launch(
    source: Tensor,
    target: Tensor,
    source_offsets: Tensor,
    target_offsets: Tensor,
    sigma_sq: Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    alphas: Sequence[float],
    kernel: str,
    estimator: str,
    max_source_rows: int,
    max_target_rows: int,
    *,
    gradient: bool,
) -> tuple[Tensor | None, ...]:
    """(value, d_source, d_target, d_sigma). The core finds the largest sizes itself."""
    core, reason, _ = _native.load()
    if core is None:
        raise RuntimeError(reason)
    dtype = compute_dtype(source, target)
    problems = source_offsets.shape[0] - 1
    offsets = (source_offsets.contiguous(), target_offsets.contiguous())
    value = torch.empty((problems,), dtype=dtype)
    sigma = None if sigma_sq is None else sigma_sq.detach().to(torch.float64).contiguous()
    d_sigma = torch.empty((problems,), dtype=torch.float64) if gradient else None
    outputs = [torch.empty(x.shape, dtype=dtype) if gradient else None for x in (source, target)]
    task = (
        (_DTYPES[dtype], _ESTIMATORS[estimator], _KERNELS[kernel], problems, source.shape[-1]),
        _sample(source, offsets[0], source_weight, outputs[0]),
        _sample(target, offsets[1], target_weight, outputs[1]),
        alphas,
        (
            0 if sigma is None else sigma.data_ptr(),
            value.data_ptr(),
            0 if d_sigma is None else d_sigma.data_ptr(),
        ),
        gradient,
    )
    # torch aligns its CPU memory to 64 bytes, which is what the core asks for.
    workspace = torch.empty(core.mkmmd_batched_workspace_bytes(*task), dtype=torch.uint8)
    error = core.mkmmd_batched_cpu(*task, workspace.data_ptr(), workspace.numel())
    if error:
        raise ValueError(error)
    return value, outputs[0], outputs[1], d_sigma


def mkmmd_batched_value_native(*args: Any) -> Tensor:
    """The losses [B] in the compute dtype. CPU tensors of any strides, packed or [B, n, D]."""
    value = _launch(*args, gradient=False)[0]
    assert value is not None
    return value


def mkmmd_batched_value_grad_native(*args: Any) -> tuple[Tensor, ...]:
    """The losses and their derivatives: (value [B], d_source, d_target, d_sigma [B] float64)."""
    return tuple(out for out in _launch(*args, gradient=True) if out is not None)
