"""Whether Triton interprets kernels in this process, and a repair of its interpreter.

Triton reads ``TRITON_INTERPRET`` when a kernel is defined, so every module of kernels agrees.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor


@triton.jit
def _nothing():
    pass


INTERPRET = not isinstance(_nothing, triton.runtime.JITFunction)


def _repair() -> None:
    """Lets loop bounds be computed values: Triton's interpreter (3.6) makes integers of arrays of
    one element, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_repair


if INTERPRET:
    _repair()


def guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
