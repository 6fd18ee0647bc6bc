"""Builds experts from plain options."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from padkern.models.caser import Caser
from padkern.models.encoder import SequenceEncoder
from padkern.models.expert import Expert, ItemTower, TextSpaceExpert
from padkern.models.gru4rec import GRU4Rec
from padkern.models.registry import check_encoder_name, registered_encoder
from padkern.models.sasrec import SASRec

if TYPE_CHECKING:
    from padkern.models.registry import EncoderFactory


def _gru4rec(dim: int, max_len: int, *, num_heads: int, **options: Any) -> GRU4Rec:
    return GRU4Rec(dim, max_len, **options)


def _caser(dim: int, max_len: int, *, num_layers: int, num_heads: int, **options: Any) -> Caser:
    return Caser(dim, max_len, **options)


_BUILT_IN: dict[str, EncoderFactory] = {
    "caser": _caser,
    "gru4rec": _gru4rec,
    "sasrec": SASRec,
    "sasrec_pre_ln": partial(SASRec, norm="pre"),
}


def build_encoder(
    encoder: str | EncoderFactory, dim: int, max_len: int, **options: Any
) -> SequenceEncoder:
    """An encoder with fresh weights.

    Args:
        encoder: ``"sasrec"`` (post-LN), ``"sasrec_pre_ln"``, ``"gru4rec"``, ``"caser"``, the name
            of a registered encoder, or a factory.
        dim: width d of item vectors and states.
        max_len: longest sequence.
        options: further arguments of the factory.

    Raises:
        TypeError: an option that the encoder does not take, or a factory that gives no nn.Module.
        ValueError: an unknown name, or an encoder of another width or length than asked for.
    """
    if isinstance(encoder, str):
        check_encoder_name(encoder)
        encoder = _BUILT_IN.get(encoder) or registered_encoder(encoder)  # type: ignore[assignment]
    net: Any = encoder(dim, max_len, **options)  # type: ignore[operator]
    is_module = isinstance(net, nn.Module)  # a name, so that net keeps its type
    if not is_module:
        raise TypeError(f"encoder must give an nn.Module, got {type(net).__name__}")
    for name, wanted in (("dim", dim), ("max_len", max_len)):
        if getattr(net, name, None) != wanted:
            raise ValueError(
                f"encoder must give a module with {name} = {wanted}, "
                f"got {getattr(net, name, 'none')}"
            )
    return net


def build_expert(
    kind: str,
    num_items: int,
    text: Tensor,
    *,
    dim: int,
    max_len: int,
    encoder: str | EncoderFactory = "sasrec",
    encoder_options: Mapping[str, Any] | None = None,
    num_layers: int = 2,
    num_heads: int = 2,
    dropout: float = 0.2,
    fuse: str = "sum",
    null_dim: int = 32,
    text_layers: int = 0,
    text_maps: int = 1,
    pool_decay: float | None = None,
    pool_scale: float = 3.0,
    language: str = "text_space",
    id_init: str = "scaled",
) -> Expert | TextSpaceExpert:
    """One expert with fresh weights.

    Linear text projections start as the first ``dim`` text coordinates (with whitened text: the
    leading principal components), so that the recency path starts as the text nearest-neighbour
    ranker; a ``"fused"`` tower's IDs start at zero, or as ``id_init="xavier"`` says.

    Args:
        kind: ``"id"``, ``"text"`` or ``"fused"``.
        num_items: catalogue size N.
        text: ``[N + 1, E]`` text matrix, for its width and scale.
        dim, max_len, num_layers, num_heads, dropout: of the encoder; ``"gru4rec"`` has no heads,
            ``"caser"`` neither heads nor layers.
        encoder: name or factory, see :func:`build_encoder`.
        encoder_options: further arguments of the encoder, such as ``{"window": 8}`` of a Caser.
        fuse, null_dim, text_layers, text_maps: see :class:`ItemTower`.
        pool_decay: decay of the recency path of experts that see text, ``None`` for none; a
            ``"text_space"`` expert always has one, by default with decay 0.6.
        pool_scale: starting factor of that path; a ``"text_space"`` expert's is 10.
        language: what a ``"text"`` expert is: ``"text_space"`` (:class:`TextSpaceExpert`) or
            ``"projected"`` (projected text through the same form as the others).
        id_init: free ID vectors start ``"scaled"`` (norm about 1/2, padding row zero), ``"xavier"``
            (the release: spread depends on the catalogue size, padding row random) or ``"text"``:
            as ``"scaled"``, the leading text columns in place of the random numbers.

    Raises:
        TypeError, ValueError: an unknown encoder or option.

    Source: ``id_init="text"`` after LLMInit, Zhang et al. 2025, arXiv:2503.01814.
    """
    if language not in ("text_space", "projected"):
        raise ValueError(f"language must be 'text_space' or 'projected', got {language!r}")
    if id_init not in ("scaled", "xavier", "text"):
        raise ValueError(f"id_init must be 'scaled', 'xavier' or 'text', got {id_init!r}")
    net = build_encoder(
        encoder, dim, max_len,
        num_layers=num_layers, num_heads=num_heads, dropout=dropout, **(encoder_options or {}),
    )  # fmt: skip
    if kind == "text" and language == "text_space":
        return TextSpaceExpert(text.shape[1], net, pool_decay=pool_decay or 0.6)
    if kind == "id":
        pool_decay = None
    tower = ItemTower(
        kind, num_items, text.shape[1], dim,
        fuse=fuse, null_dim=null_dim, hidden_layers=text_layers, text_maps=text_maps,
        dropout=dropout,
    )  # fmt: skip
    if kind != "text" and id_init == "xavier":
        nn.init.xavier_normal_(tower.id)
    elif kind == "id":
        nn.init.normal_(tower.id, std=0.5 * dim**-0.5)
        with torch.no_grad():
            tower.id[0] = 0.0
            if id_init == "text":
                _start_as_text(tower.id, text)
    if tower.join is not None:
        join: Any = tower.join[1]
        nn.init.xavier_normal_(join.weight)
        nn.init.zeros_(join.bias)
    if kind != "id" and tower.text_columns is None:
        tower.project.reset_parameters(text)
    return Expert(tower, net, pool_decay=pool_decay, pool_scale=pool_scale)


def _start_as_text(ids: Tensor, text: Tensor) -> None:
    """Leading text columns into the ID vectors ``[N + 1, d]``, on their scale: norm about 1/2.

    A text narrower than d leaves the last columns as they are. Items without text stay random: a
    zero vector for all of them would make them one item.
    """
    dim = ids.shape[1]
    words = text[:, :dim]
    norms = words.norm(dim=1, keepdim=True)
    told = norms > 0
    if not bool(told.any()):
        return
    wanted = 0.5 * (words.shape[1] / dim) ** 0.5
    words = words * (wanted / norms[told].mean())
    ids[:, : words.shape[1]] = torch.where(told, words, ids[:, : words.shape[1]])
