"""Attention over short packed sequences: the masks, the limit of 64 tokens, joint projections."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from padkern.ops.keyed_dropout import attention_keep, channel_keep, mix_seed, philox
from padkern.ops.short_attention import short_attention, short_attention_qkv, short_attention_ref

RULE = {"dropout": 0.4, "seed": 77, "step": 5}


def make(lengths, heads=2, dim=8, dtype=torch.float64):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    shape = (int(offsets[-1]), 3, heads, dim)
    return torch.randn(shape, generator=generator, dtype=dtype), offsets


@pytest.mark.parametrize(
    ("seed", "counter", "want"),
    [
        (0, (0,) * 4, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, (2**32 - 1,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_generator_gives_the_known_answers(seed, counter, want):
    """The answers of the generator's authors."""
    assert " ".join(f"{int(word):08x}" for word in philox(seed, *counter)) == want


def test_masks_keep_the_right_share_and_differ():
    numbers = torch.arange(40)
    keep = attention_keep(0.3, 1, 2, numbers, 3, 20)
    assert keep.shape == (40, 3, 20, 20)
    spread = math.sqrt(0.21 / keep.numel())
    assert abs(keep.double().mean() - 0.7) < 4 * spread
    for axis in range(4):  # no two sequences, heads, queries or keys share a mask
        rows = keep.movedim(axis, 0).flatten(1)
        assert len(torch.unique(rows, dim=0)) == len(rows)
    for other in (
        attention_keep(0.3, 2, 2, numbers, 3, 20),
        attention_keep(0.3, 1, 3, numbers, 3, 20),
    ):
        assert abs((other == keep).double().mean() - 0.58) < 0.02
    wide = channel_keep(0.3, 1, 2, torch.arange(200), 130)
    assert abs(wide.double().mean() - 0.7) < 4 * math.sqrt(0.21 / wide.numel())
    assert len(torch.unique(wide, dim=0)) == 200
    assert len(torch.unique(wide.T, dim=0)) == 130


def test_mask_of_a_longer_grid_holds_that_of_a_shorter():
    numbers = torch.tensor([7, 3])
    long, short = (attention_keep(0.5, 9, 1, numbers, 2, n) for n in (13, 6))
    assert torch.equal(long[:, :, :6, :6], short)


def test_mixed_seeds_are_distinct():
    seeds = {mix_seed(seed, a, b) for seed in range(10) for a in range(10) for b in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_reference_is_the_definition():
    qkv, offsets = make([3, 1, 4])
    q, k, v = qkv.unbind(1)
    got = short_attention_ref(q, k, v, offsets)
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        for i in range(first, last):
            for h in range(2):
                scores = torch.stack([q[i, h] @ k[j, h] for j in range(first, i + 1)]) / 8**0.5
                want = torch.softmax(scores, 0) @ v[first : i + 1, h]
                torch.testing.assert_close(got[i, h], want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rule", [{}, RULE], ids=["plain", "dropout"])
def test_joint_projection_has_the_gradient_of_its_parts(native_core, rule):
    qkv, offsets = make([5, 2, 9])
    joint = qkv.clone().requires_grad_()
    parts = [x.clone().requires_grad_() for x in qkv.unbind(1)]
    out = short_attention_qkv(joint, offsets, backend="native", **rule)
    want = short_attention(*parts, offsets, backend="native", **rule)
    assert torch.equal(out, want)
    weights = torch.randn_like(out)
    (got,) = torch.autograd.grad((out * weights).sum(), joint)
    wants = torch.autograd.grad((want * weights).sum(), parts)
    assert torch.equal(got, torch.stack(wants, 1))
    with torch.no_grad():
        assert torch.equal(short_attention_qkv(joint, offsets, backend="native", **rule), want)


def test_joint_projection_refuses_second_derivatives(native_core):
    qkv, offsets = make([3, 2])
    qkv.requires_grad_()
    out = short_attention_qkv(qkv, offsets, backend="native").square().sum()
    (gradient,) = torch.autograd.grad(out, qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("rule", [{}, RULE], ids=["plain", "dropout"])
def test_longer_sequences_fall_back(rule):
    qkv, offsets = make([3, 65, 0, 90])
    results = []
    for backend in ("auto", "reference"):
        leaf = qkv.clone().requires_grad_()
        out = short_attention_qkv(leaf, offsets, backend=backend, **rule)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_native_refuses_longer_sequences(native_core):
    qkv, offsets = make([3, 65])
    with pytest.raises(RuntimeError, match="at most 64 tokens, got 65"):
        short_attention(*qkv.unbind(1), offsets, backend="native")
    # A bound that is wrong is noticed by the kernel.
    with pytest.raises(ValueError, match="at most 64 tokens to the native backend, got 65 at"):
        short_attention(*qkv.unbind(1), offsets, longest=10, backend="native")


def test_reference_refuses_a_bound_that_is_too_small():
    qkv, offsets = make([3, 9])
    with pytest.raises(ValueError, match="longest must be at least the longest sequence, 9, got 8"):
        short_attention(*qkv.unbind(1), offsets, longest=8, backend="reference")


def test_falling_offsets_are_named(backend):
    qkv, _ = make([8])
    offsets = torch.tensor([0, 6, 4, 8])
    with pytest.raises(ValueError, match="offsets must not decrease"):
        short_attention(*qkv.unbind(1), offsets, backend=backend)


def test_nan_stays_in_its_sequence_and_head(backend):
    qkv, offsets = make([4, 3, 5])
    clean = short_attention_qkv(qkv, offsets, backend=backend)
    for part in range(3):
        dirty = qkv.clone()
        dirty[5, part, 1] = torch.nan
        out = short_attention_qkv(dirty, offsets, backend=backend)
        assert torch.isnan(out[4:7, 1]).any()
        out[4:7, 1] = clean[4:7, 1]
        assert torch.equal(out, clean)


def test_agrees_with_scaled_dot_product_attention(backend):
    qkv, offsets = make([20], heads=4, dim=64, dtype=torch.float32)
    q, k, v = (x.transpose(0, 1)[None] for x in qkv.unbind(1))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
    got = short_attention_qkv(qkv, offsets, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_packing_changes_no_bit(native_core):
    qkv, offsets = make([7, 20, 1, 33], dtype=torch.float32)
    whole = short_attention_qkv(qkv, offsets, backend="native")
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        alone = torch.tensor([0, last - first])
        part = short_attention_qkv(qkv[first:last], alone, backend="native")
        assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize("far", [1e8, 1e20])
def test_scores_that_are_far_apart(backend, far):
    """The second query has the scores 0 and -1e16, or -Inf: its weight is on the first key."""
    q = torch.tensor([1.0, far]).reshape(2, 1, 1).requires_grad_()
    k = torch.tensor([0.0, -far]).reshape(2, 1, 1).requires_grad_()
    v = torch.tensor([3.0, 5.0]).reshape(2, 1, 1).requires_grad_()
    out = short_attention(q, k, v, torch.tensor([0, 2]), scale=1.0, backend=backend)
    assert out.flatten().tolist() == [3.0, 3.0]
    (d_v,) = torch.autograd.grad(out.sum(), [v])
    assert d_v.flatten().tolist() == [2.0, 0.0]


def test_longer_sequences_compile(native_core):
    """A known bound decides without a look at the offsets."""
    qkv, offsets = make([80, 3], dtype=torch.float32)

    def attend(x):
        return short_attention_qkv(x, offsets, longest=80)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv), attend(qkv), rtol=1e-5, atol=1e-5)
