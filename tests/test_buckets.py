"""Plans filled up to few shapes: the same step from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from padkern import TripleExpert
from padkern.data.buckets import bucketed
from padkern.data.dataset import Ragged
from padkern.data.plan import BatchPlanner, PlanSource, TrainBatches
from padkern.ops.segments import expand

N, L = 60, 7


def make_source() -> PlanSource:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 12, 40)
    values = rng.integers(1, N + 1, lengths.sum())
    bins = rng.integers(1, 5, N + 1)
    bins[0] = 0
    return PlanSource(Ragged.from_lengths(values, lengths), num_items=N, max_len=L, item_bins=bins)


def make_model(source: PlanSource, encoder: str) -> TripleExpert:
    torch.manual_seed(0)
    text = torch.randn(N + 1, 10)
    text[0] = 0
    bins = torch.from_numpy(source.bins)
    return TripleExpert(
        N, text, bins, dim=8, max_len=L, num_layers=2, num_heads=2, dropout=0.3, encoder=encoder
    ).double()


@pytest.mark.parametrize("encoder", ["sasrec", "sasrec_pre_ln", "gru4rec", "caser"])
@pytest.mark.parametrize("bucket", [1, 5, 64, 1000])
def test_a_bucketed_plan_gives_the_same_step(bucket, encoder):
    source = make_source()
    plan = BatchPlanner(source, negatives=2).plan(np.arange(3, 19), 4).keyed(3, 5)
    filled = bucketed(plan, L, bucket)
    assert len(filled.targets) % bucket == 0
    assert len(filled.unique) % bucket == 0
    assert int(filled.valid.sum()) == len(plan.targets)
    model = make_model(source, encoder).train()
    losses, gradients = [], []
    for one in (plan, filled):
        loss = model.plan_loss(one)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_batches_of_as_many_users_have_few_shapes():
    source = make_source()
    batches = TrainBatches(source, batch_size=10, seed=1, phase="t", negatives=1, bucket=32)
    shapes = set()
    for epoch in range(6):
        for plan in batches.epoch(epoch):
            packed = plan.local_inputs
            tensors = (packed.items, packed.offsets, plan.negatives, *plan.starts, *plan.slots)
            shapes.add((packed.width, *(tuple(x.shape) for x in tensors)))
    plain = TrainBatches(source, batch_size=10, seed=1, phase="t", negatives=1)
    unlike = {len(plan.targets) for epoch in range(6) for plan in plain.epoch(epoch)}
    assert len(shapes) <= 4 < len(unlike)


def test_segments_of_a_bucketed_plan_cover_every_slot(backend):
    source = make_source()
    plan = BatchPlanner(source, negatives=3).plan(np.arange(11), 0)
    filled = bucketed(plan, L, 48)
    rows = (filled.input_rows, filled.target_rows, filled.negative_rows.flatten())
    for role, places in enumerate(rows):
        assert torch.equal(filled.slots[role].sort().values, torch.arange(len(places)))
        for u in range(len(filled.unique)):
            begin, end = filled.starts[role][u : u + 2].tolist()
            assert bool((places[filled.slots[role][begin:end]] == u).all())
    packed = filled.local_inputs
    table = torch.randn(len(filled.unique), 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(packed.items), 4, dtype=torch.float64)
    (got,) = torch.autograd.grad(
        (expand(table, packed.items, *packed.groups, backend=backend) * weight).sum(), table
    )
    (want,) = torch.autograd.grad((table[packed.items] * weight).sum(), table)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bucket", [0, -3])
def test_an_unfit_bucket_is_named(bucket):
    with pytest.raises(ValueError, match=f"bucket must be at least 1.* got {bucket}"):
        BatchPlanner(make_source(), bucket=bucket)
    plan = BatchPlanner(make_source()).plan(np.arange(4), 0)
    with pytest.raises(ValueError, match=f"bucket must be at least 1, got {bucket}"):
        bucketed(plan, L, bucket)
    with pytest.raises(ValueError, match="max_len must be at least 1, got 0"):
        bucketed(plan, 0, 8)
    with pytest.raises(ValueError, match="bucketed before"):
        bucketed(bucketed(plan, L, 8), L, 8)
