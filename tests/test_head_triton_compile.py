"""Compiles the Triton kernels of gated loss, gated matrix and catalogue loss for sm_80 and sm_90.

Registers, shared memory and spills are bounded; ``pytest -s`` prints them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_compile import KIBIBYTE, TARGETS, Launch, compile_for, needs_compiler, record

pytestmark = needs_compiler


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def gated_bce(
    dtype: torch.dtype,
    dim: int,
    *,
    k: int = 1,
    valid: bool = False,
    tokens: int = 3098,
    experts: int = 3,
    rows: int = 8348,
    bins: int = 12,
) -> None:
    from padkern.ops.triple_expert import triton_impl

    users = meta(tokens, experts, dim, dtype=dtype)
    tables = meta(experts, rows, dim, dtype=dtype)
    gate = meta(bins, experts, dtype=compute_dtype(dtype))
    ids = (meta(rows), meta(tokens), meta(tokens, k))
    mask = meta(tokens, dtype=torch.bool) if valid else None
    triton_impl.gated_bce_value_triton(users, tables, gate, *ids, mask)
    triton_impl.gated_bce_value_grad_triton(users, tables, gate, *ids, mask)


def gated_table(dtype: torch.dtype, dim: int, *, rows: int = 8348, experts: int = 3) -> None:
    from padkern.ops.gated_table import triton_impl

    tables = [meta(rows, dim, dtype=dtype) for _ in range(experts)]
    gate = meta(12 if rows > 1 else 1, experts, dtype=compute_dtype(dtype))
    out = triton_impl.gated_table_triton(tables, gate, meta(rows))
    triton_impl.gated_table_grad_triton(out, tables, gate, meta(rows))


def catalogue_loss(
    dtype: torch.dtype, dim: int, *, everything: bool = False, tokens: int = 3098, rows: int = 8347
) -> None:
    from padkern.ops.catalogue_loss import triton_impl

    args = (meta(tokens, dim, dtype=dtype), meta(rows, dim, dtype=dtype), meta(tokens))
    rest: tuple[torch.Tensor | None, ...] = (None, None, None, None)
    if everything:
        entries = (meta((rows + 1) // 2), meta(10 * tokens - 9), meta(tokens + 1))
        rest = (meta(rows, dtype=torch.float32), *entries)
    triton_impl.catalogue_loss_value_triton(*args, *rest)
    triton_impl.catalogue_loss_value_grad_triton(*args, *rest)


# Sizes of 1 become constants of the kernels.
ONES = {"tokens": 1, "experts": 1, "rows": 1, "bins": 1, "valid": True}
EVERYTHING = {"everything": True}
CASES: dict[str, tuple[Any, ...]] = {
    "gated loss ones": (gated_bce, torch.float32, 1, ONES),
    "gated loss fp32 128": (gated_bce, torch.float32, 128),
    "gated loss bf16 64": (gated_bce, torch.bfloat16, 64, {"k": 8, "valid": True}),
    "gated loss fp32 512": (gated_bce, torch.float32, 512),
    "gated loss fp64 128": (gated_bce, torch.float64, 128),
    "gated matrix ones": (gated_table, torch.float32, 1, {"rows": 1, "experts": 1}),
    "gated matrix fp32 128": (gated_table, torch.float32, 128),
    "gated matrix fp16 40": (gated_table, torch.float16, 40),
    "gated matrix fp64 128": (gated_table, torch.float64, 128),
    "catalogue ones": (catalogue_loss, torch.float32, 1, {"tokens": 1, "rows": 1}),
    "catalogue ones everything": (
        catalogue_loss,
        torch.float16,
        1,
        {"tokens": 1, "rows": 1, "everything": True},
    ),
    "catalogue bf16 64": (catalogue_loss, torch.bfloat16, 64),
    "catalogue bf16 192": (catalogue_loss, torch.bfloat16, 192),
    "catalogue fp16 384": (catalogue_loss, torch.float16, 384),
    "catalogue bf16 100 everything": (catalogue_loss, torch.bfloat16, 100, EVERYTHING),
    "catalogue bf16 64 everything": (catalogue_loss, torch.bfloat16, 64, EVERYTHING),
    "catalogue fp32 192": (catalogue_loss, torch.float32, 192),
    "catalogue fp32 300 everything": (catalogue_loss, torch.float32, 300, EVERYTHING),
    "catalogue fp32 64 everything": (catalogue_loss, torch.float32, 64, EVERYTHING),
    "catalogue fp64 64": (catalogue_loss, torch.float64, 64),
}
# Bytes of stack a thread may use: none, but for what is known here.
STACK = {
    ("sm_90", "catalogue fp64 64", "mass_kernel"): 8,
}
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
    assert len(recorded) >= 3
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
        allowed = STACK.get((architecture, case, launch.name), 0)
        assert figures.stack <= allowed, f"{launch.name}: {figures}"
        assert figures.registers <= 255, f"{launch.name}: {figures}"
        assert figures.shared <= target.shared, f"{launch.name}: {figures}"
        assert not figures.atomics, launch.name
        if launch.name in ("mass_kernel", "gradient_kernel"):
            exact = launch.constants["CLASS"] == "float64"
            expected = "wgmma" if architecture == "sm_90" and not exact else "mma"
            assert figures.products == expected, f"{launch.name}: {figures}"
