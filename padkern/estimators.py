"""MK-MMD of many problems at once, per class, over blocks, and from random features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from padkern import _batched, _validation
from padkern import _validation_batched as _checks
from padkern._batched import Batch
from padkern.ops.mkmmd.reference import DEFAULT_ALPHAS
from padkern.ops.mkmmd_batched import classes
from padkern.ops.mkmmd_batched.bandwidth import pooled_mean_sq_distance
from padkern.ops.mkmmd_batched.reference import rows_needed
from padkern.ops.mkmmd_fourier.estimate import (
    FOURIER_KERNELS,
    FourierOptions,
    draw_frequencies,
    fourier_loss,
)

__all__ = [
    "BlockMMD",
    "ClassMMD",
    "mkmmd_block",
    "mkmmd_fourier",
    "mkmmd_loss_batched",
    "mkmmd_per_class",
]


class ClassMMD(NamedTuple):
    """Class-conditional losses.

    Attributes:
        losses: ``[C]``, or ``[C, C]`` (source class, target class) with ``pairs=True``; 0, with a
            gradient of 0, where ``present`` is False.
        present: bool of the same shape: both classes have the rows that the estimator needs.
    """

    losses: Tensor
    present: Tensor


class BlockMMD(NamedTuple):
    """The loss over blocks, a scalar, and its standard error, a scalar without a gradient."""

    loss: Tensor
    std_error: Tensor


def mkmmd_loss_batched(
    source: Tensor,
    target: Tensor,
    *,
    source_offsets: Tensor | None = None,
    target_offsets: Tensor | None = None,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    kernel: str = "gaussian",
    sigma_sq: float | Tensor | None = None,
    estimator: str = "unbiased",
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    max_rows: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`padkern.mkmmd_loss` of many independent problems in one call.

    Equals ``torch.stack([mkmmd_loss(s, t, ...) for s, t in problems])`` for problems of equal size
    (``[B, n, D]``) or of any sizes (packed rows and offsets).

    Args:
        source: ``[B, n, D]``, or ``[total, D]`` with ``source_offsets``; float64, float32, float16
            or bfloat16, any strides.
        target: ``[B, m, D]``, or ``[total, D]`` with ``target_offsets``; on the device of
            ``source``. n and m, the totals and the dtypes may differ.
        source_offsets: ``[B + 1]`` int32 or int64, cumulative lengths: problem b has the rows from
            ``source_offsets[b]`` up to ``source_offsets[b + 1]``, from 0 to total.
        target_offsets: ``[B + 1]``, likewise; given together with ``source_offsets``.
        alphas: Bandwidth multipliers, numbers > 0.
        kernel: As in :func:`padkern.mkmmd_loss`.
        sigma_sq: Squared bandwidth. None: the mean squared distance of each problem, detached. A
            number or a tensor of one value: the same for all. A tensor ``[B]``: one for each
            problem. A tensor may require a gradient; 0 and negative values as in mkmmd_loss.
        estimator: "unbiased", "biased" or "tllib".
        source_weight: ``[B, n]`` or ``[total]``, >= 0, as in mkmmd_loss.
        target_weight: ``[B, m]`` or ``[total]``, likewise.
        max_rows: Upper bound on the rows of a problem in either sample. Spares work on a GPU, where
            the offsets are not read on the host and one problem may have all rows.
        backend: "auto", "reference" (a loop in plain torch, differentiable to any order), "native"
            (CPU) or "triton" (GPU). A named backend never falls back. The reference reads the
            offsets on the host wherever they are.

    Returns:
        Tensor: ``[B]``; float64 if an input is float64, else float32, also under autocast.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices differ, an argument is out of range, or, on the CPU, offsets
            break their rule or a problem has too few rows; the message names the problem. On a GPU
            and in compiled code a problem with too few rows gives NaN instead.
        RuntimeError: The named backend cannot run; the message says why.
    """
    _checks.check_no_median(sigma_sq, "mkmmd_loss_batched")
    problems = _checks.check_batched(
        source,
        target,
        source_offsets,
        target_offsets,
        estimator,
        sigma_sq,
        source_weight,
        target_weight,
        max_rows,
    )
    values = _checks.check_profile(kernel, alphas, sigma_sq)
    batch = Batch(
        source,
        target,
        source_offsets,
        target_offsets,
        _batched.per_problem(sigma_sq, problems, source),
        source_weight,
        target_weight,
        values,
        kernel,
        estimator,
        max_rows,
    )
    return _batched.solve(batch, backend)


