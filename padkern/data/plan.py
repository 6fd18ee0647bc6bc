"""The batch plan: what a training step needs to know of its batch, made on the host.

Packed tokens, sampled negatives, the unique items of the batch and where each slot finds its own:
with them a step computes item vectors once per item instead of once per slot or once per catalogue
row. ``PLAN.md`` has the rules; the C++ form and the numpy form give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from padkern import _native
from padkern.data.batch import PackedSequences, stream_key
from padkern.data.buckets import bucketed
from padkern.data.dataset import Ragged
from padkern.data.plan_reference import plan_arrays
from padkern.data.random_streams import stream_seed

SAMPLINGS = ("uniform", "popularity", "in_batch")
_ROLES = ("inputs", "targets", "negatives")


@dataclass(frozen=True)
class BatchPlan:
    """One batch. Tensors are int64 on the CPU until :meth:`to`.

    Attributes:
        users: ``[B]`` rows of the training table.
        inputs: packed inputs, each row without its last item.
        targets: ``[T]`` item after each input token.
        negatives: ``[T, k]`` sampled items; k may be 0.
        unique: ``[U]`` ascending ids of all items of the batch.
        input_rows, target_rows, negative_rows: ``[T]``, ``[T]``, ``[T, k]`` places in ``unique``.
        starts, slots: per role (inputs, targets, negatives) the slots of each unique item in
            ascending order; item u has ``slots[role][starts[role][u]:starts[role][u + 1]]``.
        bins: ``[U]`` frequency bins.
        counts: ``[U]`` slots of each item over all roles.
        valid: ``[T]`` bool, false for tokens that fill up a bucket; None: all are the batch's own.
    """

    users: np.ndarray
    inputs: PackedSequences
    targets: Tensor
    negatives: Tensor
    unique: Tensor
    input_rows: Tensor
    target_rows: Tensor
    negative_rows: Tensor
    starts: tuple[Tensor, Tensor, Tensor]
    slots: tuple[Tensor, Tensor, Tensor]
    bins: Tensor
    counts: Tensor
    valid: Tensor | None = None

    @property
    def local_inputs(self) -> PackedSequences:
        """The packed inputs with places in ``unique`` for item ids."""
        groups = (self.slots[0], self.starts[0])
        return replace(self.inputs, items=self.input_rows, groups=groups)

    def keyed(self, seed: int, step: int) -> BatchPlan:
        """The same batch with dropout masks that are a function of (seed, step)."""
        return replace(self, inputs=self.inputs.keyed(seed, step))

    def to(self, device: torch.device | str) -> BatchPlan:
        """The plan on another device; ``users`` stay on the host."""

        def move(value: object) -> object:
            if isinstance(value, tuple):
                return tuple(part.to(device) for part in value)
            return value.to(device) if isinstance(value, (Tensor, PackedSequences)) else value

        return BatchPlan(**{name: move(value) for name, value in vars(self).items()})  # type: ignore[arg-type]


class PlanSource:
    """Training rows and the way negatives are drawn from them.

    Args:
        train: training rows, one per user, ids 1..N.
        num_items: N, below 2**31.
        max_len: inputs per user: all but the last of its last ``max_len + 1`` items.
        item_bins: ``[N + 1]`` frequency bins; all 0 by default.
        candidates: ids that may be negatives; default every item of ``train``, so that items never
            seen in training are not.
        sampling: ``"uniform"``, ``"popularity"`` (training count to the power ``power``) or
            ``"in_batch"`` (the batch's targets).
        power: exponent of ``"popularity"``.

    Raises:
        ValueError: an id outside 1..N, no candidate, an unknown sampling.
    """

    def __init__(
        self,
        train: Ragged,
        *,
        num_items: int,
        max_len: int,
        item_bins: np.ndarray | None = None,
        candidates: np.ndarray | None = None,
        sampling: str = "uniform",
        power: float = 0.75,
    ) -> None:
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
        values = np.ascontiguousarray(train.values)
        if len(values) and not 1 <= values.min() <= values.max() <= num_items:
            raise ValueError(
                f"train must hold item ids from 1 to {num_items}, "
                f"got {values.min()} to {values.max()}"
            )
        if not 0 < num_items < 2**31:
            raise ValueError(f"num_items must be from 1 to 2**31 - 1, got {num_items}")
        if max_len < 1:
            raise ValueError(f"max_len must be at least 1, got {max_len}")
        pool = np.unique(values if candidates is None else candidates).astype(np.int64)
        if not len(pool):
            raise ValueError("candidates must not be empty")
        if pool[0] < 1 or pool[-1] > num_items:
            raise ValueError(
                f"candidates must be item ids from 1 to {num_items}, got {pool[0]} to {pool[-1]}"
            )
        bins = np.zeros(num_items + 1) if item_bins is None else item_bins
        if np.shape(bins) != (num_items + 1,):
            raise ValueError(f"item_bins must be [{num_items + 1}], got {list(np.shape(bins))}")
        if not 0 <= power < float("inf"):
            raise ValueError(f"power must be at least 0 and finite, got {power}")
        self.train, self.num_items, self.max_len = train, num_items, max_len
        self.bins = np.ascontiguousarray(bins, dtype=np.int64)
        self.candidates, self.sampling = pool, sampling
        self.cumulative: np.ndarray | None = None
        if sampling == "popularity":
            weights = np.bincount(values, minlength=num_items + 1)[pool].astype(np.float64) ** power
            self.cumulative = np.cumsum(weights)
            if not self.cumulative[-1] > 0:
                raise ValueError("candidates must include an item of train to draw by popularity")
        key = np.unique(train.row_index() * (num_items + 1) + values)
        self._own_keys = key
        counts = np.bincount(key // (num_items + 1), minlength=len(train))
        own = Ragged.from_lengths(key % (num_items + 1), counts)
        arrays = (values, train.offsets, own.values, own.offsets, pool, self.cumulative, self.bins)
        # In the order of csrc/batch_plan/bindings.cpp; contiguous, as the core reads them.
        self._arrays = [None if a is None else np.ascontiguousarray(a) for a in arrays]

    @cached_property
    def window(self) -> Ragged:
        """The last ``max_len + 1`` items of every row."""
        return self.train.tail(self.max_len + 1)

    def owns(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether each item is among the training items of its row."""
        wanted = rows * (self.num_items + 1) + items
        place = np.minimum(np.searchsorted(self._own_keys, wanted), len(self._own_keys) - 1)
        return self._own_keys[place] == wanted

    def native(self) -> tuple[list[int], list[int]]:
        """Addresses of the arrays and sizes; found anew, since a copy has arrays of its own."""
        addresses = [0 if a is None else a.ctypes.data for a in self._arrays]
        return addresses, [len(self.train), self.num_items, self.max_len, len(self.candidates)]


class BatchPlanner:
    """Makes the plans of one phase. The negatives of a step depend on (seed, phase, step), the
    user, the slot and their number alone, those of ``"in_batch"`` on the batch's targets too.

    Args:
        source: rows and candidates.
        negatives: per token.
        seed: root of the random stream.
        phase: name of the phase.
        bucket: tokens and items are filled up to multiples of this, see
            :func:`padkern.data.buckets.bucketed`; None: not at all.
        backend: ``"auto"``, ``"native"`` or ``"reference"``; all give the same numbers.

    Raises:
        ValueError: an unknown backend, or ``negatives`` or ``bucket`` out of range.
        RuntimeError: ``backend="native"`` cannot be used; the message says why.
    """

    def __init__(
        self,
        source: PlanSource,
        *,
        negatives: int = 0,
        seed: int = 0,
        phase: str = "",
        bucket: int | None = None,
        backend: str = "auto",
    ) -> None:
        if bucket is not None and bucket < 1:
            raise ValueError(f"bucket must be at least 1 or None, got {bucket}")
        if backend not in ("auto", "native", "reference"):
            raise ValueError(f"backend must be one of auto, native, reference, got {backend!r}")
        if not 0 <= negatives < 2**20:
            raise ValueError(f"negatives must be from 0 to {2**20 - 1}, got {negatives}")
        if negatives and len(source.candidates) < 2:
            raise ValueError(
                f"negatives need at least 2 candidate items, got {len(source.candidates)}"
            )
        reason = _native.load().reason
        if backend == "native" and reason:
            raise RuntimeError(f"backend='native' cannot be used: {reason}")
        self.source, self.negatives, self.seed, self.phase = source, negatives, seed, phase
        self.native = backend != "reference" and not reason
        self.bucket = bucket

    def plan(self, users: np.ndarray, step: int) -> BatchPlan:
        """The plan of some users' batch.

        Args:
            users: rows of the training table, of two items or more each.
            step: number of the step within the phase.

        Raises:
            ValueError: a row that does not exist or is too short.
        """
        users = np.asarray(users)
        if users.ndim != 1 or not (np.issubdtype(users.dtype, np.integer) or not users.size):
            raise ValueError(
                f"users must be a 1-D integer array, got {users.dtype}{list(users.shape)}"
            )
        users = np.ascontiguousarray(users, dtype=np.int64)
        key = stream_seed(self.seed, self.phase, "negatives", step)
        if self.native:
            arrays = self._native_arrays(users, key)
        else:
            self._check(users)
            arrays = plan_arrays(self.source, users, self.negatives, key)
        plan = self._assemble(users, arrays)
        if self.bucket is None:
            return plan
        return bucketed(plan, self.source.max_len, self.bucket)

    def plans(self, batches: Iterable[tuple[np.ndarray, int]]) -> Iterator[BatchPlan]:
        """Plans of (users, step) in order, each made in a thread while the one before is used."""
        with ThreadPoolExecutor(1, thread_name_prefix="padkern-plan") as pool:
            ahead = None
            for users, step in batches:
                following = pool.submit(self.plan, users, step)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def _check(self, users: np.ndarray) -> None:
        rows = len(self.source.train)
        outside = np.flatnonzero((users < 0) | (users >= rows))
        if len(outside):
            raise ValueError(
                f"users must be rows from 0 to {rows - 1}, got {users[outside[0]]} at {outside[0]}"
            )
        lengths = self.source.train.lengths[users]
        short = np.flatnonzero(lengths < 2)
        if len(short):
            raise ValueError(
                f"users must have at least 2 items, row {users[short[0]]} has {lengths[short[0]]}"
            )

    def _native_arrays(self, users: np.ndarray, key: int) -> dict[str, np.ndarray]:
        core, source = _native.load().core, self.source
        assert core is not None
        sampling = SAMPLINGS.index(source.sampling)
        origin = source.native()
        request = (users.ctypes.data, len(users), self.negatives, sampling, key)
        error, tokens, width = core.batch_plan_sizes(origin, request)
        if error:
            raise ValueError(error)
        count = self.negatives
        slots = tokens * (2 + count)
        most = min(slots, source.num_items)
        shapes = {
            "offsets": (len(users) + 1,),
            "inputs": (tokens,),
            "positions": (tokens,),
            "grid": (tokens,),
            "targets": (tokens,),
            "negatives": (tokens, count),
            "unique": (most,),
            "rows": (slots,),
            "starts": (3 * (most + 1),),
            "slots": (slots,),
            "bins": (most,),
            "counts": (most,),
            "mark": (source.num_items + 1,),
        }
        arrays = {name: np.empty(shape, dtype=np.int64) for name, shape in shapes.items()}
        addresses = [array.ctypes.data for array in arrays.values()]
        error, unique = core.batch_plan(origin, request, width, addresses)
        if error:
            raise ValueError(error)
        for name in ("unique", "bins", "counts"):
            arrays[name] = arrays[name][:unique]
        arrays["starts"] = arrays["starts"][: 3 * (unique + 1)].reshape(3, unique + 1)
        return arrays

    def _assemble(self, users: np.ndarray, arrays: dict[str, np.ndarray]) -> BatchPlan:
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(array))
            for name, array in arrays.items()
            if name != "mark"
        }
        offsets = tensors["offsets"]
        width = int((offsets[1:] - offsets[:-1]).max()) if len(users) else 0
        inputs = PackedSequences(
            tensors["inputs"], offsets, tensors["positions"], tensors["grid"], width
        )
        sizes = [tensors[name].numel() for name in _ROLES]
        rows, slots = tensors["rows"].split(sizes), tensors["slots"].split(sizes)
        first, second, third = tensors["starts"]
        return BatchPlan(
            users=users,
            inputs=inputs,
            targets=tensors["targets"],
            negatives=tensors["negatives"],
            unique=tensors["unique"],
            input_rows=rows[0],
            target_rows=rows[1],
            negative_rows=rows[2].view(tensors["negatives"].shape),
            starts=(first, second, third),
            slots=(slots[0], slots[1], slots[2]),
            bins=tensors["bins"],
            counts=tensors["counts"],
        )


