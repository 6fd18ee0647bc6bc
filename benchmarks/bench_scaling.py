"""How padkern's times grow: epochs with the users, ranking and catalogue loss with the items.

Run with ``pytest benchmarks/bench_scaling.py --benchmark-only``; ``make bench-report`` draws
``scaling.png``. Linear growth has the exponent 1: the slope of log(seconds) over log(size), fitted
by least squares, in ``exponent`` of a task's last entry and in the report.

- Epoch: 1, 2, 4 and 8 times 12,871 users of Prime Pantry's shape, drawn by seed, over 8,347 items;
  batches, losses and AdamW of the released model cut to one block and text vectors of width 256.
- Exact ranks of 1,024 users, and the catalogue loss of 1,024 tokens, forward and backward: 10^4,
  10^5 and 10^6 items, D = 192. ``resident_mib`` is the growth of the process during a call,
  ``total_mib`` its peak.
- ``PADKERN_BENCH_MILLION=1``: the catalogue loss of 4,096 tokens over 1,000,000 items, whose
  process must stay below 4 GB.

Each is compared with another form in float64 before it is timed: the loss of an epoch's batch with
the authors' padded form, ranks with the reference (small integers, exact), the catalogue loss of a
few tokens with blocks of logits.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from functools import lru_cache

import pytest
import torch
from conftest import resident_peaks
from peers import catalogue, epoch, pantry, training
from report_growth import exponent
from settings import SMALL, switched_on

from padkern import _native
from padkern.data.plan import TrainBatches
from padkern.ops.catalogue_loss import catalogue_cross_entropy
from padkern.ops.ranking import count_ranks

USERS, ITEMS, TEXT, DIM, BATCH = (
    (64, 300, 16, 16, 32) if SMALL else (pantry.USERS, pantry.ITEMS, 256, 128, 512)
)
SIZES = (100, 1000, 10_000) if SMALL else (10_000, 100_000, 1_000_000)
ROWS = 64 if SMALL else 1024
LIMIT_GB, SEED = 4.0, 1
_SECONDS: dict[str, dict[int, float]] = defaultdict(dict)


@pytest.fixture(autouse=True)
def _native_only():
    if _native.load().reason:
        pytest.skip(_native.load().reason)


def record(benchmark, machine, task: str, size: int, unit: str, **info: object) -> None:
    """What the report needs of a point, and the exponent of the points so far."""
    if benchmark.stats:
        _SECONDS[task][size] = benchmark.stats.stats.median
    points = _SECONDS[task]
    slope = exponent(list(points), list(points.values()))
    if slope is not None:
        info["exponent"] = round(slope, 3)
    benchmark.extra_info |= machine() | {"contender": "native", "small": SMALL}
    benchmark.extra_info |= {"growth": task, "size": size, "size_unit": unit} | info


@lru_cache(maxsize=1)
def model_and_text():
    """The cut model; its bins are those of the smallest set."""
    torch.manual_seed(0)
    text = torch.randn(ITEMS + 1, TEXT) / TEXT**0.5
    text[0] = 0
    bins = torch.from_numpy(pantry.synthetic(USERS, ITEMS).bins)
    model = training.parity_model(text, bins, dim=DIM, length=pantry.LENGTH, layers=1, heads=2)
    return model, text, bins


def check_loss(model, text: torch.Tensor, batches: TrainBatches) -> None:
    """The loss of some users, without dropout and in float64, equals the authors' form."""
    plan = batches.planner.plan(batches.rows[:32], 0)
    wide = copy.deepcopy(model).double().eval()
    want = training.padded_authors(wide, training.make_batch(plan, pantry.LENGTH, text.double()))
    assert abs(wide.plan_loss(plan).item() - want.item()) < 1e-9 * abs(want.item())


@pytest.mark.parametrize("times", [1, 2, 4, 8])
def bench_epoch_users(benchmark, machine, times):
    model, text, bins = model_and_text()
    data = epoch.Data(
        pantry.synthetic(USERS * times, ITEMS).train, text, bins.numpy(), pantry.LENGTH, BATCH
    )
    batches = TrainBatches(data.source(), batch_size=BATCH, seed=SEED, phase="bench", negatives=1)
    check_loss(model, text, batches)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    model.train()

    def run(limit: int | None = None):
        for number, (plan, _, _) in enumerate(epoch.padkern_batches(batches, SEED)):
            if number == limit:
                break
            optimizer.zero_grad(set_to_none=True)
            model.plan_loss(plan).backward()
            optimizer.step()

    run(3)
    benchmark.group = f"training epoch of {ITEMS} items, d={DIM}, one block"
    benchmark.pedantic(run, rounds=2)
    model.load_state_dict(state)
    record(benchmark, machine, "training epoch", USERS * times, "users")


