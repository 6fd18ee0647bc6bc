"""MK-MMD of every source class with every target class, each kernel tile evaluated once.

Rows come sorted by class. The sums over classes are streamed over tiles of the kernel matrix;
backward streams the tiles again with the coefficients that grad_output gives to each pair of
classes. Memory is O(N D + C^2) and one tile.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from padkern.ops.first_order import first_order_only
from padkern.ops.mkmmd.reference import compute_dtype

# Rows and columns of a tile on the CPU, where it should stay in the cache, and elsewhere.
TILE_ROWS = (512, 2048)
MOST_SQUARINGS = 5
SECOND_ORDER = (
    "mkmmd_per_class: pairs=True is once_differentiable; "
    "use backend='reference' for second derivatives"
)


class ClassPairOptions(NamedTuple):
    """What does not carry a gradient.

    Attributes:
        source_offsets: ``[Cs + 1]``: first row of each source class.
        target_offsets: ``[Ct + 1]``.
        alphas: Bandwidth multipliers.
        kernel: One of ``KERNELS``.
        biased: The estimator with the diagonals; otherwise the unbiased one.
    """

    source_offsets: Sequence[int]
    target_offsets: Sequence[int]
    alphas: Sequence[float]
    kernel: str
    biased: bool


class _Block(NamedTuple):
    rows: slice
    first_class: int  # of the rows in the block
    last_class: int
    members: Tensor  # [rows, classes of the block]: weight of the row in its own class's column


class _Side:
    """One centred sample and its cut into blocks."""

    def __init__(self, points: Tensor, weight: Tensor, offsets: Sequence[int]) -> None:
        self.points = points
        self.squares = points.square().sum(1)
        self.weight = weight
        self.offsets = offsets
        self.tile = TILE_ROWS[points.device.type != "cpu"]
        # Pairs inside a class lie near the diagonal: tiles larger than a class hold mostly others.
        size = len(points) // (len(offsets) - 1)
        self.diagonal_tile = min(self.tile, max(self.tile // 8, size))
        counts = torch.tensor(offsets, device=points.device).diff()
        classes = torch.arange(len(counts), device=points.device)
        self.classes = classes.repeat_interleave(counts, output_size=len(points))
        self.sums = self.per_class(weight)
        self.squared = self.per_class(weight.square())

    def per_class(self, values: Tensor) -> Tensor:
        """float64 [C]: sums of one value per row over each class."""
        sums = torch.zeros(len(self.offsets) - 1, dtype=torch.float64, device=values.device)
        return sums.index_add(0, self.classes, values.double())

    def blocks(self) -> Iterator[_Block]:
        for start in range(0, len(self.points), self.tile):
            stop = min(start + self.tile, len(self.points))
            first, last = (bisect_right(self.offsets, row) - 1 for row in (start, stop - 1))
            rows = slice(start, stop)
            members = self.points.new_zeros(stop - start, last - first + 1)
            column = (self.classes[rows] - first)[:, None]
            members.scatter_(1, column, self.weight[rows, None])
            yield _Block(rows, first, last, members)


def _tile(
    a: _Side, b: _Side, rows: slice, columns: slice, options: ClassPairOptions
) -> tuple[Tensor, Tensor]:
    """Squared distances of a tile, and where they are rounding noise and count as 0."""
    scale = a.squares[rows, None] + b.squares[columns]
    distances = torch.addmm(scale, a.points[rows], b.points[columns].T, alpha=-2)
    noise = 4 * torch.finfo(distances.dtype).eps
    if options.kernel in ("laplacian", "energy"):
        return distances, distances <= noise * scale
    return distances.clamp_(min=0), distances < 0


def _profile(
    distances: Tensor, zero: Tensor, sigma_sq: Tensor, options: ClassPairOptions, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """sum_u k_u(d) and, when wanted, its derivative by d; root kernels take 0 for it at d = 0."""
    if options.kernel == "gaussian":
        return _gaussian(distances, sigma_sq, sorted(options.alphas, reverse=True), slope)
    if options.kernel in ("laplacian", "energy"):
        root = torch.where(zero, 0, distances).sqrt_()
        by_root = torch.where(zero, 0, 0.5 / torch.where(zero, 1, root)) if slope else root
        if options.kernel == "energy":
            return -root, -by_root if slope else None
    value = torch.zeros_like(distances)
    derivative = torch.zeros_like(distances) if slope else None
    for alpha in options.alphas:
        rate = 0.5 / (alpha * sigma_sq)
        if options.kernel == "laplacian":
            rate = (2 * rate).sqrt()
            part = torch.exp(root * -rate)
            part_slope = -rate
        elif options.kernel == "inverse_multiquadric":
            part = (distances * rate).add_(1).rsqrt_()
            part_slope = -0.5 * rate * part.square()
        else:
            assert options.kernel == "rational_quadratic", options.kernel
            part = (distances * rate).add_(1).reciprocal_()
            part_slope = -rate * part
        value += part
        if derivative is not None:
            derivative.addcmul_(part, part_slope)
    if derivative is not None and options.kernel == "laplacian":
        derivative *= by_root
    return value, derivative


def _gaussian(
    distances: Tensor, sigma_sq: Tensor, alphas: Sequence[float], slope: bool
) -> tuple[Tensor, Tensor | None]:
    """The Gaussian sum, alphas in descending order: half of an alpha is the square of its term."""
    value = torch.zeros_like(distances)
    derivative = torch.zeros_like(distances) if slope else None
    term, squared = value, MOST_SQUARINGS
    for u, alpha in enumerate(alphas):
        # A square doubles the relative error, so a chain ends after a few.
        if squared < MOST_SQUARINGS and alphas[u - 1] == 2 * alpha:
            term.mul_(term)
            squared += 1
        else:
            term = torch.exp(distances * (-0.5 / (alpha * sigma_sq)))
            squared = 0
        value += term
        if derivative is not None:
            derivative.add_(term, alpha=1 / alpha)
    if derivative is not None:
        derivative *= -0.5 / sigma_sq
    return value, derivative


class _Problem:
    """Centred samples, bandwidth and normalisation, shared by value and gradient."""

    def __init__(
        self,
        options: ClassPairOptions,
        source: Tensor,
        target: Tensor,
        sigma_sq: Tensor | None,
        source_weight: Tensor | None,
        target_weight: Tensor | None,
    ) -> None:
        self.options = options
        dtype = compute_dtype(source, target)
        weights = [
            torch.ones(len(rows), dtype=dtype, device=rows.device)
            if weight is None
            else weight.to(dtype)
            for rows, weight in ((source, source_weight), (target, target_weight))
        ]
        # No row here has weight 0. The first row goes first: differences to it are exactly 0 when
        # all rows are identical.
        origin = source[0].to(dtype)
        shifted = [rows.to(dtype) - origin for rows in (source, target)]
        total = weights[0].sum() + weights[1].sum()
        mean = sum(w @ rows for w, rows in zip(weights, shifted, strict=True)) / total
        self.source, self.target = (
            _Side(rows - mean, weight, offsets)
            for rows, weight, offsets in zip(
                shifted, weights, (options.source_offsets, options.target_offsets), strict=True
            )
        )
        one = torch.ones((), dtype=dtype, device=source.device)
        self.given = one if sigma_sq is None else sigma_sq.to(dtype)
        self.sigma_sq = torch.where(self.given > 0, self.given, 1)
        self.pairs = [
            side.sums.square() - (0 if options.biased else side.squared)
            for side in (self.source, self.target)
        ]

    def tile(
        self, a: _Side, b: _Side, rows: slice, columns: slice, slope: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(distances, kernel sums, derivatives by the distance) of one tile."""
        distances, zero = _tile(a, b, rows, columns, self.options)
        return distances, *_profile(distances, zero, self.sigma_sq, self.options, slope)

    def triangle(self, side: _Side) -> Iterator[tuple[slice, slice]]:
        """Tiles of one sample with itself that hold pairs of a class, each unordered pair once."""
        size = side.diagonal_tile
        for start in range(0, len(side.points), size):
            stop = min(start + size, len(side.points))
            end = side.offsets[bisect_right(side.offsets, stop - 1)]  # of the last row's class
            for column in range(start, end, size):
                yield slice(start, stop), slice(column, min(column + size, end))

    def same_class(self, side: _Side, rows: slice, columns: slice) -> Tensor:
        """bool: pairs i != j of one class, i and j of the same sample."""
        same = side.classes[rows, None] == side.classes[columns]
        if rows.start == columns.start:
            same.fill_diagonal_(False)
        return same

    def losses(self) -> Tensor:
        """[Cs, Ct] float64."""
        within = []
        for side, pairs in zip((self.source, self.target), self.pairs, strict=True):
            sums = torch.zeros_like(side.sums)
            for rows, columns in self.triangle(side):
                _, values, _ = self.tile(side, side, rows, columns, slope=False)
                values *= self.same_class(side, rows, columns)
                per_row = (values @ side.weight[columns]) * side.weight[rows]
                ordered = 1 if rows.start == columns.start else 2
                sums.index_add_(0, side.classes[rows], ordered * per_row.double())
            if self.options.biased and self.options.kernel != "energy":
                sums = sums + len(self.options.alphas) * side.squared
            within.append(sums / pairs)
        across = within[0].new_zeros(len(self.source.sums), len(self.target.sums))
        for left in self.source.blocks():
            for right in self.target.blocks():
                _, values, _ = self.tile(
                    self.source, self.target, left.rows, right.rows, slope=False
                )
                across[
                    left.first_class : left.last_class + 1, right.first_class : right.last_class + 1
                ] += left.members.T @ (values @ right.members)
        scale = self.source.sums[:, None] * self.target.sums
        return self.finish(within[0][:, None] + within[1] - 2 * across / scale)

    def finish(self, values: Tensor) -> Tensor:
        """Where the bandwidth is 0 every kernel is 1 and all cancels; below 0, or NaN, NaN."""
        degenerate = torch.where(self.given == 0, 0.0, math.nan)
        return torch.where(self.given > 0, values, degenerate.to(values.dtype))

    def gradients(self, grad: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives by the rows of both samples and by the bandwidth; grad is [Cs, Ct].

        ``wanted`` says which of the three are used; the others may be incomplete.
        """
        grad = grad.double()
        out = [torch.zeros_like(side.points) for side in (self.source, self.target)]
        spread = grad.new_zeros(())

        def add(
            a: int, b: int, rows: slice, columns: slice, coefficients: Tensor, slope: Tensor
        ) -> Tensor:
            """Adds the derivatives of sum_ij coefficients_ij k_ij; returns G_ij, those by d_ij."""
            sides = (self.source, self.target)
            g = coefficients.mul_(slope)
            x, y = sides[a].points[rows], sides[b].points[columns]
            if wanted[a]:
                out[a][rows] += 2 * (x * g.sum(1, keepdim=True) - g @ y)
            if wanted[b]:
                out[b][columns] += 2 * (y * g.sum(0)[:, None] - g.T @ x)
            return g

        for index, side in enumerate((self.source, self.target)):
            if not (wanted[index] or wanted[2]):
                continue
            weights = (grad.sum(1 - index) / self.pairs[index]).to(side.points.dtype)
            for rows, columns in self.triangle(side):
                distances, _, slope = self.tile(side, side, rows, columns, slope=True)
                assert slope is not None
                ordered = 1 if rows.start == columns.start else 2
                per_row = ordered * side.weight[rows] * weights[side.classes[rows]]
                coefficients = self.same_class(side, rows, columns) * (
                    per_row[:, None] * side.weight[columns]
                )
                g = add(index, index, rows, columns, coefficients, slope)
                spread += (g * distances).sum(dtype=torch.float64)
        scale = self.source.sums[:, None] * self.target.sums
        weights = (-2 * grad / scale).to(self.source.points.dtype)
        for left in self.source.blocks():
            for right in self.target.blocks():
                distances, _, slope = self.tile(
                    self.source, self.target, left.rows, right.rows, slope=True
                )
                assert slope is not None
                classes = weights[
                    left.first_class : left.last_class + 1, right.first_class : right.last_class + 1
                ]
                coefficients = left.members @ (classes @ right.members.T)
                g = add(0, 1, left.rows, right.rows, coefficients, slope)
                spread += (g * distances).sum(dtype=torch.float64)
        d_sigma = -spread / self.sigma_sq
        return self.finish(out[0]), self.finish(out[1]), self.finish(d_sigma)


class _ClassPairFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        source: Tensor,
        target: Tensor,
        sigma_sq: Tensor | None,
        source_weight: Tensor | None,
        target_weight: Tensor | None,
        options: ClassPairOptions,
    ) -> Tensor:
        with torch.autocast(source.device.type, enabled=False):
            problem = _Problem(options, source, target, sigma_sq, source_weight, target_weight)
            return problem.losses().to(compute_dtype(source, target))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[5]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        arguments = ctx.saved_tensors
        source, target, sigma_sq = arguments[:3]
        with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
            problem = _Problem(ctx.options, *arguments)
            d_source, d_target, d_sigma = problem.gradients(grad, ctx.needs_input_grad)
            gradients = [d_source.to(source.dtype), d_target.to(target.dtype)]
            samples = [source, target, grad]
            if sigma_sq is not None:
                gradients.append(d_sigma.to(sigma_sq.dtype).reshape(sigma_sq.shape))
                samples.append(sigma_sq)
        out: list[Tensor | None] = [None] * 6
        for position, gradient in enumerate(gradients):
            if ctx.needs_input_grad[position]:
                out[position] = first_order_only(SECOND_ORDER, gradient, *samples)
        return tuple(out)


def class_pair_losses(
    source: Tensor,
    target: Tensor,
    sigma_sq: Tensor | None,
    source_weight: Tensor | None,
    target_weight: Tensor | None,
    options: ClassPairOptions,
) -> Tensor:
    """Losses [Cs, Ct] of rows sorted by class; sigma_sq a scalar tensor, None for energy.

    Every row has a class and a weight that is not 0, and every class has enough rows.
    """
    return _ClassPairFunction.apply(source, target, sigma_sq, source_weight, target_weight, options)
