"""Expansion of unique rows to slots: its gradient is the segment sum, to any order."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from padkern import _native
from padkern.ops.segments import expand, segment_sum


def make(segments, count, dim, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    rows = (torch.rand(count, generator=rng) ** 3 * segments).long()
    starts = torch.zeros(segments + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(rows, minlength=segments).cumsum(0)
    table = torch.randn(segments, dim, generator=rng, dtype=torch.float64).to(dtype)
    return table, rows, rows.sort(stable=True).indices, starts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_expansion_and_its_gradient(dtype, backend):
    table, rows, slots, starts = make(20, 90, 7, dtype)
    table.requires_grad_()
    out = expand(table, rows, slots, starts, backend=backend)
    assert torch.equal(out, table.index_select(0, rows))
    assert out.dtype == dtype
    weights = torch.randn(90, 7, dtype=torch.float64).to(dtype)
    (got,) = torch.autograd.grad((out * weights).sum(), table)
    want = torch.zeros(20, 7, dtype=torch.float64).index_add(0, rows, weights.double())
    assert got.dtype == dtype
    # Summed in float32: a half gradient is rounded once.
    torch.testing.assert_close(got, want.to(dtype))


def test_derivatives_of_any_order(backend):
    table, rows, slots, starts = make(4, 9, 3)
    table.requires_grad_()

    def squares(x):
        return expand(x, rows, slots, starts, backend=backend).pow(3)

    assert torch.autograd.gradcheck(squares, table)
    assert torch.autograd.gradgradcheck(squares, table)


def test_no_gradient_is_taken_without_need(backend):
    table, rows, slots, starts = make(5, 9, 2)
    assert not expand(table, rows, slots, starts, backend=backend).requires_grad
    with torch.no_grad():
        assert not expand(table.requires_grad_(), rows, slots, starts).requires_grad


def test_expansion_compiles(native_core):
    table, rows, slots, starts = make(6, 20, 3)
    table.requires_grad_()

    def loss(x):
        return expand(x, rows, slots, starts).square().sum()

    (got,) = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(table), table
    )
    (want,) = torch.autograd.grad(loss(table), table)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(8).long()}, r"rows must have shape \[9\], got \[8\]"),
        ({"starts": torch.zeros(5).long()}, r"starts must have shape \[6\], got \[5\]"),
        ({"table": torch.zeros(5)}, r"table must have shape \[rows, d\], got \[5\]"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    table, rows, slots, starts = make(5, 9, 2)
    arguments = {"table": table, "rows": rows, "slots": slots, "starts": starts} | change
    with pytest.raises(ValueError, match=message):
        expand(**arguments)


def test_native_sums_of_plan_slots_are_those_of_index_add(native_core):
    """In the order of the slots, so bit for bit what a sequential scatter gives."""
    table, rows, slots, starts = make(50, 400, 33, torch.float32)
    values = torch.randn(400, 33)
    want = torch.zeros_like(table)
    for slot, row in enumerate(rows.tolist()):
        want[row] += values[slot]
    assert torch.equal(segment_sum(values, slots, starts, backend="native"), want)


def test_models_expand_by_the_segments_off_the_cpu(monkeypatch):
    """On meta tensors, which stand for a GPU here; on the CPU torch's gather is kept."""
    from padkern.data.batch import pack
    from padkern.models import expert

    calls = []
    monkeypatch.setattr(expert, "expand", lambda *a: calls.append(a) or a[0][a[1]])
    packed = pack(torch.tensor([0, 2, 1]), torch.tensor([0, 3]), 5)
    table = torch.randn(4, 2)
    assert torch.equal(expert.item_vectors(table, packed), table[packed.items])
    groups = (torch.tensor([0, 2, 1]), torch.tensor([0, 1, 2, 3, 3]))
    grouped = dataclasses.replace(packed, groups=groups)
    expert.item_vectors(table, grouped)
    assert not calls
    assert expert.item_vectors(table.to("meta"), grouped.to("meta")).shape == (3, 2)
    assert calls[0][2].is_meta
    expert.item_vectors(table.to("meta"), packed.to("meta"))
    assert len(calls) == 1


@pytest.mark.parametrize("native", [False, True])
def test_plans_give_the_groups_of_their_inputs(native):
    from padkern.data.dataset import Ragged
    from padkern.data.plan import BatchPlanner, PlanSource

    if native and _native.load().core is None:
        pytest.skip(_native.load().reason)
    lengths = np.random.default_rng(0).integers(2, 9, 30)
    values = np.random.default_rng(1).integers(1, 21, lengths.sum())
    source = PlanSource(Ragged.from_lengths(values, lengths), num_items=20, max_len=8)
    backend = "native" if native else "reference"
    plan = BatchPlanner(source, negatives=2, backend=backend).plan(np.arange(30), 0)
    packed = plan.local_inputs
    table = torch.randn(len(plan.unique), 3, dtype=torch.float64, requires_grad=True)
    out = expand(table, packed.items, *packed.groups)
    want = table.index_select(0, packed.items)
    weights = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad((out * weights).sum(), table),
        torch.autograd.grad((want * weights).sum(), table),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
