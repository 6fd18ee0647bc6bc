"""The evaluation of a split of Prime Pantry by the released model, and its last stage, on the CPU.

Run with ``pytest benchmarks/bench_evaluation.py --benchmark-only``; the data and the model are
those of ``bench_epoch.py``, its weights untrained. 12,871 users (test split) are ranked among
8,347 items, histories masked.

*Whole*: item vectors, encoding, scores, ranks, Hit@10 and NDCG@10 of the split. *Stage*: scores and
ranks of given states. The authors' form pads to 20 inputs, gates in float64 and sorts the catalogue
user by user, with torch's sort and with numpy's, in the fastest of three batch sizes. Of it,
``PADKERN_BENCH_EVAL_USERS`` users are timed (default 1,024, 0: all); ``whole_s`` scales them by
count and adds the item vectors, which are timed once and whole (``tables_s``).

In float64 the first users' ranks of all forms are equal.
"""

from __future__ import annotations

import copy
import time
from functools import lru_cache

import pytest
import torch
from peers import evaluation as peers
from peers import pantry, ranking, training
from settings import SMALL, count

from padkern import _native
from padkern.ops.ranking import count_ranks
from padkern.pad.evaluation import evaluate

USERS, ITEMS, TEXT, DIM, LAYERS, CHECKED = (
    (96, 300, 24, 16, 1, 24) if SMALL else (pantry.USERS, pantry.ITEMS, 4096, 128, 5, 64)
)
TIMED = count("PADKERN_BENCH_EVAL_USERS", 1024)
ORDERS = {"authors": peers.torch_order, "authors_numpy_sort": peers.numpy_order}
CONTENDERS = ("padkern", "packed_eager", *ORDERS)


@lru_cache(maxsize=1)
def setting():
    """The data and the model."""
    torch.manual_seed(0)
    data = pantry.synthetic(USERS, ITEMS) if SMALL else pantry.load()
    text = torch.randn(len(data.bins), TEXT) / TEXT**0.5
    text[0] = 0
    model = training.parity_model(
        *(text, torch.from_numpy(data.bins)), dim=DIM, length=pantry.LENGTH, layers=LAYERS, heads=2
    )
    return data, model.eval()


def padkern_evaluate(model, data: pantry.Pantry, split) -> peers.Result:
    """padkern's own."""
    result = evaluate(
        model, split, train_frequency=data.frequency, item_bins=data.bins, backend="native"
    )
    found = result.metrics()["all"]
    return peers.Result(torch.from_numpy(result.ranks), found["hit@10"], found["ndcg@10"])


def native_ranks(states: torch.Tensor, matrix: torch.Tensor, split) -> torch.Tensor:
    """padkern's ranks of given states."""
    history = split.history
    ids = (split.targets, history.values, history.offsets)
    return count_ranks(states, matrix, *ids, backend="native")


def assert_same(found: peers.Result, want: peers.Result) -> None:
    """Equal ranks; of a masked target a form may only say that it is far behind."""
    missed = want.ranks.isinf()
    assert torch.equal(found.ranks[~missed], want.ranks[~missed])
    assert bool((found.ranks[missed] > 20).all())
    assert abs(found.hit - want.hit) < 1e-12
    assert abs(found.ndcg - want.ndcg) < 1e-12


@lru_cache(maxsize=1)
def wide():
    """The model in float64, the first users, and what padkern's reference says of them."""
    data, model = setting()
    model, split = copy.deepcopy(model).double(), peers.first(data.test, CHECKED)
    found = evaluate(
        model, split, train_frequency=data.frequency, item_bins=data.bins, backend="reference"
    )
    return model, split, peers.metrics(torch.from_numpy(found.ranks))


def ready(contender: str) -> None:
    """Skips where padkern cannot run."""
    if contender == "padkern" and _native.load().reason:
        pytest.skip(_native.load().reason)


def rounds(seconds: float) -> int:
    """Two rounds of what takes seconds, more of what does not."""
    return 2 if seconds > 2 else 5


def timed(benchmark, run, users: int, **info: object) -> None:
    """Times the form on some users; ``whole_s`` is for all of them."""
    started = time.perf_counter()
    run()
    benchmark.pedantic(run, rounds=rounds(time.perf_counter() - started))
    seconds = benchmark.stats.stats.median if benchmark.stats else float("nan")
    everyone = len(setting()[0].test)
    once = info.get("tables_s", 0.0)
    benchmark.extra_info |= info | {
        "small": SMALL,
        "users_timed": users,
        "users_per_s": round(users / seconds, 1),
        "whole_s": round(seconds * everyone / users + once, 6),
    }


