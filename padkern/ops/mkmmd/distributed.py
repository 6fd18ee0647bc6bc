r"""MK-MMD of the rows of all ranks of a process group, without gathering them.

Every rank holds a part of both samples; the parts may differ in size, and a rank may hold no row.
The value is the loss of all rows together, with the same bits on every rank.

**Gradients.** The returned loss counts once for the whole group: each rank gets the derivative of
the global loss by its own rows. A tensor that every rank holds a copy of (``sigma_sq``, ``alphas``,
``betas``) gets 1/world_size of the derivative on each rank, so that the copies' gradients add up to
the derivative. One rule follows for every parameter behind the loss, towers and bandwidth alike:

- Gradients summed over the ranks: use the loss as it is.
- Gradients averaged over the ranks, as DistributedDataParallel does: multiply it by world_size.

**Bandwidth.** With ``sigma_sq=None`` it comes from the broadcast of one row and two all-reduces, of
D numbers and of one, in float64. The origin is a row, so identical rows give exactly 0; the squares
are summed about the mean, so nothing cancels.

**Products.** The ranks form a ring. At step t = 1, ..., world_size // 2, each rank holds the rows
of the rank t further on, sums the kernel over all pairs of one own and one visiting row, and sends
the visiting rows' gradients home. The kernel is symmetric, so half the ring meets every two ranks;
two ranks that are half the ring apart meet twice and share the work. The next visitor travels
during a step's arithmetic, the gradients during the next step's. Rows travel in their own dtype,
gradients in the compute dtype. On the fused backends memory is O((n + m) D), for the largest n + m
of a rank.

All communication is in the forward pass; backward scales what was saved. Every rank of the group
must make the call, also one that needs no gradient. Results do not depend on timing. The host waits
for a GPU before the products, to learn the other ranks' row counts, and not after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from padkern.ops.mkmmd.agreement import Call, Record, agree, check_call, check_group
from padkern.ops.mkmmd.cross import cross_sums
from padkern.ops.mkmmd.exchange import Posted, Shape, Wire, column_sums, products, visiting
from padkern.ops.mkmmd.reference import compute_dtype

SAMPLES = (0, 1)  # source, target


def mkmmd_distributed(
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
    group: dist.ProcessGroup,
    precision: str,
    backend: str,
) -> Tensor:
    """The loss of :func:`padkern.mkmmd_loss` over the rows of all ranks; see this module's text.

    Args:
        source: ``[n, D]``, the rows of this rank; n may be 0 and may differ between ranks.
        target: ``[m, D]``, likewise.
        alphas: ``[K]``, as in :func:`padkern.mkmmd_loss`; like all options equal on every rank.
        betas: ``[K]`` or None.
        kernel: One of the kernels of :func:`padkern.mkmmd_loss`.
        sigma_sq: A number, a Tensor or None. "median" needs all pairs and is refused.
        estimator: "unbiased", "biased" or "tllib"; sizes count over all ranks.
        source_weight: ``[n]`` or None, which counts as ones where another rank gives weights.
        target_weight: ``[m]``, likewise.
        group: The process group; gloo for CPU tensors, nccl for GPU tensors.
        precision: As in :func:`padkern.mkmmd_loss`.
        backend: What forms the products on this rank. Gradients are first derivatives only.

    Returns:
        Tensor: Scalar, the same bits on every rank; float64 if an input is float64, else float32.

    Raises:
        TypeError: An argument of any rank has the wrong type or dtype (on every rank).
        ValueError: An argument of any rank is out of range, ranks differ in the width, a dtype or
            an option, or all rows together are too few (on every rank).
        RuntimeError: torch.distributed is not initialised, or a rank's backend cannot run.
    """
    group = check_group(group)
    check = partial(
        check_call,
        source,
        target,
        alphas=alphas,
        betas=betas,
        kernel=kernel,
        sigma_sq=sigma_sq,
        estimator=estimator,
        source_weight=source_weight,
        target_weight=target_weight,
        precision=precision,
        backend=backend,
    )
    device = source.device if isinstance(source, Tensor) else None
    call, table = agree(group, device, check)
    with torch.no_grad(), torch.autocast(call.source.device.type, enabled=False):
        value, derivatives = _Ring(call, table, group).run()
    leaves = (call.source, call.target, call.sigma_sq, call.alphas, call.betas)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in leaves):
        return _Attach.apply(value, *leaves, *derivatives)
    return value


def _scale(derivative: Tensor, grad_value: Tensor, leaf: Tensor) -> Tensor:
    """Scaled first, cast then: under loss scaling grad_value is 65536."""
    return (derivative * grad_value.to(derivative.dtype)).to(leaf.dtype).reshape(leaf.shape)


class _ScaleOnce(torch.autograd.Function):
    """The same; takes the leaf so that a second derivative meets an error and not a constant."""

    @staticmethod
    def forward(ctx: Any, derivative: Tensor, grad_value: Tensor, leaf: Tensor) -> Tensor:
        return _scale(derivative, grad_value, leaf)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        raise RuntimeError("mkmmd_loss: with group there are first derivatives only")


class _Attach(torch.autograd.Function):
    """Gives the value the derivatives found with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *args: Any) -> Tensor:
        leaves = (t if isinstance(t, Tensor) else None for t in args[:5])
        ctx.save_for_backward(*leaves, *args[5:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        # Grad mode is on here only under create_graph.
        scale = _ScaleOnce.apply if torch.is_grad_enabled() else _scale
        gradients: list[Tensor | None] = [None] * 11
        for i, needed in enumerate(ctx.needs_input_grad[1:6]):
            if needed:
                leaf, derivative = ctx.saved_tensors[i], ctx.saved_tensors[5 + i]
                gradients[1 + i] = scale(derivative, grad_value, leaf)
        return tuple(gradients)


class _Part(NamedTuple):
    """The rows of one sample on one rank."""

    rows: Tensor
    weight: Tensor | None
    used: bool  # holds a row of weight > 0
    wanted: bool  # its gradient is


class _Ring:
    """One evaluation of the loss over the group."""

    def __init__(self, call: Call, table: list[Record], group: dist.ProcessGroup) -> None:
        self.call, self.table = call, table
        self.device = call.source.device
        self.wire = Wire(group, self.device)
        self.rank, self.world = self.wire.rank, self.wire.world
        self.dtype = compute_dtype(call.source, call.target)
        # As for one process: one float64 sample makes the products of the other one float64, too.
        self.dtypes = tuple(
            torch.float64 if self.dtype == torch.float64 else t.dtype
            for t in (call.source, call.target)
        )
        self.weighted = tuple(
            any(getattr(row, f"{name}_weighted") for row in table) for name in ("source", "target")
        )
        self.shared = any(row.sigma_wanted or row.kernels_wanted for row in table)
        self.per_kernel = any(row.kernels_wanted for row in table)
        self.own = self._own()
        self.factors = _factors(table, call.estimator)
        count = len(call.alphas) if self.per_kernel else 0
        zeros = partial(torch.zeros, device=self.device)
        self.value = zeros((), dtype=torch.float64)
        self.rows = [zeros(p.rows.shape if p.wanted else (0,), dtype=self.dtype) for p in self.own]
        self.sigma = zeros((), dtype=torch.float64)
        self.alphas = zeros(count, dtype=torch.float64)
        self.betas = zeros(count, dtype=torch.float64)

    def run(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The value and its derivatives by source, target, sigma_sq, alphas and betas."""
        self.bandwidth = self._bandwidth()
        steps = self.world // 2
        ahead = self._post_rows(1) if steps else None
        self._own_products()
        on_way_home = None
        for step in range(1, steps + 1):
            assert ahead is not None
            visitors = self._visitors(step, ahead.wait())
            ahead = self._post_rows(step + 1) if step < steps else None
            gradients = self._visit((self.rank + step) % self.world, visitors)
            if on_way_home is not None:
                self._take_home(step - 1, on_way_home)
            on_way_home = self._post_gradients(step, visitors, gradients)
        if on_way_home is not None:
            self._take_home(steps, on_way_home)
        return self._finish()

    # ---- arithmetic ------------------------------------------------------------------------------

    def _own(self) -> tuple[_Part, _Part]:
        call, row = self.call, self.table[self.rank]
        parts = []
        for i, (rows, weight) in enumerate(
            ((call.source, call.source_weight), (call.target, call.target_weight))
        ):
            if weight is None and self.weighted[i]:
                weight = torch.ones(rows.shape[0], dtype=self.dtype, device=self.device)
            weight = None if weight is None else weight.detach().to(self.dtype)
            rows = rows.detach().to(self.dtypes[i])
            parts.append(_Part(rows, weight, bool(_kept(row)[i]), bool(_wanted(row)[i])))
        return parts[0], parts[1]

    def _bandwidth(self) -> Tensor | None:
        """The squared bandwidth as a float64 scalar; None for a kernel that has none."""
        if self.call.sigma_sq is not None:
            return self.call.sigma_sq.detach().to(torch.float64).reshape(())
        if self.call.kernel == "energy":
            return None
        width = self.call.source.shape[1]
        origin = torch.zeros(width, dtype=torch.float64, device=self.device)
        first = next(r for r, row in enumerate(self.table) if any(_kept(row)))
        if first == self.rank:
            part = next(p for p in self.own if p.used)
            used = torch.ones_like(part.rows[:, 0]) if part.weight is None else part.weight
            at = (used != 0).to(torch.int8).argmax()
            origin.copy_(part.rows.index_select(0, at[None])[0])
        origin = self.wire.from_rank(first, origin)
        total = sum(row.source_sum + row.target_sum for row in self.table)
        shift = torch.zeros_like(origin)
        for rows, weight in self._shifted(origin):
            shift += column_sums(rows * weight)
        mean = self.wire.sum(shift) / total
        squares = torch.zeros_like(mean)
        for rows, weight in self._shifted(origin):
            squares += column_sums((rows - mean).square_() * weight)
        return 2 * self.wire.sum(column_sums(squares[:, None])[0]) / total

    def _shifted(self, origin: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows less the origin, those of weight 0 as 0, and weights [., 1], in float64."""
        for part in self.own:
            rows = part.rows.double() - origin
            weight = torch.ones_like(rows[:, :1])
            if part.weight is not None:
                weight = part.weight.double()[:, None]
                rows = torch.where(weight != 0, rows, 0)
            yield rows, weight

    def _own_products(self) -> None:
        for a in SAMPLES:
            for b in range(a, 2):
                twice = 1 if a == b else 2
                d_a, d_b = self._product(self.own[a], self.own[b], twice * self.factors[a][b])
                for sample, gradient in ((a, d_a), (b, d_b)):
                    if gradient is not None:
                        self.rows[sample] += gradient
            if self.call.estimator != "biased":
                self._leave_out_diagonal(a)

    def _leave_out_diagonal(self, sample: int) -> None:
        """Takes the pairs of a row with itself, of known value and no gradient, off the sums."""
        row = self.table[self.rank]
        weight = self.factors[sample][sample] * (row.source_squares, row.target_squares)[sample]
        if self.call.kernel == "energy":
            return  # 0 at distance 0
        betas = self.call.betas
        self.value -= weight * (len(self.call.alphas) if betas is None else betas.double().sum())
        if self.per_kernel:
            self.betas -= weight

    def _visit(self, visitor: int, visitors: dict[int, _Part]) -> dict[int, Tensor]:
        """Sums over the pairs with a visitor; returns the gradients of its rows."""
        gradients = {
            b: torch.zeros(part.rows.shape, dtype=self.dtype, device=self.device)
            for b, part in visitors.items()
            if part.wanted
        }
        for a, b in products(self.rank, visitor, self.world):
            d_a, d_b = self._product(self.own[a], visitors[b], 2 * self.factors[a][b])
            if d_a is not None:
                self.rows[a] += d_a
            if d_b is not None:
                gradients[b] += d_b
        return gradients

    def _product(
        self, one: _Part, other: _Part, factor: float
    ) -> tuple[Tensor | None, Tensor | None]:
        """Adds factor * sum_ij w_i w_j k(a_i, b_j); returns its gradients by both, where wanted."""
        if not (one.used and other.used):
            return None, None
        call = self.call
        wanted = one.wanted or other.wanted or self.shared
        sums = cross_sums(
            one.rows,
            other.rows,
            one.weight,
            other.weight,
            alphas=call.alphas,
            betas=call.betas,
            kernel=call.kernel,
            sigma_sq=self.bandwidth,
            precision=call.precision,
            backend=call.backend,
            gradient=wanted,
            per_kernel=self.per_kernel,
        )
        self.value += factor * sums[0].double()
        if not wanted:
            return None, None
        self.sigma += factor * sums[3]
        if self.per_kernel:
            self.alphas += factor * sums[4]
            self.betas += factor * sums[5]
        return (
            factor * sums[1] if one.wanted else None,
            factor * sums[2] if other.wanted else None,
        )

    def _finish(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Adds the ranks' shares up, in rank order, so that every rank gets the same bits."""
        share = torch.cat([self.value[None], self.sigma[None], self.alphas, self.betas])
        totals = torch.zeros_like(share)
        for row in self.wire.gather(share):
            totals += row
        value, sigma = totals[0], totals[1] / self.world
        if self.call.estimator == "tllib":
            value = value + 2 / (sum(row.source_rows for row in self.table) - 1)
        alphas, betas = (totals[2:] / self.world).chunk(2)
        return value.to(self.dtype), (*self.rows, sigma, alphas.clone(), betas.clone())

    # ---- communication ---------------------------------------------------------------------------

    def _post_rows(self, step: int) -> Posted:
        """Own rows go to the rank that this one visits; those of its own visitor come."""
        to, visitor = (self.rank - step) % self.world, (self.rank + step) % self.world
        sends: list[Tensor] = []
        for b in visiting(to, self.rank, self.world):
            part = self.own[b]
            sends += [part.rows] if part.weight is None else [part.rows, part.weight]
        shapes: list[Shape] = []
        for b in visiting(self.rank, visitor, self.world):
            count = _count(self.table[visitor])[b]
            shapes.append(((count, self.call.source.shape[1]), self.dtypes[b]))
            if self.weighted[b]:
                shapes.append(((count,), self.dtype))
        return self.wire.post(sends, to, shapes, visitor)

    def _visitors(self, step: int, received: list[Tensor]) -> dict[int, _Part]:
        visitor = (self.rank + step) % self.world
        row, tensors, parts = self.table[visitor], iter(received), {}
        for b in visiting(self.rank, visitor, self.world):
            rows = next(tensors)
            weight = next(tensors) if self.weighted[b] else None
            parts[b] = _Part(rows, weight, bool(_kept(row)[b]), bool(_wanted(row)[b]))
        return parts

    def _post_gradients(
        self, step: int, visitors: dict[int, _Part], gradients: dict[int, Tensor]
    ) -> Posted:
        """The visiting rows' gradients go home, and those of the own rows come."""
        visitor, host = (self.rank + step) % self.world, (self.rank - step) % self.world
        shapes = [(tuple(self.rows[b].shape), self.dtype) for b in self._wanted_at(host)]
        return self.wire.post(
            [gradients[b] for b in visitors if b in gradients], visitor, shapes, host
        )

    def _take_home(self, step: int, posted: Posted) -> None:
        host = (self.rank - step) % self.world
        for b, gradient in zip(self._wanted_at(host), posted.wait(), strict=True):
            self.rows[b] += gradient

    def _wanted_at(self, host: int) -> list[int]:
        """Own samples whose gradient a host finds."""
        return [b for b in visiting(host, self.rank, self.world) if self.own[b].wanted]


def _count(row: Record) -> tuple[int, int]:
    return int(row.source_rows), int(row.target_rows)


def _kept(row: Record) -> tuple[float, float]:
    return row.source_kept, row.target_kept


def _wanted(row: Record) -> tuple[float, float]:
    return row.source_wanted, row.target_wanted


def _factors(table: list[Record], estimator: str) -> tuple[tuple[float, float], ...]:
    """What multiplies the sum over the ordered pairs of each two samples, from all ranks' sums."""
    n, m = sum(row.source_sum for row in table), sum(row.target_sum for row in table)
    same = []
    for total, squares in (
        (n, sum(row.source_squares for row in table)),
        (m, sum(row.target_squares for row in table)),
    ):
        pairs = total**2 if estimator == "biased" else total**2 - squares
        same.append(1 / pairs if pairs else float("inf"))
    cross = -1 / (n * m) if n * m else float("-inf")
    return (same[0], cross), (cross, same[1])
