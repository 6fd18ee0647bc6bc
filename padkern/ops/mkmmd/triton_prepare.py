"""What comes before the pair kernels: inputs, layout, statistics, packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from padkern.ops.mkmmd import triton_plan
from padkern.ops.mkmmd.reference import ROOT_KERNELS, compute_dtype
from padkern.ops.mkmmd.triton_mean import mean_kernel, table_kernel
from padkern.ops.mkmmd.triton_pack import pack_kernel
from padkern.ops.mkmmd.triton_plan import Terms, ceil_div
from padkern.ops.mkmmd.triton_stats import map_kernel, sum_kernel, weight_kernel
from padkern.ops.triton_interpreter import INTERPRET

# Rows are counted in 32 bits; more of them could not be paired in a lifetime anyway.
MAX_ROWS = 2**30


class Options(NamedTuple):
    """What a call is asked for beside its samples.

    Attributes:
        sigma_sq: One value per problem, or None.
        weights: Of the source and of the target, or None.
        alphas: The numbers; empty where ``alphas_tensor`` stands for them.
        offsets: Of the source and of the target, [problems + 1] int64 each; None: one problem.
        max_rows: At least the rows of the largest source and of the largest target.
    """

    sigma_sq: Tensor | None
    weights: tuple[Tensor | None, Tensor | None]
    alphas_tensor: Tensor | None
    betas: Tensor | None
    alphas: Sequence[float]
    kernel: str
    estimator: str
    precision: str
    offsets: tuple[Tensor, Tensor] | None
    max_rows: tuple[int, int]
    gradient: bool


def _optional(tensor: Tensor | None, nothing: Tensor) -> Tensor:
    return nothing if tensor is None else tensor.detach().reshape(-1).contiguous()


class Prepared:
    """Inputs and layout of one call; ``prepare`` launches what packs its rows."""

    def __init__(self, source: Tensor, target: Tensor, options: Options) -> None:
        self.source, self.target = source.detach(), target.detach()
        self.device, self.dtype = source.device, compute_dtype(source, target)
        self.n, self.dim = source.shape
        self.m = target.shape[0]
        if max(self.n, self.m) > MAX_ROWS:
            raise ValueError(
                f"the triton backend takes at most {MAX_ROWS} rows per sample, "
                f"got {self.n} and {self.m}"
            )
        self.kernel, self.estimator = options.kernel, options.estimator
        self.gradient, self.max_rows = options.gradient, options.max_rows
        self.ragged = options.offsets is not None
        # Stands for arguments that are absent, which no kernel reads.
        self.nothing = torch.empty(0, dtype=torch.float64, device=self.device)
        self.offsets = options.offsets or (self.nothing, self.nothing)
        self.problems = self.offsets[0].shape[0] - 1 if self.ragged else 1
        self.sigma_given = options.sigma_sq is not None
        self.sigma_sq = _optional(options.sigma_sq, self.nothing)
        self.weighted = tuple(weight is not None for weight in options.weights)
        self.weights = tuple(self._weight(weight) for weight in options.weights)
        self.alphas_given = options.alphas_tensor is not None
        self.alphas = _optional(options.alphas_tensor, self.nothing)
        self.betas_given = options.betas is not None
        self.betas = _optional(options.betas, self.nothing)
        self.terms = triton_plan.terms(options.alphas, self.kernel)
        if self.alphas_given:
            self.terms = Terms((0,), 0, 0, self.alphas.shape[0])
        self._choose(options.precision)

    def _weight(self, weight: Tensor | None) -> Tensor:
        if weight is None:
            return self.nothing
        weight = weight.detach()
        return weight.view(torch.uint8) if weight.dtype == torch.bool else weight

    def _choose(self, precision: str) -> None:
        """Product class, tiles and the packed layout they need."""
        bounded = not any(self.weighted) and self.kernel not in ROOT_KERNELS
        self.product = triton_plan.product_class(
            self.source, self.target, precision, self.problems, bounded
        )
        self.config = triton_plan.config(
            self.product,
            self.dim,
            self.max_rows,
            self.n + self.m,
            self.gradient,
            triton_plan.device_class(self.device),
        )
        self.width = self.config.width
        self.copies = triton_plan.COPIES.get(self.product, 1)
        pad = self.config.pad

        def packed(rows: int) -> int:
            if self.ragged:
                return (rows // pad + self.problems) * pad
            return ceil_div(rows, pad) * pad

        self.first_target = packed(self.n)
        self.total_rows = self.first_target + packed(self.m)
        # Rows of a program that only moves data; the interpreter pays per program.
        self.strip = min(pad, 64) if INTERPRET else 16
        self.layout = (self.ragged, pad, self.copies * self.width, self.width)

    def new(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def prepare(self) -> None:
        """Statistics of the pooled rows, then the packed rows and the problems' scalars."""
        pad = self.config.pad
        block_d = min(64, triton.next_power_of_2(self.dim))
        pieces = ceil_div(self.dim, block_d)
        weight_strides = tuple(weight.stride(0) for weight in self.weights)
        strides = (*self.source.stride(), *self.target.stride(), *weight_strides)
        stats = self.nothing
        if any(self.weighted):
            stats = self.new(self.problems, 2, 4)
            weight_kernel[(2 * self.problems,)](
                *self.weights,
                stats,
                *self.offsets,
                self.n,
                self.m,
                *weight_strides,
                *self.weighted,
                self.ragged,
                1024,
            )
        self._map()
        sums = self.new(self.total_rows // pad, 2, self.dim)
        shift = self.new(self.problems, self.dim)
        rows = (*self.offsets, self.n, self.m, self.dim, self.first_target)
        sum_kernel[(self.total_rows // pad * pieces,)](
            self.source,
            self.target,
            *self.weights,
            stats,
            sums,
            shift,
            self.map,
            *rows,
            *strides,
            *self.weighted,
            self.ragged,
            pad,
            32,
            block_d,
        )
        moment = self.new(self.problems, pieces)
        self._mean(stats, sums, shift, moment, rows, pieces, block_d)
        self.params = self.new(self.problems, 16)
        self.z = self.new(
            self.total_rows, self.copies * self.width, dtype=triton_plan.DTYPES[self.product]
        )
        self.norm = self.new(self.total_rows, dtype=self.dtype)
        self.weight = self.new(self.total_rows, dtype=self.dtype)
        pack_kernel[(self.total_rows // self.strip,)](
            self.source,
            self.target,
            *self.weights,
            self.sigma_sq,
            stats,
            shift,
            moment,
            self.table,
            self.params,
            self.z,
            self.norm,
            self.weight,
            self.map,
            *rows,
            *strides,
            pieces,
            self.kernel,
            self.terms.number,
            self.estimator,
            self.product,
            self.sigma_given,
            *self.weighted,
            *self.layout,
            self.strip,
            min(128, triton.next_power_of_2(self.width)),
            triton.next_power_of_2(pieces),
        )

    def _map(self) -> None:
        """Which problem owns which block of packed rows."""
        self.map = self.nothing
        if not self.ragged:
            return
        pad = self.config.pad
        self.map = self.new(self.total_rows // pad, dtype=torch.int32)
        map_kernel[(2 * self.problems,)](
            self.map,
            *self.offsets,
            self.n,
            self.m,
            self.problems,
            self.first_target,
            self.total_rows,
            pad,
            128,
        )

    def _mean(
        self,
        stats: Tensor,
        sums: Tensor,
        shift: Tensor,
        moment: Tensor,
        rows: tuple[Any, ...],
        pieces: int,
        block_d: int,
    ) -> None:
        """Finishes the statistics and writes the table of the kernels."""
        bits, count, order = self.terms.bits, self.terms.number, self.terms.order
        self.table = self.new(256)
        table = (self.table, self.alphas, self.betas)
        given = (self.alphas_given, self.betas_given)

        def eight(first: int) -> tuple[int, ...]:
            some = bits[first : first + 8]
            return (*some, *(bits[0],) * (8 - len(some)), bits[0])

        mean_kernel[(self.problems * pieces,)](
            stats,
            sums,
            shift,
            moment,
            *table,
            *rows,
            *eight(0),
            count,
            order & (2**48 - 1),
            *given,
            self.product,
            any(self.weighted),
            self.ragged,
            self.config.pad,
            16,
            block_d,
        )
        for first in range(8, len(bits), 8):
            later = (order >> (6 * first)) & (2**48 - 1)
            table_kernel[(1,)](*table, *eight(first), first, count, later, *given)
