"""The batch plan: C++ against numpy, both against what a plan means."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from padkern.data.batch import pack
from padkern.data.dataset import Ragged
from padkern.data.plan import SAMPLINGS, BatchPlanner, PlanSource, TrainBatches
from padkern.data.random_streams import philox_words, scaled

N, L = 30, 6
ROLES = ("inputs", "targets", "negatives")


def rows(seed: int = 0, users: int = 20, most: int = 12) -> Ragged:
    rng = np.random.default_rng(seed)
    return Ragged.from_lists(
        [rng.integers(1, N + 1, size=n) for n in rng.integers(2, most + 1, size=users)]
    )


def source(train: Ragged, **options) -> PlanSource:
    bins = np.r_[0, np.arange(N) % 5 + 1]
    return PlanSource(train, num_items=N, max_len=L, item_bins=bins, **options)


def flat(plan) -> dict[str, torch.Tensor]:
    """Every tensor of a plan by name."""
    packed = plan.inputs
    out = {name: getattr(packed, name) for name in ("items", "offsets", "positions", "grid")}
    for name, value in vars(plan).items():
        if isinstance(value, torch.Tensor):
            out[name] = value
        elif isinstance(value, tuple):
            out |= {f"{name}{role}": part for role, part in enumerate(value)}
    return out


def assert_same(one, two) -> None:
    left, right = flat(one), flat(two)
    assert left.keys() == right.keys()
    assert one.inputs.width == two.inputs.width
    for name, value in left.items():
        assert value.dtype == right[name].dtype == torch.int64, name
        assert torch.equal(value, right[name]), name


def test_philox_gives_the_published_numbers():
    """Known answers of the Random123 distribution for Philox 4x32-10."""
    zeros = np.zeros(4, dtype=np.int64)
    assert int(philox_words(0, zeros)) == 0x6627E8D5E169C58D
    ones = np.full(4, 0xFFFFFFFF)
    assert int(philox_words(0xFFFFFFFFFFFFFFFF, ones)) == 0x408F276D41C83B0E
    pi = np.array([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344])
    assert int(philox_words(0x299F31D0A4093822, pi)) == 0xD16CFE09_94FDCCEB


def test_scaled_is_the_high_half_of_the_product():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**64, size=200, dtype=np.uint64)
    for count in (1, 2, 3, 1000, 2**31 - 1):
        want = [int(word) * count >> 64 for word in words]
        assert scaled(words, count).tolist() == want


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("negatives", [0, 1, 4])
def test_native_equals_reference(native_core, sampling, negatives):
    origin = source(rows(), sampling=sampling)
    make = {
        backend: BatchPlanner(origin, negatives=negatives, seed=3, phase="p", backend=backend)
        for backend in ("native", "reference")
    }
    for users in ([0], [3, 1, 2], list(range(20)), [5, 5]):
        for step in (0, 7):
            plans = {name: planner.plan(np.array(users), step) for name, planner in make.items()}
            assert_same(plans["native"], plans["reference"])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.sampled_from(SAMPLINGS), st.integers(0, 3), st.integers(1, 9))
def test_native_equals_reference_on_random_rows(native_core, seed, sampling, negatives, max_len):
    rng = np.random.default_rng(seed)
    items = int(rng.integers(2, 40))
    train = Ragged.from_lists(
        [rng.integers(1, items + 1, size=n) for n in rng.integers(2, 15, size=9)]
    )
    if len(np.unique(train.values)) < 2:
        return
    origin = PlanSource(train, num_items=items, max_len=max_len, sampling=sampling)
    users = rng.permutation(9)[: int(rng.integers(1, 10))]
    plans = [
        BatchPlanner(origin, negatives=negatives, seed=seed, backend=backend).plan(users, seed % 11)
        for backend in ("native", "reference")
    ]
    assert_same(*plans)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_a_plan_holds(native_core, backend):
    train = rows(1)
    origin = source(train)
    users = np.array([4, 0, 11, 7])
    plan = BatchPlanner(origin, negatives=2, seed=1, backend=backend).plan(users, 0)
    for b, user in enumerate(users):
        row = train.row(user)[-(L + 1) :].tolist()
        part = slice(int(plan.inputs.offsets[b]), int(plan.inputs.offsets[b + 1]))
        assert plan.inputs.items[part].tolist() == row[:-1]
        assert plan.targets[part].tolist() == row[1:]
    packed = pack(plan.inputs.items, plan.inputs.offsets, L)
    assert torch.equal(plan.inputs.positions, packed.positions)
    assert torch.equal(plan.inputs.grid, packed.grid)
    assert plan.inputs.width == packed.width
    slots = {"inputs": plan.inputs.items, "targets": plan.targets, "negatives": plan.negatives}
    places = (plan.input_rows, plan.target_rows, plan.negative_rows)
    everything = Counter()
    for role, (name, items) in enumerate(slots.items()):
        assert torch.equal(plan.unique[places[role]], items), name
        for u, item in enumerate(plan.unique.tolist()):
            low, high = plan.starts[role][u], plan.starts[role][u + 1]
            want = (items.reshape(-1) == item).nonzero()[:, 0]
            assert torch.equal(plan.slots[role][low:high], want)
        everything.update(items.reshape(-1).tolist())
    assert plan.unique.tolist() == sorted(everything)
    assert plan.counts.tolist() == [everything[item] for item in plan.unique.tolist()]
    assert plan.bins.tolist() == origin.bins[plan.unique.numpy()].tolist()
    assert torch.equal(plan.local_inputs.items, plan.input_rows)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_negatives_are_never_the_users_own(native_core, sampling, backend):
    train = Ragged.from_lists([[1, 2, 3, 4], [5, 6, 7], [1, 2, 3, 4, 5, 6, 7], [8, 1, 8]])
    origin = PlanSource(train, num_items=N, max_len=L, sampling=sampling)
    planner = BatchPlanner(origin, negatives=50, seed=3, phase="p", backend=backend)
    plan = planner.plan(np.arange(4), 4)
    owner = np.repeat(plan.users, np.diff(plan.inputs.offsets.numpy()))
    for user in range(4):
        drawn = set(plan.negatives[owner == user].flatten().tolist())
        assert not drawn & set(train.row(user).tolist())
    # Items that no row has are unseen and never drawn.
    assert set(plan.negatives.flatten().tolist()) <= set(range(1, 9))


def test_a_user_who_has_everything_still_gets_negatives(native_core):
    train = Ragged.from_lists([[1, 2, 3], [1, 2]])
    origin = PlanSource(train, num_items=3, max_len=L)
    for backend in ("native", "reference"):
        plan = BatchPlanner(origin, negatives=20, backend=backend).plan(np.array([0, 1]), 0)
        assert set(plan.negatives[:2].flatten().tolist()) <= {1, 2, 3}
        assert set(plan.negatives[2:].flatten().tolist()) == {3}


def test_draws_follow_their_distribution(native_core):
    """Chi-squared of 60,000 draws; the key is fixed, so the outcome is too."""
    train = Ragged.from_lists([[1, 2]] * 30 + [[3, 3, 3, 3]] * 10 + [[4, 5]] * 10 + [[9, 9]])
    for sampling, power in (("uniform", 1.0), ("popularity", 1.0), ("popularity", 0.5)):
        origin = PlanSource(train, num_items=N, max_len=L, sampling=sampling, power=power)
        plan = BatchPlanner(origin, negatives=60_000, seed=5).plan(np.array([50]), 0)
        ids, counts = np.unique(plan.negatives.numpy(), return_counts=True)
        assert ids.tolist() == [1, 2, 3, 4, 5]
        weights = np.bincount(train.values)[1:6].astype(float) ** power
        if sampling == "uniform":
            weights[:] = 1
        want = 60_000 * weights / weights.sum()
        assert ((counts - want) ** 2 / want).sum() < 20


def test_negatives_depend_on_seed_phase_step_and_user_alone(native_core):
    origin = source(rows())

    def draw(seed=1, phase="p", step=0, users=(3, 4)):
        planner = BatchPlanner(origin, negatives=3, seed=seed, phase=phase)
        plan = planner.plan(np.array(users), step)
        cut = plan.inputs.offsets
        return {user: plan.negatives[cut[b] : cut[b + 1]].tolist() for b, user in enumerate(users)}

    assert draw() == draw()
    assert draw()[3] == draw(users=(9, 3))[3]
    assert all(other != draw() for other in (draw(seed=2), draw(phase="q"), draw(step=1)))


def test_plans_come_in_order(native_core):
    origin = source(rows())
    planner = BatchPlanner(origin, negatives=1, seed=2)
    wanted = [(np.array([u]), u) for u in range(20)]
    got = list(planner.plans(iter(wanted)))
    assert [int(plan.users[0]) for plan in got] == list(range(20))
    for plan, (users, step) in zip(got, wanted, strict=True):
        assert_same(plan, planner.plan(users, step))
    assert list(planner.plans([])) == []


def test_an_error_in_the_thread_reaches_the_loop(native_core):
    planner = BatchPlanner(source(rows()))
    plans = planner.plans([(np.array([0]), 0), (np.array([99]), 1)])
    next(plans)
    with pytest.raises(ValueError, match="users must be rows from 0 to 19, got 99 at 0"):
        next(plans)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("users", "message"),
    [
        ([0, -1], "users must be rows from 0 to 2, got -1 at 1"),
        ([3], "users must be rows from 0 to 2, got 3 at 0"),
        ([0, 1], "users must have at least 2 items, row 1 has 1"),
    ],
)
def test_wrong_users_are_named(native_core, backend, users, message):
    train = Ragged.from_lists([[1, 2], [3], [4, 5]])
    planner = BatchPlanner(PlanSource(train, num_items=N, max_len=L), backend=backend)
    with pytest.raises(ValueError, match=re.escape(message)):
        planner.plan(np.array(users), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": "random"}, "one of uniform, popularity, in_batch, got 'random'"),
        ({"num_items": 4}, "train must hold item ids from 1 to 4, got 1 to 5"),
        ({"num_items": 2**31}, "num_items must be from 1 to 2**31 - 1, got 2147483648"),
        ({"power": -1.0}, "power must be at least 0 and finite, got -1"),
        ({"max_len": 0}, "max_len must be at least 1, got 0"),
        ({"candidates": np.array([], dtype=int)}, "candidates must not be empty"),
        ({"candidates": np.array([0, 3])}, "candidates must be item ids from 1 to 9, got 0 to 3"),
        ({"item_bins": np.zeros(3)}, "item_bins must be [10], got [3]"),
        (
            {"candidates": np.array([8, 9]), "sampling": "popularity"},
            "candidates must include an item of train",
        ),
    ],
)
def test_wrong_sources_are_named(change, message):
    options = {"num_items": 9, "max_len": L} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        PlanSource(Ragged.from_lists([[1, 2, 5], [3, 4]]), **options)


def test_wrong_planners_are_named():
    origin = source(rows())
    with pytest.raises(ValueError, match="one of auto, native, reference, got 'cuda'"):
        BatchPlanner(origin, backend="cuda")
    with pytest.raises(ValueError, match="negatives must be from 0 to 1048575, got -1"):
        BatchPlanner(origin, negatives=-1)
    with pytest.raises(ValueError, match="at least 2 candidate items, got 1"):
        BatchPlanner(source(rows(), candidates=np.array([3])), negatives=1)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_training_batches_number_their_steps(native_core, backend):
    """The plan of a step is that of its users and number, in any epoch and however it is made."""
    origin = source(rows(4))
    batches = TrainBatches(origin, batch_size=6, seed=1, phase="p", negatives=2, backend=backend)
    planner = BatchPlanner(origin, negatives=2, seed=1, phase="p")
    for epoch in (0, 3):
        seen = []
        for number, batch in enumerate(batches.epoch(epoch)):
            assert_same(batch, planner.plan(batch.users, epoch * len(batches) + number))
            seen.extend(batch.users.tolist())
        assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_memory_of_its_own(native_core, copied):
    planner = BatchPlanner(source(rows(), sampling="popularity"), negatives=2, seed=1)
    want = planner.plan(np.arange(20), 3)
    other = copied(planner)
    for array in planner.source._arrays:
        array[:] = 1  # what the copy must not read
    assert_same(other.plan(np.arange(20), 3), want)


def test_a_loop_may_stop_early(native_core):
    before = threading.active_count()
    for plan in BatchPlanner(source(rows())).plans((np.array([u]), u) for u in range(20)):
        assert len(plan.users) == 1
        break
    del plan
    gc.collect()
    assert threading.active_count() <= before


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("users", [np.zeros((2, 2), dtype=int), np.array([0.5])])
def test_users_of_the_wrong_kind_are_named(native_core, backend, users):
    with pytest.raises(ValueError, match="users must be a 1-D integer array, got"):
        BatchPlanner(source(rows()), backend=backend).plan(users, 0)


def test_wrong_batches_are_named():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TrainBatches(source(rows()), batch_size=0, seed=1, phase="p")
