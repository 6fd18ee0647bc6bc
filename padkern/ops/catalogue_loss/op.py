"""Public catalogue loss, its registered ops and the autograd function around them.

``padkern::catalogue_loss_value`` and ``padkern::catalogue_loss_value_grad`` are functional and know
nothing of autograd. The second gives value and derivatives in one pass; backward only scales them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from padkern import _backends
from padkern.ops.catalogue_loss.reference import chunked_cross_entropy
from padkern.ops.first_order import once_differentiable

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_ARGUMENTS = (
    "(Tensor users, Tensor items, Tensor targets, Tensor? bias, Tensor? candidates, "
    "Tensor? excluded_values, Tensor? excluded_offsets"
)
define("padkern::catalogue_loss_value", _ARGUMENTS + ") -> Tensor")
define(
    "padkern::catalogue_loss_value_grad",
    _ARGUMENTS
    + ", bool with_users=True, bool with_items=True) -> (Tensor, Tensor, Tensor, Tensor)",
)


@impl("padkern::catalogue_loss_value", "CPU")
def _value_cpu(*args: Any) -> Tensor:
    from padkern.ops.catalogue_loss.native import catalogue_loss_native

    return catalogue_loss_native(*args)[0]


@impl("padkern::catalogue_loss_value_grad", "CPU")
def _value_grad_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from padkern.ops.catalogue_loss.native import catalogue_loss_native

    flags = (*args[7:], True, True)[:2]
    value, *gradients = catalogue_loss_native(*args[:7], *flags)
    d_users, d_items, d_bias = (value.new_empty(0) if g is None else g for g in gradients)
    return value, d_users, d_items, d_bias


def _value_triton(*args: Any) -> Tensor:
    from padkern.ops.catalogue_loss.triton_impl import catalogue_loss_value_triton

    return catalogue_loss_value_triton(*args)


def _value_grad_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from padkern.ops.catalogue_loss.triton_impl import catalogue_loss_value_grad_triton

    return catalogue_loss_value_grad_triton(*args)


impl("padkern::catalogue_loss_value", "CUDA")(_value_triton)
impl("padkern::catalogue_loss_value_grad", "CUDA")(_value_grad_triton)


def _compute_dtype(users: Tensor, items: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (users.dtype, items.dtype) else torch.float32


@register_fake("padkern::catalogue_loss_value")
def _value_fake(users: Tensor, items: Tensor, *_: Any) -> Tensor:
    return users.new_empty((), dtype=_compute_dtype(users, items))


@register_fake("padkern::catalogue_loss_value_grad")
def _value_grad_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    users, items, _, bias = args[:4]
    with_users, with_items = (*args[7:], True, True)[:2]
    dtype = _compute_dtype(users, items)
    return (
        users.new_empty((), dtype=dtype),
        users.new_empty(users.shape if with_users else 0, dtype=dtype),
        items.new_empty(items.shape if with_items else 0, dtype=dtype),
        items.new_empty(bias.shape if with_items and bias is not None else 0, dtype=dtype),
    )


_VALUE = torch.ops.padkern.catalogue_loss_value.default
_VALUE_GRAD = torch.ops.padkern.catalogue_loss_value_grad.default


class _CatalogueFunction(torch.autograd.Function):
    """The last arguments: which derivatives to compute, and ``interpreted``: CPU tensors, for which
    the registered ops would be the native ones, go to Triton's interpreter. Derivatives are saved
    in the compute dtype; backward scales, then casts: loss scaling makes a factor of 65536 a normal
    case."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *arrays, interpreted = args
        return (_value_grad_triton if interpreted else _VALUE_GRAD)(*arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros as large as the gradients
        ctx.save_for_backward(*output[1:])
        ctx.dtypes = {i: inputs[i].dtype for i in (0, 1, 3) if inputs[i] is not None}

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_value is None:
            return (None,) * 10
        saved = ctx.saved_tensors
        # The item gradient is as large as the catalogue: scaling it by one is a pass worth sparing.
        # Reading the factor costs nothing on the CPU.
        if not torch.compiler.is_compiling() and grad_value.is_cpu and grad_value.item() == 1.0:
            scaled = list(saved)
        else:
            scaled = [x * grad_value.to(x.dtype) for x in saved]
        places = {0: scaled[0], 1: scaled[1], 3: scaled[2]}
        needed = ctx.needs_input_grad
        return tuple(places[i].to(ctx.dtypes[i]) if needed[i] else None for i in range(10))


def _check(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    candidates: Tensor | None,
    excluded_values: Tensor | None,
    excluded_offsets: Tensor | None,
    chunk: int,
) -> None:
    floats = {"users": users, "items": items} | ({} if bias is None else {"bias": bias})
    ids = {"targets": targets}
    for name, given in (
        ("candidates", candidates),
        ("excluded_values", excluded_values),
        ("excluded_offsets", excluded_offsets),
    ):
        if given is not None:
            ids[name] = given
    for name, x in (floats | ids).items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    for name, x in floats.items():
        if x.dtype not in _FLOAT_DTYPES:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {x.dtype}")
    for name, x in ids.items():
        if x.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {x.dtype}")
    if users.ndim != 2 or items.ndim != 2 or users.shape[1] != items.shape[1]:
        raise ValueError(
            f"users and items must be [T, D] and [N, D], got {list(users.shape)} and "
            f"{list(items.shape)}"
        )
    if items.shape[0] == 0:
        raise ValueError("items must have at least one row")
    if targets.shape != users.shape[:1] or users.shape[0] == 0:
        raise ValueError(
            f"targets must be [{users.shape[0]}] with T >= 1, got {list(targets.shape)}"
        )
    if bias is not None and bias.shape != items.shape[:1]:
        raise ValueError(f"bias must be [{items.shape[0]}], got {list(bias.shape)}")
    if candidates is not None and (candidates.ndim != 1 or candidates.shape[0] == 0):
        raise ValueError(f"candidates must be [C] with C >= 1, got {list(candidates.shape)}")
    if (excluded_values is None) != (excluded_offsets is None):
        raise ValueError("excluded_values and excluded_offsets must be given together")
    if excluded_values is not None and excluded_values.ndim != 1:
        raise ValueError(f"excluded_values must be [E], got {list(excluded_values.shape)}")
    if excluded_offsets is not None and tuple(excluded_offsets.shape) != (users.shape[0] + 1,):
        raise ValueError(
            f"excluded_offsets must be [{users.shape[0] + 1}], got {list(excluded_offsets.shape)}"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    for name, x in (floats | ids).items():
        if x.device != users.device:
            raise ValueError(f"{name} must be on {users.device}, got {x.device}")


def _check_ids(
    items: Tensor,
    targets: Tensor,
    candidates: Tensor | None,
    excluded_values: Tensor | None,
    excluded_offsets: Tensor | None,
) -> None:
    """Values of ids on the CPU; the native backend checks its own, on a device torch does."""
    limit = items.shape[0] - 1
    named = {"targets": targets, "candidates": candidates, "excluded_values": excluded_values}
    for name, x in named.items():
        if x is None:
            continue
        wrong = (x < 0) | (x > limit)
        if bool(wrong.any()):
            raise ValueError(f"{name} must lie in 0..{limit}, got {int(x[wrong][0])}")
    if candidates is not None:
        steps = torch.diff(candidates) <= 0
        if bool(steps.any()):
            place = int(torch.nonzero(steps)[0])
            raise ValueError(
                f"candidates must ascend, got {int(candidates[place + 1])} after "
                f"{int(candidates[place])}"
            )
        outside = ~torch.isin(targets, candidates)
        if bool(outside.any()):
            raise ValueError(
                f"targets must be among the candidates, got item {int(targets[outside][0])}"
            )
    if excluded_offsets is not None and excluded_values is not None:
        count = excluded_values.shape[0]
        bad = torch.diff(excluded_offsets) < 0
        if int(excluded_offsets[0]) != 0 or int(excluded_offsets[-1]) != count or bool(bad.any()):
            raise ValueError(f"excluded_offsets must ascend from 0 to {count}")


def catalogue_cross_entropy(
    users: Tensor,
    items: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    candidates: Tensor | None = None,
    excluded_values: Tensor | None = None,
    excluded_offsets: Tensor | None = None,
    chunk: int = 1024,
    backend: str = "auto",
) -> Tensor:
    r"""Mean cross-entropy of ``users @ items.T`` against ``targets``, without keeping the logits.

    .. math::
        L = \frac1T \sum_t \Bigl(\log \sum_{i \in C_t} e^{z_{ti}} - z_{t,y_t}\Bigr), \qquad
        z_{ti} = \langle u_t, v_i\rangle + b_i

    where :math:`C_t` are the candidates without the items that token t leaves out; its target is
    always in. The gradients are computed beside the value, so backward only scales them.

    Sampled softmax: ``candidates`` are the drawn items together with the targets, ``bias`` holds
    minus the logarithm of how often an item is drawn, and items that a token must not have as
    negatives (accidental hits) are its excluded ones.

    Args:
        users: ``[T, D]`` states, T >= 1; float64, float32, float16 or bfloat16.
        items: ``[N, D]`` item vectors, N >= 1.
        targets: ``[T]`` int64 rows of ``items``.
        bias: optional ``[N]``, added to the logits of every token; ``-inf`` leaves an item out.
        candidates: optional ``[C]`` int64 rows of ``items``, ascending, that make up the softmax;
            must hold all targets. Other rows are not read, their gradient is 0.
        excluded_values: optional ``[E]`` int64 rows of ``items`` that single tokens leave out, one
            token after the other, in any order. A token's own target among them stays in.
        excluded_offsets: ``[T + 1]`` int64, token t leaves out
            ``excluded_values[excluded_offsets[t]:excluded_offsets[t + 1]]``.
        chunk: tokens per tile of the reference backend; the tile holds ``chunk * N`` numbers.
        backend: "auto", "reference" (plain torch, any device), "native" (CPU, same bits for any
            number of threads) or "triton" (CUDA; half inputs stay half in its products). A named
            backend never falls back; "auto" may. First order only.

    Returns:
        Scalar, fp64 if ``users`` or ``items`` are, else fp32, also under autocast.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit, there is no token, an id is out of range, the
            candidates do not ascend or lack a target (values are checked on the CPU; with Triton
            a missing target gives NaN).
        RuntimeError: the named backend cannot run; the message says why.
    """
    _check(users, items, targets, bias, candidates, excluded_values, excluded_offsets, chunk)
    arrays = (users, items, targets, bias, candidates, excluded_values, excluded_offsets)
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
        dtype = _compute_dtype(users, items)
        users, items = users.to(dtype), items.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if users.is_cpu and chosen != "native" and not torch.compiler.is_compiling():
        _check_ids(items, targets, candidates, excluded_values, excluded_offsets)
    arrays = (users, items, targets, bias, candidates, excluded_values, excluded_offsets)
    if chosen == "reference":
        with _backends.without_autocast(users.device.type):
            return chunked_cross_entropy(*arrays, chunk)
    interpreted = chosen == "triton" and users.is_cpu
    floats = (users, items) if bias is None else (users, items, bias)
    needs = [torch.is_grad_enabled() and x.requires_grad for x in floats]
    if any(needs):
        return _CatalogueFunction.apply(*arrays, needs[0], any(needs[1:]), interpreted)[0]
    return (_value_triton if interpreted else _VALUE)(*arrays)
