"""Record of :func:`padkern.ops.triple_expert.gated_bce_loss`.

A shape is (tokens, experts, d, items, negatives, bins).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from padkern.ops.triple_expert import gated_bce_loss, gated_bce_loss_ref
from padkern.testing.mkmmd import Tolerance
from padkern.testing.opspec import Arguments, Case, ErrorCase, OpSpec, Options, RawOp, Shape

# Sizes 0, 1 and 2, odd, prime, around the vector widths and token blocks, and PAD's own.
SHAPES: dict[str, Shape] = {
    "no_token": (0, 3, 4, 5, 1, 3),
    "ones": (1, 1, 1, 1, 1, 1),
    "one_token": (1, 3, 16, 2, 1, 2),
    "two_tokens": (2, 2, 2, 2, 2, 2),
    "no_column": (7, 3, 0, 4, 2, 2),
    "one_column": (9, 3, 1, 8, 3, 2),
    "odd": (31, 2, 15, 7, 2, 4),
    "primes": (37, 3, 13, 41, 5, 7),
    "vector_less_one": (32, 3, 15, 40, 3, 11),
    "vector": (33, 3, 16, 40, 3, 11),
    "vector_and_one": (33, 3, 17, 40, 3, 11),
    "unrolled_less_one": (20, 2, 63, 30, 1, 3),
    "unrolled": (20, 2, 64, 30, 1, 3),
    "unrolled_and_one": (20, 2, 65, 30, 1, 3),
    "block_less_one": (31, 3, 8, 20, 2, 3),
    "block": (64, 3, 8, 20, 2, 3),
    "block_and_one": (65, 3, 8, 20, 2, 3),
    "repeats": (64, 3, 128, 9, 1, 2),
    "many_negatives": (13, 3, 33, 300, 64, 12),
    "many_experts": (130, 16, 3, 20, 2, 3),
    "one_item": (40, 3, 8, 0, 2, 1),
    "many_bins": (50, 3, 8, 90, 2, 90),
    "very_wide": (3, 2, 1030, 5, 1, 2),
    "pad_training": (320, 3, 64, 500, 1, 10),
}


def _inputs(shape: Shape, dtype: torch.dtype, seed: int) -> Arguments:
    tokens, experts, dim, items, k, bins = shape
    rng = np.random.default_rng([seed, *shape])

    def values(*size: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=size)).to(dtype)

    def ids(high: int, *size: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, high + 1, size))

    return {
        "users": values(tokens, experts, dim),
        "item_tables": values(experts, items + 1, dim),
        "gate": values(bins, experts),
        "item_bins": ids(bins - 1, items + 1),
        "positives": ids(items, tokens),
        "negatives": ids(items, tokens, k),
    }


def _valid(inputs: Arguments) -> Arguments:
    valid = torch.from_numpy(np.random.default_rng(1).random(inputs["users"].shape[0]) < 0.6)
    valid[:1] = True
    return {"valid": valid}


# No float32 is 0.3: a weight that was rounded on its way shows in float64.
OPTIONS = (
    Options("all_tokens"),
    Options("weight", lambda inputs: {"positive_weight": 0.3}),
    Options("valid", _valid),
    Options("valid_and_weight", lambda inputs: _valid(inputs) | {"positive_weight": 2.7}),
)


def _scale(arguments: Arguments) -> float:
    """Typical size of a score of standard normal states, vectors and gates."""
    _, experts, dim = arguments["users"].shape
    return max(1.0, (experts * dim) ** 0.5)


def _gradient_sizes(arguments: Arguments) -> dict[str, float]:
    """The terms of positives and negatives cancel where the items are the same."""
    tokens, experts, dim = arguments["users"].shape
    return dict.fromkeys(("users", "item_tables", "gate"), (experts * dim / max(1, tokens)) ** 0.5)


def _raw(case: Case, backend: str) -> tuple[Any, ...]:
    names = ("users", "item_tables", "gate", "item_bins", "positives", "negatives")
    arrays = (*(case.arguments[name] for name in names), case.arguments.get("valid"))
    return (*arrays, case.arguments.get("positive_weight", 1.0))


_LONG = torch.int64
ERRORS = (
    ErrorCase("no_negative", {"negatives": torch.zeros(4, 0, dtype=_LONG)}, ValueError, "k >= 1"),
    ErrorCase("high_positive", {"positives": torch.full((4,), 6)}, ValueError, "0..5, got 6"),
    ErrorCase("low_positive", {"positives": torch.full((4,), -1)}, ValueError, "0..5, got -1"),
    ErrorCase("high_negative", {"negatives": torch.full((4, 2), 6)}, ValueError, "0..5, got 6"),
    ErrorCase("far_negative", {"negatives": torch.full((4, 2), 1 << 40)}, ValueError, "0..5"),
    ErrorCase("high_bin", {"item_bins": torch.full((6,), 3)}, ValueError, "0..2, got 3"),
    ErrorCase("low_bin", {"item_bins": torch.full((6,), -1)}, ValueError, "0..2, got -1"),
    ErrorCase("users_rank", {"users": torch.zeros(4, 3)}, ValueError, "users must have shape"),
    ErrorCase("experts", {"users": torch.zeros(4, 17, 2)}, ValueError, "1 to 16 experts"),
    ErrorCase("tables", {"item_tables": torch.zeros(2, 6, 2)}, ValueError, "must have shape"),
    ErrorCase("no_row", {"item_tables": torch.zeros(3, 0, 2)}, ValueError, "at least one row"),
    ErrorCase("gate", {"gate": torch.zeros(3, 2)}, ValueError, "must have shape"),
    ErrorCase("bins", {"item_bins": torch.zeros(5, dtype=_LONG)}, ValueError, "must have shape"),
    ErrorCase("positives", {"positives": torch.zeros(3, dtype=_LONG)}, ValueError, "shape"),
    ErrorCase("negatives", {"negatives": torch.zeros(3, 2, dtype=_LONG)}, ValueError, "shape"),
    ErrorCase("valid_shape", {"valid": torch.ones(3, dtype=torch.bool)}, ValueError, "shape"),
    ErrorCase("valid_dtype", {"valid": torch.ones(4)}, TypeError, "must be a bool"),
    ErrorCase("int32", {"positives": torch.zeros(4, dtype=torch.int32)}, TypeError, "int64"),
    ErrorCase("integer", {"users": torch.zeros(4, 3, 2, dtype=_LONG)}, TypeError, "float"),
    ErrorCase("not_a_tensor", {"gate": [[1.0]]}, TypeError, "must be a Tensor"),
    ErrorCase("device", {"gate": torch.zeros(3, 3, device="meta")}, ValueError, "must be on cpu"),
    ErrorCase("weight_zero", {"positive_weight": 0.0}, ValueError, "positive and finite, got 0"),
    ErrorCase("weight_low", {"positive_weight": -1e-9}, ValueError, "positive and finite"),
    ErrorCase("weight_inf", {"positive_weight": float("inf")}, ValueError, "positive and finite"),
    ErrorCase("weight_nan", {"positive_weight": float("nan")}, ValueError, "positive and finite"),
    ErrorCase("weight_bool", {"positive_weight": True}, TypeError, "a number, got bool"),
    ErrorCase("weight_tensor", {"positive_weight": torch.ones(())}, TypeError, "got Tensor"),
    ErrorCase("backend", {"backend": "fast"}, ValueError, "must be one of"),
)

GATED_BCE = OpSpec(
    name="gated_bce",
    public=gated_bce_loss,
    reference=gated_bce_loss_ref,
    make_inputs=_inputs,
    shapes=SHAPES,
    shape_text="tokens, experts, d, items, negatives, bins",
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    options=OPTIONS,
    tolerances={torch.float64: Tolerance(1e-12, 1e-11), torch.float32: Tolerance(1e-6, 1e-5)},
    scale=_scale,
    gradient_sizes=_gradient_sizes,
    differentiable=("users", "item_tables", "gate"),
    deciding=("users", "item_tables"),
    backends=("reference", "native"),
    raw_ops=(
        RawOp(torch.ops.padkern.gated_bce_value.default, _raw),
        RawOp(torch.ops.padkern.gated_bce_value_grad.default, _raw),
    ),
    errors=ERRORS,
    eager=gated_bce_loss_ref,
    parallel_shapes=((700, 3, 40, 200, 4, 11), (1000, 3, 64, 50, 1, 3)),
    dynamic_shapes=tuple((t, 3, 6, n, 2, 3) for t, n in ((8, 9), (17, 20), (30, 12), (21, 40))),
    check_shape=(5, 3, 3, 4, 2, 3),
    far_shape=(70, 3, 4, 60, 2, 5),
    error_shape=(4, 3, 2, 5, 2, 3),
)
