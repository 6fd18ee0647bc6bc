"""Launchers over ``libpadkern_cuda``: allocation, then raw pointers, sizes and strides.

Nothing here waits for the GPU, and all memory comes from torch, so calls can be captured in a CUDA
graph. Design and limits: ``CUDA.md`` beside this file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
_ESTIMATORS = {"unbiased": 0, "biased": 1, "tllib": 2, "cross": 3}
_KERNELS = {name: code for code, name in enumerate(KERNELS)}


class _Sample(ctypes.Structure):
    """padkern_mkmmd_sample of csrc/mkmmd/mkmmd_cuda.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "weight", "gradient")),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "row_stride", "column_stride", "weight_stride")
        ),
        *((name, ctypes.c_int32) for name in ("dtype", "weight_dtype")),
    )


class _Params(ctypes.Structure):
    """padkern_mkmmd_params of csrc/mkmmd/mkmmd_cuda.h."""

    _fields_ = (
        ("source", _Sample),
        ("target", _Sample),
        *(
            (name, ctypes.c_int64)
            for name in ("dim", "num_alphas", "alphas_stride", "betas_stride")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("host_alphas", "alphas", "betas", "sigma_sq", "value", "sigma_gradient"),
                *("alphas_gradient", "betas_gradient", "workspace"),
            )
        ),
        ("workspace_bytes", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("dtype", "estimator", "kernel", "products", "path"),
                *("alphas_dtype", "betas_dtype", "sigma_dtype"),
            )
        ),
    )


def _library() -> ctypes.CDLL:
    library, reason = _native.load_cuda()
    if library is None:
        raise RuntimeError(reason)
    if library.padkern_mkmmd_params_bytes() != ctypes.sizeof(_Params):
        raise RuntimeError("the CUDA library does not fit this version of padkern: rebuild it")
    return library


@contextmanager
def _current_stream(device: torch.device) -> Iterator[int]:
    """Makes the device current; gives the handle of its current stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def _sample(rows: Tensor, weight: Tensor | None, gradient: Tensor | None) -> _Sample:
    out = _Sample(
        data=rows.data_ptr(),
        rows=rows.shape[0],
        row_stride=rows.stride(0),
        column_stride=rows.stride(1),
        dtype=_DTYPES[rows.dtype],
    )
    if weight is not None:
        out.weight = weight.data_ptr()
        out.weight_stride = weight.stride(0)
        out.weight_dtype = _DTYPES[weight.dtype]
    if gradient is not None:
        out.gradient = gradient.data_ptr()
    return out


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
    precision: str,
    gradient: bool,
    per_kernel: bool,
) -> tuple[Tensor, ...]:
    library = _library()
    dtype, device = compute_dtype(source, target), source.device
    n, dim = source.shape
    value = torch.empty((), dtype=dtype, device=device)
    d_source = d_target = None
    derivatives: tuple[Tensor, ...] = ()
    count = len(alphas) if alphas_tensor is None else alphas_tensor.shape[0]
    if gradient:
        d_source = torch.empty((n, dim), dtype=dtype, device=device)
        d_target = torch.empty((target.shape[0], dim), dtype=dtype, device=device)
        derivatives = tuple(
            torch.empty(shape, dtype=torch.float64, device=device)
            for shape in ((), *2 * ((count if per_kernel else 0,),))
        )
    # One low-precision product, on request, is for float32 rows only.
    single = precision == "tf32" and torch.float32 in (source.dtype, target.dtype)
    params = _Params(
        source=_sample(source, source_weight, d_source),
        target=_sample(target, target_weight, d_target),
        dim=dim,
        num_alphas=count,
        value=value.data_ptr(),
        dtype=_DTYPES[dtype],
        estimator=_ESTIMATORS[estimator],
        kernel=_KERNELS[kernel],
        products=1 if single else 3,
    )
    numbers = (ctypes.c_double * len(alphas))(*alphas)
    if alphas_tensor is None:
        params.host_alphas = ctypes.addressof(numbers)
    else:
        params.alphas = alphas_tensor.data_ptr()
        params.alphas_stride = alphas_tensor.stride(0)
        params.alphas_dtype = _DTYPES[alphas_tensor.dtype]
    if betas is not None:
        params.betas = betas.data_ptr()
        params.betas_stride = betas.stride(0)
        params.betas_dtype = _DTYPES[betas.dtype]
    if sigma_sq is not None:
        params.sigma_sq = sigma_sq.data_ptr()
        params.sigma_dtype = _DTYPES[sigma_sq.dtype]
    if gradient:
        params.sigma_gradient = derivatives[0].data_ptr()
    if gradient and per_kernel:
        params.alphas_gradient = derivatives[1].data_ptr()
        params.betas_gradient = derivatives[2].data_ptr()
    size = library.padkern_mkmmd_workspace_bytes(ctypes.byref(params))
    workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
    params.workspace = workspace.data_ptr()
    params.workspace_bytes = size
    with _current_stream(device) as stream:
        params.stream = stream
        error = library.padkern_mkmmd(ctypes.byref(params))
    if error:
        message = library.padkern_cuda_error_text().decode()
        raise (ValueError if error == 1 else RuntimeError)(message)
    if d_source is None or d_target is None:
        return (value,)
    return (value, d_source, d_target, *derivatives)


def mkmmd_value_cuda(
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
    """The loss: scalar of the compute dtype. CUDA tensors of any strides."""
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
        precision,
        False,
        False,
    )[0]


def mkmmd_value_grad_cuda(
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
) -> tuple[Tensor, ...]:
    """The loss and its derivatives.

    Returns:
        (value, [n, D], [m, D]) in the compute dtype, then float64: d loss / d sigma_sq, and by
        alphas [K] and betas [K], which are empty without ``per_kernel``.
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
        precision,
        True,
        per_kernel,
    )
