"""The forms of training and evaluation that the benchmarks time compute what padkern computes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import settings
import torch
from peers import epoch, evaluation, pantry, ranking, training

from padkern.data.plan import BatchPlanner, TrainBatches
from padkern.pad.evaluation import evaluate

USERS, ITEMS, LENGTH = 40, 60, 20


@pytest.fixture(scope="module")
def case():
    """Synthetic users, batches' data, and a small model in float64."""
    torch.manual_seed(0)
    found = pantry.synthetic(USERS, ITEMS)
    text = torch.randn(ITEMS + 1, 9)  # models keep text in float32
    text[0] = 0
    bins = torch.from_numpy(found.bins)
    model = training.parity_model(text, bins, dim=8, length=LENGTH, layers=2, heads=2)
    return (
        found,
        epoch.Data(found.train, text.double(), found.bins, LENGTH, 16),
        model.double().eval(),
    )


def test_synthetic_users_have_the_shape_of_prime_pantry():
    found = pantry.synthetic(3000, 500)
    lengths = found.train.lengths
    assert len(found.train) == len(found.test) == 3000
    assert lengths.min() >= 3
    assert lengths.max() == 21
    assert abs(lengths.mean() - 6.94) < 0.2  # of the data set's training rows
    assert found.bins.max() == 10
    assert found.bins[0] == 0
    assert pantry.synthetic(50, 40).train == pantry.synthetic(50, 40).train
    assert np.array_equal(found.test.history.take([7]).head(lengths[7]).values, found.train.row(7))


@pytest.mark.parametrize("form", ["packed_eager", "packed_unique", "padded_stacked"])
def test_forms_of_the_step_give_one_loss_and_its_gradients(case, form):
    _, data, model = case
    plan = BatchPlanner(data.source(), negatives=1, seed=2).plan(np.arange(12), 0)
    batch = training.make_batch(plan, LENGTH, data.text)
    want = training.padded_authors(model, batch)
    loss = getattr(training, form)(model, batch)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    found = training.gradients(model, loss)
    for name, gradient in training.gradients(model, want).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13, msg=name)


def test_every_form_visits_every_user_once(case):
    _, data, _ = case
    batches = TrainBatches(data.source(), batch_size=16, seed=1, phase="bench", negatives=1)
    made = {
        "padkern": list(epoch.padkern_batches(batches, 1)),
        "packed": list(epoch.packed_batches(data, 1)),
        "authors": list(epoch.authors_batches(data, 1)),
    }
    tokens = int((data.train.lengths - 1).sum())
    for name, parts in made.items():
        assert [users for _, users, _ in parts] == [16, 16, 8], name
        assert sum(count for _, _, count in parts) == tokens, name
    assert made["padkern"][1][0].inputs.key is not None


def _owner(data, seed):
    parts = data.parts(seed)
    assert sorted(np.concatenate(parts)) == list(range(USERS))
    return parts[0]


def test_batches_of_packed_and_padded_forms_hold_the_same_windows(case):
    _, data, _ = case
    users = _owner(data, 3)
    packed, _, _ = next(epoch.packed_batches(data, 3))
    padded, _, _ = next(epoch.authors_batches(data, 3))
    inputs, targets, negatives = epoch.packed_from_slots(padded.slots, padded.other_slots, LENGTH)
    for name in ("items", "offsets", "positions", "grid"):
        assert torch.equal(getattr(packed.packed, name), getattr(inputs, name)), name
    assert torch.equal(packed.targets, targets)
    owner = np.repeat(users, packed.packed.offsets.diff().numpy())
    source = data.source()
    for drawn in (packed.negatives, negatives):
        assert drawn.min() >= 1
        assert drawn.max() <= ITEMS
        assert not source.owns(owner, drawn.numpy()).any()
        assert len(np.unique(drawn)) > ITEMS // 2
    slots = torch.stack([padded.slots, padded.other_slots], 2)
    assert torch.equal(padded.features, data.text[slots])
    again, _, _ = next(epoch.authors_batches(data, 3))
    assert torch.equal(again.other_slots, padded.other_slots)


