"""One record per op, from which the case matrix of every op is generated.

A record (:class:`OpSpec`) says how to make inputs, what the right answer is, how far an
implementation may be from it, and what must be refused. The generic tests know nothing else about
an op. Records are in ``padkern.testing.records``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from padkern.testing.layouts import LAYOUTS, lay_out
from padkern.testing.mkmmd import Tolerance

Shape = tuple[int, ...]
Arguments = dict[str, Any]


class Options(NamedTuple):
    """One choice of the arguments that are not inputs.

    Attributes:
        name: Identifies the choice in test output.
        make: Given the inputs, the keyword arguments (tensors among them).
        fits: Whether the choice is allowed at a shape.
        compiles: Whether torch.compile(fullgraph=True) is promised.
        reference_compiles: Whether it is for the reference backend too.
    """

    name: str
    make: Callable[[Arguments], Arguments] = lambda inputs: {}
    fits: Callable[[Shape], bool] = lambda shape: True
    compiles: bool = True
    reference_compiles: bool = True


class ErrorCase(NamedTuple):
    """Arguments that must be refused.

    Attributes:
        name: Identifies the case in test output.
        change: Keyword arguments put in place of those of a good call; the message must hold the
            name of one of them.
        error: Exception type.
        match: Regular expression that the message must contain.
    """

    name: str
    change: Mapping[str, Any]
    error: type[Exception]
    match: str


class Case(NamedTuple):
    """Arguments of one call, and the names of the tensors to differentiate by."""

    arguments: Arguments
    wanted: tuple[str, ...]
    text: str


class RawOp(NamedTuple):
    """A registered op, its positional arguments for a case and a backend, and its dtypes."""

    op: Any
    arguments: Callable[[Case, str], tuple[Any, ...]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)


class Result(NamedTuple):
    """Value of a call and the gradients by its tensors, by name."""

    value: Tensor
    gradients: dict[str, Tensor]


def _one(arguments: Arguments) -> float:
    return 1.0


@dataclass(frozen=True)
class OpSpec:
    """What the generic tests need to know of one op.

    Attributes:
        name: Name of the op.
        public: The public function; called with keyword arguments, and ``backend=`` where there is
            a choice.
        reference: The specification; takes the same keyword arguments but ``backend``.
        make_inputs: Given a shape, a dtype and a seed, the input tensors by argument name.
        shapes: Shape classes by name; what the numbers mean is the record's own affair.
        heavy: Names of those that meet fewer layouts and options, to spare time.
        shape_text: Names of those numbers, for example "n, m, D".
        dtypes: Dtypes of the floating inputs.
        options: Choices of the other arguments; the first is the default one.
        tolerances: Per compute dtype. A value may be off by ``loss * scale(arguments)``, or that
            times the value where it is above 1.
        differentiable: Arguments that may require a gradient.
        backends: Names to pass as ``backend=``; empty where there is one implementation only.
        fixed: Inputs whose values constrain each other: the layout "expanded" passes over them.
        raw_ops: The registered ops under the native backend.
        errors: What must be refused, relative to a good call at ``error_shape``.
        eager: The same mathematics in plain torch in the dtype of the inputs, which half inputs
            must not be worse than; None where nobody would write that.
        scale: Size of the numbers that the value is a difference of.
        gradient_sizes: Norms of the terms that a gradient is a sum of, where these may cancel; the
            error of a gradient of smaller norm is compared with them. None: with its own norm.
        deciding: Inputs that make the compute dtype float64; all floating ones when empty.
        smooth: Changes arguments so that the value is a differentiable function of every tensor:
            no detached statistic, no kink. None where it is one already.
        parallel_shapes: Shapes large enough to be cut over threads.
        dynamic_shapes: Four shapes to compile for; empty where torch.compile is not promised.
        compilations: At most so many for these four: a static one and a dynamic one.
        reference_compilations: The same for the reference backend, where that needs more.
        check_shape, error_shape: Shapes for finite differences and for error cases.
        random_most: Largest sizes of random shapes; 40 each where empty.
        far_shape: A shape of more than one block whose rows are then spread over the memory.
        modules: Makers of modules over the op, to be copied and pickled.
        second_order: Backends that have second derivatives.
    """

    name: str
    public: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    make_inputs: Callable[[Shape, torch.dtype, int], Arguments]
    shapes: Mapping[str, Shape]
    shape_text: str
    dtypes: tuple[torch.dtype, ...]
    options: tuple[Options, ...]
    tolerances: Mapping[torch.dtype, Tolerance]
    differentiable: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    fixed: frozenset[str] = frozenset()
    raw_ops: tuple[RawOp, ...] = ()
    errors: tuple[ErrorCase, ...] = ()
    eager: Callable[..., Tensor] | None = None
    heavy: frozenset[str] = frozenset()
    scale: Callable[[Arguments], float] = _one
    gradient_sizes: Callable[[Arguments], dict[str, float]] | None = None
    deciding: tuple[str, ...] = ()
    smooth: Callable[[Arguments], Arguments] | None = None
    parallel_shapes: tuple[Shape, ...] = ()
    dynamic_shapes: tuple[Shape, ...] = ()
    compilations: int = 2
    reference_compilations: int = 2
    check_shape: Shape = ()
    error_shape: Shape = ()
    random_most: Shape = ()
    far_shape: Shape = ()
    modules: tuple[Callable[[], torch.nn.Module], ...] = ()
    second_order: tuple[str | None, ...] = ("reference",)

    def case(
        self,
        shape: Shape,
        dtype: torch.dtype = torch.float32,
        layout: str = LAYOUTS[0],
        options: Options | None = None,
        *,
        seed: int = 0,
        device: str = "cpu",
    ) -> Case:
        """The arguments of one cell of the matrix. All tensors but scalars take the layout."""
        options = self.options[0] if options is None else options
        inputs = self.make_inputs(shape, dtype, seed)
        arguments = {
            name: self._place(name, value, layout, device)
            for name, value in (inputs | options.make(inputs)).items()
        }
        text = f"{self.name}{list(shape)} {dtype} {layout} {options.name} {seed=}"
        return Case(arguments, self.wanted(arguments), text)

    def smooth_case(self, shape: Shape, options: Options) -> Case:
        """A float64 case that finite differences can be compared with."""
        case = self.case(shape, torch.float64, options=options)
        arguments = {
            name: value.double()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in case.arguments.items()
        }
        if self.smooth is not None:
            arguments = self.smooth(arguments)
        return case._replace(arguments=arguments, wanted=self.wanted(arguments))

    def wanted(self, arguments: Arguments) -> tuple[str, ...]:
        """The arguments to differentiate by: those that may be, and are floating tensors."""
        return tuple(
            name
            for name in self.differentiable
            if isinstance(arguments.get(name), Tensor) and arguments[name].is_floating_point()
        )

    def _place(self, name: str, value: Any, layout: str, device: str) -> Any:
        if not isinstance(value, Tensor):
            return value
        if layout == "expanded" and name in self.fixed:
            return value.to(device)
        return lay_out(value.to(device), layout)

    def options_at(self, shape: Shape) -> tuple[Options, ...]:
        """The options that are allowed at a shape."""
        return tuple(options for options in self.options if options.fits(shape))

    def call(self, case: Case, backend: str | None) -> Tensor:
        """The public function on the case's arguments."""
        choice = {} if backend is None else {"backend": backend}
        return self.public(**case.arguments, **choice)

    @property
    def implementations(self) -> tuple[str | None, ...]:
        """What to test against the reference: each backend, or the one implementation."""
        return self.backends or (None,)


