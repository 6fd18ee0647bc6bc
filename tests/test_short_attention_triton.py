"""The Triton backend of short attention against the reference: on a GPU, or in the interpreter.

``test_sequence_triton_interpreter.py`` starts these cases in Triton's interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from padkern.ops.short_attention import short_attention, short_attention_qkv, short_attention_ref
from padkern.testing import LAYOUTS, assert_matches, exact, run
from padkern.testing.records.short_attention import SHORT_ATTENTION as SPEC

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = (
    []
    if INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available(), reason="torch finds no usable CUDA device"
        ),
    ]
)
OPTIONS = {options.name: options for options in SPEC.options}
RULE = {"dropout": 0.4, "seed": 77, "step": 2**32 - 1}
# In the interpreter a program takes tens of milliseconds.
MANY = {"many_sequences", "many_heads", "pad_training"} if INTERPRETED else set()


def check(shape, dtype=torch.float32, layout=LAYOUTS[0], options="plain"):
    case = SPEC.case(shape, dtype, layout, OPTIONS[options], device=DEVICE)
    assert_matches(SPEC, case, run(SPEC, case, "triton"), exact(SPEC, case))


def make(lengths, heads=2, dim=8, dtype=torch.float32):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    shape = (int(offsets[-1]), 3, heads, dim)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype),
        offsets.to(DEVICE),
    )


@pytest.mark.parametrize("shape", [name for name in SPEC.shapes if name not in MANY])
def test_shapes(shape, poisoned_empty):
    check(SPEC.shapes[shape])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_and_options(dtype, options, poisoned_empty):
    check(SPEC.shapes["odd"], dtype, options=options)
    if dtype == torch.float64:
        check(SPEC.shapes["limit"], dtype, options=options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    check((3, 9, 2, 7), layout=layout, options="dropout")


@pytest.mark.skipif(INTERPRETED, reason="too slow in the interpreter")
@pytest.mark.parametrize("shape", [(512, 20, 6, 64), (300, 50, 2, 100), (2000, 7, 1, 32)])
def test_large_shapes(shape):
    check(shape)
    check(shape, torch.bfloat16, options="dropout")


@pytest.mark.parametrize("longest", [1, 5, 6, 16, 20, 32, 33, 64])
def test_every_cut_of_the_tokens(longest):
    """A looser bound cuts the tokens into other tiles; masks and results are the same."""
    qkv, offsets = make([1, 0, 1, 1] if longest < 5 else [5, 0, 3, 1, 4, 5], heads=1)
    want = short_attention_ref(*qkv.double().unbind(1), offsets, **RULE)
    got = short_attention_qkv(qkv, offsets, longest=longest, backend="triton", **RULE)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_joint_projection_has_the_gradient_of_its_parts(dtype):
    qkv, offsets = make([5, 2, 9], dtype=dtype)
    joint = qkv.clone().requires_grad_()
    parts = [x.clone().requires_grad_() for x in qkv.unbind(1)]
    out = short_attention_qkv(joint, offsets, backend="triton", **RULE)
    want = short_attention(*parts, offsets, backend="triton", **RULE)
    assert out.dtype == torch.float32
    assert torch.equal(out, want)
    weights = torch.randn_like(out)
    (got,) = torch.autograd.grad((out * weights).sum(), joint)
    wants = torch.autograd.grad((want * weights).sum(), parts)
    assert got.dtype == dtype
    assert torch.equal(got, torch.stack(wants, 1))
    with torch.no_grad():
        assert torch.equal(short_attention_qkv(joint, offsets, backend="triton", **RULE), want)


def test_mixed_dtypes():
    qkv, offsets = make([4, 2])
    q, k, v = qkv.unbind(1)
    got = short_attention(q.bfloat16(), k, v, offsets, backend="triton")
    want = short_attention_ref(q.bfloat16().double(), k.double(), v.double(), offsets)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", range(3))
def test_nan_and_infinity_stay_in_their_sequence_and_head(part, value):
    """Also where several sequences share a tile, forward and backward."""
    qkv, offsets = make([4, 3, 5])
    results = []
    for dirty in (False, True):
        x = qkv.clone()
        if dirty:
            x[5, part, 1] = value
        x.requires_grad_()
        out = short_attention_qkv(x, offsets, backend="triton", longest=5)
        (gradient,) = torch.autograd.grad(out.square().sum(), x)
        results.append((out.detach(), gradient))
    (clean, clean_gradient), (out, gradient) = results
    assert not torch.isfinite(out[4:7, 1]).all()
    assert not torch.isfinite(gradient[4:7, :, 1]).all()
    out[4:7, 1] = clean[4:7, 1]
    gradient[4:7, :, 1] = clean_gradient[4:7, :, 1]
    assert torch.equal(out, clean)
    assert torch.equal(gradient, clean_gradient)


@pytest.mark.parametrize("longest", [4, 40])
def test_tokens_of_nobody_are_nan(longest, monkeypatch):
    """Nobody has read the offsets on a GPU: what they leave out must not pass for a result."""
    from padkern.ops.short_attention.triton_impl import (
        short_attention_grad_triton,
        short_attention_triton,
    )

    monkeypatch.setattr(torch, "empty", torch.zeros)
    qkv, _ = make([60], heads=1)
    q, k, v = qkv.unbind(1)
    offsets = torch.tensor([2, 5, 55, 58], device=DEVICE)
    out = short_attention_triton(q, k, v, offsets, 0.3, 0.0, 0, 0, longest)
    gradient = short_attention_grad_triton(
        out.nan_to_num(), q, k, v, offsets, 0.3, 0.0, 0, 0, longest
    )
    token = torch.arange(60, device=DEVICE)
    lost = (token < 2) | (token >= 58) | ((token >= 5 + longest) & (token < 55))
    assert torch.equal(torch.isnan(out).any(2)[:, 0], lost)
    assert torch.equal(torch.isnan(gradient).flatten(1).any(1), lost)
    assert torch.equal(torch.isnan(gradient).flatten(1).all(1), lost)


def test_same_bits_again():
    qkv, offsets = make([7, 20, 1, 13], dtype=torch.float32)
    results = []
    for _ in range(2):
        x = qkv.clone().requires_grad_()
        out = short_attention_qkv(x, offsets, backend="triton", **RULE)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_longer_sequences_are_refused():
    qkv, offsets = make([3, 65])
    with pytest.raises(RuntimeError, match="at most 64 tokens, got 65"):
        short_attention_qkv(qkv, offsets, backend="triton")


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU it is the one to take")
def test_auto_never_interprets():
    qkv, offsets = make([3, 2])
    want = short_attention_qkv(qkv, offsets, backend="reference")
    torch.testing.assert_close(short_attention_qkv(qkv, offsets), want)
