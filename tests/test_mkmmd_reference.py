"""The reference against figures of the official code, hand computation and definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from padkern.ops.mkmmd.reference import (
    mean_sq_distance,
    median_sq_distance,
    mkmmd_loss_ref,
    squared_distances,
)
from padkern.testing import make_golden_mkmmd_inputs, make_mkmmd_inputs

GOLDEN = json.loads((Path(__file__).parent / "golden" / "mkmmd_tllib.json").read_text())


def by_definition(x, y, alphas, sigma_sq, estimator, wx, wy):
    """Loops over pairs, straight from the definition."""

    def k(a, b):
        d = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        return sum(math.exp(-d / (2 * alpha * sigma_sq)) for alpha in alphas)

    def same(rows, w):
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows))]
        if estimator != "biased":
            pairs = [(i, j) for i, j in pairs if i != j]
        norm = sum(w[i] * w[j] for i, j in pairs)
        return sum(w[i] * w[j] * k(rows[i], rows[j]) for i, j in pairs) / norm

    x, y, wx, wy = (t.tolist() for t in (x, y, wx, wy))
    cross = sum(
        wi * wj * k(a, b) for wi, a in zip(wx, x, strict=True) for wj, b in zip(wy, y, strict=True)
    )
    return same(x, wx) + same(y, wy) - 2 * cross / (sum(wx) * sum(wy))


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_equals_the_definition_with_weights_and_unequal_sizes(estimator):
    x, y = make_mkmmd_inputs(4, 3, 2, torch.float64)
    wx = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    wy = torch.tensor([1.0, 0.25, 3.0], dtype=torch.float64)
    got = mkmmd_loss_ref(
        x,
        y,
        alphas=(0.3, 1.7),
        sigma_sq=1.9,
        estimator=estimator,
        source_weight=wx,
        target_weight=wy,
    )
    assert got.item() == pytest.approx(
        by_definition(x, y, (0.3, 1.7), 1.9, estimator, wx, wy), abs=1e-14
    )


def test_hand_computed_pair():
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    y = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    k = lambda d: math.exp(-d / 2)  # noqa: E731
    unbiased = k(1) + k(4) - 2 / 4 * (k(0) + k(4) + k(1) + k(1))
    biased = (2 + 2 * k(1)) / 4 + (2 + 2 * k(4)) / 4 - 2 / 4 * (k(0) + k(4) + k(1) + k(1))
    options = {"alphas": (1.0,), "sigma_sq": 1.0}
    assert mkmmd_loss_ref(x, y, **options).item() == pytest.approx(unbiased, abs=1e-15)
    assert mkmmd_loss_ref(x, y, estimator="biased", **options).item() == pytest.approx(
        biased, abs=1e-15
    )
    assert mkmmd_loss_ref(x, y, estimator="tllib", **options).item() == pytest.approx(
        unbiased + 2, abs=1e-14
    )


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"n{c['n']}_d{c['d']}")
def test_golden_bandwidth_is_the_pooled_mean(case):
    x, y = make_golden_mkmmd_inputs(case)
    pooled = torch.cat([x, y])
    distances = (pooled[:, None] - pooled[None]).square().sum(-1)
    assert mean_sq_distance(x, y).item() == pytest.approx(distances.mean().item(), rel=1e-12)
    rows, columns = torch.triu_indices(len(pooled), len(pooled), 1)
    assert median_sq_distance(x, y).item() == pytest.approx(
        distances[rows, columns].median().item(), rel=1e-10
    )


def test_median_of_mostly_identical_rows_is_the_mean():
    x = torch.zeros(6, 2, dtype=torch.float64)
    y = torch.ones(2, 2, dtype=torch.float64)
    assert median_sq_distance(x, y).item() == mean_sq_distance(x, y).item() > 0


def test_squared_distances_are_never_negative_and_keep_their_gradient():
    a = (torch.full((3, 4), 1e3) + torch.arange(4) * 1e-3).requires_grad_()
    distances = squared_distances(a, a)
    assert (distances >= 0).all()
    weights = torch.arange(9.0).reshape(3, 3)
    (gradient,) = torch.autograd.grad((distances * weights).sum(), a)
    assert gradient.abs().max() < 1.0  # exactly 0 in real numbers: all rows are equal


def test_gradcheck_by_inputs_bandwidth_and_weights():
    x, y = make_mkmmd_inputs(3, 4, 2, torch.float64, requires_grad=True)
    sigma_sq = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    wx = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def run(x, y, sigma_sq, wx):
        return mkmmd_loss_ref(x, y, sigma_sq=sigma_sq, source_weight=wx)

    assert torch.autograd.gradcheck(run, (x, y, sigma_sq, wx))
    assert torch.autograd.gradgradcheck(
        lambda x, y: mkmmd_loss_ref(x, y, sigma_sq=2.0), (x, y), atol=1e-6
    )
