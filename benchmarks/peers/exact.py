"""The loss and its gradients in float64, in strips: what a peer is compared with at sizes where the
matrices of the reference would not fit."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from padkern import mkmmd_loss
from padkern.ops.mkmmd.reference import squared_distances
from padkern.testing import (
    MKMMD_TOLERANCES,
    Tolerance,
    assert_mkmmd_matches_reference,
    make_mkmmd_inputs,
    relative_error,
    value_and_gradients,
)

from .torch_forms import ALPHAS, Loss

Expected = tuple[Tensor, Tensor, Tensor]
# Above this, the strips take minutes: native float64 stands in, itself checked below it.
LARGEST_STRIPS = 4096
# For half inputs and their arithmetic: 1e-4 per kernel, 1e-2 relative.
HALF_LIMITS = Tolerance(1e-4 * len(ALPHAS), 1e-2)


class Blocks(NamedTuple):
    """Kernel sums over the pairs of XX, YY (diagonal left out) and XY, and their gradients."""

    same_x: Tensor
    same_y: Tensor
    cross: Tensor
    d_same_x: Tensor
    d_same_y: Tensor
    d_cross_x: Tensor
    d_cross_y: Tensor


def _pair_sums(a: Tensor, b: Tensor, sigma_sq: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Kernel sum over all pairs of a and b, and its gradient by a."""
    total, d_a = a.new_zeros(()), torch.empty_like(a)
    for low in range(0, a.shape[0], rows):
        part = a[low : low + rows]
        distances = squared_distances(part, b)
        slope = torch.zeros_like(distances)
        for alpha in ALPHAS:
            rate = float(-1 / (2 * alpha * sigma_sq))
            kernel = torch.mul(distances, rate).exp_()
            total += kernel.sum()
            slope.add_(kernel, alpha=rate)
        # The squared distance has the derivative 2 (a_i - b_j) by a_i.
        d_a[low : low + rows] = 2 * (slope.sum(1, keepdim=True) * part - slope @ b)
    return total, d_a


def block_sums(source: Tensor, target: Tensor, *, rows: int = 256) -> Blocks:
    """The parts of the loss in float64, gradients by formula, ``rows`` rows at a time.

    Args:
        source: ``[n, D]``, any float dtype.
        target: ``[m, D]``.
        rows: Rows of a strip; the result does not depend on it but for rounding.
    """
    x, y = source.detach().double(), target.detach().double()
    mean = torch.cat([x, y]).mean(0)
    x, y = x - mean, y - mean
    sigma_sq = 2 * torch.cat([x, y]).square().sum(1).mean()
    same_x, d_x = _pair_sums(x, x, sigma_sq, rows)
    same_y, d_y = _pair_sums(y, y, sigma_sq, rows)
    cross, d_cross_x = _pair_sums(x, y, sigma_sq, rows)
    _, d_cross_y = _pair_sums(y, x, sigma_sq, rows)
    kernels = len(ALPHAS)
    return Blocks(
        same_x - kernels * x.shape[0],
        same_y - kernels * y.shape[0],
        cross,
        2 * d_x,
        2 * d_y,
        d_cross_x,
        d_cross_y,
    )


def combine(parts: Blocks, estimator: str) -> Expected:
    """Value and gradients of one estimator from the parts."""
    n, m = parts.d_same_x.shape[0], parts.d_same_y.shape[0]
    biased = estimator == "biased"
    by_x = 1 / (n * n if biased else n * (n - 1))
    by_y = 1 / (m * m if biased else m * (m - 1))
    constant = len(ALPHAS) * (n * by_x + m * by_y) if biased else 0.0
    if estimator == "tllib":
        constant = 2 / (n - 1)
    across = -2 / (n * m)
    return (
        by_x * parts.same_x + by_y * parts.same_y + across * parts.cross + constant,
        by_x * parts.d_same_x + across * parts.d_cross_x,
        by_y * parts.d_same_y + across * parts.d_cross_y,
    )


def _native_float64(source: Tensor, target: Tensor) -> Expected:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return mkmmd_loss(x, y, backend="native")

    return value_and_gradients(loss, source.double(), target.double())


@lru_cache(maxsize=1)
def _blocks(n: int, dim: int, dtype: torch.dtype, device: str) -> Blocks:
    samples = (t.to(device) for t in make_mkmmd_inputs(n, n, dim, dtype))
    return block_sums(*samples, rows=256 if device == "cpu" else 2048)


@lru_cache(maxsize=1)
def expected(n: int, dim: int, dtype: torch.dtype, estimator: str, device: str = "cpu") -> Expected:
    """Value and gradients for ``make_mkmmd_inputs(n, n, dim, dtype)``, in float64.

    In strips; on the CPU above n = 4096, where they take minutes, from the native backend in
    float64, unbiased only. That one is itself compared with the strips at n = 4096.
    """
    if device == "cpu" and n > LARGEST_STRIPS:
        if estimator != "unbiased":
            raise ValueError(f"estimator must be unbiased for n > {LARGEST_STRIPS}")
        return _native_float64(*make_mkmmd_inputs(n, n, dim, dtype))
    return combine(_blocks(n, dim, dtype, device), estimator)


class Errors(NamedTuple):
    """Absolute error of the loss and the larger relative L2 error of the two gradients."""

    loss: float
    gradient: float
    excess: str  # which error exceeds its limit; empty where none does


def errors(
    loss: Loss, source: Tensor, target: Tensor, wanted: Expected, *, gradient: bool = True
) -> Errors:
    """How far a peer is from float64, and whether that is too far.

    Limits are those of the tests for float32 and float64 inputs, ``HALF_LIMITS`` for half ones.

    Args:
        loss: The peer.
        source: ``[n, D]``.
        target: ``[m, D]``, on the device of ``wanted``.
        wanted: From :func:`expected`, for the estimator that the peer computes.
        gradient: False compares the value alone, computed without autograd.
    """
    limits = MKMMD_TOLERANCES.get(source.dtype, HALF_LIMITS)
    by_gradient = 0.0
    if gradient:
        value, *found = value_and_gradients(loss, source, target)
        pairs = zip(found, wanted[1:], strict=True)
        by_gradient = max(relative_error(got, want) for got, want in pairs)
    else:
        with torch.no_grad():
            value = loss(source, target)
    by_value = abs(float(value) - float(wanted[0]))
    excess = ""
    # Written so that NaN exceeds.
    if not by_value <= limits.loss * max(1.0, abs(float(wanted[0]))):
        excess = f"loss {float(value):.6g} is {by_value:.2g} from {float(wanted[0]):.6g}"
    elif not by_gradient <= limits.gradient:
        excess = f"gradient has relative error {by_gradient:.2g}, more than {limits.gradient:g}"
    return Errors(by_value, by_gradient, excess)


def check(
    loss: Loss, source: Tensor, target: Tensor, wanted: Expected, *, gradient: bool = True
) -> None:
    """Raises AssertionError where a peer on the CPU misses the tolerance of the tests."""
    if gradient:
        assert_mkmmd_matches_reference(loss, source, target, expected=wanted)
        return
    double = torch.float64 in (source.dtype, target.dtype)
    with torch.no_grad():
        value = float(loss(source, target))
    limit = MKMMD_TOLERANCES[torch.float64 if double else torch.float32].loss
    limit *= max(1.0, abs(float(wanted[0])))
    assert abs(value - float(wanted[0])) <= limit, f"loss {value}, expected {float(wanted[0])}"
