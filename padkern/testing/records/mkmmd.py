"""Record of :func:`padkern.mkmmd_loss`. A shape is (n, m, D)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from padkern import _validation, functional, modules
from padkern.ops.mkmmd import reference
from padkern.ops.mkmmd.reference import DEFAULT_ALPHAS
from padkern.testing.mkmmd import Tolerance, make_mkmmd_inputs
from padkern.testing.opspec import Arguments, Case, ErrorCase, OpSpec, Options, RawOp, Shape
from padkern.testing.records.mkmmd_options import (
    BOTH,
    DTYPES,
    apart,
    bandwidth,
    just,
    repeats,
    vector,
    weights,
)

# Sizes 1 and 2, odd, prime, one below, at and above the widths of vectors, register tiles and
# blocks, real ones of PAD training, and extreme aspect.
SHAPES: dict[str, Shape] = {
    "two_rows_one_column": (2, 2, 1),
    "one_row_each": (1, 1, 3),
    "one_source_row": (1, 4, 2),
    "one_target_row": (3, 1, 16),
    "two_and_three": (2, 3, 8),
    "one_column": (40, 33, 1),
    "odd": (7, 11, 5),
    "small_primes": (13, 29, 17),
    "primes": (97, 101, 31),
    "panel_less_one": (23, 47, 15),
    "panel": (24, 48, 16),
    "panel_and_one": (25, 49, 33),
    "half_block_less_one": (95, 95, 64),
    "half_block": (96, 96, 32),
    "half_block_and_one": (97, 97, 63),
    "block_less_one": (191, 50, 65),
    "block": (192, 192, 24),
    "block_and_one": (193, 50, 128),
    "cut_changes": (481, 96, 48),
    "many_blocks": (487, 521, 7),
    "wide": (5, 200, 257),
    "very_wide": (3, 4, 1030),
    "two_against_many": (2, 900, 4),
    "pad_training": (672, 672, 128),
    "large_blocks": (20, 1600, 16),
    "large_blocks_with_edges": (1537, 20, 5),
}
HEAVY = frozenset({"many_blocks", "pad_training", "large_blocks", "large_blocks_with_edges"})


def _inputs(shape: Shape, dtype: torch.dtype, seed: int) -> Arguments:
    n, m, dim = shape
    source, target = make_mkmmd_inputs(n, m, dim, dtype, seed=seed)
    return {"source": source, "target": target}


def _pairs(shape: Shape) -> bool:
    return min(shape[:2]) >= 2


def _equal(shape: Shape) -> bool:
    return shape[0] == shape[1] >= 2


def _few(shape: Shape) -> bool:
    # The reference of these kernels holds all differences of rows.
    return (shape[0] + shape[1]) ** 2 * shape[2] < 12_000_000


def _few_pairs(shape: Shape) -> bool:
    return _pairs(shape) and _few(shape)


_NUMBER = bandwidth(None)
_SIGMA = bandwidth(torch.float64)
_BETAS = vector(torch.float64, 0.3, -0.5, 2.0)
_POSITIVE = vector(torch.float32, 0.3, 0.5, 2.0)
_ALPHAS = vector(torch.float64, 0.2, 1.0, 3.0)

OPTIONS = (
    Options("unbiased", fits=_pairs),
    Options("biased", just(estimator="biased")),
    Options("tllib", just(estimator="tllib"), _equal),
    Options("weights", weights(torch.float32, BOTH), _pairs),
    Options("mask", weights(torch.bool, ("source",), estimator="biased", sigma_sq=_NUMBER)),
    Options(
        "half_weights",
        weights(torch.bfloat16, ("target",), sigma_sq="median", alphas=(1.0,)),
        _pairs,
        compiles=False,  # the median of the rows in use: a shape that depends on the data
    ),
    Options("double_weights", weights(torch.float64, BOTH, sigma_sq=_SIGMA, estimator="biased")),
    Options("median", just(sigma_sq="median"), _pairs),
    Options("float_sigma", just(sigma_sq=bandwidth(torch.float32, 1), estimator="biased")),
    Options("alphas", just(alphas=(0.1, 0.7, 3.0), sigma_sq=_NUMBER), _pairs),
    Options("long_ladder", just(alphas=tuple(2.0**k for k in range(-6, 7)), estimator="biased")),
    Options("betas", just(betas=(0.5, 1.0, 0.0, 2.0, -0.25)), _pairs),
    Options("learned", just(alphas=_ALPHAS, betas=_BETAS, sigma_sq=_SIGMA), _pairs),
    Options(
        "learned_biased",
        just(alphas=_ALPHAS, betas=_POSITIVE, estimator="biased"),
    ),
    Options("repeats", repeats(just(sigma_sq="median")), _pairs),
    Options("laplacian_repeats", apart(repeats(just(kernel="laplacian"))), _few_pairs),
    Options("energy_repeats", apart(repeats(just(kernel="energy", estimator="biased"))), _few),
    Options("laplacian", apart(just(kernel="laplacian")), _few_pairs),
    Options(
        "laplacian_learned",
        apart(weights(torch.float32, BOTH, kernel="laplacian", alphas=_ALPHAS, sigma_sq=_SIGMA)),
        _few_pairs,
    ),
    Options(
        "inverse_multiquadric",
        weights(torch.bool, BOTH, kernel="inverse_multiquadric", sigma_sq=_SIGMA),
        _pairs,
    ),
    Options(
        "inverse_multiquadric_learned",
        just(kernel="inverse_multiquadric", alphas=_ALPHAS, betas=_BETAS, estimator="biased"),
    ),
    Options("rational_quadratic", just(kernel="rational_quadratic", estimator="tllib"), _equal),
    Options(
        "rational_quadratic_learned",
        weights(
            torch.float32,
            ("target",),
            kernel="rational_quadratic",
            alphas=_ALPHAS,
            betas=_BETAS,
            sigma_sq=_SIGMA,
        ),
        _pairs,
    ),
    Options("energy", apart(just(kernel="energy")), _few_pairs),
    Options(
        "energy_weights",
        apart(weights(torch.float32, BOTH, kernel="energy", estimator="biased")),
        _few,
    ),
)


def _scale(arguments: Arguments) -> float:
    """Number of kernels, with their weights; for energy the typical distance."""
    if arguments.get("kernel") == "energy":
        rows = [arguments[name].detach().cpu().double() for name in BOTH]
        return float(reference.mean_sq_distance(*rows).sqrt())
    alphas, betas = arguments.get("alphas", DEFAULT_ALPHAS), arguments.get("betas")
    if betas is None:
        return float(len(alphas))
    return float(sum(abs(float(beta)) for beta in betas))


def _gradient_sizes(arguments: Arguments) -> dict[str, float]:
    """A parameter moves each of the loss's means by at most about 1 over itself."""
    scale = _scale(arguments)
    return {
        name: scale / float(value.detach().abs().max())
        for name in ("sigma_sq", "alphas", "betas")
        if isinstance(value := arguments.get(name), Tensor)
    }