@pytest.mark.parametrize("contender", CONTENDERS)
def bench_evaluation(benchmark, machine, contender):
    ready(contender)
    data, model = setting()
    double, checked, want = wide()
    info = machine() | {"contender": contender, "data": data.name, "items": ITEMS}
    benchmark.group = f"evaluation, {len(data.test)} users of {data.name}, {ITEMS} items"
    if contender == "padkern":
        assert_same(padkern_evaluate(double, data, checked), want)
        timed(benchmark, lambda: padkern_evaluate(model, data, data.test), len(data.test), **info)
        return
    if contender == "packed_eager":
        assert_same(peers.packed_evaluate(double, checked, 16, 16), want)
        some = peers.first(data.test, TIMED or len(data.test))
        batch = peers.best_batch(lambda n: peers.packed_states(model, model.tables(), some, n))
        states = peers.packed_states(model, model.tables(), some, batch)
        matrix = peers.folded(model, model.tables()).detach()
        given = peers.problem(states, matrix, some)
        chunk = ranking.best_chunk(ranking.mm_count, given, 20.0)
        info |= {"batch": batch, "chunk": chunk}
        timed(
            benchmark,
            lambda: peers.packed_evaluate(model, data.test, batch, chunk),
            *(len(data.test),), **info,
        )  # fmt: skip
        return
    order = ORDERS[contender]
    tables = peers.authors_tables(double)
    assert_same(peers.authors_evaluate(double, tables, checked, 16, order), want)
    started = time.perf_counter()
    tables = peers.authors_tables(model)
    info |= {"tables_s": round(time.perf_counter() - started, 4)}
    few = peers.first(data.test, 256)
    batch = peers.best_batch(lambda n: peers.authors_evaluate(model, tables, few, n, order))
    some = peers.first(data.test, TIMED or len(data.test))
    timed(
        benchmark,
        lambda: peers.authors_evaluate(model, tables, some, batch, order),
        len(some),
        **info,
        batch=batch,
    )


@pytest.mark.parametrize("contender", CONTENDERS)
def bench_scoring_and_ranking(benchmark, machine, contender):
    """The last stage: states and item vectors of the experts are there; folding and packing are
    timed."""
    ready(contender)
    data, model = setting()
    double, checked, want = wide()
    info = machine() | {"contender": contender, "data": data.name, "items": ITEMS}
    benchmark.group = f"scores and ranks, {len(data.test)} users of {data.name}, {ITEMS} items"
    with torch.no_grad():
        exact = double.tables(), peers.packed_states(double, double.tables(), checked, 16)
        tables = model.tables()
        states = peers.packed_states(model, tables, data.test, 256)

        if contender == "padkern":
            found = native_ranks(exact[1], double.fold(exact[0]), checked)
            assert_same(peers.metrics(found), want)
            timed(
                benchmark,
                lambda: native_ranks(states, model.fold(tables), data.test),
                *(len(data.test),), **info,
            )  # fmt: skip
            return
        if contender == "packed_eager":
            given = peers.problem(exact[1], peers.folded(double, exact[0]), checked)
            assert_same(peers.metrics(ranking.mm_count(given, 16).double()), want)
            given = peers.problem(states, peers.folded(model, tables), data.test)
            chunk = ranking.best_chunk(ranking.mm_count, given, 20.0)

            def run():
                given = peers.problem(states, peers.folded(model, tables), data.test)
                return ranking.mm_count(given, chunk)

            timed(benchmark, run, len(data.test), **info, chunk=chunk)
            return
        order = ORDERS[contender]
        parts = exact[1].split([table.shape[1] for table in exact[0]], 1)
        weights = peers.item_weights(double)
        ranks = peers.authors_ranks(parts, exact[0], weights, checked, 0, order)
        assert_same(peers.metrics(torch.tensor(ranks, dtype=torch.float64)), want)
        weights, widths = peers.item_weights(model), [table.shape[1] for table in tables]
        some = min(TIMED or len(data.test), len(data.test))

        def run_users(batch: int, users: int = some) -> None:
            for low in range(0, users, batch):
                parts = states[low : min(low + batch, users)].split(widths, 1)
                peers.authors_ranks(parts, tables, weights, data.test, low, order)

        batch = peers.best_batch(lambda n: run_users(n, min(256, some)))
        timed(benchmark, lambda: run_users(batch), some, **info, batch=batch)
