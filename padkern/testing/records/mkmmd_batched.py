"""Record of :func:`padkern.mkmmd_loss_batched`. A shape is (B, n, m, D)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from padkern import estimators
from padkern.ops.mkmmd.reference import DEFAULT_ALPHAS, mean_sq_distance
from padkern.ops.mkmmd_batched import op  # noqa: F401 - registers the ops
from padkern.ops.mkmmd_batched.reference import mkmmd_batched_ref
from padkern.testing.mkmmd import Tolerance, make_mkmmd_inputs
from padkern.testing.opspec import Arguments, Case, ErrorCase, OpSpec, Options, RawOp, Shape
from padkern.testing.records.mkmmd_options import (
    BOTH,
    DTYPES,
    apart,
    bandwidth,
    just,
    weights,
)

SHAPES: dict[str, Shape] = {
    "one_problem": (1, 2, 2, 1),
    "one_row_each": (3, 1, 1, 3),
    "two": (2, 2, 3, 8),
    "odd": (3, 7, 5, 5),
    "primes": (5, 13, 29, 17),
    "one_column": (4, 11, 9, 1),
    "panel": (4, 24, 48, 16),
    "panel_and_one": (2, 25, 49, 33),
    "half_block_and_one": (2, 97, 50, 31),
    "block_and_one": (2, 193, 20, 32),
    "equal": (3, 32, 32, 8),
    "many_small": (70, 4, 3, 6),
    "wide": (2, 3, 5, 257),
    "two_against_many": (2, 2, 150, 4),
}


def _inputs(shape: Shape, dtype: torch.dtype, seed: int) -> Arguments:
    problems, n, m, dim = shape
    samples = [make_mkmmd_inputs(n, m, dim, dtype, seed=seed + 7 * b) for b in range(problems)]
    source, target = (torch.stack(rows) for rows in zip(*samples, strict=True))
    return {"source": source, "target": target}


def _ragged(make: Any, dtype: torch.dtype = torch.int64) -> Any:
    """Options with packed rows, cut into problems that differ in size."""

    def made(inputs: Arguments) -> Arguments:
        packed: Arguments = {}
        for name in BOTH:
            problems, rows, _ = inputs[name].shape
            sizes = torch.full((problems,), rows)
            if rows > 2:
                sizes[0 : problems - 1 : 2] -= 1
                sizes[1:problems:2] += 1
            packed[name] = inputs[name].flatten(0, 1)
            packed[f"{name}_offsets"] = torch.cat([torch.zeros(1), sizes.cumsum(0)]).to(dtype)
        return packed | make(packed)

    return made


def _own_bandwidths(inputs: Arguments) -> Tensor:
    if "source_offsets" in inputs:
        problems = len(inputs["source_offsets"]) - 1
    else:
        problems = len(inputs["source"])
    steps = torch.linspace(0.5, 1.0, problems, dtype=torch.float64)
    return steps * inputs["source"].shape[-1]


def _pairs(shape: Shape) -> bool:
    return min(shape[1:3]) >= 2


def _equal(shape: Shape) -> bool:
    return shape[1] == shape[2] >= 2


_NUMBER = bandwidth(None)
OPTIONS = (
    Options("unbiased", fits=_pairs),
    Options("biased", just(estimator="biased")),
    Options("tllib", just(estimator="tllib"), _equal),
    Options("weights", weights(torch.float32, BOTH), _pairs),
    Options("mask", weights(torch.bool, ("source",), estimator="biased", sigma_sq=_NUMBER)),
    Options("shared_sigma", just(sigma_sq=bandwidth(torch.float32, 1)), _pairs),
    Options("own_sigmas", just(sigma_sq=_own_bandwidths, estimator="biased")),
    Options("alphas", just(alphas=(0.1, 0.7, 3.0), sigma_sq=_own_bandwidths), _pairs),
    # The reference takes the problems of packed rows apart on the host.
    Options("ragged", _ragged(just(estimator="biased")), reference_compiles=False),
    Options(
        "ragged_unbiased",
        _ragged(just(sigma_sq=_own_bandwidths), torch.int32),
        _pairs,
        reference_compiles=False,
    ),
    Options("laplacian", apart(just(kernel="laplacian")), _pairs),
    Options("inverse_multiquadric", just(kernel="inverse_multiquadric", estimator="biased")),
    Options("rational_quadratic", just(kernel="rational_quadratic"), _pairs),
    Options(
        "energy",
        apart(_ragged(just(kernel="energy", estimator="biased"))),
        reference_compiles=False,
    ),
)


def _per_problem(sigma_sq: float | Tensor | None, problems: int) -> Tensor | None:
    if sigma_sq is None:
        return None
    if not isinstance(sigma_sq, Tensor):
        sigma_sq = torch.tensor(sigma_sq, dtype=torch.float64)
    return sigma_sq.reshape(-1).expand(problems)


def _packed(arguments: Arguments) -> tuple[dict[str, Any], int]:
    """The arguments with packed rows and weights, offsets and one bandwidth per problem."""
    packed = dict(arguments)
    for name in BOTH:
        if packed.get(f"{name}_offsets") is None:
            problems, rows, dim = packed[name].shape
            packed[name] = packed[name].reshape(-1, dim)
            packed[f"{name}_offsets"] = torch.arange(problems + 1) * rows
            if packed.get(f"{name}_weight") is not None:
                packed[f"{name}_weight"] = packed[f"{name}_weight"].reshape(-1)
    problems = len(packed["source_offsets"]) - 1
    packed["sigma_sq"] = _per_problem(packed.get("sigma_sq"), problems)
    return packed, problems


def _reference(**arguments: Any) -> Tensor:
    return mkmmd_batched_ref(**_packed(arguments)[0])


def _scale(arguments: Arguments) -> float:
    """Number of kernels; for energy the typical distance."""
    if arguments.get("kernel") == "energy":
        rows = [arguments[name].detach().cpu().double().flatten(0, -2) for name in BOTH]
        return float(mean_sq_distance(*rows).sqrt())
    return float(len(arguments.get("alphas", DEFAULT_ALPHAS)))


def _gradient_sizes(arguments: Arguments) -> dict[str, float]:
    """A bandwidth moves each of a loss's means by at most about 1 over itself."""
    sigma_sq = arguments.get("sigma_sq")
    if not isinstance(sigma_sq, Tensor):
        return {}
    own = sigma_sq.detach().double().reciprocal()
    return {"sigma_sq": _scale(arguments) * float(own.norm())}


