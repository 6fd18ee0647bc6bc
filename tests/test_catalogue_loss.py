"""The catalogue cross-entropy: what the generic tests of its record do not ask."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from padkern.ops.catalogue_loss import catalogue_cross_entropy, catalogue_cross_entropy_ref
from padkern.ops.catalogue_loss.native import catalogue_loss_native
from padkern.testing import relative_error


def make(tokens=7, items=11, dim=5, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    users = torch.randn(tokens, dim, generator=rng, dtype=dtype).requires_grad_()
    vectors = torch.randn(items, dim, generator=rng, dtype=dtype).requires_grad_()
    bias = torch.randn(items, generator=rng, dtype=dtype).requires_grad_()
    targets = torch.randint(items, (tokens,), generator=rng)
    return users, vectors, targets, bias


@pytest.mark.parametrize(
    ("tokens", "items", "dim"), [(1, 1, 1), (7, 11, 5), (64, 3, 2), (5, 97, 8)]
)
@pytest.mark.parametrize("chunk", [1, 3, 1024])
@pytest.mark.parametrize("with_bias", [False, True])
def test_any_chunk_of_the_reference(tokens, items, dim, chunk, with_bias):
    users, vectors, targets, bias = make(tokens, items, dim)
    inputs = [users, vectors, *([bias] if with_bias else [])]
    options = {"bias": bias if with_bias else None, "chunk": chunk, "backend": "reference"}
    loss = catalogue_cross_entropy(users, vectors, targets, **options)
    want = catalogue_cross_entropy_ref(users, vectors, targets, options["bias"])
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * want, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        plain = catalogue_cross_entropy(users, vectors, targets, **options)
    torch.testing.assert_close(plain, want, rtol=1e-12, atol=1e-12)


def test_large_logits_stay_finite(backend):
    users, vectors, targets, _ = make(dtype=torch.float32)
    loss = catalogue_cross_entropy(users * 1e4, vectors * 1e4, targets, backend=backend)
    want = catalogue_cross_entropy_ref(users * 1e4, vectors * 1e4, targets)
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)


def test_the_loss_of_certain_targets_does_not_fall_below_zero(native_core):
    """The logit of the target and the maximum are the same rounded number."""
    users, vectors, _, _ = make(200, 300, 31, dtype=torch.float32)
    targets = (users.double() @ vectors.double().T).argmax(1)
    for one in range(200):
        part = slice(one, one + 1)
        arguments = (40 * users[part], vectors, targets[part])
        value = catalogue_cross_entropy(*arguments, backend="native")
        want = catalogue_cross_entropy_ref(*(x.double() for x in arguments[:2]), targets[part])
        assert float(value.detach()) >= 0
        assert abs(float((value - want).detach())) < 1e-4 * max(1.0, float(want.detach()))


def test_items_that_rise_block_after_block(backend):
    """Every block of items raises the maximum: sums are rescaled each time."""
    users = torch.ones(3, 1, requires_grad=True)
    vectors = torch.linspace(-200, 200, 1500)[:, None].requires_grad_()
    targets = torch.tensor([0, 700, 1499])
    loss = catalogue_cross_entropy(users, vectors, targets, backend=backend)
    wide = [users.detach().double().requires_grad_(), vectors.detach().double().requires_grad_()]
    want = catalogue_cross_entropy_ref(*wide, targets)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    got = torch.autograd.grad(loss, (users, vectors))
    for a, b in zip(got, torch.autograd.grad(want, wide), strict=True):
        # Item vectors of 200 cancel: their rounding is what remains.
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("plan", [1, 2])
@pytest.mark.parametrize(
    "shape", [(7, 11, 5), (300, 1100, 20), (200, 8400, 3), (6300, 130, 2), (400, 8200, 300)]
)
def test_both_plans_have_the_bits_of_one_thread(shape, plan, native_core, restore_threads):
    """Also the plan that the shape would not choose; the last two shapes take several rounds."""
    users, vectors, targets, bias = make(*shape, dtype=torch.float32)
    lists = torch.randint(shape[1], (shape[0],))
    excluded = (lists, torch.arange(shape[0] + 1))
    chosen = torch.unique(torch.cat([targets, torch.arange(0, shape[1], 3)]))
    wide = [x.detach().double().requires_grad_() for x in (users, vectors, bias)]
    for candidates in (None, chosen):
        arguments = (users, vectors, targets, bias, candidates, *excluded)
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(catalogue_loss_native(*arguments, True, True, plan=plan))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        loss = catalogue_cross_entropy_ref(*wide[:2], targets, wide[2], candidates, *excluded)
        want = (loss.detach(), *torch.autograd.grad(loss, wide))
        for got, expected in zip(results[0], want, strict=True):
            assert relative_error(got, expected) < 3e-6


def test_sampled_softmax_with_logq_and_accidental_hits(backend):
    """As one would write it per token: the target, and the negatives that are not its hits."""
    users, vectors, _, _ = make(6, 50, 4)
    targets = torch.tensor([3, 7, 3, 20, 41, 7])
    negatives = torch.tensor([3, 8, 20, 33, 44])
    log_q = torch.linspace(-5, -1, 50, dtype=torch.float64)
    candidates = torch.unique(torch.cat([negatives, targets]))
    # Each token leaves out the other tokens' targets that are no negatives.
    lists = [[c for c in candidates.tolist() if c not in negatives and c != t] for t in targets]
    loss = catalogue_cross_entropy(
        users,
        vectors,
        targets,
        bias=-log_q,
        candidates=candidates,
        excluded_values=torch.tensor([item for one in lists for item in one]),
        excluded_offsets=torch.tensor([0, *np.cumsum([len(one) for one in lists])]),
        backend=backend,
    )
    parts = []
    for user, target in zip(users, targets, strict=True):
        items = torch.unique(torch.cat([negatives, target[None]]))
        logits = vectors[items] @ user - log_q[items]
        parts.append(-logits.log_softmax(0)[items == target])
    torch.testing.assert_close(loss, torch.cat(parts).mean())
    (gradient,) = torch.autograd.grad(loss, vectors)
    outside = torch.ones(50, dtype=torch.bool).index_fill(0, candidates, False)
    assert not gradient[outside].any()
    assert gradient[~outside].any(1).all()


def test_the_value_has_the_bits_of_the_value_with_gradients(native_core):
    users, vectors, targets, bias = make(130, 700, 20, dtype=torch.float32)
    loss = catalogue_cross_entropy(users, vectors, targets, bias=bias, backend="native")
    with torch.no_grad():
        plain = catalogue_cross_entropy(users, vectors, targets, bias=bias, backend="native")
    assert loss.requires_grad
    assert torch.equal(loss, plain)


def test_a_named_backend_does_not_fall_back():
    users, vectors, targets, _ = make()
    meta = [x.detach().to("meta") for x in (users, vectors, targets)]
    with pytest.raises(RuntimeError, match="runs on the CPU, got a tensor on meta"):
        catalogue_cross_entropy(*meta, backend="native")


@pytest.mark.parametrize("plan", [1, 2])
def test_a_large_bias_of_all_items_changes_nothing(plan, native_core):
    """Also in the lanes behind the last token, whose logits are the bias alone."""
    rng = np.random.default_rng(5)
    users, items = (torch.from_numpy(rng.normal(size=(n, 24))).float() for n in (7, 300))
    targets = torch.from_numpy(rng.integers(0, 300, 7))
    rest = (targets, torch.full((300,), 100.0), None, None, None)
    exact = [t.double().requires_grad_() for t in (users, items, torch.zeros(300))]
    loss = catalogue_cross_entropy_ref(exact[0], exact[1], targets, exact[2])
    wanted = torch.autograd.grad(loss, exact)
    value, *gradients = catalogue_loss_native(users, items, *rest, True, True, plan=plan)
    assert abs(float(value) - float(loss.detach())) < 1e-5 * float(loss.detach())
    for gradient, want in zip(gradients, wanted, strict=True):
        assert relative_error(gradient, want) < 2e-5


@pytest.mark.parametrize("frozen", ["users", "items"])
def test_a_frozen_side_costs_nothing_and_changes_no_bit(native_core, frozen):
    generator = torch.Generator().manual_seed(0)
    users = torch.randn(70, 20, generator=generator)
    items = torch.randn(150, 20, generator=generator)
    targets = torch.randint(150, (70,), generator=generator)
    both = [users.clone().requires_grad_(), items.clone().requires_grad_()]
    catalogue_cross_entropy(*both, targets, backend="native").backward()
    leaves = {"users": users, "items": items}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    value = catalogue_cross_entropy(users, items, targets, backend="native")
    value.backward()
    for leaf, full in zip((users, items), both, strict=True):
        assert leaf.grad is None if not leaf.requires_grad else torch.equal(leaf.grad, full.grad)
    op = torch.ops.padkern.catalogue_loss_value_grad
    rest = (None, None, None, None)
    parts = op(users.detach(), items.detach(), targets, *rest, frozen != "users", frozen != "items")
    sizes = [part.numel() for part in parts[1:3]]
    assert sizes == [0 if frozen == "users" else 1400, 0 if frozen == "items" else 3000]
