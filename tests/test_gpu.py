"""What runs on a GPU in this version: plain torch, which must agree with itself on the CPU."""

from __future__ import annotations

import pytest
import torch

from padkern import mkmmd_loss
from padkern.models.triple_expert import TripleExpert
from padkern.ops.ranking import count_ranks
from padkern.testing import make_mkmmd_inputs, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable CUDA device"),
]


def _loss_and_gradients(source, target, **options):
    source, target = (t.detach().requires_grad_() for t in (source, target))
    loss = mkmmd_loss(source, target, backend="reference", **options)
    return loss.detach(), *torch.autograd.grad(loss, (source, target))


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)]
)
def test_mkmmd_matches_the_cpu(estimator, dtype, tolerance):
    source, target = make_mkmmd_inputs(48, 33, 16, dtype)
    expected = _loss_and_gradients(source.double(), target.double(), estimator=estimator)
    found = _loss_and_gradients(source.cuda(), target.cuda(), estimator=estimator)
    assert abs(float(found[0]) - float(expected[0])) < tolerance
    for actual, wanted in zip(found[1:], expected[1:], strict=True):
        assert relative_error(actual.cpu(), wanted) < tolerance


def test_auto_takes_the_reference_and_native_says_why_not():
    source, target = (t.cuda() for t in make_mkmmd_inputs(8, 8, 4))
    assert mkmmd_loss(source, target).is_cuda
    with pytest.raises(RuntimeError, match="backend='native' cannot be used"):
        mkmmd_loss(source, target, backend="native")


def test_ranks_match_the_cpu():
    # Small integers: every product and sum is exact, so ties fall alike on both devices.
    states = torch.randint(-3, 4, (300, 8), dtype=torch.float32)
    items = torch.randint(-3, 4, (501, 8), dtype=torch.float32)
    targets = torch.randint(1, 501, (300,))
    seen, offsets = torch.randint(1, 501, (900,)), torch.arange(0, 901, 3)
    expected = count_ranks(states, items, targets, seen, offsets)
    found = count_ranks(states.cuda(), items.cuda(), targets, seen, offsets)
    torch.testing.assert_close(torch.as_tensor(found).cpu(), torch.as_tensor(expected))


def test_auto_takes_triton_for_sequences():
    from padkern.ops.ranking.op import ItemTiles, _choose
    from padkern.ops.segments.op import _choose as choose_segments
    from padkern.ops.short_attention.op import _choose as choose_attention

    x, ids = torch.randn(5, 4).cuda(), torch.tensor([0, 5]).cuda()
    assert choose_attention("auto", ids, 5, x)[0] == "triton"
    assert choose_segments("auto", x, ids, ids) == "triton"
    assert _choose("auto", x, ItemTiles.build(x), 10) == "triton"
    assert _choose("auto", x, ItemTiles.build(x), 500) == "reference"


def test_steps_with_a_plan_have_the_same_gradients_again():
    """Item vectors get theirs from segment sums, not from a scatter."""
    import numpy as np

    from padkern.data.dataset import Ragged
    from padkern.data.plan import BatchPlanner, PlanSource

    lengths = np.random.default_rng(0).integers(2, 9, 64)
    values = np.random.default_rng(1).integers(1, 41, lengths.sum())
    source = PlanSource(Ragged.from_lengths(values, lengths), num_items=40, max_len=8)
    plan = BatchPlanner(source, negatives=2).plan(np.arange(64), 0).keyed(3, 5).to("cuda")
    assert plan.local_inputs.groups is not None
    bins = torch.arange(41) % 5 + 1
    bins[0] = 0
    text = torch.randn(41, 12)
    text[0] = 0
    model = TripleExpert(40, text, bins, dim=16, max_len=8, num_layers=1).cuda()
    table = torch.randn(40, 16, device="cuda", requires_grad=True)
    expert = model.experts["rec"]
    gradients = []
    for _ in range(5):
        states = expert.encode(table[: len(plan.unique)], plan.local_inputs)
        gradients.append(torch.autograd.grad(states.square().sum(), table)[0])
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_a_triple_expert_learns_on_the_gpu():
    num_items, text = 60, torch.randn(61, 12)
    text[0] = 0
    bins = torch.arange(61) % 5 + 1
    bins[0] = 0
    model = TripleExpert(num_items, text, bins, dim=16, max_len=8, num_layers=1, dropout=0.0)
    model = model.cuda()
    items = torch.randint(1, num_items + 1, (40,), device="cuda")
    offsets = torch.arange(0, 41, 8, device="cuda")
    targets = torch.randint(1, num_items + 1, (5,), device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        scores = model(items, offsets) @ model.item_matrix().T
        loss = torch.nn.functional.cross_entropy(scores[:, 1:], targets - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
