"""Registered ops of MK-MMD and the autograd function around them.

``padkern::mkmmd_value`` and ``padkern::mkmmd_value_grad`` are functional and know nothing of
autograd. The second gives value and derivatives in one pass; backward only scales them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from padkern.ops.mkmmd.reference import compute_dtype

# alphas_tensor stands for alphas when it is given (alphas is empty then). per_kernel asks for the
# derivatives by alphas and betas; without it their outputs are empty.
_ARGUMENTS = (
    "(Tensor source, Tensor target, Tensor? sigma_sq, Tensor? source_weight, "
    "Tensor? target_weight, Tensor? alphas_tensor, Tensor? betas, float[] alphas, str kernel, "
    "str estimator, str precision, str backend{})"
)
define("padkern::mkmmd_value", _ARGUMENTS.format("") + " -> Tensor")
define(
    "padkern::mkmmd_value_grad",
    _ARGUMENTS.format(", bool per_kernel") + " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@cache
def _launchers(backend: str) -> tuple[Callable[..., Tensor], Callable[..., Sequence[Any]]]:
    """The (value, value_grad) launchers of one backend, with the schema's arguments up to
    ``precision``, then ``per_kernel`` for the second. Derivatives by alphas and betas that are not
    wanted may be None."""
    if backend == "native":
        from padkern.ops.mkmmd import native

        return native.mkmmd_value_native, native.mkmmd_value_grad_native
    if backend == "triton":
        from padkern.ops.mkmmd import triton_impl

        return triton_impl.mkmmd_value_triton, triton_impl.mkmmd_value_grad_triton
    if backend == "cuda":
        from padkern.ops.mkmmd import cuda_impl

        return cuda_impl.mkmmd_value_cuda, cuda_impl.mkmmd_value_grad_cuda
    raise ValueError(f"backend must be native, triton or cuda, got {backend!r}")


def _value(*args: Any) -> Tensor:
    return _launchers(args[11])[0](*args[:11])


def _value_grad(*args: Any) -> tuple[Tensor, ...]:
    value, d_source, d_target, *derivatives = _launchers(args[11])[1](*args[:11], args[12])
    derivatives = [d_source.contiguous(), d_target.contiguous(), *derivatives]
    empty = {"dtype": torch.float64, "device": value.device}
    return value, *(torch.empty(0, **empty) if d is None else d for d in derivatives)


for _key in ("CPU", "CUDA"):
    impl("padkern::mkmmd_value", _key)(_value)
    impl("padkern::mkmmd_value_grad", _key)(_value_grad)


@register_fake("padkern::mkmmd_value")
def _value_fake(source: Tensor, target: Tensor, *_: Any) -> Tensor:
    return source.new_empty((), dtype=compute_dtype(source, target))


@register_fake("padkern::mkmmd_value_grad")
def _value_grad_fake(source: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
    dtype = compute_dtype(source, target)
    alphas_tensor, alphas, per_kernel = args[3], args[5], args[10]
    count = alphas_tensor.shape[0] if alphas_tensor is not None else len(alphas)
    kernels = count if per_kernel else 0
    return (
        source.new_empty((), dtype=dtype),
        source.new_empty(source.shape, dtype=dtype),
        target.new_empty(target.shape, dtype=dtype),
        source.new_empty((), dtype=torch.float64),
        source.new_empty((kernels,), dtype=torch.float64),
        source.new_empty((kernels,), dtype=torch.float64),
    )


_VALUE = torch.ops.padkern.mkmmd_value.default
_VALUE_GRAD = torch.ops.padkern.mkmmd_value_grad.default


class _ScaleFunction(torch.autograd.Function):
    """(saved * grad_value) in the dtype of ``sample``; its own derivative is refused.

    Takes ``sample`` only so that a second derivative meets an error here: the saved gradients carry
    no graph, and without this node they would count as constants.
    """

    @staticmethod
    def forward(saved: Tensor, grad_value: Tensor, sample: Tensor) -> Tensor:
        return _scale(saved, grad_value, sample)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        raise RuntimeError(
            "mkmmd_loss: the fused backends are once_differentiable; "
            "use backend='reference' for second derivatives"
        )


def _scale(saved: Tensor, grad_value: Tensor, sample: Tensor) -> Tensor:
    dtype = saved.dtype
    out = saved * (grad_value if grad_value.dtype == dtype else grad_value.to(dtype))
    if sample.dtype != dtype:
        out = out.to(sample.dtype)
    return out if out.shape == sample.shape else out.reshape(sample.shape)


# Position in the op's arguments of each one that may need a gradient.
_DIFFERENTIABLE = (0, 1, 2, 5, 6)


def _scaled(ctx: Any, grad_value: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """The saved derivatives times ``grad_value``, for each differentiable argument."""
    saved = ctx.saved_tensors
    # Grad mode is on here only under create_graph; a compiler refuses that by itself.
    second_order = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    scale = _ScaleFunction.apply if second_order else _scale
    return [
        scale(saved[k], grad_value, saved[5 + k]) if needed[k] else None
        for k in range(len(_DIFFERENTIABLE))
    ]


class _MkmmdFunction(torch.autograd.Function):
    """Saves the derivatives in the compute dtype; backward scales, then casts.

    Loss scaling makes grad_output 65536 a normal case: a half-precision gradient must be rounded
    after the scaling, not before.
    """

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _VALUE_GRAD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:], *(inputs[i] for i in _DIFFERENTIABLE))

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        needed = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
        gradients: list[Tensor | None] = [None] * 13
        for i, gradient in zip(_DIFFERENTIABLE, _scaled(ctx, grad_value, needed), strict=True):
            gradients[i] = gradient
        return tuple(gradients)


class _MkmmdEager(torch.autograd.Function):
    """:class:`_MkmmdFunction` for plain eager calls: the launcher without the dispatcher, few
    arguments, and the older form of the context. At a few rows this machinery costs more than the
    loss itself."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        target: Tensor,
        sigma_sq: Tensor | None,
        alphas_tensor: Tensor | None,
        betas: Tensor | None,
        rest: tuple[Any, ...],
    ) -> Tensor:
        source_weight, target_weight, alphas, kernel, estimator, precision, backend, per_kernel = (
            rest
        )
        value, d_source, d_target, d_sigma, d_alphas, d_betas = _launchers(backend)[1](
            source,
            target,
            sigma_sq,
            source_weight,
            target_weight,
            alphas_tensor,
            betas,
            alphas,
            kernel,
            estimator,
            precision,
            per_kernel,
        )
        ctx.save_for_backward(
            d_source,
            d_target,
            d_sigma,
            d_alphas,
            d_betas,
            source,
            target,
            sigma_sq,
            alphas_tensor,
            betas,
        )
        return value

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, grad_value, ctx.needs_input_grad), None)


