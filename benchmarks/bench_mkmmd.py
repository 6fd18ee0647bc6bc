"""MK-MMD: forward and forward+backward of padkern against what people write in torch.

Every implementation is compared with the reference before it is timed. All use the default alphas,
the unbiased estimator and the mean-distance bandwidth, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from padkern import _native, mkmmd_loss
from padkern.ops.mkmmd.reference import mkmmd_loss_ref
from padkern.testing import assert_mkmmd_matches_reference, exact_mkmmd, make_mkmmd_inputs

ALPHAS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
PAD_POINT = (672, 128)  # rows per tower and width in the PAD authors' released scripts
SIZES = [(64, 128), (336, 128), PAD_POINT, (672, 64), (2048, 128)]


def _estimate(kernel: Tensor, n: int) -> Tensor:
    m = kernel.shape[0] - n
    same_x, same_y = kernel[:n, :n], kernel[n:, n:]
    return (
        (same_x.sum() - same_x.diagonal().sum()) / (n * (n - 1))
        + (same_y.sum() - same_y.diagonal().sum()) / (m * (m - 1))
        - 2 * kernel[:n, n:].mean()
    )


def broadcast(x: Tensor, y: Tensor) -> Tensor:
    """What TLlib's formula costs: differences of all pairs, once per kernel."""
    z = torch.cat([x, y])
    kernel = 0.0
    for alpha in ALPHAS:
        distances = (z.unsqueeze(0) - z.unsqueeze(1)).square().sum(2)
        kernel = kernel + torch.exp(-distances / (2 * alpha * distances.detach().mean()))
    return _estimate(kernel, x.shape[0])


def _gemm_distances(z: Tensor) -> Tensor:
    squares = z.square().sum(1)
    return (squares[:, None] + squares[None, :] - 2 * (z @ z.T)).clamp(min=0)


def gemm(x: Tensor, y: Tensor) -> Tensor:
    """Distances from one matrix product, one exponential per kernel."""
    distances = _gemm_distances(torch.cat([x, y]))
    sigma_sq = distances.detach().mean()
    kernel = torch.exp(-distances / (2 * ALPHAS[0] * sigma_sq))
    for alpha in ALPHAS[1:]:
        kernel = kernel + torch.exp(-distances / (2 * alpha * sigma_sq))
    return _estimate(kernel, x.shape[0])


def ladder(x: Tensor, y: Tensor) -> Tensor:
    """The same with one exponential and four squarings."""
    distances = _gemm_distances(torch.cat([x, y]))
    term = torch.exp(-distances / (4 * distances.detach().mean()))
    kernel = term
    for _ in range(4):
        term = term * term
        kernel = kernel + term
    return _estimate(kernel, x.shape[0])


def _compiled(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(form, dynamic=False)


def native(x: Tensor, y: Tensor) -> Tensor:
    return mkmmd_loss(x, y, backend="native")


IMPLEMENTATIONS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "reference": lambda: mkmmd_loss_ref,
    "broadcast": lambda: broadcast,
    "eager_gemm": lambda: gemm,
    "eager_ladder": lambda: ladder,
    "compile_gemm": lambda: _compiled(gemm),
    "compile_ladder": lambda: _compiled(ladder),
    "native": lambda: native,
}


def _skip_reason(name: str, size: tuple[int, int], mode: str) -> str | None:
    n = size[0]
    if name == "native" and _native.load().core is None:
        return _native.load().reason
    if name == "broadcast" and n > 64:
        return "builds (2n)^2 x D floats five times; minutes and gigabytes at this size"
    if name == "reference" and n > PAD_POINT[0]:
        return "the specification is not meant to be fast"
    if (
        name.startswith("compile")
        and size != PAD_POINT
        and (mode == "fwd" or name == "compile_ladder")
    ):
        return "compiling takes long; timed at the PAD point only"
    return None


@lru_cache(maxsize=1)
def _expected(n: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return exact_mkmmd(*make_mkmmd_inputs(n, n, dim))


@pytest.mark.parametrize("name", list(IMPLEMENTATIONS))
@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"n{s[0]}_D{s[1]}")
def bench_mkmmd(measure, benchmark, name, mode, size):
    n, dim = size
    reason = _skip_reason(name, size, mode)
    if reason:
        pytest.skip(reason)
    loss = IMPLEMENTATIONS[name]()
    x, y = make_mkmmd_inputs(n, n, dim, requires_grad=mode == "fwd_bwd")
    assert_mkmmd_matches_reference(loss, x.detach(), y.detach(), expected=_expected(n, dim))
    benchmark.group = f"mkmmd {mode} n=m={n} D={dim}"

    def run() -> object:
        if mode == "fwd_bwd":
            return torch.autograd.grad(loss(x, y), (x, y))
        return loss(x, y)

    measure(
        run,
        n=n,
        m=n,
        D=dim,
        dtype="float32",
        gflop=(12 if mode == "fwd_bwd" else 4) * n * n * dim / 1e9,
    )
