"""Record of :func:`padkern.ops.gated_table.gated_table`. A shape is (E, N, d, bins)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from padkern.ops.gated_table import gated_table, gated_table_ref
from padkern.testing.mkmmd import Tolerance
from padkern.testing.opspec import Arguments, Case, ErrorCase, OpSpec, Options, RawOp, Shape

# Sizes 1 and 2, odd, prime, around the vector widths and the blocks of rows, and PAD's own.
SHAPES: dict[str, Shape] = {
    "ones": (1, 1, 1, 1),
    "two": (2, 2, 2, 2),
    "no_column": (2, 7, 0, 3),
    "one_column": (3, 9, 1, 2),
    "odd": (3, 31, 7, 5),
    "primes": (5, 37, 13, 7),
    "vector_less_one": (3, 40, 15, 11),
    "vector": (3, 40, 16, 11),
    "vector_and_one": (3, 41, 17, 11),
    "unrolled_and_one": (2, 30, 33, 3),
    "block_less_one": (2, 255, 4, 3),
    "block": (2, 256, 4, 3),
    "block_and_one": (2, 257, 4, 3),
    "many_experts": (16, 20, 3, 3),
    "many_bins": (3, 60, 8, 60),
    "pad": (3, 500, 64, 12),
}

_GATE = 2.0**-8


def _inputs(shape: Shape, dtype: torch.dtype, seed: int) -> Arguments:
    experts, rows, dim, bins = shape
    rng = np.random.default_rng([seed, *shape])
    return {
        "tables": torch.from_numpy(rng.normal(size=(experts, rows, dim))).to(dtype),
        # Small: under loss scaling a table gradient, gate x 65536, has to fit into float16.
        "gate": torch.from_numpy(rng.normal(size=(bins, experts)) * _GATE).to(dtype),
        "item_bins": torch.from_numpy(rng.integers(0, bins, rows)),
    }


def _one_bin(inputs: Arguments) -> Arguments:
    return {"item_bins": torch.zeros_like(inputs["item_bins"])}


def _scale(arguments: Arguments) -> float:
    return _GATE


def _gradient_sizes(arguments: Arguments) -> dict[str, float]:
    """A gate gradient is a sum of products that cancel."""
    return {"tables": 0.0, "gate": float(arguments["tables"][0].numel()) ** 0.5}


def _raw(case: Case, backend: str) -> tuple[Any, ...]:
    given = case.arguments
    # Copies: opcheck refuses views of one tensor in a list that an op may write to.
    tables = [table.clone() for table in given["tables"]]
    return tables, given["gate"], given["item_bins"]


def _raw_grad(case: Case, backend: str) -> tuple[Any, ...]:
    tables, *rest = _raw(case, backend)
    return torch.cat([2 * table for table in tables], 1), tables, *rest


ERRORS = (
    ErrorCase("high_bin", {"item_bins": torch.full((5,), 3)}, ValueError, "0..2, got 3"),
    ErrorCase("low_bin", {"item_bins": torch.full((5,), -1)}, ValueError, "0..2, got -1"),
    ErrorCase("far_bin", {"item_bins": torch.full((5,), 1 << 40)}, ValueError, "0..2"),
    ErrorCase("int32", {"item_bins": torch.zeros(5, dtype=torch.int32)}, TypeError, "int64"),
    ErrorCase("bins_rank", {"item_bins": torch.zeros(5, 1).long()}, ValueError, r"shape \[N\]"),
    ErrorCase("tables_rank", {"tables": torch.zeros(5, 3)}, ValueError, r"\[E, N, d\]"),
    ErrorCase("no_expert", {"tables": []}, ValueError, "1 to 16 experts, got 0"),
    ErrorCase("experts", {"tables": torch.zeros(17, 5, 3)}, ValueError, "got 17"),
    ErrorCase(
        "rows",
        {"tables": [torch.zeros(5, 3), torch.zeros(4, 3)]},
        ValueError,
        r"tables\[1\] must have shape \[5, d\], got \[4, 3\]",
    ),
    ErrorCase("gate", {"gate": torch.zeros(3, 3)}, ValueError, r"\[bins, 2\], got \[3, 3\]"),
    ErrorCase("integer", {"gate": torch.zeros(3, 2).long()}, TypeError, "float"),
    ErrorCase("not_a_tensor", {"gate": [[1.0]]}, TypeError, "must be a Tensor"),
    ErrorCase("device", {"tables": torch.zeros(2, 5, 3, device="meta")}, ValueError, "be on cpu"),
    ErrorCase("backend", {"backend": "fast"}, ValueError, "must be one of"),
)

GATED_TABLE = OpSpec(
    name="gated_table",
    public=gated_table,
    reference=gated_table_ref,
    make_inputs=_inputs,
    shapes=SHAPES,
    shape_text="E, N, d, bins",
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    options=(Options("plain"), Options("one_bin", _one_bin)),
    tolerances={torch.float64: Tolerance(1e-15, 1e-14), torch.float32: Tolerance(1e-6, 1e-6)},
    scale=_scale,
    gradient_sizes=_gradient_sizes,
    differentiable=("tables", "gate"),
    deciding=("tables",),
    backends=("reference", "native"),
    raw_ops=(
        RawOp(torch.ops.padkern.gated_table.default, _raw),
        RawOp(torch.ops.padkern.gated_table_grad.default, _raw_grad),
    ),
    errors=ERRORS,
    eager=gated_table_ref,
    parallel_shapes=((3, 3000, 64, 12), (2, 700, 130, 3)),
    dynamic_shapes=tuple((3, n, 6, 4) for n in (9, 20, 12, 40)),
    check_shape=(2, 5, 3, 3),
    far_shape=(2, 70, 4, 5),
    error_shape=(2, 5, 3, 3),
)
