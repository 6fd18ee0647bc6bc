"""Two-sample statistics on MK-MMD: permutation test, variance of the estimate, power, witness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from padkern import _backends, _validation
from padkern.ops.kernel_products import variance as _variance
from padkern.ops.kernel_products.op import draw_memberships, kernel_apply, kernel_quadratic
from padkern.ops.kernel_products.variance import KernelArguments
from padkern.ops.mkmmd.reference import (
    DEFAULT_ALPHAS,
    compute_dtype,
    kernel_sum,
    mean_sq_distance,
    median_sq_distance,
)

__all__ = ["MKMMDTest", "mkmmd_power", "mkmmd_test", "mkmmd_variance", "mkmmd_witness"]

BACKENDS = ("auto", "reference", "blocked", "native")
TEST_ESTIMATORS = ("unbiased", "biased")
VARIANCE_ESTIMATORS = ("unbiased", "first_order")


class MKMMDTest(NamedTuple):
    """Result of :func:`mkmmd_test`.

    Attributes:
        statistic: The MK-MMD estimate of the given labelling.
        p_value: (1 + number of permutations with at least this statistic) / (1 + permutations).
        null: ``[permutations]`` float64, the statistic of each permuted labelling.
    """

    statistic: float
    p_value: float
    null: Tensor


def _prepare(
    source: Tensor,
    target: Tensor,
    alphas: Sequence[float] | Tensor,
    betas: Sequence[float] | Tensor | None,
    kernel: str,
    sigma_sq: float | Tensor | str | None,
    backend: str,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    query: Tensor | None = None,
) -> KernelArguments:
    """Checks the arguments that all functions here share and settles bandwidth and backend."""
    _validation.check_mkmmd(source, target, "biased", sigma_sq, *weights)
    if query is not None:
        _check_query(query, source)
    _validation.check_kernel(kernel, alphas, betas, sigma_sq)
    values = (1.0,) if kernel == "energy" else _validation.check_alphas(alphas, source)
    checked = None if betas is None else _validation.check_betas(betas, len(values), source)
    given = (source, target, query, *weights, sigma_sq, checked)
    tensors = [t for t in given if isinstance(t, Tensor)]
    chosen = _choose(backend, tensors, checked)
    if isinstance(values, Tensor):
        if values.requires_grad:
            raise ValueError("alphas must not require a gradient here; sigma_sq may")
        values = _validation.check_alphas(values.tolist())
    if kernel == "energy":
        bandwidth = torch.ones((), dtype=torch.float64, device=source.device)
    elif sigma_sq is None:
        bandwidth = mean_sq_distance(source, target, *weights).detach()
    elif isinstance(sigma_sq, str):
        bandwidth = median_sq_distance(source, target, *weights)
    elif isinstance(sigma_sq, Tensor):
        bandwidth = sigma_sq
    else:
        bandwidth = torch.tensor(sigma_sq, dtype=torch.float64, device=source.device)
    assert not isinstance(values, Tensor)
    return KernelArguments(bandwidth, values, checked, kernel, chosen)


def _choose(backend: str, tensors: list[Tensor], betas: Tensor | None) -> str:
    learned = betas is not None and betas.requires_grad and torch.is_grad_enabled()
    reason = "betas requires a gradient, which only the reference backend computes"
    return _backends.choose_backend(
        backend,
        BACKENDS,
        {
            "native": lambda: reason if learned else _backends.why_not_native(*tensors),
            "blocked": lambda: reason if learned else None,
        },
    )


def _check_rows(source: Tensor, target: Tensor, needed: int, why: str) -> None:
    for name, sample in (("source", source), ("target", target)):
        if sample.shape[0] < needed:
            raise ValueError(
                f"{name} must have at least {needed} rows for {why}, got {sample.shape[0]}"
            )


def _check_name(name: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def _check_integer(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must lie in {least}..{most}, got {value}")


def _check_query(query: Tensor, source: Tensor) -> None:
    _validation._check_matrix("query", query)
    if query.shape[1] != source.shape[1]:
        raise ValueError(f"query must have shape [q, {source.shape[1]}], got {list(query.shape)}")
    if query.device != source.device:
        raise ValueError(f"query must be on {source.device}, got {query.device}")


def mkmmd_test(
    source: Tensor,
    target: Tensor,
    *,
    permutations: int = 1000,
    alphas: Sequence[float] | Tensor = DEFAULT_ALPHAS,
    betas: Sequence[float] | Tensor | None = None,
    kernel: str = "gaussian",
    sigma_sq: float | Tensor | str | None = None,
    estimator: str = "unbiased",
    seed: int = 0,
    backend: str = "auto",
) -> MKMMDTest:
    """Permutation test of "source and target come from one distribution" with MK-MMD.

    Every kernel value is computed once for all permutations. The bandwidth is that of the pooled
    rows, which no permutation changes, so the test has the level it says at any sample size. The
    native backend holds no kernel matrix: its memory is O((n + m) (D + permutations)).

    Args:
        source: ``[n, D]``; float64, float32, float16 or bfloat16, any strides. No gradient.
        target: ``[m, D]`` on the device of ``source``; n and m may differ.
        permutations: Number P of random labellings, each a set of n of the n + m rows.
        alphas: ``[K]`` bandwidth multipliers, as in :func:`padkern.mkmmd_loss`.
        betas: ``[K]`` weights of the kernels, ones by default.
        kernel: As in :func:`padkern.mkmmd_loss`.
        sigma_sq: Squared bandwidth, as in :func:`padkern.mkmmd_loss`.
        estimator: "unbiased" or "biased". Their p-values agree except for n != m.
        seed: Seed of a ``torch.Generator`` that gives one number per permutation, from which the
            labelling follows: the same for every backend, device and thread count.
        backend: "auto", "native" (CPU), "blocked" (torch in blocks of the kernel matrix, any
            device) or "reference" (torch with the whole matrix).

    Returns:
        MKMMDTest: The statistic, the p-value (1 + k) / (1 + P), and the P permuted statistics.
        k counts the permuted statistics that are at least the given one; those that are smaller
        by rounding alone count too. NaN or Inf in an input gives NaN for both numbers.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Widths or devices differ, a sample is empty, n < 2 or m < 2 for "unbiased", or
            a value is out of range.
        RuntimeError: The named backend cannot run; the message says why.

    Source: Gretton et al. 2012, JMLR 13, section 5; the count that includes the given labelling:
    Phipson and Smyth 2010, arXiv:1603.05766.
    """
    _check_integer("permutations", permutations, 1, 2**31)
    _check_integer("seed", seed, -(2**63), 2**64 - 1)
    _check_name("estimator", estimator, TEST_ESTIMATORS)
    with torch.no_grad():
        k = _prepare(source, target, alphas, betas, kernel, sigma_sq, backend)
    n, m = source.shape[0], target.shape[0]
    if estimator == "unbiased":
        _check_rows(source, target, 2, "estimator 'unbiased'")
    with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
        dtype = compute_dtype(source, target)
        rows = torch.cat([source.to(dtype), target.to(dtype)])
        # Column 0 is the given labelling, so that it shares every rounding with the permuted ones.
        members = _labellings(permutations, n + m, n, seed).to(source.device)
        xx, linear, row_sums = kernel_quadratic(rows, members, *k)
        xy = linear - xx
        yy = row_sums.sum() - linear - xy
        pairs = (n * (n - 1), m * (m - 1)) if estimator == "unbiased" else (n * n, m * m)
        values = (xx / pairs[0] + yy / pairs[1]) - xy * (2 / (n * m))
        if estimator == "biased":
            zero = torch.zeros((), dtype=torch.float64, device=source.device)
            sigma_sq, betas = k.sigma_sq.to(torch.float64), k.betas
            at_zero = kernel_sum(zero, k.alphas, sigma_sq.reshape(()), k.kernel, betas)
            values = values + at_zero * (1 / n + 1 / m)
        given, null = values[0], values[1:]
        # What rounding can do to a statistic: that of a kernel value, averaged over the pairs that
        # a labelling moves, and that of the sums. Labellings that are equal as multisets of rows
        # must count as ties; the null's spread is thousands of times this.
        size = (xx[0].abs() / pairs[0] + yy[0].abs() / pairs[1]) + xy[0].abs() * (2 / (n * m))
        rounding = 32 * torch.finfo(dtype).eps / min(n, m) + 8 * (n + m) * 2.0**-52
        count = (null >= given - rounding * size).sum().to(torch.float64)
        p_value = torch.where(given.isnan(), given, (1 + count) / (1 + permutations))
        statistic, p = torch.stack([given, p_value]).tolist()
    return MKMMDTest(statistic, p, null)


def _labellings(permutations: int, rows: int, chosen: int, seed: int) -> Tensor:
    """[rows, 1 + permutations] uint8 on the CPU: the given labelling, then the random ones."""
    generator = torch.Generator().manual_seed(seed)
    low, high = -(2**63), 2**63 - 1
    seeds = torch.randint(low, high, (permutations,), generator=generator, dtype=torch.int64)
    backend = "reference" if _backends.native_reason() else "native"
    return draw_memberships(seeds, rows, chosen, backend)


def mkmmd_variance(
    source: Tensor,
    target: Tensor,
    *,
    alphas: Sequence[float] | Tensor = DEFAULT_ALPHAS,
    betas: Sequence[float] | Tensor | None = None,
    kernel: str = "gaussian",
    sigma_sq: float | Tensor | str | None = None,
    estimator: str = "unbiased",
    backend: str = "auto",
) -> Tensor:
    """Variance of the unbiased MK-MMD estimate under repeated sampling, from one pair of samples.

    The bandwidth counts as fixed. Needs row sums of the kernel matrix only, in O((n + m) D) memory.

    Args:
        source: ``[n, D]``; float64, float32, float16 or bfloat16, any strides.
        target: ``[m, D]`` on the device of ``source``; n and m may differ.
        alphas: ``[K]`` bandwidth multipliers, as in :func:`padkern.mkmmd_loss`.
        betas: ``[K]`` weights of the kernels, ones by default.
        kernel: As in :func:`padkern.mkmmd_loss`.
        sigma_sq: Squared bandwidth, as in :func:`padkern.mkmmd_loss`.
        estimator: "unbiased": its expectation is the exact variance for any n, m >= 4 and any two
            distributions, equal ones too; single values can be negative. "first_order": never
            negative, needs n, m >= 2; 4 (v_s / n + v_t / m) with the sample variances of the
            witness function over each sample, which leaves out terms of order 1 / n^2.
        backend: As in :func:`mkmmd_test`.

    Returns:
        Tensor: Scalar, squared kernel units; float64 if an input is float64, else float32. First
        derivatives by the samples and by a ``sigma_sq`` tensor.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Widths or devices differ, a sample has too few rows, or a value is out of range.
        RuntimeError: The named backend cannot run; the message says why.

    Source: Sutherland et al. 2017, arXiv:1611.04488, for n = m; the derivation for n != m is in
    ``ops/kernel_products/README.md``.
    """
    _check_name("estimator", estimator, VARIANCE_ESTIMATORS)
    k = _prepare(source, target, alphas, betas, kernel, sigma_sq, backend)
    _check_rows(source, target, 4 if estimator == "unbiased" else 2, f"estimator {estimator!r}")
    with torch.autocast(source.device.type, enabled=False):
        value = _variance.first_order if estimator == "first_order" else _variance.unbiased
        return value(source, target, k)[1].to(compute_dtype(source, target))


def mkmmd_power(
    source: Tensor,
    target: Tensor,
    *,
    alphas: Sequence[float] | Tensor = DEFAULT_ALPHAS,
    betas: Sequence[float] | Tensor | None = None,
    kernel: str = "gaussian",
    sigma_sq: float | Tensor | str | None = None,
    eps: float = 1e-12,
    backend: str = "auto",
) -> Tensor:
    """MK-MMD over its standard deviation, to be maximised by a kernel or features that tell two
    samples apart: for large samples the power of the test grows with it.

    Args:
        source: ``[n, D]``, n >= 2; float64, float32, float16 or bfloat16, any strides.
        target: ``[m, D]``, m >= 2, on the device of ``source``.
        alphas: ``[K]`` bandwidth multipliers, as in :func:`padkern.mkmmd_loss`.
        betas: ``[K]`` weights of the kernels, ones by default. A tensor that requires a gradient is
            left to the reference backend.
        kernel: As in :func:`padkern.mkmmd_loss`.
        sigma_sq: Squared bandwidth, as in :func:`padkern.mkmmd_loss`; a tensor may require a
            gradient.
        eps: Added to the variance, > 0.
        backend: As in :func:`mkmmd_test`.

    Returns:
        Tensor: Scalar ``mmd / sqrt(variance + eps)`` with the unbiased estimate and the
        "first_order" variance of :func:`mkmmd_variance`. First derivatives without a kernel matrix;
        ``backend="reference"`` has them to any order.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: As :func:`mkmmd_variance`, or eps is not positive and finite.
        RuntimeError: The named backend cannot run; the message says why.

    Source: Sutherland et al. 2017, arXiv:1611.04488; Liu et al. 2020, arXiv:2002.09116.
    """
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0.0 < eps < float("inf"):
        raise ValueError(f"eps must be positive and finite, got {eps}")
    k = _prepare(source, target, alphas, betas, kernel, sigma_sq, backend)
    _check_rows(source, target, 2, "the unbiased estimate")
    with torch.autocast(source.device.type, enabled=False):
        mmd, variance = _variance.first_order(source, target, k)
        return (mmd / (variance + eps).sqrt()).to(compute_dtype(source, target))


def mkmmd_witness(
    query: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    alphas: Sequence[float] | Tensor = DEFAULT_ALPHAS,
    betas: Sequence[float] | Tensor | None = None,
    kernel: str = "gaussian",
    sigma_sq: float | Tensor | str | None = None,
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Witness function of MK-MMD: mean_i k(query, source_i) - mean_j k(query, target_j).

    Positive where the source is denser, negative where the target is. Values and gradients come
    from blocks of the kernel matrix; memory beyond inputs and outputs does not grow with q, n or m
    but for a copy of the pooled rows.

    Args:
        query: ``[q, D]``; float64, float32, float16 or bfloat16, any strides.
        source: ``[n, D]`` on the device of ``query``.
        target: ``[m, D]``, likewise; n and m may differ.
        alphas: ``[K]`` bandwidth multipliers, as in :func:`padkern.mkmmd_loss`.
        betas: ``[K]`` weights of the kernels, ones by default. A tensor that requires a gradient is
            left to the reference backend.
        kernel: As in :func:`padkern.mkmmd_loss`.
        sigma_sq: Squared bandwidth, as in :func:`padkern.mkmmd_loss`, from source and target.
        source_weight: ``[n]``, >= 0: a weighted mean. A 0/1 or bool weight is a mask: masked rows,
            even NaN ones, change nothing.
        target_weight: ``[m]``, likewise.
        backend: As in :func:`mkmmd_test`.

    Returns:
        Tensor: ``[q]``; float64 if an input is float64, else float32. First derivatives by query,
        source, target, weights and a ``sigma_sq`` tensor; ``backend="reference"`` has them to any
        order. A query that is not finite gives NaN at its place, a used row that is not NaN
        everywhere.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Widths or devices differ, a sample is empty or masked wholly, or a value is out
            of range.
        RuntimeError: The named backend cannot run; the message says why.

    Source: Gretton et al. 2012, JMLR 13, section 2.3.
    """
    weights = (source_weight, target_weight)
    k = _prepare(source, target, alphas, betas, kernel, sigma_sq, backend, weights, query)
    for name, weight in zip(("source_weight", "target_weight"), weights, strict=True):
        _validation.check_weight_values(name, weight, "biased")
    with torch.autocast(source.device.type, enabled=False):
        dtype = compute_dtype(query, source, target)
        rows = torch.cat([source.to(dtype), target.to(dtype)])
        columns = []
        for sample, weight in ((source, source_weight), (target, target_weight)):
            used = torch.ones(sample.shape[0], dtype=dtype, device=sample.device)
            used = used if weight is None else weight.to(dtype).contiguous()
            columns.append(used / used.sum())
        vector = torch.cat([columns[0], -columns[1]])
        if source_weight is not None or target_weight is not None:
            # Selected away, not multiplied away: a masked row may hold NaN. A used row stands in.
            used = vector != 0
            first = used.to(torch.int8).argmax().reshape(1)
            rows = torch.where(used[:, None], rows, rows.index_select(0, first).detach())
        return kernel_apply(query, rows, vector[:, None], *k)[:, 0].to(dtype)
