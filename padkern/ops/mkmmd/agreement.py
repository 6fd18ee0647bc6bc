"""What the ranks of a distributed MK-MMD tell each other before they start.

A rank that refused its arguments alone would leave the others waiting for it. So every rank checks
its own, all of them exchange a short record, and whatever is wrong with one is raised on each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from padkern import _backends, _validation
from padkern.ops.mkmmd.exchange import Wire, wire_device
from padkern.ops.mkmmd.reference import DEFAULT_ALPHAS, KERNELS

_PROBLEMS: tuple[type[Exception], ...] = (ValueError, TypeError, RuntimeError)
_TEXT_BYTES = 512
_K = _validation.MAX_ALPHAS


class Call(NamedTuple):
    """The checked arguments of one rank."""

    source: Tensor
    target: Tensor
    source_weight: Tensor | None
    target_weight: Tensor | None
    alphas: tuple[float, ...] | Tensor
    betas: Tensor | None
    kernel: str
    sigma_sq: Tensor | None
    estimator: str
    precision: str
    backend: str


class Record(NamedTuple):
    """What one rank says of itself; every field travels as a float64."""

    problem: float = 0.0  # 1 + index in _PROBLEMS
    width: float = 0.0
    source_dtype: float = 0.0
    target_dtype: float = 0.0
    on_cpu: float = 0.0
    kernel: float = 0.0
    estimator: float = 0.0
    sigma_given: float = 0.0
    sigma: float = 0.0
    kernels: float = 0.0
    betas_given: float = 0.0
    source_rows: float = 0.0
    target_rows: float = 0.0
    source_weighted: float = 0.0
    target_weighted: float = 0.0
    source_kept: float = 0.0  # rows of weight > 0
    target_kept: float = 0.0
    source_sum: float = 0.0  # of the weights
    target_sum: float = 0.0
    source_squares: float = 0.0
    target_squares: float = 0.0
    source_wanted: float = 0.0  # a gradient by these is wanted
    target_wanted: float = 0.0
    sigma_wanted: float = 0.0
    kernels_wanted: float = 0.0
    alphas: tuple[float, ...] = ()
    betas: tuple[float, ...] = ()


_SCALARS = len(Record._fields) - 2


def check_group(group: object) -> dist.ProcessGroup:
    """Returns the group if this rank can take part in it."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "group needs torch.distributed to be initialised: call "
            "torch.distributed.init_process_group first"
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must hold this rank: new_group left it out")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or None, got {type(group).__name__}")
    return group


def agree(
    group: dist.ProcessGroup, device: torch.device | None, check: Callable[[], Call]
) -> tuple[Call, list[Record]]:
    """Runs ``check`` on every rank and exchanges the records, in rank order.

    Raises:
        ValueError, TypeError, RuntimeError: On all ranks, when one of them failed its check, when
            they differ in what must be equal, or when all rows together are too few.
    """
    error: Exception | None = None
    call, record = None, Record()
    try:
        call = check()
        wire_device(group, call.source.device)
        record = _describe(call)
    except Exception as caught:
        error = caught
        kinds = [i for i, kind in enumerate(_PROBLEMS) if isinstance(caught, kind)]
        record = Record(problem=1.0 + (kinds[0] if kinds else _PROBLEMS.index(RuntimeError)))
    wire = Wire(group, _record_device(group, device))
    table = [_decode(row) for row in wire.gather(_encode(record)).tolist()]
    if any(row.problem for row in table):
        _raise_together(error, table, wire)
    assert call is not None
    _check_equal(table)
    _check_enough(table, call.estimator)
    return call, table


