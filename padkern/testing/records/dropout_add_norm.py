"""Record of :func:`padkern.ops.dropout_add_norm.dropout_add_norm`.

A shape is (tokens, d). Where the sum is asked for too, the value is both, stacked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from padkern.ops.dropout_add_norm import dropout_add_norm, dropout_add_norm_ref
from padkern.testing.mkmmd import Tolerance
from padkern.testing.opspec import Arguments, Case, ErrorCase, OpSpec, Options, RawOp, Shape

# Sizes 0, 1 and 2, odd, prime, around the vector widths, the 64 channels that share their random
# counters and the blocks of rows, and PAD's own.
SHAPES: dict[str, Shape] = {
    "no_token": (0, 4),
    "ones": (1, 1),
    "twos": (2, 2),
    "one_channel": (9, 1),
    "odd": (31, 15),
    "primes": (37, 13),
    "vector_less_one": (5, 15),
    "vector": (5, 16),
    "vector_and_one": (5, 17),
    "counters_less_one": (6, 63),
    "counters": (6, 64),
    "counters_and_one": (6, 65),
    "block_less_one": (31, 8),
    "block": (32, 8),
    "block_and_one": (33, 8),
    "three_blocks": (70, 24),
    "wide": (3, 1030),
    "pad_training": (300, 128),
}


def _inputs(shape: Shape, dtype: torch.dtype, seed: int) -> Arguments:
    tokens, dim = shape
    rng = np.random.default_rng([seed, *shape])

    def values(*size: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=size)).to(dtype)

    return {
        "x": values(tokens, dim),
        "residual": values(tokens, dim),
        "weight": values(dim),
        "shift": values(dim),
    }


def _bias(inputs: Arguments) -> Arguments:
    x = inputs["x"]
    return {"bias": torch.linspace(-1.0, 1.0, x.shape[1]).to(x.dtype)}


_RULE = {"dropout": 0.3, "seed": 0x1234_5678_9ABC_DEF0, "step": 77}


def _numbered(inputs: Arguments) -> Arguments:
    ids = torch.arange(inputs["x"].shape[0]) * 3 + (1 << 33)
    return {"token_ids": ids, **_RULE, "dropout": 0.6}


OPTIONS = (
    Options("plain"),
    Options("bias", _bias),
    Options("dropout", lambda inputs: dict(_RULE)),
    Options("bias_and_dropout", lambda inputs: _bias(inputs) | _RULE | {"eps": 1e-6}),
    Options("no_residual", lambda inputs: {"residual": None, **_RULE}),
    Options("sum", lambda inputs: {"return_sum": True, **_RULE}),
    Options("sum_and_bias", lambda inputs: {"return_sum": True, **_bias(inputs)}),
    Options("token_ids", _numbered),
)


def _stacked(value: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return value if isinstance(value, Tensor) else torch.stack(value)


def _public(**arguments: Any) -> Tensor:
    return _stacked(dropout_add_norm(**arguments))


def _reference(**arguments: Any) -> Tensor:
    return _stacked(dropout_add_norm_ref(**arguments))


def _sums(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised sums in float64, their reciprocal deviations, and the weight."""
    given: Arguments = {
        name: value.detach().cpu() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    for name, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            given[name] = value.double()
    _, total = dropout_add_norm_ref(**(given | {"return_sum": True}))
    rate = (total.var(1, unbiased=False, keepdim=True) + arguments.get("eps", 1e-5)).rsqrt()
    return total, rate, given["weight"]


def _scale(arguments: Arguments) -> float:
    """Size of a row before its mean is taken off."""
    total, rate, weight = _sums(arguments)
    if not total.numel():
        return 1.0
    size = float((total.abs().amax(1, keepdim=True) * rate * weight).abs().max())
    return max(1.0, size) if size < float("inf") else 1.0


def _gradient_sizes(arguments: Arguments) -> dict[str, float]:
    """Norms of the terms: a row's mean and its part along the row cancel, and so do tokens."""
    total, rate, weight = _sums(arguments)
    if not total.numel():
        return {}
    keep = 1.0 / (1.0 - arguments.get("dropout", 0.0))
    slopes = keep * float((rate * weight).norm())
    sizes = dict.fromkeys(("x", "residual", "bias"), slopes)
    return sizes | {"weight": float((total * rate).norm()), "shift": total.numel() ** 0.5}


def _raw(case: Case, backend: str) -> tuple[Any, ...]:
    given = case.arguments
    names = ("x", "residual", "bias", "weight", "shift", "token_ids")
    rule = (given.get("dropout", 0.0), given.get("seed", 0), given.get("step", 0))
    keep = bool(given.get("return_sum", False))
    return (*(given.get(name) for name in names), given.get("eps", 1e-5), *rule, keep)


def _raw_grad(case: Case, backend: str) -> tuple[Any, ...]:
    given = case.arguments
    x = given["x"]
    stats = torch.stack([x.mean(1), x.var(1, unbiased=False).add(1e-5).rsqrt()], 1)
    rule = (given.get("dropout", 0.0), given.get("seed", 0), given.get("step", 0))
    d_sum = x if given.get("return_sum") else None
    saved = (x, d_sum, x * 0.5, stats, given["weight"], given.get("token_ids"))
    return (*saved, *rule, "bias" in given)


_X = torch.zeros(4, 3)
ERRORS = (
    ErrorCase("not_a_tensor", {"x": [[1.0]]}, TypeError, "must be a Tensor, got list"),
    ErrorCase("no_weight", {"weight": None}, TypeError, "must be a Tensor, got NoneType"),
    ErrorCase("integer", {"x": _X.long()}, TypeError, "must be float64"),
    ErrorCase("integer_shift", {"shift": _X[0].long()}, TypeError, "must be float64"),
    ErrorCase("rank", {"x": _X[0]}, ValueError, r"shape \[T, d\], got \[3\]"),
    ErrorCase("residual", {"residual": _X[:2]}, ValueError, "must have shape"),
    ErrorCase("weight", {"weight": torch.ones(2)}, ValueError, r"\[3\], got \[2\]"),
    ErrorCase("shift", {"shift": torch.ones(2)}, ValueError, r"\[3\], got \[2\]"),
    ErrorCase("bias", {"bias": torch.ones(4)}, ValueError, r"\[3\], got \[4\]"),
    ErrorCase("device", {"residual": _X.to("meta")}, ValueError, "must be on cpu, got meta"),
    ErrorCase("ids_dtype", {"token_ids": torch.zeros(4)}, TypeError, "must be an int64"),
    ErrorCase("ids_shape", {"token_ids": torch.zeros(3).long()}, ValueError, r"\[4\], got \[3\]"),
    ErrorCase("ids_low", {"token_ids": torch.full((4,), -1)}, ValueError, ">= 0, got -1"),
    ErrorCase("dropout_high", {"dropout": 1.0}, ValueError, "at least 0 and below 1, got 1"),
    ErrorCase("dropout_nan", {"dropout": float("nan")}, ValueError, "at least 0 and below 1"),
    ErrorCase("dropout_bool", {"dropout": True}, TypeError, "must be a number, got bool"),
    ErrorCase("seed", {"seed": 1 << 63}, ValueError, "must lie in 0.."),
    ErrorCase("step", {"step": -1}, ValueError, "must lie in 0..4294967295, got -1"),
    ErrorCase("eps", {"eps": -1.0}, ValueError, "at least 0, got -1"),
    ErrorCase("eps_text", {"eps": "small"}, TypeError, "must be a number, got str"),
    ErrorCase("backend", {"backend": "fast"}, ValueError, "must be one of"),
)

DROPOUT_ADD_NORM = OpSpec(
    name="dropout_add_norm",
    public=_public,
    reference=_reference,
    make_inputs=_inputs,
    shapes=SHAPES,
    shape_text="tokens, d",
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    options=OPTIONS,
    tolerances={torch.float64: Tolerance(2e-15, 1e-14), torch.float32: Tolerance(1e-6, 1e-6)},
    scale=_scale,
    gradient_sizes=_gradient_sizes,
    differentiable=("x", "residual", "weight", "shift", "bias"),
    deciding=("x", "residual"),
    backends=("reference", "native"),
    raw_ops=(
        RawOp(torch.ops.padkern.dropout_add_norm.default, _raw),
        RawOp(torch.ops.padkern.dropout_add_norm_grad.default, _raw_grad),
    ),
    errors=ERRORS,
    eager=_reference,
    parallel_shapes=((700, 40), (3000, 24)),
    dynamic_shapes=((8, 6), (17, 6), (30, 6), (41, 6)),
    check_shape=(5, 4),
    far_shape=(70, 5),
    error_shape=(4, 3),
)
