"""Gated score and its loss: reference against loops, native against the reference."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from padkern import _backends, _native
from padkern.ops.triple_expert import (
    gated_bce_loss,
    gated_bce_loss_ref,
    gated_score_ref,
    gbce_beta,
    gbce_positive_weight,
)

REASON = _native.load().reason
needs_native = pytest.mark.skipif(bool(REASON), reason=REASON or "native core loaded")
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]

# tokens, experts, dim, items, negatives, bins
SHAPES = [
    (0, 3, 4, 5, 1, 3),
    (1, 1, 1, 1, 1, 1),
    (1, 3, 16, 2, 1, 2),
    (31, 2, 15, 7, 2, 4),
    (33, 3, 17, 40, 3, 11),
    (64, 3, 128, 9, 1, 2),  # many repeats of few items
    (97, 5, 33, 300, 8, 12),
    (130, 16, 3, 20, 2, 3),
    (7, 3, 0, 4, 2, 2),
]


def make_case(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0):
    tokens, experts, dim, items, k, bins = shape
    rng = np.random.default_rng([seed, *shape])

    def values(*size: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=size)).to(dtype)

    def ids(high: int, *size: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, high + 1, size))

    floats = (values(tokens, experts, dim), values(experts, items + 1, dim), values(bins, experts))
    return floats, (ids(bins - 1, items + 1), ids(items, tokens), ids(items, tokens, k))


def value_and_grads(floats, ids, backend: str, scale: float = 1.0, **options):
    leaves = [x.clone().requires_grad_() for x in floats]
    loss = gated_bce_loss(*leaves, *ids, backend=backend, **options)
    grads = torch.autograd.grad(loss * scale, leaves, allow_unused=True)
    return loss.detach(), [
        torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)
    ]


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if got.numel() == 0:
        return
    assert bool(torch.isfinite(want).all())
    assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


def test_reference_is_the_definition():
    (users, tables, gate), (bins, positives, negatives) = make_case((6, 3, 4, 5, 2, 3))
    candidates = torch.cat([positives[:, None], negatives], 1)
    want = np.zeros((6, 3))
    for t in range(6):
        for c, item in enumerate(candidates[t].tolist()):
            for e in range(3):
                want[t, c] += float(gate[bins[item], e] * (users[t, e] @ tables[e, item]))
    scores = gated_score_ref(users, tables, gate, bins, candidates)
    np.testing.assert_allclose(scores.numpy(), want, atol=1e-13)
    softplus = np.logaddexp(0, want * [-1, 1, 1])
    loss = softplus[:, 0].mean() + softplus[:, 1:].mean()
    got = gated_bce_loss_ref(users, tables, gate, bins, positives, negatives)
    assert abs(got.item() - loss) < 1e-13
    got = gated_bce_loss_ref(users, tables, gate, bins, positives, negatives, positive_weight=0.3)
    loss = 0.3 * softplus[:, 0].mean() + softplus[:, 1:].mean()
    assert abs(got.item() - loss) < 1e-13


def test_score_folds_into_one_inner_product():
    (users, tables, gate), (bins, _, negatives) = make_case((5, 3, 8, 12, 4, 6))
    folded = torch.cat([gate[bins, e, None] * tables[e] for e in range(3)], 1)
    states = users.reshape(5, 24)
    want = (states @ folded.T).gather(1, negatives)
    got = gated_score_ref(users, tables, gate, bins, negatives)
    assert_close(got, want, 1e-13)


# -- gBCE ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize(("k", "candidates"), [(1, 2), (1, 40), (3, 40), (256, 3417), (60, 40)])
def test_beta_is_the_formula(k, candidates, t):
    alpha = k / (candidates - 1)
    want = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    assert gbce_beta(k, candidates, t) == pytest.approx(want, rel=1e-12)
    assert gbce_positive_weight(k, candidates, t) == pytest.approx(want / k, rel=1e-12)


def test_beta_ends_at_one_and_at_the_sampling_rate():
    assert gbce_beta(7, 40, 0.0) == 1.0
    assert gbce_beta(1, 10**12 + 1, 1.0) == 1e-12  # not 1 - (1 - alpha)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negatives": 0}, "negatives must be at least 1, got 0"),
        ({"candidates": 1}, "candidates must be at least 2, got 1"),
        ({"calibration": -0.1}, "calibration must lie in 0..1, got -0.1"),
        ({"calibration": 1.1}, "calibration must lie in 0..1, got 1.1"),
        ({"calibration": math.nan}, "calibration must lie in 0..1, got nan"),
    ],
)
@pytest.mark.parametrize("function", [gbce_beta, gbce_positive_weight])
def test_beta_out_of_range(function, change, message):
    with pytest.raises(ValueError, match=message):
        function(**({"negatives": 3, "candidates": 40, "calibration": 0.75} | change))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 5])
def test_the_weighted_loss_is_the_gbce_of_the_paper(k, backend):
    floats, (bins, positives, negatives) = make_case((30, 3, 4, 20, k, 3))
    beta = gbce_beta(k, 20, 0.75)
    scores = gated_score_ref(*floats, bins, torch.cat([positives[:, None], negatives], 1))
    chance = torch.sigmoid(scores)
    terms = (chance[:, 0] ** beta).log() + (1 - chance[:, 1:]).log().sum(1)
    want = -(terms / (k + 1)).mean()
    weight = gbce_positive_weight(k, 20, 0.75)
    got = gated_bce_loss(
        *floats, bins, positives, negatives, positive_weight=weight, backend=backend
    )
    assert (got * k / (k + 1)).item() == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_calibration_makes_probabilities_the_optimum(backend):
    """One user, positives in exact proportion, each with every other item as its one negative."""
    counts = torch.tensor([1, 2, 3, 6])
    items = len(counts)
    pairs = [(i, j) for i in range(items) for _ in range(counts[i]) for j in range(items) if j != i]
    positives, negatives = torch.tensor(pairs).T
    odds = torch.logit(counts.double() / counts.sum())
    floats = (
        torch.ones(len(pairs), 1, 1).double(),
        odds.reshape(1, items, 1).clone(),
        torch.ones(1, 1).double(),
    )
    ids = (torch.zeros(items, dtype=torch.int64), positives, negatives[:, None])
    slopes = {}
    for t in (0.0, 1.0):
        weight = gbce_positive_weight(1, items, t)
        _, grads = value_and_grads(floats, ids, backend, positive_weight=weight)
        slopes[t] = grads[1].flatten()
    assert slopes[1.0].abs().max() < 1e-15
    assert (slopes[0.0] < -0.01).all()  # plain sampling asks for higher probabilities


@needs_native
@pytest.mark.parametrize("name", ["gated_bce_value", "gated_bce_value_grad"])
def test_a_raw_call_may_leave_the_weight_out(name):
    floats, ids = make_case((20, 3, 5, 9, 2, 3), torch.float32)
    op = getattr(torch.ops.padkern, name)

    def results(*weight):
        out = op(*floats, *ids, None, *weight)
        return out if isinstance(out, tuple) else (out,)

    plain, one, other = results(), results(1.0), results(0.5)
    assert all(torch.equal(a, b) for a, b in zip(plain, one, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@needs_native
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_compiles_with_a_weight_that_changes(backend):
    torch._dynamo.reset()
    floats, ids = make_case((20, 3, 5, 9, 2, 3))

    def loss(users, weight):
        arrays = (users * 2, *floats[1:], *ids)
        return gated_bce_loss(*arrays, positive_weight=weight, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for weight in (1.0, 0.3, 0.7):
        users = floats[0].clone().requires_grad_()
        got, want = compiled(users, weight), loss(users, weight)
        torch.testing.assert_close(got, want)
        (grad,), (expected,) = (torch.autograd.grad(x, users) for x in (got, want))
        torch.testing.assert_close(grad, expected)


# -- native against the reference ------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_native_matches_reference(shape, dtype, tolerance, masked, poisoned_empty):
    floats, ids = make_case(shape, dtype)
    valid = torch.from_numpy(np.random.default_rng(1).random(shape[0]) < 0.6) if masked else None
    want, want_grads = value_and_grads([x.double() for x in floats], ids, "reference", valid=valid)
    got, got_grads = value_and_grads(floats, ids, "native", valid=valid)
    assert_close(got, want.to(dtype), tolerance)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert_close(a, b.to(dtype), tolerance)
    with torch.no_grad():  # the value-only op
        assert torch.equal(gated_bce_loss(*floats, *ids, valid=valid, backend="native"), got)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e8])
def test_extreme_scores_stay_finite_and_exact(backend, scale):
    (users, tables, gate), ids = make_case((40, 3, 8, 10, 2, 3))
    users, gate = users * scale, gate * 1.0
    loss, grads = value_and_grads((users, tables, gate), ids, backend)
    candidates = torch.cat([ids[1][:, None], ids[2]], 1)
    scores = gated_score_ref(users, tables, gate, ids[0], candidates).numpy()
    softplus = np.logaddexp(0, scores * [-1, 1, 1])
    want = softplus[:, 0].mean() + softplus[:, 1:].mean()
    assert loss.item() == pytest.approx(want, rel=1e-12)
    assert all(bool(torch.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_losses_keep_their_relative_precision(backend):
    """softplus(-30) is 9e-14: 1 + exp(-30) must not be rounded to 1."""
    users, tables = torch.ones(3, 1, 1).double(), torch.tensor([[[0.0], [30.0], [-30.0]]]).double()
    gate, bins = torch.ones(1, 1).double(), torch.zeros(3, dtype=torch.int64)
    positives, negatives = torch.full((3,), 1), torch.full((3, 1), 2)
    loss = gated_bce_loss(users, tables, gate, bins, positives, negatives, backend=backend)
    assert loss.item() == pytest.approx(2 * math.log1p(math.exp(-30)), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(backend, masked):
    floats, ids = make_case((5, 3, 3, 4, 2, 3))
    valid = torch.tensor([True, False, True, True, False]) if masked else None
    leaves = [x.clone().requires_grad_() for x in floats]
    assert torch.autograd.gradcheck(
        lambda *f: gated_bce_loss(*f, *ids, valid=valid, backend=backend), leaves
    )


@needs_native
def test_backward_scales_and_can_be_repeated():
    floats, ids = make_case((20, 3, 5, 9, 2, 3), torch.float32)
    _, once = value_and_grads(floats, ids, "native")
    _, scaled = value_and_grads(floats, ids, "native", scale=65536.0)
    for a, b in zip(scaled, once, strict=True):
        assert torch.equal(a, b * 65536.0)
    leaves = [x.clone().requires_grad_() for x in floats]
    loss = gated_bce_loss(*leaves, *ids, backend="native")
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, b in zip(leaves, once, strict=True):
        assert torch.equal(leaf.grad, b + b)


@needs_native
@pytest.mark.parametrize("index", [0, 1, 2])
def test_only_one_input_needs_a_gradient(index):
    floats, ids = make_case((20, 3, 5, 9, 2, 3))
    _, want = value_and_grads(floats, ids, "native")
    mixed = [x.clone().requires_grad_(i == index) for i, x in enumerate(floats)]
    gated_bce_loss(*mixed, *ids, backend="native").backward()
    assert torch.equal(mixed[index].grad, want[index])
    assert all(x.grad is None for i, x in enumerate(mixed) if i != index)


@needs_native
def test_no_second_order():
    floats, ids = make_case((4, 2, 3, 5, 1, 2))
    leaves = [x.requires_grad_() for x in floats]
    loss = gated_bce_loss(*leaves, *ids, backend="native")
    (grad,) = torch.autograd.grad(loss * loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@needs_native
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["gated_bce_value", "gated_bce_value_grad"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4]])
def test_opcheck(name, shape, masked):
    floats, ids = make_case(shape, torch.float32)
    valid = torch.arange(shape[0]) % 3 > 0 if masked else None
    op = getattr(torch.ops.padkern, name).default
    torch.library.opcheck(op, (*floats, *ids, valid))
    out = op(*floats, *ids, valid)
    assert all(x.is_contiguous() for x in (out if isinstance(out, tuple) else (out,)))


@needs_native
def test_compile_fullgraph():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda u, v, g, b, p, n: gated_bce_loss(2 * u, v, g, b, p, n, backend="native"),
        fullgraph=True,
    )
    for shape in ((33, 3, 17, 40, 3, 11), (20, 3, 17, 40, 3, 11)):
        floats, ids = make_case(shape)
        leaves = [x.clone().requires_grad_() for x in floats]
        got = compiled(*leaves, *ids)
        grads = torch.autograd.grad(got * 3, leaves)
        again = [x.clone().requires_grad_() for x in floats]
        want = gated_bce_loss(2 * again[0], *again[1:], *ids, backend="native")
        want_grads = torch.autograd.grad(want * 3, again)
        assert_close(got.detach(), want.detach(), 1e-12)
        for a, b in zip(grads, want_grads, strict=True):
            assert_close(a, b, 1e-12)


@needs_native
def test_layouts():
    floats, ids = make_case((33, 3, 18, 40, 3, 11))
    want, want_grads = value_and_grads(floats, ids, "native")
    users, tables, gate = floats
    layouts = [
        (users.transpose(0, 1).contiguous().transpose(0, 1), tables, gate),
        (users, torch.stack(list(tables), 1).transpose(0, 1), gate),
        (users, tables, gate.T.contiguous().T),
        (users.transpose(1, 2).contiguous().transpose(1, 2), tables, gate),
        (torch.cat([users, users], 2)[..., 18:], torch.cat([tables, tables], 1)[:, 41:], gate),
    ]
    wide = [torch.stack([x, x], -1)[..., 0].contiguous() for x in ids]
    for case in layouts:
        got, grads = value_and_grads(case, wide, "native")
        assert torch.equal(got, want)
        for a, b in zip(grads, want_grads, strict=True):
            assert torch.equal(a, b)
    strided = [torch.stack([x, x], -1)[..., 0] for x in ids]
    assert not strided[1].is_contiguous()
    assert torch.equal(gated_bce_loss(*floats, *strided, backend="native"), want)
    same = users[:1].expand(33, 3, 18)  # stride 0
    wanted = gated_bce_loss(same, tables, gate, *ids, backend="reference")
    assert_close(gated_bce_loss(same, tables, gate, *ids, backend="native"), wanted, 1e-12)


@needs_native
def test_same_bits_for_every_thread_count(restore_threads):
    floats, ids = make_case((700, 3, 40, 200, 4, 11), torch.float32)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(value_and_grads(floats, ids, "native"))
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_may_hold_nan(backend):
    floats, ids = make_case((12, 3, 5, 9, 2, 3))
    valid = torch.arange(12) % 3 > 0
    want, want_grads = value_and_grads(
        (floats[0][valid], *floats[1:]), (ids[0], ids[1][valid], ids[2][valid]), backend
    )
    floats[0][~valid] = torch.nan
    loss, grads = value_and_grads(floats, ids, backend, valid=valid)
    assert_close(loss, want, 1e-12)
    assert_close(grads[0][valid], want_grads[0], 1e-12)
    assert (grads[0][~valid] == 0).all()
    assert_close(grads[1], want_grads[1], 1e-12)
    assert_close(grads[2], want_grads[2], 1e-12)
    nothing, grads = value_and_grads(floats, ids, backend, valid=torch.zeros_like(valid))
    assert nothing == 0
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_in_gives_nan_out(backend, place):
    floats, ids = make_case((12, 3, 5, 9, 2, 3))
    floats[place][:] = torch.nan
    loss, _ = value_and_grads(floats, ids, backend)
    assert bool(torch.isnan(loss))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend):
    floats, ids = make_case((33, 3, 16, 40, 3, 11))
    want = gated_bce_loss(*floats, *ids, backend="reference")
    for kinds, result, tolerance in [
        (("float32", "float32", "float64"), torch.float32, 1e-5),
        (("float32", "float64", "float32"), torch.float64, 1e-5),
        (("bfloat16", "float32", "float32"), torch.float32, 0.05),
        (("float16", "float16", "float16"), torch.float32, 0.01),
    ]:
        leaves = [
            x.to(getattr(torch, kind), copy=True).requires_grad_()
            for x, kind in zip(floats, kinds, strict=True)
        ]
        loss = gated_bce_loss(*leaves, *ids, backend=backend)
        assert loss.dtype == result
        assert abs(loss.item() - want.item()) < tolerance
        loss.backward()
        assert [x.grad.dtype for x in leaves] == [x.dtype for x in leaves]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    floats, ids = make_case((33, 3, 16, 40, 3, 11), torch.float32)
    want = gated_bce_loss(*floats, *ids, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gated_bce_loss(*floats, *ids, backend=backend), want)


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa):
    detected = _native.load().core.isa()["detected"]
    if isa == "avx2" and detected == "baseline":
        pytest.skip("this CPU has no AVX2")
    code = """
