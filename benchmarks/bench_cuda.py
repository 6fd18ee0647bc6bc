"""What a GPU runs in this version: the torch references, eager and compiled.

No GPU kernel exists yet; these are the figures that one will have to beat.
"""

from __future__ import annotations

import pytest
import torch

from padkern import mkmmd_loss
from padkern.ops.ranking import count_ranks
from padkern.testing import make_mkmmd_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable CUDA device"),
]


def _gpu() -> dict[str, object]:
    found = torch.cuda.get_device_properties(0)
    return {"gpu": found.name, "cuda": torch.version.cuda}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("n", [672, 2048])
def bench_mkmmd_forward_backward_cuda(measure, n, compiled):
    source, target = (t.cuda().requires_grad_() for t in make_mkmmd_inputs(n, n, 128))

    def loss(x, y):
        return mkmmd_loss(x, y, backend="reference")

    expected = loss(source.detach().double(), target.detach().double())
    function = torch.compile(loss) if compiled else loss
    assert abs(float(function(source, target)) - float(expected)) < 1e-4

    def run():
        gradients = torch.autograd.grad(function(source, target), (source, target))
        torch.cuda.synchronize()
        return gradients

    measure(run, **_gpu(), n=n, m=n, dim=128, dtype="float32", useful_gflop=12 * n * n * 128 / 1e9)


def bench_ranking_cuda(measure):
    users, items, dim = 4096, 20001, 128
    states, matrix = torch.randn(users, dim).cuda(), torch.randn(items, dim).cuda()
    targets = torch.randint(1, items, (users,))
    seen, offsets = torch.randint(1, items, (10 * users,)), torch.arange(0, 10 * users + 1, 10)

    def run():
        ranks = count_ranks(states, matrix, targets, seen, offsets)
        torch.cuda.synchronize()
        return ranks

    measure(run, **_gpu(), users=users, items=items, dim=dim, dtype="float32")
