"""The loss over a process group against the single-process reference on the pooled rows.

Processes take seconds to start, so one start of 2, 3 or 4 ranks runs every case. The file runs
itself: ``python test_mkmmd_distributed.py RANK WORLD FOLDER`` is one rank.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from padkern import mkmmd_loss
from padkern.ops.mkmmd.exchange import column_sums, products
from padkern.ops.mkmmd.reference import DEFAULT_ALPHAS
from padkern.testing import MKMMD_TOLERANCES, make_mkmmd_inputs, relative_error

WORLDS = (2, 3, 4)
BACKENDS = ("reference", "native")
KERNELS = ("gaussian", "laplacian", "inverse_multiquadric", "rational_quadratic", "energy")
SIZES = {2: ((9, 14), (12, 5)), 3: ((7, 2, 11), (3, 13, 6)), 4: ((6, 3, 8, 5), (4, 9, 2, 7))}
DIM = 6
DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Problem(NamedTuple):
    """One loss over all ranks."""

    source: Tensor  # [n, D], all ranks' rows
    target: Tensor
    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    options: dict[str, Any]
    source_weight: Tensor | None = None
    target_weight: Tensor | None = None

    def part(self, rank: int) -> dict[str, Any]:
        """The arguments of one rank, on fresh leaves."""

        def of(tensor: Tensor | None, sizes: tuple[int, ...]) -> Tensor | None:
            return None if tensor is None else tensor.split(sizes)[rank].clone()

        out = {key: _leaf(value) for key, value in self.options.items()}
        out["source"] = of(self.source, self.sizes[0]).requires_grad_()
        out["target"] = of(self.target, self.sizes[1]).requires_grad_()
        out["source_weight"] = of(self.source_weight, self.sizes[0])
        out["target_weight"] = of(self.target_weight, self.sizes[1])
        return out

    def pooled(self) -> dict[str, Any]:
        """The same problem on one process, in float64."""

        def exact(value: Any) -> Any:
            floats = isinstance(value, Tensor) and value.is_floating_point()
            return _leaf(value, torch.float64) if floats else value

        out = {key: exact(value) for key, value in self.options.items()}
        out["source"] = self.source.double().requires_grad_()
        out["target"] = self.target.double().requires_grad_()
        return out | {
            "source_weight": exact(self.source_weight),
            "target_weight": exact(self.target_weight),
        }


def _leaf(value: Any, dtype: torch.dtype | None = None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(dtype or value.dtype, copy=True).requires_grad_(value.requires_grad)


def problems(world: int) -> dict[str, Problem]:
    """Every case that is compared with the reference in value and gradients."""
    sizes = SIZES[world]
    n, m = (sum(one) for one in sizes)
    x, y = make_mkmmd_inputs(n, m, DIM, torch.float64)
    plain = partial(Problem, x, y, sizes)
    rng = torch.Generator().manual_seed(world)
    random = partial(torch.rand, dtype=torch.float64, generator=rng)
    out: dict[str, Problem] = {}
    for kernel in KERNELS:
        for estimator in ("unbiased", "biased"):
            options = {"kernel": kernel, "estimator": estimator}
            out[f"{kernel}-{estimator}-f64"] = plain(options)
            out[f"{kernel}-{estimator}-f32"] = Problem(x.float(), y.float(), sizes, options)
    wx, wy = random(n) * 3, random(m) * 1e-3
    wx[::4] = 0
    mask = random(n) < 0.7
    mask[: sizes[0][0]] = False  # nothing is left on rank 0
    dirty = torch.where(mask[:, None], x, float("nan"))
    sigma = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    alphas = torch.tensor([0.3, 1.0, 2.2], dtype=torch.float64, requires_grad=True)
    betas = torch.tensor([0.5, -0.2, 1.5], dtype=torch.float64, requires_grad=True)
    learned = {"sigma_sq": sigma, "alphas": alphas, "betas": betas}
    for estimator in ("unbiased", "biased"):
        e = {"estimator": estimator}
        out[f"weights-{estimator}"] = plain(e, wx, wy)
        out[f"mask-{estimator}"] = Problem(dirty, y, sizes, e, mask)
        out[f"learned-{estimator}"] = plain({**learned, **e}, wx)
        out[f"learned-laplacian-{estimator}"] = plain({**learned, **e, "kernel": "laplacian"})
    out["sigma-number"] = plain({"sigma_sq": 2.5})
    out["sigma-f32"] = plain({"sigma_sq": torch.tensor(2.5, requires_grad=True)})
    out["alphas"] = plain({"alphas": (0.1, 0.7, 3.0), "betas": (1.0, 2.0, -0.5)})
    out["bandwidth-detached"] = plain({"alphas": alphas})
    for a, b in (("f16", "f32"), ("bf16", "bf16"), ("bf16", "f64"), ("f64", "f32")):
        out[f"dtypes-{a}-{b}"] = Problem(x.to(DTYPES[a]), y.to(DTYPES[b]), sizes, {})
    out["offset"] = Problem((x + 100).float(), (y + 100).float(), sizes, {})
    half = (n + m) // 2
    pool = torch.cat([x, y])[: 2 * half]
    equal = (_near(sizes[0], half), _near(sizes[1], half))
    out["tllib"] = Problem(pool[:half], pool[half:], equal, {"estimator": "tllib"})
    one = ((1,) * world, (2,) * world)
    out["one-row-each"] = Problem(x[:world], y[: 2 * world], one, {})
    none = ((0, *sizes[0][1:-1], sizes[0][0] + sizes[0][-1]), (*sizes[1][:-1], 0))
    m_none = sum(none[1])
    out["no-row"] = Problem(x, y[:m_none], none, {}, wx)
    return out


def _near(sizes: tuple[int, ...], total: int) -> tuple[int, ...]:
    return (*sizes[:-1], total - sum(sizes[:-1]))


# ---- what one rank runs --------------------------------------------------------------------------

DEFAULTS = {
    "alphas": (1 / 8, 1 / 4, 1 / 2, 1, 2),
    "betas": None,
    "kernel": "gaussian",
    "sigma_sq": None,
    "estimator": "unbiased",
    "source_weight": None,
    "target_weight": None,
    "precision": "float32",
    "backend": "reference",
}


def _loss(source: Any, target: Any, *, group: Any = None, **options: Any) -> Tensor:
    options = {**DEFAULTS, **options}
    if options["kernel"] == "energy":
        options["alphas"] = DEFAULT_ALPHAS
    return mkmmd_loss(source, target, group=group or dist.group.WORLD, **options)


def _evaluate(problem: Problem, rank: int, backend: str) -> dict[str, Tensor]:
    part = problem.part(rank)
    leaves = {k: v for k, v in part.items() if isinstance(v, Tensor) and v.requires_grad}
    value = _loss(backend=backend, **part)
    gradients = torch.autograd.grad(value, list(leaves.values()))
    return {"value": value.detach(), **dict(zip(leaves, gradients, strict=True))}


class Towers(nn.Module):
    """Two linear towers and what of the loss can be learned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.left, self.right = nn.Linear(5, DIM).double(), nn.Linear(4, DIM).double()
        self.log_sigma = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.log_alphas = nn.Parameter(torch.tensor([-1.0, 0.0, 0.6], dtype=torch.float64))
        self.betas = nn.Parameter(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {
            "source": self.left(a),
            "target": self.right(b),
            "sigma_sq": self.log_sigma.exp(),
            "alphas": self.log_alphas.exp(),
            "betas": self.betas,
        }


def _tower_inputs(world: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(6)
    n, m = (sum(one) for one in SIZES[world])
    a, b = torch.randn(n, 5, dtype=torch.float64), torch.randn(m, 4, dtype=torch.float64)
    return a, b


def run_data_parallel(rank: int, world: int) -> dict[str, Any]:
    """Gradients of the towers: averaged by DDP with the factor, and summed without it."""
    a, b = (t.split(s)[rank] for t, s in zip(_tower_inputs(world), SIZES[world], strict=True))
    averaged = nn.parallel.DistributedDataParallel(Towers())
    (_loss(**averaged(a, b)) * world).backward()
    summed = Towers()
    _loss(**summed(a, b)).backward()
    for parameter in summed.parameters():
        dist.all_reduce(parameter.grad)
    return {
        "averaged": {k: p.grad for k, p in averaged.module.named_parameters()},
        "summed": {k: p.grad for k, p in summed.named_parameters()},
    }


def run_mixed_demand(rank: int, world: int) -> dict[str, Any]:
    """Only rank 0 wants a gradient, of its source or the bandwidth; another has autograd off."""
    part = problems(world)["gaussian-unbiased-f64"].part(rank)
    x, y = part["source"], part["target"].detach()
    if rank > 0:
        x = x.detach()
    with torch.set_grad_enabled(rank != world - 1):
        value = _loss(x, y)
    if rank == 0:
        value.backward()
    sigma = torch.tensor(3.0, dtype=torch.float64, requires_grad=rank == 0)
    shared = _loss(x.detach(), y, sigma_sq=sigma)
    if rank == 0:
        shared.backward()
    return {
        "value": value.detach(),
        "gradient": x.grad,
        "graph": [value.requires_grad, shared.requires_grad],
        "sigma": sigma.grad,
    }


def run_degenerate(rank: int, world: int) -> dict[str, Any]:
    out = {}
    same = [torch.full((3 + rank, 4), 0.1) for _ in range(2)]
    for name, sigma in (("identical", None), ("zero", torch.tensor(0.0))):
        x, y = (t.clone().requires_grad_() for t in same)
        if name == "zero":
            y = torch.randn_like(y).requires_grad_()
        value = _loss(x, y, sigma_sq=sigma)
        value.backward()
        out[name] = (value.detach(), x.grad, y.grad)
    for name, sigma in (("nan", None), ("nan-sigma-given", 2.0), ("negative", torch.tensor(-1.0))):
        x, y = (torch.randn(4, 3).requires_grad_() for _ in range(2))
        if rank == 1 and name != "negative":
            x.data[1, 2] = float("nan")
        value = _loss(x, y, sigma_sq=sigma)
        value.backward()
        out[name] = (value.detach(), x.grad, y.grad)
    return out


def run_ways_to_call(rank: int, world: int) -> dict[str, Any]:
    """Layouts, autocast, loss scaling, repetition, the public function, a group of some ranks."""
    part = problems(world)["gaussian-unbiased-f32"].part(rank)
    x, y = part["source"].detach(), part["target"].detach()
    group = dist.group.WORLD
    out: dict[str, Any] = {"plain": _loss(x, y), "again": _loss(x, y)}
    out["public"] = mkmmd_loss(x, y, group=group, backend="reference")
    wide = torch.full((len(x), 2 * DIM), float("nan"))
    wide[:, ::2] = x
    out["strided"] = _loss(wide[:, ::2], y.t().contiguous().t())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out["autocast"] = _loss(x, y)
    with torch.inference_mode():
        out["inference"] = _loss(x, y).clone()
    half = x.half().requires_grad_()
    (_loss(half, y) * 65536.0).backward()
    out["scaled"] = half.grad
    twice = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_loss(twice, y), twice, create_graph=True)
    out["second"] = _caught(lambda: gradient.square().sum().backward())
    last = list(range(1, world))
    some = dist.new_group(last)
    if rank in last:
        z = x.double().clone().requires_grad_()
        value = _loss(z, y.double(), group=some)
        value.backward()
        out["some"] = (value.detach(), z.grad)
    else:
        out["some"] = _caught(lambda: _loss(x, y, group=some))
    return out


def _caught(run: Any) -> tuple[str, str]:
    try:
        run()
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", ""


# What goes wrong, as arguments of one rank, and how it must end on all of them.
ERRORS: dict[str, tuple[Any, str, str]] = {
    "width": (
        lambda r, x, y: {"source": x[:, : 3 + r], "target": y[:, : 3 + r]},
        "ValueError",
        "the width D of source and target must be the same on every rank of group, got 3 on rank 0 "
        "and 4 on rank 1",
    ),
    "dtype": (
        lambda r, x, y: {"source": x.half() if r == 1 else x, "target": y},
        "ValueError",
        "the dtype of source must be the same on every rank of group, got torch.float32 on rank 0 "
        "and torch.float16 on rank 1",
    ),
    "kernel": (
        lambda r, x, y: {"kernel": "laplacian" if r else "gaussian"},
        "ValueError",
        "kernel must be the same on every rank of group, got gaussian on rank 0 and laplacian on",
    ),
    "estimator": (
        lambda r, x, y: {"estimator": "biased" if r else "unbiased"},
        "ValueError",
        "estimator must be the same on every rank",
    ),
    "sigma": (
        lambda r, x, y: {"sigma_sq": 1.0 + r},
        "ValueError",
        "sigma_sq must be the same on every rank of group, got 1 on rank 0 and 2 on rank 1",
    ),
    "no sigma": (
        lambda r, x, y: {"sigma_sq": 1.0 if r else None},
        "ValueError",
        "sigma_sq must be the same on every rank of group, got None on rank 0 and a value on",
    ),
    "alphas": (
        lambda r, x, y: {"alphas": (1.0, 2.0) if r else (1.0,)},
        "ValueError",
        "alphas must be the same on every rank of group, got (1) on rank 0 and (1, 2) on rank 1",
    ),
    "betas": (
        lambda r, x, y: {"alphas": (1.0,), "betas": (1.0 + r,)},
        "ValueError",
        "betas must be the same on every rank of group, got (1) on rank 0 and (2) on rank 1",
    ),
    "median": (lambda r, x, y: {"sigma_sq": "median"}, "ValueError", "sigma_sq='median' needs"),
    "weight": (
        lambda r, x, y: {"source_weight": torch.arange(len(x)) - float(r == 1)},
        "ValueError",
        "rank 1: source_weight must be >= 0, got -1 at row 0",
    ),
    "weight gradient": (
        lambda r, x, y: {"target_weight": torch.ones(len(y), requires_grad=r == 1)},
        "ValueError",
        "rank 1: target_weight requires a gradient",
    ),
    "not a tensor": (
        lambda r, x, y: {"source": [1.0] if r == 1 else x},
        "TypeError",
        "rank 1: source must be a Tensor, got list",
    ),
    "own widths": (
        lambda r, x, y: {"target": y[:, :2] if r == 1 else y},
        "ValueError",
        "rank 1: target must have shape [m, 6], got [5, 2]",
    ),
    "backend": (
        lambda r, x, y: {"backend": "cuda" if r == 1 else "reference"},
        "RuntimeError",
        "rank 1: backend='cuda' cannot be used",
    ),
    "too few rows": (
        lambda r, x, y: {"source": x[: int(r == 0)]},
        "ValueError",
        "source must have at least 2 rows over all ranks of group for estimator 'unbiased', got 1",
    ),
    "no row": (
        lambda r, x, y: {"target": y[:0], "estimator": "biased"},
        "ValueError",
        "target must have at least 1 rows over all ranks",
    ),
    "mask": (
        lambda r, x, y: {"source_weight": torch.arange(len(x)) == 10 * r},
        "ValueError",
        "source_weight must leave at least 2 rows over all ranks of group, leaves 1",
    ),
    "tllib sizes": (
        lambda r, x, y: {"estimator": "tllib", "source": x[r == 0 :]},
        "ValueError",
        "estimator 'tllib' needs equal sizes",
    ),
    "tllib weights": (
        lambda r, x, y: {"estimator": "tllib", "source_weight": torch.ones(5) if r else None},
        "ValueError",
        "estimator 'tllib' takes no source_weight",
    ),
}


def run_errors(rank: int, world: int) -> dict[str, tuple[str, str]]:
    x, y = make_mkmmd_inputs(5, 5, DIM)
    out = {
        name: _caught(lambda make=make: _loss(**{"source": x, "target": y, **make(rank, x, y)}))
        for name, (make, _, _) in ERRORS.items()
    }
    out["group"] = _caught(lambda: _loss(x, y, group="world"))
    out["fine again"] = _caught(lambda: _loss(x, y))
    return out


def run_threads(rank: int, world: int) -> dict[str, list[Tensor]]:
    x, y = make_mkmmd_inputs(700 + rank, 90, 20)
    out: dict[str, list[Tensor]] = {}
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        z = x.clone().requires_grad_()
        value = _loss(z, y, backend="native")
        value.backward()
        out[str(threads)] = [value.detach(), z.grad]
    torch.set_num_threads(1)
    return out


EXTRAS = (run_data_parallel, run_mixed_demand, run_degenerate, run_ways_to_call, run_errors)


def main(rank: int, world: int, folder: Path) -> None:
    """Runs everything on one rank and leaves the results in the folder."""
    from padkern import _native

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    native = _native.load().reason == ""
    results: dict[str, Any] = {}
    try:
        for name, problem in problems(world).items():
            for backend in BACKENDS if native else BACKENDS[:1]:
                results[f"{name} {backend}"] = _evaluate(problem, rank, backend)
        for run in (*EXTRAS, *([run_threads] if native else [])):
            torch.manual_seed(100 + rank)
            results[run.__name__] = run(rank, world)
    except Exception:
        results["failure"] = traceback.format_exc()
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


# ---- what the tests look at ----------------------------------------------------------------------

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"
)


