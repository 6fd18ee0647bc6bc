"""Public dropout-add-normalise, its registered ops and the autograd function around them.

``padkern::dropout_add_norm`` and ``padkern::dropout_add_norm_grad`` are functional and know nothing
of autograd. Empty tensors stand for outputs that nobody asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from padkern import _backends
from padkern.ops.dropout_add_norm.reference import dropout_add_norm_ref, keyed_dropout_ref
from padkern.ops.first_order import once_differentiable
from padkern.ops.keyed_dropout import check_dropout

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_RULE = "float dropout, SymInt seed, SymInt step"
define(
    "padkern::dropout_add_norm",
    "(Tensor x, Tensor? residual, Tensor? bias, Tensor? weight, Tensor? shift, Tensor? token_ids, "
    "float eps, " + _RULE + ", bool keep) -> (Tensor, Tensor, Tensor)",
)
define(
    "padkern::dropout_add_norm_grad",
    "(Tensor? d_out, Tensor? d_sum, Tensor total, Tensor stats, Tensor? weight, Tensor? token_ids, "
    + _RULE
    + ", bool with_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@impl("padkern::dropout_add_norm", "CPU")
def _value_cpu(*args: Any) -> tuple[Tensor, ...]:
    from padkern.ops.dropout_add_norm.native import dropout_add_norm_native

    return dropout_add_norm_native(*args)


@impl("padkern::dropout_add_norm_grad", "CPU")
def _grad_cpu(*args: Any) -> tuple[Tensor, ...]:
    from padkern.ops.dropout_add_norm.native import dropout_add_norm_grad_native

    return dropout_add_norm_grad_native(*args)


@register_fake("padkern::dropout_add_norm")
def _value_fake(
    x: Tensor, residual: Tensor | None, bias: Tensor | None, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    keep, norms = rest[-1], weight is not None
    rows = x.shape[0]
    return (
        x.new_empty(x.shape if norms else (0,)),
        x.new_empty(x.shape if keep or not norms else (0,)),
        x.new_empty((rows, 2) if keep and norms else (0,)),
    )


@register_fake("padkern::dropout_add_norm_grad")
def _grad_fake(
    d_out: Tensor | None,
    d_sum: Tensor | None,
    total: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dropout, with_bias = rest[1], rest[-1]
    dim = total.shape[1]
    vector = (0,) if weight is None else (dim,)
    return (
        total.new_empty(total.shape if dropout else (0,)),
        total.new_empty(total.shape),
        total.new_empty((dim,) if with_bias else (0,)),
        total.new_empty(vector),
        total.new_empty(vector),
    )


_VALUE = torch.ops.padkern.dropout_add_norm.default
_GRAD = torch.ops.padkern.dropout_add_norm_grad.default


class _DropoutAddNormFunction(torch.autograd.Function):
    """Gives (out, sum); without ``return_sum`` the sum has no gradient of its own."""

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor | None,
        bias: Tensor | None,
        weight: Tensor | None,
        shift: Tensor | None,
        token_ids: Tensor | None,
        eps: float,
        dropout: float,
        seed: int,
        step: int,
        return_sum: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rule = (token_ids, eps, dropout, seed, step)
        return _VALUE(x, residual, bias, weight, shift, *rule, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, bias, weight, _, token_ids = inputs[:6]
        out, total, stats = output
        silent = [stats]
        if weight is None:
            silent.append(out)
        elif not inputs[10]:
            silent.append(total)
        ctx.mark_non_differentiable(*silent)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, stats, weight, token_ids)
        ctx.rule, ctx.with_bias = inputs[7:10], bias is not None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_out: Tensor | None, d_sum: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        if d_out is None and d_sum is None:
            return (None,) * 11
        total, stats, weight, token_ids = ctx.saved_tensors
        if weight is None:
            d_out = None  # a compiler hands over zeros for the output that is not there
        rule = (token_ids, *ctx.rule)
        d_x, d_residual, *vectors = _GRAD(d_out, d_sum, total, stats, weight, *rule, ctx.with_bias)
        if not ctx.rule[0]:
            d_x = d_residual
        needed = ctx.needs_input_grad
        gradients = (d_x, d_residual, *vectors)
        return (*(g if n else None for g, n in zip(gradients, needed, strict=False)), *[None] * 6)


def _check(
    x: Tensor,
    residual: Tensor | None,
    vectors: dict[str, Tensor | None],
    token_ids: Tensor | None,
    eps: float,
) -> None:
    given = {"x": x, "residual": residual, **vectors}
    for name, value in given.items():
        if value is None and name in ("residual", "bias"):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
        if value.dtype not in _FLOAT_DTYPES:
            raise TypeError(
                f"{name} must be float64, float32, float16 or bfloat16, got {value.dtype}"
            )
    if x.dim() != 2:
        raise ValueError(f"x must have shape [T, d], got {list(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have shape {list(x.shape)}, got {list(residual.shape)}")
    for name, value in vectors.items():
        if value is not None and value.shape != x.shape[1:]:
            raise ValueError(f"{name} must have shape [{x.shape[1]}], got {list(value.shape)}")
    if token_ids is not None:
        _check_token_ids(token_ids, x)
    for name, value in (given | {"token_ids": token_ids}).items():
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} must be on {x.device}, got {value.device}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not eps >= 0.0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def _check_token_ids(token_ids: Tensor, x: Tensor) -> None:
    if not isinstance(token_ids, Tensor) or token_ids.dtype != torch.int64:
        raise TypeError("token_ids must be an int64 Tensor or None")
    if token_ids.shape != x.shape[:1]:
        raise ValueError(f"token_ids must have shape [{x.shape[0]}], got {list(token_ids.shape)}")


def _check_token_values(token_ids: Tensor | None) -> None:
    """On the CPU and for the reference alone: the native backend checks its own."""
    if token_ids is None or not token_ids.is_cpu or torch.compiler.is_compiling():
        return
    if token_ids.numel() and int(token_ids.min()) < 0:
        raise ValueError(f"token_ids must be >= 0, got {int(token_ids.min())}")


def dropout_add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    step: int = 0,
    token_ids: Tensor | None = None,
    eps: float = 1e-5,
    return_sum: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Layer normalisation of a residual sum, dropout and bias included, in one pass.

    .. math::
        s_t = r_t + m_t \odot (x_t + b), \qquad
        z_t = \gamma \odot \frac{s_t - \bar s_t}{\sqrt{\mathrm{var}(s_t) + \epsilon}} + \beta

    m is 1 without dropout, else 0 or 1 / (1 - dropout): a function of (seed, step, token, channel),
    drawn again in backward and never stored. Backward is one pass too; sums over tokens are taken
    in a fixed order, so native results have the same bits for every thread count.

    Args:
        x: ``[T, d]`` output of a branch; float64, float32, float16 or bfloat16, any strides.
        residual: ``[T, d]`` r, or None for 0.
        weight: ``[d]`` gamma.
        shift: ``[d]`` beta.
        bias: ``[d]`` b of the branch's last projection, or None.
        dropout: probability in [0, 1) of dropping an element of ``x + bias``.
        seed: ``0..2**63 - 1``.
        step: ``0..2**32 - 1``.
        token_ids: int64 ``[T]`` >= 0, numbers of the tokens in the mask; default 0, 1, ... Padded
            tokens that name their packed numbers get the packed masks.
        eps: epsilon, >= 0.
        return_sum: also give s, as pre-norm blocks need it.
        backend: "auto", "reference" (plain torch, any device) or "native" (CPU, first order). A
            named backend never falls back; "auto" may.

    Returns:
        ``z [T, d]``, or ``(z, s)``; float64 if x or the residual are, else float32 (the vectors are
        converted). NaN or Inf in a row spreads over that row, and in gradients over the vectors.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit, or a value is out of range.
        RuntimeError: The named backend cannot run; the message says why.

    Source: Ba et al. 2016, arXiv:1607.06450; masks by Philox, see
    :mod:`padkern.ops.keyed_dropout`.
    """
    _check(x, residual, {"weight": weight, "shift": shift, "bias": bias}, token_ids, eps)
    check_dropout(dropout, seed, step)
    double = x.dtype == torch.float64 or (residual is not None and residual.dtype == torch.float64)
    dtype = torch.float64 if double else torch.float32
    x, weight, shift = x.to(dtype), weight.to(dtype), shift.to(dtype)
    residual = None if residual is None else residual.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    tensors = (x, residual, bias, weight, shift)
    chosen = _backends.resolve_backend(
        backend, lambda: _backends.why_not_native(*tensors, token_ids)
    )
    if chosen != "native":
        _check_token_values(token_ids)
        with _backends.without_autocast(x.device.type):
            return dropout_add_norm_ref(
                x, residual, weight, shift,
                bias=bias, dropout=dropout, seed=seed, step=step, token_ids=token_ids, eps=eps,
                return_sum=return_sum, exact=backend == "reference" or x.is_cpu,
            )  # fmt: skip
    rule = (token_ids, float(eps), float(dropout), seed, step)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out, total, _ = _DropoutAddNormFunction.apply(*tensors, *rule, return_sum)
    else:
        out, total, _ = _VALUE(*tensors, *rule, return_sum)
    return (out, total) if return_sum else out


def keyed_dropout(
    x: Tensor,
    dropout: float,
    *,
    seed: int = 0,
    step: int = 0,
    token_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dropout alone, with the masks of :func:`dropout_add_norm`.

    Args:
        x: ``[T, d]``; the other arguments are those of :func:`dropout_add_norm`.
        dropout, seed, step, token_ids, backend: likewise.

    Returns:
        ``[T, d]``, float64 or float32; x itself without dropout.

    Raises:
        TypeError, ValueError, RuntimeError: as there.
    """
    _check(x, None, {}, token_ids, 0.0)
    check_dropout(dropout, seed, step)
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    chosen = _backends.resolve_backend(backend, lambda: _backends.why_not_native(x, token_ids))
    if not dropout:
        return x
    if chosen != "native":
        _check_token_values(token_ids)
        return keyed_dropout_ref(x, dropout, seed=seed, step=step, token_ids=token_ids)
    tensors = (x, None, None, None, None, token_ids, 0.0, float(dropout), seed, step)
    if torch.is_grad_enabled() and x.requires_grad:
        return _DropoutAddNormFunction.apply(*tensors, True)[1]
    return _VALUE(*tensors, True)[1]