def test_one_user_as_released():
    slots, other = epoch.authors_slots([5, 6, 7], 4, 9, random.Random(0), 2)
    assert slots == [0, 0, 5, 6, 7]
    assert other[:3] == [[0, 0]] * 3
    assert all(item in {1, 2, 3, 4, 8, 9} for pair in other[3:] for item in pair)
    # Of a long row the last items are the window, and the whole row is owned.
    slots, other = epoch.authors_slots([1, 2, 3, 4, 5, 6], 2, 7, random.Random(0))
    assert slots == [4, 5, 6]
    assert other == [[0], [7], [7]]


def test_ahead_keeps_the_order_and_raises_what_making_raises():
    assert list(epoch.ahead(lambda n: n * n, range(4))) == [0, 1, 4, 9]
    assert list(epoch.ahead(str, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(epoch.ahead(lambda n: 1 / n, [1, 0]))


@pytest.mark.parametrize("form", ["torch", "numpy", "packed"])
def test_forms_of_the_evaluation_give_padkerns_ranks(case, form):
    found, _, model = case
    want = evaluate(model, found.test, train_frequency=found.frequency, item_bins=found.bins)
    metrics = want.metrics()["all"]
    if form == "packed":
        got = evaluation.packed_evaluate(model, found.test, 7, 9)
    else:
        order = {"torch": evaluation.torch_order, "numpy": evaluation.numpy_order}[form]
        tables = evaluation.authors_tables(model, batch=7)
        got = evaluation.authors_evaluate(model, tables, found.test, 11, order)
    ranks, missed = torch.from_numpy(want.ranks), np.isinf(want.ranks)
    assert 0 < missed.sum() < USERS  # both kinds of targets are there
    assert torch.equal(got.ranks[~missed], ranks[~missed])
    assert bool((got.ranks[missed] > 20).all())
    assert got.hit == pytest.approx(metrics["hit@10"])
    assert got.ndcg == pytest.approx(metrics["ndcg@10"])


def test_counting_is_done_in_the_type_of_the_items(case):
    found, _, model = case
    with torch.no_grad():
        tables = model.tables()
        states = evaluation.packed_states(model, tables, found.test, 16)
        matrix = evaluation.folded(model, tables)
    torch.testing.assert_close(matrix, model.fold(tables).detach(), rtol=1e-12, atol=0)
    small = evaluation.problem(1e-12 * states, matrix, found.test)
    large = evaluation.problem(states, matrix, found.test)
    assert torch.equal(ranking.mm_count(small, 8), ranking.mm_count(large, 8))


def test_the_first_users_of_a_split(case):
    found, _, _ = case
    part = evaluation.first(found.test, 3)
    assert len(part) == 3
    assert np.array_equal(part.targets, found.test.targets[:3])
    assert np.array_equal(part.history.row(2), found.test.history.row(2))
    assert len(evaluation.first(found.test, 10**6)) == USERS


def test_the_environment_is_read_strictly(monkeypatch):
    assert settings.count("PADKERN_BENCH_NO_SUCH", 4) == 4
    monkeypatch.setenv("PADKERN_BENCH_NO_SUCH", "0")
    assert settings.count("PADKERN_BENCH_NO_SUCH", 4) == 0
    monkeypatch.setenv("PADKERN_BENCH_NO_SUCH", "-1")
    with pytest.raises(ValueError, match="PADKERN_BENCH_NO_SUCH must be a whole number"):
        settings.count("PADKERN_BENCH_NO_SUCH", 4)


def test_contenders_use_torchs_products():
    """None of padkern's own linear maps is in what padkern is compared with."""
    from peers.training import torch_products

    from padkern.models import projection

    kept = projection.linear
    layer, x = projection.Linear(6, 4), torch.randn(5, 6)
    with torch_products():
        assert projection.linear is not kept
        y = layer(x, relu=True)
        assert "padkern" not in y.grad_fn.name().lower()
        assert "Linear" not in y.grad_fn.name()
    assert projection.linear is kept
    assert "LinearFunction" in layer(x).grad_fn.name()