def _smooth(arguments: Arguments) -> Arguments:
    """Rows that differ, and a bandwidth that is given."""
    (n, dim), m = arguments["source"].shape, len(arguments["target"])
    source, target = make_mkmmd_inputs(n, m, dim, torch.float64, seed=1)
    changed = arguments | {"source": source, "target": target}
    if arguments.get("kernel") != "energy" and not isinstance(arguments.get("sigma_sq"), Tensor):
        changed["sigma_sq"] = torch.tensor(2.3, dtype=torch.float64)
    return changed


def mkmmd_eager(source: Tensor, target: Tensor) -> Tensor:
    """The default loss as it is usually written, every step in the dtype of the inputs."""
    rows = torch.cat([source, target])
    distances = (rows[:, None] - rows[None]).square().sum(2)
    sigma_sq = distances.mean().detach()
    kernels = torch.stack(
        [torch.exp(-distances / (2 * alpha * sigma_sq)) for alpha in DEFAULT_ALPHAS]
    ).sum(0)
    n, m = len(source), len(target)

    def off_diagonal(block: Tensor, size: int) -> Tensor:
        return (block.sum() - block.diagonal().sum()) / (size * (size - 1))

    same = off_diagonal(kernels[:n, :n], n) + off_diagonal(kernels[n:, n:], m)
    return same - 2 * kernels[:n, n:].mean()


