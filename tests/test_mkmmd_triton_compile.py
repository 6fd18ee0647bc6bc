"""Compiles every Triton kernel of MK-MMD ahead of time for sm_80 and sm_90; needs no GPU.

The launchers run on meta tensors with their kernels' launches recorded, so what is compiled is what
a call would launch. Registers, shared memory and spills are bounded; ``pytest -s`` prints them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_compile import KIBIBYTE, TARGETS, Launch, Target, compile_for, needs_compiler, record

pytestmark = needs_compiler

# Name: dtype, rows per sample, width, and what else the call asks for.
CASES: dict[str, tuple[torch.dtype, int, int, dict[str, Any]]] = {
    "bf16 64": (torch.bfloat16, 4096, 64, {}),
    "bf16 128": (torch.bfloat16, 4096, 128, {}),
    "bf16 256": (torch.bfloat16, 4096, 256, {}),
    "bf16 1024": (torch.bfloat16, 4096, 1024, {}),
    "fp16 128": (torch.float16, 4096, 128, {}),
    "fp32 64": (torch.float32, 4096, 64, {}),
    "fp32 128": (torch.float32, 4096, 128, {}),
    "fp32 256": (torch.float32, 4096, 256, {}),
    "fp32 1024": (torch.float32, 4096, 1024, {}),
    "fp32 narrow": (torch.float32, 4096, 16, {}),
    "fp32 few rows": (torch.float32, 100, 64, {}),
    "fp32 few wide rows": (torch.float32, 100, 300, {}),
    "fp32 tiny": (torch.float32, 20, 64, {}),
    "tf32 128": (torch.float32, 4096, 128, {"precision": "tf32"}),
    "tf32 1024": (torch.float32, 4096, 1024, {"precision": "tf32"}),
    "fp64": (torch.float64, 300, 40, {}),
    "PAD": (torch.float32, 672, 128, {"target_dtype": torch.float16}),
    "weights, betas, laplacian": (
        torch.float32,
        4096,
        128,
        {"weighted": True, "learned": True, "kernel": "laplacian"},
    ),
    "eighteen alphas": (torch.bfloat16, 4096, 64, {"alphas": tuple(1.1**k for k in range(18))}),
    "ragged": (torch.bfloat16, 4096, 128, {"problems": 16}),
}


def launches(case: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What the launchers would launch for a case: the loss alone, then with its gradients."""
    from padkern.ops.mkmmd import triton_impl, triton_plan
    from padkern.ops.mkmmd.reference import DEFAULT_ALPHAS

    dtype, rows, dim, more = CASES[case]
    recorded = record(monkeypatch)
    monkeypatch.setattr(triton_plan, "device_class", lambda device: target.device_class)

    def meta(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, y = meta(rows, dim), meta(rows, dim, dtype=more.get("target_dtype", dtype))
    weight = meta(rows, dtype=torch.float32) if more.get("weighted") else None
    kernel, alphas = more.get("kernel", "gaussian"), more.get("alphas", DEFAULT_ALPHAS)
    if "problems" in more:
        offsets = meta(more["problems"] + 1, dtype=torch.int64)
        args = (x, y, offsets, offsets, None, weight, weight, alphas, kernel, "unbiased", 300, 300)
        triton_impl.mkmmd_batched_value_triton(*args)
        triton_impl.mkmmd_batched_value_grad_triton(*args)
        return recorded
    learned = meta(len(alphas), dtype=torch.float32) if more.get("learned") else None
    args = (x, y, None, weight, weight, learned, learned, () if more.get("learned") else alphas)
    args += (kernel, "unbiased", more.get("precision", "float32"))
    triton_impl.mkmmd_value_triton(*args)
    triton_impl.mkmmd_value_grad_triton(*args, learned is not None)
    return recorded


def key(launch: Launch) -> tuple[Any, ...]:
    """Kernels that move data differ little by width: one of each class is enough."""
    name, constants = launch.name, launch.constants
    if "INTERPRET" not in constants:
        return name, *(
            constants.get(k) for k in ("CLASS", "GRADIENT", "RAGGED", "ALPHAS", "WEIGHTED")
        )
    return name, *constants.items(), *launch.options.items()


_compiled: dict[str, set[tuple[Any, ...]]] = {name: set() for name in TARGETS}


# Bytes of stack a thread may use: none, but for what is known here.
STACK = {
    ("sm_80", "weights, betas, laplacian", "value_kernel"): 248,
    ("sm_90", "fp32 narrow", "finish_kernel"): 16,
    ("sm_90", "weights, betas, laplacian", "gradient_kernel"): 24,
    ("sm_90", "ragged", "gradient_kernel"): 8,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", TARGETS)
def test_kernels_compile_within_their_bounds(architecture, case, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    target = TARGETS[architecture]
    recorded = launches(case, target, monkeypatch)
    assert {"sum_kernel", "mean_kernel", "pack_kernel", "value_kernel", "finish_kernel"} <= {
        launch.name for launch in recorded
    }
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for launch in recorded:
        if key(launch) in _compiled[architecture]:
            continue
        _compiled[architecture].add(key(launch))
        figures = compile_for(launch, target, tmp_path)
        name, constants = launch.name, launch.constants
        tile = "x".join(str(constants[k]) for k in ("BLOCK_M", "BLOCK_N") if k in constants)
        print(
            f"\n{architecture} | {case} | {name} | {constants.get('CLASS', '')} | "
            f"{constants.get('WIDTH', '')} | {tile} | {launch.options.get('num_warps', 4)} | "
            f"{figures.registers} | {figures.shared / KIBIBYTE:.0f} | {figures.products}",
            end="",
        )
        assert figures.stack <= STACK.get((architecture, case, name), 0), f"{name}: {figures}"
        assert figures.shared <= target.shared, f"{name}: {figures}"
        assert not figures.atomics, name
        if name in ("gradient_kernel", "value_kernel", "panel_kernel", "product_kernel"):
            wide_enough = constants["BLOCK_M"] >= 64 and constants["CLASS"] != "float64"
            expected = {"float64": "-"}.get(constants["CLASS"], "mma")
            if architecture == "sm_90" and wide_enough:
                expected = "wgmma"
            assert figures.products == expected, f"{name}: {figures}"
