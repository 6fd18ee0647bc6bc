"""Input factories and assertions shared by the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from padkern.ops.mkmmd.reference import mkmmd_loss_ref


class Tolerance(NamedTuple):
    """Largest absolute error of a loss of O(1) and relative L2 error of a gradient."""

    loss: float
    gradient: float


# Against the reference in float64 on the same rounded inputs. The loss is a difference of three
# means of five kernels each.
MKMMD_TOLERANCES = {torch.float64: Tolerance(1e-12, 1e-11), torch.float32: Tolerance(5e-6, 1e-5)}


def make_mkmmd_inputs(
    n: int,
    m: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Two CPU samples [n, dim] and [m, dim] of different mean and scale, fixed by the seed."""
    rng = np.random.default_rng([seed, n, m, dim])
    source = torch.from_numpy(rng.standard_normal((n, dim))).to(dtype)
    target = torch.from_numpy(1.2 * rng.standard_normal((m, dim)) + 0.3).to(dtype)
    return source.requires_grad_(requires_grad), target.requires_grad_(requires_grad)


def make_golden_mkmmd_inputs(case: dict[str, float]) -> tuple[Tensor, Tensor]:
    """float64 inputs of one case of ``tests/golden/mkmmd_tllib.json``; its note has the formula."""
    n, dim, seed = int(case["n"]), int(case["d"]), float(case["seed"])
    i = torch.arange(n, dtype=torch.float64)[:, None]
    j = torch.arange(dim, dtype=torch.float64)[None, :]
    source = torch.sin(1 + seed + 0.7 * i * i + 1.3 * j + 0.11 * i * j)
    target = 1.2 * torch.cos(0.5 + seed + 0.9 * i + 0.4 * j * j + 0.07 * i * j) + case["shift"]
    return source, target


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of the expected tensor, in float64; NaN stays NaN."""
    expected = expected.detach().to(torch.float64)
    difference = (actual.detach().to(torch.float64) - expected).norm()
    return float(difference / expected.norm().clamp(min=1e-300))


def value_and_gradients(
    loss: Callable[..., Tensor], source: Tensor, target: Tensor, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients by source and target, on fresh leaves of the same layout."""
    x = source.detach().requires_grad_()
    y = target.detach().requires_grad_()
    value = loss(x, y, **options)
    d_source, d_target = torch.autograd.grad(value, (x, y))
    return value.detach(), d_source, d_target


def exact_mkmmd(source: Tensor, target: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients of the reference, computed in float64 on the same (rounded) values."""
    exact_options = {
        key: value.double() if isinstance(value, Tensor) else value
        for key, value in options.items()
        if key != "backend"
    }
    return value_and_gradients(mkmmd_loss_ref, source.double(), target.double(), **exact_options)


def assert_mkmmd_matches_reference(
    loss: Callable[..., Tensor],
    source: Tensor,
    target: Tensor,
    *,
    expected: tuple[Tensor, Tensor, Tensor] | None = None,
    **options: object,
) -> None:
    """Compares a loss and its gradients with the float64 reference on the same values.

    Args:
        loss: Called as ``loss(source, target, **options)``.
        source: ``[n, D]``.
        target: ``[m, D]``.
        expected: What :func:`exact_mkmmd` gave for the same arguments, to spare computing it again.
        **options: Keyword arguments of :func:`padkern.mkmmd_loss`.

    Raises:
        AssertionError: An error exceeds the tolerance of the compute dtype, or is NaN.
    """
    dtype = torch.float64 if torch.float64 in (source.dtype, target.dtype) else torch.float32
    tolerance = MKMMD_TOLERANCES[dtype]
    if expected is None:
        expected = exact_mkmmd(source, target, **options)
    actual = value_and_gradients(loss, source, target, **options)
    assert actual[0].dtype == dtype, f"loss has dtype {actual[0].dtype}, expected {dtype}"
    error = abs(float(actual[0]) - float(expected[0]))
    limit = tolerance.loss * max(1.0, abs(float(expected[0])))
    assert error <= limit, f"loss {float(actual[0])} is {error:.3g} from {float(expected[0])}"
    for name, sample, got, want in zip(
        ("source", "target"), (source, target), actual[1:], expected[1:], strict=True
    ):
        assert got.dtype == sample.dtype, f"gradient of {name} has dtype {got.dtype}"
        rounding = 0.0 if sample.dtype == dtype else torch.finfo(sample.dtype).eps
        error = relative_error(got, want)
        limit = tolerance.gradient + rounding
        # A gradient of zero norm has no relative error; rounding noise is all there can be.
        if float(want.norm()) < 1e-12:
            error, limit = float(got.double().norm()), 1e-6
        assert error <= limit, f"gradient of {name} has relative error {error:.3g} > {limit:.3g}"