def check_call(
    source: Tensor,
    target: Tensor,
    *,
    alphas: Sequence[float] | Tensor,
    betas: Sequence[float] | Tensor | None,
    kernel: str,
    sigma_sq: float | Tensor | str | None,
    estimator: str,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    precision: str,
    backend: str,
) -> Call:
    """The checks of :func:`padkern.mkmmd_loss` that one rank can make; it may have no rows."""
    x, wx = _at_least_one_row(source, source_weight)
    y, wy = _at_least_one_row(target, target_weight)
    # How many rows an estimator needs is asked of all ranks together.
    known = estimator in _validation.ESTIMATORS
    _validation.check_mkmmd(x, y, "biased" if known else estimator, sigma_sq, wx, wy)
    if isinstance(sigma_sq, str):
        raise ValueError(
            "sigma_sq='median' needs every pair of rows and cannot be used with group; "
            "give a number, a Tensor or None"
        )
    if kernel == "energy" and isinstance(alphas, tuple) and alphas == (1.0,):
        alphas = DEFAULT_ALPHAS  # what mkmmd_loss hands on for a kernel without multipliers
    _validation.check_kernel(kernel, alphas, betas, sigma_sq)
    _validation.check_precision(precision)
    values = (1.0,) if kernel == "energy" else _validation.check_alphas(alphas, source)
    weights = None if betas is None else _validation.check_betas(betas, len(values), source)
    for name, weight in (("source_weight", source_weight), ("target_weight", target_weight)):
        if weight is None:
            continue
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, which is not computed with group")
        negative = (weight.detach() < 0).nonzero()
        if len(negative):
            row = int(negative[0])
            raise ValueError(f"{name} must be >= 0, got {float(weight[row]):g} at row {row}")
    if sigma_sq is not None and not isinstance(sigma_sq, Tensor):
        sigma_sq = torch.tensor(sigma_sq, dtype=torch.float64, device=source.device)
    given = (source, target, sigma_sq, source_weight, target_weight, values, weights)
    tensors = [t for t in given if isinstance(t, Tensor)]
    chosen = _backends.choose_backend(
        backend,
        _backends.MKMMD_BACKENDS,
        {
            "native": lambda: _backends.why_not_native(*tensors),
            "triton": lambda: _backends.why_not_triton(*tensors),
            "cuda": lambda: _backends.why_not_cuda(*tensors),
        },
        automatic=("native",),
    )
    return Call(
        source,
        target,
        source_weight,
        target_weight,
        values,
        weights,
        kernel,
        sigma_sq,
        estimator,
        precision,
        chosen,
    )


