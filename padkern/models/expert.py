"""One expert: item tower (what an item is) and encoder (what a user wants next)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from padkern.data.batch import PackedSequences
from padkern.models.encoder import SequenceEncoder
from padkern.models.projection import Linear, project
from padkern.models.text_maps import MixedProjection, TextProjection
from padkern.ops.segments import expand

TOWER_KINDS = ("id", "text", "fused")
FUSES = ("sum", "cat", "null_space")


def item_vectors(table: Tensor, packed: PackedSequences) -> Tensor:
    """``[T, d]`` rows of ``table`` for the packed items.

    On a GPU their gradient is a segment sum where the batch plan has the segments. On the CPU
    torch's scatter is as good and has less around it.
    """
    if packed.groups is None or table.is_cpu:
        return table.index_select(0, packed.items)
    return expand(table, packed.items, *packed.groups)


class ItemTower(nn.Module):
    """Item vectors from IDs, from text, or from both.

    Args:
        kind: ``"id"``: one free vector per item; ``"text"``: projected text; ``"fused"``: both.
        num_items: catalogue size N.
        text_dim: width E of the text matrix (ignored by ``"id"``).
        dim: width d.
        fuse: how ``"fused"`` joins the two: ``"sum"``; ``"cat"`` (the authors' dropout,
            Linear(2d -> d), GELU on the concatenation); or ``"null_space"``: the first
            ``d - null_dim`` text columns as they are, and IDs in coordinates of their own, where
            the text has nothing to say and the IDs nothing to overwrite.
        null_dim: width of the IDs with ``"null_space"``.
        hidden_layers: see :class:`padkern.models.text_maps.TextProjection`.
        text_maps: above 1, text goes through that many maps that every item mixes in its own way,
            beside a shared one, :class:`padkern.models.text_maps.MixedProjection`.
        dropout: inside the projection and the ``"cat"`` map.

    Raises:
        ValueError: an unknown kind or fuse, a null space that does not fit, or several maps with
            hidden layers or a null space.

    Source: ``"null_space"`` after AlphaFuse, Hu et al. 2025, arXiv:2504.19218, with the principal
    components of the text (``text.pca``) as the row space.
    """

    def __init__(
        self,
        kind: str,
        num_items: int,
        text_dim: int,
        dim: int,
        *,
        fuse: str = "sum",
        null_dim: int = 32,
        hidden_layers: int = 0,
        text_maps: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if kind not in TOWER_KINDS:
            raise ValueError(f"kind must be one of {TOWER_KINDS}, got {kind!r}")
        if fuse not in FUSES:
            raise ValueError(f"fuse must be one of {FUSES}, got {fuse!r}")
        self.kind = kind
        self.join: nn.Sequential | None = None
        #: Text columns taken as they are; None where the text is projected.
        self.text_columns: int | None = None
        if kind == "fused" and fuse == "null_space":
            if not 0 < null_dim < dim or text_dim < dim - null_dim:
                raise ValueError(
                    f"null_dim must be from 1 to {dim - 1} and leave at most {text_dim} of {dim} "
                    f"coordinates to the text, got {null_dim}"
                )
            self.text_columns = dim - null_dim
        if kind != "text":
            width = dim if self.text_columns is None else null_dim
            self.id = nn.Parameter(torch.zeros(num_items + 1, width))
        null_space = kind == "fused" and fuse == "null_space"
        if text_maps < 1 or (text_maps > 1 and (hidden_layers or null_space)):
            raise ValueError(
                "text_maps must be at least 1, and 1 with hidden layers or null_space, "
                f"got {text_maps}, {hidden_layers} hidden layers and fuse {fuse!r}"
            )
        if kind != "id" and self.text_columns is None:
            self.project = (
                MixedProjection(text_dim, dim, maps=text_maps, dropout=dropout)
                if text_maps > 1
                else TextProjection(text_dim, dim, hidden_layers=hidden_layers, dropout=dropout)
            )
        if kind == "fused" and fuse == "cat":
            self.join = nn.Sequential(nn.Dropout(dropout), Linear(2 * dim, dim), nn.GELU())

    def projected_text(self, text: Tensor) -> Tensor:
        """``[N + 1, d]`` projected text; the padding row stays zero with one linear map.

        With ``"null_space"`` the text columns ``[N + 1, d - null_dim]``.
        """
        if self.text_columns is not None:
            return text[:, : self.text_columns]
        return self.project(text)

    def forward(
        self, text: Tensor, id_scale: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Vectors of the whole catalogue, or of some of its items.

        Args:
            text: ``[N + 1, E]`` text matrix, row 0 zero; with ``rows`` its rows ``[U, E]``.
            id_scale: ``[N + 1]`` factor on the ID vectors; 0 makes an item look unseen.
            rows: ``[U]`` item ids, each once; default all.

        Returns:
            ``[N + 1, d]``, or ``[U, d]`` with ``rows``.
        """
        if rows is not None:
            id_scale = None if id_scale is None else id_scale.index_select(0, rows)
        if self.kind == "text":
            return self.projected_text(text)
        ids = self.id if rows is None else self.id.index_select(0, rows)
        ids = ids if id_scale is None else ids * id_scale[:, None]
        if self.kind == "id":
            return ids
        words = self.projected_text(text)
        if self.text_columns is not None:
            return torch.cat([words, ids], 1)
        if self.join is None:
            return ids + words
        return self.join(torch.cat([ids, words], 1))


