"""How the frequency gate is learned: on held-out targets, with a say for rare and unseen items.

A gate trained on training positives trusts the ID vectors of rare items, because the experts have
memorised exactly those positives. So the gate is fitted where it will be used: on targets that the
experts have not been trained on (the validation targets), everything else frozen.

Two rules follow, for cross-entropy fits how many rare and unseen items are wanted, which is few,
and so pushes all of them down. The weights of rows that are mostly rare items' are raised together
as far as the ranking of *all* validation targets does not pay more than ``rare_tolerance``; then
those of items without any training interaction, which have a row of their own, as far as it does
not pay more than ``cold_tolerance``. That price depends on how many items are unseen: when items
are added after training, the row of unseen items is fitted anew for the larger catalogue
(:func:`fit_new_items`).
The comparison of the ways to learn a gate stands in ``docs/gate.md``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from padkern.data.batch import stream_key
from padkern.data.split import EvalSplit
from padkern.models.gates import ItemGate
from padkern.models.triple_expert import ExpertModel
from padkern.modules import FrequencyGate
from padkern.ops.catalogue_loss import catalogue_cross_entropy
from padkern.ops.ranking import count_ranks
from padkern.pad.config import GateConfig
from padkern.pad.evaluation import Evaluation, evaluate
from padkern.pad.significance import metric_values

CHUNK = 256
#: Factors on the unseen bin's weights that are tried, ascending.
UNSEEN_FACTORS = tuple(1.1**step for step in range(11))
#: Factors on the weights of rare items that are tried, ascending.
RARE_FACTORS = tuple(1.05**step for step in range(11))
#: Bounds on the share of items that :func:`fit_new_items` hides.
_NEW_LEAST, _NEW_MOST = 0.05, 0.5


@dataclass(frozen=True)
class HeldOut:
    """Frozen expert outputs on held-out targets: all that a gate fit reads.

    Attributes:
        split: histories and targets.
        states: ``[n, sum d_e]`` user states.
        tables: item vectors ``[N + 1, d_e]`` of every expert.
        rare: ``[N + 1]`` bool, items of which a fit may hide some; ``None``: none.
        cold: ``tables`` with all rare items hidden; empty without them.
        frequency: ``[N + 1]`` training counts, by which a fit knows the items to raise; ``None``:
            it raises unseen items alone.
    """

    split: EvalSplit
    states: Tensor
    tables: list[Tensor]
    rare: Tensor | None = None
    cold: list[Tensor] = field(default_factory=list)
    frequency: Tensor | None = None


def rare_items(train_frequency: np.ndarray, config: GateConfig) -> np.ndarray:
    """``[N + 1]`` bool: items with 1 to ``hide_max_frequency`` training interactions."""
    return (train_frequency > 0) & (train_frequency <= config.hide_max_frequency)


def hidden_in_fit(train_frequency: np.ndarray, config: GateConfig) -> np.ndarray | None:
    """The rare items where a held-out fit hides some of them, else None."""
    return rare_items(train_frequency, config) if config.fit_hide else None


@torch.no_grad()
def held_out(
    model: ExpertModel,
    split: EvalSplit,
    rare: np.ndarray | None = None,
    train_frequency: np.ndarray | None = None,
) -> HeldOut:
    """Encodes the histories of ``split`` once.

    Args:
        model: the frozen experts.
        split: histories and targets.
        rare: ``[N + 1]`` bool, items that a fit may hide, see :func:`hidden_in_fit`.
        train_frequency: ``[N + 1]`` training counts, for a fit that raises rare items.
    """
    model.eval()
    scorer = model.frozen()
    parts = []
    for low in range(0, len(split), CHUNK):
        rows = np.minimum(np.arange(low, low + CHUNK), len(split) - 1)
        states = scorer.user_states(split.history.take(rows))
        parts.append(states[: len(split) - low])
    states, tables = torch.cat(parts), list(scorer.tables)
    data = HeldOut(split, states, tables)
    if train_frequency is not None:
        counts = torch.from_numpy(train_frequency).to(model.text.device)
        data = replace(data, frequency=counts)
    if rare is None:
        return data
    items = torch.from_numpy(rare).to(model.text.device)
    return replace(data, rare=items, cold=model.tables(items))


def fit_gate(
    model: ExpertModel,
    data: HeldOut,
    config: GateConfig,
    *,
    seed: int,
    users: np.ndarray | None = None,
    mask_repeats: bool = True,
) -> Tensor:
    """Gate table that minimises the cross-entropy of held-out targets, experts frozen.

    Args:
        model: gives bins and the gate, where the fit starts; not changed.
        data: see :func:`held_out`.
        config: steps, learning rate, tolerances, share of rare items that a step hides, and the
            penalty on an item's own logits of a ``"per_item"`` gate.
        seed: root of the draws.
        users: rows of the split to fit on; default all.
        mask_repeats: as in the evaluation whose NDCG@10 decides how far items are raised.

    Returns:
        Logits of the shape of ``model.gate.logit`` (``[num_bins + 1, E]`` of a gate on bins), on
        the model's device; those of the model where the gate has nothing to learn.
    """
    gate = copy.deepcopy(model.gate)
    if gate.form == "uniform":
        return gate.logit.detach()
    users = np.arange(len(data.split)) if users is None else users

    def hide(step: int) -> Tensor | None:
        return _hidden(data, config, seed, step)

    _descend(gate, model, data, config, users, hide, (seed, "gate"))
    if gate.form == "sigmoid":  # its weights sum to 1
        return gate.logit.detach()
    lift = partial(_raise, gate, model, data, users, mask_repeats=mask_repeats)
    if config.rare_tolerance > 0 and data.frequency is not None:
        rows = rare_rows(model, data.frequency, config.hide_max_frequency)
        lift(rows, RARE_FACTORS, config.rare_tolerance)
    if config.cold_tolerance > 0:
        lift(_unseen_rows(model), UNSEEN_FACTORS, config.cold_tolerance)
    return gate.logit.detach()


def fit_new_items(
    model: ExpertModel,
    data: HeldOut,
    config: GateConfig,
    *,
    share: float,
    seed: int,
    mask_repeats: bool = True,
) -> Tensor:
    """Gate table for a catalogue of which a share is new: the unseen row is fitted anew.

    The raise of :func:`fit_gate` is paid for by the unseen items of the catalogue, which may be a
    handful; the same weights on many added items would fill the lists with them. So arrivals are
    simulated: in every step a random ``share`` of the *seen* items is treated as unseen, and their
    targets, which real new items would have too, decide on the row. It is then raised within
    ``cold_tolerance`` while one such draw is hidden.

    Args:
        model: gives bins and the fitted gate; not changed.
        data: see :func:`held_out`, with ``rare`` every seen item.
        config: steps, learning rate and tolerance of the fit.
        share: of the catalogue that is new, from 0 to 1; taken as at least 5 % and at most 50 %,
            because few items have too few targets to fit on and more leave too little of the rest.
        seed: root of the draws.
        mask_repeats: as in :func:`fit_gate`.

    Returns:
        Logits like :func:`fit_gate`; only the row of unseen items differs from the model's. The
        model's own where there is no such row, nothing is learned or there is no target.
    """
    gate = copy.deepcopy(model.gate)
    if gate.form == "uniform" or model.unseen_bin is None or not len(data.split):
        return gate.logit.detach()
    rare = data.rare
    if rare is None:
        raise ValueError("data must be held out with the items that may be hidden (rare)")
    row = gate.unseen_row(model.unseen_bin)
    with torch.no_grad():
        gate.logit[row] = gate.fresh()[row]
    users, share = np.arange(len(data.split)), min(max(share, _NEW_LEAST), _NEW_MOST)

    def hide(step: int) -> Tensor:
        return _drawn(rare, share, seed, "gate/new", step)

    _descend(gate, model, data, config, users, hide, (seed, "gate/arrivals"), row=row)
    if config.cold_tolerance > 0 and gate.form != "sigmoid":
        hidden = hide(config.steps)
        _raise(
            gate, model, data, users, _unseen_rows(model, hidden), UNSEEN_FACTORS,
            config.cold_tolerance, mask_repeats=mask_repeats, hidden=hidden,
        )  # fmt: skip
    return gate.logit.detach()


@torch.enable_grad()
def _descend(
    gate: Any,
    model: ExpertModel,
    data: HeldOut,
    config: GateConfig,
    users: np.ndarray,
    hide: Callable[[int], Tensor | None],
    stream: tuple[int, str],
    row: int | None = None,
) -> None:
    """Minimises the cross-entropy of the targets over the gate, or over one row of its table."""
    device = model.text.device
    optimizer = torch.optim.Adam(gate.parameters(), lr=config.lr)
    targets = torch.from_numpy(data.split.targets).to(device)
    candidates = torch.arange(1, model.num_items + 1, device=device)  # all but padding
    for step in range(config.steps if len(users) else 0):
        rng = np.random.default_rng(stream_key(*stream, step))
        chosen = rng.choice(users, min(config.users_per_step, len(users)), replace=False)
        history = data.split.history.take(chosen)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 - step / config.steps)
        optimizer.zero_grad(set_to_none=True)
        loss = catalogue_cross_entropy(
            data.states[chosen],
            _folded(gate, model, data, hide(step)),
            targets[chosen],
            candidates=candidates,
            excluded_values=torch.from_numpy(history.values).to(device),
            excluded_offsets=torch.from_numpy(history.offsets).to(device),
            backend=model.backend,
        )
        if gate.form == "per_item" and row is None:
            loss = loss + config.pull * gate.spread()
        loss.backward()
        if row is not None and gate.logit.grad is not None:
            # Adam leaves a number whose gradient was always zero where it is.
            others = torch.arange(len(gate.logit), device=device) != row
            gate.logit.grad[others] = 0
        optimizer.step()


def _hidden(data: HeldOut, config: GateConfig, seed: int, step: int) -> Tensor | None:
    if data.rare is None or config.fit_hide == 0:
        return None
    return _drawn(data.rare, config.fit_hide, seed, "gate/hide", step)


def _drawn(rare: Tensor, share: float, seed: int, stream: str, step: int) -> Tensor:
    """``[N + 1]`` bool, a random share of the items that may be hidden."""
    rng = np.random.default_rng(stream_key(seed, stream, step))
    drawn = torch.from_numpy(rng.random(len(rare)) < share)
    return rare & drawn.to(rare.device)


def _folded(
    gate: FrequencyGate, model: ExpertModel, data: HeldOut, hidden: Tensor | None = None
) -> Tensor:
    tables = data.tables
    if hidden is not None:
        pairs = zip(data.cold, data.tables, strict=True)
        tables = [
            warm if cold is warm else torch.where(hidden[:, None], cold, warm)
            for cold, warm in pairs
        ]
    return gate.fold(tables, model.bins(hidden), backend=model.backend)


def _unseen_rows(model: ExpertModel, hidden: Tensor | None = None) -> list[int]:
    """Row of the gate's table that unseen and hidden items read, if there are any."""
    unseen_bin = model.unseen_bin
    if unseen_bin is None or not bool((model.bins(hidden) == unseen_bin).any()):
        return []  # of rows that nobody reads every factor would do, and the largest is no answer
    return [model.gate.unseen_row(unseen_bin)]


