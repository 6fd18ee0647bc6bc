"""Forms of PAD's phase-3 training step that users run, on the parameters of one padkern model.

Each is a function from a batch to the loss, so that one optimiser step means the same to all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from padkern.data.batch import PackedSequences
from padkern.data.plan import BatchPlan
from padkern.models import projection
from padkern.models.triple_expert import TripleExpert
from padkern.ops.linear import linear


@contextmanager
def torch_products() -> Iterator[None]:
    """Inside, linear maps of padkern's modules are torch's products: what others would run."""
    kept = projection.linear
    projection.linear = functools.partial(linear, backend="reference")
    try:
        yield
    finally:
        projection.linear = kept


class Batch(NamedTuple):
    """One batch in the forms that the contenders read.

    Attributes:
        plan: the batch as padkern plans it; None where another form made it.
        packed: its input tokens.
        targets, negatives: int64 ``[T]``.
        slots: int64 ``[B, L + 1]`` items of inputs and last target, left-padded with 0.
        other_slots: the negatives in the slots of their targets, else 0.
        features: ``[B, L + 1, 2, E]`` text vectors of both, gathered beforehand.
    """

    plan: BatchPlan | None
    packed: PackedSequences
    targets: Tensor
    negatives: Tensor
    slots: Tensor
    other_slots: Tensor
    features: Tensor


def parity_model(
    text: Tensor, bins: Tensor, *, dim: int, length: int, layers: int, heads: int
) -> TripleExpert:
    """PAD's model as released, with new weights: dropout 0.1, sigmoid gate, four text layers.

    Args:
        text: ``[N + 1, E]``, row 0 zero.
        bins: int64 ``[N + 1]``, 0 for padding.
    """
    model = TripleExpert(
        len(text) - 1, text, bins, dim=dim, max_len=length, num_layers=layers, num_heads=heads,
        dropout=0.1, fuse="cat", text_layers=4, pool_decay=None, language="projected",
        gate_form="sigmoid", id_init="xavier",
    )  # fmt: skip
    model.gate.reset_parity()
    return model


def make_batch(plan: BatchPlan, length: int, text: Tensor) -> Batch:
    """The padded forms of a plan with one negative, ``length`` inputs per user."""
    return pad(plan.inputs, plan.targets, plan.negatives[:, 0], length, text)._replace(plan=plan)


def pad(
    packed: PackedSequences, targets: Tensor, negatives: Tensor, length: int, text: Tensor
) -> Batch:
    """A packed batch with its padded forms, and no plan."""
    users, offsets = packed.batch_size, packed.offsets.tolist()
    slots = torch.zeros(users, length + 1, dtype=torch.int64)
    other = torch.zeros_like(slots)
    for b in range(users):
        part = slice(offsets[b], offsets[b + 1])
        count = offsets[b + 1] - offsets[b]
        slots[b, -count - 1] = packed.items[part][0]
        slots[b, -count:] = targets[part]
        other[b, -count:] = negatives[part]
    features = text[torch.stack([slots, other], 2)]
    return Batch(None, packed, targets, negatives, slots, other, features)


def gradients(model: TripleExpert, loss: Tensor) -> dict[str, Tensor]:
    """By parameter name."""
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@torch_products()
def packed_eager(model: TripleExpert, batch: Batch) -> Tensor:
    """Packed tokens in eager torch: grid for the attention, every other step an operation."""
    tables = model.tables()
    states = [
        packed_encoder(expert.encoder, table.index_select(0, batch.packed.items), batch.packed)
        for expert, table in zip(model.experts.values(), tables, strict=True)
    ]
    return model.loss_from(
        tables, torch.cat(states, 1), batch.targets, negatives=batch.negatives[:, None]
    )


@torch_products()
def packed_unique(model: TripleExpert, batch: Batch) -> Tensor:
    """The same from the vectors of the batch's different items alone, the loss in eager torch too:
    what a careful author writes without a compiler."""
    packed = batch.packed
    ids = torch.cat([packed.items, batch.targets, batch.negatives])
    unique, places = torch.unique(ids, return_inverse=True)
    inputs, targets, negatives = places.chunk(3)
    weights = model.gate.weights().index_select(0, model.item_bins.index_select(0, unique))
    scores: list[Tensor | float] = [0.0, 0.0]
    tables = model.tables(rows=unique)
    for number, (expert, table) in enumerate(zip(model.experts.values(), tables, strict=True)):
        state = packed_encoder(expert.encoder, table.index_select(0, inputs), packed)
        gated = table * weights[:, number : number + 1]
        for side, rows in enumerate((targets, negatives)):
            scores[side] = scores[side] + (state * gated.index_select(0, rows)).sum(1)
    return F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()


@torch_products()
def packed_encoder(net, x: Tensor, packed: PackedSequences) -> Tensor:
    """States of packed tokens in eager torch, from their item vectors."""
    p = net.dropout if net.training else 0.0
    x = F.dropout(net.edge_norm(x + net.position(packed.positions)), p, net.training)
    dim = x.shape[1]
    for block in net.blocks:
        attention = block.attention
        qkv = attention.qkv(x)
        grid = qkv.new_zeros(packed.batch_size * packed.width, 3 * dim)
        grid = grid.index_copy(0, packed.grid, qkv)
        shape = (packed.batch_size, packed.width, 3, attention.num_heads, -1)
        q, k, v = grid.view(shape).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        y = attention.out(y.transpose(1, 2).reshape(-1, dim)[packed.grid])
        x = block.norm1(x + F.dropout(y, p, net.training))
        y = block.down(F.relu(block.up(x)))
        x = block.norm2(x + F.dropout(y, p, net.training))
    return x


@torch_products()
def padded_authors(model: TripleExpert, batch: Batch) -> Tensor:
    """The release's step: every slot through every tower, three encoders in turn, float64 gate."""
    return _padded(model, batch, [padded_encoder] * 3, torch.float64)