def _smooth(arguments: Arguments) -> Arguments:
    """Rows that differ, and bandwidths that are given."""
    generator = torch.Generator().manual_seed(1)
    changed = dict(arguments)
    for name in BOTH:
        shape = arguments[name].shape
        changed[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    if arguments.get("kernel") != "energy" and not isinstance(arguments.get("sigma_sq"), Tensor):
        changed["sigma_sq"] = torch.tensor(2.3, dtype=torch.float64)
    return changed


def _raw(case: Case, backend: str) -> tuple[Any, ...]:
    packed, _ = _packed(case.arguments)
    # The native op takes [B, n, D] as it is.
    samples = [case.arguments[name] for name in BOTH]
    row_weights = [case.arguments.get(f"{name}_weight") for name in BOTH]
    offsets = [packed[f"{name}_offsets"] for name in BOTH]
    kernel = packed.get("kernel", "gaussian")
    alphas = [1.0] if kernel == "energy" else list(packed.get("alphas", DEFAULT_ALPHAS))
    most = [int(cuts.diff().max()) for cuts in offsets]
    estimator = packed.get("estimator", "unbiased")
    options = (alphas, kernel, estimator, *most, backend)
    return (*samples, *offsets, packed["sigma_sq"], *row_weights, *options)


_X, _Y = torch.zeros(2, 4, 3), torch.ones(2, 5, 3)
_CUTS = torch.tensor([0, 3, 8])
ERRORS = (
    ErrorCase("not_a_tensor", {"source": [[[1.0]]]}, TypeError, "must be a Tensor, got list"),
    ErrorCase("integer", {"target": _Y.long()}, TypeError, "target must be float64"),
    ErrorCase("sparse", {"source": _X.to_sparse()}, TypeError, "must be a dense tensor"),
    ErrorCase("rank", {"source": _X[0]}, ValueError, r"shape \[B, n, D\], got \[4, 3\]"),
    ErrorCase("width", {"target": _Y[..., :2]}, ValueError, r"\[2, m, 3\], got \[2, 5, 2\]"),
    ErrorCase("problems", {"target": _Y[:1]}, ValueError, r"\[2, m, 3\], got \[1, 5, 3\]"),
    ErrorCase("empty", {"source": _X[:, :0]}, ValueError, "must not be empty"),
    ErrorCase("one_row", {"target": _Y[:, :1]}, ValueError, "at least 2 rows"),
    ErrorCase("device", {"target": _Y.to("meta")}, ValueError, "must be on cpu, got meta"),
    ErrorCase("one_offsets", {"source_offsets": _CUTS}, ValueError, "given together"),
    ErrorCase(
        "offsets_start",
        {"source": _X[0], "target": _Y[0], "source_offsets": torch.tensor([1, 4])}
        | {"target_offsets": torch.tensor([0, 5])},
        ValueError,
        "source_offsets must start at 0, got 1",
    ),
    ErrorCase(
        "offsets_end",
        {"source": _X[0], "target": _Y[0], "source_offsets": torch.tensor([0, 4])}
        | {"target_offsets": torch.tensor([0, 4])},
        ValueError,
        "target_offsets must end at 5, the rows of target, got 4",
    ),
    ErrorCase(
        "offsets_fall",
        {"source": _X[0], "target": _Y[0], "source_offsets": torch.tensor([0, 5, 4])}
        | {"target_offsets": torch.tensor([0, 2, 5])},
        ValueError,
        "source_offsets must not decrease, got 4 after 5 at problem 1",
    ),
    ErrorCase(
        "offsets_float",
        {"source": _X[0], "target": _Y[0], "source_offsets": torch.tensor([0.0, 4.0])}
        | {"target_offsets": torch.tensor([0, 5])},
        TypeError,
        "source_offsets must be int32 or int64",
    ),
    ErrorCase("tllib_sizes", {"estimator": "tllib"}, ValueError, "equal sizes, got 4 .* and 5"),
    ErrorCase("estimator", {"estimator": "v"}, ValueError, "must be one of unbiased.*'v'"),
    ErrorCase("kernel", {"kernel": "linear"}, ValueError, "must be one of gaussian.*'linear'"),
    ErrorCase("alphas_tensor", {"alphas": torch.ones(2)}, TypeError, "sequence of numbers"),
    ErrorCase("alphas_negative", {"alphas": (-2.0,)}, ValueError, "positive.*got -2"),
    ErrorCase("sigma_median", {"sigma_sq": "median"}, ValueError, "as sigma_sq, got 'median'"),
    ErrorCase("sigma_count", {"sigma_sq": torch.ones(3)}, ValueError, r"\[2\], got \[3\]"),
    ErrorCase("sigma_zero", {"sigma_sq": 0.0}, ValueError, "positive and finite, got 0"),
    ErrorCase("weight_shape", {"target_weight": torch.ones(5)}, ValueError, r"got \[5\]"),
    ErrorCase("weight_negative", {"source_weight": -torch.ones(2, 4)}, ValueError, ">= 0"),
    ErrorCase("weight_empty", {"target_weight": torch.zeros(2, 5)}, ValueError, "at least 2"),
    ErrorCase("max_rows", {"max_rows": 0}, ValueError, "at least 1, got 0"),
    ErrorCase("backend", {"backend": "fast"}, ValueError, "must be one of auto.*'fast'"),
)

MKMMD_BATCHED = OpSpec(
    name="mkmmd_batched",
    public=estimators.mkmmd_loss_batched,
    reference=_reference,
    make_inputs=_inputs,
    shapes=SHAPES,
    shape_text="B, n, m, D",
    heavy=frozenset({"many_small"}),
    dtypes=DTYPES,
    options=OPTIONS,
    # Per kernel.
    tolerances={torch.float64: Tolerance(2e-13, 1e-11), torch.float32: Tolerance(1e-6, 1e-5)},
    differentiable=("source", "target", "sigma_sq"),
    deciding=BOTH,
    backends=("reference", "native"),
    fixed=frozenset({"source_offsets", "target_offsets"}),
    raw_ops=(
        RawOp(torch.ops.padkern.mkmmd_batched_value.default, _raw, DTYPES),
        RawOp(torch.ops.padkern.mkmmd_batched_value_grad.default, _raw, DTYPES),
    ),
    errors=ERRORS,
    scale=_scale,
    gradient_sizes=_gradient_sizes,
    smooth=_smooth,
    parallel_shapes=((16, 60, 40, 24), (3, 300, 200, 32)),
    dynamic_shapes=((2, 8, 11, 6), (3, 17, 20, 6), (2, 30, 33, 6), (3, 41, 25, 6)),
    reference_compilations=4,  # its loop over problems is unrolled
    check_shape=(2, 5, 4, 3),
    error_shape=(2, 4, 5, 3),
    random_most=(4, 30, 30, 30),
    far_shape=(60, 5, 4, 3),
)