def rare_rows(model: ExpertModel, train_frequency: Tensor, most: int) -> list[int]:
    """Rows of the gate's table (bins, or knots) that are mostly rare items'.

    Args:
        model: gives the gate and the bins.
        train_frequency: ``[N + 1]`` training counts.
        most: an item with 1 to this many training interactions is rare.

    Returns:
        Rows of which rare items have at least half: of the items that read the row, each with its
        share of it.
    """
    gate, bins = model.gate, model.item_bins
    read = gate.mix if isinstance(gate, ItemGate) else F.one_hot(bins, len(gate.logit)).float()
    read = read[1:] * (train_frequency[1:, None] > 0)
    rare, total = read[train_frequency[1:] <= most].sum(0), read.sum(0)
    return torch.nonzero((total > 0) & (2 * rare >= total)).squeeze(1).tolist()


@torch.no_grad()
def _raise(
    gate: FrequencyGate,
    model: ExpertModel,
    data: HeldOut,
    users: np.ndarray,
    rows: Sequence[int],
    factors: Sequence[float],
    tolerance: float,
    *,
    mask_repeats: bool,
    hidden: Tensor | None = None,
) -> None:
    """Largest factor on rows of the gate whose NDCG@10 over all users stays within tolerance."""
    if not (rows and len(users)):
        return
    before = gate.logit.detach().clone()
    states, history = data.states[users], data.split.history.take(users)
    # Popular items first: most users are then known to miss the first ten after a few items.
    counts = np.bincount(history.values, minlength=model.num_items + 1)
    popular = np.argsort(-counts[1:], kind="stable") + 1
    gained = np.zeros(len(factors))
    for place, factor in enumerate(factors):
        gate.logit[rows] = before[rows] + math.log(factor)
        ranks = count_ranks(
            states, _folded(gate, model, data, hidden), data.split.targets[users],
            history.values, history.offsets,
            mask_repeats=mask_repeats, at_most=10, order=popular, backend=model.backend,
        )  # fmt: skip
        gained[place] = metric_values(ranks.cpu().numpy(), "ndcg@10").sum()
    floor = gained.max() * (1 - tolerance)
    best = max(f for f, g in zip(factors, gained, strict=True) if g >= floor)
    gate.logit[rows] = before[rows] + math.log(best)


