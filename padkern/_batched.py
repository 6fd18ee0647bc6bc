"""Dispatch of checked batches of MK-MMD problems to a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from padkern import _backends, _validation_batched
from padkern.ops.mkmmd.reference import compute_dtype, mkmmd_loss_ref
from padkern.ops.mkmmd_batched.class_pairs import ClassPairOptions, class_pair_losses
from padkern.ops.mkmmd_batched.classes import ClassRows
from padkern.ops.mkmmd_batched.op import mkmmd_batched_fused
from padkern.ops.mkmmd_batched.reference import mkmmd_batched_ref

BACKENDS = ("auto", "reference", "native", "triton")


class Batch(NamedTuple):
    """Checked arguments. Without offsets the samples are [B, n, D] and [B, m, D], with them packed
    rows [total, D]; weights have the same leading dimensions."""

    source: Tensor
    target: Tensor
    source_offsets: Tensor | None
    target_offsets: Tensor | None
    sigma_sq: Tensor | None  # [B]
    source_weight: Tensor | None
    target_weight: Tensor | None
    alphas: Sequence[float]
    kernel: str
    estimator: str
    max_rows: int | None = None


def per_problem(sigma_sq: float | Tensor | None, problems: int, source: Tensor) -> Tensor | None:
    """The bandwidth as [B], or None."""
    if sigma_sq is None:
        return None
    if not isinstance(sigma_sq, Tensor):
        sigma_sq = torch.tensor(sigma_sq, dtype=torch.float64, device=source.device)
    if sigma_sq.numel() == 1:
        return sigma_sq.reshape(1).expand(problems)
    return sigma_sq


def _choose(backend: str, batch: Batch) -> str:
    def fused(why_not: Callable[..., str | None]) -> str | None:
        for name in ("source_weight", "target_weight"):
            weight = getattr(batch, name)
            if weight is not None and weight.requires_grad:
                return f"{name} requires a gradient, which only the reference backend computes"
        return why_not(*(value for value in batch if isinstance(value, Tensor)))

    return _backends.choose_backend(
        backend,
        BACKENDS,
        {
            "native": lambda: fused(_backends.why_not_native),
            "triton": lambda: fused(_backends.why_not_triton),
        },
        automatic=("native",),
    )


def solve(batch: Batch, backend: str) -> Tensor:
    """The losses [B]; a problem with too few rows gives NaN."""
    chosen = _choose(backend, batch)
    return _reference(batch) if chosen == "reference" else _fused(batch, chosen)


def _fused(batch: Batch, backend: str) -> Tensor:
    def cut(rows: Tensor, offsets: Tensor | None) -> tuple[Tensor, int]:
        if offsets is None:
            problems, size = rows.shape[:2]
            return torch.arange(problems + 1, device=rows.device) * size, size
        return offsets, rows.shape[0] if batch.max_rows is None else batch.max_rows

    source_offsets, max_source_rows = cut(batch.source, batch.source_offsets)
    target_offsets, max_target_rows = cut(batch.target, batch.target_offsets)
    return mkmmd_batched_fused(
        batch.source,
        batch.target,
        source_offsets,
        target_offsets,
        batch.sigma_sq,
        batch.source_weight,
        batch.target_weight,
        batch.alphas,
        batch.kernel,
        batch.estimator,
        max_source_rows,
        max_target_rows,
        backend,
    )


def _reference(batch: Batch) -> Tensor:
    samples, cuts, weights = [], [], []
    for name, rows, cut, weight in (
        ("source_weight", batch.source, batch.source_offsets, batch.source_weight),
        ("target_weight", batch.target, batch.target_offsets, batch.target_weight),
    ):
        if cut is None:
            cuts.append([b * rows.shape[1] for b in range(rows.shape[0] + 1)])
            weight = None if weight is None else weight.reshape(-1)
        else:
            cuts.append(cut.tolist())
        _validation_batched.check_problem_weights(weight, cuts[-1], name, batch.estimator)
        samples.append(rows.reshape(-1, rows.shape[-1]))
        weights.append(weight)
    with torch.autocast(batch.source.device.type, enabled=False):
        return mkmmd_batched_ref(
            *samples,
            *cuts,
            alphas=batch.alphas,
            kernel=batch.kernel,
            sigma_sq=batch.sigma_sq,
            estimator=batch.estimator,
            source_weight=weights[0],
            target_weight=weights[1],
        )


def solve_pairs(
    source: ClassRows,
    target: ClassRows,
    sigma_sq: Tensor | None,
    alphas: Sequence[float],
    kernel: str,
    estimator: str,
    reference: bool,
) -> Tensor:
    """The losses [C, C] of all pairs of classes, 0 for a class without rows; sigma_sq a scalar."""
    sides = []
    for side in (source, target):
        cuts = side.offsets.tolist()
        kept = [c for c in range(len(cuts) - 1) if cuts[c + 1] > cuts[c]]
        rows = slice(0, cuts[-1])
        weight = None if side.weight is None else side.weight[rows]
        sides.append((side.rows[rows], weight, kept, [cuts[c] for c in kept] + [cuts[-1]]))
    (x, wx, left, x_cuts), (y, wy, right, y_cuts) = sides
    classes = len(source.offsets) - 1
    if not left or not right:  # zeros with a gradient of zeros
        nothing = x[:0].sum() + y[:0].sum()
        return nothing.to(compute_dtype(x, y)).expand(classes, classes)
    if reference:
        with torch.autocast(x.device.type, enabled=False):
            losses = torch.stack(
                [
                    mkmmd_loss_ref(
                        x[x_cuts[a] : x_cuts[a + 1]],
                        y[y_cuts[b] : y_cuts[b + 1]],
                        alphas=alphas,
                        kernel=kernel,
                        sigma_sq=sigma_sq,
                        estimator=estimator,
                        source_weight=None if wx is None else wx[x_cuts[a] : x_cuts[a + 1]],
                        target_weight=None if wy is None else wy[y_cuts[b] : y_cuts[b + 1]],
                    )
                    for a in range(len(left))
                    for b in range(len(right))
                ]
            ).reshape(len(left), len(right))
    else:
        packed = ClassPairOptions(x_cuts, y_cuts, alphas, kernel, estimator == "biased")
        losses = class_pair_losses(x, y, sigma_sq, wx, wy, packed)
    rows_of, columns_of = (torch.tensor(kept, device=x.device) for kept in (left, right))
    everything = losses.new_zeros(classes, classes)
    return everything.index_put((rows_of[:, None], columns_of), losses)