def _at_least_one_row(sample: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A stand-in of one row for an empty sample, so that its other properties can be checked."""
    if not isinstance(sample, Tensor) or sample.dim() != 2 or sample.shape[0] > 0:
        return sample, weight
    if isinstance(weight, Tensor) and tuple(weight.shape) == (0,):
        weight = weight.new_ones(1)
    return sample.new_zeros((1, sample.shape[1])), weight


def _describe(call: Call) -> Record:
    grad = torch.is_grad_enabled()

    def wanted(*tensors: object) -> float:
        return float(grad and any(isinstance(t, Tensor) and t.requires_grad for t in tensors))

    def numbers(values: Sequence[float] | Tensor | None) -> tuple[float, ...]:
        if isinstance(values, Tensor):
            return tuple(values.detach().double().tolist())
        return tuple(values or ())

    source, target = (
        _weight_sums(rows, weight)
        for rows, weight in ((call.source, call.source_weight), (call.target, call.target_weight))
    )
    return Record(
        width=call.source.shape[1],
        source_dtype=_validation.FLOAT_DTYPES.index(call.source.dtype),
        target_dtype=_validation.FLOAT_DTYPES.index(call.target.dtype),
        on_cpu=float(call.source.device.type == "cpu"),
        kernel=KERNELS.index(call.kernel),
        estimator=_validation.ESTIMATORS.index(call.estimator),
        sigma_given=float(call.sigma_sq is not None),
        sigma=0.0 if call.sigma_sq is None else float(call.sigma_sq),
        kernels=len(call.alphas),
        betas_given=float(call.betas is not None),
        source_rows=call.source.shape[0],
        target_rows=call.target.shape[0],
        source_weighted=float(call.source_weight is not None),
        target_weighted=float(call.target_weight is not None),
        source_kept=source[0],
        target_kept=target[0],
        source_sum=source[1],
        target_sum=target[1],
        source_squares=source[2],
        target_squares=target[2],
        source_wanted=wanted(call.source),
        target_wanted=wanted(call.target),
        sigma_wanted=wanted(call.sigma_sq),
        kernels_wanted=wanted(call.alphas, call.betas),
        alphas=numbers(call.alphas),
        betas=numbers(call.betas),
    )


def _weight_sums(rows: Tensor, weight: Tensor | None) -> tuple[float, float, float]:
    """How many rows count, the sum of the weights and that of their squares."""
    if weight is None:
        return (float(rows.shape[0]),) * 3
    w = weight.detach().double().cpu().numpy()  # numpy adds in one order, whatever the threads
    return float((w != 0).sum()), float(w.sum()), float((w * w).sum())


def _encode(record: Record) -> Tensor:
    row = [*record[:_SCALARS]]
    for values in (record.alphas, record.betas):
        row += [*values, *(0.0 for _ in range(_K - len(values)))]
    return torch.tensor(row, dtype=torch.float64)


def _decode(row: list[float]) -> Record:
    scalars = Record(*row[:_SCALARS])  # type: ignore[arg-type]
    count = int(scalars.kernels)
    alphas = tuple(row[_SCALARS : _SCALARS + count])
    betas = tuple(row[_SCALARS + _K : _SCALARS + _K + count]) if scalars.betas_given else ()
    return scalars._replace(alphas=alphas, betas=betas)


def _record_device(group: dist.ProcessGroup, device: torch.device | None) -> torch.device:
    """Any device the group carries: the arguments it would be taken from may be the bad ones."""
    for candidate in (torch.device("cpu"), device):
        try:
            if candidate is not None:
                return wire_device(group, candidate)
        except ValueError:
            continue
    return torch.device("cuda", torch.cuda.current_device())


def _raise_together(error: Exception | None, table: list[Record], wire: Wire) -> None:
    """Raises the first failing rank's error on all ranks; that rank keeps its own traceback."""
    text = b"" if error is None else str(error).encode()[:_TEXT_BYTES]
    padded = torch.tensor([*text, *(0 for _ in range(_TEXT_BYTES - len(text)))], dtype=torch.uint8)
    texts = wire.gather(padded).tolist()
    rank = next(i for i, row in enumerate(table) if row.problem)
    message = bytes(texts[rank]).rstrip(b"\0").decode(errors="replace")
    raise _PROBLEMS[int(table[rank].problem) - 1](f"rank {rank}: {message}") from error


def _check_equal(table: list[Record]) -> None:
    """Raises ValueError where the ranks differ in what the loss of them all has only one of."""

    def number(value: float) -> str:
        return f"{value:.17g}"

    def dtype(value: float) -> str:
        return str(_validation.FLOAT_DTYPES[int(value)])

    shown: dict[str, tuple[str, Callable[..., str]]] = {
        "width": ("the width D of source and target", lambda v: str(int(v))),
        "source_dtype": ("the dtype of source", dtype),
        "target_dtype": ("the dtype of target", dtype),
        "on_cpu": ("the kind of device", lambda v: "a CPU" if v else "a GPU"),
        "kernel": ("kernel", lambda v: KERNELS[int(v)]),
        "estimator": ("estimator", lambda v: _validation.ESTIMATORS[int(v)]),
        "sigma_given": ("sigma_sq", lambda v: "a value" if v else "None"),
        "sigma": ("sigma_sq", number),
        "alphas": ("alphas", lambda v: "(" + ", ".join(f"{a:g}" for a in v) + ")"),
        "betas_given": ("betas", lambda v: "values" if v else "None"),
        "betas": ("betas", lambda v: "(" + ", ".join(f"{b:g}" for b in v) + ")"),
    }
    for field, (name, show) in shown.items():
        first = getattr(table[0], field)
        for rank, row in enumerate(table):
            value = getattr(row, field)
            if repr(value) != repr(first):  # NaN equals NaN here
                raise ValueError(
                    f"{name} must be the same on every rank of group, got {show(first)} on rank 0 "
                    f"and {show(value)} on rank {rank}"
                )


def _check_enough(table: list[Record], estimator: str) -> None:
    """What an estimator asks of the sizes, asked of all ranks together."""
    needed = 1 if estimator == "biased" else 2
    for name in ("source", "target"):
        rows = sum(int(getattr(row, f"{name}_rows")) for row in table)
        kept = sum(int(getattr(row, f"{name}_kept")) for row in table)
        if rows < needed:
            raise ValueError(
                f"{name} must have at least {needed} rows over all ranks of group for estimator "
                f"{estimator!r}, got {rows}"
            )
        if kept < needed:
            raise ValueError(
                f"{name}_weight must leave at least {needed} rows over all ranks of group, "
                f"leaves {kept}"
            )
    if estimator != "tllib":
        return
    if any(row.source_weighted or row.target_weighted for row in table):
        raise ValueError("estimator 'tllib' takes no source_weight or target_weight")
    n, m = (
        int(sum(getattr(row, f"{name}_rows") for row in table)) for name in ("source", "target")
    )
    if n != m:
        raise ValueError(
            f"estimator 'tllib' needs equal sizes, got {n} source rows and {m} target rows over "
            "all ranks of group"
        )
