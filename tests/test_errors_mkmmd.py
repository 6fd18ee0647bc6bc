"""Every documented error of mkmmd_loss: its type, and that the message names the argument."""

from __future__ import annotations

import pytest
import torch

from padkern import _native, mkmmd_loss

X = torch.zeros(4, 3)
Y = torch.ones(5, 3)

CASES = [
    ("not_a_tensor", ([[1.0]], Y), {}, TypeError, "source must be a Tensor"),
    ("integer", (X, Y.long()), {}, TypeError, "target must be float64"),
    ("sparse", (X.to_sparse(), Y), {}, TypeError, "source must be a dense tensor"),
    ("rank", (X[0], Y), {}, ValueError, r"source must have shape \[rows, D\]"),
    ("width", (X, Y[:, :2]), {}, ValueError, r"target must have shape \[m, 3\], got \[5, 2\]"),
    ("empty", (X[:0], Y), {}, ValueError, "source must not be empty"),
    ("no_columns", (X[:, :0], Y[:, :0]), {}, ValueError, "source must not be empty"),
    ("device", (X, Y.to("meta")), {}, ValueError, "target must be on cpu"),
    ("one_row", (X, Y[:1]), {}, ValueError, "target must have at least 2 rows"),
    ("estimator", (X, Y), {"estimator": "v"}, ValueError, "estimator must be one of"),
    ("tllib_sizes", (X, Y), {"estimator": "tllib"}, ValueError, "needs equal sizes, got 4"),
    (
        "tllib_weight",
        (X, X),
        {"estimator": "tllib", "source_weight": torch.ones(4)},
        ValueError,
        "takes no source_weight",
    ),
    ("alphas_empty", (X, Y), {"alphas": ()}, ValueError, "alphas must hold"),
    ("alphas_negative", (X, Y), {"alphas": (1.0, -2.0)}, ValueError, "alphas must be positive"),
    ("alphas_nan", (X, Y), {"alphas": (float("nan"),)}, ValueError, "alphas must be positive"),
    ("alphas_type", (X, Y), {"alphas": 2.0}, TypeError, "alphas must be a sequence"),
    ("sigma_zero", (X, Y), {"sigma_sq": 0.0}, ValueError, "sigma_sq must be positive"),
    ("sigma_name", (X, Y), {"sigma_sq": "mean"}, ValueError, "sigma_sq must be a number"),
    ("sigma_shape", (X, Y), {"sigma_sq": torch.ones(2)}, ValueError, "sigma_sq must hold one"),
    ("sigma_int", (X, Y), {"sigma_sq": torch.tensor(1)}, TypeError, "sigma_sq must be floating"),
    (
        "weight_shape",
        (X, Y),
        {"target_weight": torch.ones(4)},
        ValueError,
        r"target_weight must have shape \[5\]",
    ),
    (
        "weight_int",
        (X, Y),
        {"source_weight": torch.ones(4, dtype=torch.int64)},
        TypeError,
        "source_weight must be floating point or bool",
    ),
    ("backend", (X, Y), {"backend": "fast"}, ValueError, "backend must be one of"),
]


@pytest.mark.parametrize(
    ("args", "options", "error", "match"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_argument_errors(args, options, error, match):
    with pytest.raises(error, match=match):
        mkmmd_loss(*args, **options)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_weight_values(estimator, backend):
    options = {"estimator": estimator, "backend": backend}
    with pytest.raises(ValueError, match=r"source_weight must be >= 0, got -2 at row 1"):
        mkmmd_loss(X, Y, source_weight=torch.tensor([1.0, -2, 1, 1]), **options)
    with pytest.raises(ValueError, match=r"target_weight must leave at least . row"):
        mkmmd_loss(X, Y, target_weight=torch.zeros(5), **options)


def test_weight_gradients_come_from_the_reference_only(native_core):
    weight = torch.ones(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="source_weight requires a gradient"):
        mkmmd_loss(X, Y, source_weight=weight, backend="native")
    x = torch.randn(4, 3)
    mkmmd_loss(x, Y, source_weight=weight).backward()
    assert weight.grad.abs().sum() > 0


def test_native_names_the_reason_when_it_cannot_run(monkeypatch):
    broken = _native.Native(None, "padkern._C is not available: blocked", "serial")
    monkeypatch.setattr(_native, "load", lambda: broken)
    with pytest.raises(RuntimeError, match=r"backend='native' cannot be used: padkern\._C is not"):
        mkmmd_loss(X, Y, backend="native")
    assert torch.isfinite(mkmmd_loss(X + torch.randn(4, 3), Y))


def test_the_core_checks_again(native_core):
    def run(*sample):
        return native_core.mkmmd_cpu(
            (0, 0, 0), sample, sample, 3, [1.0], [], 0, 0, False, (0, 0, 0, 0), 0, 0
        )

    assert run(0, 0, 0, 0, 4, 3, 1, 0, 0, 0) == "null pointer for source"
    assert "sizes must be positive" in run(X.data_ptr(), 0, 0, 0, -1, 3, 1, 0, 0, 0)
    assert "source has a type" in run(X.data_ptr(), 1, 0, 0, 4, 3, 1, 0, 0, 0)
