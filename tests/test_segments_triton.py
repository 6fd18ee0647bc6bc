"""The Triton backend of the segment sums against the reference: on a GPU, or in the interpreter.

``test_sequence_triton_interpreter.py`` starts these cases in Triton's interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from padkern.ops.segments import expand, segment_sum, segment_sum_ref
from padkern.testing import LAYOUTS, assert_matches, exact, run
from padkern.testing.records.segments import SEGMENT_SUM as SPEC

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = (
    []
    if INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available(), reason="torch finds no usable CUDA device"
        ),
    ]
)
OPTIONS = {options.name: options for options in SPEC.options}
SLOW = {"pad_training"} if INTERPRETED else set()


def check(shape, dtype=torch.float32, layout=LAYOUTS[0], options="grouped"):
    case = SPEC.case(shape, dtype, layout, OPTIONS[options], device=DEVICE)
    got = run(SPEC, case, "triton")
    assert_matches(SPEC, case, got._replace(value=got.value.cpu()), exact(SPEC, case))


@pytest.mark.parametrize("shape", [name for name in SPEC.shapes if name not in SLOW])
def test_shapes(shape, poisoned_empty):
    check(SPEC.shapes[shape])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, options):
    check(SPEC.shapes["odd"], dtype, options=options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    check((7, 30, 5), layout=layout)


@pytest.mark.skipif(INTERPRETED, reason="too slow in the interpreter")
@pytest.mark.parametrize("shape", [(4000, 10_000, 128), (3, 100_000, 64), (50_000, 60_000, 192)])
def test_large_shapes(shape):
    check(shape)
    check(shape, torch.bfloat16, options="repeated")


@pytest.mark.parametrize("count", [63, 64, 65, 300])
def test_pieces_by_themselves_change_no_bit(count, monkeypatch, poisoned_empty):
    """One program per segment, or one per piece and a sum of the pieces."""
    from padkern.ops.segments import triton_impl

    inputs = SPEC.make_inputs((3, count, 5), torch.float32, 0)
    values, slots, starts = (x.to(DEVICE) for x in inputs.values())
    results = []
    for few in (2**30, 0):
        monkeypatch.setattr(triton_impl, "_FEW_SLOTS", few)
        results.append(segment_sum(values, slots, starts, backend="triton"))
    assert torch.equal(*results)
    want = segment_sum_ref(values.double(), slots, starts)
    torch.testing.assert_close(results[0].double(), want, rtol=1e-5, atol=1e-5)


def test_a_slot_without_a_row_is_nan():
    values = torch.ones(4, 3, device=DEVICE)
    slots = torch.tensor([0, 1, 9, 2, -1], device=DEVICE)
    starts = torch.tensor([0, 2, 3, 4, 5], device=DEVICE)
    sums = segment_sum(values, slots, starts, backend="triton")
    assert torch.isnan(sums).any(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_expansion(dtype):
    inputs = SPEC.make_inputs((6, 40, 5), dtype, 0)
    values, slots, starts = (x.to(DEVICE) for x in inputs.values())
    rows = torch.empty_like(slots)
    rows[slots] = torch.repeat_interleave(torch.arange(6, device=DEVICE), starts.diff())
    table = torch.randn(6, 5, device=DEVICE).to(dtype).requires_grad_()
    out = expand(table, rows, slots, starts, backend="triton")
    assert torch.equal(out, table[rows])
    (got,) = torch.autograd.grad((out * values).sum(), table, create_graph=dtype == torch.float64)
    want = segment_sum_ref(values.double(), slots, starts)
    torch.testing.assert_close(got.detach().double(), want.to(dtype).double())
