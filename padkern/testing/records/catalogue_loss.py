"""Record of :func:`padkern.ops.catalogue_loss.catalogue_cross_entropy`. A shape is (T, N, D)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from padkern.ops.catalogue_loss import catalogue_cross_entropy, catalogue_cross_entropy_ref
from padkern.testing.mkmmd import Tolerance
from padkern.testing.opspec import Arguments, Case, ErrorCase, OpSpec, Options, RawOp, Shape

# Sizes 1 and 2, odd, prime, around the vector widths, the token and item blocks, a packed row's
# length, the chunk of the reference, and PAD's own; the last has several segments of items.
SHAPES: dict[str, Shape] = {
    "ones": (1, 1, 1),
    "one_token": (1, 5, 3),
    "two": (2, 2, 2),
    "odd": (7, 11, 5),
    "primes": (13, 97, 17),
    "one_item": (9, 1, 4),
    "one_column": (9, 6, 1),
    "no_column": (9, 6, 0),
    "few_items": (64, 3, 2),
    "vector": (32, 64, 16),
    "vector_and_one": (33, 65, 17),
    "blocks_less_one": (95, 127, 8),
    "blocks": (96, 128, 8),
    "blocks_and_one": (97, 129, 9),
    "packed_row": (5, 40, 272),
    "packed_row_and_one": (5, 40, 273),
    "wide": (3, 30, 700),
    "chunk_and_one": (1025, 7, 4),
    "pad_training": (160, 500, 64),
    "segments": (100, 2200, 3),
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


def _excluded(inputs: Arguments) -> Arguments:
    """Zero to five items of every token, repeated ones and its target among them."""
    items, targets = inputs["items"].shape[0], inputs["targets"]
    rng = np.random.default_rng([3, len(targets), items])
    lists = [rng.integers(0, items, rng.integers(0, 6)) for _ in targets]
    lists[0] = np.array([int(targets[0])])
    return {
        "excluded_values": torch.from_numpy(np.concatenate(lists).astype(np.int64)),
        "excluded_offsets": torch.tensor([0, *np.cumsum([len(one) for one in lists])]),
    }


def _candidates(inputs: Arguments) -> Arguments:
    items, targets = inputs["items"].shape[0], inputs["targets"]
    chosen = torch.from_numpy(np.random.default_rng(4).random(items) < 0.5)
    chosen[targets] = True
    return {"candidates": torch.nonzero(chosen).squeeze(1), "chunk": 5}


def _everything(inputs: Arguments) -> Arguments:
    return _candidates(inputs) | _excluded(inputs) | {"bias": _bias(inputs)["bias"]}


def _scale(arguments: Arguments) -> float:
    """Typical size of a logit of standard normal states and vectors."""
    return max(1.0, arguments["users"].shape[1] ** 0.5)


def _gradient_sizes(arguments: Arguments) -> dict[str, float]:
    """Probabilities minus the one of the target: nearly nothing where that is nearly 1."""
    tokens, dim = arguments["users"].shape
    size = (dim / tokens) ** 0.5
    return {"users": size, "items": size, "bias": tokens**-0.5}


def _reference(*arguments: Tensor, chunk: int | None = None, **options: Tensor) -> Tensor:
    return catalogue_cross_entropy_ref(*arguments, **options)


def _raw(case: Case, backend: str) -> tuple[Any, ...]:
    options = ("bias", "candidates", "excluded_values", "excluded_offsets")
    inputs = ("users", "items", "targets")
    return (
        *(case.arguments[name] for name in inputs),
        *(case.arguments.get(name) for name in options),
    )


def _ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


_PAIR = {"excluded_values": _ids(1), "excluded_offsets": _ids(0, 1, 1, 1, 1)}
ERRORS = (
    ErrorCase("width", {"users": torch.zeros(4, 2)}, ValueError, r"\[4, 2\] and \[5, 3\]"),
    ErrorCase("users_rank", {"users": torch.zeros(3)}, ValueError, r"users .* got \[3\]"),
    ErrorCase("items_rank", {"items": torch.zeros(3)}, ValueError, r"items .* \[3\]"),
    ErrorCase("no_item", {"items": torch.zeros(0, 3)}, ValueError, "at least one row"),
    ErrorCase("targets", {"targets": torch.zeros(3).long()}, ValueError, r"must be \[4\]"),
    ErrorCase(
        "no_token",
        {"users": torch.zeros(0, 3), "targets": torch.zeros(0).long()},
        ValueError,
        "T >= 1",
    ),
    ErrorCase("high_target", {"targets": _ids(0, 5, 1, 1)}, ValueError, r"0\.\.4, got 5"),
    ErrorCase("low_target", {"targets": _ids(0, 1, 1, -1)}, ValueError, r"0\.\.4, got -1"),
    ErrorCase("int32", {"targets": torch.zeros(4, dtype=torch.int32)}, TypeError, "int64"),
    ErrorCase("integer", {"users": torch.zeros(4, 3).long()}, TypeError, "float"),
    ErrorCase("bias", {"bias": torch.zeros(4)}, ValueError, r"bias must be \[5\], got \[4\]"),
    ErrorCase("not_a_tensor", {"bias": [0.0] * 5}, TypeError, "must be a Tensor"),
    ErrorCase("no_candidate", {"candidates": _ids()}, ValueError, "C >= 1"),
    ErrorCase("high_candidate", {"candidates": _ids(0, 1, 2, 3, 5)}, ValueError, "got 5"),
    ErrorCase("descending", {"candidates": _ids(0, 1, 3, 2, 4)}, ValueError, "got 2 after 3"),
    ErrorCase("repeated", {"candidates": _ids(0, 1, 1, 2, 3, 4)}, ValueError, "got 1 after 1"),
    ErrorCase(
        "missing_target",
        {"targets": _ids(0, 1, 4, 1), "candidates": _ids(0, 1)},
        ValueError,
        "among the candidates, got item 4",
    ),
    ErrorCase("no_offsets", {"excluded_values": _ids(1)}, ValueError, "given together"),
    ErrorCase("offsets", _PAIR | {"excluded_offsets": _ids(0, 1)}, ValueError, r"must be \[5\]"),
    ErrorCase(
        "short_offsets",
        _PAIR | {"excluded_offsets": _ids(0, 0, 0, 0, 0)},
        ValueError,
        "ascend from 0 to 1",
    ),
    ErrorCase(
        "falling_offsets",
        _PAIR | {"excluded_offsets": _ids(0, 1, 0, 1, 1)},
        ValueError,
        "ascend from 0 to 1",
    ),
    ErrorCase("high_excluded", _PAIR | {"excluded_values": _ids(5)}, ValueError, "got 5"),
    ErrorCase("chunk", {"chunk": 0}, ValueError, "chunk must be >= 1"),
    ErrorCase("device", {"items": torch.zeros(5, 3, device="meta")}, ValueError, "be on cpu"),
    ErrorCase("backend", {"backend": "fast"}, ValueError, "must be one of"),
)

CATALOGUE_LOSS = OpSpec(
    name="catalogue_loss",
    public=catalogue_cross_entropy,
    reference=_reference,
    make_inputs=_inputs,
    shapes=SHAPES,
    shape_text="T, N, D",
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    options=(
        Options("plain"),
        Options("bias", _bias),
        Options("excluded", _excluded),
        Options("candidates", _candidates),
        Options("everything", _everything),
    ),
    tolerances={torch.float64: Tolerance(1e-12, 1e-11), torch.float32: Tolerance(1e-6, 1e-5)},
    scale=_scale,
    gradient_sizes=_gradient_sizes,
    differentiable=("users", "items", "bias"),
    deciding=("users", "items"),
    backends=("reference", "native"),
    fixed=frozenset({"candidates", "excluded_offsets"}),
    raw_ops=(
        RawOp(torch.ops.padkern.catalogue_loss_value.default, _raw),
        RawOp(torch.ops.padkern.catalogue_loss_value_grad.default, _raw),
    ),
    errors=ERRORS,
    eager=_reference,
    heavy=frozenset({"segments", "wide", "pad_training"}),
    parallel_shapes=((700, 600, 40), (200, 9000, 24)),
    dynamic_shapes=((8, 11, 6), (17, 20, 6), (30, 33, 6), (41, 25, 6)),
    reference_compilations=4,  # its loop over chunks is unrolled
    check_shape=(7, 11, 5),
    far_shape=(100, 140, 4),
    error_shape=(4, 5, 3),
    random_most=(220, 300, 40),
    second_order=(),
)
