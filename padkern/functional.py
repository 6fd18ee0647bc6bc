"""Public functions: documentation, checks and dispatch. The mathematics is in ``padkern.ops``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from padkern import _backends, _validation
from padkern.ops.mkmmd import reference as _mkmmd
from padkern.ops.mkmmd.op import mkmmd_native

__all__ = ["mkmmd_loss"]


def mkmmd_loss(
    source: Tensor,
    target: Tensor,
    *,
    alphas: Sequence[float] = (1 / 8, 1 / 4, 1 / 2, 1, 2),
    sigma_sq: float | Tensor | str | None = None,
    estimator: str = "unbiased",
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Multiple-kernel maximum mean discrepancy between two samples.

    .. math::
        \frac{1}{n(n-1)}\sum_{i\ne j}k(s_i,s_j) + \frac{1}{m(m-1)}\sum_{i\ne j}k(t_i,t_j)
        - \frac{2}{nm}\sum_{i,j}k(s_i,t_j), \qquad
        k(a,b) = \sum_u \exp\left(-\frac{\lVert a-b\rVert^2}{2\alpha_u\sigma^2}\right)

    The native backend finds value and gradient in one pass and never builds the kernel matrix: its
    memory is O((n + m) D). Its results have the same bits for every thread count.

    Args:
        source: ``[n, D]``; float64, float32, float16 or bfloat16, any strides.
        target: ``[m, D]`` on the device of ``source``; n and m, and the dtypes, may differ.
        alphas: Bandwidth multipliers, dimensionless, > 0. Multipliers that are powers of two apart
            (the default) share one exponential.
        sigma_sq: Squared bandwidth in squared feature units. None: the mean squared distance over
            all pairs of pooled rows, diagonal included, detached. "median": the lower median over
            unordered pairs, detached (the mean if that is 0; builds the distance matrix). A tensor
            may require a gradient; one that holds 0 makes every kernel 1, a negative one gives NaN.
        estimator: "unbiased" (the formula above), "biased" (diagonals included, divided by n^2 and
            m^2) or "tllib" (unbiased + 2 / (n - 1), needs n == m).
        source_weight: ``[n]``, >= 0. Pairs count w_i w_j, normalised by (sum w)^2 (biased) or
            (sum w)^2 - sum w^2 (unbiased). A 0/1 or bool weight is a mask: masked rows, even NaN
            ones, change nothing. In the default bandwidth a weight counts a row that many times.
        target_weight: ``[m]``, likewise.
        backend: "auto", "reference" (plain torch, any device, differentiable to any order) or
            "native" (CPU, first order). A named backend never falls back; "auto" may.

    Returns:
        Tensor: Scalar; float64 if an input is float64, else float32, also under autocast. NaN or
        Inf in an input gives NaN. All rows identical: biased and unbiased 0, gradients 0.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Widths or devices differ, a sample is empty, n < 2 or m < 2 where the estimator
            needs pairs, or a value is out of range.
        RuntimeError: The named backend cannot run; the message says why.

    Source: Long et al. 2015, arXiv:1502.02791; Gretton et al. 2012, JMLR 13; the "tllib" constant
    is that of thuml/Transfer-Learning-Library at c4aa59e, ``tllib/alignment/dan.py``.
    """
    _validation.check_mkmmd(source, target, estimator, sigma_sq, source_weight, target_weight)
    values = _validation.check_alphas(alphas)
    chosen = _backends.resolve_backend(
        backend, lambda: _why_not_native(source, target, sigma_sq, source_weight, target_weight)
    )
    if chosen == "native":
        bandwidth = sigma_sq
        if isinstance(bandwidth, str):
            bandwidth = _mkmmd.median_sq_distance(source, target, source_weight, target_weight)
        elif bandwidth is not None and not isinstance(bandwidth, Tensor):
            bandwidth = torch.tensor(bandwidth, dtype=torch.float64)
        return mkmmd_native(
            source, target, bandwidth, source_weight, target_weight, values, estimator
        )
    for name, weight in (("source_weight", source_weight), ("target_weight", target_weight)):
        _validation.check_weight_values(name, weight, estimator)
    with torch.autocast(source.device.type, enabled=False):
        return _mkmmd.mkmmd_loss_ref(
            source,
            target,
            alphas=values,
            sigma_sq=sigma_sq,
            estimator=estimator,
            source_weight=source_weight,
            target_weight=target_weight,
        )


def _why_not_native(
    source: Tensor,
    target: Tensor,
    sigma_sq: float | Tensor | str | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
) -> str | None:
    for name, weight in (("source_weight", source_weight), ("target_weight", target_weight)):
        if weight is not None and weight.requires_grad:
            return f"{name} requires a gradient, which only the reference backend computes"
    bandwidth = sigma_sq if isinstance(sigma_sq, Tensor) else None
    return _backends.why_not_native(source, target, bandwidth, source_weight, target_weight)