def padded_stacked(model: TripleExpert, batch: Batch) -> Tensor:
    """The same with the gate in its own type and three encoders as one of stacked weights, to
    compile."""
    return _padded(model, batch, None, model.gate.logit.dtype)


def _padded(model: TripleExpert, batch: Batch, encoders, gate_dtype: torch.dtype) -> Tensor:
    rec, aligned, language = model.experts.values()
    ids = torch.stack([batch.slots, batch.other_slots], 2)
    joined = torch.cat([aligned.tower.id[ids], aligned.tower.project(batch.features)], 3)
    items = [rec.tower.id[ids], aligned.tower.join(joined), language.tower.project(batch.features)]
    nets = [expert.encoder for expert in model.experts.values()]
    mask = slot_mask(batch.slots[:, :-1])
    inputs = [x[:, :-1, 0] for x in items]
    if encoders is None:
        states = list(_stacked_encoder(nets, torch.stack(inputs), mask))
    else:
        states = [run(*given, mask) for run, *given in zip(encoders, nets, inputs, strict=True)]
    weights = gate_weights(model, gate_dtype)
    bins = model.item_bins[ids[:, 1:]]  # [B, L, 2]
    score = 0.0
    for e in range(3):
        score = score + weights[bins, e] * (states[e][:, :, None] * items[e][:, 1:]).sum(3)
    # Products with 0 and 1, not a selection: its size would not be known to a compiler.
    real = (batch.slots[:, :-1] > 0).to(score.dtype)
    losses = F.softplus(-score[..., 0]) + F.softplus(score[..., 1])
    return (losses * real).sum() / real.sum()


def gate_weights(model: TripleExpert, dtype: torch.dtype) -> Tensor:
    """``[bins, 3]`` normalised sigmoids, computed in the given dtype."""
    weights = torch.sigmoid(model.gate.logit.to(dtype))
    return weights / weights.sum(1, keepdim=True)


def slot_mask(items: Tensor) -> Tensor:
    """``[B, 1, L, L]``: 0 where a key may be seen, else -1e9."""
    causal = torch.ones(items.shape[1], items.shape[1], dtype=torch.bool).tril()
    seen = (items != 0)[:, None, None] & causal
    return torch.where(seen, 0.0, -1e9)


def padded_encoder(net, x: Tensor, mask: Tensor) -> Tensor:
    """States of all slots ``[B, L, d]``, one operation after the other, as released."""
    p, training = net.dropout, net.training
    x = F.dropout(net.edge_norm(x + net.position.weight), p, training)
    batch, length, dim = x.shape
    for block in net.blocks:
        attention = block.attention
        shape = (batch, length, 3, attention.num_heads, dim // attention.num_heads)
        q, k, v = attention.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / shape[4] ** 0.5 + mask
        weights = F.dropout(torch.softmax(scores, 3), p, training)
        y = attention.out((weights @ v).transpose(1, 2).reshape(x.shape))
        x = block.norm1(x + F.dropout(y, p, training))
        y = block.down(F.relu(block.up(x)))
        x = block.norm2(x + F.dropout(y, p, training))
    return x


def _stacked_encoder(nets, x: Tensor, mask: Tensor) -> Tensor:
    """x ``[E, B, L, d]``: one batched product where the release has E."""
    p, training = nets[0].dropout, nets[0].training
    experts, batch, length, dim = x.shape

    def stack(*path: str) -> Tensor:
        found = []
        for net in nets:
            for name in path:
                net = net[int(name)] if name.isdigit() else getattr(net, name)
            found.append(net)
        return torch.stack(found)

    def norm(x: Tensor, *path: str) -> Tensor:
        unit = F.layer_norm(x, (dim,), eps=1e-6)
        weight, shift = stack(*path, "weight"), stack(*path, "bias")
        return unit * weight[:, None] + shift[:, None]

    x = (x + stack("position", "weight")[:, None]).flatten(1, 2)  # [E, B L, d]
    x = F.dropout(norm(x, "edge_norm"), p, training)
    heads = nets[0].blocks[0].attention.num_heads
    for number in range(len(nets[0].blocks)):
        block = ("blocks", str(number))
        qkv = torch.bmm(x, stack(*block, "attention", "qkv", "weight").mT)
        shape = (experts * batch, length, 3, heads, dim // heads)
        q, k, v = qkv.view(shape).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / shape[4] ** 0.5 + mask.repeat(experts, 1, 1, 1)
        weights = F.dropout(torch.softmax(scores, 3), p, training)
        y = (weights @ v).transpose(1, 2).reshape(x.shape)
        y = torch.bmm(y, stack(*block, "attention", "out", "weight").mT)
        x = norm(x + F.dropout(y, p, training), *block, "norm1")
        up = (stack(*block, "up", "bias")[:, None], stack(*block, "up", "weight").mT)
        h = F.relu(torch.baddbmm(up[0], x, up[1]))
        down = (stack(*block, "down", "bias")[:, None], stack(*block, "down", "weight").mT)
        y = torch.baddbmm(down[0], h, down[1])
        x = norm(x + F.dropout(y, p, training), *block, "norm2")
    return x.view(experts, batch, length, dim)
