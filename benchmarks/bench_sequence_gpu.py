"""Short attention, exact ranking and segment sums on a CUDA device: Triton against torch.

Times are medians between CUDA events. Every implementation is checked first: attention against the
float64 reference (half peers within the rounding of their dtype), ranks and best items on small
integers, where all are exact, sums against float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_timing
import pytest
import torch
from peers import ranking, sequence

from padkern import _backends
from padkern.ops.ranking import count_ranks, top_k_items
from padkern.ops.segments import segment_sum, segment_sum_ref
from padkern.ops.short_attention import short_attention, short_attention_ref

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable CUDA device"),
]

SECONDS = 0.3
# Sequences, longest, heads, d: PAD's encoder for three experts at 512 and 8,192 users, and longer.
ATTENTION = [(512, 20, 6, 64), (8192, 20, 6, 64), (2048, 50, 4, 64), (4096, 64, 4, 32)]
RANKING = [(12871, 8347, 192), (12871, 8347, 384), (4096, 100_000, 192)]
SEGMENTS = [(4000, 3098, 128), (9000, 50_000, 128), (100_000, 500_000, 64)]
CUT, BEST, CHUNK, CHECKED = 20, 10, 2048, 300


@pytest.fixture(autouse=True)
def _exact_products():
    """float32 products in float32, whatever the process had set."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.cuda.empty_cache()


def _time(benchmark, machine, run: Callable[[], object], group: str, **info: object) -> None:
    info["event_median_ms"] = cuda_timing.event_median_ms(run, SECONDS)
    info["peak_extra_mib"] = cuda_timing.peak_extra_mib(run)
    benchmark.extra_info.update(machine(), **info, gpu=torch.cuda.get_device_name(0))
    benchmark.group = group

    def synced() -> None:
        run()
        torch.cuda.synchronize()

    rounds = max(3, min(100, int(1e3 * SECONDS / max(info["event_median_ms"], 1e-3))))
    benchmark.pedantic(synced, rounds=rounds, iterations=1)


def _skip_without_triton(tensor: torch.Tensor) -> None:
    reason = _backends.why_not_triton(tensor)
    if reason:
        pytest.skip(reason)


def _sequences(count: int, longest: int, heads: int, dim: int, dtype: torch.dtype):
    """Lengths as Prime Pantry's: most are short."""
    rng = torch.Generator().manual_seed(0)
    lengths = 1 + (torch.rand(count, generator=rng) ** 2.5 * longest).long().clamp(max=longest - 1)
    lengths[0] = longest
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).cuda()
    shape = (int(offsets[-1]), heads, dim)
    q, k, v = (
        torch.randn(shape, generator=rng).to("cuda", dtype).requires_grad_() for _ in range(3)
    )
    return q, k, v, offsets


def _attention(name: str, longest: int) -> Callable[..., torch.Tensor]:
    if name in ("triton", "reference"):
        return lambda *a: short_attention(*a, longest=longest, backend=name)
    if name == "triton_dropout":
        return lambda *a: short_attention(*a, longest=longest, backend="triton", dropout=0.2)
    form = {"sdpa": sequence.padded_sdpa, "varlen": sequence.varlen}[name]
    return lambda *a: form(*a, longest)


@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["triton", "triton_dropout", "reference", "sdpa", "varlen"])
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def bench_short_attention(benchmark, skip_peer, machine, shape, name, dtype, mode):
    """Packed sequences in, packed states out; the padded peer's gather and scatter are inside."""
    q, k, v, offsets = _sequences(*shape, dtype)
    if name.startswith("triton"):
        _skip_without_triton(q)
    if name == "varlen" and dtype == torch.float32:
        skip_peer("varlen_attn takes half inputs only")
    run = _attention(name, shape[1])
    rule = {"dropout": 0.2} if name == "triton_dropout" else {}
    want = short_attention_ref(*(x.detach().double() for x in (q, k, v)), offsets, **rule)
    try:
        got = run(q, k, v, offsets)
    except (ImportError, RuntimeError) as error:
        if name.startswith("triton"):
            raise
        skip_peer(f"cannot run: {str(error).splitlines()[0][:120]}")
    exact = name in ("triton", "triton_dropout", "reference") or dtype == torch.float32
    limit = 1e-5 if exact else 3e-2
    assert float((got.detach().double() - want).abs().max()) <= limit * float(want.abs().max())
    upstream = torch.randn_like(got)

    def forward() -> object:
        with torch.no_grad():
            return run(q, k, v, offsets)

    def both() -> object:
        return torch.autograd.grad(run(q, k, v, offsets), (q, k, v), upstream)

    count, longest, heads, dim = shape
    _time(
        *(benchmark, machine, forward if mode == "fwd" else both),
        f"short_attention {shape} {dtype} {mode}",
        **{"op": "short_attention", "implementation": name, "mode": mode, "sequences": count},
        **{"longest": longest, "heads": heads, "d": dim, "tokens": q.shape[0]},
    )


