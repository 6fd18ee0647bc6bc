"""Input factories, op records and assertions shared by the tests and the benchmarks.

The records of the ops (:class:`OpSpec`) are in ``padkern.testing.records``.
"""

from padkern.testing.layouts import LAYOUTS, lay_out, reachable_offset
from padkern.testing.mkmmd import (
    MKMMD_TOLERANCES,
    assert_mkmmd_matches_reference,
    exact_mkmmd,
    make_golden_mkmmd_inputs,
    make_mkmmd_inputs,
    relative_error,
    value_and_gradients,
)
from padkern.testing.opspec import (
    Case,
    ErrorCase,
    OpSpec,
    Options,
    RawOp,
    Result,
    Tolerance,
    assert_matches,
    exact,
    run,
    run_eager,
    value_error,
)

__all__ = [
    "LAYOUTS",
    "MKMMD_TOLERANCES",
    "Case",
    "ErrorCase",
    "OpSpec",
    "Options",
    "RawOp",
    "Result",
    "Tolerance",
    "assert_matches",
    "assert_mkmmd_matches_reference",
    "exact",
    "exact_mkmmd",
    "lay_out",
    "make_golden_mkmmd_inputs",
    "make_mkmmd_inputs",
    "reachable_offset",
    "relative_error",
    "run",
    "run_eager",
    "value_and_gradients",
    "value_error",
]
