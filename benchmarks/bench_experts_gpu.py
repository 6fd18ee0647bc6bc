"""Ops of the experts on a CUDA device: padkern's Triton kernels against torch and public losses.

Gated loss and gated matrix at a PAD training step (512 users of Prime Pantry: 3,098 tokens, 8,347
items, three experts of d = 128), the catalogue loss there and at larger catalogues. Forward and
backward; times are medians between CUDA events, and of replays of a CUDA graph where that can be
captured.

Every implementation is compared with float64 first: float32 within 1e-5, half types within 8e-3 for
the value (peers return it rounded) and 2e-2 for each gradient. TF32 stays off. A peer that runs out
of memory, misses the check or lacks a package is recorded with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cuda_timing
import numpy as np
import pytest
import torch
from peers import catalogue, libraries
from torch import Tensor

from padkern import _backends
from padkern.ops.catalogue_loss import catalogue_cross_entropy
from padkern.ops.gated_table import gated_table, gated_table_ref
from padkern.ops.triple_expert import gated_bce_loss, gated_bce_loss_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable CUDA device"),
]

SECONDS = 0.3
TOKENS, EXPERTS, DIM, ITEMS, BINS = 3098, 3, 128, 8347, 12
DTYPES = (torch.float32, torch.bfloat16)
LIMITS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (8e-3, 2e-2)}

Function = Callable[..., Tensor]


class Call(NamedTuple):
    """One implementation on its inputs.

    Attributes:
        function: Takes the leaves, gives a value; a scalar or a tensor that is summed with weights.
        leaves: What is differentiated by.
        expected: Value and gradients in float64.
    """

    function: Function
    leaves: Sequence[Tensor]
    expected: Sequence[Tensor]


@pytest.fixture(autouse=True)
def _exact_products():
    """float32 products in float32, whatever the process had set."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.cuda.empty_cache()


def compiled(function: Function) -> Function:
    """The function through torch.compile, for one size only."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def refusal(name: str, leaves: Sequence[Tensor]) -> str:
    """Why an implementation cannot run here; empty when it can."""
    if name == "triton":
        return _backends.why_not_triton(*leaves) or ""
    package = {"liger": "liger_kernel", "cut_cross_entropy": "cut_cross_entropy"}.get(name)
    return libraries.missing(package) if package else ""


def errors(call: Call, dtype: torch.dtype) -> str:
    """What is beyond the limits; empty when nothing is."""
    value = call.function(*call.leaves)
    found = (value.detach(), *torch.autograd.grad(value, call.leaves))
    for place, (got, want) in enumerate(zip(found, call.expected, strict=True)):
        error = float((got.double() - want).norm() / want.norm())
        limit = LIMITS[dtype][min(place, 1)]
        if not error <= limit:
            return f"{'gradient ' + str(place) if place else 'value'} is off by {error:.2g}"
    return ""


def timed(benchmark, skip_peer, machine, make: Callable[[], Call], info: dict[str, Any]) -> None:
    """Checks, then times forward and backward; records the reason where that is not possible."""
    name, dtype = info["implementation"], info["dtype"]
    ours = name == "triton"
    info |= {"dtype": str(dtype).removeprefix("torch."), "kind": "padkern" if ours else "peer"}
    try:
        call = make()
        reason = refusal(name, call.leaves)
        if reason:
            skip_peer(reason, **info)
        wrong = errors(call, dtype)
        if not ours and wrong:
            skip_peer(f"misses the check: {wrong}", **info)
        assert not wrong, wrong

        def run() -> object:
            return torch.autograd.grad(call.function(*call.leaves), call.leaves)

        info["peak_extra_mib"] = cuda_timing.peak_extra_mib(run)
        info["event_median_ms"] = cuda_timing.event_median_ms(run, SECONDS)
        if info["event_median_ms"] < 2:  # where launches count
            info["graph_median_ms"] = cuda_timing.graph_median_ms(run, SECONDS)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        skip_peer("runs out of device memory", **info)

    def synced() -> None:
        run()
        torch.cuda.synchronize()

    found = torch.cuda.get_device_properties(0)
    benchmark.extra_info.update(machine(), **info, gpu=found.name, cuda=torch.version.cuda)
    benchmark.group = f"{info['op']} {info['case']}"
    rounds = max(3, min(100, int(1e3 * SECONDS / max(info["event_median_ms"], 1e-3))))
    benchmark.pedantic(synced, rounds=rounds, iterations=1)


def with_gradients(function: Function, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Value and gradients in float64."""
    wide = [x.detach().double().requires_grad_() for x in leaves]
    value = function(*wide)
    return value.detach(), *torch.autograd.grad(value, wide)


# ---- gated loss ----------------------------------------------------------------------------------


def gated_loss_call(name: str, k: int, dtype: torch.dtype) -> Call:
    """Scores of order 1; ids drawn like a long-tailed catalogue, with many repeats."""
    rng = np.random.default_rng(k)
    users = rng.normal(size=(TOKENS, EXPERTS, DIM))
    tables = rng.normal(size=(EXPERTS, ITEMS + 1, DIM)) / np.sqrt(DIM)
    gate = rng.random((BINS, EXPERTS))
    bins = rng.integers(1, BINS, ITEMS + 1)
    positives = np.minimum(rng.zipf(1.3, TOKENS), ITEMS)
    negatives = rng.integers(1, ITEMS + 1, (TOKENS, k))
    ids = [torch.from_numpy(x).cuda() for x in (bins, positives, negatives)]
    leaves = [torch.from_numpy(x).cuda().to(dtype).requires_grad_() for x in (users, tables, gate)]

    def padkern(*leaves: Tensor) -> Tensor:
        return gated_bce_loss(*leaves, *ids, backend="triton")

    def eager(*leaves: Tensor) -> Tensor:
        return gated_bce_loss_ref(*leaves, *ids)

    function = {"triton": lambda: padkern, "eager": lambda: eager}.get(
        name, lambda: compiled(eager)
    )()
    return Call(function, leaves, with_gradients(eager, leaves))


