"""MK-MMD on the CPU: padkern against what people use.

Forward, forward+backward and peak extra memory, float32 unless said otherwise, unbiased estimator,
five default kernels, mean-distance bandwidth. Every implementation is compared with float64 before
it is timed (``peers.exact``). Peers:

========================  =========================================================================
``broadcast``             TLlib's formula: differences of all pairs, once per kernel
``eager_gemm``            distances from matrix products, five exponentials
``eager_ladder``          the same with one exponential and four squarings
``compile_gemm``          torch.compile of the two, for one shape
``compile_ladder``
``strips``                torch.compile of one strip, gradient by hand: padkern's plan in torch,
                          which nobody publishes for MMD; reported apart
``keops``                 LazyTensor, all kernels in one reduction
``geomloss``              SamplesLoss("gaussian") per bandwidth; biased, and checked as such
========================  =========================================================================

The torch forms are the strongest of those tried: blocks XX, YY, XY (3 n^2 pairs), bandwidth in
closed form. The pooled square (4 n^2 pairs) was slower eager and, by more, compiled; distances by
``addmm`` and compiling value and gradient as one function (``torch.func.grad_and_value``) made no
difference beyond noise. From n = 1024 on the forms depend on the allocator, see
``conftest.kept_memory``: such sizes are timed with malloc as it is and with malloc told to keep its
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from conftest import kept_memory, peak_extra_mib, peak_resident_mib
from machine_limits import threads
from peers import budget, exact, libraries, torch_forms
from torch import Tensor

from padkern import _native, mkmmd_loss
from padkern.testing import make_mkmmd_inputs

STRIP_ROWS = 256
PAD_POINT = (672, 128)  # rows per tower and width in the PAD authors' released scripts


class Case(NamedTuple):
    """One set of inputs and conditions; every implementation of ``names`` runs on it."""

    n: int
    dim: int
    names: tuple[str, ...]
    mode: str = "fwd_bwd"
    dtype: torch.dtype = torch.float32
    threads: int = 0  # 0: torch's own
    malloc: str = "default"

    @property
    def label(self) -> str:
        parts = [f"n{self.n}_D{self.dim}", self.mode, str(self.dtype).removeprefix("torch.")]
        parts += [f"{self.threads}thread"] if self.threads else []
        return "-".join(parts + (["kept"] if self.malloc == "kept" else []))


def native(source: Tensor, target: Tensor) -> Tensor:
    """padkern's CPU kernel."""
    return mkmmd_loss(source, target, backend="native")


@lru_cache(maxsize=1)
def _compiled(name: str, n: int, dim: int, dtype: torch.dtype, mode: str) -> torch_forms.Loss:
    if name == "strips":
        return torch_forms.strips(STRIP_ROWS, torch_forms.compiled(torch_forms.strip_terms))
    form = torch_forms.gemm if name == "compile_gemm" else torch_forms.ladder
    return torch_forms.compiled(form)


PLAIN: dict[str, torch_forms.Loss] = {
    "native": native,
    "broadcast": torch_forms.broadcast,
    "eager_gemm": torch_forms.gemm,
    "eager_ladder": torch_forms.ladder,
    "keops": libraries.keops,
    "geomloss": libraries.geomloss,
}
EAGER, COMPILED = ("eager_gemm", "eager_ladder"), ("compile_gemm", "compile_ladder")
TORCH = (*EAGER, *COMPILED, "strips")
LIBRARIES = ("broadcast", "keops", "geomloss")
ALL = ("native", *TORCH, *LIBRARIES)
ESTIMATORS = {"broadcast": "tllib", "geomloss": "biased"}
SIZES = [(64, 128), (336, 128), (672, 128), (672, 64), (1024, 128), (4096, 128)]
WIDE = [(4096, 64), (4096, 512), (4096, 1024)]


