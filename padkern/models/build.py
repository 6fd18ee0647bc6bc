"""Builds experts from plain options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from padkern.models.expert import Expert, ItemTower, TextSpaceExpert
from padkern.models.sasrec import SASRec

ENCODERS = {"sasrec": "post", "sasrec_pre_ln": "pre"}


def build_expert(
    kind: str,
    num_items: int,
    text: Tensor,
    *,
    dim: int,
    max_len: int,
    encoder: str = "sasrec",
    num_layers: int = 2,
    num_heads: int = 2,
    dropout: float = 0.2,
    fuse: str = "sum",
    text_layers: int = 0,
    pool_decay: float | None = None,
    pool_scale: float = 3.0,
    language: str = "text_space",
    id_init: str = "scaled",
) -> Expert | TextSpaceExpert:
    """One expert with fresh weights.

    A linear text projection starts as the first ``dim`` text coordinates (with whitened text: the
    leading principal components), so that the recency path starts as the text nearest-neighbour
    ranker; a ``"fused"`` tower's IDs start at zero, or as ``id_init="xavier"`` says.

    Args:
        kind: ``"id"``, ``"text"`` or ``"fused"``.
        num_items: catalogue size N.
        text: ``[N + 1, E]`` text matrix, for its width and scale.
        dim, max_len, num_layers, num_heads, dropout: of the encoder.
        encoder: ``"sasrec"`` (post-LN) or ``"sasrec_pre_ln"``.
        fuse, text_layers: see :class:`ItemTower`.
        pool_decay: decay of the recency path of experts that see text, ``None`` for none; a
            ``"text_space"`` expert always has one, by default with decay 0.6.
        pool_scale: starting factor of that path; a ``"text_space"`` expert's is 10.
        language: what a ``"text"`` expert is: ``"text_space"`` (:class:`TextSpaceExpert`) or
            ``"projected"`` (projected text through the same form as the others).
        id_init: free ID vectors start ``"scaled"`` (norm about 1/2, padding row zero) or
            ``"xavier"`` (the release: spread depends on the catalogue size, padding row random).

    Raises:
        ValueError: an unknown encoder or option.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"encoder must be one of {sorted(ENCODERS)}, got {encoder!r}")
    if language not in ("text_space", "projected"):
        raise ValueError(f"language must be 'text_space' or 'projected', got {language!r}")
    if id_init not in ("scaled", "xavier"):
        raise ValueError(f"id_init must be 'scaled' or 'xavier', got {id_init!r}")
    net = SASRec(
        dim, max_len, num_layers=num_layers, num_heads=num_heads, dropout=dropout,
        norm=ENCODERS[encoder],
    )  # fmt: skip
    if kind == "text" and language == "text_space":
        return TextSpaceExpert(text.shape[1], net, pool_decay=pool_decay or 0.6)
    if kind == "id":
        pool_decay = None
    tower = ItemTower(
        kind, num_items, text.shape[1], dim, fuse=fuse, hidden_layers=text_layers, dropout=dropout
    )
    if kind != "text" and id_init == "xavier":
        nn.init.xavier_normal_(tower.id)
    elif kind == "id":
        nn.init.normal_(tower.id, std=0.5 * dim**-0.5)
        with torch.no_grad():
            tower.id[0] = 0.0
    if tower.join is not None:
        join: Any = tower.join[1]
        nn.init.xavier_normal_(join.weight)
        nn.init.zeros_(join.bias)
    if kind != "id":
        tower.project.reset_parameters(text)
        projection: Any = tower.project.layers[0]
        first = projection.weight
        if text_layers == 0 and first.shape[0] <= first.shape[1]:
            with torch.no_grad():
                first.copy_(torch.eye(*first.shape))
    return Expert(tower, net, pool_decay=pool_decay, pool_scale=pool_scale)
