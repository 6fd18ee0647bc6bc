"""Metrics, groups, exposure and bootstrap intervals of an evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from padkern.data.dataset import Ragged
from padkern.data.split import EvalSplit
from padkern.pad.evaluation import Evaluation, evaluate, frequency_group, metric_values
from padkern.pad.significance import paired_bootstrap

FREQUENCY = np.array([0, 0, 3, 5, 6, 50, 51, 90])
BINS = np.array([0, 3, 2, 2, 2, 2, 1, 1])


class Table:
    """Scores looked up by the last item of the history, as one-hot states times a score table."""

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = torch.from_numpy(scores)
        self.calls: list[int] = []

    def user_states(self, history):
        self.calls.append(len(history))
        last = torch.from_numpy(history.values[history.offsets[1:] - 1])
        return torch.nn.functional.one_hot(last, self.scores.shape[0]).to(self.scores.dtype)

    def item_matrix(self):
        return self.scores.T.contiguous()


def make_split(n: int, seed: int = 0) -> EvalSplit:
    rng = np.random.default_rng(seed)
    history = Ragged.from_lists([rng.integers(1, 8, rng.integers(1, 4)) for _ in range(n)])
    return EvalSplit("test", np.arange(n) * 2, history, rng.integers(1, 8, n))


def run(n: int, seed: int = 0, **options):
    scorer = Table(np.random.default_rng(seed + 1).normal(size=(8, 8)))
    split = make_split(n, seed)
    arrays = {"train_frequency": FREQUENCY, "item_bins": BINS}
    return scorer, split, evaluate(scorer, split, **arrays, **options)


def test_ranks_metrics_and_groups_by_hand():
    scorer, split, got = run(40, with_top=True)
    ranks = []
    for row, target in enumerate(split.targets):
        history = split.history.row(row)
        scores = scorer.scores[history[-1]].numpy()
        candidates = [i for i in range(1, 8) if i not in history]
        order = sorted(candidates, key=lambda i: -scores[i])
        ranks.append(order.index(target) + 1 if target in order else math.inf)
        assert got.top[row].tolist() == order + [0] * (20 - len(order))
    np.testing.assert_array_equal(got.ranks, ranks)
    np.testing.assert_array_equal(got.users, split.users)
    assert got.counters == {
        "masked_targets": int(np.isinf(ranks).sum()),
        "nan_targets": 0,
        "nan_others": 0,
        "ties": 0,
    }
    metrics = got.metrics()
    assert list(metrics) == [
        "all", "freq_0", "freq_1_5", "freq_6_50", "freq_gt_50", "bin_1", "bin_2", "bin_3",
    ]  # fmt: skip
    members = {
        "all": range(1, 8),
        "freq_0": [1],
        "freq_1_5": [2, 3],
        "freq_6_50": [4, 5],
        "freq_gt_50": [6, 7],
        "bin_1": [6, 7],
        "bin_2": [2, 3, 4, 5],
        "bin_3": [1],
    }
    for group, items in members.items():
        own = [r for r, t in zip(ranks, split.targets, strict=True) if t in items]
        assert metrics[group]["count"] == len(own) > 0
        assert metrics[group]["mrr"] == pytest.approx(np.mean([1 / r for r in own]))
        assert metrics[group]["hit@5"] == pytest.approx(np.mean([r <= 5 for r in own]))
        gains = [1 / math.log2(r + 1) if r <= 5 else 0.0 for r in own]
        assert metrics[group]["ndcg@5"] == pytest.approx(np.mean(gains))
    # 7 items: every place is filled by whatever is not seen.
    places = [i for row in got.top[:, :10] for i in row if i]
    assert metrics["all"]["coverage@10"] == 1.0
    assert metrics["all"]["cold_share@10"] == pytest.approx(places.count(1) / len(places))
    assert "coverage@10" not in metrics["freq_0"]


def test_scorer_sees_chunks_of_one_size_and_ranks_do_not_depend_on_it():
    scorer, _, got = run(11, chunk=4)
    assert scorer.calls == [4, 4, 4]
    for chunk in (1, 256):
        np.testing.assert_array_equal(run(11, chunk=chunk)[2].ranks, got.ranks)


def test_without_masking_a_repeated_target_is_rankable():
    _, split, masked = run(60)
    _, _, free = run(60, mask_repeats=False)
    repeated = np.array([t in split.history.row(i) for i, t in enumerate(split.targets)])
    assert repeated.any()
    assert not repeated.all()
    assert np.isinf(masked.ranks[repeated]).all()
    assert np.isfinite(masked.ranks[~repeated]).all()
    assert np.isfinite(free.ranks).all()
    assert free.counters["masked_targets"] == 0
    assert (free.ranks >= np.where(repeated, 1, masked.ranks)).all()


def test_empty_group_and_empty_split():
    split = EvalSplit("valid", np.arange(1), Ragged.from_lists([[1]]), np.array([7]))
    scorer = Table(np.zeros((8, 8)))
    arrays = {"train_frequency": FREQUENCY, "item_bins": BINS}
    metrics = evaluate(scorer, split, **arrays, ks=(1,)).metrics()
    nothing = {"count": 0, "hit@1": None, "ndcg@1": None, "mrr": None}
    assert metrics["freq_0"] == nothing
    assert metrics["bin_3"] == nothing
    assert metrics["all"] == {"count": 1, "hit@1": 0.0, "ndcg@1": 0.0, "mrr": 1 / 3.5}
    none = EvalSplit("valid", np.zeros(0, int), Ragged.from_lists([]), np.zeros(0, int))
    empty = evaluate(scorer, none, **arrays, ks=(1,), with_top=True)
    assert empty.metrics()["all"] == nothing | {"coverage@10": 0.0, "cold_share@10": None}


def test_nan_is_counted_for_real_users_only():
    scores = np.zeros((8, 8))
    scores[2, 5] = np.nan
    split = EvalSplit("t", np.arange(3), Ragged.from_lists([[2], [2], [3]]), np.array([5, 6, 5]))

    class Rows(Table):  # adds no NaN to other users, unlike an inner product with NaN
        def user_states(self, history):
            self.nan = torch.from_numpy(history.values == 2)
            return torch.where(self.nan[:, None], torch.nan, torch.ones(len(history), 1))

        def item_matrix(self):
            return torch.ones(8, 1)

    got = evaluate(Rows(scores), split, train_frequency=FREQUENCY, item_bins=BINS)
    assert got.ranks.tolist() == [math.inf, math.inf, 3.5]
    # candidates of users 0 and 1: 7 items - 1 seen - the target
    assert got.counters == {"masked_targets": 0, "nan_targets": 2, "nan_others": 10, "ties": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_frequency": FREQUENCY[1:]}, "train_frequency must have shape"),
        ({"item_bins": BINS[1:]}, "item_bins must have shape"),
        ({"ks": ()}, "ks"),
        ({"ks": (0,)}, "ks"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_evaluate_argument_errors(change, message):
    good = {"train_frequency": FREQUENCY, "item_bins": BINS}
    with pytest.raises(ValueError, match=message):
        evaluate(Table(np.zeros((8, 8))), make_split(2), **(good | change))


def test_frequency_groups_partition_all_counts():
    counts = np.arange(200)
    names = ["freq_0", "freq_1_5", "freq_6_50", "freq_gt_50"]
    members = np.stack([frequency_group(counts, name) for name in names])
    assert (members.sum(0) == 1).all()
    assert members.sum(1).tolist() == [1, 5, 45, 149]


def test_metric_values_of_half_ranks_and_misses():
    ranks = np.array([1.0, 9.5, 10.0, 10.5, math.inf])
    assert metric_values(ranks, "hit@10").tolist() == [1, 1, 1, 0, 0]
    want = [1, 1 / math.log2(10.5), 1 / math.log2(11), 0, 0]
    np.testing.assert_allclose(metric_values(ranks, "ndcg@10"), want)
    np.testing.assert_allclose(metric_values(ranks, "mrr"), [1, 1 / 9.5, 0.1, 1 / 10.5, 0])
    for bad in ("hit", "hit@0", "map@10", "HIT@10"):
        with pytest.raises(ValueError, match="metric must be"):
            metric_values(ranks, bad)
    for rank in (0.5, math.nan):
        with pytest.raises(ValueError, match="ranks must be at least 1"):
            metric_values(np.array([rank]), "mrr")


@pytest.mark.parametrize(("metric", "n"), [("hit@10", 400), ("mrr", 900)])
def test_bootstrap_matches_resampling_users_directly(metric, n):
    rng = np.random.default_rng(3)
    high = 30 if metric == "hit@10" else 5000  # few or many distinct differences
    a, b = rng.integers(1, high, n).astype(float), rng.integers(1, high, n).astype(float)
    a[:30] = math.inf
    got = paired_bootstrap(a, b, metric, resamples=4000, seed=1)
    difference = metric_values(a, metric) - metric_values(b, metric)
    assert got["difference"] == pytest.approx(difference.mean())
    means = difference[rng.integers(0, n, (4000, n))].mean(1)
    spread = means.std()
    assert got["low"] == pytest.approx(np.percentile(means, 2.5), abs=0.15 * spread)
    assert got["high"] == pytest.approx(np.percentile(means, 97.5), abs=0.15 * spread)
    p = 2 * min((means <= 0).mean(), (means >= 0).mean())
    assert got["p"] == pytest.approx(p, abs=0.03)


def test_bootstrap_is_deterministic_antisymmetric_and_honest_about_no_difference():
    rng = np.random.default_rng(4)
    a, b = rng.integers(1, 40, 300).astype(float), rng.integers(1, 20, 300).astype(float)
    first = paired_bootstrap(a, b, seed=7)
    assert first == paired_bootstrap(a, b, seed=7) != paired_bootstrap(a, b, seed=8)
    assert first["high"] < 0
    assert first["p"] < 0.05
    assert paired_bootstrap(b, a, seed=7)["low"] > 0
    same = paired_bootstrap(a, a)
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}


def test_bootstrap_averages_seeds_per_user_and_takes_subsets():
    rng = np.random.default_rng(5)
    a, b = rng.integers(1, 40, (3, 200)).astype(float), rng.integers(1, 40, 200).astype(float)
    mask = rng.random(200) < 0.5
    got = paired_bootstrap(a, b, "mrr", subset=mask, resamples=500)
    want = (1 / a).mean(0)[mask] - (1 / b)[mask]
    assert got["difference"] == pytest.approx(want.mean())
    assert got == paired_bootstrap(a, b, "mrr", subset=np.flatnonzero(mask), resamples=500)
    nobody = paired_bootstrap(a, b, subset=np.zeros(200, bool))
    assert nobody == {"difference": None, "low": None, "high": None, "p": None}
    with pytest.raises(ValueError, match="same users"):
        paired_bootstrap(a, b[1:])
    with pytest.raises(ValueError, match="resamples"):
        paired_bootstrap(a, b, resamples=0)
    with pytest.raises(ValueError, match="must be \\[n\\]"):
        paired_bootstrap(a[None], b)


def test_group_members_for_subsets():
    _, split, got = run(30)
    np.testing.assert_array_equal(got.group("freq_0"), split.targets == 1)
    np.testing.assert_array_equal(got.group("bin_1"), split.targets >= 6)
    with pytest.raises(KeyError):
        got.group("bin_4")
    assert isinstance(got, Evaluation)
