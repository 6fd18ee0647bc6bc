"""Item towers and encoders of the methods that PAD is compared with.

A tower gives item vectors and takes the arguments of :class:`padkern.models.expert.ItemTower`:
``(text, id_scale, rows)``. Each goes with an encoder into an
:class:`padkern.models.expert.Expert`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padkern.data.batch import PackedSequences
from padkern.models.encoder import SequenceEncoder
from padkern.models.expert import TextProjection
from padkern.models.projection import Linear
from padkern.ops.short_attention import short_attention


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

    Args:
        adaptor: ``[*, E]`` text vectors to ``[*, d]`` item vectors.
    """

    def __init__(self, adaptor: nn.Module) -> None:
        super().__init__()
        self.adaptor = adaptor

    def forward(
        self, text: Tensor, id_scale: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """``[N + 1, d]``, or ``[U, d]`` with ``rows``; ``id_scale`` has nothing to act on."""
        return self.adaptor(_chosen(text, rows))


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
        super().__init__(Linear(text_dim, dim), nn.GELU(), nn.Dropout(dropout), Linear(dim, dim))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)


class WhiteningMixture(nn.Module):
    r"""Mixture of parametric whitening maps.

    .. math::
        v = \sum_k g_k (x - b_k) W_k, \qquad
        g = \mathrm{softmax}(x W_g + \delta), \quad
        \delta = \varepsilon \odot (\mathrm{softplus}(x W_\delta) + 0.01)

    with standard normal noise in training and without in evaluation. Dropout acts on the x of the
    maps, the same mask for all of them.

    Args:
        text: ``[N + 1, E]`` text matrix, for its width and scale: vectors start with norm about 1.
        dim: width d of item vectors.
        experts: number of maps.
        dropout: probability.

    Source: Hou et al. 2022 (UniSRec), arXiv:2206.05941; noise floor and dropout as in the authors'
    code (RUCAIBox/UniSRec at 3359a72).
    """

    _NOISE_FLOOR = 1e-2

    def __init__(self, text: Tensor, dim: int, *, experts: int = 8, dropout: float = 0.2) -> None:
        super().__init__()
        width = text.shape[1]
        norm = text[1:].norm(dim=1).mean().clamp_min(1e-6).item() if len(text) > 1 else 1.0
        self.experts, self.dim = experts, dim
        self.drop = nn.Dropout(dropout)
        # The mean of k independent maps is 1 / sqrt(k) of one.
        spread = math.sqrt(experts / dim) / norm
        self.weight = nn.Parameter(torch.randn(experts * dim, width) * spread)
        self.shift = nn.Parameter(torch.zeros(experts, width))
        self.gate = nn.Parameter(torch.zeros(width, experts))
        self.noise = nn.Parameter(torch.zeros(width, experts))

    def forward(self, x: Tensor) -> Tensor:
        """``[R, d]`` from ``[R, E]``."""
        logits = x @ self.gate
        if self.training:
            spread = F.softplus(x @ self.noise) + self._NOISE_FLOOR
            logits = logits + torch.randn_like(logits) * spread
        gate = logits.softmax(1)
        mapped = (self.drop(x) @ self.weight.T).view(len(x), self.experts, self.dim)
        weight = self.weight.view(self.experts, self.dim, -1)
        moved = torch.einsum("kde,ke->kd", weight, self.shift)
        return ((mapped - moved) * gate[:, :, None]).sum(1)


class ConcatTower(nn.Module):
    """ID vector and projected text side by side, each about half of the width.

    Args:
        text: ``[N + 1, E]`` text matrix, for its width and scale.
        dim: width d, at least 2; ``d // 2`` of it for text.
        hidden_layers, dropout: of the :class:`padkern.models.expert.TextProjection`.

    Raises:
        ValueError: ``dim`` is below 2.
    """

    def __init__(
        self, text: Tensor, dim: int, *, hidden_layers: int = 0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"dim must be at least 2 to hold ID and text, got {dim}")
        own = dim - dim // 2
        self.id = nn.Parameter(torch.randn(len(text), own) * 0.5 * own**-0.5)
        with torch.no_grad():
            self.id[0] = 0.0
        self.project = TextProjection(
            text.shape[1], dim // 2, hidden_layers=hidden_layers, dropout=dropout
        )
        self.project.reset_parameters(text)

    def forward(
        self, text: Tensor, id_scale: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """``[N + 1, d]``, or ``[U, d]`` with ``rows``."""
        ids = _chosen(self.id, rows)
        if id_scale is not None:
            ids = ids * _chosen(id_scale, rows)[:, None]
        return torch.cat([ids, self.project(_chosen(text, rows))], 1)


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
        return _chosen(text, rows) + F.pad(ids, (text.shape[1] - ids.shape[1], 0))


class DualViewTower(nn.Module):
    """A collaborative and a semantic vector side by side, width 2 d.

    The collaborative one is free and starts at the principal components of the text; the semantic
    one is the frozen text through two linear layers.

    Args:
        start: ``[N + 1, d]`` collaborative vectors at the start, row 0 zero; an item never seen in
            training stays there.
        text_dim: width E of the text.

    Source: Liu et al. 2024 (LLM-ESR), arXiv:2405.20646.
    """

    def __init__(self, start: Tensor, text_dim: int) -> None:
        super().__init__()
        hidden = max(text_dim // 2, 1)
        self.id = nn.Parameter(start.clone())
        self.adapter = nn.Sequential(Linear(text_dim, hidden), Linear(hidden, start.shape[1]))
        for layer in self.adapter:
            nn.init.xavier_normal_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(
        self, text: Tensor, id_scale: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """``[N + 1, 2 d]``, or ``[U, 2 d]`` with ``rows``; ``id_scale`` has no effect."""
        return torch.cat([_chosen(self.id, rows), self.adapter(_chosen(text, rows))], 1)


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
    encoder, the same for both, then makes the states.

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
        ids, words = x.chunk(2, 1)
        views = (self.by_text(words, ids, packed), self.by_ids(ids, words, packed))
        states = [
            self.encoder(view, packed.stream(number), last=last)
            for number, view in enumerate(views)
        ]
        return torch.cat(states, 1)