def mkmmd_per_class(
    source: Tensor,
    target: Tensor,
    source_labels: Tensor,
    target_labels: Tensor,
    num_classes: int,
    *,
    pairs: bool = False,
    bandwidth: str = "pooled",
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    kernel: str = "gaussian",
    sigma_sq: float | Tensor | None = None,
    estimator: str = "unbiased",
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    backend: str = "auto",
) -> ClassMMD:
    """MK-MMD between the rows of the same class of two samples, for all classes in one pass.

    With ``pairs=True`` between every source class and every target class, as contrastive domain
    discrepancy needs: the mean of the diagonal minus the mean of the rest. Each tile of the kernel
    matrix is evaluated once for all pairs, and once more in backward.

    Args:
        source: ``[n, D]``, as in :func:`padkern.mkmmd_loss`.
        target: ``[m, D]``.
        source_labels: ``[n]`` int64, class of each row from 0 to ``num_classes - 1``; -1 leaves the
            row out.
        target_labels: ``[m]`` int64.
        num_classes: C.
        pairs: Whether to compare all pairs of classes. Plain torch on any device; reads the class
            sizes on the host.
        bandwidth: When ``sigma_sq`` is None, "pooled": one bandwidth, the mean squared distance of
            all rows that have a class; "per_class": that of each class (not with ``pairs``).
        alphas: Bandwidth multipliers, numbers > 0.
        kernel: As in :func:`padkern.mkmmd_loss`.
        sigma_sq: Squared bandwidth: a number, a tensor of one value, or (not with ``pairs``) a
            tensor ``[C]``. A tensor may require a gradient.
        estimator: "unbiased" or "biased".
        source_weight: ``[n]``, >= 0, as in :func:`padkern.mkmmd_loss`.
        target_weight: ``[m]``.
        backend: As in :func:`mkmmd_loss_batched`; with ``pairs`` "auto" or "reference" (a loop over
            the pairs, differentiable to any order).

    Returns:
        ClassMMD: ``(losses, present)``. A class (with ``pairs``: a pair) with fewer rows of weight
        > 0 in either sample than the estimator needs has loss 0, gradient 0 and ``present`` False.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or values break a rule above. Label values are read on the CPU
            only; elsewhere a label out of range leaves the row out.
        RuntimeError: The named backend cannot run; the message says why.

    Source: Kang et al. 2019, "Contrastive Adaptation Network", arXiv:1901.00976 (class pairs).
    """
    _checks.check_choice("estimator", estimator, ("unbiased", "biased"))
    _checks.check_choice("bandwidth", bandwidth, ("pooled", "per_class"))
    _checks.check_count("num_classes", num_classes)
    _checks.check_no_median(sigma_sq, "mkmmd_per_class")
    # Not the sizes: a sample may have a single row, or none of any class.
    _validation.check_mkmmd(source, target, "biased", None, source_weight, target_weight)
    _checks.check_problem_sigma_sq(sigma_sq, 1 if pairs else num_classes, source.device)
    values = _checks.check_profile(kernel, alphas, sigma_sq)
    _checks.check_labels("source_labels", source_labels, source, "source", num_classes)
    _checks.check_labels("target_labels", target_labels, target, "target", num_classes)
    for name, weight in (("source_weight", source_weight), ("target_weight", target_weight)):
        _checks.check_no_negative(name, weight)
    if pairs and bandwidth == "per_class":
        raise ValueError("bandwidth 'per_class' has no meaning with pairs=True: use 'pooled'")
    if pairs:
        _checks.check_choice("backend", backend, ("auto", "reference"))

    source_mask = classes.usable(source_labels, source_weight, num_classes)
    target_mask = classes.usable(target_labels, target_weight, num_classes)
    enough = [
        classes.class_counts(labels, mask, num_classes) >= rows_needed(estimator)
        for labels, mask in ((source_labels, source_mask), (target_labels, target_mask))
    ]
    if kernel != "energy" and sigma_sq is None and bandwidth == "pooled":
        used = [
            mask if weight is None else weight * mask
            for mask, weight in ((source_mask, source_weight), (target_mask, target_weight))
        ]
        sigma_sq = pooled_mean_sq_distance(source, target, *used)
    keep = enough if pairs else [enough[0] & enough[1]] * 2
    left = classes.sort_by_class(source, source_labels, source_mask, source_weight, keep[0])
    right = classes.sort_by_class(target, target_labels, target_mask, target_weight, keep[1])
    bandwidths = _batched.per_problem(sigma_sq, 1 if pairs else num_classes, source)
    if pairs:
        bandwidths = None if bandwidths is None else bandwidths.reshape(())
        # Only the reference computes gradients by weights.
        weights = [w for w in (source_weight, target_weight) if w is not None]
        reference = backend == "reference" or any(w.requires_grad for w in weights)
        losses = _batched.solve_pairs(left, right, bandwidths, values, kernel, estimator, reference)
        present = enough[0][:, None] & enough[1]
        return ClassMMD(losses, present)
    present = keep[0]
    if bandwidths is not None:
        # An absent class has a NaN loss, which must not reach the bandwidth's gradient.
        bandwidths = torch.where(present, bandwidths, 1)
    batch = Batch(
        left.rows,
        right.rows,
        left.offsets,
        right.offsets,
        bandwidths,
        left.weight,
        right.weight,
        values,
        kernel,
        estimator,
    )
    return ClassMMD(torch.where(present, _batched.solve(batch, backend), 0), present)


