"""Every op under torch.compile(fullgraph=True): static, dynamic, in training and under autocast.

The cases come from the records in ``padkern.testing.records``; nothing here knows a particular op.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from padkern.testing.records import OP_SPECS

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh(request):
    if request.node.callspec.params.get("backend") == "native":
        request.getfixturevalue("native_core")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled():
    return [
        pytest.param(spec, backend, id=f"{spec.name}-{backend}" if backend else spec.name)
        for spec in OP_SPECS
        if spec.dynamic_shapes
        for backend in spec.implementations
    ]


def _step(spec, backend, case):
    """A function of the differentiable inputs, with torch code around the op, and its inputs."""

    def step(*tensors, rest):
        changed = {name: torch.tanh(t) for name, t in zip(case.wanted, tensors, strict=True)}
        return spec.call(case._replace(arguments=rest | changed), backend).sum() * 3

    rest = {name: value for name, value in case.arguments.items() if name not in case.wanted}
    leaves = [case.arguments[name].detach().clone().requires_grad_() for name in case.wanted]
    return step, leaves, rest


def _compare(step, compiled, leaves, rest):
    expected = step(*leaves, rest=rest)
    got = compiled(*leaves, rest=rest)
    torch.testing.assert_close(got, expected)
    pairs = zip(
        torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True
    )
    for gradient, want in pairs:
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize(("spec", "backend"), _compiled())
def test_fullgraph_with_inductor(spec, backend):
    case = spec.case(spec.dynamic_shapes[0])
    step, leaves, rest = _step(spec, backend, case)
    _compare(step, torch.compile(step, fullgraph=True), leaves, rest)


@pytest.mark.parametrize(("spec", "backend"), _compiled())
def test_every_option_compiles(spec, backend):
    shape = spec.dynamic_shapes[0]
    choices = [options for options in spec.options_at(shape) if options.compiles]
    if backend == "reference":
        choices = [options for options in choices if options.reference_compiles][::4]
    for options in choices:
        torch._dynamo.reset()
        step, leaves, rest = _step(spec, backend, spec.case(shape, options=options))
        _compare(step, torch.compile(step, fullgraph=True, backend="aot_eager"), leaves, rest)


@pytest.mark.parametrize(("spec", "backend"), _compiled())
def test_four_sizes_take_few_compilations(spec, backend):
    counter = CompileCounterWithBackend("aot_eager")
    step, _, _ = _step(spec, backend, spec.case(spec.dynamic_shapes[0]))
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    assert len(set(spec.dynamic_shapes)) == 4
    for shape in spec.dynamic_shapes:
        _, leaves, rest = _step(spec, backend, spec.case(shape))
        _compare(step, compiled, leaves, rest)
    few = spec.reference_compilations if backend == "reference" else spec.compilations
    assert counter.frame_count <= few


@pytest.mark.parametrize(("spec", "backend"), _compiled())
def test_a_compiled_training_step_trains_alike(spec, backend):
    case = spec.case(spec.dynamic_shapes[0])
    first = case.arguments[case.wanted[0]]

    def train(compile_it):
        torch._dynamo.reset()
        torch.manual_seed(0)
        layer = nn.Linear(first.shape[-1], first.shape[-1])
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

        def forward(sample):
            arguments = case.arguments | {case.wanted[0]: layer(sample)}
            return spec.call(case._replace(arguments=arguments), backend)

        run = torch.compile(forward, fullgraph=True, backend="aot_eager") if compile_it else forward
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = run(first).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses), layer.weight.detach()

    for got, want in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(got, want)
    assert train(False)[0][2] < train(False)[0][0]


@pytest.mark.parametrize(("spec", "backend"), _compiled())
def test_compiled_under_autocast(spec, backend):
    step, leaves, rest = _step(spec, backend, spec.case(spec.dynamic_shapes[0]))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _compare(step, compiled, leaves, rest)
