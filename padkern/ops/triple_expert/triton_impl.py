"""Launchers of the Triton kernels of the gated loss. Launches and memory: ``README.md``.

They run on the current stream, read no value on the host and use no atomics; all sums have an order
that the ids alone fix: same inputs, same bits.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from padkern.ops.launch import dense_rows
from padkern.ops.triple_expert.triton_kernels import (
    item_kernel,
    piece_kernel,
    token_kernel,
    user_gradient_kernel,
)
from padkern.ops.triton_arguments import float64_bits
from padkern.ops.triton_bins import bin_sums
from padkern.ops.triton_interpreter import guard

ELEMENTS = 1024  # of a tile of 4-byte numbers
WIDEST = 1024  # columns of a tile
PIECE = 64  # sorted slots that long sums are cut into
STEP = 16  # slots, or pieces, added at a time
ITEMS = 4  # per program


class _Call:
    """One call: dense inputs, sizes and tiles. Arguments are those of the op."""

    def __init__(
        self,
        users: Tensor,
        item_tables: Tensor,
        gate: Tensor,
        item_bins: Tensor,
        positives: Tensor,
        negatives: Tensor,
        valid: Tensor | None,
        positive_weight: float,
    ) -> None:
        self.users, self.tables = dense_rows(users), dense_rows(item_tables)
        self.gate, self.item_bins = gate.detach().contiguous(), item_bins.contiguous()
        self.positives, self.negatives = positives.contiguous(), negatives.contiguous()
        self.valid = None if valid is None else valid.contiguous()
        self.weight_bits = float64_bits(positive_weight)
        self.tokens, self.experts, self.dim = users.shape
        self.rows, self.bins, self.k = item_tables.shape[1], gate.shape[0], negatives.shape[1]
        self.width = self.experts * self.dim
        self.double = torch.float64 in (users.dtype, item_tables.dtype)
        self.dtype = torch.float64 if self.double else torch.float32
        elements = ELEMENTS // 2 if self.double else ELEMENTS
        self.block_f = min(WIDEST, max(16, triton.next_power_of_2(self.width)))
        self.block_t = max(1, min(32, elements // self.block_f))
        self.whole = self.width <= self.block_f

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.users.device)

    def score(self, delta: Tensor | None, d_users: Tensor | None) -> Tensor:
        """The loss; fills the derivatives by the scores and, where one tile holds it, the user
        gradient."""
        programs = triton.cdiv(self.tokens, self.block_t)
        losses = self.new(programs, dtype=torch.float64)
        token_kernel[(programs,)](
            self.users,
            self.users.stride(0),
            self.users.stride(1),
            self.tables,
            self.tables.stride(0),
            self.tables.stride(1),
            self.gate,
            self.item_bins,
            self.positives,
            self.negatives,
            self.valid,
            None if self.valid is None else self.valid.sum(),
            losses,
            delta,
            d_users,
            self.tokens,
            self.experts,
            self.dim,
            self.rows,
            self.bins,
            self.k,
            self.weight_bits,
            self.valid is not None,
            delta is not None,
            self.whole,
            self.double,
            self.block_t,
            self.block_f,
            num_warps=4,
        )
        return losses.sum().to(self.dtype)

    def user_gradient(self, delta: Tensor, d_users: Tensor) -> None:
        """The user gradient from the derivatives by the scores, tile by tile."""
        grid = (triton.cdiv(self.tokens, self.block_t), triton.cdiv(self.width, self.block_f))
        user_gradient_kernel[grid](
            self.tables,
            self.tables.stride(0),
            self.tables.stride(1),
            self.gate,
            self.item_bins,
            self.positives,
            self.negatives,
            self.valid,
            delta,
            d_users,
            self.tokens,
            self.experts,
            self.dim,
            self.rows,
            self.bins,
            self.k,
            self.valid is not None,
            self.double,
            self.block_t,
            self.block_f,
            num_warps=4,
        )

    def sorted_slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """Items of the slots in ascending order, the slots in that order (their own within an
        item), and where each item begins. Slots of no item come last."""
        ids = torch.cat([self.positives[:, None], self.negatives], 1)
        out = (ids < 0) | (ids >= self.rows)
        if self.valid is not None:
            out |= ~self.valid[:, None]
        ids = ids.masked_fill(out, self.rows).flatten()
        if self.rows < 2**31 - 1:  # half the passes of the sort
            ids = ids.to(torch.int32)
        ids, order = torch.sort(ids, stable=True)
        bounds = torch.arange(self.rows + 1, dtype=ids.dtype, device=ids.device)
        return ids, order, torch.searchsorted(ids, bounds)

    def item_gradients(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the tables and of the gate."""
        d_tables = self.new(self.experts, self.rows, self.dim)
        inner = self.new(self.experts, self.rows)
        ids, order, starts = self.sorted_slots()
        pieces = ids.shape[0] // PIECE
        sums = self.new(pieces, self.width)
        sizes = (self.k + 1, self.double, PIECE, STEP)
        if pieces:
            across = min(128, self.block_f)
            piece_kernel[(pieces, triton.cdiv(self.width, across))](
                self.users,
                self.users.stride(0),
                self.users.stride(1),
                ids,
                order,
                delta,
                sums,
                self.rows,
                self.experts,
                self.dim,
                *sizes,
                across,
                num_warps=4,
            )
        item_kernel[(triton.cdiv(self.rows, ITEMS), self.experts)](
            self.users,
            self.users.stride(0),
            self.users.stride(1),
            self.tables,
            self.tables.stride(0),
            self.tables.stride(1),
            self.gate,
            self.item_bins,
            starts,
            order,
            delta,
            sums,
            d_tables,
            inner,
            self.rows,
            self.experts,
            self.dim,
            self.bins,
            *sizes,
            ITEMS,
            min(128, max(16, triton.next_power_of_2(self.dim))),
            num_warps=4,
        )
        return d_tables, bin_sums(inner, self.item_bins, self.bins)


def gated_bce_value_triton(
    users: Tensor,
    item_tables: Tensor,
    gate: Tensor,
    item_bins: Tensor,
    positives: Tensor,
    negatives: Tensor,
    valid: Tensor | None,
    positive_weight: float = 1.0,
) -> Tensor:
    """The loss: scalar, float64 if users or item_tables are, else float32. Any float dtypes."""
    arrays = (users, item_tables, gate, item_bins, positives, negatives, valid)
    call = _Call(*arrays, positive_weight)
    if call.tokens == 0:
        return call.new().zero_()
    with guard(users):
        return call.score(None, None)


def gated_bce_value_grad_triton(
    users: Tensor,
    item_tables: Tensor,
    gate: Tensor,
    item_bins: Tensor,
    positives: Tensor,
    negatives: Tensor,
    valid: Tensor | None,
    positive_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its derivatives, all of the dtype of the loss: (value, [T, E, d],
    [E, N + 1, d], [bins + 1, E])."""
    arrays = (users, item_tables, gate, item_bins, positives, negatives, valid)
    call = _Call(*arrays, positive_weight)
    if call.tokens == 0:
        shapes = ((), users.shape, item_tables.shape, gate.shape)
        value, d_users, d_tables, d_gate = (call.new(*shape).zero_() for shape in shapes)
        return value, d_users, d_tables, d_gate
    with guard(users):
        d_users = call.new(*users.shape)
        delta = call.new(call.tokens, call.k + 1)
        value = call.score(delta, d_users)
        if call.width == 0:
            return value, d_users, call.new(*item_tables.shape), call.new(*gate.shape).zero_()
        if not call.whole:
            call.user_gradient(delta, d_users)
        return value, d_users, *call.item_gradients(delta)
