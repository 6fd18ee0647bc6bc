"""Train, validation and test parts of a data set."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from padkern.data.dataset import Dataset, Ragged
from padkern.errors import DataError

__all__ = [
    "EvalSplit",
    "Split",
    "global_time",
    "leave_one_out",
    "make_split",
    "target_positions",
]


@dataclass(frozen=True, eq=False)
class EvalSplit:
    """One held-out target per evaluated user.

    Attributes:
        name: ``"valid"`` or ``"test"``.
        users: int64 ``[n]``, rows of ``Dataset.users``.
        history: ``n`` rows, everything the user did before the target; all of it is masked in the
            ranking, also what lies beyond the model's window.
        targets: int64 ``[n]``, internal item ids.
    """

    name: str
    users: np.ndarray
    history: Ragged
    targets: np.ndarray

    def __len__(self) -> int:
        return self.targets.size


@dataclass(frozen=True, eq=False)
class Split:
    """A data set cut for training and evaluation.

    Attributes:
        kind: ``"leave_one_out"`` or ``"global_time"``.
        train: one row per user of the data set; may be empty.
        valid: targets for selection.
        test: targets for the report; never used for selection.
        train_frequency: int64 ``[N + 1]``, occurrences in the train rows, repeats counted;
            index 0 is 0.
        info: JSON-serialisable details, such as users left out of the evaluation and the time
            points of the cut.
    """

    kind: str
    train: Ragged
    valid: EvalSplit
    test: EvalSplit
    train_frequency: np.ndarray
    info: dict[str, float | int] = field(default_factory=dict)


def leave_one_out(dataset: Dataset, *, min_length: int = 3) -> Split:
    """Last item of each user for test, the one before for validation, the rest for training.

    Users shorter than ``min_length`` are trained on whole and are not evaluated; their number is
    ``info["users_not_evaluated"]``.

    Args:
        dataset: the data set.
        min_length: shortest sequence that is evaluated, at least 3.

    Returns:
        The split: history and target are ``s[:-2]``, ``s[-2]`` for validation and ``s[:-1]``,
        ``s[-1]`` for test.

    Raises:
        ValueError: if ``min_length`` is below 3.
        DataError: if no user is long enough.
    """
    if min_length < 3:
        raise ValueError(f"min_length must be at least 3, got {min_length}")
    sequences = dataset.sequences
    lengths = sequences.lengths
    evaluated = lengths >= min_length
    users = np.flatnonzero(evaluated)
    if not users.size:
        longest = int(lengths.max()) if lengths.size else 0
        raise DataError(
            f"{dataset.name}: no user is long enough: leave-one-out needs {min_length} "
            f"interactions of one user, the longest of {lengths.size} users has {longest}"
        )
    rows = sequences.take(users)
    ends = sequences.offsets[1:][users]
    return _split(
        "leave_one_out",
        dataset,
        train=sequences.head(np.where(evaluated, lengths - 2, lengths)),
        valid=EvalSplit("valid", users, rows.head(rows.lengths - 2), sequences.values[ends - 2]),
        test=EvalSplit("test", users, rows.head(rows.lengths - 1), sequences.values[ends - 1]),
        info={
            "min_length": min_length,
            "users_not_evaluated": int(lengths.size - users.size),
        },
    )


def global_time(
    dataset: Dataset, *, valid_quantile: float = 0.8, test_quantile: float = 0.9
) -> Split:
    """Train before one point in time, validate after it, test after a later one.

    With t1 and t2 the two quantiles of all timestamps: train rows hold what happened before t1; a
    user's validation target is the first interaction in [t1, t2), the test target the first one at
    or after t2, and the history of either is everything the user did before that target. A user
    without a target or without a history is not evaluated in that part. Unlike leave-one-out, no
    training interaction is younger than a validation target.

    Args:
        dataset: a data set with timestamps.
        valid_quantile: quantile of all timestamps that gives t1.
        test_quantile: quantile of all timestamps that gives t2, above ``valid_quantile``.

    Raises:
        ValueError: if the quantiles are not 0 < valid < test < 1.
        DataError: without timestamps, or if a part is empty.
    """
    if not 0 < valid_quantile < test_quantile < 1:
        raise ValueError(
            "quantiles must satisfy 0 < valid_quantile < test_quantile < 1, "
            f"got {valid_quantile} and {test_quantile}"
        )
    times = dataset.timestamps
    if times is None:
        raise DataError(
            f"{dataset.name}: the global time split needs timestamps, and this data set has only "
            "the order; use leave-one-out, or an interactions table with a timestamp column"
        )
    if not times.size:
        raise DataError(f"{dataset.name}: no interactions to split")
    # "higher" picks an existing timestamp, so int64 times stay exact.
    t1, t2 = np.quantile(times, [valid_quantile, test_quantile], method="higher")
    sequences = dataset.sequences
    lengths = sequences.lengths
    before_valid = _count_per_row(sequences, times < t1)
    before_test = _count_per_row(sequences, times < t2)
    train = sequences.head(before_valid)
    if not train.values.size:
        raise DataError(
            f"{dataset.name}: no warm item: no interaction is older than the "
            f"{valid_quantile:g} quantile of the timestamps ({t1}), so nothing is left for training"
        )
    parts = {}
    for name, position, limit in (
        ("valid", before_valid, before_test),
        ("test", before_test, lengths),
    ):
        users = np.flatnonzero((position < limit) & (position > 0))
        if not users.size:
            raise DataError(
                f"{dataset.name}: the {name} part of the global time split is empty: no user has "
                "both a history and an interaction in its period; move the quantiles"
            )
        target = sequences.values[sequences.offsets[:-1][users] + position[users]]
        parts[name] = EvalSplit(name, users, sequences.take(users).head(position[users]), target)
    evaluated = np.union1d(parts["valid"].users, parts["test"].users)
    info = {
        "valid_quantile": valid_quantile,
        "test_quantile": test_quantile,
        "valid_time": t1.item(),
        "test_time": t2.item(),
        "users_not_evaluated": int(lengths.size - evaluated.size),
    }
    return _split("global_time", dataset, train, parts["valid"], parts["test"], info)


def make_split(
    dataset: Dataset,
    kind: str = "leave_one_out",
    **options: float | int,
) -> Split:
    """Cut the data set by the named rule and check that something can be trained on it.

    Args:
        dataset: the data set.
        kind: ``"leave_one_out"`` or ``"global_time"``.
        **options: keyword arguments of that function.

    Raises:
        ValueError: on an unknown ``kind``.
        DataError: if the split is impossible or leaves no training pair, that is, no user with two
            training interactions.
    """
    rules = {"leave_one_out": leave_one_out, "global_time": global_time}
    if kind not in rules:
        raise ValueError(f"split must be one of {', '.join(rules)}, got {kind!r}")
    split: Split = rules[kind](dataset, **options)  # type: ignore[operator]
    if split.train.lengths.max(initial=0) < 2:
        raise DataError(
            f"{dataset.name}: no warm item can be learned: after the {kind.replace('_', '-')} "
            "split no user has two training interactions"
        )
    return split


def target_positions(
    sequences: Ragged, timestamps: np.ndarray | None, split: Split
) -> tuple[np.ndarray, np.ndarray]:
    """Where the rule of a split finds the test targets of other sequences.

    Args:
        sequences: item ids, oldest first.
        timestamps: parallel to ``sequences.values``; needed by a global time split.
        split: gives the kind, its smallest length or its test time.

    Returns:
        Rows int64 ``[n]`` that have a test target, and its position in each, which is at least 1.

    Raises:
        DataError: a global time split, and no timestamps.
    """
    lengths = sequences.lengths
    if split.kind == "leave_one_out":
        rows = np.flatnonzero(lengths >= split.info["min_length"])
        return rows, lengths[rows] - 1
    if timestamps is None:
        raise DataError("the global time split needs timestamps, and there are none")
    before = _count_per_row(sequences, timestamps < split.info["test_time"])
    rows = np.flatnonzero((before < lengths) & (before > 0))
    return rows, before[rows]


def _count_per_row(sequences: Ragged, flags: np.ndarray) -> np.ndarray:
    total = np.zeros(flags.size + 1, dtype=np.int64)
    np.cumsum(flags, out=total[1:])
    return total[sequences.offsets[1:]] - total[sequences.offsets[:-1]]


def _split(
    kind: str,
    dataset: Dataset,
    train: Ragged,
    valid: EvalSplit,
    test: EvalSplit,
    info: dict[str, float | int],
) -> Split:
    frequency = np.bincount(train.values, minlength=dataset.num_items + 1).astype(np.int64)
    return Split(kind, train, valid, test, frequency, info)
