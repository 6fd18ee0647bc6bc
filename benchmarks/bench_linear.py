"""Linear maps of packed tokens at the sizes of PAD's encoders, forward and backward, on the CPU.

Run with ``pytest benchmarks/bench_linear.py --benchmark-only``. The tokens of a training step, with
d = 64 (``clean``) and 128 (``parity``): one map, the three of an attention in one, a map with ReLU;
and first layers of text towers. All three gradients are computed. The peers are torch's own linear
map, eager and through ``torch.compile``; every contender is checked against float64 first.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from settings import SMALL

from padkern import _native
from padkern.ops.linear import linear, linear_ref

#: Name -> tokens, inputs, outputs, ReLU.
SHAPES = {
    "64 to 64": (2943, 64, 64, False),
    "64 to 192": (2943, 64, 192, False),
    "128 to 128": (2943, 128, 128, False),
    "128 to 384": (2943, 128, 384, False),
    "128 to 128, ReLU": (2943, 128, 128, True),
    "256 to 64": (3800, 256, 64, False),
    "4096 to 512": (3800, 4096, 512, False),
}
if SMALL:
    SHAPES = {name: (min(t, 40), min(k, 64), n, relu) for name, (t, k, n, relu) in SHAPES.items()}


def torch_form(x, weight, bias, relu: bool):
    """The map as torch writes it."""
    y = F.linear(x, weight, bias)
    return y.relu() if relu else y


@lru_cache(maxsize=1)
def compiled():
    return torch.compile(torch_form, dynamic=False)


def step(form, x, weight, bias, grad, relu: bool):
    """Value and the gradients of x, weight and bias."""
    y = form(x, weight, bias, relu)
    return (y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad))


@pytest.mark.parametrize("contender", ["native", "torch", "torch_compiled"])
@pytest.mark.parametrize("shape", list(SHAPES))
def bench_linear(measure, benchmark, limits, shape, contender):
    if contender == "native" and _native.load().reason:
        pytest.skip(_native.load().reason)
    tokens, inputs, outputs, relu = SHAPES[shape]
    draw = torch.Generator().manual_seed(0)

    def drawn(*size: int):
        return torch.randn(*size, generator=draw)

    x, weight, bias = drawn(tokens, inputs), drawn(outputs, inputs) / inputs**0.5, drawn(outputs)
    grad = drawn(tokens, outputs)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def native(x, weight, bias, relu):
        return linear(x, weight, bias, relu=relu, backend="native")

    def form(*arguments):
        chosen = {"native": native, "torch": torch_form}
        return (chosen.get(contender) or compiled())(*arguments)

    def run():
        return step(form, *leaves, grad, relu)

    # A ReLU at a rounded zero may go either way: there the gradient is left out of the check.
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    edge = linear_ref(*wide).detach().abs() < 1e-5
    grad = grad.masked_fill(edge, 0.0) if relu else grad
    want = step(lambda x, w, b, relu: linear_ref(x, w, b, relu=relu), *wide, grad.double(), relu)
    for got, exact in zip(run(), want, strict=True):
        assert float((got - exact).norm() / exact.norm()) < 1e-5
    benchmark.group = f"linear map, {tokens} tokens, {shape}"
    flop = 6 * tokens * inputs * outputs
    measure(run, contender=contender, tokens=tokens, inputs=inputs, outputs=outputs, relu=relu,
            small=SMALL, flop=flop)  # fmt: skip
    rate = flop / benchmark.stats.stats.median / 1e9
    benchmark.extra_info["gflop_per_s"] = round(rate, 1)
