"""The gated item matrix for tables of different widths, and the schema of its registered ops."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from padkern.ops.gated_table import gated_table, gated_table_ref

WIDTHS = (3, 16, 33)


def make(rows=40, bins=5, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    tables = [torch.randn(rows, w, generator=rng, dtype=dtype).requires_grad_() for w in WIDTHS]
    gate = torch.randn(bins, len(WIDTHS), generator=rng, dtype=dtype).requires_grad_()
    return tables, gate, torch.randint(bins, (rows,), generator=rng)


def test_tables_of_different_widths(backend):
    tables, gate, item_bins = make()
    weight = torch.randn(40, sum(WIDTHS), dtype=torch.float64)
    results = []
    for function in (gated_table_ref, lambda *a: gated_table(*a, backend=backend)):
        matrix = function(tables, gate, item_bins)
        gradients = torch.autograd.grad((matrix * weight).sum(), [*tables, gate])
        results.append((matrix, *gradients))
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    assert torch.equal(results[0][0], results[1][0])


def test_a_float64_table_decides(backend):
    tables, gate, item_bins = make(dtype=torch.float32)
    tables[1] = tables[1].double()
    assert gated_table(tables, gate, item_bins, backend=backend).dtype == torch.float64


def test_the_gradient_may_be_broadcast(native_core):
    tables, gate, item_bins = make()
    matrix = gated_table(tables, gate, item_bins, backend="native")
    got = torch.autograd.grad(matrix.sum(), [*tables, gate])
    want = torch.autograd.grad(gated_table_ref(tables, gate, item_bins).sum(), [*tables, gate])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_registered_ops_keep_their_schema(dtype, native_core):
    tables, gate, item_bins = make(dtype=dtype)
    tables = [table.detach() for table in tables]
    ops = torch.ops.padkern
    opcheck(ops.gated_table.default, (tables, gate.detach(), item_bins))
    d_out = torch.randn(40, 2 * sum(WIDTHS), dtype=dtype)[:, ::2]
    opcheck(ops.gated_table_grad.default, (d_out, tables, gate.detach(), item_bins))
