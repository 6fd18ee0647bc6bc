"""MK-MMD from KeOps and GeomLoss, as a user of these libraries would write it, at their best."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .torch_forms import ALPHAS, mean_sq_distance


@lru_cache(maxsize=1)
def missing(package: str) -> str:
    """Why a library cannot be used; empty when it can."""
    os.environ.setdefault("PYKEOPS_VERBOSE", "0")
    try:
        __import__(package)
    except Exception as error:  # KeOps raises whatever its compiler search raised
        return f"{package} is not usable ({type(error).__name__}: {error})"
    return ""


def _keops_sum(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the five kernels over all pairs of scaled rows, one KeOps reduction.

    Differences and squarings are the fastest of the formulas tried on a CPU: five exponentials
    repeat the distance, and inner products of rows vectorise worse.
    """
    from pykeops.torch import LazyTensor

    difference: Any = LazyTensor(a[:, None, :]) - LazyTensor(b[None, :, :])
    term = (-(difference**2).sum(-1)).exp()
    kernel = term
    for _ in range(4):
        term = term.square()
        kernel = kernel + term
    return kernel.sum(1).sum()


def keops(source: Tensor, target: Tensor) -> Tensor:
    """KeOps LazyTensor, unbiased: blocks XX, YY, XY; same-sample gradients by one side, doubled."""
    n, m = source.shape[0], target.shape[0]
    factor = (4 * mean_sq_distance(torch.cat([source, target]))).rsqrt()
    x, y = source * factor, target * factor
    same = [_keops_sum(rows, rows.detach()) for rows in (x, y)]
    same = [2 * total - total.detach() for total in same]
    diagonal = len(ALPHAS)
    return (
        (same[0] - diagonal * n) / (n * (n - 1))
        + (same[1] - diagonal * m) / (m * (m - 1))
        - 2 * _keops_sum(x, y) / (n * m)
    )


def geomloss(source: Tensor, target: Tensor) -> Tensor:
    """GeomLoss, biased: ``SamplesLoss("gaussian")`` per bandwidth; it gives half the biased MMD."""
    from geomloss import SamplesLoss

    sigma = float(mean_sq_distance(torch.cat([source, target])).sqrt())
    total: Tensor = sum(
        SamplesLoss("gaussian", blur=alpha**0.5 * sigma)(source, target) for alpha in ALPHAS
    )
    return 2 * total
