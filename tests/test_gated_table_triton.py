"""The Triton backend of the gated item matrix against the reference; see ``triton_cases.py``."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, assert_case, assert_refuses, assert_same_bits, marks, on_device

from padkern.ops.gated_table import gated_table
from padkern.testing import LAYOUTS, run
from padkern.testing.records.gated_table import GATED_TABLE

pytestmark = marks

LARGE = {"large": (3, 20011, 200, 12), "bins": (2, 5000, 48, 3000)}


@pytest.mark.parametrize("dtype", GATED_TABLE.dtypes, ids=str)
@pytest.mark.parametrize("shape", GATED_TABLE.shapes)
def test_shapes(shape, dtype):
    assert_case(GATED_TABLE, GATED_TABLE.shapes[shape], dtype)


@pytest.mark.skipif(DEVICE == "cpu", reason="too large to interpret")
@pytest.mark.parametrize("shape", LARGE)
def test_large_shapes(shape):
    assert_case(GATED_TABLE, LARGE[shape], torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    assert_case(GATED_TABLE, (3, 31, 7, 5), torch.float32, layout, GATED_TABLE.options[-1])


def test_no_row():
    tables, gate = torch.zeros(2, 0, 3, device=DEVICE), torch.ones(4, 2, device=DEVICE)
    bins = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    gate.requires_grad_()
    out = gated_table(tables, gate, bins, backend="triton")
    assert out.shape == (0, 6)
    out.sum().backward()
    assert (gate.grad == 0).all()


def test_widths_and_dtypes_may_differ():
    case = on_device(GATED_TABLE, (3, 33, 6, 4))
    first, second, third = case.arguments.pop("tables").unbind(0)
    tables = [first[:, :5].half(), second[:, :1], third.double()]
    leaves = [table.detach().requires_grad_() for table in tables]
    values = []
    for backend in ("triton", "reference"):
        out = gated_table(leaves, **case.arguments, backend=backend)
        weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape)
        values.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for got, want in zip(*values, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


def test_a_nan_stays_in_its_bin():
    case = on_device(GATED_TABLE, (2, 300, 5, 4))
    case.arguments["tables"][1, 7, 2] = float("nan")
    own = int(case.arguments["item_bins"][7])
    gradient = run(GATED_TABLE, case, "triton").gradients["gate"]
    assert gradient[own, 1].isnan()
    assert gradient.isnan().sum() == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="the record's bad calls are on the CPU")
def test_bad_input_is_refused():
    assert_refuses(GATED_TABLE)


def test_same_inputs_same_bits(poisoned_empty):
    assert_same_bits(GATED_TABLE, (3, 300, 20, 5) if DEVICE == "cpu" else (3, 9000, 128, 12))
