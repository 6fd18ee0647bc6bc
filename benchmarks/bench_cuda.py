"""What else runs on a GPU: ranking in plain torch. MK-MMD is in ``bench_mkmmd_gpu.py``."""

from __future__ import annotations

import pytest
import torch

from padkern.ops.ranking import count_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable CUDA device"),
]


def bench_ranking_cuda(measure):
    users, items, dim = 4096, 20001, 128
    states, matrix = torch.randn(users, dim).cuda(), torch.randn(items, dim).cuda()
    targets = torch.randint(1, items, (users,))
    seen, offsets = torch.randint(1, items, (10 * users,)), torch.arange(0, 10 * users + 1, 10)

    def run():
        ranks = count_ranks(states, matrix, targets, seen, offsets)
        torch.cuda.synchronize()
        return ranks

    found = torch.cuda.get_device_properties(0)
    gpu = {"gpu": found.name, "cuda": torch.version.cuda}
    measure(run, **gpu, users=users, items=items, dim=dim, dtype="float32")
