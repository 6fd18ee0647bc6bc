"""What every op promises beyond numbers: schemas, derivatives, errors, NaN, autocast, threads.

The cases come from the records in ``padkern.testing.records``; nothing here knows a particular op.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._pytree import tree_map

from padkern.testing import LAYOUTS, assert_matches, exact, relative_error, run
from padkern.testing.opspec import weights_of
from padkern.testing.records import OP_SPECS

NATIVE = [spec for spec in OP_SPECS if "native" in spec.backends]
DIFFERENTIABLE = [spec for spec in OP_SPECS if spec.differentiable]


def _name(spec):
    return spec.name


def _implementations(specs=OP_SPECS):
    return [
        pytest.param(spec, backend, id=f"{spec.name}-{backend}" if backend else spec.name)
        for spec in specs
        for backend in spec.implementations
    ]


@pytest.fixture(autouse=True)
def _backend_ready(request):
    """Skips with the reason where the test's backend cannot run."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == "native":
        request.getfixturevalue("native_core")


# ---- registered ops ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", NATIVE, ids=_name)
def test_raw_ops_keep_their_schema(spec, layout, native_core):
    """opcheck without gradients: autograd lives outside the ops."""
    place = LAYOUTS.index(layout)
    choices = spec.options_at(spec.check_shape)
    for number, raw in enumerate(spec.raw_ops):
        options = choices[(5 * place + 3 * number) % len(choices)]
        dtype = raw.dtypes[(place + number) % len(raw.dtypes)]
        arguments = raw.arguments(spec.case(spec.check_shape, dtype, layout, options), "native")
        opcheck(raw.op, arguments)


@pytest.mark.parametrize("spec", NATIVE, ids=_name)
def test_fakes_give_the_strides_of_the_real_outputs(spec, native_core):
    for layout, options in zip(LAYOUTS, spec.options_at(spec.check_shape), strict=False):
        case = spec.case(spec.check_shape, layout=layout, options=options)
        for raw in spec.raw_ops:
            arguments = raw.arguments(case, "native")
            with FakeTensorMode() as mode:
                fakes = tree_map(
                    lambda a, mode=mode: mode.from_tensor(a) if isinstance(a, torch.Tensor) else a,
                    arguments,
                )
                promised = raw.op(*fakes)
            given = raw.op(*arguments)
            single = isinstance(given, torch.Tensor)
            pairs = [(promised, given)] if single else zip(promised, given, strict=True)
            for fake, real in pairs:
                assert fake.shape == real.shape, case.text
                assert fake.dtype == real.dtype, case.text
                assert fake.stride() == real.stride(), case.text


# ---- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "backend"), _implementations(DIFFERENTIABLE))
def test_gradcheck(spec, backend):
    for options in spec.options_at(spec.check_shape):
        case = spec.smooth_case(spec.check_shape, options)
        leaves = [case.arguments[name].clone().requires_grad_() for name in case.wanted]

        def loss(*tensors, case=case):
            given = dict(zip(case.wanted, tensors, strict=True))
            return spec.call(case._replace(arguments=case.arguments | given), backend)

        assert torch.autograd.gradcheck(loss, leaves), case.text


@pytest.mark.parametrize(("spec", "backend"), _implementations(DIFFERENTIABLE))
def test_fast_gradcheck_at_a_middle_size(spec, backend):
    shape = spec.shapes["primes"]
    for options in spec.options_at(shape)[::4]:
        case = spec.smooth_case(shape, options)
        leaves = [case.arguments[name].clone().requires_grad_() for name in case.wanted]

        def loss(*tensors, case=case):
            given = dict(zip(case.wanted, tensors, strict=True))
            return spec.call(case._replace(arguments=case.arguments | given), backend)

        assert torch.autograd.gradcheck(loss, leaves, fast_mode=True, atol=1e-4), case.text


