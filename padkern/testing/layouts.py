"""The same values in memory layouts that callers have: slices, transposes, broadcasts, odd offsets.

Memory between the elements of a laid-out tensor holds NaN, or for integers and bools a value that
no op accepts or expects, so that an op that reads past its strides shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Far outside of every index range, and far from overflow when a stride multiplies it.
_STRAY = {torch.int64: 1 << 40, torch.int32: 1 << 30}


def _stray(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    if like.dtype == torch.bool:
        return torch.ones(shape, dtype=like.dtype, device=like.device)
    value = float("nan") if like.is_floating_point() else _STRAY[like.dtype]
    return torch.full(shape, value, dtype=like.dtype, device=like.device)


def _permuted(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def _wider(t: Tensor) -> Tensor:
    width = t.shape[-1]
    buffer = _stray(t, (*t.shape[:-1], width + 5))
    buffer[..., 2 : 2 + width] = t
    return buffer[..., 2 : 2 + width]


def _every_second_row(t: Tensor) -> Tensor:
    buffer = _stray(t, (2 * t.shape[0], *t.shape[1:]))
    buffer[::2] = t
    return buffer[::2]


def _misaligned(t: Tensor) -> Tensor:
    buffer = _stray(t, (t.numel() + 1,))
    buffer[1:] = t.reshape(-1)
    return buffer[1:].view(t.shape)


def _expanded(t: Tensor) -> Tensor:
    return t[..., :1].expand(t.shape)


def _huge_stride(t: Tensor) -> Tensor:
    # A dimension of size 1 is never stepped over: its stride may be anything.
    strides = [
        1 << 40 if size == 1 else stride
        for size, stride in zip(t.shape, t.contiguous().stride(), strict=True)
    ]
    return t.contiguous().as_strided(t.shape, strides)


def _strided_last(t: Tensor) -> Tensor:
    buffer = _stray(t, (*t.shape[:-1], 2 * t.shape[-1]))
    buffer[..., ::2] = t
    return buffer[..., ::2]


_MAKERS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "permuted": _permuted,
    "wider_buffer": _wider,
    "every_second_row": _every_second_row,
    "misaligned": _misaligned,
    "expanded": _expanded,
    "huge_stride": _huge_stride,
    "strided_last": _strided_last,
}
LAYOUTS = tuple(_MAKERS)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The values of ``tensor`` in another layout.

    "expanded" alone changes values: it repeats the first entry of the last dimension with stride 0.
    (Repeated rows would make most losses ill-conditioned.) A tensor without elements or dimensions,
    and for "huge_stride" one without a dimension of size 1, stays as it is.

    Args:
        tensor: Any strides, any device.
        layout: One of :data:`LAYOUTS`.
    """
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    return _MAKERS[layout](tensor.detach())


def reachable_offset(tensor: Tensor) -> int:
    """Largest element offset that indexing reaches: the sum of (size - 1) * stride.

    This, not the number of elements, decides whether 32-bit offsets are enough.
    """
    return sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
