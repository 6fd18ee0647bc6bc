"""Which implementation runs an op, and in one sentence why the others do not."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from padkern import _native

BACKENDS = ("auto", "reference", "native")

_log = logging.getLogger("padkern")


def check_backend(backend: str) -> None:
    """Raises ValueError for a name that is not a backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


@torch.compiler.assume_constant_result
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
