"""The Triton backend of the catalogue loss against the reference; see ``triton_cases.py``."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, assert_case, assert_refuses, assert_same_bits, marks, on_device

from padkern.ops.catalogue_loss import catalogue_cross_entropy
from padkern.testing import LAYOUTS, Case, assert_matches, exact, run
from padkern.testing.records.catalogue_loss import CATALOGUE_LOSS

pytestmark = marks

# Several tiles of tokens and items, and several parts; what else is slow to interpret is left out.
SLOW = {"wide", "pad_training", "chunk_and_one", "blocks", "blocks_less_one", "segments"}
SHAPES = {name: shape for name, shape in CATALOGUE_LOSS.shapes.items() if name not in SLOW}
LARGE = {
    "large": (3098, 8347, 192),
    "few tokens": (40, 50_001, 384),
    "many tokens": (20_000, 300, 64),
    "not even": (1001, 1203, 100),
}
OPTIONS = {one.name: one for one in CATALOGUE_LOSS.options}


@pytest.mark.parametrize("shape", SHAPES if DEVICE == "cpu" else CATALOGUE_LOSS.shapes)
def test_shapes(shape):
    assert_case(CATALOGUE_LOSS, CATALOGUE_LOSS.shapes[shape])


@pytest.mark.skipif(DEVICE == "cpu", reason="too large to interpret")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("shape", LARGE)
def test_large_shapes(shape, options, dtype):
    assert_case(CATALOGUE_LOSS, LARGE[shape], dtype, options=OPTIONS[options])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", CATALOGUE_LOSS.dtypes, ids=str)
def test_dtypes_and_options(dtype, options):
    assert_case(CATALOGUE_LOSS, (67, 70, 19), dtype, options=OPTIONS[options])


@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tiles_of_a_part(dtype, options, monkeypatch):
    """Few processors make few parts, whose running maxima and cursors go on from tile to tile."""
    from padkern.ops.catalogue_loss import triton_impl

    monkeypatch.setattr(triton_impl, "PROCESSORS", 1)
    case = on_device(CATALOGUE_LOSS, (70, 389, 5), dtype, options=OPTIONS[options])
    # Later items have larger logits.
    case.arguments["items"].mul_(torch.linspace(0.1, 4, 389, device=DEVICE)[:, None])
    got, want = run(CATALOGUE_LOSS, case, "triton"), exact(CATALOGUE_LOSS, case)
    assert_matches(CATALOGUE_LOSS, case, got, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    case = on_device(CATALOGUE_LOSS, (9, 21, 6), torch.float32, layout, OPTIONS["everything"])
    got, want = run(CATALOGUE_LOSS, case, "triton"), exact(CATALOGUE_LOSS, case)
    assert_matches(CATALOGUE_LOSS, case, got, want)


def test_mixed_dtypes():
    case = on_device(CATALOGUE_LOSS, (9, 21, 6), options=OPTIONS["bias"])
    arguments = dict(case.arguments)
    arguments |= {"users": arguments["users"].bfloat16(), "bias": arguments["bias"].half()}
    case = Case(arguments, case.wanted, "mixed")
    got, want = run(CATALOGUE_LOSS, case, "triton"), exact(CATALOGUE_LOSS, case)
    assert_matches(CATALOGUE_LOSS, case, got, want)


def test_many_exclusions_of_one_token():
    """A token that leaves out all but its target has no loss; others are not disturbed."""
    case = on_device(CATALOGUE_LOSS, (5, 300, 4))
    everything = torch.arange(300, device=DEVICE).flip(0)
    case.arguments["excluded_values"] = torch.cat([everything[:3], everything, everything[100:]])
    offsets = torch.tensor([0, 3, 3, 303, 303, 503], device=DEVICE)
    case.arguments["excluded_offsets"] = offsets
    got, want = run(CATALOGUE_LOSS, case, "triton"), exact(CATALOGUE_LOSS, case)
    assert_matches(CATALOGUE_LOSS, case, got, want)
    assert (got.gradients["users"][2] == 0).all()


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_far_logits(offset):
    case = on_device(CATALOGUE_LOSS, (7, 200, 4))
    bias = torch.full((200,), offset, device=DEVICE)
    bias[::3] = -torch.inf
    case.arguments["targets"].fill_(4)
    got = run(CATALOGUE_LOSS, case._replace(arguments={**case.arguments, "bias": bias}), "triton")
    want = exact(CATALOGUE_LOSS, case._replace(arguments={**case.arguments, "bias": bias}))
    assert float(got.value) == pytest.approx(float(want.value), abs=1e-4)
    assert (got.gradients["items"][::3] == 0).all()


def test_a_part_of_minus_infinities_has_no_mass():
    case = on_device(CATALOGUE_LOSS, (3, 1000, 4))
    bias = torch.zeros(1000, device=DEVICE)
    bias[:700] = -torch.inf
    case.arguments["targets"].fill_(900)
    case.arguments["bias"] = bias
    got, want = run(CATALOGUE_LOSS, case, "triton"), exact(CATALOGUE_LOSS, case)
    assert float(got.value) == pytest.approx(float(want.value), rel=1e-6)
    case.arguments["bias"] = bias.fill_(-torch.inf)
    assert run(CATALOGUE_LOSS, case, "triton").value.isnan()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["users", "items"])
def test_nan_and_inf_give_nan(name, bad):
    case = on_device(CATALOGUE_LOSS, (6, 140, 3))
    case.arguments[name][-1, 1] = bad
    assert run(CATALOGUE_LOSS, case, "triton").value.isnan()


def test_an_excluded_item_may_hold_nan():
    case = on_device(CATALOGUE_LOSS, (2, 5, 3))
    case.arguments["items"][4] = float("nan")
    case.arguments["targets"].fill_(1)
    case.arguments["excluded_values"] = torch.tensor([4, 4], device=DEVICE)
    case.arguments["excluded_offsets"] = torch.tensor([0, 1, 2], device=DEVICE)
    assert run(CATALOGUE_LOSS, case, "triton").value.isfinite()


def test_a_certain_target_has_no_negative_loss():
    users = torch.full((3, 1), 30.0, device=DEVICE)
    items = torch.tensor([[3.0], [-3.0], [0.0]], device=DEVICE)
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert catalogue_cross_entropy(users, items, targets, backend="triton") == 0


def test_a_missing_target_gives_nan_on_a_device():
    from padkern.ops.catalogue_loss.triton_impl import catalogue_loss_value_grad_triton

    case = on_device(CATALOGUE_LOSS, (4, 9, 3))
    users, items, targets = case.arguments.values()
    bad = targets.clone()
    bad[2] = 1 << 40
    rest = (None, None, None, None)
    assert catalogue_loss_value_grad_triton(users, items, bad, *rest)[0].isnan()
    some = torch.tensor([0], device=DEVICE)
    rest = (None, some, None, None)
    assert catalogue_loss_value_grad_triton(users, items, targets * 0 + 3, *rest)[0].isnan()


@pytest.mark.skipif(DEVICE == "cuda", reason="the record's bad calls are on the CPU")
def test_bad_input_is_refused():
    assert_refuses(CATALOGUE_LOSS)


def test_same_inputs_same_bits(poisoned_empty):
    shape = (70, 300, 9) if DEVICE == "cpu" else (3000, 5000, 128)
    for options in ("plain", "everything"):
        assert_same_bits(CATALOGUE_LOSS, shape, OPTIONS[options])