class RecencyPool(nn.Module):
    """Learned, lag-weighted sum of a sequence's item vectors.

    The state of token t is ``sum_j w[t - j] x_j`` with w positive, starting at ``decay ** lag``:
    the untrained text nearest-neighbour ranker, kept as a path beside the encoder because training
    on warm items drifts away from the geometry that unseen items need.
    """

    lag: Tensor
    causal: Tensor

    def __init__(self, max_len: int, decay: float = 0.6) -> None:
        super().__init__()
        lags = torch.arange(max_len, dtype=torch.float32)
        self.log_weight = nn.Parameter(lags * math.log(decay))
        lag = lags[:, None] - lags[None, :]
        self.register_buffer("lag", lag.clamp_min(0).long(), persistent=False)
        self.register_buffer("causal", (lag >= 0).float(), persistent=False)

    def forward(
        self, x: Tensor, packed: PackedSequences, scale: Tensor | float = 1.0, *, last: bool = False
    ) -> Tensor:
        """``[T, d]`` from ``[T, d]``, times the scalar ``scale``; ``[B, d]``, those of the last
        tokens, with ``last``.

        The bits do not depend on the number of threads: the product is that of `project`, and the
        scale multiplies the weights, so that its gradient sums over few numbers.
        """
        width, batch = packed.width, packed.batch_size
        grid = x.new_zeros(batch * width, x.shape[1])
        grid = grid.index_copy(0, packed.grid, x).view(batch, width, x.shape[1])
        weight = self.log_weight.exp()[self.lag[:width, :width]] * self.causal[:width, :width]
        weight = weight * scale
        if last:
            ends = weight.index_select(0, packed.last - packed.offsets[:-1])
            return (ends[:, :, None] * grid).sum(1)
        columns = grid.transpose(1, 2).reshape(batch * x.shape[1], width)
        pooled = project(columns, weight).view(batch, x.shape[1], width).transpose(1, 2)
        return pooled.reshape(batch * width, x.shape[1]).index_select(0, packed.grid)


class Expert(nn.Module):
    """Item tower and encoder that share the item vectors (inputs and candidates are one table).

    Args:
        tower: called like an :class:`ItemTower`; gives ``[N + 1, d]`` vectors.
        encoder: packed item vectors to states.
        pool_decay: adds a :class:`RecencyPool` path with this starting decay; ``None`` for none.
        pool_scale: starting factor of that path.
    """

    def __init__(
        self,
        tower: nn.Module,
        encoder: SequenceEncoder,
        *,
        pool_decay: float | None = None,
        pool_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.encoder = encoder
        self.pool = None if pool_decay is None else RecencyPool(encoder.max_len, pool_decay)
        if self.pool is not None:
            self.pool_scale = nn.Parameter(torch.tensor(float(pool_scale)))

    def encode(self, table: Tensor, packed: PackedSequences, *, last: bool = False) -> Tensor:
        """``[T, d]`` states of packed tokens whose item vectors are rows of ``table``.

        ``[B, d]``, those of each sequence's last token, with ``last``.
        """
        x = item_vectors(table, packed)
        state = self.encoder(x, packed, last=last)
        if self.pool is not None:
            state = state + self.pool(x, packed, self.pool_scale, last=last)
        return state


class TextSpaceExpert(nn.Module):
    """Language expert that scores in the text space itself.

    Items keep their frozen text vectors, so an item without a single interaction is scored by the
    same geometry as any other. Only the user side learns: a recency-weighted sum of the history's
    text vectors (at the start: the text nearest-neighbour ranker) plus a correction by an encoder
    that works in width d and is mapped back, starting at zero.

    Args:
        text_dim: width E of the text matrix, and of states and item vectors.
        encoder: encoder of width d.
        pool_decay: starting decay of the recency weights.
        pool_scale: starting factor of the recency path.
    """

    def __init__(
        self,
        text_dim: int,
        encoder: SequenceEncoder,
        *,
        pool_decay: float = 0.6,
        pool_scale: float = 10.0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.down = Linear(text_dim, encoder.dim, bias=False)
        self.up = Linear(encoder.dim, text_dim, bias=False)
        self.pool = RecencyPool(encoder.max_len, pool_decay)
        self.pool_scale = nn.Parameter(torch.tensor(float(pool_scale)))
        nn.init.normal_(self.down.weight, std=encoder.dim**-0.5)
        nn.init.zeros_(self.up.weight)

    def tower(
        self, text: Tensor, id_scale: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """The text matrix, or the rows of it that are given; ``id_scale`` has nothing to act on."""
        return text

    def encode(self, table: Tensor, packed: PackedSequences, *, last: bool = False) -> Tensor:
        """``[T, E]`` states of packed tokens, ``[B, E]`` of the last ones with ``last``."""
        x = item_vectors(table, packed)
        pooled = self.pool(x, packed, self.pool_scale, last=last)
        return pooled + self.up(self.encoder(self.down(x), packed, last=last))
