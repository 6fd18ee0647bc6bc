"""A linear map in plain torch: the specification."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """``x @ weight.T + bias``, its positive part with ``relu``.

    Args:
        x: ``[T, in]``.
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
        relu: whether negative values become 0; the gradient at 0 is 0.

    Returns:
        ``[T, out]``.
    """
    y = F.linear(x, weight, bias)
    return F.relu(y) if relu else y
