"""Argument checks at the public edge, independent of the backend."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from padkern.ops.mkmmd.reference import DEFAULT_ALPHAS, KERNELS

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ESTIMATORS = ("unbiased", "biased", "tllib")
MAX_ALPHAS = 64
PRECISIONS = ("float32", "tf32")


def _check_matrix(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {value.dtype}")
    if value.dim() != 2:
        raise ValueError(f"{name} must have shape [rows, D], got {list(value.shape)}")
    if value.shape[0] == 0 or value.shape[1] == 0:
        raise ValueError(f"{name} must not be empty, got shape {list(value.shape)}")


def _check_weight(name: str, value: object, sample: Tensor, sample_name: str) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(value).__name__}")
    if not (value.dtype in FLOAT_DTYPES or value.dtype == torch.bool):
        raise TypeError(f"{name} must be floating point or bool, got {value.dtype}")
    if tuple(value.shape) != (sample.shape[0],):
        raise ValueError(
            f"{name} must have shape [{sample.shape[0]}], one value per row of {sample_name}, "
            f"got {list(value.shape)}"
        )
    if value.device != sample.device:
        raise ValueError(f"{name} must be on {sample.device}, got {value.device}")


def check_alphas(
    alphas: Sequence[float] | Tensor, source: Tensor | None = None
) -> tuple[float, ...] | Tensor:
    """Returns the bandwidth multipliers as floats, or the tensor they came as.

    Raises if one is not positive and finite; the values of a tensor are not read.
    """
    if isinstance(alphas, Tensor):
        _check_vector("alphas", alphas, source)
        return alphas
    if isinstance(alphas, str) or not isinstance(alphas, Sequence):
        raise TypeError(
            f"alphas must be a sequence of numbers or a Tensor, got {type(alphas).__name__}"
        )
    values = tuple(float(alpha) for alpha in alphas)
    if not 1 <= len(values) <= MAX_ALPHAS:
        raise ValueError(f"alphas must hold 1 to {MAX_ALPHAS} values, got {len(values)}")
    for alpha in values:
        if not 0.0 < alpha < math.inf:  # also false for NaN
            raise ValueError(f"alphas must be positive and finite, got {alpha}")
    return values


def _check_vector(name: str, value: Tensor, source: Tensor | None) -> None:
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.dim() != 1 or not 1 <= value.shape[0] <= MAX_ALPHAS:
        raise ValueError(
            f"{name} must have shape [K] with K from 1 to {MAX_ALPHAS}, got {list(value.shape)}"
        )
    if source is not None and value.device != source.device:
        raise ValueError(f"{name} must be on {source.device}, got {value.device}")


def check_betas(
    betas: Sequence[float] | Tensor | None, count: int, source: Tensor
) -> Tensor | None:
    """Returns the kernel weights as a tensor on the device of ``source``, or None for ones."""
    if betas is None:
        return None
    if not isinstance(betas, Tensor):
        if isinstance(betas, str) or not isinstance(betas, Sequence):
            raise TypeError(
                f"betas must be a sequence of numbers or a Tensor, got {type(betas).__name__}"
            )
        for beta in betas:
            if not math.isfinite(beta):
                raise ValueError(f"betas must be finite, got {beta}")
        betas = torch.tensor(tuple(betas), dtype=torch.float64, device=source.device)
    if betas.dim() != 1 or betas.shape[0] != count:
        raise ValueError(f"betas must have shape [{count}], one per alpha, got {list(betas.shape)}")
    _check_vector("betas", betas, source)
    return betas


def check_kernel(
    kernel: str,
    alphas: Sequence[float] | Tensor,
    betas: Sequence[float] | Tensor | None,
    sigma_sq: float | Tensor | str | None,
) -> None:
    """Checks the kernel's name, and that energy, which has no bandwidth, is given none."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if kernel != "energy":
        return
    for name, given in (
        ("alphas", isinstance(alphas, Tensor) or tuple(alphas) != DEFAULT_ALPHAS),
        ("betas", betas is not None),
        ("sigma_sq", sigma_sq is not None),
    ):
        if given:
            raise ValueError(f"kernel 'energy' has no bandwidth and takes no {name}")


def check_precision(precision: str) -> None:
    """Raises ValueError for a name that is not a precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def check_sigma_sq(sigma_sq: float | Tensor | str | None, source: Tensor) -> None:
    """Checks the squared bandwidth; a tensor's value is not read, to spare a synchronisation."""
    if sigma_sq is None:
        return
    if isinstance(sigma_sq, str):
        if sigma_sq != "median":
            raise ValueError(f"sigma_sq must be a number, a Tensor or 'median', got {sigma_sq!r}")
    elif isinstance(sigma_sq, Tensor):
        if sigma_sq.dtype not in FLOAT_DTYPES:
            raise TypeError(f"sigma_sq must be floating point, got {sigma_sq.dtype}")
        if sigma_sq.numel() != 1:
            raise ValueError(f"sigma_sq must hold one value, got shape {list(sigma_sq.shape)}")
        if sigma_sq.device != source.device:
            raise ValueError(f"sigma_sq must be on {source.device}, got {sigma_sq.device}")
    elif isinstance(sigma_sq, bool) or not isinstance(sigma_sq, (int, float)):
        raise TypeError(
            f"sigma_sq must be a number, a Tensor or 'median', got {type(sigma_sq).__name__}"
        )
    elif not 0.0 < sigma_sq < math.inf:
        raise ValueError(f"sigma_sq must be positive and finite, got {sigma_sq}")


def check_mkmmd(
    source: Tensor,
    target: Tensor,
    estimator: str,
    sigma_sq: float | Tensor | str | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
) -> None:
    """Checks the arguments of :func:`padkern.mkmmd_loss` that do not depend on a backend."""
    _check_matrix("source", source)
    _check_matrix("target", target)
    if target.shape[1] != source.shape[1]:
        raise ValueError(f"target must have shape [m, {source.shape[1]}], got {list(target.shape)}")
    if target.device != source.device:
        raise ValueError(f"target must be on {source.device}, got {target.device}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    _check_weight("source_weight", source_weight, source, "source")
    _check_weight("target_weight", target_weight, target, "target")
    check_sigma_sq(sigma_sq, source)
    if estimator == "tllib":
        if source_weight is not None or target_weight is not None:
            raise ValueError("estimator 'tllib' takes no source_weight or target_weight")
        if source.shape[0] != target.shape[0]:
            raise ValueError(
                f"estimator 'tllib' needs equal sizes, got {source.shape[0]} source rows "
                f"and {target.shape[0]} target rows"
            )
    if estimator != "biased":
        for name, sample in (("source", source), ("target", target)):
            if sample.shape[0] < 2:
                raise ValueError(
                    f"{name} must have at least 2 rows for estimator {estimator!r}, "
                    f"got {sample.shape[0]}"
                )


def check_weight_values(name: str, weight: Tensor | None, estimator: str) -> None:
    """Checks what needs the values of a CPU weight: no negative one, enough rows left."""
    if weight is None or weight.device.type != "cpu" or torch.compiler.is_compiling():
        return
    value = weight.detach()
    negative = value < 0
    if bool(negative.any()):
        row = int(negative.nonzero()[0])
        raise ValueError(f"{name} must be >= 0, got {float(value[row]):g} at row {row}")
    needed = 1 if estimator == "biased" else 2
    left = int((value != 0).sum())
    if left < needed:
        raise ValueError(f"{name} must leave at least {needed} rows, leaves {left}")
