"""What runs on a GPU in this version: plain torch, which must agree with itself on the CPU, and of
the Triton backends what only a GPU can show (their results: ``test_*_triton.py``)."""

from __future__ import annotations

import pytest
import torch

from padkern import _backends, mkmmd_loss
from padkern.models.triple_expert import TripleExpert
from padkern.ops.ranking import count_ranks
from padkern.testing import make_mkmmd_inputs, relative_error, run
from padkern.testing.records.catalogue_loss import CATALOGUE_LOSS
from padkern.testing.records.gated_bce import GATED_BCE
from padkern.testing.records.gated_table import GATED_TABLE

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


def test_sequences_take_triton_by_name_alone():
    from padkern.ops.ranking.op import ItemTiles, _choose
    from padkern.ops.segments.op import _choose as choose_segments
    from padkern.ops.short_attention.op import _choose as choose_attention

    x, ids = torch.randn(5, 4).cuda(), torch.tensor([0, 5]).cuda()
    for backend, chosen in (("auto", "reference"), ("triton", "triton")):
        assert choose_attention(backend, ids, 5, x)[0] == chosen
        assert choose_segments(backend, x, ids, ids) == chosen
        assert _choose(backend, x, ItemTiles.build(x), 10) == chosen


def test_expansion_has_the_same_gradient_again():
    """A segment sum, not a scatter."""
    import numpy as np

    from padkern.data.dataset import Ragged
    from padkern.data.plan import BatchPlanner, PlanSource
    from padkern.ops.segments import expand

    lengths = np.random.default_rng(0).integers(2, 9, 64)
    values = np.random.default_rng(1).integers(1, 41, lengths.sum())
    source = PlanSource(Ragged.from_lengths(values, lengths), num_items=40, max_len=8)
    packed = BatchPlanner(source, negatives=2).plan(np.arange(64), 0).to("cuda").local_inputs
    table = torch.randn(len(packed.groups[1]) - 1, 16, device="cuda", requires_grad=True)
    weight = torch.randn(len(packed.items), 16, device="cuda")
    gradients = []
    for _ in range(5):
        rows = expand(table, packed.items, *packed.groups, backend="triton")
        gradients.append(torch.autograd.grad((rows * weight).sum(), table)[0])
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


needs_triton = pytest.mark.skipif(
    bool(_backends.triton_reason()), reason=_backends.triton_reason() or "triton is usable"
)
# Records and a shape of several blocks in every direction.
HEAD = {
    "gated_bce": (GATED_BCE, (900, 3, 128, 700, 3, 12)),
    "gated_table": (GATED_TABLE, (3, 3000, 128, 12)),
    "catalogue_loss": (CATALOGUE_LOSS, (900, 2000, 96)),
}


def _raw_calls(name, device="cuda", **seed):
    """The op's value and gradients as one function of no arguments, without autograd."""
    spec, shape = HEAD[name]
    case = spec.case(shape, options=spec.options[-1], device=device, **seed)
    arguments = case.arguments
    if name == "gated_table":
        tables = list(arguments["tables"].unbind(0))
        rest = (arguments["gate"], arguments["item_bins"])
        forward, backward = torch.ops.padkern.gated_table, torch.ops.padkern.gated_table_grad

        def both():
            out = forward(tables, *rest)
            return out, *backward(out, tables, *rest)

        return both, (*tables, rest[0])
    operands = spec.raw_ops[1].arguments(case, "triton")
    return lambda: spec.raw_ops[1].op(*operands), operands[:2]


@needs_triton
@pytest.mark.parametrize("name", HEAD)
def test_triton_is_taken_by_name_alone(name):
    spec, shape = HEAD[name]
    case = spec.case(shape, device="cuda")
    chosen, plain = run(spec, case, "auto"), run(spec, case, "reference")
    assert torch.equal(chosen.value, plain.value)
    with pytest.raises(RuntimeError, match="backend='native' cannot be used"):
        spec.call(case, "native")


@needs_triton
@pytest.mark.parametrize("name", HEAD)
def test_triton_replays_from_a_cuda_graph(name):
    both, inputs = _raw_calls(name)
    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for factor in (0.5, 3.0):
        for tensor in inputs:
            tensor.mul_(factor)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, both(), strict=True):
            assert torch.equal(got, want)


@needs_triton
@pytest.mark.parametrize("name", HEAD)
def test_triton_never_waits_for_the_device(name):
    both, _ = _raw_calls(name)
    both()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _far(x):
    """The same values with their last rows more than 2^31 elements behind the first."""
    rows = x.shape[-2]
    stride = (2**31 // (rows - 1) // 128 + 1) * 128  # as divisible as that of the dense rows
    memory = torch.empty(rows * stride, dtype=x.dtype, device=x.device)
    strides = (x.shape[-1], stride, 1)[3 - x.dim() :]
    return memory.as_strided(x.shape, strides).copy_(x)


@needs_triton
@pytest.mark.parametrize(
    ("name", "argument"),
    [("gated_bce", "item_tables"), ("gated_table", "tables"), ("catalogue_loss", "items")],
)
def test_triton_reads_rows_beyond_32_bits(name, argument):
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free device memory")
    spec, shape = HEAD[name]
    case = spec.case(shape, torch.bfloat16, device="cuda")
    want = run(spec, case, "triton")
    far = {**case.arguments, argument: _far(case.arguments[argument])}
    got = run(spec, case._replace(arguments=far), "triton")
    assert torch.equal(got.value, want.value)
    for one, gradient in want.gradients.items():
        assert torch.equal(got.gradients[one], gradient)


@needs_triton
@pytest.mark.parametrize("name", HEAD)
def test_triton_under_torch_compile(name):
    spec, shape = HEAD[name]
    case = spec.case(shape, torch.bfloat16, options=spec.options[-1], device="cuda")
    torch._dynamo.reset()
    compiled = torch.compile(spec.public, fullgraph=True)
    got = compiled(**case.arguments, backend="triton")
    assert torch.equal(got, spec.call(case, "triton"))