@pytest.fixture(scope="module", params=WORLDS, ids=lambda w: f"{w}ranks")
def ranks(request, tmp_path_factory):
    """Every rank's results, from one start of all ranks."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    command = [sys.executable, __file__]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    return [torch.load(folder / f"rank{r}.pt") for r in range(world)], problems(world)


CASES = sorted(problems(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks, name, backend, request):
    results, cases = ranks
    if backend == "native":
        request.getfixturevalue("native_core")
    key = f"{name} {backend}"
    for result in results:
        assert key in result, result.get("failure")
    problem, got = cases[name], [result[key] for result in results]
    arguments = problem.pooled()
    expected = mkmmd_loss(backend="reference", **arguments)
    dtype = (
        torch.float64
        if torch.float64 in (problem.source.dtype, problem.target.dtype)
        else (torch.float32)
    )
    tolerance = MKMMD_TOLERANCES[dtype]
    assert got[0]["value"].dtype == dtype
    for one in got:
        assert torch.equal(one["value"], got[0]["value"])
    error = abs(got[0]["value"].item() - expected.item())
    assert error <= tolerance.loss * max(1.0, abs(expected.item()))
    wanted = {k: v for k, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad}
    exact = torch.autograd.grad(expected, list(wanted.values()))
    for (leaf, tensor), want in zip(wanted.items(), exact, strict=True):
        parts = [one[leaf] for one in got]
        if leaf in ("source", "target"):
            own = getattr(problem, leaf).dtype
            assert parts[0].dtype == own
            rounding = 0.0 if own == dtype else torch.finfo(own).eps
            assert relative_error(torch.cat(parts), want) <= tolerance.gradient + rounding
        else:
            # A copy on every rank: equal shares of the whole derivative.
            assert all(torch.equal(part, parts[0]) for part in parts)
            total = torch.stack(parts).double().sum(0).reshape(tensor.shape)
            limit = 1e-6 if problem.options[leaf].dtype == torch.float32 else 1e-10
            assert relative_error(total, want) <= limit


def test_data_parallel_towers(ranks):
    results, _ = ranks
    world = len(results)
    towers = Towers()
    mkmmd_loss(**towers(*_tower_inputs(world)), backend="reference").backward()
    expected = {name: parameter.grad for name, parameter in towers.named_parameters()}
    assert len(expected) == 7
    for result in results:
        for how in ("averaged", "summed"):
            got = result["run_data_parallel"][how]
            for name, want in expected.items():
                # A shift of all rows changes nothing, so the biases' gradients may cancel out.
                scale = max(want.norm().item(), 1e-3)
                assert (got[name] - want).norm().item() <= 1e-10 * scale, (how, name)


def test_ranks_that_want_no_gradient_take_part(ranks):
    results, cases = ranks
    problem = cases["gaussian-unbiased-f64"]
    arguments = problem.pooled()
    (exact,) = torch.autograd.grad(
        mkmmd_loss(backend="reference", **arguments), arguments["source"]
    )
    got = [result["run_mixed_demand"] for result in results]
    assert relative_error(got[0]["gradient"], exact[: problem.sizes[0][0]]) < 1e-11
    assert [one["graph"] for one in got] == [[True] * 2] + [[False] * 2] * (len(got) - 1)
    sigma = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(
        mkmmd_loss(problem.source, problem.target, sigma_sq=sigma, backend="reference"), sigma
    )
    assert got[0]["sigma"].item() == pytest.approx(whole.item() / len(got), rel=1e-10)
    for one in got:
        assert torch.equal(one["value"], got[0]["value"])


def test_degenerate_values(ranks):
    results, _ = ranks
    for result in results:
        got = result["run_degenerate"]
        for name in ("identical", "zero"):
            value, dx, dy = got[name]
            assert abs(value.item()) < 1e-6, name
            assert (dx == 0).all(), name
            assert (dy == 0).all(), name
        assert got["negative"][0].isnan()
        for name in ("nan", "nan-sigma-given"):
            value, dx, dy = got[name]
            assert value.isnan(), name
            assert dx.isnan().any(), name
            assert dy.isnan().any(), name


def test_ways_to_call(ranks):
    results, cases = ranks
    problem = cases["gaussian-unbiased-f32"]
    exact = problem.pooled()
    half = {**exact, "source": problem.source.half().double().requires_grad_()}
    (scaled,) = torch.autograd.grad(mkmmd_loss(**half, backend="reference"), half["source"])
    some = {
        name: exact[name].detach()[problem.sizes[i][0] :].requires_grad_()
        for i, name in enumerate(("source", "target"))
    }
    value = mkmmd_loss(**some, backend="reference")
    (gradient,) = torch.autograd.grad(value, some["source"])
    got = [result["run_ways_to_call"] for result in results]
    for one in got:
        for name in ("again", "public", "strided", "autocast", "inference"):
            assert torch.equal(one[name], got[0]["plain"]), name
        assert one["second"] == (
            "RuntimeError",
            "mkmmd_loss: with group there are first derivatives only",
        )
    whole = torch.cat([one["scaled"] for one in got])
    assert whole.dtype == torch.float16
    assert relative_error(whole.double() / 65536, scaled) < 2e-3
    assert got[0]["some"] == ("ValueError", "group must hold this rank: new_group left it out")
    for one in got[1:]:
        assert one["some"][0].item() == pytest.approx(value.item(), abs=1e-12)
    assert relative_error(torch.cat([one["some"][1] for one in got[1:]]), gradient) < 1e-11


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_raised_on_every_rank(ranks, name):
    _, kind, message = ERRORS[name]
    for result in ranks[0]:
        got = result["run_errors"][name]
        assert got[0] == kind, got
        assert message in got[1]


def test_the_group_outlives_errors(ranks):
    for result in ranks[0]:
        assert result["run_errors"]["fine again"] == ("none", "")
        got = result["run_errors"]["group"]
        assert got == ("TypeError", "group must be a ProcessGroup or None, got str")


def test_thread_count_changes_no_bit(ranks, native_core):
    for result in ranks[0]:
        got = result["run_threads"]
        for other in (got["2"], got["4"]):
            assert all(torch.equal(a, b) for a, b in zip(got["1"], other, strict=True))


def test_a_group_needs_torch_distributed():
    assert not dist.is_initialized()
    x, y = make_mkmmd_inputs(4, 4, 2)
    with pytest.raises(RuntimeError, match="init_process_group first"):
        _loss(x, y, group=object())


@pytest.mark.parametrize("world", range(1, 10))
def test_every_two_ranks_meet_once(world):
    seen: list[tuple[tuple[int, int], ...]] = []
    for rank in range(world):
        for step in range(1, world // 2 + 1):
            visitor = (rank + step) % world
            for a, b in products(rank, visitor, world):
                seen.append(tuple(sorted([(rank, a), (visitor, b)])))
    wanted = {
        tuple(sorted([(r, a), (q, b)]))
        for r in range(world)
        for q in range(r)
        for a in (0, 1)
        for b in (0, 1)
    }
    assert len(seen) == len(set(seen))
    assert set(seen) == wanted


def test_column_sums_do_not_depend_on_threads(restore_threads):
    values = torch.randn(70001, 3, dtype=torch.float64)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(column_sums(values))
    assert all(torch.equal(one, results[0]) for one in results)
    torch.testing.assert_close(results[0], values.sum(0))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
