"""Compiles every Triton kernel of MK-MMD ahead of time for sm_80 and sm_90; needs no GPU.

The launchers run on meta tensors with their kernels' launches recorded, so what is compiled is what
a call would launch. Registers, shared memory and spills are bounded; ``pytest -s`` prints them.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

KIBIBYTE = 1024


class Target(NamedTuple):
    capability: int
    device_class: str
    shared: int  # bytes a program may have


TARGETS = {
    "sm_80": Target(80, "medium", 163 * KIBIBYTE),
    "sm_90": Target(90, "large", 227 * KIBIBYTE),
}

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


class Launch(NamedTuple):
    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Figures(NamedTuple):
    registers: int
    stack: int
    shared: int
    products: str
    atomics: bool


def launches(case: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What the launchers would launch for a case: the loss alone, then with its gradients."""
    from padkern.ops.mkmmd import triton_impl, triton_plan
    from padkern.ops.mkmmd.reference import DEFAULT_ALPHAS

    dtype, rows, dim, more = CASES[case]
    recorded: list[Launch] = []

    def record(self, *arguments, grid, warmup, **options):
        recorded.append(Launch(self, arguments, options))

    monkeypatch.setattr(triton.runtime.JITFunction, "run", record)
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


TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}


def source_of(launch: Launch) -> Any:
    """The launch as Triton would specialise it: types, constants, multiples of 16."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(
        zip(launch.function.params, launch.arguments, strict=True)
    ):
        divisible = False
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            divisible = True
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.function, signature, constants, attributes)


def compile_for(launch: Launch, target: Target, folder: Path) -> Figures:
    from triton.backends.compiler import GPUTarget

    gpu = GPUTarget("cuda", target.capability, 32)
    kernel = triton.compile(source_of(launch), target=gpu, options=launch.options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run(
        [tool, "-res-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    ptx = kernel.asm["ptx"]
    products = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "-"
    atomics = re.search(r"\b(atom|red)\.", ptx) is not None
    return Figures(registers, stack + local, kernel.metadata.shared, products, atomics)


def key(launch: Launch) -> tuple[Any, ...]:
    """Kernels that move data differ little by width: one of each class is enough."""
    name = launch.function.__name__
    constants = {
        parameter.name: value
        for parameter, value in zip(launch.function.params, launch.arguments, strict=True)
        if parameter.is_constexpr
    }
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
        launch.function.__name__ for launch in recorded
    }
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for launch in recorded:
        if key(launch) in _compiled[architecture]:
            continue
        _compiled[architecture].add(key(launch))
        figures = compile_for(launch, target, tmp_path)
        name = launch.function.__name__
        constants = {
            parameter.name: value
            for parameter, value in zip(launch.function.params, launch.arguments, strict=True)
        }
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
