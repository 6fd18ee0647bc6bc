"""What the native ranking promises beyond the rules: bits, early exits, best items, real data."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from padkern.data.io import read_dataset
from padkern.data.split import leave_one_out
from padkern.ops.ranking import ItemTiles, count_ranks, rank_chunk, top_k_items

pytestmark = pytest.mark.usefixtures("native_core")

ISAS = ("baseline", "avx2", "avx512")


def problem(users: int, items: int, dim: int, dtype=torch.float32, seed: int = 0):
    """Normal states and vectors, targets, and seen lists of three with some targets among them."""
    rng = np.random.default_rng([seed, users, items, dim])
    states = torch.from_numpy(rng.normal(size=(users, dim))).to(dtype)
    matrix = torch.from_numpy(rng.normal(size=(items + 1, dim))).to(dtype)
    targets = torch.from_numpy(rng.integers(1, items + 1, users))
    seen = torch.from_numpy(rng.integers(0, items + 1, (users, 3)))
    seen[::9, 1] = targets[::9]
    return states, matrix, targets, seen.reshape(-1), torch.arange(0, 3 * users + 1, 3)


def check_equal_vectors() -> None:
    """One vector for all items: any sum in another order would break a tie somewhere."""
    for users, items, dim, dtype in (
        (1, 100, 37, torch.float32),
        (70, 530, 201, torch.float32),
        (300, 997, 385, torch.float32),
        (70, 131, 193, torch.float64),
    ):
        states, matrix, targets, _, _ = problem(users, items, dim, dtype)
        matrix = matrix[:1].expand(items + 1, dim)
        none = torch.zeros(users + 1, dtype=torch.int64)
        ranks = count_ranks(states, matrix, targets, none[:0], none, backend="native")
        assert (ranks == (items + 1) / 2).all(), (users, items, dim, dtype)


@pytest.mark.parametrize("isa", ISAS)
def test_equal_vectors_tie_exactly(isa, native_core):
    detected = native_core.isa()["detected"]
    if detected not in ISAS[ISAS.index(isa) :]:
        pytest.skip(f"this CPU has {detected}, not {isa}")
    environment = os.environ | {"PADKERN_ISA": isa}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_copy_of_the_target_ties_wherever_it_stands():
    states, matrix, _, values, _ = problem(20, 400, 210)
    free = torch.zeros(21, dtype=torch.int64)
    for place in (1, 47, 48, 49, 333, 400):
        changed = matrix.clone()
        # Every user's target is item 200, and `place` is its copy.
        changed[place] = changed[200]
        result = rank_chunk(
            states,
            ItemTiles.build(changed),
            torch.full((20,), 200),
            values[:0],
            free,
            backend="native",
        )
        assert result.tied.all(), place


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_do_not_depend_on_request_order_or_threads(dtype, restore_threads):
    states, matrix, targets, values, offsets = problem(290, 1500, 200, dtype)
    items = ItemTiles.build(matrix)
    shuffled = ItemTiles.build(matrix, order=1 + np.random.default_rng(3).permutation(1500))
    whole = rank_chunk(states, items, targets, values, offsets, top_k=13, backend="native")
    best = top_k_items(states, items, 13, values, offsets, backend="native")
    assert torch.equal(best.ids, whole.top)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for low, high in ((0, 1), (3, 11), (100, 290)):
            for tiles in (items, shuffled):
                seen = values[3 * low : 3 * high], offsets[low : high + 1] - 3 * low
                part = rank_chunk(
                    *(states[low:high], tiles, targets[low:high], *seen),
                    top_k=13,
                    backend="native",
                )
                for name in ("ranks", "tied", "masked", "nan_target", "nan_others", "top"):
                    assert torch.equal(getattr(part, name), getattr(whole, name)[low:high]), name
                found = top_k_items(states[low:high], tiles, 13, *seen, backend="native")
                assert torch.equal(found.scores, best.scores[low:high])
    alone = rank_chunk(states, items, targets, values, offsets, backend="native")
    assert torch.equal(alone.ranks, whole.ranks)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("at_most", [1, 2, 20, 700])
def test_ranks_above_the_limit_are_misses_and_others_unchanged(at_most, backend):
    states, matrix, targets, values, offsets = problem(600, 900, 16, torch.float64)
    states += 0.5 * matrix[targets]
    matrix[5] = matrix[6]
    full = count_ranks(states, matrix, targets, values, offsets, backend="native")
    want = torch.where(full <= at_most, full, math.inf)
    assert 0 < int(want.isfinite().sum()) < 600
    order = torch.arange(900, 0, -1)
    for given in (None, order):
        options = {"at_most": at_most, "order": given, "backend": backend}
        assert torch.equal(count_ranks(states, matrix, targets, values, offsets, **options), want)
        result = rank_chunk(
            *(states, ItemTiles.build(matrix, order=given), targets, values, offsets),
            top_k=4,
            at_most=at_most,
            backend=backend,
        )
        assert torch.equal(result.ranks, want)
        assert not result.tied[want.isinf()].any()


def test_nan_scores_are_counted_beyond_an_early_exit():
    states, matrix, targets, values, offsets = problem(30, 800, 5)
    matrix[[700, 790]] = torch.nan
    matrix[750, 2] = torch.inf
    matrix[751] = torch.finfo(torch.float32).max
    items = ItemTiles.build(matrix)
    arguments = (states, items, targets, values, offsets)
    want = rank_chunk(*arguments, backend="reference")
    for at_most in (None, 1):
        got = rank_chunk(*arguments, at_most=at_most, backend="native")
        assert torch.equal(got.nan_others, want.nan_others)
        assert (got.nan_others > 0).all()


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("k", [1, 10, 128, 400])
@pytest.mark.parametrize("tied", [False, True])
def test_best_items_against_a_sort(k, tied, backend):
    states, matrix, _, values, offsets = problem(40, 333, 6, torch.float64)
    if tied:
        states, matrix = states.round(), matrix.round()
        states[0] = 0.0
    scores = (states @ matrix.T).numpy()
    for order in (None, 1 + np.random.default_rng(1).permutation(333)):
        items = ItemTiles.build(matrix, order=order)
        got = top_k_items(states, items, k, values, offsets, backend=backend)
        for user in range(40):
            seen = set(values[offsets[user] : offsets[user + 1]].tolist())
            ids = [i for i in range(1, 334) if i not in seen]
            ids = sorted(ids, key=lambda i, user=user: (-scores[user, i], i))[:k]
            rest = k - len(ids)
            assert got.ids[user].tolist() == ids + [0] * rest
            np.testing.assert_allclose(
                got.scores[user].numpy(), [*scores[user, ids], *[-math.inf] * rest], atol=1e-12
            )


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_best_items_without_seen_lists_leave_out_nan_and_minus_infinity(backend):
    matrix = torch.tensor([[9.0], [1.0], [math.nan], [3.0], [-math.inf], [math.inf], [3.0]])
    got = top_k_items(torch.ones(2, 1), matrix, 6, backend=backend)
    assert got.ids.tolist() == [[5, 3, 6, 1, 0, 0]] * 2
    assert got.scores.tolist() == [[math.inf, 3.0, 3.0, 1.0, -math.inf, -math.inf]] * 2
    assert got.scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be"),
        ({"k": True}, "k must be"),
        ({"k": 2.0}, "k must be"),
        ({"seen_offsets": None}, "given together"),
        ({"seen_values": [9]}, "seen_values must lie in 0..3"),
        ({"seen_offsets": [0, 1]}, "seen_offsets must have shape"),
        ({"user_states": torch.zeros(2, 3)}, "user_states must be"),
        ({"item_matrix": torch.zeros(1, 2)}, "item_matrix must be"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
)
def test_arguments_of_best_items(change, message):
    good = {
        "user_states": torch.zeros(2, 2),
        "item_matrix": torch.zeros(4, 2),
        "k": 2,
        "seen_values": [1],
        "seen_offsets": [0, 1, 1],
    }
    with pytest.raises(ValueError, match=message):
        top_k_items(**(good | change))


def test_the_raw_op_checks_what_it_would_index_with():
    states, matrix, targets, values, offsets = problem(4, 9, 3)
    pack, rank = torch.ops.padkern.rank_pack_items, torch.ops.padkern.rank_topk
    panels, largest = pack(matrix, None)
    good = {"order": None, "targets": targets, "seen_values": values, "seen_offsets": offsets}
    for change, message in (
        ({"targets": targets * 0}, "targets must lie in 1..9, got 0"),
        ({"targets": targets + 9}, "targets must lie in 1..9"),
        ({"seen_values": values + 10}, "seen_values must lie in 0..9"),
        ({"seen_offsets": offsets - 1}, "seen_offsets must rise"),
        ({"order": torch.full((9,), 10)}, "order must be a permutation"),
        ({"order": torch.arange(1, 9)}, "order must have shape"),
    ):
        given = good | change
        with pytest.raises(ValueError, match=message):
            rank(states, matrix, panels, largest, *given.values(), True, 2, 0)
    with pytest.raises(ValueError, match="panels must be those of item_matrix"):
        rank(states, matrix[:, :2], panels, largest, *good.values(), True, 2, 0)
    with pytest.raises(ValueError, match=r"permutation of 1\.\.9, got 1 at place 1"):
        pack(matrix, torch.ones(9, dtype=torch.int64))


# --- real data ------------------------------------------------------------------------------------


def _by_argsort(states: np.ndarray, matrix: np.ndarray, targets, history) -> np.ndarray:
    """Rank by sorting float64 scores, and the mean over the places that tie with the target."""
    ranks = np.empty(len(targets))
    for low in range(0, len(targets), 512):
        scores = states[low : low + 512] @ matrix.T
        for row, user in enumerate(range(low, min(low + 512, len(targets)))):
            seen, target = history.row(user), targets[user]
            if target in seen:
                ranks[user] = np.inf
                continue
            own = scores[row].copy()
            value = own[target]
            own[0] = own[seen] = -np.inf
            order = np.argsort(-own, kind="stable")
            places = 1 + np.flatnonzero(own[order] == value)
            ranks[user] = places.mean()
    return ranks


@pytest.mark.data
@pytest.mark.parametrize("kind", ["integers", "float64"])
def test_every_user_of_prime_pantry_against_argsort(padkern_data, kind):
    dataset = read_dataset(padkern_data / "prime_pantry")
    part = leave_one_out(dataset).test
    rng = np.random.default_rng(17)
    size = dataset.num_items + 1
    if kind == "integers":  # exact in float32, so that ties and order are the same in float64
        vectors = rng.integers(-3, 4, (size, 24)).astype(np.float64)
        dtype = torch.float32
    else:
        vectors, dtype = rng.normal(size=(size, 24)), torch.float64
    # A user's state is the sum of the last vectors and some of the target's.
    recent = part.history.tail(3)
    states = np.add.reduceat(vectors[recent.values], recent.offsets[:-1])
    states = states + 3 * vectors[part.targets] * (rng.random(len(states)) < 0.2)[:, None]
    want = _by_argsort(states, vectors, part.targets, part.history)
    arguments = (
        torch.from_numpy(states).to(dtype),
        torch.from_numpy(vectors).to(dtype),
        part.targets,
        part.history.values,
        part.history.offsets,
    )
    got = count_ranks(*arguments, backend="native").numpy()
    assert len(got) == 12871
    assert np.isinf(want).sum() > 300
    np.testing.assert_array_equal(got, want)
    popular = 1 + np.argsort(-np.bincount(part.history.values, minlength=size)[1:], kind="stable")
    early = count_ranks(*arguments, at_most=20, order=popular, backend="native").numpy()
    np.testing.assert_array_equal(early, np.where(want <= 20, want, np.inf))


if __name__ == "__main__":
    check_equal_vectors()
