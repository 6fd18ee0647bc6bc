"""The chunked catalogue cross-entropy against its specification."""

from __future__ import annotations

import pytest
import torch

from padkern.ops.catalogue_loss import catalogue_cross_entropy, catalogue_cross_entropy_ref


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
def test_value_and_gradients(tokens, items, dim, chunk, with_bias):
    users, vectors, targets, bias = make(tokens, items, dim)
    inputs = [users, vectors, *([bias] if with_bias else [])]
    extra = bias if with_bias else None
    loss = catalogue_cross_entropy(users, vectors, targets, bias=extra, chunk=chunk)
    want = catalogue_cross_entropy_ref(users, vectors, targets, extra)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(3 * loss, inputs), torch.autograd.grad(3 * want, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        plain = catalogue_cross_entropy(users, vectors, targets, bias=extra, chunk=chunk)
    torch.testing.assert_close(plain, want, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    users, vectors, targets, bias = make()
    assert torch.autograd.gradcheck(
        lambda u, v, b: catalogue_cross_entropy(u, v, targets, bias=b, chunk=3),
        (users, vectors, bias),
    )


def test_large_logits_stay_finite():
    users, vectors, targets, _ = make(dtype=torch.float32)
    loss = catalogue_cross_entropy(users * 1e4, vectors * 1e4, targets)
    want = catalogue_cross_entropy_ref(users * 1e4, vectors * 1e4, targets)
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)


def test_second_derivative_is_refused():
    users, vectors, targets, _ = make()
    loss = catalogue_cross_entropy(users, vectors, targets) ** 2
    (grad,) = torch.autograd.grad(loss, users, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u, v, t: (u[:, :-1], v, t), "users and items must be"),
        (lambda u, v, t: (u, v, t[:-1]), "targets must be"),
        (lambda u, v, t: (u[:0], v, t[:0]), "T >= 1"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    users, vectors, targets, _ = make()
    with pytest.raises(ValueError, match=message):
        catalogue_cross_entropy(*change(users, vectors, targets))