class TrainBatches:
    """Shuffled training batches; order and negatives depend on (seed, phase, epoch) alone.

    Args:
        source: training rows; those shorter than 2 are left out.
        batch_size: users per batch.
        seed: root of the order and of the negatives.
        phase: name of the phase, so that phases see different orders.
        negatives: sampled items per token.
        bucket, backend: as in :class:`BatchPlanner`.

    Raises:
        ValueError: ``batch_size`` below 1.
    """

    def __init__(
        self,
        source: PlanSource,
        *,
        batch_size: int,
        seed: int,
        phase: str,
        negatives: int = 0,
        bucket: int | None = None,
        backend: str = "auto",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.rows = np.flatnonzero(source.train.lengths >= 2)
        self.planner = BatchPlanner(
            source, negatives=negatives, seed=seed, phase=phase, bucket=bucket, backend=backend
        )
        self.batch_size, self.seed, self.phase = batch_size, seed, phase

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def epoch(self, epoch: int) -> Iterator[BatchPlan]:
        """The batches of an epoch, each planned while the one before is used."""
        order = np.random.default_rng(stream_key(self.seed, self.phase, "order", epoch))
        users = order.permutation(self.rows)
        parts = (
            users[low : low + self.batch_size] for low in range(0, len(users), self.batch_size)
        )
        first = epoch * len(self)
        return self.planner.plans((part, first + n) for n, part in enumerate(parts))
