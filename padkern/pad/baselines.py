"""Untrained rows of the comparison table: popularity and text neighbours.

Both are scorers for `padkern.pad.evaluation.evaluate`: a state per user, a vector per item, score =
inner product.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from padkern.data.dataset import Ragged

__all__ = ["MostPop", "TextKNN"]


class MostPop:
    """Score of an item = its training frequency, the same for every user.

    Items of equal frequency tie; the evaluator gives such a target its mean rank.

    Args:
        train_frequency: int64 ``[N + 1]`` training counts, index 0 is padding.

    Raises:
        ValueError: not one-dimensional, or a negative count.
    """

    def __init__(self, train_frequency: np.ndarray) -> None:
        frequency = np.asarray(train_frequency)
        if frequency.ndim != 1 or frequency.size < 2:
            raise ValueError(
                f"train_frequency must be [num_items + 1], got shape {list(frequency.shape)}"
            )
        if (frequency < 0).any():
            raise ValueError("train_frequency must not be negative")
        # float64 holds every count exactly; in float32 counts above 2^24 would tie by rounding.
        self._items = torch.from_numpy(frequency.astype(np.float64))[:, None]

    def add_items(self, text_matrix: np.ndarray | Tensor) -> MostPop:
        """The same ranker with more items, one for each row; nobody took them."""
        frequency = self._items[:, 0].numpy()
        return MostPop(np.concatenate([frequency, np.zeros(len(text_matrix))]))

    def user_states(self, history: Ragged) -> Tensor:
        """float64 ones ``[n, 1]``."""
        return torch.ones(len(history), 1, dtype=torch.float64)

    def item_matrix(self) -> Tensor:
        """float64 ``[N + 1, 1]``: the counts."""
        return self._items


class TextKNN:
    """Nearest items by text: a decayed mean of the history's text vectors against every item.

    Text vectors are centred over the items that have text and scaled to length 1. The state of a
    user is ``sum_k decay^k x_k`` over the last ``max_len`` items, the most recent one first
    (k = 0); positive scaling per user does not change a ranking, so the sum is left as it is. Items
    without text (zero rows) keep the zero vector.

    Args:
        text_matrix: float ``[N + 1, E]``, row 0 is padding.
        decay: weight ratio of one step back in time, 0 < decay <= 1.
        centre: subtract the mean over items; sentence encoders put all texts into a narrow cone,
            and without this the common direction drowns the differences.
        max_len: number of most recent items used.

    Raises:
        ValueError: wrong shape, NaN or Inf in the matrix, decay or max_len out of range.
    """

    def __init__(
        self,
        text_matrix: np.ndarray | Tensor,
        decay: float = 0.6,
        centre: bool = True,
        *,
        max_len: int = 20,
    ) -> None:
        text = torch.as_tensor(text_matrix).detach().to("cpu", torch.float32)
        if text.ndim != 2 or text.shape[0] < 2:
            raise ValueError(f"text_matrix must be [num_items + 1, E], got {list(text.shape)}")
        if not bool(torch.isfinite(text).all()):
            raise ValueError("text_matrix must be finite, found NaN or Inf")
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must be in (0, 1], got {decay}")
        if max_len < 1:
            raise ValueError(f"max_len must be at least 1, got {max_len}")
        given = (text != 0).any(dim=1)
        given[0] = False
        rows = text[given]
        self._mean = rows.mean(dim=0) if centre and len(rows) else torch.zeros(text.shape[1])
        self._items = torch.cat([torch.zeros_like(text[:1]), self._placed(text[1:])])
        self._weights = decay ** torch.arange(max_len, dtype=torch.float32)

    def _placed(self, text: Tensor) -> Tensor:
        """Rows centred and scaled to length 1; zero rows stay zero."""
        given = (text != 0).any(dim=1)
        items = torch.zeros_like(text)
        items[given] = torch.nn.functional.normalize(text[given] - self._mean, dim=1)
        return items

    def add_items(self, text_matrix: np.ndarray | Tensor) -> TextKNN:
        """The same ranker with more items; the mean stays that of the items before.

        Args:
            text_matrix: float ``[M, E]``, no padding row.

        Raises:
            ValueError: another width, NaN or Inf.
        """
        text = torch.as_tensor(text_matrix).detach().to("cpu", torch.float32)
        width = self._items.shape[1]
        if text.ndim != 2 or text.shape[1] != width:
            raise ValueError(f"text_matrix must be [M, {width}], got {list(text.shape)}")
        if not bool(torch.isfinite(text).all()):
            raise ValueError("text_matrix must be finite, found NaN or Inf")
        grown = copy.copy(self)
        grown._items = torch.cat([self._items, self._placed(text)])
        return grown

    def user_states(self, history: Ragged) -> Tensor:
        """float32 ``[n, E]``; an empty history gives zeros."""
        max_len = len(self._weights)
        ends = torch.as_tensor(history.offsets[1:])[:, None]
        starts = torch.as_tensor(history.offsets[:-1])[:, None]
        position = ends - 1 - torch.arange(max_len)
        real = position >= starts
        ids = torch.zeros_like(position)
        ids[real] = torch.as_tensor(history.values)[position[real]]
        return torch.bmm(self._weights.expand(len(history), 1, max_len), self._items[ids])[:, 0]

    def item_matrix(self) -> Tensor:
        """float32 ``[N + 1, E]``: centred, normalised text vectors; row 0 is zero."""
        return self._items
