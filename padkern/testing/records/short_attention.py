"""Record of :func:`padkern.ops.short_attention.short_attention`.

A shape is (sequences, longest, heads, d); the lengths are drawn from 0 to the longest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from padkern.ops.short_attention import short_attention, short_attention_ref
from padkern.testing.mkmmd import Tolerance
from padkern.testing.opspec import Arguments, Case, ErrorCase, OpSpec, Options, RawOp, Shape

# Sizes 1 and 2, odd, prime, around the vector widths, the four-row groups and the limit of 64
# tokens, and PAD's own.
SHAPES: dict[str, Shape] = {
    "no_sequence": (0, 1, 2, 4),
    "ones": (1, 1, 1, 1),
    "twos": (2, 2, 2, 2),
    "one_token": (3, 1, 2, 16),
    "odd": (5, 7, 3, 5),
    "primes": (7, 13, 3, 11),
    "no_head": (4, 3, 0, 8),
    "group_less_one": (3, 3, 2, 8),
    "group": (3, 4, 2, 8),
    "group_and_one": (3, 5, 2, 8),
    "keys_less_one": (3, 15, 2, 15),
    "keys": (3, 16, 2, 16),
    "keys_and_one": (3, 17, 2, 17),
    "two_vectors_less_one": (2, 31, 1, 31),
    "two_vectors": (2, 32, 1, 32),
    "two_vectors_and_one": (2, 33, 1, 33),
    "limit_less_one": (2, 63, 1, 40),
    "limit": (2, 64, 1, 48),
    "wide": (3, 6, 2, 130),
    "many_heads": (4, 9, 12, 3),
    "many_sequences": (60, 5, 2, 4),
    "pad_training": (24, 20, 2, 64),
}


def _inputs(shape: Shape, dtype: torch.dtype, seed: int) -> Arguments:
    sequences, longest, heads, dim = shape
    rng = np.random.default_rng([seed, *shape])
    # The same for every seed, so that two cases can be stacked.
    lengths = np.random.default_rng(shape).integers(0, longest + 1, sequences)
    lengths[:1] = longest
    offsets = np.zeros(sequences + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])

    def values() -> Tensor:
        return torch.from_numpy(rng.normal(size=(int(offsets[-1]), heads, dim))).to(dtype)

    return {"q": values(), "k": values(), "v": values(), "offsets": torch.from_numpy(offsets)}


def _bound(inputs: Arguments) -> Arguments:
    return {"longest": max(1, int(inputs["offsets"].diff().max())) if len(inputs["q"]) else 1}


OPTIONS = (
    Options("plain", _bound),
    Options("scale", lambda inputs: {"scale": 0.7} | _bound(inputs)),
    Options(
        "dropout",
        lambda inputs: {"dropout": 0.3, "seed": 0x1234_5678_9ABC_DEF0, "step": 77} | _bound(inputs),
    ),
    Options("heavy_dropout", lambda inputs: {"dropout": 0.9, "seed": 1, "scale": 0.2}),
)


def _score_scale(arguments: Arguments) -> float:
    return abs(arguments.get("scale", max(arguments["q"].shape[2], 1) ** -0.5))


def _scale(arguments: Arguments) -> float:
    """A score is known to a rounding of its largest possible size; so is the log of a weight."""
    norms = [arguments[x].detach().cpu().double().norm(dim=2) for x in ("q", "k")]
    if not norms[0].numel():
        return 1.0
    size = _score_scale(arguments) * float(norms[0].max()) * float(norms[1].max())
    return 1.0 + size if size < float("inf") else 1.0


def _gradient_sizes(arguments: Arguments) -> dict[str, float]:
    """Derivatives by the scores cancel: they sum to 0 over each query's keys."""
    tokens, heads, dim = arguments["q"].shape
    keep = 1.0 / (1.0 - arguments.get("dropout", 0.0))
    size = _scale(arguments) * keep * (tokens * heads * dim) ** 0.5
    scores = _score_scale(arguments) * max(dim, 1) ** 0.5
    return {"q": size * scores, "k": size * scores, "v": size}