@torch.no_grad()
def set_gate(model: ExpertModel, logit: Tensor) -> None:
    """Writes a gate table into the model."""
    model.gate.logit.copy_(logit)


def cross_fitted(
    model: ExpertModel,
    data: HeldOut,
    train_frequency: np.ndarray,
    config: GateConfig,
    *,
    seed: int,
    folds: int = 2,
    mask_repeats: bool = True,
) -> Evaluation:
    """Evaluates the fitted gate on targets it was not fitted on.

    The users are cut into ``folds``; each fold is ranked with a gate fitted on the others. The
    model's own gate is left as it was.

    Returns:
        The evaluation of ``data.split`` with out-of-fold ranks.
    """
    fold = np.random.default_rng(stream_key(seed, "folds")).permutation(len(data.split)) % folds
    before = model.gate.logit.detach().clone()
    # Starting from the model's gate would leak a fold's own targets into its fit.
    fresh = model.gate.fresh()
    parts: list[Evaluation] = []
    for k in range(folds):
        set_gate(model, fresh)
        logit = fit_gate(
            model, data, config,
            seed=seed, users=np.flatnonzero(fold != k), mask_repeats=mask_repeats,
        )  # fmt: skip
        set_gate(model, logit)
        part = evaluate(
            model, data.split, train_frequency=train_frequency,
            item_bins=model.item_bins.cpu().numpy(), mask_repeats=mask_repeats, with_top=True,
            states=data.states,
        )  # fmt: skip
        parts.append(part)
        set_gate(model, before)
    result = parts[0]
    for k, part in enumerate(parts):
        inside = fold == k
        result.ranks[inside] = part.ranks[inside]
        if result.top is not None and part.top is not None:
            result.top[inside] = part.top[inside]
    return result
