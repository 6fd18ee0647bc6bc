"""Compiles the Triton kernels of gated loss, gated matrix and catalogue loss for sm_80 and sm_90.

Registers, shared memory and spills are bounded; ``pytest -s`` prints them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_compile import KIBIBYTE, TARGETS, Launch, compile_for, needs_compiler, record

pytestmark = needs_compiler


def meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def gated_bce(dtype: torch.dtype, dim: int, *, k: int = 1, valid: bool = False) -> None:
    from padkern.ops.triple_expert import triton_impl

    floats = (meta(3098, 3, dim, dtype=dtype), meta(3, 8348, dim, dtype=dtype))
    gate = meta(12, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    ids = (meta(8348), meta(3098), meta(3098, k))
    mask = meta(3098, dtype=torch.bool) if valid else None
    triton_impl.gated_bce_value_triton(*floats, gate, *ids, mask)
    triton_impl.gated_bce_value_grad_triton(*floats, gate, *ids, mask)


def gated_table(dtype: torch.dtype, dim: int) -> None:
    from padkern.ops.gated_table import triton_impl

    tables = [meta(8348, dim, dtype=dtype) for _ in range(3)]
    gate = meta(12, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    out = triton_impl.gated_table_triton(tables, gate, meta(8348))
    triton_impl.gated_table_grad_triton(out, tables, gate, meta(8348))


CASES: dict[str, tuple[Any, ...]] = {
    "gated loss fp32 128": (gated_bce, torch.float32, 128),
    "gated loss bf16 64": (gated_bce, torch.bfloat16, 64, {"k": 8, "valid": True}),
    "gated loss fp32 512": (gated_bce, torch.float32, 512),
    "gated loss fp64 128": (gated_bce, torch.float64, 128),
    "gated matrix fp32 128": (gated_table, torch.float32, 128),
    "gated matrix fp16 40": (gated_table, torch.float16, 40),
    "gated matrix fp64 128": (gated_table, torch.float64, 128),
}
# Bytes of stack a thread may use: none, but for what is known here.
STACK = {("sm_80", "gated loss fp32 512", "token_kernel"): 8}
_compiled: dict[str, set[Any]] = {name: set() for name in TARGETS}


def launches(case: str, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What a case launches: the value alone, then with its gradients."""
    function, dtype, dim, *options = CASES[case]
    recorded = record(monkeypatch)
    function(dtype, dim, **(options[0] if options else {}))
    monkeypatch.undo()
    return recorded


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", TARGETS)
def test_kernels_compile_within_their_bounds(architecture, case, tmp_path, monkeypatch):
    recorded = launches(case, monkeypatch)
    assert len(recorded) >= 4
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    target = TARGETS[architecture]
    for launch in recorded:
        if launch.key in _compiled[architecture]:
            continue
        _compiled[architecture].add(launch.key)
        figures = compile_for(launch, target, tmp_path)
        tile = "x".join(str(v) for k, v in launch.constants.items() if k.startswith("BLOCK"))
        print(
            f"\n{architecture} | {case} | {launch.name} | {tile} | "
            f"{launch.options.get('num_warps', 4)} | {figures.registers} | "
            f"{figures.shared / KIBIBYTE:.0f} | {figures.products} | {figures.stack}",
            end="",
        )
        assert figures.stack <= STACK.get((architecture, case, launch.name), 0), (
            f"{launch.name}: {figures}"
        )
        assert figures.registers <= 255, f"{launch.name}: {figures}"
        assert figures.shared <= target.shared, f"{launch.name}: {figures}"
        assert not figures.atomics, launch.name