def _raw(case: Case, backend: str) -> tuple[Any, ...]:
    given = case.arguments
    scale = given.get("scale", max(given["q"].shape[2], 1) ** -0.5)
    rest = (given.get("dropout", 0.0), given.get("seed", 0), given.get("step", 0))
    arrays = (given[name] for name in ("q", "k", "v", "offsets"))
    return (*arrays, scale, *rest, given.get("longest", 64))


def _raw_grad(case: Case, backend: str) -> tuple[Any, ...]:
    return (case.arguments["v"], *_raw(case, backend))


_Q = torch.zeros(7, 2, 3)


def _cuts(*values: int) -> dict[str, Tensor]:
    return {"offsets": torch.tensor(values)}


ERRORS = (
    ErrorCase("not_a_tensor", {"q": [[1.0]]}, TypeError, "must be a Tensor, got list"),
    ErrorCase("integer", {"v": _Q.long()}, TypeError, "must be float64"),
    ErrorCase("rank", {"q": _Q[0]}, ValueError, r"shape \[T, H, d\], got \[2, 3\]"),
    ErrorCase("keys", {"k": _Q[:3]}, ValueError, "must have shape"),
    ErrorCase("values", {"v": _Q[..., :2]}, ValueError, "must have shape"),
    ErrorCase("device", {"k": _Q.to("meta")}, ValueError, "must be on cpu, got meta"),
    ErrorCase("int32", {"offsets": torch.tensor([0, 7]).int()}, TypeError, "must be int64"),
    ErrorCase("offsets_rank", {"offsets": torch.zeros(2, 2).long()}, ValueError, r"\[B \+ 1\]"),
    ErrorCase("no_offsets", {"offsets": torch.zeros(0).long()}, ValueError, r"\[B \+ 1\]"),
    ErrorCase("start", _cuts(1, 1 << 30), ValueError, "must start at 0 and end at"),
    ErrorCase("end", _cuts(0, 1 << 30), ValueError, "must start at 0 and end at"),
    ErrorCase("dropout_high", {"dropout": 1.0}, ValueError, "at least 0 and below 1, got 1"),
    ErrorCase("dropout_low", {"dropout": -0.1}, ValueError, "at least 0 and below 1"),
    ErrorCase("dropout_text", {"dropout": "0.1"}, TypeError, "must be a number, got str"),
    ErrorCase("seed", {"seed": -1}, ValueError, "must lie in 0.."),
    ErrorCase("seed_float", {"seed": 1.5}, TypeError, "must be an int, got float"),
    ErrorCase("step", {"step": 1 << 32}, ValueError, "must lie in 0..4294967295"),
    ErrorCase("scale", {"scale": "big"}, TypeError, "must be a number or None"),
    ErrorCase("longest", {"longest": 0}, ValueError, "must be at least 1, got 0"),
    ErrorCase("backend", {"backend": "fast"}, ValueError, "must be one of"),
)

SHORT_ATTENTION = OpSpec(
    name="short_attention",
    public=short_attention,
    reference=short_attention_ref,
    make_inputs=_inputs,
    shapes=SHAPES,
    shape_text="sequences, longest, heads, d",
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    options=OPTIONS,
    # Of the size of the scores.
    tolerances={torch.float64: Tolerance(1e-15, 1e-15), torch.float32: Tolerance(5e-7, 5e-7)},
    scale=_scale,
    gradient_sizes=_gradient_sizes,
    differentiable=("q", "k", "v"),
    backends=("reference", "native"),
    fixed=frozenset({"offsets"}),
    raw_ops=(
        RawOp(torch.ops.padkern.short_attention.default, _raw),
        RawOp(torch.ops.padkern.short_attention_grad.default, _raw_grad),
    ),
    errors=ERRORS,
    eager=short_attention_ref,
    parallel_shapes=((40, 20, 2, 64), (9, 64, 3, 20)),
    dynamic_shapes=((3, 8, 2, 6), (4, 9, 2, 6), (5, 11, 2, 6), (6, 10, 2, 6)),
    reference_compilations=4,  # the width of its grid is a number in the code
    compilations=4,
    check_shape=(3, 5, 2, 3),
    far_shape=(8, 9, 2, 3),
    error_shape=(1, 7, 2, 3),
    random_most=(6, 64, 4, 40),
)
