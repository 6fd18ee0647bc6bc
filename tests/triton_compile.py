"""Compiles the launches of Triton launchers ahead of time for sm_80 and sm_90; needs no GPU.

Launchers run on meta tensors while :func:`record` keeps what they would launch, so what is compiled
is what a call would launch.
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

# For the modules that compile: pytestmark = needs_compiler.
needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

KIBIBYTE = 1024


class Target(NamedTuple):
    """What to compile for.

    Attributes:
        capability: Compute capability, 10 times major plus minor.
        device_class: Name of the class of devices that tables of tiles are kept for.
        shared: Bytes of shared memory a program may have.
    """

    capability: int
    device_class: str
    shared: int


TARGETS = {
    "sm_80": Target(80, "medium", 163 * KIBIBYTE),
    "sm_90": Target(90, "large", 227 * KIBIBYTE),
}

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class Launch(NamedTuple):
    """A kernel, its arguments in the order of its parameters, and num_warps and the like."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return self.function.__name__

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time arguments by name."""
        return {
            parameter.name: value
            for parameter, value in zip(self.function.params, self.arguments, strict=True)
            if parameter.is_constexpr
        }

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that compile to the same binary, but for divisibility and width."""
        tensors = (
            str(value.dtype) if isinstance(value, torch.Tensor) else value is None
            for value in self.arguments
        )
        return self.name, *tensors, *self.constants.items(), *self.options.items()


class Figures(NamedTuple):
    """Of a compiled kernel: registers per thread; bytes of stack per thread and of shared memory
    per program; "wgmma", "mma" or "-" for its products; whether it has atomic operations."""

    registers: int
    stack: int
    shared: int
    products: str
    atomics: bool


def record(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """From now on launches are appended to the list returned, in their order, and do nothing else.

    They go on being recorded until ``monkeypatch.undo()``; compile after that.
    """
    recorded: list[Launch] = []

    def keep(self, *arguments, grid, warmup, **options):
        rest = [p.name for p in self.params[len(arguments) :]]
        named = tuple(options.pop(name) for name in rest if name in options)
        recorded.append(Launch(self, arguments + named, options))

    monkeypatch.setattr(triton.runtime.JITFunction, "run", keep)
    return recorded


def source_of(launch: Launch) -> Any:
    """The launch as Triton would specialise it: types, constants, multiples of 16."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, (parameter, value) in enumerate(
        zip(launch.function.params, launch.arguments, strict=True)
    ):
        divisible = False
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            divisible = True
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.function, signature, constants, attributes)


def compile_for(launch: Launch, target: Target, folder: Path) -> Figures:
    """Compiles a launch; ``folder`` is where its binary may be put."""
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