def _leaves(spec, case, double=False):
    leaves = {name: case.arguments[name].detach().clone() for name in case.wanted}
    leaves = {name: leaf.double() if double else leaf for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    return leaves, case._replace(arguments=case.arguments | leaves)


@pytest.mark.parametrize(("spec", "backend"), _implementations(DIFFERENTIABLE))
def test_grad_output_of_any_layout(spec, backend):
    """Broadcast, strided, of another dtype: the result is that of the plain number."""
    leaves, case = _leaves(spec, spec.case(spec.check_shape))
    inputs = list(leaves.values())
    value = spec.call(case, backend)
    size = value.shape
    plain = torch.autograd.grad(value.sum(), inputs, retain_graph=True)
    expected = torch.autograd.grad(value, inputs, torch.full(size, 3.0), retain_graph=True)
    for g, e in zip(expected, plain, strict=True):
        torch.testing.assert_close(g, 3 * e)
    strided = torch.stack([torch.full(size, 3.0), torch.full(size, 7.0)], -1)
    for grad_output in (torch.tensor([3.0]).expand(*size, 4)[..., 2], strided[..., 0]):
        assert grad_output.shape == size
        got = torch.autograd.grad(value, inputs, grad_output, retain_graph=True)
        for g, e in zip(got, expected, strict=True):
            assert torch.equal(g, e)
    stretched = torch.autograd.grad(value.expand(3, 2, *size).transpose(0, 1).sum() / 2, inputs)
    for g, e in zip(stretched, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize(("spec", "backend"), _implementations(DIFFERENTIABLE))
def test_second_derivatives_are_right_or_refused(spec, backend):
    if backend in spec.second_order:
        for options in spec.options_at(spec.check_shape)[::3]:
            case = spec.smooth_case(spec.check_shape, options)
            leaves = [case.arguments[name].clone().requires_grad_() for name in case.wanted]

            def loss(*tensors, case=case):
                given = dict(zip(case.wanted, tensors, strict=True))
                return spec.call(case._replace(arguments=case.arguments | given), backend)

            assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True), case.text
        return
    leaves, case = _leaves(spec, spec.case(spec.check_shape), double=True)
    value = spec.call(case, backend)
    # The gradient that comes in depends on the inputs, or is a constant.
    for total in (value.square().sum(), value.sum()):
        for name, leaf in leaves.items():
            (gradient,) = torch.autograd.grad(total, leaf, create_graph=True, retain_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                gradient.square().sum().backward(retain_graph=True)
            assert leaf.grad is None, name


@pytest.mark.parametrize(("spec", "backend"), _implementations(DIFFERENTIABLE))
def test_loss_scaling_with_mixed_half_inputs(spec, backend):
    """The first input float16, the others float32, grad_output 65536."""
    # Many rows: unscaled, their float16 gradients would be subnormal and lose digits.
    shape = max(spec.parallel_shapes or spec.shapes.values(), key=math.prod)
    case = spec.case(shape)
    first = spec.differentiable[0]
    case.arguments[first] = case.arguments[first].half()
    want = exact(spec, case)
    leaves, case = _leaves(spec, case)
    value = spec.call(case, backend)
    # The numbers of a matrix enter a loss as their mean; gradients of their sum overflow float16.
    share = 65536.0 / (value.numel() if value.dim() > 1 else 1)
    scale = share * (weights_of(value) if value.dim() else torch.ones(()))
    gradients = torch.autograd.grad(value, list(leaves.values()), scale)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        limit = 1e-5 + (5e-4 if leaf.dtype == torch.float16 else 0.0)
        assert relative_error(gradient.double() / share, want.gradients[name]) <= limit, name


# ---- bad input -----------------------------------------------------------------------------------


def _error_cases():
    for spec in OP_SPECS:
        for backend in spec.implementations:
            for error in spec.errors:
                name = "-".join(filter(None, (spec.name, backend, error.name)))
                yield pytest.param(spec, backend, error, id=name)


@pytest.mark.parametrize(("spec", "backend", "error"), list(_error_cases()))
def test_bad_input_is_named(spec, backend, error):
    good = spec.case(spec.error_shape)
    choice = {} if backend is None else {"backend": backend}
    with pytest.raises(error.error, match=error.match) as caught:
        spec.public(**(good.arguments | choice | dict(error.change)))
    message = str(caught.value)
    assert any(name in message for name in error.change), message
    assert "\n" not in message


@pytest.mark.parametrize(("spec", "backend"), _implementations())
def test_the_call_that_the_errors_change_is_good(spec, backend):
    assert not torch.isnan(spec.call(spec.case(spec.error_shape), backend)).any()


# ---- values that are no ordinary numbers ---------------------------------------------------------

VALUES = {
    "nan": float("nan"),
    "inf": float("inf"),
    "minus_inf": -float("inf"),
    "denormal": 1e-40,
    "max": torch.finfo(torch.float32).max,
}


def _finite(result):
    tensors = {"value": result.value} | result.gradients
    return {name: bool(torch.isfinite(tensor).all()) for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize(("spec", "backend"), _implementations())
def test_numbers_at_the_edge(spec, backend, kind):
    """NaN and Inf where the reference has them; a result that is finite is right."""
    if kind == "max" and not spec.differentiable:
        pytest.skip("a rank has no tolerance: sums beyond the largest number tie")
    shape = spec.shapes["odd"]
    seen, floating = 0, 0
    for name, sample in spec.case(shape).arguments.items():
        if not (isinstance(sample, torch.Tensor) and sample.is_floating_point()):
            continue
        floating += 1
        for place in (0, sample.numel() // 3, sample.numel() // 2, sample.numel() - 1):
            case = spec.case(shape)
            case.arguments[name].view(-1)[place] = VALUES[kind]
            want, got = exact(spec, case), run(spec, case, backend)
            text = f"{case.text}: {kind} in {name} at {place}"
            found, wanted = _finite(got), _finite(want)
            if all(wanted.values()) and all(found.values()):
                assert_matches(spec, case, got, want)
            elif kind != "max":
                assert found == wanted, text
            else:  # float32 overflows where the float64 reference need not
                assert not any(found[key] and not wanted[key] for key in found), text
            seen += 1
    assert seen == 4 * floating > 0


@pytest.mark.parametrize(("spec", "backend"), _implementations(DIFFERENTIABLE))
def test_subnormal_halves_keep_their_digits(spec, backend):
    case = spec.case(spec.shapes["odd"], torch.float16)
    for name in case.wanted:
        case.arguments[name] *= 2.0**-14
        assert (case.arguments[name].abs() < torch.finfo(torch.float16).smallest_normal).any()
    assert_matches(spec, case, run(spec, case, backend), exact(spec, case))
