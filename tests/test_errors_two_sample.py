"""Every documented error of the two-sample statistics names its argument."""

from __future__ import annotations

import pytest
import torch

from padkern import mkmmd_power, mkmmd_test, mkmmd_variance, mkmmd_witness, two_sample

X, Y = torch.zeros(5, 3), torch.ones(6, 3)
COMMON = [
    (([[1.0]], Y), {}, TypeError, "source must be a Tensor"),
    ((X, Y[:, :2]), {}, ValueError, r"target must have shape \[m, 3\]"),
    ((X[:0], Y), {}, ValueError, "source must not be empty"),
    ((X, Y.long()), {}, TypeError, "target must be float64"),
    ((X, Y), {"kernel": "linear"}, ValueError, "kernel must be one of"),
    ((X, Y), {"kernel": "energy", "sigma_sq": 1.0}, ValueError, "takes no sigma_sq"),
    ((X, Y), {"alphas": (-1.0,)}, ValueError, "alphas must be positive"),
    ((X, Y), {"alphas": torch.tensor([-1.0])}, ValueError, "alphas must be positive"),
    ((X, Y), {"betas": [1.0]}, ValueError, r"betas must have shape \[5\]"),
    ((X, Y), {"sigma_sq": -1.0}, ValueError, "sigma_sq must be positive"),
    ((X, Y), {"backend": "triton"}, ValueError, "backend must be one of auto, reference, blocked"),
]
SPECIAL = [
    (mkmmd_test, (X[:1], Y), {}, ValueError, "source must have at least 2 rows"),
    (mkmmd_test, (X, Y), {"estimator": "tllib"}, ValueError, "estimator must be one of unbiased"),
    (mkmmd_test, (X, Y), {"permutations": 0}, ValueError, r"permutations must lie in 1\.\."),
    (mkmmd_test, (X, Y), {"permutations": 1.5}, TypeError, "permutations must be an integer"),
    (mkmmd_test, (X, Y), {"seed": "a"}, TypeError, "seed must be an integer"),
    (mkmmd_test, (X, Y), {"seed": 2**64}, ValueError, "seed must lie in"),
    (mkmmd_variance, (X[:3], Y), {}, ValueError, "source must have at least 4 rows"),
    (mkmmd_variance, (X, Y), {"estimator": "biased"}, ValueError, "estimator must be one of unb"),
    (mkmmd_power, (X, Y[:1]), {}, ValueError, "target must have at least 2 rows"),
    (mkmmd_power, (X, Y), {"eps": 0.0}, ValueError, "eps must be positive"),
    (mkmmd_power, (X, Y), {"eps": "a"}, TypeError, "eps must be a number"),
    (mkmmd_witness, (X[0], X, Y), {}, ValueError, r"query must have shape \[rows, D\]"),
    (mkmmd_witness, (X[:, :2], X, Y), {}, ValueError, r"query must have shape \[q, 3\]"),
    (mkmmd_witness, (X.to("meta"), X, Y), {}, ValueError, "query must be on cpu"),
    (
        mkmmd_witness,
        (X, X, Y),
        {"source_weight": torch.zeros(5)},
        ValueError,
        "source_weight must leave at least 1 row",
    ),
    (
        mkmmd_witness,
        (X, X, Y),
        {"target_weight": -torch.ones(6)},
        ValueError,
        "target_weight must be >= 0",
    ),
]


@pytest.mark.parametrize(("args", "options", "error", "match"), COMMON)
def test_common_errors(args, options, error, match):
    for function in (mkmmd_test, mkmmd_variance, mkmmd_power):
        with pytest.raises(error, match=match):
            function(*args, **options)
    with pytest.raises(error, match=match):
        mkmmd_witness(X, *args, **options)


@pytest.mark.parametrize(("function", "args", "options", "error", "match"), SPECIAL)
def test_errors(function, args, options, error, match):
    with pytest.raises(error, match=match):
        function(*args, **options)


def test_native_names_the_reason_when_it_cannot_run(monkeypatch):
    monkeypatch.setattr(two_sample._backends, "native_reason", lambda: "padkern._C is blocked")
    for function in (mkmmd_test, mkmmd_variance, mkmmd_power):
        with pytest.raises(RuntimeError, match=r"backend='native' cannot be used: padkern\._C is"):
            function(X, Y, backend="native")
