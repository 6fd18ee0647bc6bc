"""Launchers of the Triton kernels of the catalogue loss. Launches and precision: ``README.md``.

They run on the current stream, read no value on the host and use no atomics; tiles and parts depend
on shapes and dtypes alone: same inputs, same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from padkern.ops.catalogue_loss.triton_gradient import gradient_kernel
from padkern.ops.catalogue_loss.triton_kernels import combine_kernel, mass_kernel
from padkern.ops.launch import dense_rows
from padkern.ops.triton_interpreter import INTERPRET, guard

# Counted on whatever the device, so that a result does not depend on it.
PROCESSORS = 132
MOST_PARTS = 64
# Rows are counted in 32 bits.
MAX_ROWS = 2**30
MOST_GRADIENT_PARTS = 16


class Tiles(NamedTuple):
    """Own rows, walked rows, step along the features, widest tile of features; compiler options."""

    m: int
    n: int
    k: int
    d: int
    warps: int
    stages: int


# Chosen so that nothing is spilled on sm_80 and sm_90. EASY: vectors of features are aligned and no
# token leaves anything out.
EASY_MASS = {
    "half": Tiles(128, 128, 64, 0, 8, 3),
    "float32": Tiles(64, 64, 32, 0, 4, 3),
    "float64": Tiles(32, 32, 16, 0, 4, 2),
}
MASS = EASY_MASS | {"half": Tiles(64, 64, 64, 0, 8, 3), "float32": Tiles(64, 32, 32, 0, 4, 3)}
EASY_GRADIENT = {
    "half": Tiles(64, 64, 64, 256, 8, 2),
    "float32": Tiles(64, 32, 32, 128, 8, 2),
    "float64": Tiles(32, 32, 16, 32, 4, 2),
}
GRADIENT = EASY_GRADIENT | {"half": Tiles(64, 32, 64, 256, 8, 2)}


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().contiguous()


class _Call:
    """One call: dense inputs, sizes, exclusions as sorted keys. Arguments are those of the op."""

    def __init__(
        self,
        users: Tensor,
        items: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        candidates: Tensor | None,
        excluded_values: Tensor | None,
        excluded_offsets: Tensor | None,
    ) -> None:
        self.dtype = torch.float64 if torch.float64 in (users.dtype, items.dtype) else torch.float32
        half = users.dtype == items.dtype and users.dtype.itemsize == 2
        if not half:
            users, items = users.to(self.dtype), items.to(self.dtype)
        self.product = "half" if half else str(self.dtype).removeprefix("torch.")
        self.users, self.items = dense_rows(users), dense_rows(items)
        self.bias, self.candidates = _contiguous(bias), _contiguous(candidates)
        self.tokens, self.dim = users.shape
        self.rows = items.shape[0]
        self.columns = self.rows if candidates is None else candidates.shape[0]
        self.easy = self.dim % 16 == 0 and excluded_values is None
        if max(self.tokens, self.rows) > MAX_ROWS:
            raise ValueError(
                f"the triton backend takes up to {MAX_ROWS} tokens and items, got {self.tokens} "
                f"and {self.rows}"
            )
        self.targets = self.columns_of(targets).to(torch.int32)
        self.values, self.owner = None, None
        if excluded_values is not None and excluded_offsets is not None:
            self.values = self.columns_of(excluded_values)
            # Found by search, so offsets that do not fit reach no foreign memory.
            places = torch.arange(len(excluded_values), device=users.device)
            ends = excluded_offsets[1:].contiguous()
            self.owner = torch.searchsorted(ends, places, right=True).clamp_(max=self.tokens - 1)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.users.device)

    def columns_of(self, ids: Tensor) -> Tensor:
        """Places of items among the columns; -1 where they have none."""
        if self.candidates is None:
            return torch.where((ids >= 0) & (ids < self.rows), ids, -1)
        places = torch.searchsorted(self.candidates, ids.contiguous())
        found = self.candidates[places.clamp(max=self.columns - 1)] == ids
        return torch.where(found, places, -1)

    def keys(self, by_item: bool) -> Tensor | None:
        """Excluded pairs as ascending numbers: own index times walked rows plus walked index."""
        if self.values is None or self.owner is None:
            return None
        if by_item:
            keys = self.values * self.tokens + self.owner
        else:
            keys = self.owner * self.columns + self.values
        # What is no column comes last and is met by nobody.
        return torch.sort(keys.masked_fill(self.values < 0, torch.iinfo(torch.int64).max))[0]

    def sizes(self, keys: Tensor | None, tiles: int) -> tuple[int, ...]:
        entries = 0 if keys is None else keys.shape[0]
        return (
            self.tokens,
            self.columns,
            self.rows,
            self.dim,
            entries,
            entries.bit_length() + 1,
            tiles,
        )

    def tiles(self, easy: dict[str, Tiles], table: dict[str, Tiles]) -> Tiles:
        tile = (easy if self.easy else table)[self.product]
        # The largest step that leaves no rest, if there is one.
        steps = [k for k in (64, 32, 16) if k <= tile.k and self.dim % k == 0]
        if not steps and self.product == "float32":
            steps = [16]
        return tile._replace(k=steps[0]) if steps else tile

    def flags(self, tile: Tiles) -> tuple[Any, ...]:
        given = tuple(x is not None for x in (self.bias, self.candidates, self.values))
        return (*given, self.product, self.dim % tile.k == 0, tile.m, tile.n, tile.k)

    def value(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The loss; largest logit and 1 / mass of every token; the keys by token."""
        tile = self.tiles(EASY_MASS, MASS)
        across = triton.cdiv(self.columns, tile.n)
        down = triton.cdiv(self.tokens, tile.m)
        parts = max(1, min(across, MOST_PARTS, triton.cdiv(2 * PROCESSORS, down)))
        tiles = triton.cdiv(across, parts)
        parts = triton.cdiv(across, tiles)
        top, mass = self.new(parts, self.tokens), self.new(parts, self.tokens, dtype=torch.float64)
        # A target that is nowhere among the columns gives NaN.
        positive = self.new(self.tokens).fill_(float("nan"))
        keys = self.keys(by_item=False)
        mass_kernel[(down, parts)](
            self.users,
            self.users.stride(0),
            self.items,
            self.items.stride(0),
            self.targets,
            self.bias,
            self.candidates,
            keys,
            top,
            mass,
            positive,
            *self.sizes(keys, tiles),
            *self.flags(tile),
            INTERPRET,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        largest, inverse = self.new(self.tokens), self.new(self.tokens)
        losses = self.new(self.tokens, dtype=torch.float64)
        combine_kernel[(triton.cdiv(self.tokens, 128),)](
            top, mass, positive, largest, inverse, losses, self.tokens, parts, 128, num_warps=4
        )
        return (losses.sum() / self.tokens).to(self.dtype), largest, inverse, keys

    def gradient(
        self, largest: Tensor, inverse: Tensor, keys: Tensor | None, *, items: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient by the items (rows of the columns) and the bias, or by the states."""
        tile = self.tiles(EASY_GRADIENT, GRADIENT)
        own, walk = (self.items, self.users) if items else (self.users, self.items)
        own_rows, walk_rows = self.tokens, self.columns
        if items:
            own_rows, walk_rows = walk_rows, own_rows
        features = min(tile.d, max(16, triton.next_power_of_2(self.dim)))
        grid = (triton.cdiv(own_rows, tile.m), triton.cdiv(self.dim, features))
        across = triton.cdiv(walk_rows, tile.n)
        wanted = triton.cdiv(2 * PROCESSORS, grid[0] * max(1, grid[1]))
        parts = max(1, min(across, MOST_GRADIENT_PARTS, wanted))
        tiles = triton.cdiv(across, parts)
        parts = triton.cdiv(across, tiles)
        out = self.new(parts, own_rows, self.dim)
        biased = items and self.bias is not None
        d_bias = self.new(parts, own_rows, dtype=torch.float64) if biased else None
        # Without a feature one program of each tile remains, for the bias.
        gradient_kernel[(grid[0], max(1, grid[1]), parts)](
            own,
            own.stride(0),
            walk,
            walk.stride(0),
            self.targets,
            self.bias,
            self.candidates,
            keys,
            largest,
            inverse,
            out,
            d_bias,
            *self.sizes(keys, tiles),
            items,
            *self.flags(tile),
            features,
            INTERPRET,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        out = out[0] if parts == 1 else out.sum(0)
        return out, None if d_bias is None else d_bias.sum(0).to(self.dtype)

    def scattered(self, x: Tensor) -> Tensor:
        """Rows of the columns as rows of ``items``; 0 where there is no candidate."""
        if self.candidates is None:
            return x
        out = torch.zeros(self.rows, *x.shape[1:], dtype=x.dtype, device=x.device)
        # A candidate out of range has given NaN; its row must not reach foreign memory either.
        return out.index_copy_(0, self.candidates.clamp(0, self.rows - 1), x)


def catalogue_loss_value_triton(users: Tensor, *rest: Any) -> Tensor:
    """The loss: scalar, float64 if users or items are, else float32. Arguments of the op."""
    with guard(users):
        return _Call(users, *rest).value()[0]


def catalogue_loss_value_grad_triton(
    users: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its derivatives by users, items and bias (empty where there is none or it is not
    wanted), all of the dtype of the loss. Arguments of the op."""
    with_users, with_items = (*rest[6:], True, True)[:2]
    with guard(users):
        call = _Call(users, *rest[:6])
        value, largest, inverse, keys = call.value()
        d_users, d_items, d_bias = call.new(0), call.new(0), None
        if with_users:
            d_users, _ = call.gradient(largest, inverse, keys, items=False)
        if with_items:
            by_item = call.keys(by_item=True)
            d_items, d_bias = call.gradient(largest, inverse, by_item, items=True)
            d_items = call.scattered(d_items)
        return value, d_users, d_items, call.new(0) if d_bias is None else call.scattered(d_bias)
