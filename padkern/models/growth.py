"""Items that arrive after training, added to a model by text alone."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from padkern.models.expert import ItemTower
from padkern.models.triple_expert import ExpertModel

__all__ = ["add_items"]


@torch.no_grad()
def add_items(model: ExpertModel, text: Tensor) -> ExpertModel:
    """A copy of a model with M more items, known by their text alone.

    The new items get ids N + 1 .. N + M, zero ID vectors and the bin of unseen items (without one,
    as in ``parity``: the last bin), so their vectors are those that the model gives an item of its
    own catalogue that nobody took in training. What it gives the old items and the users does not
    change by a bit. ``model`` is left as it is; the copy can be trained, stored as a state dict and
    added to again.

    Args:
        model: trained on N items.
        text: ``[M, E]`` vectors in the space of ``model.text``: transformed as that matrix was
            (:meth:`padkern.text.FittedTransform.apply` with the transform fitted for training). A
            zero row is an item without text.

    Returns:
        A model of the same class over N + M items, in the mode (training or not) of ``model``.

    Raises:
        TypeError: ``text`` is no floating-point tensor.
        ValueError: ``text`` is not ``[M, E]``, or holds NaN or Inf.
    """
    width = model.text.shape[1]
    if not isinstance(text, Tensor) or not text.is_floating_point():
        kind = text.dtype if isinstance(text, Tensor) else type(text).__name__
        raise TypeError(f"text must be a floating-point tensor, got {kind}")
    if text.ndim != 2 or text.shape[1] != width:
        raise ValueError(f"text must be [M, {width}] like the model's text, got {list(text.shape)}")
    if not bool(torch.isfinite(text).all()):
        raise ValueError("text must be finite, found NaN or Inf")
    count = len(text)
    unseen_bin = model.unseen_bin
    new_bin = int(model.item_bins.max()) if unseen_bin is None else unseen_bin
    grown = copy.deepcopy(model)
    grown.text = torch.cat([model.text, text.detach().to(model.text)])
    grown.item_bins = torch.cat([model.item_bins, model.item_bins.new_full((count,), new_bin)])
    scale = 1.0 if unseen_bin is None else 0.0
    grown.id_scale = torch.cat([model.id_scale, model.id_scale.new_full((count,), scale)])
    for expert in grown.experts.values():
        tower = expert.tower
        if isinstance(tower, ItemTower) and tower.kind != "text":
            zeros = tower.id.new_zeros(count, tower.id.shape[1])
            tower.id = nn.Parameter(torch.cat([tower.id, zeros]), tower.id.requires_grad)
    if grown.gate is not None:
        grown.gate.grow(count, new_bin)
    return grown
