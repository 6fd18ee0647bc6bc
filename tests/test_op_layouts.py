"""Every native op on memory laid out in every way, with offsets beyond 32 bits among them.

The cases come from the records in ``padkern.testing.records``; nothing here knows a particular op.
"""

from __future__ import annotations

import pytest
import torch

from padkern.testing import LAYOUTS, lay_out, reachable_offset, run
from padkern.testing.records import OP_SPECS

NATIVE = [spec for spec in OP_SPECS if "native" in spec.backends]
LIMIT = 2**31


def _name(spec):
    return spec.name


# ---- the layouts themselves ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(6,), (1,), (5, 4), (1, 7), (4, 1), (3, 2, 5)], ids=str)
def test_layouts_are_what_they_say(shape, dtype):
    tensor = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)
    made = {layout: lay_out(tensor, layout) for layout in LAYOUTS}
    for layout, view in made.items():
        assert view.shape == tensor.shape
        assert view.dtype == dtype
        assert torch.equal(view, tensor) or layout == "expanded"
    assert made["contiguous"].is_contiguous()
    assert made["misaligned"].storage_offset() == 1
    assert made["misaligned"].data_ptr() % 16 != 0
    assert made["expanded"].stride(-1) == 0 or shape[-1] == 1
    assert made["strided_last"].stride(-1) == 2
    assert made["every_second_row"].stride(0) == 2 * torch.Size(shape[1:]).numel()
    if len(shape) > 1:
        assert made["wider_buffer"].stride(-2) == shape[-1] + 5
        assert made["permuted"].stride(0) == 1 or shape[0] == 1
    if 1 in shape:
        assert max(made["huge_stride"].stride()) == 2**40
        assert reachable_offset(made["huge_stride"]) == reachable_offset(tensor)
    for layout in ("wider_buffer", "every_second_row", "strided_last"):
        base = made[layout]._base
        around = (base != base) if tensor.is_floating_point() else (base >= 2**40)
        assert dtype == torch.bool or int(around.sum()) == base.numel() - tensor.numel()


def test_reachable_offset():
    assert reachable_offset(torch.zeros(3, 4)) == 11
    assert reachable_offset(torch.zeros(1).expand(5, 6)) == 0
    assert reachable_offset(torch.empty(2**20, 2**13, device="meta")) == 2**33 - 1
    wide = torch.empty(10, 2**40, device="meta")[:, :3]
    assert reachable_offset(wide) == 9 * 2**40 + 2


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", NATIVE, ids=_name)
def test_layouts_change_no_bit(spec, native_core):
    """Also rows that are one row in memory; against contiguous copies of the same values."""
    for shape in (spec.shapes["primes"], spec.shapes["odd"]):
        for options in spec.options_at(shape):
            case = spec.case(shape, options=options)
            for name, value in case.arguments.items():
                if not isinstance(value, torch.Tensor) or value.dim() == 0:
                    continue
                views = {layout: lay_out(value, layout) for layout in LAYOUTS}
                views["one_row"] = value[:1].expand(value.shape)
                if name in spec.fixed:
                    del views["one_row"], views["expanded"]
                for layout, view in views.items():
                    results = []
                    for tensor in (view, view.contiguous()):
                        arguments = case.arguments | {name: tensor}
                        results.append(run(spec, case._replace(arguments=arguments), "native"))
                    _assert_same_bits(*results, f"{case.text} {name} {layout}")


def _assert_same_bits(got, want, text):
    assert torch.equal(got.value, want.value), text
    for name, gradient in want.gradients.items():
        assert torch.equal(got.gradients[name], gradient), f"{text}: gradient by {name}"


# ---- offsets beyond 32 bits ----------------------------------------------------------------------


def _far_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its rows so far apart that the last fourth is beyond 2^31 elements.

    Gigabytes of address space, of which only the pages of the rows are ever touched.
    """
    rows, row = tensor.shape[0], tensor[0].numel()
    stride = LIMIT // (3 * rows // 4) + 64
    try:
        flat = torch.empty((rows - 1) * stride + row, dtype=tensor.dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space for {rows} distant rows: {error}")
    view = flat.as_strided(tensor.shape, (stride, *tensor[0].contiguous().stride()))
    view.copy_(tensor)
    assert reachable_offset(view) >= LIMIT
    return view


@pytest.mark.parametrize("spec", NATIVE, ids=_name)
def test_offsets_beyond_32_bits(spec, native_core):
    """Each tensor in turn spread over more than 2^31 elements gives the bits of the dense one."""
    shape = spec.far_shape
    spread = 0
    for options in spec.options_at(shape)[:6]:
        for dtype in (torch.float32, torch.bfloat16):
            case = spec.case(shape, dtype, options=options)
            want = run(spec, case, "native")
            for name, value in case.arguments.items():
                if not isinstance(value, torch.Tensor) or value.dim() == 0 or len(value) < 2:
                    continue
                arguments = case.arguments | {name: _far_apart(value)}
                got = run(spec, case._replace(arguments=arguments), "native")
                _assert_same_bits(got, want, f"{case.text} {name}")
                spread += 1
    assert spread >= 8


def test_workspace_sizes_beyond_32_bits(native_core):
    """2^20 rows of 2^13 float32: the packed rows alone take 2^35 bytes."""
    sizes = (2**20, 2, 2**13)
    value = native_core.mkmmd_workspace_bytes(0, 0, 0, *sizes, 0)
    gradient = native_core.mkmmd_workspace_bytes(0, 0, 0, *sizes, 2**13)
    assert 2**35 <= value <= gradient <= 2**38
    assert native_core.mkmmd_workspace_bytes(0, 0, 0, 2**30, 2**30, 2**30, 0) == 0
