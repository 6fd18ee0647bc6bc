"""Item towers and encoders of the methods that PAD is compared with.

A tower gives item vectors and takes the arguments of :class:`padkern.models.expert.ItemTower`:
``(text, id_scale, rows)``. Each goes with an encoder into an
:class:`padkern.models.expert.Expert`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padkern.data.batch import PackedSequences
from padkern.models.encoder import SequenceEncoder
from padkern.models.projection import Linear
from padkern.models.text_maps import to_unit_variance
from padkern.ops.short_attention import short_attention

#: Root mean square of GELU at a standard normal variable.
_GELU_RMS = 0.652


def _chosen(x: Tensor, rows: Tensor | None) -> Tensor:
    """Some rows of ``x``, or all."""
    return x if rows is None else x.index_select(0, rows)


class StartedTower(nn.Module):
    """Free item vectors that start somewhere; an item never seen in training stays there.

    Args:
        start: ``[N + 1, d]`` vectors at the start, row 0 zero.

    Source: Harte et al. 2023, arXiv:2309.09261, with the principal components of the text for a
    start.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.id = nn.Parameter(start.clone())

    def forward(
        self, text: Tensor, id_scale: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """``[N + 1, d]``, or ``[U, d]`` with ``rows``; ``text`` and ``id_scale`` have no effect."""
        return _chosen(self.id, rows)


class AdaptedTower(nn.Module):
    """Item vectors from text alone.

    The text is scaled to a mean square of 1 per coordinate, as the features are that these
    adaptors were made for: on vectors of length 1 Adam moves their maps too slowly.

    Args:
        adaptor: ``[*, E]`` text vectors to ``[*, d]`` item vectors.
        text: ``[N + 1, E]`` text matrix, for its scale.
    """

    def __init__(self, adaptor: nn.Module, text: Tensor) -> None:
        super().__init__()
        self.adaptor = adaptor
        self.scale = to_unit_variance(text)

    def forward(
        self, text: Tensor, id_scale: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """``[N + 1, d]``, or ``[U, d]`` with ``rows``; ``id_scale`` has nothing to act on."""
        return self.adaptor(self.scale * text)


class MLPAdaptor(nn.Sequential):
    """Text vectors through Linear, GELU, dropout, Linear: frozen features and a small network.

    Args:
        text_dim: width E of the text.
        dim: width d of item vectors and of the hidden layer.
        dropout: probability between the layers.

    Source: the two-stage form (features first, network after) of Yuan et al. 2023,
    arXiv:2303.13835.
    """

    def __init__(self, text_dim: int, dim: int, *, dropout: float = 0.1) -> None:
        first, last = Linear(text_dim, dim), Linear(dim, dim)
        super().__init__(first, nn.GELU(), nn.Dropout(dropout), last)
        # Inputs and hidden units of variance 1, item vectors of length about 1.
        nn.init.normal_(first.weight, std=text_dim**-0.5)
        nn.init.normal_(last.weight, std=(dim * _GELU_RMS) ** -1)
        for layer in (first, last):
            nn.init.zeros_(layer.bias)


class IdTextTower(nn.Module):
    """ID vector and linearly projected text, added or side by side.

    ID vectors start with length about 1/2, projected text with length about 1; the text is scaled
    as in :class:`AdaptedTower`.

    Args:
        text: ``[N + 1, E]`` text matrix, for its width and scale.
        dim: width d.
        join: ``"sum"``, or ``"cat"``: of the d coordinates ``d // 2`` are text, the others ID.

    Raises:
        ValueError: an unknown join, or ``dim`` is below 2 with ``"cat"``.
    """

    def __init__(self, text: Tensor, dim: int, join: str) -> None:
        super().__init__()
        if join not in ("sum", "cat"):
            raise ValueError(f"join must be 'sum' or 'cat', got {join!r}")
        if join == "cat" and dim < 2:
            raise ValueError(f"dim must be at least 2 to hold ID and text, got {dim}")
        self.join = join
        own, words = (dim, dim) if join == "sum" else (dim - dim // 2, dim // 2)
        self.scale = to_unit_variance(text)
        self.id = nn.Parameter(torch.randn(len(text), own) * 0.5 * own**-0.5)
        with torch.no_grad():
            self.id[0] = 0.0
        self.project = Linear(text.shape[1], words, bias=False)
        nn.init.normal_(self.project.weight, std=(text.shape[1] * words) ** -0.5)

    def forward(
        self, text: Tensor, id_scale: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """``[N + 1, d]``, or ``[U, d]`` with ``rows``."""
        ids = _chosen(self.id, rows)
        if id_scale is not None:
            ids = ids * _chosen(id_scale, rows)[:, None]
        words = self.project(self.scale * text)
        return ids + words if self.join == "sum" else torch.cat([ids, words], 1)


class NullSpaceTower(nn.Module):
    """Frozen text coordinates with a free ID vector added to the last, least used ones.

    The text matrix that it is given holds the leading principal components of the text, scaled to
    variance 1: the first coordinates are left to the text, and IDs learn in the last ``null_dim``.
    IDs start at zero, and those of items never seen in training stay there.

    Args:
        num_items: catalogue size N.
        null_dim: number of coordinates with IDs.

    Source: Hu et al. 2025 (AlphaFuse), arXiv:2504.19218; which coordinates, and the text left in
    those of the IDs, as in the authors' code (Hugo-Chinn/AlphaFuse at 6a6773d, its defaults).
    """

    def __init__(self, num_items: int, null_dim: int) -> None:
        super().__init__()
        self.id = nn.Parameter(torch.zeros(num_items + 1, null_dim))

    def forward(
        self, text: Tensor, id_scale: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """``[N + 1, d]``, or ``[U, d]`` with ``rows``, from components ``[N + 1, d]``."""
        ids = _chosen(self.id, rows)
        if id_scale is not None:
            ids = ids * _chosen(id_scale, rows)[:, None]
        return text + F.pad(ids, (text.shape[1] - ids.shape[1], 0))


class DualViewTower(nn.Module):
    """A collaborative and a semantic vector side by side, width 2 d.

    The collaborative one is free and starts at the principal components of the text; the semantic
    one is the frozen text, scaled as in :class:`AdaptedTower`, through two linear layers.

    Args:
        start: ``[N + 1, d]`` collaborative vectors at the start, row 0 zero; an item never seen in
            training stays there.
        text: ``[N + 1, E]`` text matrix, for its width and scale.

    Source: Liu et al. 2024 (LLM-ESR), arXiv:2405.20646.
    """

    def __init__(self, start: Tensor, text: Tensor) -> None:
        super().__init__()
        text_dim, dim = text.shape[1], start.shape[1]
        hidden = max(text_dim // 2, 1)
        self.id = nn.Parameter(start.clone())
        self.scale = to_unit_variance(text)
        first, last = Linear(text_dim, hidden), Linear(hidden, dim)
        # Hidden units of variance 1, semantic vectors of length about 1.
        nn.init.normal_(first.weight, std=text_dim**-0.5)
        nn.init.normal_(last.weight, std=(hidden * dim) ** -0.5)
        for layer in (first, last):
            nn.init.zeros_(layer.bias)
        self.adapter = nn.Sequential(first, last)

    def forward(
        self, text: Tensor, id_scale: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """``[N + 1, 2 d]``, or ``[U, 2 d]`` with ``rows``; ``id_scale`` has no effect."""
        words = self.adapter(self.scale * text)
        return torch.cat([_chosen(self.id, rows), words], 1)


class CrossAttention(nn.Module):
    """Causal multi-head attention within each packed sequence from one view to another.

    Args:
        dim: width d of both views.
        num_heads: must divide ``dim``.

    Raises:
        ValueError: it does not.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.query = Linear(dim, dim, bias=False)
        self.key = Linear(dim, dim, bias=False)
        self.value = Linear(dim, dim, bias=False)
        self.out = Linear(dim, dim)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, asking: Tensor, asked: Tensor, packed: PackedSequences) -> Tensor:
        """``[T, d]``: for each token of ``asking`` a mixture of ``asked`` up to it."""
        q, k, v = (
            part.view(len(part), self.num_heads, -1)
            for part in (self.query(asking), self.key(asked), self.value(asked))
        )
        mixed = short_attention(q, k, v, packed.offsets, longest=max(packed.width, 1))
        return self.out(mixed.reshape(asking.shape))


class DualViewEncoder(nn.Module):
    """Encodes two views that look at one another first: width 2 d in, width 2 d out.

    Each view becomes a mixture of its own vectors, weighted by the other view's queries; one
    encoder, the same for both, then makes the states. Vectors are scaled by sqrt(d) on the way in.

    Args:
        encoder: of width d.
        num_heads: of the attention between the views; must divide d.

    Source: Liu et al. 2024 (LLM-ESR), arXiv:2405.20646. Here the attention is causal, because every
    position is trained, and positions are added by the encoder, behind it.
    """

    def __init__(self, encoder: SequenceEncoder, num_heads: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.dim, self.max_len = 2 * encoder.dim, encoder.max_len
        self.by_text = CrossAttention(encoder.dim, num_heads)
        self.by_ids = CrossAttention(encoder.dim, num_heads)

    def forward(self, x: Tensor, packed: PackedSequences, *, last: bool = False) -> Tensor:
        """See :class:`padkern.models.encoder.SequenceEncoder`."""
        ids, words = (x * (self.dim // 2) ** 0.5).chunk(2, 1)
        views = (self.by_text(words, ids, packed), self.by_ids(ids, words, packed))
        states = [
            self.encoder(view, packed.stream(number), last=last)
            for number, view in enumerate(views)
        ]
        return torch.cat(states, 1)
