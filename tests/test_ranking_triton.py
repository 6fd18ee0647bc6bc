"""The Triton backend of ranking against the oracle: on a GPU, or in the interpreter.

``test_sequence_triton_interpreter.py`` starts these cases in Triton's interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from padkern.ops.ranking import ItemTiles, count_ranks, rank_chunk, top_k_items
from padkern.testing import LAYOUTS, assert_matches, exact, run
from padkern.testing.records.ranking import RANKING as SPEC

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
SLOW = {"many_users", "three_groups"} if INTERPRETED else set()


def check(shape, dtype=torch.float32, layout=LAYOUTS[0], options="default"):
    case = SPEC.case(shape, dtype, layout, OPTIONS[options], device=DEVICE)
    got = run(SPEC, case, "triton")
    assert_matches(SPEC, case, got._replace(value=got.value.cpu()), exact(SPEC, case))


def make(users, items, dim, dtype=torch.float32, *, ties=False, seed=0):
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(users, dim, generator=rng, dtype=torch.float64)
    matrix = torch.randn(items + 1, dim, generator=rng, dtype=torch.float64)
    if ties:
        states, matrix = states.round(), matrix.round()
    lists = [torch.randint(0, items + 1, (n % 5,), generator=rng) for n in range(users)]
    offsets = torch.tensor([0, *(len(x) for x in lists)]).cumsum(0)
    targets = torch.randint(1, items + 1, (users,), generator=rng)
    arrays = (states.to(dtype), matrix.to(dtype), targets, torch.cat(lists), offsets)
    return tuple(x.to(DEVICE) for x in arrays)


@pytest.mark.parametrize("shape", [name for name in SPEC.shapes if name not in SLOW])
def test_shapes(shape, poisoned_empty):
    check(SPEC.shapes[shape])


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, poisoned_empty):
    check((70, 300, 3), options=options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    check(SPEC.shapes["primes"], dtype, options="order")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    check((9, 70, 4), layout=layout, options="early_in_order")


@pytest.mark.skipif(INTERPRETED, reason="too slow in the interpreter")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(3000, 8000, 192), (100, 50_000, 384)], ids=str)
def test_large_shapes(shape, options):
    check(shape, options=options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_vectors_tie_exactly(dtype):
    """Wherever they stand: real numbers, whose sums are rounded."""
    states, matrix, targets, seen, offsets = make(20, 300, 37, dtype)
    copies = torch.tensor([3, 127, 128, 129, 256, 299], device=DEVICE)
    matrix[copies] = matrix[3].clone()
    targets[:] = copies[torch.arange(20, device=DEVICE) % len(copies)]
    result = rank_chunk(
        states,
        ItemTiles.build(matrix),
        targets,
        seen,
        offsets,
        mask_repeats=False,
        backend="triton",
    )
    assert result.tied.all()
    scores = states.double() @ matrix.double().T
    own = scores.gather(1, targets[:, None])
    above = (scores[:, 1:] > own + 1e-4).sum(1)  # nothing else is that near here
    assert torch.equal(result.ranks, 1 + above + 0.5 * (len(copies) - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_rank_depends_on_the_request_or_the_order(dtype):
    arrays = make(70, 300, 11, dtype)
    states, matrix, targets, seen, offsets = arrays
    whole = count_ranks(*arrays, backend="triton")
    walk = 1 + torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(count_ranks(*arrays, order=walk, backend="triton"), whole)
    capped = count_ranks(*arrays, at_most=30, order=walk, backend="triton")
    assert torch.equal(capped, whole.masked_fill(whole > 30, torch.inf))
    for first, last in ((0, 1), (5, 70)):
        low, high = int(offsets[first]), int(offsets[last])
        part = count_ranks(
            states[first:last],
            matrix,
            targets[first:last],
            seen[low:high],
            offsets[first : last + 1] - low,
            backend="triton",
        )
        assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize("late", [0, 1])
def test_a_user_is_left_only_when_it_is_beaten(late, monkeypatch):
    """One program walks a stage: four better items in its first tile, maybe a fifth later."""
    from padkern.ops.ranking import triton_impl

    monkeypatch.setattr(triton_impl, "_PROGRAMS", 1)
    matrix = torch.zeros(600, 1, device=DEVICE)
    matrix[1] = 1
    matrix[300:304] = 2
    matrix[450] = 2 * late
    none, offsets = torch.zeros(0).long().to(DEVICE), torch.zeros(2).long().to(DEVICE)
    arguments = (matrix[1:2], matrix, torch.ones(1).long().to(DEVICE), none, offsets)
    got = count_ranks(*arguments, at_most=5, backend="triton")
    assert got.tolist() == [torch.inf if late else 5.0]


@pytest.mark.parametrize("ties", [False, True], ids=["real", "ties"])
@pytest.mark.parametrize("k", [1, 5, 16, 120])
def test_best_items_against_a_sort(k, ties):
    states, matrix, _, seen, offsets = make(9, 150, 3, torch.float64, ties=ties)
    walk = 1 + torch.randperm(150, generator=torch.Generator().manual_seed(2))
    scores = states @ matrix.T
    scores[:, 0] = -torch.inf
    rows = torch.arange(9, device=DEVICE).repeat_interleave(offsets.diff())
    scores[rows, seen] = -torch.inf
    want, ids = scores.sort(dim=1, descending=True, stable=True)
    for items in (matrix, ItemTiles.build(matrix, order=walk)):
        best = top_k_items(states, items, k, seen, offsets, backend="triton")
        assert torch.equal(best.ids, ids[:, :k])
        torch.testing.assert_close(best.scores, want[:, :k], rtol=1e-12, atol=1e-12)


def test_best_items_and_counts_in_one_pass():
    states, matrix, targets, seen, offsets = make(9, 140, 3, ties=True)
    items = ItemTiles.build(matrix)
    results = [
        rank_chunk(states, items, targets, seen, offsets, top_k=7, backend=backend)
        for backend in ("triton", "reference")
    ]
    for got, want in zip(*(vars(result).values() for result in results), strict=True):
        assert torch.equal(got, want)


def test_fewer_items_than_places_and_numbers_that_are_not_finite():
    states = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [-torch.inf, 1.0]], device=DEVICE)
    matrix = torch.tensor([[0.0, 0], [2, 0], [1, 0], [torch.inf, 1], [3, 0]], device=DEVICE)
    best = top_k_items(states, matrix, 6, backend="triton")
    want = top_k_items(states, matrix, 6, backend="reference")
    assert torch.equal(best.ids, want.ids)
    assert torch.equal(best.scores, want.scores)


@pytest.mark.parametrize("at_most", [None, 1])
def test_nan_scores_are_counted(at_most):
    states, matrix, targets, seen, offsets = make(30, 300, 4, ties=True)
    matrix[[7, 200, 290], 1] = torch.nan
    states[3, 2] = torch.inf
    states[4, 0] = torch.nan
    arguments = (ItemTiles.build(matrix), targets, seen, offsets)
    got, want = (
        rank_chunk(states, *arguments, at_most=at_most, backend=backend)
        for backend in ("triton", "reference")
    )
    for name in ("ranks", "masked", "nan_target", "nan_others"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def test_items_without_a_column_and_without_users():
    empty = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    matrix = torch.randn(5, 3, device=DEVICE)
    best = top_k_items(matrix[:0], matrix, 3, backend="triton")
    assert best.ids.shape == best.scores.shape == (0, 3)
    offsets = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    assert count_ranks(matrix[:0], matrix, empty, empty, offsets, backend="triton").shape == (0,)


def test_longer_lists_are_refused():
    matrix = torch.randn(200, 3, device=DEVICE)
    with pytest.raises(RuntimeError, match="at most 128 places, got 129"):
        top_k_items(matrix[:2], matrix, 129, backend="triton")