def _is_plain(tensor: Tensor | None) -> bool:
    return tensor is None or type(tensor) is Tensor or type(tensor) is torch.nn.Parameter


def _wants_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def mkmmd_fused(
    source: Tensor,
    target: Tensor,
    sigma_sq: Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    alphas: Sequence[float] | Tensor,
    betas: Tensor | None,
    kernel: str,
    estimator: str,
    precision: str,
    backend: str,
) -> Tensor:
    """The loss through the registered ops; picks the value-only one when no gradient is wanted.

    A plain eager call with a gradient skips the dispatcher: nothing watches it then, no compiler,
    function transform, dispatch mode or tensor subclass.
    """
    alphas_tensor: Tensor | None = None
    numbers: Sequence[float] = ()
    if isinstance(alphas, Tensor):
        alphas_tensor = alphas
    else:
        numbers = alphas
    options = (numbers, kernel, estimator, precision, backend)
    if torch.is_grad_enabled():
        per_kernel = _wants_grad(alphas_tensor) or _wants_grad(betas)
        if per_kernel or source.requires_grad or target.requires_grad or _wants_grad(sigma_sq):
            if (
                not torch.compiler.is_compiling()
                and not torch._C._are_functorch_transforms_active()
                and torch._C._len_torch_dispatch_stack() == 0
                and _is_plain(source)
                and _is_plain(target)
                and _is_plain(sigma_sq)
                and _is_plain(alphas_tensor)
                and _is_plain(betas)
            ):
                rest = (source_weight, target_weight, *options, per_kernel)
                return _MkmmdEager.apply(source, target, sigma_sq, alphas_tensor, betas, rest)
            tensors = (source, target, sigma_sq, source_weight, target_weight)
            return _MkmmdFunction.apply(*tensors, alphas_tensor, betas, *options, per_kernel)[0]
    tensors = (source, target, sigma_sq, source_weight, target_weight)
    return _VALUE(*tensors, alphas_tensor, betas, *options)