@pytest.mark.parametrize("name", ["triton", "eager", "compile"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 8, 64])
def bench_gated_loss_gpu(benchmark, skip_peer, machine, k, dtype, name):
    info = {"op": "gated_bce", "implementation": name, "dtype": dtype}
    info |= {"case": f"T={TOKENS} N={ITEMS} d={DIM} k={k} {dtype}", "k": k}
    timed(benchmark, skip_peer, machine, lambda: gated_loss_call(name, k, dtype), info)


# ---- gated matrix --------------------------------------------------------------------------------


def gated_matrix_call(name: str, rows: int, dtype: torch.dtype) -> Call:
    """The matrix's product with weights that are not all alike, so that backward reads a matrix."""
    torch.manual_seed(rows)
    tables = 1 + torch.randn(EXPERTS, rows, DIM, device="cuda")  # so that the sum is not near 0
    tables = tables.to(dtype).requires_grad_()
    gate = torch.rand(BINS, EXPERTS, device="cuda", requires_grad=True)
    bins = torch.randint(BINS, (rows,), device="cuda")
    weights = torch.rand(rows, EXPERTS * DIM, device="cuda")

    def summed(table: Function) -> Function:
        return lambda tables, gate: (table(tables, gate, bins) * weights.to(gate.dtype)).sum()

    own = summed(lambda *args: gated_table(*args, backend="triton"))
    eager = summed(gated_table_ref)
    function = {"triton": lambda: own, "eager": lambda: eager}.get(name, lambda: compiled(eager))()
    return Call(function, (tables, gate), with_gradients(eager, (tables, gate)))


@pytest.mark.parametrize("name", ["triton", "eager", "compile"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [ITEMS + 1, 500_000])
def bench_gated_matrix_gpu(benchmark, skip_peer, machine, rows, dtype, name):
    """The sum with weights is part of every time: one read of the matrix, one write of weights."""
    info = {"op": "gated_table", "implementation": name, "dtype": dtype}
    info |= {"case": f"N={rows} d={DIM} {dtype}", "rows": rows}
    timed(benchmark, skip_peer, machine, lambda: gated_matrix_call(name, rows, dtype), info)


# ---- catalogue loss ------------------------------------------------------------------------------

ROWS = (64, 256, 1024)
CATALOGUE = (
    "triton",
    "eager",
    "compile",
    *(f"chunked_compile_{rows}" for rows in ROWS),
    "linear_cross_entropy",
    *(f"linear_cross_entropy_{rows}" for rows in ROWS),
    "liger",
    "cut_cross_entropy",
)


def catalogue_function(name: str) -> Function:
    """A contender by name."""
    if name == "triton":
        return lambda *args: catalogue_cross_entropy(*args, backend="triton")
    if name == "eager":
        return catalogue.plain
    if name == "compile":
        return compiled(catalogue.plain)
    if name == "liger":
        return catalogue.liger
    if name == "cut_cross_entropy":
        return catalogue.cut_cross_entropy
    kind, _, rows = name.rpartition("_")
    if kind == "chunked_compile":
        torch._dynamo.reset()
        return catalogue.chunked(int(rows), compiled=True)
    return catalogue.linear_cross_entropy(int(rows) if rows.isdigit() else None)


def catalogue_expected(users: Tensor, items: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Value and gradients in float64, 64 tokens at a time."""
    wide = items.detach().double()
    total, d_users, d_items = 0.0, [], torch.zeros_like(wide)
    for part, wanted in zip(users.detach().double().split(64), targets.split(64), strict=True):
        loss, residual, d_part = catalogue.chunk_terms_in_place(part, wide, wanted)
        total += float(loss)
        d_users.append(d_part)
        d_items.addmm_(residual.T, part)
    count = len(users)
    value = torch.tensor(total / count, dtype=torch.float64, device="cuda")
    return value, torch.cat(d_users) / count, d_items.div_(count)


def catalogue_call(name: str, tokens: int, items: int, dim: int, dtype: torch.dtype) -> Call:
    """Logits of order 1, targets drawn uniformly; every eighth token one of sixteen head items."""
    torch.manual_seed(items)
    users = torch.randn(tokens, dim, device="cuda").to(dtype).requires_grad_()
    vectors = (torch.randn(items, dim, device="cuda") / dim**0.5).to(dtype).requires_grad_()
    targets = torch.randint(items, (tokens,), device="cuda")
    targets[::8] %= 16
    function = catalogue_function(name)
    expected = catalogue_expected(users, vectors, targets)
    return Call(lambda *leaves: function(*leaves, targets), (users, vectors), expected)


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "items", "dim"),
    [
        (TOKENS, ITEMS, 192),
        (TOKENS, 100_000, 192),
        (TOKENS, 100_000, 384),
        (TOKENS, 1_000_000, 192),
    ],
)
def bench_catalogue_loss_gpu(benchmark, skip_peer, machine, tokens, items, dim, dtype, name):
    info = {"op": "catalogue_loss", "implementation": name, "dtype": dtype}
    info |= {"case": f"T={tokens} N={items} D={dim} {dtype}"}
    info |= {"gflop": 8 * tokens * items * dim / 1e9}
    if name.startswith("linear_cross") and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        skip_peer("this torch has no linear_cross_entropy", implementation=name)
    timed(
        benchmark,
        skip_peer,
        machine,
        lambda: catalogue_call(name, tokens, items, dim, dtype),
        info,
    )