def _raw(case: Case, backend: str) -> tuple[Any, ...]:
    get = case.arguments.get
    source, target = case.arguments["source"], case.arguments["target"]
    row_weights = get("source_weight"), get("target_weight")
    sigma_sq = get("sigma_sq")
    if isinstance(sigma_sq, str):
        sigma_sq = reference.median_sq_distance(source, target, *row_weights)
    elif isinstance(sigma_sq, float):
        sigma_sq = torch.tensor(sigma_sq, dtype=torch.float64)
    alphas = (1.0,) if get("kernel") == "energy" else get("alphas", DEFAULT_ALPHAS)
    given = isinstance(alphas, Tensor)
    betas = _validation.check_betas(get("betas"), len(alphas), source)
    return (
        *(source, target, sigma_sq, *row_weights),
        *(alphas if given else None, betas, [] if given else list(alphas)),
        *(get("kernel", "gaussian"), get("estimator", "unbiased"), "float32", backend),
    )


def _raw_gradient(case: Case, backend: str) -> tuple[Any, ...]:
    return (*_raw(case, backend), "alphas" in case.wanted or "betas" in case.wanted)


def _raw_ops() -> tuple[RawOp, ...]:
    from padkern.ops.mkmmd import op  # noqa: F401 - registers them

    return (
        RawOp(torch.ops.padkern.mkmmd_value.default, _raw, DTYPES),
        RawOp(torch.ops.padkern.mkmmd_value_grad.default, _raw_gradient, DTYPES),
    )


