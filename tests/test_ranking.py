"""Rank counting against a sort-based oracle, and its rules for ties, seen items, NaN and tiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from padkern.ops.ranking import (
    ItemTiles,
    count_ranks,
    rank_chunk,
    ranks_from_scores,
    top_k_items,
)


def oracle_rank(scores: np.ndarray, target: int, seen: set[int], mask_repeats: bool) -> float:
    """Mean position of the target over all orders of its ties, from explicit lists."""
    if not mask_repeats:
        seen = set()
    if target in seen or math.isnan(scores[target]):
        return math.inf
    others = [i for i in range(1, len(scores)) if i not in seen and i != target]
    better = [i for i in others if scores[i] > scores[target]]
    tied = [i for i in others if scores[i] == scores[target]]
    positions = range(1 + len(better), 2 + len(better) + len(tied))
    return sum(positions) / len(positions)


def make_case(seed: int, batch: int, items: int):
    """Integer scores (many ties), random seen lists with repeats, some targets among them."""
    rng = np.random.default_rng(seed)
    states = rng.integers(-2, 3, (batch, 3)).astype(np.float32)
    matrix = rng.integers(-2, 3, (items + 1, 3)).astype(np.float32)
    targets = rng.integers(1, items + 1, batch)
    lists = [rng.integers(0, items + 1, rng.integers(0, 6)) for _ in range(batch)]
    for row in range(0, batch, 4):
        lists[row] = np.append(lists[row], targets[row])
    offsets = np.cumsum([0] + [len(row) for row in lists])
    return states, matrix, targets, np.concatenate(lists), offsets, lists


@pytest.mark.parametrize("mask_repeats", [True, False])
@pytest.mark.parametrize(("batch", "items"), [(1, 1), (3, 2), (40, 30), (300, 131)])
def test_matches_oracle(batch, items, mask_repeats):
    states, matrix, targets, values, offsets, lists = make_case(batch, batch, items)
    scores = states @ matrix.T
    scores[::7, :] = np.where(scores[::7] == 2, np.nan, scores[::7])
    scores[1::7, :] = np.where(scores[1::7] == -1, -np.inf, scores[1::7])
    want = [oracle_rank(scores[b], targets[b], set(lists[b]), mask_repeats) for b in range(batch)]
    before = scores.copy()
    got = ranks_from_scores(
        torch.from_numpy(scores), targets, values, offsets, mask_repeats=mask_repeats
    )
    assert got.dtype == torch.float64
    np.testing.assert_array_equal(got.numpy(), want)
    np.testing.assert_array_equal(scores, before)  # the caller's scores are left alone


@pytest.mark.parametrize("tile", [64, 128, 16384])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_inner_product_ranks_for_any_tile_and_chunk(tile, chunk, backend):
    states, matrix, targets, values, offsets, lists = make_case(5, 60, 300)
    want = [oracle_rank(states[b] @ matrix.T, targets[b], set(lists[b]), True) for b in range(60)]
    got = count_ranks(
        torch.from_numpy(states),
        torch.from_numpy(matrix),
        targets,
        values,
        offsets,
        chunk=chunk,
        item_tile=tile,
        backend=backend,
    )
    np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize("size", [1, 3, 255, 256])
def test_request_size_changes_no_rank(size, backend):
    rng = np.random.default_rng(0)
    states = torch.from_numpy(rng.normal(size=(300, 48)).astype(np.float32))
    matrix = torch.from_numpy(rng.normal(size=(700, 48)).astype(np.float32))
    targets = rng.integers(1, 700, 300)
    values, offsets = rng.integers(1, 700, 900), np.arange(0, 901, 3)
    whole = count_ranks(states, matrix, targets, values, offsets, backend=backend)
    for low in (0, 37, 300 - size):
        high = low + size
        part = count_ranks(
            states[low:high],
            matrix,
            targets[low:high],
            values[3 * low : 3 * high],
            offsets[low : high + 1] - 3 * low,
            backend=backend,
        )
        assert torch.equal(part, whole[low:high])


def test_constant_scorer_gets_the_middle_and_nan_scorer_misses():
    scores = torch.zeros(2, 12)
    ranks = ranks_from_scores(scores, np.array([3, 4]), np.array([1, 1, 2]), np.array([0, 3, 3]))
    assert ranks.tolist() == [(9 + 1) / 2, (11 + 1) / 2]
    empty = np.zeros(3, dtype=np.int64)
    nan = ranks_from_scores(scores * torch.nan, np.array([3, 4]), empty[:0], empty)
    assert nan.tolist() == [math.inf, math.inf]


def test_padding_column_is_never_ranked():
    scores = torch.tensor([[9.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    ranks = ranks_from_scores(scores, np.array([1, 1]), np.zeros(0, int), np.zeros(3, int))
    assert ranks.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("tile", [64, 16384])
def test_flags_and_nan_counts(tile, backend):
    """One-hot states pick columns of the item matrix; user u's scores are column u."""
    matrix = torch.arange(200, dtype=torch.float64)[:, None].repeat(1, 4)
    matrix[9, 2] = matrix[150, 2]  # user 2 ties with an item of another tile; user 3 saw its target
    states, targets = torch.eye(4, dtype=torch.float64), np.array([100, 7, 150, 20])
    seen = np.array([20, 30]), np.array([0, 0, 0, 0, 2])
    result = rank_chunk(states, ItemTiles.build(matrix, tile), targets, *seen, backend=backend)
    assert result.ranks.tolist() == [100.0, 193.0, 50.5, math.inf]
    assert result.tied.tolist() == [False, False, True, False]
    assert result.masked.tolist() == [False, False, False, True]
    assert result.nan_others.tolist() == [0, 0, 0, 0]
    assert result.top is None

    # 0 * NaN is NaN: a NaN vector gives NaN to every user. User 1 loses its target, user 3 has
    # seen item 30, and item 130 no longer beats user 0's target.
    matrix[[7, 30, 130]] = torch.nan
    result = rank_chunk(states, ItemTiles.build(matrix, tile), targets, *seen, backend=backend)
    assert result.ranks.tolist() == [99.0, math.inf, 50.5, math.inf]
    assert result.nan_target.tolist() == [False, True, False, False]
    assert result.nan_others.tolist() == [3, 2, 3, 2]


