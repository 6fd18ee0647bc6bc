"""Drop-ins against a restatement of the originals, and the code of the migration page."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from padkern import mkmmd_loss
from padkern.compat.tllib import GaussianKernel, MultipleKernelMaximumMeanDiscrepancy
from padkern.testing import (
    MKMMD_TOLERANCES,
    make_golden_mkmmd_inputs,
    make_mkmmd_inputs,
    relative_error,
    value_and_gradients,
)

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "mkmmd_tllib.json").read_text())
PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
MMD = MultipleKernelMaximumMeanDiscrepancy


def _pair_weights(n: int, linear: bool) -> Tensor:
    """[2n, 2n] weights of the kernel matrix of the pooled rows, entry by entry."""
    w = torch.zeros(2 * n, 2 * n, dtype=torch.float64)
    for i in range(n):
        if linear:
            j = (i + 1) % n
            w[i, j] = w[n + i, n + j] = 1 / n
            w[i, n + j] = w[j, n + i] = -1 / n
            continue
        for j in range(n):
            if i != j:
                w[i, j] = w[n + i, n + j] = 1 / (n * (n - 1))
            w[i, n + j] = w[n + i, j] = -1 / n**2
    return w


def _restated(z_s: Tensor, z_t: Tensor, kernels: list[dict], linear: bool) -> Tensor:
    rows = torch.cat([z_s, z_t])
    distances = (rows[:, None] - rows[None]).square().sum(2)
    matrix = torch.zeros_like(distances)
    for kernel in kernels:
        if kernel.get("track_running_stats", True):
            sigma_square = kernel.get("alpha", 1.0) * distances.detach().mean()
        else:
            sigma_square = torch.tensor(kernel["sigma"] ** 2)
        matrix = matrix + torch.exp(-distances / (2 * sigma_square))
    n = len(z_s)
    return (matrix * _pair_weights(n, linear)).sum() + 2 / (n - 1)


TRACKED = [{"alpha": 2.0**k} for k in range(-3, 2)]
FIXED = [{"sigma": s, "track_running_stats": False} for s in (0.5, 1.3, 4.0)]
SETS = {
    "tracked": TRACKED,
    "fixed": FIXED,
    "both": [*FIXED[:2], *TRACKED[2:], {"alpha": 0.7}],
    "tracked in spite of sigma": [{"sigma": 9.0}, {"sigma": 0.1, "alpha": 3.0}],
    "one": [{}],
}


@pytest.mark.parametrize("linear", [False, True], ids=["all pairs", "linear"])
@pytest.mark.parametrize("n", [2, 3, 4, 17])
@pytest.mark.parametrize("name", SETS)
def test_mmd_equals_the_restatement(name, n, linear, backend):
    x, y = make_mkmmd_inputs(n, n, 5, torch.float64)
    loss = MMD([GaussianKernel(**k) for k in SETS[name]], linear=linear, backend=backend)
    expected = value_and_gradients(_restated, x, y, kernels=SETS[name], linear=linear)
    got = value_and_gradients(loss, x, y)
    assert got[0].item() == pytest.approx(expected[0].item(), abs=1e-12)
    for g, e in zip(got[1:], expected[1:], strict=True):
        assert relative_error(g, e) < 1e-11
    single = value_and_gradients(loss, x.float(), y.float())
    assert single[0].dtype == torch.float32
    assert single[0].item() == pytest.approx(expected[0].item(), abs=1e-5)
    for g, e in zip(single[1:], expected[1:], strict=True):
        assert relative_error(g, e) < 1e-5


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"n{c['n']}_d{c['d']}")
def test_golden_figures_of_the_original(case, backend):
    x, y = make_golden_mkmmd_inputs(case)
    loss = MMD([GaussianKernel(alpha=alpha) for alpha in case["alphas"]], backend=backend)
    value, dx, dy = value_and_gradients(loss, x, y)
    assert value.item() == pytest.approx(case["loss"], abs=1e-10)
    assert dx.norm().item() == pytest.approx(case["gx_norm"], rel=1e-9)
    assert dy.norm().item() == pytest.approx(case["gy_norm"], rel=1e-9)


class Cosine(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        unit = rows / rows.norm(dim=1, keepdim=True)
        return unit @ unit.T


class Halved(GaussianKernel):
    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) / 2


@pytest.mark.parametrize("linear", [False, True], ids=["all pairs", "linear"])
@pytest.mark.parametrize("n", [2, 6])
def test_other_callables_are_evaluated_on_the_pooled_rows(n, linear):
    x, y = make_mkmmd_inputs(n, n, 4, torch.float64)

    def lopsided(rows: Tensor) -> Tensor:  # not symmetric: each half must be read where it stands
        return rows @ rows.roll(1, 1).T

    def expected(z_s, z_t):
        rows = torch.cat([z_s, z_t])
        matrix = Cosine()(rows) + lopsided(rows)
        gaussian = _restated(z_s, z_t, [{"alpha": 0.5}], linear)
        half = _restated(z_s, z_t, [{}], linear) - 2 / (n - 1)
        return (matrix * _pair_weights(n, linear)).sum() + gaussian + half / 2

    loss = MMD([Cosine(), GaussianKernel(alpha=0.5), lopsided, Halved()], linear=linear)
    want = value_and_gradients(expected, x, y)
    got = value_and_gradients(loss, x, y)
    assert got[0].item() == pytest.approx(want[0].item(), abs=1e-12)
    for g, e in zip(got[1:], want[1:], strict=True):
        assert relative_error(g, e) < 1e-11


@pytest.mark.parametrize("kernel", [{"alpha": 0.7}, FIXED[1]], ids=["tracked", "fixed"])
def test_the_kernel_matrix(kernel):
    x, _ = make_mkmmd_inputs(9, 2, 4, torch.float64)
    distances = (x[:, None] - x[None]).square().sum(2)
    sigma_square = 0.7 * distances.mean() if "alpha" in kernel else torch.tensor(1.3**2)
    module = GaussianKernel(**kernel)
    torch.testing.assert_close(module(x), torch.exp(-distances / (2 * sigma_square)))
    assert (module(x).diagonal() == 1).all()
    assert module.sigma_square.item() == pytest.approx(sigma_square.item(), rel=1e-12)
    shifted = module(x.float() + 1000)  # float32 keeps three digits less of the rows themselves
    torch.testing.assert_close(shifted.double(), module(x), atol=1e-3, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x.float()), GaussianKernel(**kernel)(x.float()))
        assert module(x.float()).dtype == torch.float32


def test_memory_of_linear_is_linear():
    """The full kernel matrix of these rows would take 128 GiB."""
    x, y = make_mkmmd_inputs(2**16, 2**16, 2)
    value, dx, _ = value_and_gradients(MMD([GaussianKernel(alpha=1.0)], linear=True), x, y)
    assert value.isfinite()
    assert dx.isfinite().all()


@pytest.mark.parametrize("linear", [False, True], ids=["all pairs", "linear"])
def test_identical_rows(linear, backend):
    x = torch.full((7, 3), 0.1)
    loss = MMD([GaussianKernel(alpha=a) for a in (0.5, 1.0)], linear, backend=backend)
    value, dx, dy = value_and_gradients(loss, x, x.clone())
    assert value.item() == pytest.approx(2 / 6, abs=1e-6)
    assert (dx == 0).all()
    assert (dy == 0).all()


@pytest.mark.parametrize("linear", [False, True], ids=["all pairs", "linear"])
def test_half_inputs_and_autocast(linear):
    x, y = make_mkmmd_inputs(20, 20, 6)
    loss = MMD([GaussianKernel(alpha=2.0**k) for k in range(-3, 2)], linear)
    half = x.half()
    want = value_and_gradients(_restated, half.double(), y.double(), kernels=TRACKED, linear=linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, dx, dy = value_and_gradients(loss, half, y)
    assert value.dtype == torch.float32
    assert abs(value.item() - want[0].item()) <= MKMMD_TOLERANCES[torch.float32].loss
    assert dx.dtype == torch.float16
    assert relative_error(dx, want[1]) < 2e-3
    assert relative_error(dy, want[2]) < 1e-5


def test_it_is_a_module_without_state():
    loss = MMD([GaussianKernel()], linear=False)
    assert loss.state_dict() == {}
    assert len(loss.kernels) == 1
    assert "alpha=1.0" in repr(GaussianKernel())
    assert "sigma=2.0" in repr(GaussianKernel(2.0, False))


def test_arguments_of_the_constructors():
    with pytest.raises(ValueError, match="sigma must be given where track_running_stats is False"):
        GaussianKernel(track_running_stats=False)
    with pytest.raises(ValueError, match=r"sigma must be finite and not 0, got 0\.0"):
        GaussianKernel(0.0, False)
    with pytest.raises(ValueError, match=r"alpha must be positive and finite, got -1\.0"):
        GaussianKernel(alpha=-1.0)
    with pytest.raises(ValueError, match="kernels must be a sequence of at least one kernel"):
        MMD([])
    with pytest.raises(TypeError, match=r"kernels\[1\] must be callable, got float"):
        MMD([GaussianKernel(), 1.0])


def test_arguments_of_the_call():
    loss, x = MMD([GaussianKernel()]), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"z_t must have the shape of z_s, \[4, 3\], got \[5, 3\]"):
        loss(x, torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"z_s must have shape \[n, D\] with n >= 2, got \[1, 3\]"):
        loss(x[:1], x[:1])
    with pytest.raises(TypeError, match=r"z_s must be a floating point Tensor, got torch\.int64"):
        loss(x.long(), x)
    with pytest.raises(ValueError, match=r"must return the matrix \[8, 8\].*got \[4, 8\]"):
        MMD([lambda rows: torch.ones(4, 8)])(x, x)


# ---- the migration page --------------------------------------------------------------------------


def _needs(block: str) -> str | None:
    """The package a block needs besides padkern, if it is not installed."""
    names = re.findall(r"^\s*(?:from|import) (\w+)", block, re.MULTILINE)
    for name in names:
        if name not in ("torch", "padkern") and importlib.util.find_spec(name) is None:
            return name
    return None


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_of_the_page_runs(number):
    missing = _needs(BLOCKS[number])
    if missing:
        pytest.skip(f"{missing} is not installed")
    torch.manual_seed(0)
    names: dict[str, object] = {}
    alone = "torch.distributed" in BLOCKS[number]
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        exec(compile(BLOCKS[number], f"migration.md, block {number}", "exec"), names)
    finally:
        if alone:
            dist.destroy_process_group()
    assert isinstance(names["loss"], Tensor)
    assert names["loss"].isfinite()


def test_the_page_has_padkern_code_for_each_library():
    own = [block for block in BLOCKS if "padkern" in block]
    assert len(own) >= 5
    for heading in ("## TLlib", "## GeomLoss", "## KeOps"):
        assert heading in PAGE


GEOMLOSS = {"gaussian": 0.7, "laplacian": 0.7, "energy": None}


@pytest.mark.parametrize("name", GEOMLOSS)
@pytest.mark.parametrize("weighted", [False, True])
def test_relation_to_geomloss(name, weighted):
    samples_loss = pytest.importorskip("geomloss").SamplesLoss
    x, y = make_mkmmd_inputs(30, 20, 4, torch.float64)
    blur = GEOMLOSS[name]
    theirs = samples_loss(name, blur=blur or 0.05, backend="tensorized")
    a, b = torch.rand(30, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    a, b = a / a.sum(), b / b.sum()
    if not weighted:
        a, b = torch.full_like(a, 1 / 30), torch.full_like(b, 1 / 20)
    options = {} if blur is None else {"alphas": (1.0,), "sigma_sq": blur**2}
    weights = {"source_weight": a, "target_weight": b} if weighted else {}

    def ours(x, y):
        value = mkmmd_loss(x, y, kernel=name, estimator="biased", **options, **weights)
        return 0.5 * value

    value, dx, dy = value_and_gradients(ours, x, y)
    want, want_dx, want_dy = value_and_gradients(lambda x, y: theirs(a, x, b, y), x, y)
    # It takes no distance below 1e-4, so of the root kernels the diagonals differ, as documented.
    floor = {"gaussian": 0.0, "laplacian": 1e-4, "energy": 1e-4}
    diagonals = 0.5 * floor[name] * (a.square().sum() + b.square().sum())
    assert value.item() == pytest.approx(float(want + diagonals), abs=1e-7)
    assert relative_error(dx, want_dx) < 1e-6
    assert relative_error(dy, want_dy) < 1e-6
