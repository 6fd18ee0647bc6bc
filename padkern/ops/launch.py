"""What the launchers over ``padkern._C`` share: the core, checks, dense rows and addresses.

The registered ops can be called past the public functions, and a kernel reads whatever its pointers
and sizes say. So a launcher checks every shape and dtype; the values of ids are checked in C++.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from padkern import _native

# float32 and float64 as csrc names them, in this order in every op.
FLOAT_CODES = {torch.float32: 0, torch.float64: 1}


def core() -> ModuleType:
    """``padkern._C``.

    Raises:
        RuntimeError: It did not load; the message says why.
    """
    loaded, reason, _ = _native.load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def raise_error(error: str) -> None:
    """Raises the ValueError that a call of the core gave as text; an empty one is none."""
    if error:
        raise ValueError(error)


def float_code(name: str, dtype: torch.dtype) -> int:
    """The code of a dtype for the core.

    Raises:
        TypeError: It is neither float32 nor float64.
    """
    code = FLOAT_CODES.get(dtype)
    if code is None:
        raise TypeError(f"{name} must be float32 or float64, got {dtype}")
    return code


def check_tensor(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int | str, ...]) -> None:
    """Checks device, dtype and shape of an argument.

    Args:
        name: Of the argument.
        x: CPU tensor.
        dtype: The one allowed.
        shape: Sizes; a text stands for any size and names it in the message.

    Raises:
        TypeError: Another dtype.
        ValueError: Another device or shape.
    """
    if not x.is_cpu:
        raise ValueError(f"{name} must be on cpu, got {x.device}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {x.dtype}")
    given = x.shape
    if given == shape:
        return
    if len(given) != len(shape) or any(
        size != want and not isinstance(want, str) for size, want in zip(given, shape, strict=True)
    ):
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{sizes}], got {list(given)}")


def check_optional(
    name: str, x: Tensor | None, dtype: torch.dtype, shape: tuple[int | str, ...]
) -> None:
    """:func:`check_tensor` of what may be None."""
    if x is not None:
        check_tensor(name, x, dtype, shape)


def dense_rows(x: Tensor) -> Tensor:
    """``x``, detached, with a dense last dimension."""
    x = x.detach()
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    """``x``, detached and contiguous, where there is one."""
    return None if x is None else x.detach().contiguous()


def address(x: Tensor | None) -> int:
    """Of the first element; 0 stands for no tensor."""
    return 0 if x is None else x.data_ptr()