def _on_gpu(problem: ranking.Problem) -> dict[str, Any]:
    return {name: x.cuda() for name, x in vars(problem).items()}


def _run_ranking(name: str, p: dict[str, Any]) -> torch.Tensor:
    rows = (p["states"], p["matrix"])
    ids = (p["targets"], p["seen"], p["offsets"])
    if name == "triton":
        return count_ranks(*rows, *ids, backend="triton")
    if name == "triton_at_most_20":
        return count_ranks(*rows, *ids, at_most=CUT, order=p["popular"], backend="triton")
    if name == "triton_best":
        return top_k_items(*rows, BEST, *ids[1:], backend="triton").ids
    if name == "mm_topk":
        return sequence.mm_topk(*rows, *ids[1:], BEST, CHUNK)
    return sequence.mm_count(*rows, *ids, CHUNK)


@pytest.mark.parametrize(
    "name", ["triton", "triton_at_most_20", "mm_count", "triton_best", "mm_topk"]
)
@pytest.mark.parametrize("size", RANKING, ids=str)
def bench_ranking(benchmark, machine, size, name):
    """Ranks of all users, or their ten best items; packing and checks of the ids are inside."""
    exact = _on_gpu(ranking.make(CHECKED, *size[1:], True))
    if name.startswith("triton"):
        _skip_without_triton(exact["states"])
    got = _run_ranking(name, exact)
    rows, ids = (exact["states"], exact["matrix"]), (exact["seen"], exact["offsets"])
    if name in ("triton_best", "mm_topk"):
        best = top_k_items(*rows, BEST, *ids, backend="reference").ids
        scores = (rows[0] @ rows[1].T).gather(1, best)
        # topk leaves the choice among equal scores open.
        assert torch.equal((rows[0] @ rows[1].T).gather(1, got), scores)
    else:
        want = count_ranks(*rows, exact["targets"], *ids, backend="reference")
        if name == "triton_at_most_20":
            want = want.masked_fill(want > CUT, torch.inf)
        assert torch.equal(got.double(), want)
    problem = _on_gpu(ranking.make(*size))
    users, items, dim = size
    kind = "best items" if name in ("triton_best", "mm_topk") else "ranks"
    _time(
        *(benchmark, machine, lambda: _run_ranking(name, problem), f"{kind} {size}"),
        **{"op": "ranking", "implementation": name, "users": users, "items": items, "D": dim},
        useful_gflop=round(2e-9 * users * items * dim, 2),
    )


@pytest.mark.parametrize("name", ["triton", "index_add", "index_add_deterministic"])
@pytest.mark.parametrize("shape", SEGMENTS, ids=str)
def bench_segment_sum(benchmark, machine, shape, name):
    """Sums of slots' rows by unique item; some items have most of the slots."""
    segments, count, dim = shape
    rng = torch.Generator().manual_seed(0)
    rows = (torch.rand(count, generator=rng) ** 3 * segments).long()
    starts = torch.cat([torch.zeros(1).long(), torch.bincount(rows, minlength=segments).cumsum(0)])
    slots = rows.sort(stable=True).indices.cuda()
    rows, starts = rows.cuda(), starts.cuda()
    values = torch.randn(count, dim, generator=rng).cuda()
    if name == "triton":
        _skip_without_triton(values)

    def run() -> torch.Tensor:
        if name == "triton":
            return segment_sum(values, slots, starts, backend="triton")
        return values.new_zeros(segments, dim).index_add_(0, rows, values)

    torch.use_deterministic_algorithms(name == "index_add_deterministic")
    try:
        want = segment_sum_ref(values.double(), slots, starts)
        size = segment_sum_ref(values.double().abs(), slots, starts).max()
        assert float((run().double() - want).abs().max()) <= 1e-6 * float(size)
        _time(
            *(benchmark, machine, run, f"segment_sum {shape}"),
            **{"op": "segment_sum", "implementation": name, "segments": segments},
            **{"slots": count, "d": dim},
        )
    finally:
        torch.use_deterministic_algorithms(False)
