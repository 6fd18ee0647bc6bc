"""Launchers of the Triton backend. Derivation, precision and tiles: ``TRITON.md``.

They run on the current stream of the tensors' device, read no value on the host, use no float
atomics and always add in the same order: same inputs, same bits, also from inside a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from padkern.ops.mkmmd.triton_launch import Call
from padkern.ops.mkmmd.triton_prepare import Options
from padkern.ops.triton_interpreter import guard


def _run(call: Call) -> tuple[Tensor, ...]:
    call.prepare()
    return call.finish(call.gradient_sums() if call.gradient else call.value_sums())


def _single(
    source: Tensor,
    target: Tensor,
    sigma_sq: Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    alphas_tensor: Tensor | None,
    betas: Tensor | None,
    alphas: Sequence[float],
    kernel: str,
    estimator: str,
    precision: str,
    *,
    gradient: bool,
) -> Call:
    options = Options(
        sigma_sq=sigma_sq,
        weights=(source_weight, target_weight),
        alphas_tensor=alphas_tensor,
        betas=betas,
        alphas=alphas,
        kernel=kernel,
        estimator=estimator,
        precision=precision,
        offsets=None,
        max_rows=(source.shape[0], target.shape[0]),
        gradient=gradient,
    )
    return Call(source, target, options)


def mkmmd_value_triton(*args: Any) -> Tensor:
    """The loss: scalar of the compute dtype. Arguments of the op up to ``precision``."""
    with guard(args[0]):
        return _run(_single(*args, gradient=False))[0]


def mkmmd_value_grad_triton(*args: Any) -> tuple[Tensor, ...]:
    """The loss and its derivatives, as ``padkern::mkmmd_value_grad`` gives them."""
    *rest, per_kernel = args
    with guard(args[0]):
        call = _single(*rest, gradient=True)
        results = _run(call)
        return (*results, *(call.per_kernel() if per_kernel else (call.new(0), call.new(0))))


def _batched(
    source: Tensor,
    target: Tensor,
    source_offsets: Tensor,
    target_offsets: Tensor,
    sigma_sq: Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    alphas: Sequence[float],
    kernel: str,
    estimator: str,
    max_source_rows: int,
    max_target_rows: int,
    *,
    gradient: bool,
) -> tuple[Tensor, ...]:
    options = Options(
        sigma_sq=sigma_sq,
        weights=(source_weight, target_weight),
        alphas_tensor=None,
        betas=None,
        alphas=alphas,
        kernel=kernel,
        estimator=estimator,
        precision="float32",
        offsets=(source_offsets.contiguous(), target_offsets.contiguous()),
        max_rows=(max_source_rows, max_target_rows),
        gradient=gradient,
    )
    with guard(source):
        return _run(Call(source, target, options))


def mkmmd_batched_value_triton(*args: Any) -> Tensor:
    """The losses [B] of B problems whose rows follow one another, in one set of launches.

    A problem with a sample too small for the estimator gives NaN, the others are not disturbed.

    Args:
        *args: ``source`` [n, D], ``target`` [m, D], ``source_offsets`` and ``target_offsets``
            [B + 1] int64 on their device (problem b has the rows from its offset to the next),
            ``sigma_sq`` [B] or None for each problem's mean squared distance, ``source_weight``
            [n] or None, ``target_weight`` [m] or None, ``alphas``, ``kernel``, ``estimator``,
            ``max_source_rows`` and ``max_target_rows``: at least the rows of the largest sample.

    Returns:
        Tensor: [B], of the compute dtype.
    """
    return _batched(*args, gradient=False)[0]


def mkmmd_batched_value_grad_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses and their derivatives.

    Args:
        *args: As :func:`mkmmd_batched_value_triton`.

    Returns:
        tuple: values [B], d_source [n, D] and d_target [m, D] of the compute dtype (0 in rows of no
        problem), d_sigma [B] in float64. Each row holds the gradient of its own problem's loss.
    """
    value, d_source, d_target, d_sigma = _batched(*args, gradient=True)
    return value, d_source, d_target, d_sigma
