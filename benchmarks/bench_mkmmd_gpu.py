"""MK-MMD on a CUDA device: padkern's Triton and CUDA kernels against what people use.

Unbiased estimator, five default kernels, mean-distance bandwidth; times are medians between CUDA
events, at the PAD point also for replays of a CUDA graph. Peers are those of ``bench_mkmmd.py`` and

- ``strips``: torch.compile in chunks of rows, gradient by hand; half inputs in tensor-core products
  with float32 results. Counted as a published peer here.
- ``flash``: one FlashAttention call per bandwidth and pair of samples, half inputs only.

Every implementation is compared with float64 first: float32 within the tolerance of the tests, half
types within 1e-4 per kernel for the loss and 1e-2 for the gradient. TF32 stays off. Implementations
that run out of memory, miss the check or lack a package are recorded with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cuda_timing
import pytest
import torch
from peers import exact, flash, libraries, torch_forms
from roofline import roofline
from torch import Tensor

from padkern import _backends, mkmmd_loss
from padkern.testing import make_mkmmd_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable CUDA device"),
]

SECONDS = 0.3
STRIP_ROWS = 2048
PAD_POINT = (672, 128)  # rows per tower and width in the PAD authors' released scripts
SIZES = [PAD_POINT, *((n, dim) for dim in (64, 128) for n in (4096, 8192, 16384))]
WIDE = [(4096, 1024), (8192, 1024)]
WIDE_FORMS = ("eager_gemm", "eager_ladder", "compile_gemm", "compile_ladder", "strips", "keops")
HALF_FORMS = ("eager_ladder", "compile_ladder", "strips", "flash")


class Case(NamedTuple):
    """One set of inputs; every implementation that fits the dtype runs on it."""

    n: int
    dim: int
    dtype: torch.dtype
    mode: str

    @property
    def label(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"n{self.n}_D{self.dim}-{self.mode}-{kind}"


def _points() -> list[object]:
    points = []
    for n, dim in [*SIZES, *WIDE]:
        for dtype in (torch.float32, torch.bfloat16):
            forms = WIDE_FORMS if dtype == torch.float32 else HALF_FORMS
            # The broadcast form has 5 saved arrays of (2n)^2 D: 112 GB at the next size.
            first = ("broadcast",) if (n, dim) == PAD_POINT and dtype == torch.float32 else ()
            modes = ["fwd_bwd"] + (["fwd"] if (n, dim) in (PAD_POINT, (4096, 128)) else [])
            points += [
                pytest.param(case := Case(n, dim, dtype, mode), name, id=f"{case.label}-{name}")
                for mode in modes
                for name in ("triton", "cuda", *first, *forms)
            ]
    return points


def loss_of(name: str) -> torch_forms.Loss:
    """An implementation by name; a compiled form is a new compilation."""
    if name in ("triton", "cuda"):
        return lambda x, y: mkmmd_loss(x, y, backend=name)
    if name == "strips":
        return torch_forms.strips(STRIP_ROWS, torch_forms.compiled(torch_forms.strip_terms))
    plain = {
        "broadcast": torch_forms.broadcast,
        "eager_gemm": torch_forms.gemm,
        "eager_ladder": torch_forms.ladder,
        "keops": libraries.keops,
        "flash": flash.flash,
    }
    if name in plain:
        return plain[name]
    form = {"compile_gemm": torch_forms.gemm, "compile_ladder": torch_forms.ladder}[name]
    return torch_forms.compiled(form)


def _refusal(name: str, case: Case, *tensors: Tensor) -> str:
    """Why an implementation cannot run here; empty when it can."""
    if name == "triton":
        return _backends.why_not_triton(*tensors) or ""
    if name == "cuda":
        return _backends.why_not_cuda(*tensors) or ""
    if name == "keops":
        return libraries.missing("pykeops")
    if name == "flash" and case.dim > flash.WIDEST:
        return f"FlashAttention takes rows up to {flash.WIDEST} wide beside the norms"
    return ""


def _run(loss: torch_forms.Loss, mode: str, x: Tensor, y: Tensor) -> Callable[[], object]:
    if mode == "fwd":

        def run() -> object:
            with torch.no_grad():
                return loss(x, y)

        return run
    return lambda: torch.autograd.grad(loss(x, y), (x, y))


@pytest.fixture(autouse=True)
def _exact_products():
    """float32 products in float32, whatever the process had set."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("case", "name"), _points())
def bench_mkmmd_gpu(benchmark, skip_peer, machine, case, name):
    gradient = case.mode == "fwd_bwd"
    kind = str(case.dtype).removeprefix("torch.")
    x, y = (
        t.cuda().requires_grad_(gradient)
        for t in make_mkmmd_inputs(case.n, case.n, case.dim, case.dtype)
    )
    info = {
        "op": "mkmmd",
        "implementation": name,
        "kind": "padkern" if name in ("triton", "cuda") else "peer",
        "mode": case.mode,
        "n": case.n,
        "m": case.n,
        "D": case.dim,
        "dtype": kind,
    }
    reason = _refusal(name, case, x, y)
    if reason:
        skip_peer(reason, **info)
    estimator = "tllib" if name == "broadcast" else "unbiased"
    wanted = exact.expected(case.n, case.dim, case.dtype, estimator, device="cuda")
    loss = loss_of(name)
    run = _run(loss, case.mode, x, y)
    try:
        errors = exact.errors(loss, x, y, wanted, gradient=gradient)
        if name not in ("triton", "cuda") and errors.excess:
            skip_peer(f"misses the check: {errors.excess}", **info)
        assert not errors.excess, errors.excess
        device = cuda_timing.device_of()
        info["peak_extra_mib"] = cuda_timing.peak_extra_mib(run)
        info["event_median_ms"] = cuda_timing.event_median_ms(run, SECONDS)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        skip_peer("runs out of device memory", **info)
    if (case.n, case.dim) == PAD_POINT:
        info["graph_median_ms"] = cuda_timing.graph_median_ms(run, SECONDS)
    try:
        bound = roofline(case.n, case.n, case.dim, kind, gradient, device)
        info |= {"roofline_ms": bound.ms, "roofline": bound._asdict()}
    except ValueError as error:
        info["roofline_missing"] = str(error)

    def synced() -> None:
        run()
        torch.cuda.synchronize()

    found = torch.cuda.get_device_properties(0)
    benchmark.extra_info.update(
        machine(),
        **info,
        gpu=found.name,
        gpu_clock_mhz=found.clock_rate // 1000,
        cuda=torch.version.cuda,
        gflop=(12 if gradient else 4) * case.n**2 * case.dim / 1e9,
        inputs_mib=round(2 * x.numel() * x.element_size() / 2**20, 3),
        loss_error=errors.loss,
        gradient_error=errors.gradient,
    )
    benchmark.group = f"mkmmd {case.label}"
    rounds = max(3, min(100, int(1e3 * SECONDS / max(info["event_median_ms"], 1e-3))))
    benchmark.pedantic(synced, rounds=rounds, iterations=1)
