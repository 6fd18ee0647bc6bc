"""Linear maps: what the record does not hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from padkern.data.batch import pack
from padkern.models.build import build_expert
from padkern.models.projection import project
from padkern.ops.linear import linear


def make(tokens, width, out, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, width), (out, width), (out,))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("relu", [False, True])
def test_it_is_torchs_map(backend, relu):
    x, weight, bias = make(70, 130, 50, torch.float64)
    want = F.linear(x, weight, bias)
    got = linear(x, weight, bias, relu=relu, backend=backend)
    torch.testing.assert_close(got, F.relu(want) if relu else want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("width", "out"), [(64, 192), (130, 50), (7, 3)])
def test_a_row_has_the_same_bits_in_any_batch(native_core, width, out, dtype):
    x, weight, bias = make(200, width, out, dtype)
    whole = linear(x, weight, bias, relu=True, backend="native")
    for rows in ([0], [199], list(range(3, 8)), list(range(61, 200)), [5, 150, 5]):
        assert torch.equal(linear(x[rows], weight, bias, relu=True, backend="native"), whole[rows])


def test_only_wanted_gradients_are_computed(native_core):
    x, weight, bias = make(70, 20, 9)
    for wanted in ([True, False, False], [False, True, False], [False, False, True]):
        leaves = [
            t.clone().requires_grad_(w) for t, w in zip((x, weight, bias), wanted, strict=True)
        ]
        linear(*leaves, relu=True, backend="native").sum().backward()
        assert [t.grad is not None for t in leaves] == wanted
        again = [t.clone().requires_grad_() for t in (x, weight, bias)]
        linear(*again, relu=True, backend="native").sum().backward()
        for got, want in zip(leaves, again, strict=True):
            assert got.grad is None or torch.equal(got.grad, want.grad)


def test_relu_keeps_nan_and_passes_its_gradient(backend):
    x = torch.tensor([[float("nan")], [-1.0], [2.0]], requires_grad=True)
    y = linear(x, torch.ones(1, 1), relu=True, backend=backend)
    assert y[0].isnan()
    assert y[1:].flatten().tolist() == [0.0, 2.0]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.flatten().tolist() == [1.0, 0.0, 1.0]


def test_models_follow_autocast_and_half_weights():
    x, weight, bias = make(5, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert project(x, weight, bias, relu=True).dtype == torch.bfloat16
    assert project(x.half(), weight.half(), bias.half()).dtype == torch.float16
    with pytest.raises(RuntimeError, match="dtype"):
        project(x, weight.half())


def test_user_states_do_not_depend_on_the_batch(native_core):
    torch.manual_seed(0)
    text = torch.randn(41, 12)
    text[0] = 0
    expert = build_expert("id", 40, text, dim=16, max_len=9, num_layers=2, num_heads=2).eval()
    lengths = torch.randint(1, 10, (30,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    items = torch.randint(1, 41, (int(offsets[-1]),))
    table = expert.tower(text)
    with torch.no_grad():
        whole = expert.encoder(table[items], pack(items, offsets, 9))
        for b in (0, 7, 29):
            part = items[offsets[b] : offsets[b + 1]]
            own = torch.tensor([0, len(part)])
            alone = expert.encoder(table[part], pack(part, own, 9))
            assert torch.equal(alone, whole[offsets[b] : offsets[b + 1]])
