"""Record of :func:`padkern.ops.linear.linear`. A shape is (tokens, in, out)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from padkern.ops.linear import linear, linear_ref
from padkern.testing.mkmmd import Tolerance
from padkern.testing.opspec import (
    Arguments,
    Case,
    ErrorCase,
    OpSpec,
    Options,
    RawOp,
    Shape,
    weights_of,
)

# Sizes 0, 1 and 2, odd, prime, around the vector widths, the panels of 6 to 48 columns, the 64 rows
# of a task, the 128 terms that are rounded together and the stretches of the weight's gradient.
SHAPES: dict[str, Shape] = {
    "no_token": (0, 3, 4),
    "no_input": (3, 0, 4),
    "no_output": (3, 4, 0),
    "ones": (1, 1, 1),
    "twos": (2, 2, 2),
    "odd": (31, 15, 9),
    "primes": (37, 13, 7),
    "vector_less_one": (5, 15, 15),
    "vector": (5, 16, 16),
    "vector_and_one": (5, 17, 17),
    "panel_less_one": (9, 47, 47),
    "panel": (9, 48, 48),
    "panel_and_one": (9, 49, 49),
    "task_less_one": (63, 8, 6),
    "task": (64, 8, 6),
    "task_and_one": (65, 8, 70),
    "terms": (7, 128, 5),
    "terms_and_one": (129, 129, 5),
    "stretches": (1030, 6, 5),
    "deep": (3, 1030, 4),
    "pad_block": (300, 64, 192),
}


def _inputs(shape: Shape, dtype: torch.dtype, seed: int) -> Arguments:
    tokens, width, out = shape
    rng = np.random.default_rng([seed, *shape])

    def values(*size: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=size)).to(dtype)

    return {"x": values(tokens, width), "weight": values(out, width)}


def _bias(inputs: Arguments) -> Arguments:
    weight = inputs["weight"]
    return {"bias": torch.linspace(-1.0, 1.0, weight.shape[0]).to(weight.dtype)}


OPTIONS = (
    Options("plain"),
    Options("bias", _bias),
    Options("relu", lambda inputs: {"relu": True}),
    Options("bias_and_relu", lambda inputs: _bias(inputs) | {"relu": True}),
)


def _given(arguments: Arguments) -> Arguments:
    return {k: v.detach().cpu().double() for k, v in arguments.items() if isinstance(v, Tensor)}


# Up to so many terms round to less than the tolerance even where they are equal, and all roundings
# go in one direction.
_TERMS = 16


def _scale(arguments: Arguments) -> float:
    """Size of a sum's terms, for each sixteen of them."""
    given = _given(arguments)
    x, weight = given["x"], given["weight"]
    if not (x.numel() and weight.numel()):
        return 1.0
    size = float((x.abs() @ weight.abs().T).max()) * max(1.0, x.shape[1] / _TERMS)
    return max(1.0, size) if size < float("inf") else 1.0


def _gradient_sizes(arguments: Arguments) -> dict[str, float]:
    """Norms of the terms that the gradients sum up: tokens and outputs cancel."""
    given = _given(arguments)
    x, weight = given["x"], given["weight"]
    above = weights_of(torch.empty(x.shape[0], weight.shape[0], dtype=torch.float64)).abs()
    return {
        "x": float((above @ weight.abs()).norm()),
        "weight": float((above.T @ x.abs()).norm()),
        "bias": float(above.sum(0).norm()),
    }


def _raw(case: Case, backend: str) -> tuple[object, ...]:
    given = case.arguments
    return (given["x"], given["weight"], given.get("bias"), bool(given.get("relu", False)))


def _raw_grad(case: Case, backend: str) -> tuple[object, ...]:
    given = case.arguments
    x, weight = given["x"].detach(), given["weight"].detach()
    d_y = torch.ones(x.shape[0], weight.shape[0], dtype=x.dtype)
    y = linear_ref(x, weight, None, True) if given.get("relu") else None
    return (d_y, x, weight, y, [True, True, "bias" in given])


_X = torch.zeros(4, 3)
_W = torch.zeros(2, 3)
ERRORS = (
    ErrorCase("not_a_tensor", {"x": [[1.0]]}, TypeError, "x must be a Tensor, got list"),
    ErrorCase("integer", {"x": _X.long()}, TypeError, "must be float64"),
    ErrorCase("rank", {"x": _X[0]}, ValueError, r"shape \[T, in\], got \[3\]"),
    ErrorCase("width", {"weight": _W[:, :2]}, ValueError, r"shape \[out, 3\], got \[2, 2\]"),
    ErrorCase("weight_rank", {"weight": _W[0]}, ValueError, r"shape \[out, 3\], got \[3\]"),
    ErrorCase("bias", {"bias": torch.zeros(3)}, ValueError, r"shape \[2\], got \[3\]"),
    ErrorCase("device", {"weight": _W.to("meta")}, ValueError, "on cpu like x, got meta"),
    ErrorCase("backend", {"backend": "fast"}, ValueError, "must be one of"),
)

LINEAR = OpSpec(
    name="linear",
    public=linear,
    reference=linear_ref,
    make_inputs=_inputs,
    shapes=SHAPES,
    shape_text="tokens, in, out",
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    options=OPTIONS,
    tolerances={torch.float64: Tolerance(2e-15, 1e-14), torch.float32: Tolerance(1e-6, 1e-6)},
    scale=_scale,
    gradient_sizes=_gradient_sizes,
    differentiable=("x", "weight", "bias"),
    deciding=("x", "weight"),
    backends=("reference", "native"),
    raw_ops=(
        RawOp(torch.ops.padkern.linear.default, _raw),
        RawOp(torch.ops.padkern.linear_grad.default, _raw_grad),
    ),
    errors=ERRORS,
    eager=linear_ref,
    parallel_shapes=((700, 40, 30), (3000, 24, 50)),
    dynamic_shapes=((8, 6, 5), (17, 6, 5), (30, 6, 5), (41, 6, 5)),
    check_shape=(5, 4, 3),
    far_shape=(70, 5, 3),
    error_shape=(4, 3, 2),
    second_order=("reference", "native"),
    smooth=lambda arguments: arguments | {"relu": False},
)
