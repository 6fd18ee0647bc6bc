"""Compiles the Triton kernels of the sequence ops ahead of time for sm_80 and sm_90; needs no GPU.

Registers, shared memory and spills are bounded; ``pytest -s`` prints them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from triton_compile import KIBIBYTE, TARGETS, Launch, compile_for, needs_compiler, record

pytestmark = needs_compiler


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int64)


def attention(
    longest: int, dim: int, dtype: torch.dtype, dropout: float, tokens: int = 1000, heads: int = 2
) -> None:
    """Both passes for 100 sequences, or one of one token."""
    from padkern.ops.short_attention import triton_impl

    q, offsets = meta(tokens, heads, dim, dtype=dtype), ids(101 if tokens > 1 else 2)
    options = (0.125, dropout, 2**62, 3, longest)
    out = triton_impl.short_attention_triton(q, q, q, offsets, *options)
    triton_impl.short_attention_grad_triton(out, q, q, q, offsets, *options)


def ranking(
    top_k: int,
    at_most: int,
    dtype: torch.dtype,
    ordered: bool,
    users: int = 1000,
    items: int = 8000,
    dim: int = 192,
) -> None:
    """Users and items, by default of PAD's width."""
    from padkern.ops.ranking import triton_impl

    triton_impl.rank_topk_triton(
        meta(users, dim, dtype=dtype),
        meta(items + 1, dim, dtype=dtype),
        meta(items, dim, 1, dtype=dtype),
        meta(dtype=dtype),
        ids(items) if ordered else None,
        None if top_k else ids(users),
        ids(9 * users),
        ids(users + 1),
        True,
        top_k,
        at_most,
    )


def segments(slots: int, dim: int, dtype: torch.dtype, number: int = 1000) -> None:
    """Sums of slots by segment."""
    from padkern.ops.segments import triton_impl

    triton_impl.segment_sum_triton(meta(slots, dim, dtype=dtype), ids(slots), ids(number + 1))


class Compilation(NamedTuple):
    """A call and what its kernels may take: registers per thread, bytes of stack on sm_80 and
    sm_90, KiB of shared memory, and "tensor" products or "plain" ones."""

    call: Any
    arguments: tuple[Any, ...]
    registers: int
    stack: tuple[int, int]
    shared: int
    products: str


F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
CASES = {
    "attention PAD": Compilation(attention, (20, 64, F32, 0.2), 255, (24, 0), 104, "tensor"),
    "attention bf16": Compilation(attention, (20, 64, BF16, 0.2), 255, (0, 0), 104, "tensor"),
    "attention no mask": Compilation(attention, (20, 64, F32, 0.0), 255, (24, 0), 104, "tensor"),
    "attention long": Compilation(attention, (64, 64, F32, 0.2), 255, (0, 0), 104, "tensor"),
    "attention short": Compilation(attention, (5, 32, F32, 0.2), 200, (0, 0), 20, "tensor"),
    "attention fp64": Compilation(attention, (20, 64, F64, 0.2), 255, (16, 0), 104, "tensor"),
    # Sizes of 1 are constants to Triton, and other code.
    "attention ones": Compilation(attention, (1, 1, F32, 0.2, 1, 1), 255, (0, 0), 20, "tensor"),
    "attention one long": Compilation(
        attention, (50, 1, F32, 0.0, 1, 1), 255, (0, 0), 104, "tensor"
    ),
    # Exact sums: float32 products stay off the tensor cores.
    "ranks": Compilation(ranking, (0, 0, F32, False), 240, (0, 0), 24, "plain"),
    "ranks early": Compilation(ranking, (0, 20, F32, True), 255, (8, 0), 24, "plain"),
    "best 10": Compilation(ranking, (10, 0, F32, True), 255, (0, 24), 24, "plain"),
    "best 128": Compilation(ranking, (128, 0, F32, False), 255, (0, 24), 24, "plain"),
    "ranks fp64": Compilation(ranking, (0, 0, F64, False), 255, (0, 32), 48, "tensor"),
    "best 10 fp64": Compilation(ranking, (10, 0, F64, True), 255, (0, 8), 48, "tensor"),
    "ranks ones": Compilation(ranking, (0, 1, F32, True, 1, 1, 1), 255, (152, 112), 24, "plain"),
    "best one": Compilation(ranking, (1, 0, F64, False, 1, 1, 1), 255, (0, 0), 48, "tensor"),
    "ranks wide": Compilation(
        ranking, (0, 0, F32, False, 900, 8347, 384), 255, (8, 24), 24, "plain"
    ),
    "segments ones": Compilation(segments, (1, 1, F32, 1), 64, (0, 0), 1, "plain"),
    "one segment": Compilation(segments, (5000, 1, F32, 1), 64, (0, 0), 1, "plain"),
    "segments": Compilation(segments, (1000, 64, F32), 64, (0, 0), 1, "plain"),
    "segments in pieces": Compilation(segments, (5000, 130, BF16), 72, (0, 0), 1, "plain"),
    "segments fp64": Compilation(segments, (5000, 64, F64), 64, (0, 0), 1, "plain"),
}
KERNELS = {
    "attention": {"attention_kernel", "attention_grad_kernel"},
    "ranks": {"target_kernel", "rank_kernel"},
    "best": {"rank_kernel"},
    "segments": {"sum_kernel"},
    "one": {"sum_kernel", "join_kernel"},
}
_compiled: dict[str, set[tuple[Any, ...]]] = {name: set() for name in TARGETS}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", TARGETS)
def test_kernels_compile_within_their_bounds(architecture, case, tmp_path, monkeypatch):
    bounds, target = CASES[case], TARGETS[architecture]
    recorded: list[Launch] = record(monkeypatch)
    bounds.call(*bounds.arguments)
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert KERNELS[case.split()[0]] <= {launch.name for launch in recorded}
    for launch in recorded:
        ones = tuple(isinstance(x, int) and x == 1 for x in launch.arguments)
        if (launch.key, ones) in _compiled[architecture]:
            continue
        _compiled[architecture].add((launch.key, ones))
        figures = compile_for(launch, target, tmp_path)
        print(
            f"\n{architecture} | {case} | {launch.name} | {launch.options.get('num_warps', 4)} | "
            f"{figures.registers} | {figures.stack} | {figures.shared / KIBIBYTE:.0f} | "
            f"{figures.products}",
            end="",
        )
        text = f"{launch.name}: {figures}"
        assert figures.registers <= bounds.registers, text
        assert figures.stack <= bounds.stack[architecture == "sm_90"], text
        assert figures.shared <= min(target.shared, bounds.shared * KIBIBYTE), text
        assert not figures.atomics, text
        assert (figures.products != "-") == (bounds.products == "tensor"), text
