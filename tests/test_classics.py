"""ItemKNN, EASE and iALS against naive forms of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from padkern.data import baskets
from padkern.data.baskets import cooccurrences, distinct, inverted
from padkern.data.dataset import Ragged
from padkern.pad import ials, item_to_item
from padkern.pad.ials import IALS
from padkern.pad.item_to_item import EASE, ItemKNN

N = 23
UNSEEN = (7, N)


def make_train(users: int = 40, seed: int = 0) -> Ragged:
    """Rows with repeats, two empty ones, one of all items but the two that nobody has."""
    rng = np.random.default_rng(seed)
    items = np.array([i for i in range(1, N + 1) if i not in UNSEEN])
    popularity = 1 / np.arange(1, len(items) + 1)
    rows = [
        rng.choice(items, rng.integers(1, 9), p=popularity / popularity.sum()) for _ in range(users)
    ]
    return Ragged.from_lists([[], *rows, items, []])


def multi_hot(rows: Ragged) -> np.ndarray:
    hot = np.zeros((len(rows), N + 1))
    hot[rows.row_index(), rows.values] = 1
    return hot


HISTORIES = Ragged.from_lists([[3, 1, 3, 9], [], [7], [2], [5, 23, 4, 4, 4, 1]])


def test_distinct_and_inverted_by_hand():
    rows = Ragged.from_lists([[3, 1, 3], [], [2, 1]])
    assert distinct(rows, 4) == Ragged.from_lists([[1, 3], [], [1, 2]])
    assert inverted(distinct(rows, 4), 5) == Ragged.from_lists([[], [0, 2], [2], [0], []])


@pytest.mark.parametrize(("pairs", "entries"), [(2**22, 2**23), (1, 2**23), (40, 60), (1, 1)])
def test_cooccurrences_in_blocks_of_any_size(monkeypatch, pairs, entries):
    monkeypatch.setattr(baskets, "_PAIRS", pairs)
    monkeypatch.setattr(baskets, "_ENTRIES", entries)
    train = distinct(make_train(), N + 1)
    hot = multi_hot(train)
    blocks = list(cooccurrences(train, N + 1))
    assert [low for low, _ in blocks] == list(
        np.cumsum([0, *(len(counts) for _, counts in blocks[:-1])])
    )
    np.testing.assert_array_equal(np.concatenate([c for _, c in blocks]), hot.T @ hot)
    if pairs == 1:
        assert len(blocks) == N + 1


@pytest.mark.parametrize("neighbours", [1, 4, 100])
@pytest.mark.parametrize(("shrinkage", "decay"), [(0.0, 1.0), (3.5, 0.7)])
def test_item_knn_equals_a_loop(neighbours, shrinkage, decay):
    train = make_train()
    users = [set(np.flatnonzero(column)) for column in multi_hot(train).T]
    want = np.zeros((len(HISTORIES), N + 1))
    for j in range(1, N + 1):
        similar = {}
        for i in range(1, N + 1):
            shared = len(users[i] & users[j])
            if i != j and shared:
                similar[i] = shared / (np.sqrt(len(users[i]) * len(users[j])) + shrinkage)
        nearest = sorted(similar, key=lambda i: (-similar[i], i))[:neighbours]
        for row in range(len(HISTORIES)):
            history = HISTORIES.row(row)[::-1].tolist()
            for i in nearest:
                if i in history:
                    want[row, j] += decay ** history.index(i) * similar[i]
    model = ItemKNN(train, N, neighbours=neighbours, shrinkage=shrinkage, decay=decay)
    scores = model.score_all(HISTORIES)
    np.testing.assert_allclose(scores.numpy(), want, rtol=1e-12, atol=1e-15)
    assert (want > 0).sum() > (3 if neighbours == 1 else 20)
    assert torch.equal(scores[[1, 2]], torch.zeros(2, N + 1, dtype=torch.float64))


def test_equal_similarities_go_by_id():
    # Items 2, 3 and 4 share exactly the users of item 1.
    train = Ragged.from_lists([[4, 3, 2, 1], [1, 2, 3, 4]])
    scores = ItemKNN(train, 4, neighbours=1).score_all(Ragged.from_lists([[1], [2], [3], [4]]))
    # The nearest of item 1 is item 2, the nearest of all others is item 1.
    want = [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0] * 5, [0] * 5]
    np.testing.assert_allclose(scores.numpy(), want)


@pytest.mark.parametrize("l2", [0.5, 20.0])
def test_ease_equals_its_closed_form(l2):
    train = make_train()
    hot = multi_hot(train)[:, 1:]
    inverse = np.linalg.inv(hot.T @ hot + l2 * np.eye(N))
    weight = -inverse / np.diag(inverse)
    np.fill_diagonal(weight, 0)
    model = EASE(train, N, l2=l2)
    want = multi_hot(HISTORIES)[:, 1:] @ weight
    np.testing.assert_allclose(model.score_all(HISTORIES)[:, 1:].numpy(), want, atol=2e-6)
    np.testing.assert_allclose(model.item_matrix()[1:, 1:].numpy(), weight.T, atol=2e-6)
    scores = model.score_all(HISTORIES)
    assert scores[:, 0].abs().max() == 0
    assert scores[:, list(UNSEEN)].abs().max() == 0


def test_ease_solves_its_least_squares_problem():
    """Every column minimises the ridge objective among those with a zero diagonal."""
    train, l2 = make_train(), 3.0
    hot = torch.from_numpy(multi_hot(train))
    weight = EASE(train, N, l2=l2).item_matrix().T.clone().requires_grad_()
    loss = (hot - hot @ weight).square().sum() + l2 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.fill_diagonal_(0).abs().max() < 1e-4


@pytest.mark.parametrize("make", [lambda t: ItemKNN(t, N, decay=0.6), lambda t: EASE(t, N)])
def test_scores_are_the_inner_products_of_states_and_items(make):
    model = make(make_train())
    states, items = model.user_states(HISTORIES), model.item_matrix()
    assert states.shape == (len(HISTORIES), N + 1)
    torch.testing.assert_close(states @ items.T, model.score_all(HISTORIES).double())


def test_item_to_item_limits(monkeypatch):
    with pytest.raises(ValueError, match=r"max_items must be at least the 21 items .* got 20"):
        EASE(make_train(), N, max_items=20)
    assert EASE(make_train(), N, max_items=21)
    monkeypatch.setattr(item_to_item, "MAX_DENSE_ITEMS", N - 1)
    model = ItemKNN(make_train(), N)
    for name in ("item_matrix", "user_states"):
        with pytest.raises(ValueError, match=f"{name} would be 24 numbers wide.*score_all"):
            getattr(model, name)(*([HISTORIES] if name == "user_states" else []))
    assert model.score_all(HISTORIES).shape == (5, N + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: ItemKNN(t, N, neighbours=0), "neighbours must be at least 1, got 0"),
        (lambda t: ItemKNN(t, N, shrinkage=-1.0), "shrinkage must be at least 0"),
        (lambda t: ItemKNN(t, N, decay=0.0), "decay must be in"),
        (lambda t: EASE(t, N, l2=0.0), "l2 must be above 0"),
        (lambda t: IALS(t, N, dim=0), "dim must be at least 1, got 0"),
        (lambda t: IALS(t, N, sweeps=0), "sweeps must be at least 1, got 0"),
        (lambda t: IALS(t, N, unobserved=0.0), "unobserved must be above 0"),
        (lambda t: IALS(t, N, l2=float("inf")), "l2 must be above 0 and finite"),
        (lambda t: IALS(t, N, exponent=-1.0), "exponent must be at least 0"),
        (lambda t: ItemKNN(t, N - 2), "train must hold item ids from 1 to 21, got 1 to 22"),
        (lambda t: EASE(Ragged.from_lists([[]]), N), "train must hold an interaction"),
        (lambda t: IALS(Ragged.from_lists([[0]]), N), "item ids from 1 to 23, got 0 to 0"),
    ],
)
def test_arguments_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make(make_train())


# -- iALS ------------------------------------------------------------------------------------------

OPTIONS = {"dim": 5, "unobserved": 0.3, "l2": 0.02, "exponent": 0.8}


def naive_objective(train: Ragged, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """The loss over the users and items of training, term by term."""
    hot = torch.from_numpy(multi_hot(train))
    hot = hot[hot.sum(1) > 0][:, hot.sum(0) > 0]
    scores = users @ items.T
    alpha, l2, nu = (OPTIONS[k] for k in ("unobserved", "l2", "exponent"))
    penalty = ((hot.sum(1) + alpha * hot.shape[1]) ** nu * users.square().sum(1)).sum()
    penalty = penalty + ((hot.sum(0) + alpha * hot.shape[0]) ** nu * items.square().sum(1)).sum()
    return (hot * (scores - 1).square()).sum() + alpha * scores.square().sum() + l2 * penalty


def seen_vectors(model: IALS) -> torch.Tensor:
    kept = [i for i in range(1, N + 1) if i not in UNSEEN]
    return model.item_matrix()[kept]


def test_ials_lowers_its_objective():
    model = IALS(make_train(), N, sweeps=12, **OPTIONS)
    assert len(model.objective) == 12
    assert (np.diff(model.objective) < 1e-12).all()
    assert model.objective[-1] < 0.8 * model.objective[0]


def test_ials_objective_and_solutions_are_those_of_its_definition():
    train = make_train()
    rows = train.take(np.flatnonzero(train.lengths))
    before, after = (IALS(train, N, sweeps=s, **OPTIONS) for s in (3, 4))
    # The users of the last sweep are the fold-in at the items before it.
    users = before.user_states(rows)
    items = seen_vectors(after).clone().requires_grad_()
    loss = naive_objective(train, users, items)
    assert abs(loss.item() - after.objective[-1]) < 1e-9 * loss.item()
    (gradient,) = torch.autograd.grad(loss, items)
    assert gradient.abs().max() < 1e-9
    users = after.user_states(rows).requires_grad_()
    (gradient,) = torch.autograd.grad(naive_objective(train, users, seen_vectors(after)), users)
    assert gradient.abs().max() < 1e-9


def test_ials_solves_rows_in_any_grouping(monkeypatch):
    want = IALS(make_train(), N, **OPTIONS)
    monkeypatch.setattr(ials, "_GATHERED", 1)
    got = IALS(make_train(), N, **OPTIONS)
    torch.testing.assert_close(got.item_matrix(), want.item_matrix(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        got.user_states(HISTORIES), want.user_states(HISTORIES), rtol=1e-9, atol=1e-12
    )


def test_ials_of_unknown_items_and_seeds():
    model = IALS(make_train(), N, seed=3, **OPTIONS)
    assert model.item_matrix()[[0, *UNSEEN]].abs().max() == 0
    assert model.user_states(HISTORIES)[[1, 2]].abs().max() == 0
    assert torch.equal(model.item_matrix(), IALS(make_train(), N, seed=3, **OPTIONS).item_matrix())
    other = IALS(make_train(), N, seed=4, **OPTIONS)
    assert not torch.equal(model.item_matrix(), other.item_matrix())
