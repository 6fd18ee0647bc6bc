"""What the tests of Triton backends share: the device, its marks, and checks of an op's record.

Triton decides once per process whether it interprets. Under ``TRITON_INTERPRET=1`` the tests run on
the CPU (``test_head_triton_interpreter.py`` does that); otherwise they need a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

from padkern.testing import Case, OpSpec, Options, assert_matches, exact, run

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
marks = (
    []
    if INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available(), reason="torch finds no usable CUDA device"
        ),
    ]
)


def on_device(spec: OpSpec, shape: tuple[int, ...], *arguments, **options) -> Case:
    """A case of the op's record, on the device that Triton runs on."""
    return spec.case(shape, *arguments, device=DEVICE, **options)


def assert_case(
    spec: OpSpec,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    options: Options | None = None,
    **make,
) -> None:
    """Value, alone and with its gradients, against the float64 reference within the record's
    tolerance."""
    case = on_device(spec, shape, dtype, layout, options, **make)
    want = exact(spec, case)
    got = run(spec, case, "triton")
    assert_matches(spec, case, got, want)
    with torch.no_grad():
        alone = spec.call(case, "triton")
    assert_matches(spec, case, got._replace(value=alone), want)


def assert_refuses(spec: OpSpec) -> None:
    """What the record says must be refused is, ids included: in the interpreter, whose tensors are
    on the CPU."""
    for error in spec.errors:
        arguments = spec.case(spec.error_shape).arguments | {"backend": "triton"}
        with pytest.raises(error.error, match=error.match):
            spec.public(**(arguments | dict(error.change)))


def assert_same_bits(spec: OpSpec, shape: tuple[int, ...], options: Options | None = None) -> None:
    """Two calls on the same inputs give the same bits, and finite ones."""
    case = on_device(spec, shape, options=options)
    first, second = (run(spec, case, "triton") for _ in range(2))
    assert torch.equal(first.value, second.value)
    for name, gradient in first.gradients.items():
        assert gradient.isfinite().all(), name
        assert torch.equal(gradient, second.gradients[name]), name
