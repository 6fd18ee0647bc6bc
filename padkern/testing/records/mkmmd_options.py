"""Makers of options shared by the records of MK-MMD on one problem and on many."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from padkern.testing.opspec import Arguments

BOTH = ("source", "target")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def resolve(values: Arguments, inputs: Arguments) -> Arguments:
    """The values, those that are makers called with the inputs."""
    return {key: value(inputs) if callable(value) else value for key, value in values.items()}


def just(**values: Any) -> Any:
    """Maker of the values."""
    return partial(resolve, values)


def weights(dtype: torch.dtype, names: tuple[str, ...], **more: Any) -> Any:
    """Maker of non-negative weights, some of them 0 but never the first two of a problem."""

    def make(inputs: Arguments) -> Arguments:
        chosen = {}
        for name in names:
            shape = inputs[name].shape[:-1]
            values = np.random.default_rng(shape).uniform(0.1, 3.0, shape)
            values[..., 3::7] = 0.0
            weight = torch.from_numpy(values)
            if dtype == torch.bool:
                weight[..., :2] = 2.0
                weight = weight > 1.5
            chosen[f"{name}_weight"] = weight.to(dtype)
        return chosen | resolve(more, inputs)

    return make


def apart(make: Any) -> Any:
    """Options for kernels of the distance itself, whose derivative is unbounded near 0.

    Some random rows come so close that rounding of d decides their term. On a grid rows are equal,
    which must count as distance 0, or well apart.
    """

    def made(inputs: Arguments) -> Arguments:
        grid = {name: (2 * inputs[name]).round() / 2 for name in BOTH}
        return grid | make(grid)

    return made


def repeats(make: Any) -> Any:
    """Options with rows that occur twice in a sample and in both, as items in a batch do."""

    def made(inputs: Arguments) -> Arguments:
        source, target = inputs["source"].clone(), inputs["target"].clone()
        n, m = len(source), len(target)
        source[n - n // 2 :] = source[: n // 2]
        target[m - m // 3 :] = source[torch.arange(m // 3) % n]
        repeated = {"source": source, "target": target}
        return repeated | make(repeated)

    return made


def bandwidth(dtype: torch.dtype | None, *shape: int) -> Any:
    """Maker of a squared bandwidth of the size of the squared distances, as a number or tensor."""

    def make(inputs: Arguments) -> float | Tensor:
        number = 0.7 * inputs["source"].shape[-1]
        return number if dtype is None else torch.full(shape, number, dtype=dtype)

    return make


def vector(dtype: torch.dtype, *values: float) -> Any:
    """Maker of a tensor."""
    return lambda inputs: torch.tensor(values, dtype=dtype)
