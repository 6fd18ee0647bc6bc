"""Record of :func:`padkern.ops.catalogue_loss.catalogue_cross_entropy`. A shape is (T, N, D)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from padkern.ops.catalogue_loss import catalogue_cross_entropy, catalogue_cross_entropy_ref
from padkern.testing.mkmmd import Tolerance
from padkern.testing.opspec import Arguments, ErrorCase, OpSpec, Options, Shape

SHAPES: dict[str, Shape] = {
    "ones": (1, 1, 1),
    "one_token": (1, 5, 3),
    "two": (2, 2, 2),
    "odd": (7, 11, 5),
    "primes": (13, 97, 17),
    "one_item": (9, 1, 4),
    "one_column": (9, 6, 1),
    "few_items": (64, 3, 2),
    "vector": (32, 64, 16),
    "vector_and_one": (33, 65, 17),
    "chunk_and_one": (1025, 7, 4),
    "pad_training": (160, 500, 64),
}


def _inputs(shape: Shape, dtype: torch.dtype, seed: int) -> Arguments:
    tokens, items, dim = shape
    rng = np.random.default_rng([seed, *shape])
    return {
        "users": torch.from_numpy(rng.normal(size=(tokens, dim))).to(dtype),
        "items": torch.from_numpy(rng.normal(size=(items, dim))).to(dtype),
        "targets": torch.from_numpy(rng.integers(0, items, tokens)),
    }


def _bias(inputs: Arguments) -> Arguments:
    items = inputs["items"]
    values = np.random.default_rng(2).normal(size=items.shape[0])
    return {"bias": torch.from_numpy(values).to(items.dtype), "chunk": 3}


def _scale(arguments: Arguments) -> float:
    """Typical size of a logit of standard normal states and vectors."""
    return max(1.0, arguments["users"].shape[1] ** 0.5)


def _gradient_sizes(arguments: Arguments) -> dict[str, float]:
    """Probabilities minus the one of the target: nearly nothing where that is nearly 1."""
    tokens, dim = arguments["users"].shape
    size = (dim / tokens) ** 0.5
    return {"users": size, "items": size, "bias": tokens**-0.5}


def _reference(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    return catalogue_cross_entropy_ref(users, items, targets, bias)


ERRORS = (
    ErrorCase("width", {"users": torch.zeros(4, 2)}, ValueError, r"\[4, 2\] and \[5, 3\]"),
    ErrorCase("users_rank", {"users": torch.zeros(3)}, ValueError, r"users .* got \[3\]"),
    ErrorCase("items_rank", {"items": torch.zeros(3)}, ValueError, r"items .* \[3\]"),
    ErrorCase("targets", {"targets": torch.zeros(3).long()}, ValueError, r"must be \[4\]"),
    ErrorCase(
        "no_token",
        {"users": torch.zeros(0, 3), "targets": torch.zeros(0).long()},
        ValueError,
        "T >= 1",
    ),
)

CATALOGUE_LOSS = OpSpec(
    name="catalogue_loss",
    public=catalogue_cross_entropy,
    reference=_reference,
    make_inputs=_inputs,
    shapes=SHAPES,
    shape_text="T, N, D",
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    options=(Options("plain"), Options("bias", _bias)),
    tolerances={torch.float64: Tolerance(1e-12, 1e-11), torch.float32: Tolerance(1e-6, 1e-5)},
    scale=_scale,
    gradient_sizes=_gradient_sizes,
    differentiable=("users", "items", "bias"),
    deciding=("users", "items"),
    errors=ERRORS,
    eager=_reference,
    dynamic_shapes=((8, 11, 6), (17, 20, 6), (30, 33, 6), (41, 25, 6)),
    compilations=4,  # its loop over chunks is unrolled
    check_shape=(7, 11, 5),
    error_shape=(4, 5, 3),
    second_order=(),
    plain_torch=True,
)
