"""Maps from frozen text vectors to item vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padkern.models.projection import Linear, project

#: Length of what the mixture of a :class:`MixedProjection` adds at the start; the shared map gives
#: length about 1.
_DIFFERENCE = 0.3


def to_unit_variance(text: Tensor) -> float:
    """Factor that gives the coordinates of ``text`` a mean square of 1, row 0 aside."""
    square = text[1:].square().mean().item() if len(text) > 1 else 1.0
    return max(square, 1e-12) ** -0.5


class TextProjection(nn.Module):
    """Frozen text vectors to width d.

    Args:
        text_dim: width E of the text matrix.
        dim: output width d.
        hidden_layers: 0 gives one linear map without bias (``clean``: it keeps the geometry that
            unseen items depend on); k > 0 gives the authors' GELU(Linear) followed by k times
            (dropout, GELU(Linear)), whose outputs are never below -0.17.
        dropout: between the hidden layers.
    """

    def __init__(
        self, text_dim: int, dim: int, *, hidden_layers: int = 0, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if hidden_layers == 0:
            self.layers = nn.ModuleList([Linear(text_dim, dim, bias=False)])
        else:
            self.layers = nn.ModuleList([Linear(text_dim, dim)])
            self.layers.extend(Linear(dim, dim) for _ in range(hidden_layers))
        self.drop = nn.Dropout(dropout)

    def reset_parameters(self, text: Tensor) -> None:
        """A linear map starts as the first d coordinates of ``text``; where it is narrower than d,
        at random with item vectors of norm about 1. Hidden layers start as in the release."""
        layers = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        if len(layers) == 1:
            weight = layers[0].weight
            norm = text[1:].norm(dim=1).mean().clamp_min(1e-6).item() if len(text) > 1 else 1.0
            # Drawn in any case: later draws must not depend on the width of the text.
            nn.init.normal_(weight, std=1.0 / (norm * math.sqrt(layers[0].out_features)))
            if weight.shape[0] <= weight.shape[1]:
                with torch.no_grad():
                    weight.copy_(torch.eye(*weight.shape))
            return
        for layer in layers:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, text: Tensor) -> Tensor:
        first, *rest = self.layers
        x = first(text)
        if not rest:
            return x
        x = F.gelu(x)
        for layer in rest:
            x = F.gelu(layer(self.drop(x)))
        return x


class WhiteningMixture(nn.Module):
    r"""Mixture of parametric whitening maps.

    .. math::
        v = \sum_k g_k (x - b_k) W_k, \qquad
        g = \mathrm{softmax}(x W_g + \delta), \quad
        \delta = \varepsilon \odot (\mathrm{softplus}(x W_\delta) + 0.01)

    with standard normal noise in training and without in evaluation. Dropout acts on the x of the
    maps, the same mask for all of them.

    Args:
        text_dim: width E of the text, of variance about 1 per coordinate; vectors then start with
            norm about 1.
        dim: width d of item vectors.
        experts: number of maps.
        dropout: probability.

    Source: Hou et al. 2022 (UniSRec), arXiv:2206.05941; noise floor and dropout as in the authors'
    code (RUCAIBox/UniSRec at 3359a72).
    """

    _NOISE_FLOOR = 1e-2

    def __init__(self, text_dim: int, dim: int, *, experts: int = 8, dropout: float = 0.2) -> None:
        super().__init__()
        self.experts, self.dim = experts, dim
        self.drop = nn.Dropout(dropout)
        # The mean of k independent maps is 1 / sqrt(k) of one.
        spread = math.sqrt(experts / (dim * text_dim))
        self.weight = nn.Parameter(torch.randn(experts * dim, text_dim) * spread)
        self.shift = nn.Parameter(torch.zeros(experts, text_dim))
        self.gate = nn.Parameter(torch.zeros(text_dim, experts))
        self.noise = nn.Parameter(torch.zeros(text_dim, experts))

    def forward(self, x: Tensor) -> Tensor:
        """``[R, d]`` from ``[R, E]``."""
        logits = x @ self.gate
        if self.training:
            spread = F.softplus(x @ self.noise) + self._NOISE_FLOOR
            logits = logits + torch.randn_like(logits) * spread
        gate = logits.softmax(1)
        mapped = project(self.drop(x), self.weight).view(len(x), self.experts, self.dim)
        weight = self.weight.view(self.experts, self.dim, -1)
        moved = torch.einsum("kde,ke->kd", weight, self.shift)
        return ((mapped - moved) * gate[:, :, None]).sum(1)


class MixedProjection(nn.Module):
    """Frozen text vectors to width d through maps that every item mixes in its own way.

    A linear map that all items share plus a :class:`WhiteningMixture`, both on text of variance 1.
    The shared map starts as the first d coordinates of the text, the mixture small. With the shared
    map alone there is little that text can learn besides a rotation; items of different kinds get
    maps of their own here. Dropout acts on the mixture: on the shared map too it cost 0.2 to 0.4
    points of the aligned expert's NDCG@10 (validation, Amazon Scientific).

    Args:
        text_dim: width E of the text matrix.
        dim: output width d.
        maps: number of maps in the mixture.
        dropout: probability, on the text that the mixture sees.
    """

    scale: Tensor

    def __init__(self, text_dim: int, dim: int, *, maps: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.shared = Linear(text_dim, dim, bias=False)
        self.mixture = WhiteningMixture(text_dim, dim, experts=maps, dropout=dropout)
        self.register_buffer("scale", torch.ones(()))

    def reset_parameters(self, text: Tensor) -> None:
        """Measures the text, starts the maps; item vectors start with norm about 1."""
        weight = self.shared.weight
        dim, text_dim = weight.shape
        nn.init.normal_(weight, std=(dim * text_dim) ** -0.5)
        with torch.no_grad():
            self.scale.fill_(to_unit_variance(text))
            if dim <= text_dim:
                weight.copy_(torch.eye(dim, text_dim) * dim**-0.5)
            self.mixture.weight.mul_(_DIFFERENCE)

    def forward(self, text: Tensor) -> Tensor:
        """``[R, d]`` from ``[R, E]``."""
        x = self.scale * text
        return self.shared(x) + self.mixture(x)