def cases() -> list[Case]:
    """The default grid, size by size, so that what one size needs is computed once."""
    grid = [Case(n, dim, ALL) for n, dim in SIZES]
    # Eager forms take many seconds there, most of them in page faults; they are in the kept part.
    for n, dim in WIDE:
        libraries_too = LIBRARIES if dim == 1024 else ()
        grid.append(Case(n, dim, ("native", *COMPILED, "strips", *libraries_too)))
    forward = ("native", "eager_ladder", "compile_ladder", *LIBRARIES)
    for n, dim in SIZES:
        if dim == 128:
            grid.append(Case(n, dim, ALL if n == PAD_POINT[0] else forward, mode="fwd"))
    kept = ("native", *TORCH)
    grid += [Case(n, dim, kept, malloc="kept") for n, dim in [*SIZES, *WIDE] if n >= 1024]
    for mode in ("fwd", "fwd_bwd"):
        grid.append(Case(2, 8, ("native", *EAGER, *COMPILED), mode=mode, threads=1))
    for dtype in (torch.bfloat16, torch.float64):
        some = ("native", "eager_ladder", "compile_ladder")
        grid += [Case(n, 128, some, dtype=dtype) for n in (672, 4096)]
    half = ("native",)
    grid += [Case(16384, 64, half, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    order = ["default", "kept"]
    return sorted(grid, key=lambda c: (c.n, c.dim, str(c.dtype), c.mode, order.index(c.malloc)))


def _points() -> list[object]:
    # Implementation by implementation within a size: a compiled form serves malloc as it is and
    # malloc that keeps its memory.
    points = [(case, name) for case in cases() for name in case.names]
    places = {name: i for i, name in enumerate(ALL)}
    points.sort(key=lambda p: (p[0].n, p[0].dim, str(p[0].dtype), p[0].mode, places[p[1]]))
    return [pytest.param(case, name, id=f"{case.label}-{name}") for case, name in points]


def _loss(name: str, case: Case) -> torch_forms.Loss:
    if name in PLAIN:
        return PLAIN[name]
    return _compiled(name, case.n, case.dim, case.dtype, case.mode)


def _run(loss: torch_forms.Loss, mode: str, x: Tensor, y: Tensor) -> Callable[[], object]:
    if mode == "fwd":

        def run() -> object:
            with torch.no_grad():
                return loss(x, y)

        return run
    return lambda: torch.autograd.grad(loss(x, y), (x, y))


# Large enough that the work outweighs the calls' fixed cost.
PROBE_ROWS = {"broadcast": 128, "keops": 128, "geomloss": 512}


@lru_cache(maxsize=8)
def _probe(name: str, dim: int, mode: str) -> budget.Probe:
    """Time and memory of a small call, from which those of a large one are estimated."""
    n = PROBE_ROWS[name]
    x, y = make_mkmmd_inputs(n, n, dim, requires_grad=mode == "fwd_bwd")
    return budget.probe(_run(PLAIN[name], mode, x, y), n, dim, peak_extra_mib)


def _refusal(name: str, case: Case) -> tuple[str, dict[str, object]]:
    """Why an implementation is left out, with the estimate behind it; empty when it runs."""
    if name == "native":
        return _native.load().reason, {}
    for package in {"keops": ["pykeops"], "geomloss": ["pykeops", "geomloss"]}.get(name, []):
        if libraries.missing(package):
            return libraries.missing(package), {}
    if name not in LIBRARIES or case.n <= PROBE_ROWS[name]:
        return "", {}
    # KeOps compiles per width: beyond the widest that is timed, the estimate is scaled.
    dim = min(case.dim, 128)
    estimate = _probe(name, dim, case.mode).at(case.n, case.dim)
    # The ratio to TLlib's formula is claimed at the PAD point: there it runs, whatever it takes.
    claimed = name == "broadcast" and (case.n, case.dim) == PAD_POINT
    return "" if claimed else budget.refusal(estimate), estimate._asdict()


@pytest.mark.parametrize(("case", "name"), _points())
def bench_mkmmd(measure, benchmark, limits, skip_peer, case, name):
    reason, estimate = _refusal(name, case)
    info = {
        "op": "mkmmd",
        "implementation": name,
        "mode": case.mode,
        "n": case.n,
        "m": case.n,
        "D": case.dim,
        "dtype": str(case.dtype).removeprefix("torch."),
        "malloc": case.malloc,
        "kind": "padkern" if name == "native" else "hand" if name == "strips" else "peer",
    }
    if reason:
        skip_peer(reason, **info, **estimate)
    count = case.threads or torch.get_num_threads()
    if case.dtype == torch.float32 and name == "native" and case.n > 2:
        limits.measure(case.dim, count)
    gradient = case.mode == "fwd_bwd"
    x, y = make_mkmmd_inputs(case.n, case.n, case.dim, case.dtype, requires_grad=gradient)
    loss = _loss(name, case)
    wanted = exact.expected(case.n, case.dim, case.dtype, ESTIMATORS.get(name, "unbiased"))
    run = _run(loss, case.mode, x, y)
    benchmark.group = f"mkmmd {case.label}"
    with threads(count), kept_memory() if case.malloc == "kept" else nullcontext():
        exact.check(loss, x.detach(), y.detach(), wanted, gradient=gradient)
        measure(
            run,
            **info,
            gflop=(12 if gradient else 4) * case.n**2 * case.dim / 1e9,
            inputs_mib=round(2 * x.numel() * x.element_size() / 2**20, 3),
            estimator=ESTIMATORS.get(name, "unbiased"),
            **estimate,
        )
        if name == "native":
            benchmark.extra_info["peak_resident_mib"] = peak_resident_mib(run)


def bench_limits(benchmark, limits):
    """The rates at every width of the grid on one thread and on torch's own count."""
    for dim in sorted({case.dim for case in cases() if case.n > 2}):
        for count in {1, torch.get_num_threads()}:
            limits.measure(dim, count)
    benchmark.group = "machine"
    benchmark.pedantic(lambda: limits.measure(128, torch.get_num_threads()), rounds=1)
