"""Matrix factorisation of implicit feedback by alternating least squares."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from padkern.data.baskets import inverted, known_items, seen_items
from padkern.data.dataset import Ragged
from padkern.data.random_streams import stream_seed

__all__ = ["IALS"]

_GATHERED = 2**16  # rows of the other side gathered at once


class IALS:
    r"""Matrix factorisation of implicit feedback by alternating least squares.

    .. math::
        L(W, H) = \sum_{(u,i) \in S} (\langle w_u, h_i \rangle - 1)^2
        + \alpha_0 \sum_{u,i} \langle w_u, h_i \rangle^2
        + \lambda \Big( \sum_u (|S_u| + \alpha_0 |I|)^\nu \|w_u\|^2
        + \sum_i (|S_i| + \alpha_0 |U|)^\nu \|h_i\|^2 \Big)

    over the users U and the items I of training; a sweep solves all users, then all items, each
    exactly. A history's state is the solution for its items with H fixed, so users without training
    rows have one too.

    Args:
        train: training rows, one per user, ids 1..N.
        num_items: catalogue size N.
        dim: width d.
        sweeps: at least 1.
        unobserved: alpha_0, weight of every pair, above 0.
        l2: lambda, above 0.
        exponent: nu, at least 0; 1 weights the penalty by frequency, 0 does not.
        start: spread of the first item vectors times the square root of d.
        seed: of the first item vectors.

    Attributes:
        objective: L after every sweep.

    Raises:
        ValueError: an argument is out of range.

    Source: Hu et al. 2008, doi 10.1109/ICDM.2008.22, in the form of Rendle et al. 2021,
    arXiv:2110.14037.
    """

    def __init__(
        self,
        train: Ragged,
        num_items: int,
        *,
        dim: int = 64,
        sweeps: int = 16,
        unobserved: float = 0.1,
        l2: float = 0.003,
        exponent: float = 1.0,
        start: float = 0.1,
        seed: int = 0,
    ) -> None:
        for name, value in (("dim", dim), ("sweeps", sweeps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, number in (("unobserved", unobserved), ("l2", l2), ("start", start)):
            if not 0.0 < number < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite, got {number}")
        if not 0.0 <= exponent < float("inf"):
            raise ValueError(f"exponent must be at least 0 and finite, got {exponent}")
        self.num_items = num_items
        self._unobserved, self._l2, self._exponent = unobserved, l2, exponent
        self._ids, baskets = seen_items(train, num_items)
        baskets = baskets.take(np.flatnonzero(baskets.lengths))  # U: users with a row
        owners = inverted(baskets, len(self._ids))
        rng = np.random.default_rng(stream_seed(seed, "ials", "init"))
        first = rng.normal(scale=start * dim**-0.5, size=(len(self._ids), dim))
        self._items = torch.from_numpy(first)
        self.objective: list[float] = []
        for _ in range(sweeps):
            users = self._solve(baskets, self._items)
            self._items = self._solve(owners, users)
            self.objective.append(self._objective(baskets, owners, users, self._items))

    def user_states(self, history: Ragged) -> Tensor:
        """float64 ``[n, d]``; a history without an item of training gives zeros."""
        return self._solve(known_items(history, self._ids), self._items)

    def item_matrix(self) -> Tensor:
        """float64 ``[N + 1, d]``; zeros for padding and for items never seen in training."""
        matrix = self._items.new_zeros(self.num_items + 1, self._items.shape[1])
        matrix[torch.from_numpy(self._ids)] = self._items
        return matrix

    def _penalty(self, rows: Ragged, others: int) -> Tensor:
        """``[rows]`` factor of each row's squared norm."""
        size = torch.from_numpy(rows.lengths).double() + self._unobserved * others
        return self._l2 * size**self._exponent

    def _solve(self, rows: Ragged, fixed: Tensor) -> Tensor:
        """``[rows, d]`` minimisers for the sets ``rows`` of rows of ``fixed``."""
        dim = fixed.shape[1]
        shared = self._unobserved * (fixed.T @ fixed)
        penalty = self._penalty(rows, len(fixed))
        result = fixed.new_zeros(len(rows), dim)
        order = np.argsort(rows.lengths, kind="stable")
        end = len(order)
        while end:
            # Rows of about equal length together, the longest first.
            width = max(int(rows.lengths[order[end - 1]]), 1)
            begin = max(0, end - max(1, _GATHERED // max(width, dim)))
            part = order[begin:end]
            some = rows.take(part)
            gathered = fixed.new_zeros(len(part), width, dim)
            place = np.arange(len(some.values)) - some.offsets[:-1][some.row_index()]
            gathered[some.row_index(), place] = fixed[some.values]
            left = gathered.transpose(1, 2) @ gathered + shared
            left.diagonal(dim1=1, dim2=2).add_(penalty[part][:, None])
            right = gathered.sum(1)[:, :, None]
            solved = torch.cholesky_solve(right, torch.linalg.cholesky(left))
            result[part] = solved[:, :, 0]
            end = begin
        return result

    def _objective(self, baskets: Ragged, owners: Ragged, users: Tensor, items: Tensor) -> float:
        observed = (users[baskets.row_index()] * items[baskets.values]).sum(1)
        every = ((users.T @ users) * (items.T @ items)).sum()
        norms = (self._penalty(baskets, len(items)) * users.square().sum(1)).sum()
        norms = norms + (self._penalty(owners, len(users)) * items.square().sum(1)).sum()
        return float((observed - 1).square().sum() + self._unobserved * every + norms)
