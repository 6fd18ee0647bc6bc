"""Public gated loss, its registered ops and the autograd function around them.

``padkern::gated_bce_value`` and ``padkern::gated_bce_value_grad`` are functional and know nothing
of autograd. The second gives value and derivatives in one pass; backward only scales them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from padkern import _backends
from padkern.ops.first_order import once_differentiable
from padkern.ops.triple_expert.calibration import check_positive_weight
from padkern.ops.triple_expert.reference import gated_bce_loss_ref

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAX_EXPERTS = 16

_ARGUMENTS = (
    "(Tensor users, Tensor item_tables, Tensor gate, Tensor item_bins, Tensor positives, "
    "Tensor negatives, Tensor? valid, float positive_weight=1.0)"
)
define("padkern::gated_bce_value", _ARGUMENTS + " -> Tensor")
define("padkern::gated_bce_value_grad", _ARGUMENTS + " -> (Tensor, Tensor, Tensor, Tensor)")


@impl("padkern::gated_bce_value", "CPU")
def _value_cpu(*args: Any) -> Tensor:
    from padkern.ops.triple_expert.native import gated_bce_value_native

    return gated_bce_value_native(*args)


@impl("padkern::gated_bce_value_grad", "CPU")
def _value_grad_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from padkern.ops.triple_expert.native import gated_bce_value_grad_native

    return gated_bce_value_grad_native(*args)


def _value_triton(*args: Any) -> Tensor:
    from padkern.ops.triple_expert.triton_impl import gated_bce_value_triton

    return gated_bce_value_triton(*args)


def _value_grad_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from padkern.ops.triple_expert.triton_impl import gated_bce_value_grad_triton

    return gated_bce_value_grad_triton(*args)


impl("padkern::gated_bce_value", "CUDA")(_value_triton)
impl("padkern::gated_bce_value_grad", "CUDA")(_value_grad_triton)


def _compute_dtype(users: Tensor, item_tables: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (users.dtype, item_tables.dtype) else torch.float32


@register_fake("padkern::gated_bce_value")
def _value_fake(users: Tensor, item_tables: Tensor, *_: Any) -> Tensor:
    return users.new_empty((), dtype=_compute_dtype(users, item_tables))


@register_fake("padkern::gated_bce_value_grad")
def _value_grad_fake(
    users: Tensor, item_tables: Tensor, gate: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _compute_dtype(users, item_tables)
    return (
        users.new_empty((), dtype=dtype),
        users.new_empty(users.shape, dtype=dtype),
        item_tables.new_empty(item_tables.shape, dtype=dtype),
        gate.new_empty(gate.shape, dtype=dtype),
    )


_VALUE = torch.ops.padkern.gated_bce_value.default
_VALUE_GRAD = torch.ops.padkern.gated_bce_value_grad.default


class _GatedBceFunction(torch.autograd.Function):
    """``interpreted``: CPU tensors, for which the registered ops would be the native ones, go to
    Triton's interpreter. Derivatives are saved in the compute dtype; backward scales, then casts:
    loss scaling makes a factor of 65536 a normal case."""

    @staticmethod
    def forward(
        users: Tensor,
        item_tables: Tensor,
        gate: Tensor,
        item_bins: Tensor,
        positives: Tensor,
        negatives: Tensor,
        valid: Tensor | None,
        positive_weight: float,
        interpreted: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        function = _value_grad_triton if interpreted else _VALUE_GRAD
        arrays = (users, item_tables, gate, item_bins, positives, negatives, valid)
        return function(*arrays, positive_weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros as large as the gradients
        ctx.save_for_backward(*output[1:])
        ctx.dtypes = tuple(x.dtype for x in inputs[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_value is None:
            return (None,) * 9
        saved = ctx.saved_tensors
        # The item gradient is as large as the tables: scaling it by one is a pass worth sparing.
        # Reading the factor costs nothing on the CPU.
        if not torch.compiler.is_compiling() and grad_value.is_cpu and grad_value.item() == 1.0:
            scaled = list(saved)
        else:
            scaled = [x * grad_value.to(x.dtype) for x in saved]
        places = zip(scaled, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return (*(x.to(dtype) if needed else None for x, dtype, needed in places), *[None] * 6)


def _check(
    users: Tensor,
    item_tables: Tensor,
    gate: Tensor,
    item_bins: Tensor,
    positives: Tensor,
    negatives: Tensor,
    valid: Tensor | None,
) -> None:
    floats = {"users": users, "item_tables": item_tables, "gate": gate}
    ids = {"item_bins": item_bins, "positives": positives, "negatives": negatives}
    for name, x in (floats | ids).items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    for name, x in floats.items():
        if x.dtype not in _FLOAT_DTYPES:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {x.dtype}")
    for name, x in ids.items():
        if x.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {x.dtype}")
    if users.dim() != 3:
        raise ValueError(f"users must have shape [T, E, d], got {list(users.shape)}")
    tokens, experts, dim = users.shape
    if not 1 <= experts <= _MAX_EXPERTS:
        raise ValueError(f"users must hold 1 to {_MAX_EXPERTS} experts, got {experts}")
    if item_tables.dim() != 3 or item_tables.shape[0] != experts or item_tables.shape[2] != dim:
        raise ValueError(
            f"item_tables must have shape [{experts}, N + 1, {dim}], got {list(item_tables.shape)}"
        )
    rows = item_tables.shape[1]
    if rows == 0:
        raise ValueError("item_tables must have at least one row")
    if gate.dim() != 2 or gate.shape[1] != experts or gate.shape[0] == 0:
        raise ValueError(f"gate must have shape [bins + 1, {experts}], got {list(gate.shape)}")
    if tuple(item_bins.shape) != (rows,):
        raise ValueError(f"item_bins must have shape [{rows}], got {list(item_bins.shape)}")
    if tuple(positives.shape) != (tokens,):
        raise ValueError(f"positives must have shape [{tokens}], got {list(positives.shape)}")
    if negatives.dim() != 2 or negatives.shape[0] != tokens or negatives.shape[1] == 0:
        raise ValueError(
            f"negatives must have shape [{tokens}, k] with k >= 1, got {list(negatives.shape)}"
        )
    if valid is not None:
        if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
            raise TypeError("valid must be a bool Tensor or None")
        if tuple(valid.shape) != (tokens,):
            raise ValueError(f"valid must have shape [{tokens}], got {list(valid.shape)}")
    others = floats | ids | ({} if valid is None else {"valid": valid})
    for name, x in others.items():
        if x.device != users.device:
            raise ValueError(f"{name} must be on {users.device}, got {x.device}")


def _check_ids(gate: Tensor, tables: Tensor, **ids: Tensor) -> None:
    """Ranges of ids on the CPU; the native backend checks its own, on a device torch does."""
    for name, x in ids.items():
        limit = (gate.shape[0] if name == "item_bins" else tables.shape[1]) - 1
        wrong = (x < 0) | (x > limit)
        if bool(wrong.any()):
            raise ValueError(f"{name} must lie in 0..{limit}, got {int(x[wrong][0])}")


def gated_bce_loss(
    users: Tensor,
    item_tables: Tensor,
    gate: Tensor,
    item_bins: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    valid: Tensor | None = None,
    positive_weight: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    r"""Binary cross-entropy of the gated expert score with sampled negatives.

    .. math::
        s_{t,i} = \sum_e g_{b(i),e}\,\langle u_{t,e}, v_{e,i}\rangle, \qquad
        L = \frac wM\sum_t \mathrm{softplus}(-s_{t,p_t})
          + \frac1{Mk}\sum_t\sum_{j\le k}\mathrm{softplus}(s_{t,n_{tj}})

    over the M valid tokens. w is 1 for plain binary cross-entropy; at that of
    :func:`gbce_positive_weight` the loss is gBCE times (k + 1) / k, which undoes the overconfidence
    that few negatives cause. The native and Triton backends read the item rows where they lie:
    nothing of size tokens x candidates x d exists, and value and all gradients come from one call.
    Item gradients are added in the order of the candidates, so the same inputs give the same bits,
    for any number of threads.

    Args:
        users: ``[T, E, d]`` states, one per token and expert, E <= 16; float64, float32, float16 or
            bfloat16.
        item_tables: ``[E, N + 1, d]`` item vectors of every expert.
        gate: ``[bins + 1, E]`` gate weights, row b for items of bin b.
        item_bins: int64 ``[N + 1]`` in ``0..bins``.
        positives: int64 ``[T]`` in ``0..N``.
        negatives: int64 ``[T, k]`` in ``0..N``, k >= 1.
        valid: bool ``[T]``; tokens that count. What the others hold, even NaN, changes nothing, but
            their ids must be in range.
        positive_weight: w > 0, finite.
        backend: "auto", "reference" (plain torch, any device), "native" (CPU) or "triton" (CUDA);
            the last two first order. A named backend never falls back; "auto" may.

    Returns:
        Tensor: Scalar; float64 if users or item_tables are, else float32 (the gate is converted).
        0 with zero gradients without a valid token. NaN or Inf in what is read gives NaN or Inf.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit, k = 0, w is not positive and finite, or an id is
            out of range (on the CPU; with Triton the value is NaN).
        RuntimeError: The named backend cannot run; the message says why.

    Source: PAD, arXiv:2412.04107, phase 3; two separate means as in its released code.
    gBCE: Petrov & Macdonald 2023, arXiv:2308.07192.
    """
    _check(users, item_tables, gate, item_bins, positives, negatives, valid)
    check_positive_weight(positive_weight)
    arrays = (users, item_tables, gate, item_bins, positives, negatives, valid)
    chosen = _backends.choose_backend(
        backend,
        _backends.TRITON_BACKENDS,
        {
            "native": lambda: _backends.why_not_native(*arrays),
            "triton": lambda: _backends.why_not_triton(*arrays),
        },
        automatic=("native",),
    )
    if chosen != "triton":  # which reads half inputs as they are
        dtype = _compute_dtype(users, item_tables)
        users, item_tables, gate = users.to(dtype), item_tables.to(dtype), gate.to(dtype)
    rest = (*arrays[3:], float(positive_weight))
    if users.is_cpu and chosen != "native" and not torch.compiler.is_compiling():
        _check_ids(gate, item_tables, item_bins=item_bins, positives=positives, negatives=negatives)
    if chosen == "reference":
        with torch.autocast(users.device.type, enabled=False):
            return gated_bce_loss_ref(users, item_tables, gate, *rest)
    interpreted = chosen == "triton" and users.is_cpu
    if torch.is_grad_enabled() and any(x.requires_grad for x in (users, item_tables, gate)):
        return _GatedBceFunction.apply(users, item_tables, gate, *rest, interpreted)[0]
    return (_value_triton if interpreted else _VALUE)(users, item_tables, gate, *rest)
