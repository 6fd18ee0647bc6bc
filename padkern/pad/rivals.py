"""Training of the methods that PAD is compared with; :mod:`padkern.pad.methods` names them.

Every function gives a trained scorer. ``docs/methods.md`` says where one differs from its paper.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from padkern.models.build import build_encoder
from padkern.models.encoder import SequenceEncoder
from padkern.models.expert import Expert
from padkern.models.rivals import (
    AdaptedTower,
    DualViewEncoder,
    DualViewTower,
    IdTextTower,
    MLPAdaptor,
    NullSpaceTower,
    StartedTower,
)
from padkern.models.text_maps import WhiteningMixture
from padkern.pad.evaluation import Scorer
from padkern.pad.ials import IALS
from padkern.pad.item_to_item import EASE, ItemKNN
from padkern.pad.phases import Phases
from padkern.text.transform import TextTransform

#: Mean length of item vectors at the start: of free ones as in pre-training, and of text.
_ID_NORM, _TEXT_NORM = 0.5, 1.0


# -- linear algebra ------------------------------------------------------------------------------


def item_knn(phases: Phases) -> Scorer:
    """Nearest items by the users they share."""
    options = phases.config.rivals
    return ItemKNN(
        phases.train,
        len(phases.train_frequency) - 1,
        neighbours=options.knn_neighbours,
        shrinkage=options.knn_shrinkage,
        decay=options.knn_decay,
    )


def ease(phases: Phases) -> Scorer:
    """Linear autoencoder without self-loops."""
    options = phases.config.rivals
    return EASE(
        phases.train,
        len(phases.train_frequency) - 1,
        l2=options.ease_l2,
        max_items=options.ease_max_items,
    )


def ials(phases: Phases) -> Scorer:
    """Matrix factorisation; as wide as the models."""
    options = phases.config.rivals
    return IALS(
        phases.train,
        len(phases.train_frequency) - 1,
        dim=phases.config.model.dim,
        sweeps=options.ials_sweeps,
        unobserved=options.ials_unobserved,
        l2=options.ials_l2,
        exponent=options.ials_exponent,
        seed=phases.config.seed,
    )


# -- one trained expert --------------------------------------------------------------------------


def _encoder(phases: Phases) -> SequenceEncoder:
    model = phases.config.model
    return build_encoder(
        model.encoder, model.dim, model.max_len,
        num_layers=model.num_layers, num_heads=model.num_heads, dropout=model.dropout,
        **model.encoder_options,
    )  # fmt: skip


def _expert(phases: Phases, tower: nn.Module, encoder: SequenceEncoder | None = None) -> Expert:
    """A tower with an encoder, by default that of the run."""
    config = phases.config
    return Expert(
        tower, encoder or _encoder(phases),
        pool_decay=config.model.pool_decay if config.rivals.recency_path else None,
        pool_scale=config.model.pool_scale,
    )  # fmt: skip


def _components(phases: Phases, method: str, norm: float, *, whiten: bool = False) -> Tensor:
    """``[N + 1, model.dim]`` leading principal components of the text, of mean length ``norm``."""
    raw, width = phases.raw(method), phases.config.model.dim
    if width > raw.shape[1]:
        raise ValueError(
            f"model.dim must be at most the {raw.shape[1]} columns of the text for {method}, "
            f"got {width}"
        )
    matrix = torch.from_numpy(TextTransform(pca=width, whiten=whiten).fit_apply(raw))
    lengths = matrix.norm(dim=1)
    mean = lengths.sum() / (lengths > 0).sum().clamp_min(1)
    return matrix * (norm / mean.clamp_min(1e-12))


def llminit(phases: Phases) -> Scorer:
    """SASRec on IDs that start at the principal components of the text."""
    start = _components(phases, "llminit", _ID_NORM)
    return phases.train_expert("llminit", lambda: _expert(phases, StartedTower(start)))[0]


def morec(phases: Phases) -> Scorer:
    """Text alone through a small network."""
    model = phases.config.model

    def make() -> nn.Module:
        adaptor = MLPAdaptor(phases.text.shape[1], model.dim, dropout=model.dropout)
        return _expert(phases, AdaptedTower(adaptor, phases.text))

    return phases.train_expert("morec", make)[0]


def unisrec(phases: Phases) -> Scorer:
    """Text alone through a mixture of whitening maps."""
    model, experts = phases.config.model, phases.config.rivals.adaptor_experts

    def make() -> nn.Module:
        adaptor = WhiteningMixture(
            phases.text.shape[1], model.dim, experts=experts, dropout=model.dropout
        )
        return _expert(phases, AdaptedTower(adaptor, phases.text))

    return phases.train_expert("unisrec", make)[0]


def id_text_sum(phases: Phases) -> Scorer:
    """ID vector + projected text, both from a random start."""
    return _id_text(phases, "sum")


def id_text_cat(phases: Phases) -> Scorer:
    """ID vector and projected text side by side, half of the width each."""
    return _id_text(phases, "cat")


def _id_text(phases: Phases, join: str) -> Scorer:
    dim = phases.config.model.dim

    def make() -> nn.Module:
        return _expert(phases, IdTextTower(phases.text, dim, join))

    return phases.train_expert(f"id_text_{join}", make)[0]


def alphafuse(phases: Phases) -> Scorer:
    """Frozen whitened text, IDs in its last coordinates."""
    dim = phases.config.model.dim
    null_dim = phases.config.rivals.null_dim or max(dim // 2, 1)
    if null_dim > dim:
        raise ValueError(f"rivals.null_dim must be at most model.dim ({dim}), got {null_dim}")
    text = _components(phases, "alphafuse", _TEXT_NORM, whiten=True)

    def make() -> nn.Module:
        return _expert(phases, NullSpaceTower(len(text) - 1, null_dim))

    return phases.train_expert("alphafuse", make, text=text)[0]


def llm_esr(phases: Phases) -> Scorer:
    """A collaborative and a semantic view; without the self-distillation of the paper."""
    start = _components(phases, "llm_esr", _ID_NORM)

    def make() -> nn.Module:
        tower = DualViewTower(start, phases.text)
        encoder = DualViewEncoder(_encoder(phases), phases.config.model.num_heads)
        return _expert(phases, tower, encoder)

    return phases.train_expert("llm_esr", make)[0]