def mkmmd_block(
    source: Tensor,
    target: Tensor,
    *,
    block_size: int,
    seed: int | None = None,
    return_std: bool = False,
    bandwidth: str = "pooled",
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    kernel: str = "gaussian",
    sigma_sq: float | Tensor | None = None,
    estimator: str = "unbiased",
    backend: str = "auto",
) -> Tensor | BlockMMD:
    """MK-MMD as the mean over blocks of rows (the B-statistic), in O(n block_size D) time.

    The samples are cut into the same number of blocks, ``min(n, m) // block_size``, whose sizes
    differ by at most one row, so that all rows are used; block b of the source meets block b of the
    target. The unbiased estimate stays unbiased; its variance is that of a block divided by their
    number.

    Args:
        source: ``[n, D]``, as in :func:`padkern.mkmmd_loss`.
        target: ``[m, D]``.
        block_size: Fewest rows of a block, from 2 (1 for the biased estimator) to min(n, m).
        seed: None: blocks of consecutive rows. A number: the rows of each sample are shuffled
            first, the same way for the same seed and sizes on any device.
        return_std: Whether to return the standard error too; needs two blocks.
        bandwidth: When ``sigma_sq`` is None, "pooled": the mean squared distance of all rows, one
            for all blocks; "per_block": that of each block.
        alphas: Bandwidth multipliers, numbers > 0.
        kernel: As in :func:`padkern.mkmmd_loss`.
        sigma_sq: Squared bandwidth, a number or a tensor of one value, which may require a
            gradient.
        estimator: "unbiased" or "biased" (with the bias of a block).
        backend: As in :func:`mkmmd_loss_batched`.

    Returns:
        Tensor | BlockMMD: A scalar, or ``(loss, std_error)`` with ``return_std=True``: the standard
        deviation over blocks divided by the root of their number, detached. float64 if an input is
        float64, else float32.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or values break a rule above.
        RuntimeError: The named backend cannot run; the message says why.

    Source: Zaremba, Gretton and Blaschko 2013, "B-tests: low variance kernel two-sample tests",
    arXiv:1307.1954.
    """
    _checks.check_choice("estimator", estimator, ("unbiased", "biased"))
    _checks.check_choice("bandwidth", bandwidth, ("pooled", "per_block"))
    _checks.check_no_median(sigma_sq, "mkmmd_block")
    _validation.check_mkmmd(source, target, estimator, sigma_sq, None, None)
    values = _checks.check_profile(kernel, alphas, sigma_sq)
    _checks.check_count("block_size", block_size, rows_needed(estimator))
    sizes = [source.shape[0], target.shape[0]]
    if block_size > min(sizes):
        raise ValueError(
            f"block_size must be at most the rows of the smaller sample, {min(sizes)}, "
            f"got {block_size}"
        )
    blocks = min(sizes) // block_size
    if return_std and blocks < 2:
        raise ValueError(f"return_std needs at least 2 blocks, block_size {block_size} leaves 1")
    if kernel != "energy" and sigma_sq is None and bandwidth == "pooled":
        sigma_sq = pooled_mean_sq_distance(source, target)
    samples = [source, target]
    if seed is not None:
        _checks.check_count("seed", seed, 0)
        generator = torch.Generator().manual_seed(seed)
        samples = [
            rows.index_select(0, torch.randperm(len(rows), generator=generator).to(rows.device))
            for rows in samples
        ]
    steps = torch.arange(blocks + 1, device=source.device)
    batch = Batch(
        samples[0],
        samples[1],
        steps * sizes[0] // blocks,
        steps * sizes[1] // blocks,
        _batched.per_problem(sigma_sq, blocks, source),
        None,
        None,
        values,
        kernel,
        estimator,
        max(-(-size // blocks) for size in sizes),
    )
    losses = _batched.solve(batch, backend)
    if not return_std:
        return losses.mean()
    return BlockMMD(losses.mean(), losses.detach().std() / blocks**0.5)


def mkmmd_fourier(
    source: Tensor,
    target: Tensor,
    *,
    num_features: int = 1024,
    seed: int = 0,
    generator: torch.Generator | None = None,
    alphas: Sequence[float] = DEFAULT_ALPHAS,
    kernel: str = "gaussian",
    sigma_sq: float | Tensor | None = None,
    estimator: str = "unbiased",
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
) -> Tensor:
    """MK-MMD estimated from random Fourier features, in O((n + m) F D) time for F features.

    For samples too large for the exact loss. Given the rows, the expectation over the frequencies
    is the exact loss of the same estimator, and the error falls as 1/sqrt(F) whatever n, m and D.
    Rows are streamed, forward and backward: beyond inputs and gradients the memory is O(F D).

    Args:
        source: ``[n, D]``, as in :func:`padkern.mkmmd_loss`.
        target: ``[m, D]``.
        num_features: F, frequencies drawn; each serves every multiplier, as a cosine and a sine.
        seed: Of the frequencies: the same seed gives the same ones, on any device. In training,
            pass the step number, or features that are blind to a difference stay blind to it.
        generator: Drawn from instead of a fresh one with ``seed``.
        alphas: Bandwidth multipliers, numbers > 0.
        kernel: "gaussian", "laplacian", "inverse_multiquadric" or "rational_quadratic". Frequencies
            of the laplacian have no finite mean: its gradient is far noisier than its value.
        sigma_sq: Squared bandwidth. None: the mean squared distance over all pairs of pooled rows,
            detached. A number, or a tensor of one value, which may require a gradient.
        estimator: "unbiased" or "biased" (a squared norm, never negative).
        source_weight: ``[n]``, >= 0, as in :func:`padkern.mkmmd_loss`; without a gradient.
        target_weight: ``[m]``, likewise.

    Returns:
        Tensor: Scalar; float64 if an input is float64, else float32, also under autocast. First
        derivatives only.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes, devices or values break a rule above, or the kernel is "energy", which
            has no spectral density.

    Source: Rahimi and Recht 2007, "Random features for large-scale kernel machines", NIPS 20.
    """
    if kernel == "energy":
        raise ValueError("kernel 'energy' has no spectral density and so no Fourier features")
    _checks.check_choice("kernel", kernel, FOURIER_KERNELS)
    _checks.check_choice("estimator", estimator, ("unbiased", "biased"))
    _checks.check_no_median(sigma_sq, "mkmmd_fourier")
    _validation.check_mkmmd(source, target, estimator, sigma_sq, source_weight, target_weight)
    values = _checks.check_profile(kernel, alphas, sigma_sq)
    _checks.check_count("num_features", num_features)
    for name, weight in (("source_weight", source_weight), ("target_weight", target_weight)):
        _validation.check_weight_values(name, weight, estimator)
        if weight is not None and weight.requires_grad:
            raise ValueError(f"{name} must not require a gradient here")
    if generator is None:
        _checks.check_count("seed", seed, 0)
        generator = torch.Generator().manual_seed(seed)
    frequencies = draw_frequencies(source.shape[1], num_features, kernel, generator, source.device)
    bandwidth = _batched.per_problem(sigma_sq, 1, source)
    bandwidth = None if bandwidth is None else bandwidth.reshape(())
    options = FourierOptions(frequencies, values, estimator == "biased")
    return fourier_loss(source, target, bandwidth, source_weight, target_weight, options)
