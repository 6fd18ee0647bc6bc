"""Dropout, residual sum and norm: forms that the record does not hold, and numbers at the edge."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from padkern.ops.dropout_add_norm import dropout_add_norm, keyed_dropout
from padkern.ops.keyed_dropout import channel_keep

RULE = {"dropout": 0.4, "seed": 77, "step": 5}


def make(tokens=50, dim=70, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, dim), (tokens, dim), (dim,), (dim,), (dim,))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def test_without_dropout_it_is_layer_norm(backend):
    x, residual, weight, shift, bias = make()
    got = dropout_add_norm(x, residual, weight, shift, bias=bias, eps=1e-6, backend=backend)
    want = F.layer_norm(residual + x + bias, (70,), weight, shift, 1e-6)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_dropout_alone_and_its_gradient(backend):
    x = make()[0].requires_grad_()
    out = keyed_dropout(x, 0.4, seed=77, step=5, backend=backend)
    keep = channel_keep(0.4, 77, 5, torch.arange(50), 70)
    torch.testing.assert_close(out, x * keep / 0.6)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, keep.double() / 0.6)
    assert keyed_dropout(x, 0.0, backend=backend) is x
    with torch.no_grad():
        assert torch.equal(keyed_dropout(x, 0.4, seed=77, step=5, backend=backend), out)


def test_a_token_carries_its_mask_along(backend):
    """Any order and any padding, as long as tokens keep their numbers."""
    x = make()[0]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    whole = keyed_dropout(x, 0.4, seed=3, backend=backend)
    part = keyed_dropout(x[order], 0.4, seed=3, token_ids=order, backend=backend)
    assert torch.equal(part, whole[order])


def test_token_numbers_count_beyond_32_bits(native_core):
    x = torch.ones(4, 64)
    ids = torch.tensor([5, 5 + (1 << 32), 5 + (1 << 40), (1 << 62) + 5])
    masks = keyed_dropout(x, 0.5, seed=1, token_ids=ids, backend="native")
    assert len(torch.unique(masks, dim=0)) == 4
    assert torch.equal(masks, keyed_dropout(x, 0.5, seed=1, token_ids=ids, backend="reference"))


@pytest.mark.parametrize("used", ["norm", "sum", "both"])
def test_either_output_may_be_used_alone(backend, used):
    leaves = [t.requires_grad_() for t in make()]

    def total(out, whole):
        parts = {"norm": out.square().sum(), "sum": whole.square().sum()}
        return parts["norm"] + parts["sum"] if used == "both" else parts[used]

    x, residual, weight, shift, bias = leaves
    out, whole = dropout_add_norm(
        x, residual, weight, shift, bias=bias, return_sum=True, backend=backend, **RULE
    )
    keep = channel_keep(0.4, 77, 5, torch.arange(50), 70)
    plain = residual + (x + bias) * keep / 0.6
    want = F.layer_norm(plain, (70,), weight, shift)
    torch.testing.assert_close(whole, plain)
    options = {"allow_unused": True, "materialize_grads": True}
    got = torch.autograd.grad(total(out, whole), leaves, **options)
    wants = torch.autograd.grad(total(want, plain), leaves, **options)
    for a, b in zip(got, wants, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_x_and_residual_may_be_one_tensor(backend):
    x, _, weight, shift, _ = make()
    x.requires_grad_()
    out = dropout_add_norm(x, x, weight, shift, backend=backend)
    (got,) = torch.autograd.grad(out.square().sum(), x)
    (want,) = torch.autograd.grad(F.layer_norm(2 * x, (70,), weight, shift).square().sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_a_gradient_of_one_input_alone(native_core):
    for place in range(5):
        leaves = [t.requires_grad_(i == place) for i, t in enumerate(make())]
        x, residual, weight, shift, bias = leaves
        out = dropout_add_norm(x, residual, weight, shift, bias=bias, backend="native", **RULE)
        out.square().sum().backward()
        assert [t.grad is not None for t in leaves] == [i == place for i in range(5)]


def test_huge_rows_are_normalised(backend):
    """Squares beyond the range of float32."""
    x, _, weight, shift, _ = make(4, 33, torch.float32)
    scale = torch.tensor([1.0, 1e18, 1e25, 1e37])[:, None]
    got = dropout_add_norm(x * scale, None, weight, shift, backend=backend)
    want = F.layer_norm((x * scale).double(), (33,), weight.double(), shift.double())
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


def test_constant_rows_give_the_shift(backend):
    x = torch.full((5, 1030), 1234.567)
    shift = torch.linspace(-1, 1, 1030)
    out = dropout_add_norm(x, None, torch.ones(1030), shift, backend=backend)
    torch.testing.assert_close(out, shift.expand(5, -1), rtol=0, atol=1e-6)


def test_large_offsets_keep_their_digits(backend):
    x, _, weight, shift, _ = make(20, 128, torch.float32)
    moved = x + 4096.0
    want = F.layer_norm(moved.double(), (128,), weight.double(), shift.double())
    got = dropout_add_norm(moved, None, weight, shift, backend=backend)
    assert (got - want).norm() <= 5e-4 * want.norm()  # an input digit is 2.4e-4


def test_second_derivatives_are_refused(native_core):
    x, residual, weight, shift, _ = make()
    x.requires_grad_()
    out = dropout_add_norm(x, residual, weight, shift, backend="native")
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