_X, _Y = torch.zeros(4, 3), torch.ones(5, 3)
ERRORS = (
    ErrorCase("not_a_tensor", {"source": [[1.0]]}, TypeError, "source must be a Tensor"),
    ErrorCase("integer", {"target": _Y.long()}, TypeError, "target must be float64"),
    ErrorCase("complex", {"source": _X.to(torch.complex64)}, TypeError, "source must be float64"),
    ErrorCase("sparse", {"source": _X.to_sparse()}, TypeError, "source must be a dense tensor"),
    ErrorCase("rank", {"source": _X[0]}, ValueError, r"source must have shape \[rows, D\]"),
    ErrorCase("width", {"target": _Y[:, :2]}, ValueError, r"shape \[m, 3\], got \[5, 2\]"),
    ErrorCase("empty", {"source": _X[:0]}, ValueError, r"must not be empty, got shape \[0, 3\]"),
    ErrorCase("device", {"target": _Y.to("meta")}, ValueError, "target must be on cpu, got meta"),
    ErrorCase("one_row", {"target": _Y[:1]}, ValueError, "at least 2 rows"),
    ErrorCase("estimator", {"estimator": "v"}, ValueError, "must be one of unbiased.*'v'"),
    ErrorCase("cross_is_internal", {"estimator": "cross"}, ValueError, "must be one of"),
    ErrorCase("tllib_sizes", {"estimator": "tllib"}, ValueError, "equal sizes, got 4 .* and 5"),
    ErrorCase(
        "tllib_weight",
        {"estimator": "tllib", "target": _X, "source_weight": torch.ones(4)},
        ValueError,
        "takes no source_weight",
    ),
    ErrorCase("alphas_empty", {"alphas": ()}, ValueError, "must hold 1 to 64 values, got 0"),
    ErrorCase("alphas_many", {"alphas": [1.0] * 65}, ValueError, "1 to 64 values, got 65"),
    ErrorCase("alphas_negative", {"alphas": (1.0, -2.0)}, ValueError, "positive.*got -2"),
    ErrorCase("alphas_nan", {"alphas": (float("nan"),)}, ValueError, "positive.*got nan"),
    ErrorCase("alphas_type", {"alphas": 2.0}, TypeError, "got float"),
    ErrorCase("alphas_rank", {"alphas": torch.ones(2, 2)}, ValueError, r"got \[2, 2\]"),
    ErrorCase("alphas_integer", {"alphas": torch.ones(2).long()}, TypeError, "floating point"),
    ErrorCase("betas_count", {"betas": (1.0, 2.0)}, ValueError, r"shape \[5\].*got \[2\]"),
    ErrorCase("betas_infinite", {"betas": [float("inf")] * 5}, ValueError, "finite, got inf"),
    ErrorCase("betas_type", {"betas": "ones"}, TypeError, "numbers or a Tensor, got str"),
    ErrorCase("betas_integer", {"betas": torch.ones(5).long()}, TypeError, "floating point"),
    ErrorCase("kernel", {"kernel": "linear"}, ValueError, "must be one of gaussian.*'linear'"),
    ErrorCase(
        "energy_sigma", {"kernel": "energy", "sigma_sq": 1.0}, ValueError, "takes no sigma_sq"
    ),
    ErrorCase("energy_betas", {"kernel": "energy", "betas": (1.0,)}, ValueError, "takes no betas"),
    ErrorCase("sigma_zero", {"sigma_sq": 0.0}, ValueError, "positive and finite, got 0"),
    ErrorCase("sigma_infinite", {"sigma_sq": float("inf")}, ValueError, "finite, got inf"),
    ErrorCase("sigma_name", {"sigma_sq": "mean"}, ValueError, "'median', got 'mean'"),
    ErrorCase("sigma_bool", {"sigma_sq": True}, TypeError, "got bool"),
    ErrorCase("sigma_shape", {"sigma_sq": torch.ones(2)}, ValueError, r"one value.*\[2\]"),
    ErrorCase("sigma_integer", {"sigma_sq": torch.tensor(1)}, TypeError, "floating point"),
    ErrorCase("weight_shape", {"target_weight": torch.ones(4)}, ValueError, r"\[5\].*got \[4\]"),
    ErrorCase("weight_type", {"target_weight": [1.0] * 5}, TypeError, "Tensor or None, got list"),
    ErrorCase("weight_integer", {"source_weight": torch.ones(4).long()}, TypeError, "int64"),
    ErrorCase("weight_negative", {"source_weight": -torch.ones(4)}, ValueError, ">= 0, got -1"),
    ErrorCase("weight_empty", {"target_weight": torch.zeros(5)}, ValueError, "leave at least 2"),
    ErrorCase("precision", {"precision": "tf16"}, ValueError, "must be one of float32.*'tf16'"),
    ErrorCase("backend", {"backend": "fast"}, ValueError, "must be one of auto.*'fast'"),
)

MKMMD = OpSpec(
    name="mkmmd",
    public=functional.mkmmd_loss,
    reference=reference.mkmmd_loss_ref,
    make_inputs=_inputs,
    shapes=SHAPES,
    shape_text="n, m, D",
    heavy=HEAVY,
    dtypes=DTYPES,
    options=OPTIONS,
    # Per kernel.
    tolerances={torch.float64: Tolerance(2e-13, 1e-11), torch.float32: Tolerance(1e-6, 1e-5)},
    differentiable=("source", "target", "sigma_sq", "alphas", "betas"),
    deciding=("source", "target"),
    backends=("reference", "native"),
    raw_ops=_raw_ops(),
    errors=ERRORS,
    eager=mkmmd_eager,
    scale=_scale,
    gradient_sizes=_gradient_sizes,
    smooth=_smooth,
    parallel_shapes=((500, 640, 24), (700, 100, 128), (672, 672, 128)),
    dynamic_shapes=((8, 11, 6), (17, 20, 6), (30, 33, 6), (41, 25, 6)),
    check_shape=(5, 4, 3),
    far_shape=(200, 3, 3),
    error_shape=(4, 5, 3),
    modules=(
        modules.MKMMDLoss,
        partial(modules.MKMMDLoss, alphas=(1.0, 3.0), sigma_sq=2.0, estimator="tllib"),
    ),
)
