"""Every op under torch's transformations, in several processes and threads, and without aten.

The cases come from the records in ``padkern.testing.records``; nothing here knows a particular op.
"""

from __future__ import annotations

import copy
import os
import pickle
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from padkern.testing import run, value_error
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


def _leaves(spec, case):
    leaves = {name: case.arguments[name].detach().clone() for name in case.wanted}
    for leaf in leaves.values():
        leaf.requires_grad_()
    return leaves, case._replace(arguments=case.arguments | leaves)


# ---- torch's transformations ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("spec", "backend"), _implementations())
def test_autocast_changes_no_bit(spec, backend, dtype):
    results = []
    for enabled in (False, True):
        leaves, case = _leaves(spec, spec.case(spec.shapes["primes"]))
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            value = spec.call(case, backend)
        gradients = torch.autograd.grad(value.sum(), list(leaves.values())) if leaves else ()
        results.append((value, *gradients))
    for outside, inside in zip(*results, strict=True):
        assert inside.dtype == outside.dtype
        assert torch.equal(inside, outside)


@pytest.mark.parametrize(("spec", "backend"), _implementations(DIFFERENTIABLE))
def test_torch_func_grad(spec, backend):
    for options in spec.options_at(spec.check_shape):
        case = spec.case(spec.check_shape, torch.float64, options=options)
        want = run(spec, case, backend)

        def loss(tensors, case=case):
            value = spec.call(case._replace(arguments=case.arguments | tensors), backend)
            return value if value.dim() == 0 else (value * weights_of(value)).sum()

        got = torch.func.grad(loss)({name: case.arguments[name] for name in case.wanted})
        for name, gradient in want.gradients.items():
            torch.testing.assert_close(got[name], gradient)


@pytest.mark.parametrize("order", ["value", "gradient"])
@pytest.mark.parametrize(("spec", "backend"), _implementations(DIFFERENTIABLE))
def test_vmap_works_or_says_no(spec, backend, order):
    cases = [spec.case(spec.check_shape, torch.float64, seed=seed) for seed in (0, 1)]
    name = spec.differentiable[0]
    stacked = torch.stack([case.arguments[name] for case in cases])

    def loss(sample):
        arguments = cases[0].arguments | {name: sample}
        return spec.call(cases[0]._replace(arguments=arguments), backend).sum()

    function = loss if order == "value" else torch.func.grad(loss)
    want = torch.stack([function(sample) for sample in stacked])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch loops over the batch and says so
        try:
            got = torch.func.vmap(function)(stacked)
        except RuntimeError as error:
            refusal = str(error)
        else:
            torch.testing.assert_close(got, want)
            return
    assert "vmap" in refusal


@pytest.mark.parametrize(("spec", "backend"), _implementations(DIFFERENTIABLE))
def test_hooks_see_every_gradient(spec, backend):
    leaves, case = _leaves(spec, spec.case(spec.check_shape))
    seen = {}
    for name, leaf in leaves.items():
        leaf.register_hook(lambda gradient, name=name: seen.setdefault(name, gradient.clone()))
    spec.call(case, backend).sum().backward()
    assert seen.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert torch.equal(seen[name], leaf.grad)


@pytest.mark.parametrize(
    ("spec", "make"),
    [
        pytest.param(spec, make, id=f"{spec.name}{number}")
        for spec in OP_SPECS
        for number, make in enumerate(spec.modules)
    ],
)
def test_modules_can_be_copied_and_pickled(spec, make):
    module = make()
    shape = next(s for s in spec.shapes.values() if s[0] == s[1] and s[0] > 2)
    inputs = list(spec.make_inputs(shape, torch.float32, 0).values())
    want = module(*inputs)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(*inputs), want)
        assert repr(other) == repr(module)


# ---- processes and threads -----------------------------------------------------------------------


def _bytes(result):
    # Not torch.equal: torch's own pool must not be used after a fork.
    return [t.numpy().tobytes() for t in (result.value, *result.gradients.values())]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("spec", NATIVE, ids=_name)