@pytest.mark.parametrize("tile", [64, 16384])
@pytest.mark.parametrize("constant", [False, True])
def test_top_breaks_ties_by_id_and_leaves_out_seen_items(tile, constant, backend):
    states, matrix, targets, values, offsets, lists = make_case(11, 30, 150)
    if constant:
        matrix[:] = 1.0
    got = rank_chunk(
        torch.from_numpy(states),
        ItemTiles.build(torch.from_numpy(matrix), tile),
        targets,
        values,
        offsets,
        top_k=20,
        backend=backend,
    )
    for row in range(30):
        scores = states[row] @ matrix.T
        candidates = [i for i in range(1, 151) if i not in set(lists[row])]
        want = sorted(candidates, key=lambda i: (-scores[i], i))[:20]
        assert got.top[row].tolist() == want


def test_top_fills_up_with_zero(backend):
    matrix = torch.tensor([[0.0], [1.0], [torch.nan], [3.0]])
    got = rank_chunk(
        torch.ones(1, 1),
        ItemTiles.build(matrix),
        np.array([1]),
        np.zeros(0, int),
        [0, 0],
        top_k=20,
        backend=backend,
    )
    assert got.top.tolist() == [[3, 1] + [0] * 18]
    assert got.ranks.tolist() == [2.0]
    assert got.nan_others.tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, backend):
    states, matrix, targets, values, offsets, lists = make_case(2, 9, 20)
    got = count_ranks(
        torch.from_numpy(states).to(dtype),
        torch.from_numpy(matrix),
        targets,
        values,
        offsets,
        backend=backend,
    )
    want = [oracle_rank(states[b] @ matrix.T, targets[b], set(lists[b]), True) for b in range(9)]
    np.testing.assert_array_equal(got.numpy(), want)


def test_empty_batch(backend):
    none = np.zeros(0, int)
    ranks = count_ranks(torch.zeros(0, 2), torch.zeros(4, 2), none, none, [0], backend=backend)
    assert ranks.shape == (0,)
    best = top_k_items(torch.zeros(0, 2), torch.zeros(4, 2), 3, backend=backend)
    assert best.ids.shape == best.scores.shape == (0, 3)
    assert ranks_from_scores(torch.zeros(0, 4), none, none, [0]).shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": [0, 1]}, ValueError, "targets must lie in 1..3"),
        ({"targets": [1, 4]}, ValueError, "targets must lie in 1..3"),
        ({"targets": [1]}, ValueError, "targets must have shape"),
        ({"seen_values": [1, 4]}, ValueError, "seen_values must lie in 0..3"),
        ({"seen_offsets": [0, 1]}, ValueError, "seen_offsets must have shape"),
        ({"seen_offsets": [0, 2, 1]}, ValueError, "seen_offsets must rise"),
        ({"seen_offsets": [0, 1, 3]}, ValueError, "seen_offsets must rise"),
        ({"user_states": torch.zeros(2, 3)}, ValueError, "user_states must be"),
        ({"item_matrix": torch.zeros(1, 2)}, ValueError, "item_matrix must be"),
        ({"item_matrix": torch.zeros(4, 2, dtype=torch.int64)}, TypeError, "floating"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"item_tile": 100}, ValueError, "item_tile"),
    ],
)
def test_argument_errors(change, error, message, backend):
    good = {
        "user_states": torch.zeros(2, 2),
        "item_matrix": torch.zeros(4, 2),
        "targets": [1, 2],
        "seen_values": [1, 2],
        "seen_offsets": [0, 1, 2],
    }
    with pytest.raises(error, match=message):
        count_ranks(**({"backend": backend} | good | change))
