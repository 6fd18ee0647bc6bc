"""Linear maps of the models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from padkern.ops.linear import linear, linear_ref


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """``x W^T + b``, or its positive part.

    By `padkern.ops.linear.linear` for matrices in full precision on the CPU; by torch's product for
    more dimensions, on other devices, in half precision and under autocast.

    Args:
        x: ``[T, in]``, or ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
        relu: give the positive part.

    Returns:
        ``[T, out]`` in the dtype that :func:`torch.nn.functional.linear` gives.
    """
    full = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    if x.is_cpu and x.ndim == 2 and full and not torch.is_autocast_enabled("cpu"):
        return linear(x, weight, bias, relu=relu)
    return linear_ref(x, weight, bias, relu)


class Linear(nn.Linear):
    """:class:`torch.nn.Linear`, computed by :func:`project`."""

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """``[..., out]``, its positive part with ``relu``."""
        return project(x, self.weight, self.bias, relu)
