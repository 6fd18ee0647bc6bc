"""The launches of one call of the Triton backend, in order: ``prepare``, pair sums, ``finish``.

Nothing here reads a device value, so a call synchronises with nothing and a CUDA graph can hold it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor

from padkern.ops.mkmmd import triton_plan
from padkern.ops.mkmmd.triton_finish import finish_kernel, kernel_sums_kernel
from padkern.ops.mkmmd.triton_gradient import gradient_kernel
from padkern.ops.mkmmd.triton_kernels import value_kernel
from padkern.ops.mkmmd.triton_panel import panel_kernel, product_kernel
from padkern.ops.mkmmd.triton_plan import Tiles, ceil_div
from padkern.ops.mkmmd.triton_prepare import Prepared
from padkern.ops.triton_interpreter import INTERPRET


class PairSums(NamedTuple):
    """What the pair kernels leave to ``finish``.

    Attributes:
        out: Per row tile and part, the sums of the kernels and of slope times x.
        tile: Rows of a row tile.
        parts: In how many parts a row tile met its columns.
        moved: sum_j G_ij z_j, [parts, rows, width].
        row_sum: sum_j G_ij, [parts, rows].
    """

    out: Tensor
    tile: int
    parts: int
    moved: Tensor
    row_sum: Tensor


class Call(Prepared):
    """The pair kernels and what adds their sums."""

    def _positions(self, size: int) -> int:
        """At most so many column tiles meet a row; a tile never mixes samples."""
        return sum(ceil_div(rows, size) for rows in self.max_rows)

    def _pairs(self) -> tuple[Any, ...]:
        """Arguments that the pair kernels begin with."""
        return self.z, self.norm, self.weight, self.params, self.table

    def _profile(self) -> tuple[Any, ...]:
        return self.kernel, self.terms.number, self.terms.ladder, self.betas_given

    def _removes_padding(self) -> bool:
        """Whether padding rows need their weight of 0: the kernel alone is not 0 there."""
        return any(self.weighted) or self.kernel not in ("gaussian", "laplacian")

    def value_sums(self, per_kernel: bool = False) -> PairSums:
        """Sums over unordered pairs; ``per_kernel``, those of each kernel by itself."""
        tiles = self.config.value
        row_tiles = self.total_rows // tiles.m
        parts = triton_plan.value_parts(self._positions(tiles.n))
        block_u = triton.next_power_of_2(self.terms.number)
        out = self.new(row_tiles * parts, 2 * block_u if per_kernel else 1)
        value_kernel[(row_tiles * parts,)](
            *self._pairs(),
            out,
            self.map,
            *self.offsets,
            self.n,
            self.m,
            self.dim,
            self.first_target,
            row_tiles,
            parts,
            *self._profile(),
            per_kernel,
            self._removes_padding(),
            self.product,
            *self.layout,
            tiles.m,
            tiles.n,
            tiles.k,
            block_u,
            INTERPRET,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return PairSums(out, tiles.m, parts, self.nothing, self.nothing)

    def gradient_sums(self) -> PairSums:
        """Sums over ordered pairs, and what the rows' gradients are made of."""
        tiles = self.config.gradient
        row_tiles, positions = self.total_rows // tiles.m, self._positions(tiles.n)
        if self.config.product is not None:
            return self._panels(row_tiles, positions, tiles, self.config.product)
        parts = triton_plan.parts(row_tiles, positions, self.config.resident, self.total_rows)
        out = self.new(row_tiles * parts, 2)
        moved = self.new(parts, self.total_rows, self.width, dtype=self.dtype)
        row_sum = self.new(parts, self.total_rows, dtype=self.dtype)
        gradient_kernel[(row_tiles * parts,)](
            *self._pairs(),
            out,
            moved,
            row_sum,
            self.map,
            *self.offsets,
            self.n,
            self.m,
            self.first_target,
            self.total_rows,
            parts,
            *self._profile(),
            self._removes_padding(),
            self.product,
            *self.layout,
            tiles.m,
            tiles.n,
            INTERPRET,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return PairSums(out, tiles.m, parts, moved, row_sum)

    def _panels(self, row_tiles: int, positions: int, tiles: Tiles, product: Tiles) -> PairSums:
        dtype = self.z.dtype
        area = tiles.m * tiles.n
        height, breadth = triton_plan.panel(
            row_tiles, positions, self.copies * area * dtype.itemsize
        )
        panel = self.new(self.copies, height * breadth * area, dtype=dtype)
        panel_sum = self.new(breadth, height * tiles.m, dtype=self.dtype)
        panel_out = self.new(height, breadth, 2)
        out = self.new(row_tiles, 2)
        moved = self.new(self.total_rows, self.width, dtype=self.dtype)
        row_sum = self.new(self.total_rows, dtype=self.dtype)
        rows = (self.map, *self.offsets, self.n, self.m)
        shared = (self.product, *self.layout, tiles.m, tiles.n)
        pieces = ceil_div(self.width, product.n)
        for first_row in range(0, row_tiles, height):
            for first_column in range(0, positions, breadth):
                rest = min(height, row_tiles - first_row)
                place = (first_row, first_column, rest, breadth)
                panel_kernel[(rest * breadth,)](
                    *self._pairs(),
                    panel,
                    panel_sum,
                    panel_out,
                    *rows,
                    self.dim,
                    self.first_target,
                    *place,
                    *self._profile(),
                    self._removes_padding(),
                    *shared,
                    tiles.k,
                    INTERPRET,
                    num_warps=tiles.warps,
                    num_stages=tiles.stages,
                )
                product_kernel[(rest * pieces,)](
                    self.z,
                    panel,
                    panel_sum,
                    panel_out,
                    moved,
                    row_sum,
                    out,
                    *rows,
                    self.first_target,
                    *place,
                    *shared,
                    product.k,
                    product.n,
                    INTERPRET,
                    num_warps=product.warps,
                    num_stages=product.stages,
                )
        return PairSums(out, tiles.m, 1, moved, row_sum)

    def finish(self, sums: PairSums) -> tuple[Tensor, ...]:
        """The loss; with a gradient also d_source, d_target and d_sigma."""
        shape = (self.problems,) if self.ragged else ()
        value = self.new(*shape, dtype=self.dtype)
        d_source = d_target = d_sigma = self.nothing
        programs = self.problems
        if self.gradient:
            d_source = self.new(self.n, self.dim, dtype=self.dtype)
            d_target = self.new(self.m, self.dim, dtype=self.dtype)
            d_sigma = self.new(*shape)
            if self.ragged:
                # Rows of no problem get no gradient.
                d_source.zero_()
                d_target.zero_()
            programs += self.total_rows // self.strip
        finish_kernel[(programs,)](
            sums.out,
            self.params,
            self.table,
            self.z,
            self.weight,
            sums.moved,
            sums.row_sum,
            value,
            d_sigma,
            d_source,
            d_target,
            self.map,
            *self.offsets,
            self.n,
            self.m,
            self.dim,
            self.first_target,
            self.total_rows,
            self.problems,
            sums.parts,
            self.kernel,
            self.estimator,
            self.terms.number,
            self.gradient,
            self.product,
            *self.layout,
            sums.tile,
            1024,
            self.strip,
            min(128, triton.next_power_of_2(self.dim)),
        )
        return (value, d_source, d_target, d_sigma) if self.gradient else (value,)

    def per_kernel(self) -> tuple[Tensor, Tensor]:
        """Derivatives by alphas and by betas, [K] float64 each, from a pass of their own."""
        count = self.terms.number
        sums = self.value_sums(per_kernel=True)
        d_alphas, d_betas = self.new(count), self.new(count)
        kernel_sums_kernel[(1,)](
            sums.out,
            self.params,
            self.table,
            d_alphas,
            d_betas,
            sums.out.shape[0],
            self.kernel,
            self.estimator,
            count,
            32,
            triton.next_power_of_2(count),
        )
        return d_alphas, d_betas
