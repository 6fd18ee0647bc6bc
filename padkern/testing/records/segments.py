"""Record of :func:`padkern.ops.segments.segment_sum`. A shape is (segments, slots, d)."""

from __future__ import annotations

import numpy as np
import torch

from padkern.ops.segments import segment_sum, segment_sum_ref
from padkern.testing.mkmmd import Tolerance
from padkern.testing.opspec import Arguments, Case, ErrorCase, OpSpec, Options, RawOp, Shape

# Sizes 1 and 2, odd, prime, around the tickets (64 segments) and the pieces (64 slots), segments
# longer than many pieces, and PAD's own.
SHAPES: dict[str, Shape] = {
    "no_segment": (0, 0, 3),
    "no_slot": (4, 0, 3),
    "no_column": (4, 9, 0),
    "ones": (1, 1, 1),
    "two": (2, 2, 2),
    "one_column": (5, 9, 1),
    "odd": (7, 31, 5),
    "primes": (13, 101, 17),
    "ticket_less_one": (63, 80, 4),
    "ticket": (64, 80, 4),
    "ticket_and_one": (65, 80, 4),
    "piece_less_one": (1, 63, 8),
    "piece": (1, 64, 8),
    "piece_and_one": (1, 65, 8),
    "rows_of_a_step": (1, 8, 16),
    "long_segments": (3, 1100, 6),
    "wide": (5, 20, 130),
    "pad_training": (400, 700, 64),
}


def _inputs(shape: Shape, dtype: torch.dtype, seed: int) -> Arguments:
    segments, count, dim = shape
    count = count if segments else 0
    rng = np.random.default_rng([seed, *shape])
    # The same for every seed, so that two cases can be stacked. Few segments have most slots.
    drawn = np.random.default_rng(shape)
    owner = (drawn.random(count) ** 3 * segments).astype(np.int64)
    starts = np.zeros(segments + 1, dtype=np.int64)
    np.cumsum(np.bincount(owner, minlength=segments), out=starts[1:])
    return {
        "values": torch.from_numpy(rng.normal(size=(count, dim))).to(dtype),
        "slots": torch.from_numpy(np.argsort(owner, kind="stable")),
        "starts": torch.from_numpy(starts),
    }


def _repeated(inputs: Arguments) -> Arguments:
    """Rows that several segments share, and rows that none has."""
    return {"slots": inputs["slots"] // 2 * 2 % max(len(inputs["values"]), 1)}


def _scale(arguments: Arguments) -> float:
    """A sum is known to a rounding of the largest sum of its absolute values."""
    sizes = arguments["values"].detach().cpu().double().abs()
    slots, starts = (arguments[name].cpu() for name in ("slots", "starts"))
    sums = segment_sum_ref(sizes, slots, starts)
    size = float(sums.max()) if sums.numel() else 0.0
    return 1.0 + size if size < float("inf") else 1.0


def _raw(case: Case, backend: str) -> tuple[torch.Tensor, ...]:
    return tuple(case.arguments[name] for name in ("values", "slots", "starts"))


ERRORS = (
    ErrorCase("high_slot", {"slots": torch.tensor([0, 1, 7])}, ValueError, r"0\.\.2, got"),
    ErrorCase("low_slot", {"slots": torch.tensor([0, 1, -1])}, ValueError, r"0\.\.2, got"),
    ErrorCase("first", {"starts": torch.tensor([1, 2, 3])}, ValueError, "from 0 to the 3 slots"),
    ErrorCase("last", {"starts": torch.tensor([0, 2, 1 << 40])}, ValueError, "from 0 to the 3"),
    ErrorCase("fall", {"starts": torch.tensor([0, 4, 3])}, ValueError, "must not decrease"),
    ErrorCase("no_start", {"starts": torch.zeros(0).long()}, ValueError, r"\[U \+ 1\], got"),
    ErrorCase("starts_rank", {"starts": torch.zeros(3, 1).long()}, ValueError, "one dimension"),
    ErrorCase("int32", {"slots": torch.zeros(3, dtype=torch.int32)}, TypeError, "must be int64"),
    ErrorCase("integer", {"values": torch.zeros(3, 2).long()}, TypeError, "must be float64"),
    ErrorCase("rank", {"values": torch.zeros(3)}, ValueError, r"shape \[rows, d\], got \[3\]"),
    ErrorCase("not_a_tensor", {"values": [[1.0]]}, TypeError, "must be a Tensor, got list"),
    ErrorCase("device", {"slots": torch.zeros(3, device="meta").long()}, ValueError, "be on cpu"),
    ErrorCase("backend", {"backend": "fast"}, ValueError, "must be one of"),
)

SEGMENT_SUM = OpSpec(
    name="segment_sum",
    public=segment_sum,
    reference=segment_sum_ref,
    make_inputs=_inputs,
    shapes=SHAPES,
    shape_text="segments, slots, d",
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    options=(Options("grouped"), Options("repeated", _repeated)),
    tolerances={torch.float64: Tolerance(1e-15, 1e-15), torch.float32: Tolerance(5e-7, 5e-7)},
    scale=_scale,
    differentiable=("values",),
    backends=("reference", "native"),
    fixed=frozenset({"slots", "starts"}),
    raw_ops=(RawOp(torch.ops.padkern.segment_sum.default, _raw),),
    errors=ERRORS,
    eager=segment_sum_ref,
    parallel_shapes=((3000, 9000, 64), (5, 40_000, 24)),
    dynamic_shapes=tuple((u, 3 * u, 6) for u in (9, 20, 12, 40)),
    check_shape=(3, 7, 2),
    far_shape=(5, 70, 4),
    error_shape=(2, 3, 2),
    random_most=(40, 200, 40),
    second_order=("reference", "native"),
)