def weights_of(value: Tensor) -> Tensor:
    """What the numbers of a value are multiplied with before they are summed to differentiate."""
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    return weights.to(value.device)


def _differentiate(function: Callable[..., Tensor], case: Case) -> Result:
    leaves = {name: case.arguments[name].detach().requires_grad_() for name in case.wanted}
    value = function(**(case.arguments | leaves))
    if not leaves:
        return Result(value, {})
    # Several numbers are summed with weights of their own, so that none can stand in for another.
    total = value if value.dim() == 0 else (value * weights_of(value)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return Result(value.detach(), dict(zip(leaves, gradients, strict=True)))


def run(spec: OpSpec, case: Case, backend: str | None) -> Result:
    """Value and gradients of the public function, on fresh leaves of the same layouts."""
    choice = {} if backend is None else {"backend": backend}
    return _differentiate(lambda **arguments: spec.public(**arguments, **choice), case)


def run_eager(spec: OpSpec, case: Case) -> Result:
    """Value and gradients of ``spec.eager``, every step in the dtype of the inputs."""
    assert spec.eager is not None
    return _differentiate(spec.eager, case)


def exact(spec: OpSpec, case: Case) -> Result:
    """Value and gradients of the reference in float64 on the same (rounded) values, on the CPU."""

    def widen(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.cpu().double() if value.is_floating_point() else value.cpu()

    arguments = {name: widen(value) for name, value in case.arguments.items()}
    return _differentiate(spec.reference, case._replace(arguments=arguments))


def value_error(got: Result, want: Result) -> float:
    """Largest absolute error of the value; NaN where either has one."""
    value = got.value.detach().cpu().double()
    # Equal infinities have no difference to speak of.
    difference = torch.where(value == want.value, 0.0, (value - want.value).abs())
    return float(difference.max()) if difference.numel() else 0.0


def compute_dtype(spec: OpSpec, case: Case) -> torch.dtype:
    """float64 if an input that decides is float64, else float32."""
    tensors = [case.arguments[name] for name in spec.deciding or spec.differentiable]
    double = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def assert_matches(spec: OpSpec, case: Case, got: Result, want: Result) -> None:
    """Compares a result with :func:`exact` within the record's tolerance.

    Raises:
        AssertionError: A dtype or a shape is not as promised, or an error exceeds the tolerance of
            the compute dtype, or is NaN.
    """
    dtype = compute_dtype(spec, case)
    tolerance, scale = spec.tolerances[dtype], spec.scale(case.arguments)
    assert got.value.shape == want.value.shape, f"{case.text}: shape {list(got.value.shape)}"
    size = float(want.value.abs().nan_to_num(0, 0, 0).max()) if want.value.numel() else 0.0
    error, limit = value_error(got, want), tolerance.loss * max(scale, size)
    assert error <= limit, f"{case.text}: value is off by {error:.3g} > {limit:.3g}"
    sizes = {} if spec.gradient_sizes is None else spec.gradient_sizes(case.arguments)
    for name, expected in want.gradients.items():
        sample, gradient = case.arguments[name], got.gradients[name]
        about = f"{case.text}: gradient by {name}"
        assert gradient.dtype == sample.dtype, f"{about} has dtype {gradient.dtype}"
        assert gradient.shape == sample.shape, f"{about} has shape {list(gradient.shape)}"
        norm = float(expected.norm())
        error = float((gradient.cpu().double() - expected).norm())
        relative, rounding = tolerance.gradient, 0.0
        if sample.dtype != dtype:
            relative += torch.finfo(sample.dtype).eps
            # Below the normal numbers a rounding error is absolute.
            rounding = torch.finfo(sample.dtype).smallest_normal * torch.finfo(sample.dtype).eps
        limit = relative * max(norm, sizes.get(name, 0.0))
        limit += rounding * math.sqrt(expected.numel())
        if norm < 1e-12:
            # A gradient of zero norm has no relative error; rounding noise is all there can be.
            limit = 1e-6
        assert error <= limit, f"{about} of norm {norm:.3g} is off by {error:.3g} > {limit:.3g}"
