"""Argument checks of the batched and approximate estimators in :mod:`padkern.estimators`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from padkern._validation import (
    ESTIMATORS,
    FLOAT_DTYPES,
    check_alphas,
    check_kernel,
    check_weight_values,
)
from padkern.ops.mkmmd_batched.reference import rows_needed


def check_profile(
    kernel: str, alphas: Sequence[float], sigma_sq: float | Tensor | None
) -> tuple[float, ...]:
    """Checks kernel and bandwidth multipliers and returns these as floats; a tensor is refused."""
    check_kernel(kernel, alphas, None, sigma_sq)
    if kernel == "energy":
        return (1.0,)
    if isinstance(alphas, Tensor):
        raise TypeError("alphas must be a sequence of numbers here, got a Tensor")
    values = check_alphas(alphas)
    assert not isinstance(values, Tensor)
    return values


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError for a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises unless the value is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_rows(name: str, value: object, shape: str, dims: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {value.dtype}")
    if value.dim() != dims:
        raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")
    if value.shape[-1] == 0 or (dims == 3 and 0 in value.shape):
        raise ValueError(f"{name} must not be empty, got shape {list(value.shape)}")


def _check_offsets(name: str, value: object, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] < 2:
        raise ValueError(
            f"{name} must have shape [B + 1] with at least one problem, got {list(value.shape)}"
        )
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def check_problem_sigma_sq(sigma_sq: object, problems: int, device: torch.device) -> None:
    """Checks a squared bandwidth: None, a number, or a tensor of one or ``problems`` values."""
    if sigma_sq is None:
        return
    if isinstance(sigma_sq, Tensor):
        if sigma_sq.dtype not in FLOAT_DTYPES:
            raise TypeError(f"sigma_sq must be floating point, got {sigma_sq.dtype}")
        if sigma_sq.numel() != 1 and tuple(sigma_sq.shape) != (problems,):
            raise ValueError(
                f"sigma_sq must hold one value or have shape [{problems}], "
                f"got {list(sigma_sq.shape)}"
            )
        if sigma_sq.device != device:
            raise ValueError(f"sigma_sq must be on {device}, got {sigma_sq.device}")
    elif isinstance(sigma_sq, bool) or not isinstance(sigma_sq, (int, float)):
        raise TypeError(f"sigma_sq must be a number or a Tensor, got {type(sigma_sq).__name__}")
    elif not 0.0 < sigma_sq < math.inf:
        raise ValueError(f"sigma_sq must be positive and finite, got {sigma_sq}")


def check_no_median(sigma_sq: object, function: str) -> None:
    """The median rule builds the distance matrix these functions are there to avoid."""
    if isinstance(sigma_sq, str):
        raise ValueError(f"{function} takes a number or a Tensor as sigma_sq, got {sigma_sq!r}")


def check_batched(
    source: Tensor,
    target: Tensor,
    source_offsets: Tensor | None,
    target_offsets: Tensor | None,
    estimator: str,
    sigma_sq: float | Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    max_rows: int | None,
) -> int:
    """Checks the arguments of :func:`padkern.mkmmd_loss_batched`; returns the number of problems.

    Values of offsets are read on the CPU only, and not while compiling.
    """
    if (source_offsets is None) != (target_offsets is None):
        raise ValueError("source_offsets and target_offsets must be given together")
    packed = source_offsets is not None
    shapes = ("[total, D]", "[total, D]") if packed else ("[B, n, D]", "[B, m, D]")
    for name, rows, shape in zip(("source", "target"), (source, target), shapes, strict=True):
        _check_rows(name, rows, shape, 2 if packed else 3)
    if target.device != source.device:
        raise ValueError(f"target must be on {source.device}, got {target.device}")
    dim = source.shape[-1]
    if packed:
        problems = _check_packed(source, target, source_offsets, target_offsets)
    else:
        problems = source.shape[0]
        if target.shape[0] != problems or target.shape[2] != dim:
            raise ValueError(
                f"target must have shape [{problems}, m, {dim}], got {list(target.shape)}"
            )
    check_choice("estimator", estimator, ESTIMATORS)
    for name, weight, rows in (
        ("source_weight", source_weight, source),
        ("target_weight", target_weight, target),
    ):
        _check_weight(name, weight, rows)
    check_problem_sigma_sq(sigma_sq, problems, source.device)
    if max_rows is not None:
        check_count("max_rows", max_rows)
    if estimator == "tllib" and (source_weight is not None or target_weight is not None):
        raise ValueError("estimator 'tllib' takes no source_weight or target_weight")
    if not packed:
        _check_sizes("", source.shape[1], target.shape[1], estimator)
    elif source.device.type == "cpu" and not torch.compiler.is_compiling():
        assert source_offsets is not None
        assert target_offsets is not None
        _check_cuts(source_offsets, target_offsets, source, target, estimator, max_rows)
    return problems


def _check_packed(
    source: Tensor, target: Tensor, source_offsets: Tensor | None, target_offsets: Tensor | None
) -> int:
    if target.shape[1] != source.shape[1]:
        raise ValueError(
            f"target must have shape [total, {source.shape[1]}], got {list(target.shape)}"
        )
    _check_offsets("source_offsets", source_offsets, source.device)
    _check_offsets("target_offsets", target_offsets, source.device)
    assert source_offsets is not None
    assert target_offsets is not None
    if target_offsets.shape[0] != source_offsets.shape[0]:
        raise ValueError(
            f"target_offsets must have shape [{source_offsets.shape[0]}] like source_offsets, "
            f"got {list(target_offsets.shape)}"
        )
    return source_offsets.shape[0] - 1


def _check_weight(name: str, value: object, rows: Tensor) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(value).__name__}")
    if not (value.dtype in FLOAT_DTYPES or value.dtype == torch.bool):
        raise TypeError(f"{name} must be floating point or bool, got {value.dtype}")
    shape = rows.shape[:-1]
    if value.shape != shape:
        raise ValueError(
            f"{name} must have shape {list(shape)}, one value per row, got {list(value.shape)}"
        )
    if value.device != rows.device:
        raise ValueError(f"{name} must be on {rows.device}, got {value.device}")


def _check_sizes(prefix: str, n: int, m: int, estimator: str) -> None:
    needed = rows_needed(estimator)
    for name, rows in (("source", n), ("target", m)):
        if rows < needed:
            raise ValueError(
                f"{prefix}{name} must have at least {needed} row{'s' * (needed > 1)} "
                f"for estimator {estimator!r}, got {rows}"
            )
    if estimator == "tllib" and n != m:
        raise ValueError(
            f"{prefix}estimator 'tllib' needs equal sizes, got {n} source rows and {m} target rows"
        )


def _check_cuts(
    source_offsets: Tensor,
    target_offsets: Tensor,
    source: Tensor,
    target: Tensor,
    estimator: str,
    max_rows: int | None,
) -> None:
    """Checks the values of CPU offsets: the cut of the rows, then the size of each problem."""
    sizes = []
    for name, offsets, rows in (
        ("source", source_offsets, source.shape[0]),
        ("target", target_offsets, target.shape[0]),
    ):
        cuts = np.asarray(offsets.tolist())  # torch.func has no numpy()
        if cuts[0] != 0:
            raise ValueError(f"{name}_offsets must start at 0, got {cuts[0]}")
        size = np.diff(cuts)
        if (size < 0).any():
            b = int((size < 0).argmax())
            raise ValueError(
                f"{name}_offsets must not decrease, got {cuts[b + 1]} after {cuts[b]} "
                f"at problem {b}"
            )
        if cuts[-1] != rows:
            raise ValueError(
                f"{name}_offsets must end at {rows}, the rows of {name}, got {cuts[-1]}"
            )
        sizes.append(size)
    n, m = sizes
    bad = np.minimum(n, m) < rows_needed(estimator)
    if estimator == "tllib":
        bad |= n != m
    if bad.any():
        b = int(bad.argmax())
        _check_sizes(f"problem {b}: ", int(n[b]), int(m[b]), estimator)
    if max_rows is not None and max(n.max(), m.max()) > max_rows:
        raise ValueError(
            f"max_rows must be at least the rows of the largest problem, "
            f"{max(n.max(), m.max())}, got {max_rows}"
        )


def check_problem_weights(
    weight: Tensor | None, offsets: Sequence[int], name: str, estimator: str
) -> None:
    """Checks the values of a packed CPU weight, problem by problem; empty problems have none."""
    if weight is None or weight.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for b in range(len(offsets) - 1):
        values = weight[offsets[b] : offsets[b + 1]]
        if len(values) == 0:
            continue
        try:
            check_weight_values(name, values, estimator)
        except ValueError as error:
            raise ValueError(f"problem {b}: {error}") from None


def check_no_negative(name: str, weight: Tensor | None) -> None:
    """Refuses a negative value of a CPU weight."""
    if weight is None or weight.device.type != "cpu" or torch.compiler.is_compiling():
        return
    negative = weight.detach() < 0
    if bool(negative.any()):
        row = int(negative.nonzero()[0])
        raise ValueError(f"{name} must be >= 0, got {float(weight[row]):g} at row {row}")


def check_labels(name: str, labels: object, rows: Tensor, rows_name: str, num_classes: int) -> None:
    """Checks class labels; their values are read on the CPU only, and not while compiling."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {labels.dtype}")
    if tuple(labels.shape) != (rows.shape[0],):
        raise ValueError(
            f"{name} must have shape [{rows.shape[0]}], one label per row of {rows_name}, "
            f"got {list(labels.shape)}"
        )
    if labels.device != rows.device:
        raise ValueError(f"{name} must be on {rows.device}, got {labels.device}")
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = (int(value) for value in labels.aminmax())
    if low < -1 or high >= num_classes:
        bad = low if low < -1 else high
        row = int((labels == bad).nonzero()[0])
        raise ValueError(
            f"{name} must be -1 (ignored) or from 0 to {num_classes - 1}, got {bad} at row {row}"
        )
