"""The Triton backend of the gated loss against the reference; see ``triton_cases.py``."""

from __future__ import annotations

import math

import pytest
import torch
from triton_cases import DEVICE, assert_case, assert_refuses, assert_same_bits, marks, on_device

from padkern.ops.triple_expert import gated_bce_loss
from padkern.testing import LAYOUTS, Case, exact, run
from padkern.testing.records.gated_bce import GATED_BCE

pytestmark = marks

# Long runs of one item among others: several pieces, and their beginnings and ends.
LONG = (90, 2, 5, 1, 3, 2)
LARGE = {
    "large": (3001, 3, 128, 8347, 4, 12),
    "head": (5000, 3, 64, 2, 20, 3),
    "wide": (500, 16, 300, 100, 2, 5),
}


# Too slow to interpret, and another size stands for them.
SLOW = {"pad_training", "many_negatives", "many_experts"}
SHAPES = {name: shape for name, shape in GATED_BCE.shapes.items() if name not in SLOW}
SHAPES |= {"fewer_negatives": (5, 3, 33, 300, 17, 12), "more_experts": (20, 16, 3, 20, 2, 3)}


@pytest.mark.parametrize("shape", SHAPES if DEVICE == "cpu" else SHAPES | GATED_BCE.shapes)
def test_shapes(shape):
    assert_case(GATED_BCE, (SHAPES | dict(GATED_BCE.shapes))[shape])


@pytest.mark.skipif(DEVICE == "cpu", reason="too large to interpret")
@pytest.mark.parametrize("options", GATED_BCE.options, ids=lambda one: one.name)
@pytest.mark.parametrize("shape", LARGE)
def test_large_shapes(shape, options):
    assert_case(GATED_BCE, LARGE[shape], options=options)


@pytest.mark.parametrize("options", GATED_BCE.options, ids=lambda one: one.name)
@pytest.mark.parametrize("dtype", GATED_BCE.dtypes, ids=str)
@pytest.mark.parametrize("shape", ["odd", "block_and_one"])
def test_dtypes_and_options(shape, dtype, options):
    assert_case(GATED_BCE, GATED_BCE.shapes[shape], dtype, options=options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", GATED_BCE.options, ids=lambda one: one.name)
def test_long_runs_of_an_item(options, dtype):
    assert_case(GATED_BCE, LONG, dtype, options=options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    assert_case(GATED_BCE, (7, 2, 5, 9, 3, 4), layout=layout, options=GATED_BCE.options[-1])


def test_mixed_dtypes():
    case = on_device(GATED_BCE, (9, 3, 6, 20, 2, 4))
    arguments = dict(case.arguments)
    arguments |= {"users": arguments["users"].bfloat16(), "gate": arguments["gate"].half()}
    case = Case(arguments, case.wanted, "mixed")
    got, want = run(GATED_BCE, case, "triton"), exact(GATED_BCE, case)
    assert got.value.dtype == torch.float32
    assert float(got.value) == pytest.approx(float(want.value), rel=1e-6)
    for name, gradient in got.gradients.items():
        assert gradient.dtype == arguments[name].dtype
        torch.testing.assert_close(
            gradient.cpu().double(), want.gradients[name], rtol=1e-2, atol=1e-4
        )


@pytest.mark.parametrize("size", [1e-4, 30.0, 1e3])
def test_far_and_near_scores(size):
    case = on_device(GATED_BCE, (12, 2, 4, 10, 3, 2))
    case.arguments["users"].mul_(size)
    got, want = run(GATED_BCE, case, "triton"), exact(GATED_BCE, case)
    assert float(got.value) == pytest.approx(float(want.value), rel=2e-6)


def test_a_certain_loss_keeps_its_digits():
    users = torch.full((4, 1, 1), 1.0, device=DEVICE)
    tables = torch.tensor([[[12.0], [-12.0]]], device=DEVICE)
    gate, zeros = torch.ones(1, 1, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    arguments = (users, tables, gate, zeros[:2], zeros, zeros[:, None] + 1)
    got = gated_bce_loss(*arguments, backend="triton")
    assert float(got) == pytest.approx(2 * math.log1p(math.exp(-12)), rel=1e-6)


def test_what_is_not_valid_may_hold_anything():
    case = on_device(GATED_BCE, (30, 2, 5, 9, 2, 3), options=GATED_BCE.options[-1])
    want = run(GATED_BCE, case, "triton")
    case.arguments["users"][~case.arguments["valid"]] = float("nan")
    got = run(GATED_BCE, case, "triton")
    assert torch.equal(got.value, want.value)
    for name, gradient in want.gradients.items():
        assert torch.equal(got.gradients[name], gradient), name
    case.arguments["valid"].fill_(False)
    none = run(GATED_BCE, case, "triton")
    assert none.value == 0
    assert all((gradient == 0).all() for gradient in none.gradients.values())


def test_items_and_bins_without_a_candidate_get_an_exact_zero():
    case = on_device(GATED_BCE, (5, 2, 3, 40, 1, 3))
    used = torch.cat([case.arguments["positives"], case.arguments["negatives"].flatten()])
    free = torch.ones(41, dtype=torch.bool, device=DEVICE)
    free[used] = False
    case.arguments["item_tables"][:, free] = float("nan")
    case.arguments["item_bins"][free] = 2
    case.arguments["item_bins"][~free] = 1
    case.arguments["gate"][2] = float("nan")
    gradients = run(GATED_BCE, case, "triton").gradients
    assert (gradients["item_tables"][:, free] == 0).all()
    assert gradients["item_tables"].isfinite().all()
    assert (gradients["gate"][[0, 2]] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_not_hidden(bad):
    case = on_device(GATED_BCE, (6, 2, 3, 8, 2, 2))
    case.arguments["users"][3, 1, 1] = bad
    got = run(GATED_BCE, case, "triton")
    assert not got.value.isfinite()


def test_ids_out_of_range_give_nan_on_a_device():
    from padkern.ops.triple_expert.triton_impl import gated_bce_value_grad_triton

    case = on_device(GATED_BCE, (6, 2, 3, 8, 2, 2))
    for name, value in (("positives", 9), ("negatives", -1), ("item_bins", 1 << 40)):
        arguments = dict(case.arguments)
        arguments[name] = torch.full_like(arguments[name], value)
        results = gated_bce_value_grad_triton(*arguments.values(), None)
        assert results[0].isnan(), name
        assert results[1].isnan().any(), name


@pytest.mark.skipif(DEVICE == "cuda", reason="the record's bad calls are on the CPU")
def test_bad_input_is_refused():
    assert_refuses(GATED_BCE)


def test_same_inputs_same_bits(poisoned_empty):
    shape = (70, 3, 9, 5, 2, 3) if DEVICE == "cpu" else (3000, 3, 128, 300, 4, 12)
    for options in GATED_BCE.options:
        assert_same_bits(GATED_BCE, shape, options)
