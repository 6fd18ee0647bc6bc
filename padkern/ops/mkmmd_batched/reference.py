"""Batched MK-MMD in plain torch: the specification, a loop over :func:`mkmmd_loss_ref`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from padkern.ops.mkmmd.reference import DEFAULT_ALPHAS, compute_dtype, mkmmd_loss_ref


def rows_needed(estimator: str) -> int:
    """Fewest rows of a sample for which the estimator is defined."""
    return 1 if estimator == "biased" else 2


def too_small(source_rows: int, target_rows: int, estimator: str) -> bool:
    """Whether a problem of this size has no value: its loss is NaN."""
    unequal = estimator == "tllib" and source_rows != target_rows
    return unequal or min(source_rows, target_rows) < rows_needed(estimator)


def mkmmd_batched_ref(
    source: Tensor,
    target: Tensor,
    source_offsets: Sequence[int] | Tensor,
    target_offsets: Sequence[int] | Tensor,
    *,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    kernel: str = "gaussian",
    sigma_sq: Tensor | None = None,
    estimator: str = "unbiased",
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
) -> Tensor:
    """The losses [B] of :func:`padkern.mkmmd_loss_batched` on packed rows, to any derivative.

    Args:
        source: ``[total, D]``; problem b has rows ``source_offsets[b]`` to ``source_offsets[b+1]``.
        target: ``[total, D]``, likewise.
        source_offsets: ``[B + 1]``; a tensor is read on the host.
        target_offsets: ``[B + 1]``.
        alphas: Bandwidth multipliers.
        kernel: One of ``KERNELS``.
        sigma_sq: ``[B]``, or None for each problem's own mean squared distance.
        estimator: As in :func:`mkmmd_loss_ref`.
        source_weight: ``[total]``.
        target_weight: ``[total]``.

    A problem with too few rows for the estimator gives NaN. Rows past the last offset belong to no
    problem. Arguments are taken as already checked.
    """
    source_cuts, target_cuts = (
        offsets.tolist() if isinstance(offsets, Tensor) else list(offsets)
        for offsets in (source_offsets, target_offsets)
    )
    losses = []
    for b in range(len(source_cuts) - 1):
        x = slice(source_cuts[b], source_cuts[b + 1])
        y = slice(target_cuts[b], target_cuts[b + 1])
        if too_small(x.stop - x.start, y.stop - y.start, estimator):
            # A function of the rows, so that their gradients are NaN too.
            dtype = compute_dtype(source, target)
            losses.append((source[x].to(dtype).sum() + target[y].to(dtype).sum()) * float("nan"))
            continue
        losses.append(
            mkmmd_loss_ref(
                source[x],
                target[y],
                alphas=alphas,
                kernel=kernel,
                sigma_sq=None if sigma_sq is None else sigma_sq[b],
                estimator=estimator,
                source_weight=None if source_weight is None else source_weight[x],
                target_weight=None if target_weight is None else target_weight[y],
            )
        )
    return torch.stack(losses)
