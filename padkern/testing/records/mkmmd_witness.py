"""Record of the mean of :func:`padkern.mkmmd_witness`. A shape is (q, n, m, D)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from padkern.ops.kernel_products import op  # noqa: F401 - registers the ops
from padkern.ops.mkmmd.reference import (
    DEFAULT_ALPHAS,
    mean_sq_distance,
    median_sq_distance,
)
from padkern.testing.mkmmd import Tolerance, make_mkmmd_inputs
from padkern.testing.opspec import Arguments, Case, ErrorCase, OpSpec, Options, RawOp, Shape
from padkern.two_sample import mkmmd_witness

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Blocks have 48 rows and strips 3072; vectors 2 to 16 lanes.
SHAPES: dict[str, Shape] = {
    "ones": (1, 1, 1, 1),
    "two": (2, 2, 2, 3),
    "one_query": (1, 40, 33, 5),
    "one_row": (7, 1, 13, 4),
    "one_column": (30, 21, 10, 1),
    "odd": (5, 7, 11, 9),
    "primes": (53, 101, 61, 31),
    "block_less_one": (47, 40, 7, 16),
    "block": (48, 24, 24, 64),
    "block_and_one": (49, 33, 64, 65),
    "depth_step": (20, 30, 40, 129),
    "very_wide": (3, 4, 5, 1030),
    "strips": (10, 3000, 80, 3),
    "many_queries": (3100, 12, 9, 2),
}


def _inputs(shape: Shape, dtype: torch.dtype, seed: int) -> Arguments:
    q, n, m, dim = shape
    source, target = make_mkmmd_inputs(n, m, dim, dtype, seed=seed)
    query, _ = make_mkmmd_inputs(q, n, dim, dtype, seed=seed + 1)
    return {"query": query, "source": source, "target": target}


def _just(**values: Any) -> Any:
    return lambda inputs: {k: v(inputs) if callable(v) else v for k, v in values.items()}


def _weights(dtype: torch.dtype, **more: Any) -> Any:
    def make(inputs: Arguments) -> Arguments:
        chosen = _just(**more)(inputs)
        for name in ("source", "target"):
            rows = len(inputs[name])
            values = np.random.default_rng(rows).uniform(0.1, 3.0, rows)
            values[3::7] = 0.0
            weight = torch.from_numpy(values)
            chosen[f"{name}_weight"] = weight > 0.0 if dtype == torch.bool else weight.to(dtype)
        return chosen

    return make


def _sigma(inputs: Arguments) -> Tensor:
    return torch.tensor(0.7 * inputs["query"].shape[1], dtype=torch.float64)


def _number(inputs: Arguments) -> float:
    return float(_sigma(inputs))


def _grid(make: Any) -> Any:
    """Options for kernels of the distance itself: rows that are equal or well apart."""

    def made(inputs: Arguments) -> Arguments:
        grid = {name: (2 * value).round() / 2 for name, value in inputs.items()}
        return grid | make(grid)

    return made


def _few(shape: Shape) -> bool:
    return shape[0] * (shape[1] + shape[2]) * shape[3] < 400_000


OPTIONS = (
    Options("default"),
    Options("weights", _weights(torch.float32)),
    Options("mask", _weights(torch.bool, sigma_sq=_number)),
    Options("median", _just(sigma_sq="median"), _few),
    Options("sigma", _just(sigma_sq=_sigma, alphas=(0.2, 1.0, 3.0))),
    Options("betas", _just(betas=(0.5, 1.0, 0.0, 2.0, -0.25))),
    Options("laplacian", _grid(_just(kernel="laplacian", sigma_sq=_sigma)), _few),
    Options("energy", _grid(_just(kernel="energy")), _few),
    Options("inverse_multiquadric", _weights(torch.float64, kernel="inverse_multiquadric")),
    Options("rational_quadratic", _just(kernel="rational_quadratic", sigma_sq=_sigma)),
)


def mean_witness(**arguments: Any) -> Tensor:
    """The mean over the queries, since most of the generic tests are for scalars."""
    return mkmmd_witness(**arguments).mean()


def _scale(arguments: Arguments) -> float:
    """Size of the two means: the number of kernels, and for energy the typical distance."""
    if arguments.get("kernel") == "energy":
        rows = [arguments[name].detach().cpu().double() for name in ("source", "target")]
        return max(1.0, float(mean_sq_distance(*rows).sqrt()))
    return float(len(arguments.get("alphas", DEFAULT_ALPHAS)))


def _gradient_sizes(arguments: Arguments) -> dict[str, float]:
    """A bandwidth moves each of the means by at most about 1 over itself."""
    value = arguments.get("sigma_sq")
    if not isinstance(value, Tensor):
        return {}
    return {"sigma_sq": _scale(arguments) / float(value.detach())}


def _smooth(arguments: Arguments) -> Arguments:
    """Rows that differ, and a bandwidth that is given."""
    shape = (len(arguments["query"]), len(arguments["source"]), len(arguments["target"]))
    changed = arguments | _inputs((*shape, arguments["query"].shape[1]), torch.float64, 1)
    if arguments.get("kernel") != "energy":
        changed["sigma_sq"] = torch.tensor(2.3, dtype=torch.float64)
    return changed


def _raw(case: Case, backend: str) -> tuple[Any, ...]:
    get = case.arguments.get
    query, source, target = (case.arguments[name] for name in ("query", "source", "target"))
    sigma_sq = get("sigma_sq")
    if get("kernel") == "energy":
        sigma_sq = torch.ones(())
    elif sigma_sq is None:
        sigma_sq = mean_sq_distance(source, target)
    elif isinstance(sigma_sq, str):
        sigma_sq = median_sq_distance(source, target)
    elif isinstance(sigma_sq, float):
        sigma_sq = torch.tensor(sigma_sq)
    alphas = [1.0] if get("kernel") == "energy" else list(get("alphas", DEFAULT_ALPHAS))
    betas = get("betas")
    return (
        *(query, source, source[:, :1], sigma_sq, alphas),
        *(None if betas is None else torch.tensor(betas), get("kernel", "gaussian")),
        *("value", 1, False, backend),
    )


_X, _Y = torch.zeros(4, 3), torch.ones(5, 3)
ERRORS = (
    ErrorCase("not_a_tensor", {"query": [[1.0]]}, TypeError, "query must be a Tensor"),
    ErrorCase("query_rank", {"query": _X[0]}, ValueError, r"query must have shape \[rows, D\]"),
    ErrorCase("query_width", {"query": _X[:, :2]}, ValueError, r"\[q, 3\], got \[4, 2\]"),
    ErrorCase("query_empty", {"query": _X[:0]}, ValueError, "query must not be empty"),
    ErrorCase("query_integer", {"query": _X.long()}, TypeError, "query must be float64"),
    ErrorCase("query_device", {"query": _X.to("meta")}, ValueError, "query must be on cpu"),
    ErrorCase("source_empty", {"source": _X[:0]}, ValueError, "source must not be empty"),
    ErrorCase("target_width", {"target": _Y[:, :2]}, ValueError, r"target .*\[m, 3\]"),
    ErrorCase("alphas", {"alphas": (1.0, -2.0)}, ValueError, "alphas must be positive"),
    ErrorCase("betas", {"betas": (1.0,)}, ValueError, r"betas must have shape \[5\]"),
    ErrorCase("kernel", {"kernel": "linear"}, ValueError, "kernel must be one of"),
    ErrorCase("sigma_zero", {"sigma_sq": 0.0}, ValueError, "sigma_sq must be positive"),
    ErrorCase("sigma_name", {"sigma_sq": "mean"}, ValueError, "sigma_sq .*'median', got 'mean'"),
    ErrorCase(
        "weight_shape", {"target_weight": torch.ones(4)}, ValueError, r"target_weight .*\[5\]"
    ),
    ErrorCase("weight_negative", {"source_weight": -torch.ones(4)}, ValueError, ">= 0, got -1"),
    ErrorCase("weight_empty", {"source_weight": torch.zeros(4)}, ValueError, "leave at least 1"),
    ErrorCase("backend", {"backend": "triton"}, ValueError, "backend must be one of auto"),
)

MKMMD_WITNESS = OpSpec(
    name="mkmmd_witness",
    public=mean_witness,
    reference=partial(mean_witness, backend="reference"),
    make_inputs=_inputs,
    shapes=SHAPES,
    shape_text="q, n, m, D",
    heavy=frozenset({"strips", "many_queries"}),
    dtypes=DTYPES,
    options=OPTIONS,
    # Per kernel.
    tolerances={torch.float64: Tolerance(2e-13, 1e-11), torch.float32: Tolerance(1e-6, 1e-5)},
    differentiable=("query", "source", "target", "sigma_sq"),
    deciding=("query", "source", "target"),
    backends=("reference", "native"),
    raw_ops=(RawOp(torch.ops.padkern.kernel_apply.default, _raw, DTYPES),),
    errors=ERRORS,
    scale=_scale,
    gradient_sizes=_gradient_sizes,
    smooth=_smooth,
    parallel_shapes=((400, 300, 240, 24), (20, 3500, 900, 16)),
    dynamic_shapes=((8, 11, 6, 5), (17, 20, 7, 5), (30, 33, 9, 5), (41, 25, 10, 5)),
    check_shape=(3, 4, 3, 2),
    error_shape=(4, 4, 5, 3),
    far_shape=(150, 3, 3, 3),
)
