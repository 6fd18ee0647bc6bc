"""Items held out of a data set entirely, and the test targets among them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from padkern.data.dataset import Dataset, Ragged
from padkern.data.random_streams import stream_seed
from padkern.data.split import EvalSplit, Split, target_positions
from padkern.errors import DataError

__all__ = ["ColdData", "cold_targets", "hold_out_items"]


@dataclass(frozen=True, eq=False)
class ColdData:
    """A data set without the held-out items, and what was taken away.

    Ids of the grown catalogue: 1..K are the ids of ``kept``, K + 1..K + M the held-out items.

    Attributes:
        kept: the data set to train on. It knows nothing of the held-out items: they are neither in
            its catalogue nor in any of its sequences. Users who are left with nothing are gone.
        items: external ids of the M held-out items, in catalogue order.
        texts: their texts.
        rows: int64 ``[M]``, their internal ids in the whole data set.
        kept_rows: int64 ``[K + 1]``, internal ids in the whole data set of the kept items, 0 first.
        sequences: the sequences of the users of ``kept`` with held-out items, in ids of the grown
            catalogue.
        timestamps: parallel to ``sequences.values``, or None.
    """

    kept: Dataset
    items: list[str]
    texts: list[str]
    rows: np.ndarray
    kept_rows: np.ndarray
    sequences: Ragged
    timestamps: np.ndarray | None


def hold_out_items(
    dataset: Dataset, share: float, seed: int, *, eligible: np.ndarray | None = None
) -> ColdData:
    """Takes a random share of the items out of a data set.

    Args:
        dataset: the whole data set.
        share: of the items, above 0 and below 1; at least one item is taken.
        seed: of the draw; the draw depends on nothing but the seed and the number of candidates.
        eligible: bool ``[N + 1]``, items that may be taken, such as those with a text vector;
            default all.

    Raises:
        ValueError: ``share`` or ``eligible`` does not fit.
        DataError: too few items or interactions would be left.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share must be above 0 and below 1, got {share}")
    allowed = np.ones(len(dataset.items), dtype=bool) if eligible is None else np.array(eligible)
    if allowed.shape != (len(dataset.items),) or allowed.dtype != bool:
        raise ValueError(
            f"eligible must be bool [{len(dataset.items)}], got {allowed.dtype}"
            f"{list(allowed.shape)}"
        )
    allowed[0] = False
    candidates = np.flatnonzero(allowed)
    count = max(1, math.floor(share * dataset.num_items))
    if count > candidates.size or count > dataset.num_items - 2:
        raise DataError(
            f"{dataset.name}: {count} of {dataset.num_items} items cannot be held out: "
            f"{candidates.size} may be taken and two must stay"
        )
    rng = np.random.default_rng(stream_seed(seed, "cold", "items"))
    rows = np.sort(rng.choice(candidates, count, replace=False))
    held = np.zeros(len(dataset.items), dtype=bool)
    held[rows] = True
    kept_rows = np.flatnonzero(~held)
    new_id = np.empty(len(dataset.items), dtype=np.int64)
    new_id[kept_rows] = np.arange(kept_rows.size)
    new_id[rows] = kept_rows.size + np.arange(rows.size)

    sequences = dataset.sequences
    warm = ~held[sequences.values]
    users = np.flatnonzero(np.bincount(sequences.row_index()[warm], minlength=len(sequences)))
    if users.size < 2:
        raise DataError(f"{dataset.name}: only {users.size} users are left without {count} items")
    mine = np.isin(sequences.row_index(), users)
    whole = sequences.take(users)
    whole = Ragged(new_id[whole.values], whole.offsets)
    times = None if dataset.timestamps is None else dataset.timestamps[mine]
    inside = whole.values < kept_rows.size
    kept = Dataset(
        name=dataset.name,
        users=[dataset.users[user] for user in users],
        items=[dataset.items[row] for row in kept_rows],
        sequences=_filtered(whole, inside),
        timestamps=None if times is None else times[inside],
        texts=[dataset.texts[row] for row in kept_rows],
        provenance={**dataset.provenance, "held_out_items": {"share": share, "seed": seed}},
    )
    return ColdData(
        kept,
        [dataset.items[row] for row in rows],
        [dataset.texts[row] for row in rows],
        rows,
        kept_rows,
        whole,
        times,
    )


def cold_targets(data: ColdData, split: Split) -> tuple[EvalSplit, Ragged]:
    """The test target of every user in the whole data set, by the rule of ``split``.

    A user's target is found among all interactions, the held-out items included: the last one
    (leave-one-out), or the first one at or after the split's test time (global time). Where it is a
    kept item, it is the target that ``split.test`` has for that user.

    Args:
        data: see :func:`hold_out_items`.
        split: of ``data.kept``.

    Returns:
        Targets in ids of the grown catalogue, with what the model may see as history: what came
        before, without held-out items (they did not exist then). Users without such a history are
        left out, and so are kept targets that ``split.test`` does not evaluate. Then the whole
        histories of the same users, held-out items included, for the mask of the ranking.

    Raises:
        DataError: no target is a held-out item.
    """
    size = len(data.kept.items)
    users, before = target_positions(data.sequences, data.timestamps, split)
    rows = data.sequences.take(users)
    targets = rows.values[rows.offsets[:-1] + before]
    whole = rows.head(before)
    history = _filtered(whole, whole.values < size)
    usable = (history.lengths > 0) & ((targets >= size) | np.isin(users, split.test.users))
    chosen = np.flatnonzero(usable)
    if not (targets[chosen] >= size).any():
        raise DataError(
            f"{data.kept.name}: none of the {len(data.items)} held-out items is a test target; "
            "raise the share"
        )
    part = EvalSplit("test", users[chosen], history.take(chosen), targets[chosen])
    return part, whole.take(chosen)


def _filtered(rows: Ragged, keep: np.ndarray) -> Ragged:
    """Rows with the flagged values alone."""
    lengths = np.bincount(rows.row_index()[keep], minlength=len(rows))
    return Ragged.from_lengths(rows.values[keep], lengths)