def ranking_inputs(items: int, users: int, integers: bool):
    """States, items, targets and about eight seen items per user."""
    maker = torch.Generator().manual_seed(items + users)
    if integers:
        states = torch.randint(-2, 3, (users, catalogue.DIM), generator=maker).float()
        matrix = torch.randint(-2, 3, (items + 1, catalogue.DIM), generator=maker).float()
    else:
        states = torch.randn(users, catalogue.DIM, generator=maker)
        matrix = torch.randn(items + 1, catalogue.DIM, generator=maker)
    targets = torch.randint(1, items + 1, (users,), generator=maker)
    lengths = torch.randint(4, 13, (users,), generator=maker)
    seen = torch.randint(1, items + 1, (int(lengths.sum()),), generator=maker)
    return states, matrix, targets, seen, torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])


@pytest.mark.parametrize("items", SIZES)
def bench_ranking_items(benchmark, machine, items):
    exact = ranking_inputs(items, 16, True)
    wide = (exact[0].double(), exact[1].double(), *exact[2:])
    assert torch.equal(
        count_ranks(*exact, backend="native"), count_ranks(*wide, backend="reference")
    )
    del exact, wide
    inputs = ranking_inputs(items, ROWS, False)

    def run():
        return count_ranks(*inputs, backend="native")

    grown, total = resident_peaks(run) or (None, None)
    benchmark.group = f"exact ranks of {ROWS} users, D={catalogue.DIM}"
    benchmark.pedantic(run, rounds=3)
    memory = {"resident_mib": grown, "total_mib": total}
    record(benchmark, machine, f"exact ranks, {ROWS:,} users", items, "items", **memory)


def check_catalogue(inputs) -> None:
    """Loss and gradient by the states of the first tokens, in float64."""
    users, vectors, targets = inputs[0].detach()[:16], inputs[1].detach(), inputs[2][:16]
    wide = users.double()
    # Block by block: the catalogue in float64 would be larger than all else.
    blocks = vectors.split(65536)
    logits = torch.cat([wide @ block.double().T for block in blocks], 1)
    lse = logits.logsumexp(1)
    want = (lse - logits.gather(1, targets[:, None])[:, 0]).mean()
    residual = (logits - lse[:, None]).exp()
    residual[torch.arange(len(targets)), targets] -= 1
    parts = zip(residual.split(65536, 1), blocks, strict=True)
    d_users = sum(part @ block.double() for part, block in parts) / len(targets)
    users.requires_grad_()
    loss = catalogue_cross_entropy(users, vectors, targets, backend="native")
    loss.backward()
    assert abs(loss.item() - want.item()) < 1e-5 * want.item()
    assert (users.grad - d_users).norm() < 1e-5 * d_users.norm()


def catalogue_step(benchmark, items: int, tokens: int) -> dict[str, float | None]:
    """Checks and times forward and backward; the memory of a call."""
    inputs = catalogue.make_inputs(items, tokens)
    check_catalogue(inputs)

    def step():
        inputs[0].grad = inputs[1].grad = None
        catalogue_cross_entropy(*inputs, backend="native").backward()

    step()
    inputs[0].grad = inputs[1].grad = None
    grown, total = resident_peaks(step) or (None, None)
    benchmark.pedantic(step, rounds=3)
    return {"resident_mib": grown, "total_mib": total}


@pytest.mark.parametrize("items", SIZES)
def bench_catalogue_loss_items(benchmark, machine, items):
    benchmark.group = f"catalogue loss of {ROWS} tokens, forward_backward, D={catalogue.DIM}"
    memory = catalogue_step(benchmark, items, ROWS)
    record(benchmark, machine, f"catalogue loss, {ROWS:,} tokens", items, "items", **memory)


@pytest.mark.skipif(not switched_on("PADKERN_BENCH_MILLION"), reason="set PADKERN_BENCH_MILLION=1")
def bench_a_million_items(benchmark, machine):
    benchmark.group = "catalogue_loss forward_backward T=4096 N=1000000 D=192"
    memory = catalogue_step(benchmark, 1_000_000, 4096)
    benchmark.extra_info |= machine() | {"contender": "native"} | memory
    total = memory["total_mib"]
    assert total is None or total * 2**20 < LIMIT_GB * 1e9
