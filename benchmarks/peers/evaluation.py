"""The evaluation of a split in the forms that users run: states, scores, ranks, Hit and NDCG."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from padkern.data.batch import pack_ragged
from padkern.data.split import EvalSplit
from padkern.models.triple_expert import TripleExpert

from . import ranking
from .training import (
    gate_weights,
    packed_encoder,
    padded_encoder,
    slot_mask,
    torch_products,
)

BATCHES = (16, 64, 256)


class Result(NamedTuple):
    """Ranks float64 ``[n]`` and the two metrics at 10."""

    ranks: Tensor
    hit: float
    ndcg: float


def metrics(ranks: Tensor) -> Result:
    """Hit@10 and NDCG@10 of ranks."""
    hit = ranks <= 10
    gain = torch.where(hit, 1 / torch.log2(ranks + 1), 0.0)
    return Result(ranks, float(hit.double().mean()), float(gain.mean()))


def first(split: EvalSplit, users: int) -> EvalSplit:
    """The first users of a split."""
    rows = np.arange(min(users, len(split)))
    return EvalSplit(split.name, split.users[rows], split.history.take(rows), split.targets[rows])


# ---- as released ---------------------------------------------------------------------------------


def torch_order(scores: Tensor) -> Tensor:
    """Items from best to worst, by torch."""
    return torch.argsort(scores, descending=True)


def numpy_order(scores: Tensor) -> Tensor:
    """The same by numpy, whose sort uses vector instructions where the processor has them."""
    return torch.from_numpy(np.argsort(-scores.numpy()))


Order = Callable[[Tensor], Tensor]


@torch.no_grad()
@torch_products()
def authors_tables(model: TripleExpert, batch: int = 16) -> list[Tensor]:
    """Item vectors of the three experts: small batches, a list of rows, stacked."""
    rec, aligned, language = model.experts.values()
    rows: list[list[Tensor]] = [[], [], []]
    for low in range(0, model.num_items + 1, batch):
        part = slice(low, low + batch)
        ids, text = rec.tower.id[part], model.text[part]
        joined = torch.cat([aligned.tower.id[part], aligned.tower.project(text)], 1)
        found = (ids, aligned.tower.join(joined), language.tower.project(text))
        for expert, vectors in zip(rows, found, strict=True):
            expert.extend(vectors.unbind())
    return [torch.stack(vectors) for vectors in rows]


@torch.no_grad()
def authors_states(model: TripleExpert, tables: Sequence[Tensor], slots: Tensor) -> list[Tensor]:
    """``[B, d]`` per expert: every slot of the padded window through the encoder, the last kept."""
    mask = slot_mask(slots)
    nets = [expert.encoder for expert in model.experts.values()]
    return [
        padded_encoder(net, table[slots], mask)[:, -1]
        for net, table in zip(nets, tables, strict=True)
    ]


def windows(split: EvalSplit, low: int, high: int, length: int) -> Tensor:
    """``[B, length]`` left-padded last items, user by user."""
    rows = []
    for user in range(low, high):
        window = split.history.row(user)[-length:].tolist()
        rows.append([0] * (length - len(window)) + window)
    return torch.tensor(rows)


def authors_ranks(
    states: Sequence[Tensor],
    tables: Sequence[Tensor],
    weights: Tensor,
    split: EvalSplit,
    low: int,
    order: Order,
) -> list[float]:
    """Gated float64 scores ``[B, N + 1]``; then per user a mask, a sort and a product of labels.

    Args:
        states: ``[B, d]`` per expert, of the users from ``low`` on.
        tables: ``[N + 1, d]`` per expert.
        weights: float64 ``[N + 1, 3]`` gate of every item.
        order: sorts the scores of one user.
    """
    scores: Tensor | float = 0.0
    for number, (state, table) in enumerate(zip(states, tables, strict=True)):
        scores = scores + weights[:, number] * (state @ table.T)
    places = torch.arange(1, len(tables[0]), dtype=torch.float64)
    ranks = []
    for row, user in zip(scores, range(low, low + len(states[0])), strict=True):
        row[torch.from_numpy(split.history.row(user))] = -torch.inf
        label = torch.zeros(len(row), dtype=torch.float64)
        label[int(split.targets[user])] = 1.0
        best = order(row[1:])
        ranks.append(float((label[1:].take(best) * places).sum()))
    return ranks


def item_weights(model: TripleExpert) -> Tensor:
    """float64 ``[N + 1, 3]`` gate of every item."""
    return gate_weights(model, torch.float64)[model.item_bins]


@torch.no_grad()
def authors_evaluate(
    model: TripleExpert, tables: Sequence[Tensor], split: EvalSplit, batch: int, order: Order
) -> Result:
    """The released loop over the users of a split, from item tables that are there."""
    weights = item_weights(model)
    ranks: list[float] = []
    for low in range(0, len(split), batch):
        slots = windows(split, low, min(low + batch, len(split)), model.max_len)
        states = authors_states(model, tables, slots)
        ranks += authors_ranks(states, tables, weights, split, low, order)
    return metrics(torch.tensor(ranks, dtype=torch.float64))


def best_batch(run: Callable[[int], object]) -> int:
    """The fastest of ``BATCHES``, each tried twice."""
    times: dict[int, float] = {}
    for batch in BATCHES * 2:
        started = time.perf_counter()
        run(batch)
        spent = time.perf_counter() - started
        times[batch] = min(spent, times.get(batch, spent))
    return min(times, key=lambda batch: times[batch])


# ---- packed, eager torch -------------------------------------------------------------------------


def problem(states: Tensor, matrix: Tensor, split: EvalSplit) -> ranking.Problem:
    """What the ranking forms read."""
    history = split.history
    arrays = (split.targets, history.values, history.offsets)
    found = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    return ranking.Problem(states, matrix, *found, torch.arange(1, len(matrix)))


def folded(model: TripleExpert, tables: Sequence[Tensor]) -> Tensor:
    """``[N + 1, 3 d]`` gated item matrix in eager torch."""
    weights = gate_weights(model, tables[0].dtype)[model.item_bins]
    return torch.cat([weights[:, e, None] * table for e, table in enumerate(tables)], 1)


@torch.no_grad()
def packed_states(
    model: TripleExpert, tables: Sequence[Tensor], split: EvalSplit, batch: int
) -> Tensor:
    """``[n, 3 d]`` states of all users, their windows packed."""
    parts = []
    for low in range(0, len(split), batch):
        rows = np.arange(low, min(low + batch, len(split)))
        packed = pack_ragged(split.history.take(rows), model.max_len)
        states = [
            packed_encoder(expert.encoder, table.index_select(0, packed.items), packed)
            for expert, table in zip(model.experts.values(), tables, strict=True)
        ]
        parts.append(torch.cat(states, 1).index_select(0, packed.last))
    return torch.cat(parts)


@torch.no_grad()
@torch_products()
def packed_evaluate(model: TripleExpert, split: EvalSplit, batch: int, chunk: int) -> Result:
    """One pass over the items, packed encoders, scores of ``chunk`` users counted at a time."""
    tables = model.tables()
    states = packed_states(model, tables, split, batch)
    return metrics(ranking.mm_count(problem(states, folded(model, tables), split), chunk).double())
