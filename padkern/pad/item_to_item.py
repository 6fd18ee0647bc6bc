"""Item-to-item models in closed form: ItemKNN and EASE.

They count an item of a user once, know nothing of order (but see ``decay``) and have no opinion on
items never seen in training: these score 0. All sums are in a fixed order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from padkern.data.baskets import check_ids, cooccurrences, distinct, known_items, seen_items
from padkern.data.dataset import Ragged

__all__ = ["EASE", "ItemKNN", "ItemToItem"]

#: Largest catalogue whose item x item matrix is given in dense form.
MAX_DENSE_ITEMS = 20_000


class ItemToItem(ABC):
    """Base of scorers whose score is a weighted sum over the history's distinct items.

    The state of a user is as wide as the catalogue: :func:`padkern.pad.evaluation.evaluate` ranks
    by :meth:`score_all` instead. States and item matrix are there for small catalogues.

    Args:
        num_items: catalogue size N.
        decay: weight of an item per step back in time from its last occurrence.

    Raises:
        ValueError: decay is out of range.
    """

    def __init__(self, num_items: int, decay: float = 1.0) -> None:
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must be in (0, 1], got {decay}")
        self.num_items, self.decay = num_items, decay

    def weights(self, history: Ragged) -> tuple[Ragged, np.ndarray]:
        """Distinct items of every row, ascending, and the weight of each."""
        width = self.num_items + 1
        row = history.row_index()
        key = row * width + history.values
        # The first occurrence from the end is the last one.
        found, from_end = np.unique(key[::-1], return_index=True)
        place = len(key) - 1 - from_end
        age = history.offsets[1:][row[place]] - 1 - place
        counts = np.bincount(found // width, minlength=len(history))
        return Ragged.from_lengths(found % width, counts), self.decay**age

    def user_states(self, history: Ragged) -> Tensor:
        """float64 ``[n, N + 1]``: the weights of the history's items.

        Raises:
            ValueError: the catalogue is too large for it.
        """
        self._check_dense("user_states")
        items, weight = self.weights(history)
        states = np.zeros((len(history), self.num_items + 1))
        states[items.row_index(), items.values] = weight
        return torch.from_numpy(states)

    def item_matrix(self) -> Tensor:
        """float64 ``[N + 1, N + 1]``: row j holds what each item of a history adds to item j.

        Raises:
            ValueError: the catalogue is too large for it.
        """
        self._check_dense("item_matrix")
        every = np.arange(self.num_items + 1)
        return self.score_all(Ragged.from_lengths(every, np.ones_like(every))).double().T

    @abstractmethod
    def score_all(self, history: Ragged) -> Tensor:
        """``[n, N + 1]`` scores of all items; column 0 is padding."""

    def _check_dense(self, name: str) -> None:
        if self.num_items > MAX_DENSE_ITEMS:
            raise ValueError(
                f"{name} would be {self.num_items + 1} numbers wide, at most {MAX_DENSE_ITEMS} "
                "items are given in dense form; rank by score_all"
            )


class ItemKNN(ItemToItem):
    r"""Nearest items by the users they share.

    .. math::
        s_{ij} = \frac{|U_i \cap U_j|}{\sqrt{|U_i| |U_j|} + \text{shrinkage}}, \qquad
        \text{score}(u, j) = \sum_{i \in H_u \cap \mathcal{N}(j)} \text{decay}^{age(i)} s_{ij}

    with U_i the training users of item i and N(j) the ``neighbours`` items most similar to j, other
    than j itself; equal similarities in id order.

    Args:
        train: training rows, one per user, ids 1..N.
        num_items: catalogue size N.
        neighbours: per item, at least 1.
        shrinkage: at least 0; lowers similarities that rest on few users.
        decay: see :class:`ItemToItem`; 1 is the classical method.

    Raises:
        ValueError: an argument is out of range.

    Source: Sarwar et al. 2001, doi 10.1145/371920.372071; shrinkage as in Ferrari Dacrema et al.
    2019, arXiv:1907.06902.
    """

    def __init__(
        self,
        train: Ragged,
        num_items: int,
        *,
        neighbours: int = 100,
        shrinkage: float = 0.0,
        decay: float = 1.0,
    ) -> None:
        super().__init__(num_items, decay)
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}")
        if not 0.0 <= shrinkage < float("inf"):
            raise ValueError(f"shrinkage must be at least 0 and finite, got {shrinkage}")
        width = num_items + 1
        check_ids(train, num_items)
        baskets = distinct(train, width)
        owners = np.bincount(baskets.values, minlength=width)
        parts = []
        for low, counts in cooccurrences(baskets, width):
            row, other = np.nonzero(counts)
            unlike = low + row != other
            row, other = row[unlike], other[unlike]
            norm = np.sqrt(owners[low + row] * owners[other]) + shrinkage
            similarity = counts[row, other] / norm
            order = np.lexsort((other, -similarity, row))
            starts = np.searchsorted(row, row)  # row is ascending: where its first entry stands
            best = order[np.arange(len(order)) - starts < neighbours]
            parts.append((low + row[best], other[best], similarity[best]))
        target, source, similarity = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = np.lexsort((target, source))
        # By item of the history: the items that have it for a neighbour.
        self._targets = Ragged.from_lengths(target[order], np.bincount(source, minlength=width))
        self._similarity = similarity[order]

    def score_all(self, history: Ragged) -> Tensor:
        """float64 ``[n, N + 1]``; column 0 is 0."""
        width = self.num_items + 1
        items, weight = self.weights(history)
        entries = Ragged(np.arange(len(self._similarity)), self._targets.offsets)
        entries = entries.take(items.values)
        user = np.repeat(items.row_index(), entries.lengths)
        value = np.repeat(weight, entries.lengths) * self._similarity[entries.values]
        flat = user * width + self._targets.values[entries.values]
        scores = np.bincount(flat, value, minlength=len(history) * width)
        return torch.from_numpy(scores.reshape(len(history), width))


class EASE(ItemToItem):
    r"""Linear autoencoder without self-loops, in closed form.

    .. math::
        P = (X^\top X + \lambda I)^{-1}, \qquad B_{ij} = -P_{ij} / P_{jj}, \quad B_{jj} = 0

    minimises :math:`\|X - X B\|_F^2 + \lambda \|B\|_F^2` with zero diagonal; X is the binary
    users x items matrix. Items without a training interaction have zero rows and columns in B:
    only the others are held, as float32 ``[seen, seen]``.

    Args:
        train: training rows, one per user, ids 1..N.
        num_items: catalogue size N.
        l2: lambda, above 0.
        max_items: most items seen in training; time grows with their cube, memory with their square
            (20,000 items: 3 GiB for each of the float64 matrices on the way).

    Raises:
        ValueError: l2 is out of range, or more items were seen than ``max_items``.

    Source: Steck 2019, arXiv:1905.03375.
    """

    def __init__(
        self, train: Ragged, num_items: int, *, l2: float = 100.0, max_items: int = 20_000
    ) -> None:
        super().__init__(num_items)
        if not 0.0 < l2 < float("inf"):
            raise ValueError(f"l2 must be above 0 and finite, got {l2}")
        self._ids, baskets = seen_items(train, num_items)
        seen = len(self._ids)
        if seen > max_items:
            raise ValueError(
                f"max_items must be at least the {seen} items seen in training, got {max_items}"
            )
        gram = torch.zeros(seen, seen, dtype=torch.float64)
        for low, counts in cooccurrences(baskets, seen):
            gram[low : low + len(counts)] = torch.from_numpy(counts)
        gram.diagonal().add_(l2)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        del gram
        inverse /= -inverse.diagonal().clone()
        inverse.diagonal().zero_()
        self._matrix = inverse.float()

    def score_all(self, history: Ragged) -> Tensor:
        """float32 ``[n, N + 1]``; 0 for padding and for items never seen in training."""
        baskets = known_items(history, self._ids)
        sums = F.embedding_bag(
            torch.from_numpy(baskets.values),
            self._matrix,
            torch.from_numpy(baskets.offsets[:-1]),
            mode="sum",
        )
        scores = sums.new_zeros(len(history), self.num_items + 1)
        scores[:, torch.from_numpy(self._ids)] = sums
        return scores
