"""Gradients of the kernel products against finite differences and the reference."""

from __future__ import annotations

import pytest
import torch

from padkern.ops.kernel_products.op import kernel_apply
from padkern.testing import relative_error

ALPHAS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)


@pytest.fixture(params=["native", "blocked"])
def backend(request):
    """The backends that hold no kernel matrix."""
    if request.param == "native":
        request.getfixturevalue("native_core")
    return request.param


def _rows(count, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) + 3


@pytest.mark.parametrize("kernel", ["gaussian", "inverse_multiquadric", "rational_quadratic"])
def test_gradients(kernel, backend):
    query, rows = _rows(4, 3, seed=1), _rows(5, 3)
    vectors = _rows(5, 2, seed=2)
    sigma = torch.tensor(2.3, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (query, rows, vectors, sigma)]
    betas = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    for power in (1, 2):

        def run(q, r, v, s, power=power):
            return kernel_apply(q, r, v, s, ALPHAS, betas, kernel, backend, power)

        def same(r, v, s, power=power):
            return kernel_apply(r, r, v, s, ALPHAS, None, kernel, backend, power, True)

        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradcheck(same, inputs[1:])


@pytest.mark.parametrize("kernel", ["laplacian", "energy"])
def test_gradients_of_root_kernels(kernel, backend):
    query, rows = (_rows(6, 3, seed=s).requires_grad_() for s in (1, 2))
    with torch.no_grad():
        query[2] = rows[1]  # the root has no derivative there: 0 is taken
    sigma = torch.tensor(2.3, dtype=torch.float64, requires_grad=True)
    vectors = _rows(6, 2)

    def gradients(name):
        out = kernel_apply(
            query,
            rows,
            vectors,
            sigma,
            *((1.0,) if kernel == "energy" else ALPHAS, None, kernel),
            name,
        )
        return torch.autograd.grad(
            out.sin().sum(), (query, rows, sigma), allow_unused=True, materialize_grads=True
        )

    for got, want in zip(gradients(backend), gradients("reference"), strict=True):
        assert float((got - want).norm()) <= 1e-10 * max(1.0, float(want.norm()))


def test_second_derivatives_come_from_the_reference_only(backend):
    rows = _rows(6, 3).requires_grad_()
    vectors = torch.ones(6, 1)
    for name in ("reference", backend):
        args = (torch.tensor(2.0), ALPHAS, None, "gaussian", name)
        out = kernel_apply(rows, rows.detach(), vectors, *args)
        (gradient,) = torch.autograd.grad(out.sum(), rows, create_graph=True)
        if name == "reference":
            gradient.square().sum().backward()
        else:
            with pytest.raises(RuntimeError, match="once_differentiable"):
                gradient.square().sum().backward()


def test_half_inputs_and_gradient_dtypes(backend):
    query, rows = _rows(20, 4, seed=1).half().requires_grad_(), _rows(30, 4).bfloat16()
    vectors = torch.randn(30, 1, dtype=torch.float16)
    args = (torch.tensor(4.0), ALPHAS, None, "gaussian")
    out = kernel_apply(query, rows, vectors, *args, backend)
    (gradient,) = torch.autograd.grad(out.sum(), query)
    exact = query.detach().double().requires_grad_()
    want = kernel_apply(exact, rows.double(), vectors.double(), *args, "reference")
    (want_gradient,) = torch.autograd.grad(want.sum(), exact)
    assert relative_error(out, want) < 2e-6
    assert gradient.dtype == torch.float16
    assert relative_error(gradient, want_gradient) < 2e-3
