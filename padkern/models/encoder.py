"""What an encoder of packed sequences is, and what encoders share: sizes and dropout masks.

Dropout masks are a function of (seed, step, place), see :meth:`PackedSequences.keyed`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from padkern.data.batch import PackedSequences
from padkern.ops.dropout_add_norm import keyed_dropout
from padkern.ops.keyed_dropout import mix_seed


class SequenceEncoder(Protocol):
    """Packed item vectors in, user states out: what an expert asks of its encoder.

    Any ``nn.Module`` with these attributes will do; :class:`PackedEncoder` brings them. State t of
    a sequence is a function of its tokens 0..t alone: not of later ones (the loss reads every
    state), and not of other sequences.

    Attributes:
        dim: width d of item vectors and states.
        max_len: longest sequence.
    """

    dim: int
    max_len: int

    def __call__(self, x: Tensor, packed: PackedSequences, *, last: bool = False) -> Tensor:
        """States of all tokens.

        Args:
            x: ``[T, d]`` item vectors of the packed tokens.
            packed: where the tokens stand, and the key of the dropout masks.
            last: states of each sequence's last token only.

        Returns:
            ``[T, d]``, or ``[B, d]`` with ``last``.
        """
        ...


class Masks(NamedTuple):
    """Where the dropout masks of one forward pass come from.

    Attributes:
        dropout: probability; 0 in evaluation.
        seed: root of this encoder's masks.
        step: which draw.
    """

    dropout: float
    seed: int
    step: int

    def at(self, place: int) -> dict[str, Any]:
        """The arguments of the masks at one place of the encoder."""
        return {"dropout": self.dropout, "seed": mix_seed(self.seed, place), "step": self.step}

    def drop(self, x: Tensor, place: int, token_ids: Tensor | None = None) -> Tensor:
        """Dropout with the masks of one place.

        Args:
            x: ``[R, width]`` rows, one for each token.
            place: number of the place in the encoder, a different one for each mask.
            token_ids: ``[R]`` int64 numbers of the rows' tokens in the batch; default 0..R - 1.

        Returns:
            ``[R, width]``; ``x`` itself without dropout.
        """
        return keyed_dropout(x, token_ids=token_ids, **self.at(place)) if self.dropout else x


class PackedEncoder(nn.Module):
    """Base of encoders: the attributes of :class:`SequenceEncoder` and the keyed masks.

    Args:
        dim: width d of item vectors and states.
        max_len: longest sequence.
        dropout: probability, at least 0 and below 1.

    Raises:
        ValueError: the probability is out of range.
    """

    def __init__(self, dim: int, max_len: int, dropout: float) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.dim, self.max_len, self.dropout = dim, max_len, dropout

    def masks(self, packed: PackedSequences) -> Masks:
        """The dropout masks of a pass: none in evaluation, those of the batch's key in training.

        Without a key the masks hang on one number of torch's generator.
        """
        if not self.training or self.dropout == 0.0:
            return Masks(0.0, 0, 0)
        if packed.key is None:
            return Masks(self.dropout, int(torch.randint(1 << 62, (), device="cpu")), 0)
        return Masks(self.dropout, *packed.key)