def test_a_fork_after_parallel_work_computes_the_same(spec, native_core, restore_threads):
    torch.set_num_threads(2)
    case = spec.case(spec.parallel_shapes[0])
    want = run(spec, case, "native")
    child = os.fork()
    if child == 0:  # no exception and no test machinery may leave the child
        try:
            torch.set_num_threads(1)  # as in a worker of torch's DataLoader: its pool is gone too
            same = _bytes(run(spec, case, "native")) == _bytes(want)
            os._exit(0 if same else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("spec", "backend"), _implementations())
def test_eight_python_threads_at_once(spec, backend, restore_threads):
    torch.set_num_threads(2)
    shape = spec.parallel_shapes[0] if backend == "native" else spec.shapes["primes"]
    cases = [spec.case(shape, seed=seed) for seed in range(4)]
    want = [run(spec, case, backend) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda k: run(spec, cases[k % 4], backend), range(24)))
    for number, got in enumerate(results):
        expected = want[number % 4]
        if backend == "native":
            assert torch.equal(got.value, expected.value)
            for name, gradient in expected.gradients.items():
                assert torch.equal(got.gradients[name], gradient)
        else:
            assert value_error(got, expected._replace(value=expected.value.double())) <= 1e-5


# ---- nothing but our own code in the forward pass ------------------------------------------------

ALLOCATION = {"empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like"}
VIEWS = {"alias", "as_strided", "detach", "expand", "lift_fresh", "view", "_reshape_alias"}
# Of a tensor of real numbers these return it as it is; reading a small tensor's numbers calls them.
VIEWS |= {"resolve_conj", "resolve_neg", "_local_scalar_dense"}
SCALING = {"mul", "_to_copy", "ones_like", "sum"}


class _Recorder(TorchDispatchMode):
    """Names of the ops that run, also inside the registered ops of padkern."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, name = function._schema.name.split("::")
        if space != "padkern":
            self.names.append(name)
            return function(*args, **(kwargs or {}))
        with self:
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
            return function.redispatch(keys, *args, **(kwargs or {}))


def _compute_of(names, allowed):
    return sorted(set(names) - ALLOCATION - VIEWS - allowed)


def _native_cases(dtype):
    spec = next(spec for spec in OP_SPECS if spec.name == "mkmmd")
    for options in spec.options_at(spec.check_shape):
        case = spec.case(spec.check_shape, dtype, options=options)
        # The median comes from the distance matrix, as documented.
        if case.arguments.get("sigma_sq") != "median":
            yield spec, case


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@DTYPES
def test_the_registered_ops_compute_nothing_with_aten(dtype, native_core):
    """Forward: allocation and views. Backward: scaling and casting."""
    for spec, case in _native_cases(dtype):
        with _Recorder() as value:
            spec.call(case, "native")
        leaves, case = _leaves(spec, case)
        with _Recorder() as forward:
            loss = spec.call(case, "native")
        with _Recorder() as backward:
            loss.backward()
        assert "empty" in forward.names  # it does look inside the registered op
        assert not _compute_of(value.names, set()), case.text
        assert not _compute_of(forward.names, set()), case.text
        assert not _compute_of(backward.names, SCALING), case.text
        assert all(leaf.grad is not None for leaf in leaves.values())


def _profiled(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function()
    names = [event.key for event in profile.key_averages()]
    return result, {name.removeprefix("aten::") for name in names if name.startswith("aten::")}


@DTYPES
def test_the_eager_path_computes_nothing_with_aten(dtype, native_core):
    """The same without a dispatch mode, under which the op may take a shorter way."""
    names = set()
    for spec, case in _native_cases(dtype):
        leaves, case = _leaves(spec, case)
        loss, forward = _profiled(lambda case=case, spec=spec: spec.call(case, "native"))
        # A number becomes a tensor through detach_ and to, which only copies together with copy_.
        assert not _compute_of(forward, {"detach_", "to"}), case.text
        _, backward = _profiled(loss.backward)
        # What ones_like, the cast and the accumulation of a gradient are made of.
        parts = {"fill_", "to", "copy_", "reshape", "_unsafe_view"}
        assert not _compute_of(backward, SCALING | parts), case.text
        assert all(leaf.grad is not None for leaf in leaves.values())
        names |= backward
    assert "mul" in names
