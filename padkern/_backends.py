"""Which implementation runs an op, and in one sentence why the others do not."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TypeVar

import torch

from padkern import _native

BACKENDS = ("auto", "reference", "native")
# Those of ops with kernels in C++ and Triton.
TRITON_BACKENDS = ("auto", "reference", "native", "triton")
# Those of MK-MMD, which has CUDA kernels besides.
MKMMD_BACKENDS = ("auto", "reference", "native", "triton", "cuda")

_log = logging.getLogger("padkern")

Reason = TypeVar("Reason", bound=Callable[[], str])


def _constant(function: Reason) -> Reason:
    """torch.compiler.assume_constant_result without its import of the whole compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off, where the device knows autocast at all (meta does not)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def check_backend(backend: str) -> None:
    """Raises ValueError for a name that is not a backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


@_constant
def native_reason() -> str:
    """Why the native core cannot be used in this process; empty when it can."""
    return _native.load().reason


def why_not_native(*tensors: torch.Tensor | None) -> str | None:
    """Why the native CPU backend cannot run on these tensors, or None."""
    reason = native_reason()
    if reason:
        return reason
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return f"the native backend runs on the CPU, got a tensor on {tensor.device}"
    return None


def why_not_triton(*tensors: torch.Tensor | None) -> str | None:
    """Why Triton cannot run on these tensors, or None."""
    reason = triton_reason()
    if reason:
        return reason
    for tensor in tensors:
        if tensor is not None and tensor.device.type != ("cpu" if _interpreting() else "cuda"):
            where = "the CPU under TRITON_INTERPRET=1" if _interpreting() else "a CUDA device"
            return f"the triton backend runs on {where}, got a tensor on {tensor.device}"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@_constant
@cache
def triton_reason() -> str:
    """Why Triton cannot be used in this process; empty when it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _interpreting() and not torch.cuda.is_available():
        return "torch finds no usable CUDA device"
    return ""


def why_not_cuda(*tensors: torch.Tensor | None) -> str | None:
    """Why the CUDA library cannot run on these tensors, or None."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cuda":
            return f"the cuda backend runs on a CUDA device, got a tensor on {tensor.device}"
    return cuda_reason() or None


@_constant
def cuda_reason() -> str:
    """Why the CUDA library cannot be used in this process; empty when it can."""
    return _native.load_cuda().reason


def resolve_backend(backend: str, why_not: Callable[[], str | None]) -> str:
    """Returns "native" or "reference".

    Args:
        backend: What the caller asked for. A named backend never falls back.
        why_not: Called when native is a candidate; the reason against it, or None.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: ``backend="native"`` cannot run; the message says why.
    """
    check_backend(backend)
    if backend == "reference":
        return "reference"
    reason = why_not()
    if reason is None:
        return "native"
    if backend == "native":
        raise RuntimeError(f"backend='native' cannot be used: {reason}")
    if not torch.compiler.is_compiling():
        _log.debug("using the reference backend: %s", reason)
    return "reference"


def choose_backend(
    backend: str,
    names: tuple[str, ...],
    candidates: dict[str, Callable[[], str | None]],
    automatic: tuple[str, ...] | None = None,
) -> str:
    """Returns the backend to run.

    Args:
        backend: What the caller asked for. A named backend never falls back.
        names: Every name that is a backend of this op, "auto" and "reference" among them.
        candidates: For each other backend a function that gives the reason against it, or None.
        automatic: Those that "auto" tries, in this order; all candidates by default.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The named backend cannot run; the message says why.
    """
    if backend not in names:
        raise ValueError(f"backend must be one of {', '.join(names)}, got {backend!r}")
    if backend == "reference":
        return "reference"
    if backend != "auto":
        reason = candidates[backend]()
        if reason is not None:
            raise RuntimeError(f"backend={backend!r} cannot be used: {reason}")
        return backend
    reasons = []
    for name in candidates if automatic is None else automatic:
        reason = candidates[name]()
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    if not torch.compiler.is_compiling():
        _log.debug("using the reference backend: %s", "; ".join(reasons))
    return "reference"