import numpy as np, torch
from padkern.ops.triple_expert import gated_bce_loss
rng = np.random.default_rng(0)
for dtype in (torch.float64, torch.float32):
    f = [torch.from_numpy(rng.normal(size=s)).to(dtype).requires_grad_()
         for s in ((33, 3, 39), (3, 21, 39), (4, 3))]
    i = [torch.from_numpy(rng.integers(0, h, s)) for h, s in ((4, 21), (21, 33), (21, (33, 3)))]
    a, b = (gated_bce_loss(*f, *i, backend=x) for x in ("native", "reference"))
    tolerance = 1e-10 if dtype == torch.float64 else 2e-6
    assert (a - b).abs() < tolerance
    for x, y in zip(torch.autograd.grad(a, f), torch.autograd.grad(b, f)):
        assert (x - y).abs().max() < tolerance
from padkern import _native
print(_native.load().core.isa()["chosen"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PADKERN_ISA": isa},
        capture_output=True,
        text=True,
        timeout=300,  # imports torch: slow on a loaded machine
        check=False,
    )
    assert done.stdout.strip() == isa, done.stderr


def argument_errors():
    long = torch.int64
    return [
        ({"negatives": torch.zeros(4, 0, dtype=long)}, ValueError, "k >= 1"),
        ({"positives": torch.full((4,), 6)}, ValueError, "positives must lie in 0..5, got 6"),
        ({"positives": torch.full((4,), -1)}, ValueError, "positives must lie in 0..5, got -1"),
        ({"negatives": torch.full((4, 2), 6)}, ValueError, "negatives must lie in 0..5, got 6"),
        ({"item_bins": torch.full((6,), 3)}, ValueError, "item_bins must lie in 0..2, got 3"),
        ({"item_bins": torch.full((6,), -1)}, ValueError, "item_bins must lie in 0..2, got -1"),
        ({"users": torch.zeros(4, 3)}, ValueError, "users must have shape"),
        ({"users": torch.zeros(4, 17, 2)}, ValueError, "1 to 16 experts"),
        ({"item_tables": torch.zeros(2, 6, 2)}, ValueError, "item_tables must have shape"),
        ({"item_tables": torch.zeros(3, 0, 2)}, ValueError, "at least one row"),
        ({"gate": torch.zeros(3, 2)}, ValueError, "gate must have shape"),
        ({"item_bins": torch.zeros(5, dtype=long)}, ValueError, "item_bins must have shape"),
        ({"positives": torch.zeros(3, dtype=long)}, ValueError, "positives must have shape"),
        ({"negatives": torch.zeros(3, 2, dtype=long)}, ValueError, "negatives must have shape"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, ValueError, "valid must have shape"),
        ({"valid": torch.ones(4)}, TypeError, "valid must be a bool"),
        ({"positives": torch.zeros(4, dtype=torch.int32)}, TypeError, "positives must be int64"),
        ({"users": torch.zeros(4, 3, 2, dtype=long)}, TypeError, "users must be float"),
        ({"gate": [[1.0]]}, TypeError, "gate must be a Tensor"),
        ({"gate": torch.zeros(3, 3, device="meta")}, ValueError, "gate must be on cpu"),
        ({"positive_weight": 0.0}, ValueError, "positive_weight must be positive and finite, got"),
        ({"positive_weight": "1"}, TypeError, "positive_weight must be a number, got str"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("change", "error", "message"), argument_errors())
def test_argument_errors(change, error, message, backend):
    (users, tables, gate), (bins, positives, negatives) = make_case((4, 3, 2, 5, 2, 3))
    good = {
        "users": users,
        "item_tables": tables,
        "gate": gate,
        "item_bins": bins,
        "positives": positives,
        "negatives": negatives,
        "backend": backend,
    }
    gated_bce_loss(**good)
    with pytest.raises(error, match=message):
        gated_bce_loss(**(good | change))


def test_named_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(_backends, "native_reason", lambda: "the core is not built")
    floats, ids = make_case((4, 3, 2, 5, 2, 3))
    with pytest.raises(RuntimeError, match="the core is not built"):
        gated_bce_loss(*floats, *ids, backend="native")
    want = gated_bce_loss(*floats, *ids, backend="reference")
    assert torch.equal(gated_bce_loss(*floats, *ids), want)
