"""Public functions: documentation, checks and dispatch. The mathematics is in ``padkern.ops``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padkern import _backends, _validation
from padkern.ops.mkmmd import reference as _mkmmd
from padkern.ops.mkmmd.op import mkmmd_fused
from padkern.ops.mkmmd.reference import DEFAULT_ALPHAS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["mkmmd_loss"]


def mkmmd_loss(
    source: Tensor,
    target: Tensor,
    *,
    alphas: Sequence[float] | Tensor = DEFAULT_ALPHAS,
    betas: Sequence[float] | Tensor | None = None,
    kernel: str = "gaussian",
    sigma_sq: float | Tensor | str | None = None,
    estimator: str = "unbiased",
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    group: ProcessGroup | None = None,
    precision: str = "float32",
    backend: str = "auto",
) -> Tensor:
    r"""Multiple-kernel maximum mean discrepancy between two samples.

    .. math::
        \frac{1}{n(n-1)}\sum_{i\ne j}k(s_i,s_j) + \frac{1}{m(m-1)}\sum_{i\ne j}k(t_i,t_j)
        - \frac{2}{nm}\sum_{i,j}k(s_i,t_j), \qquad
        k(a,b) = \sum_u \beta_u \exp\left(-\frac{\lVert a-b\rVert^2}{2\alpha_u\sigma^2}\right)

    The fused backends find value and gradient in one pass and never build the kernel matrix: their
    memory is O((n + m) D). Native results have the same bits for every thread count.

    Args:
        source: ``[n, D]``; float64, float32, float16 or bfloat16, any strides.
        target: ``[m, D]`` on the device of ``source``; n and m, and the dtypes, may differ.
        alphas: ``[K]`` bandwidth multipliers, dimensionless, > 0. Multipliers that are powers of
            two apart (the default) share one exponential. A tensor may require a gradient.
        betas: ``[K]`` weights of the kernels, ones by default. A tensor may require a gradient.
        kernel: With d the squared distance and s = 2 alpha_u sigma_sq: "gaussian" exp(-d/s),
            "laplacian" exp(-sqrt(2d/s)), "inverse_multiquadric" (1 + d/s)^(-1/2),
            "rational_quadratic" 1/(1 + d/s), or "energy" -sqrt(d), which has no bandwidth and takes
            none.
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
        group: A torch.distributed process group: the loss of the rows of all its ranks together,
            the same value on every rank, without gathering the rows. The gradient is that of this
            global loss by the local rows; see :mod:`padkern.ops.mkmmd.distributed`.
        precision: Products on a GPU for float32 inputs: "float32" (three low-precision products,
            errors as in the documented float32 class) or "tf32" (one; errors of about 1e-3). Other
            inputs and the CPU take no notice.
        backend: "auto", "reference" (plain torch, any device, differentiable to any order),
            "native" (CPU), "triton" or "cuda" (GPU); all but the reference have first derivatives
            only. A named backend never falls back; "auto" may.

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
    if group is not None:
        # Checks there, with all ranks: a rank that refused alone would leave the others waiting.
        from padkern.ops.mkmmd.distributed import mkmmd_distributed

        return mkmmd_distributed(
            source,
            target,
            alphas=alphas,
            betas=betas,
            kernel=kernel,
            sigma_sq=sigma_sq,
            estimator=estimator,
            source_weight=source_weight,
            target_weight=target_weight,
            group=group,
            precision=precision,
            backend=backend,
        )
    _validation.check_mkmmd(source, target, estimator, sigma_sq, source_weight, target_weight)
    _validation.check_kernel(kernel, alphas, betas, sigma_sq)
    _validation.check_precision(precision)
    values = (1.0,) if kernel == "energy" else _validation.check_alphas(alphas, source)
    weights = None if betas is None else _validation.check_betas(betas, len(values), source)
    tensors = (source, target, sigma_sq, source_weight, target_weight, values, weights)
    chosen = _choose(backend, *tensors)
    if chosen != "reference":
        bandwidth = sigma_sq
        if isinstance(bandwidth, str):
            bandwidth = _mkmmd.median_sq_distance(source, target, source_weight, target_weight)
        elif bandwidth is not None and not isinstance(bandwidth, Tensor):
            bandwidth = torch.tensor(bandwidth, dtype=torch.float64, device=source.device)
        return mkmmd_fused(
            source,
            target,
            bandwidth,
            source_weight,
            target_weight,
            values,
            weights,
            kernel,
            estimator,
            precision,
            chosen,
        )
    for name, weight in (("source_weight", source_weight), ("target_weight", target_weight)):
        _validation.check_weight_values(name, weight, estimator)
    with torch.autocast(source.device.type, enabled=False):
        return _mkmmd.mkmmd_loss_ref(
            source,
            target,
            alphas=values,
            betas=weights,
            kernel=kernel,
            sigma_sq=sigma_sq,
            estimator=estimator,
            source_weight=source_weight,
            target_weight=target_weight,
        )


def _choose(
    backend: str,
    source: Tensor,
    target: Tensor,
    sigma_sq: float | Tensor | str | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    alphas: Sequence[float] | Tensor,
    betas: Tensor | None,
) -> str:
    """The backend that runs these arguments."""

    def fused(why_not: Callable[..., str | None]) -> str | None:
        for name, weight in (("source_weight", source_weight), ("target_weight", target_weight)):
            if weight is not None and weight.requires_grad:
                return f"{name} requires a gradient, which only the reference backend computes"
        given = (sigma_sq, source_weight, target_weight, alphas, betas)
        return why_not(source, target, *(t for t in given if isinstance(t, Tensor)))

    return _backends.choose_backend(
        backend,
        _backends.MKMMD_BACKENDS,
        {
            "native": lambda: fused(_backends.why_not_native),
            "triton": lambda: fused(_backends.why_not_triton),
            "cuda": lambda: fused(_backends.why_not_cuda),
        },
        # What no GPU has run yet is taken only by name.
        automatic=("native",),
    )
