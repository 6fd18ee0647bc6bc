"""Dropout masks as a function of (seed, step, place): the counter-based generator in plain torch.

Philox 4x32-10 turns a 64-bit key and four 32-bit counter words into four words of random bits. The
key is the seed, the first counter word the step, the others say which element it is. So a mask
needs no memory, is the same in forward and backward, and does not depend on how the work is cut or
on whether the tokens are padded or packed. The C++ kernels draw the same bits.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
MAX_STEP = _WORD


def check_dropout(dropout: float, seed: int, step: int) -> None:
    """Raises TypeError or ValueError for a probability, seed or step that is out of range."""
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout must be a number, got {type(dropout).__name__}")
    if not 0.0 <= dropout < 1.0:  # also true for NaN
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    for name, value, most in (("seed", seed, 2**63 - 1), ("step", step, MAX_STEP)):
        if isinstance(value, (float, str, bytes)) or value is None:
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if not 0 <= value <= most:
            raise ValueError(f"{name} must lie in 0..{most}, got {value}")


def mix_seed(seed: int, *parts: int) -> int:
    """A 63-bit seed for one place of use: the finaliser of SplitMix64 over seed and parts."""
    state = seed & (2**64 - 1)
    for part in parts:
        state = (state + (part + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def philox(seed: int, *counter: Tensor | int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10.

    Args:
        seed: 64-bit key.
        counter: four int64 tensors or ints that broadcast, each in ``0..2**32 - 1``.

    Returns:
        Four int64 tensors of 32 random bits each.
    """
    c0, c1, c2, c3 = (torch.as_tensor(c, dtype=torch.int64) for c in counter)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # A product beyond 2^63 wraps; its 64 bits are right, and the mask undoes the sign.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, ((p0 >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = p1 & _WORD, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _threshold(dropout: float) -> int:
    return min(int(dropout * 4294967296.0 + 0.5), _WORD)


def attention_keep(
    dropout: float, seed: int, step: int, sequences: Tensor, heads: int, width: int
) -> Tensor:
    """Which attention probabilities are kept.

    Args:
        dropout: probability of dropping one.
        seed, step: which draw.
        sequences: ``[B]`` int64 numbers of the sequences in their batch.
        heads: number of heads H.
        width: queries and keys 0..width - 1 of each sequence, counted from its first token.

    Returns:
        Bool ``[B, H, width, width]``; the last two are query and key.
    """
    device = sequences.device
    groups = torch.arange((width + 3) // 4, device=device)[:, None]
    places = (groups << 16) | torch.arange(width, device=device)
    head = torch.arange(heads, device=device)[:, None, None]
    words = torch.stack(philox(seed, step, sequences[:, None, None, None], places, head), 3)
    return words.flatten(2, 3)[:, :, :width] >= _threshold(dropout)


def channel_keep(dropout: float, seed: int, step: int, tokens: Tensor, width: int) -> Tensor:
    """Which channels of token states are kept.

    Args:
        dropout: probability of dropping one.
        seed, step: which draw.
        tokens: ``[T]`` int64 >= 0, numbers of the tokens in their batch.
        width: channels.

    Returns:
        Bool ``[T, width]``.
    """
    # 64 channels share 16 counters: word w of counter l decides channel 16 w + l.
    counters = torch.arange((width + 63) // 64 * 16, device=tokens.device)
    token = tokens[:, None]
    words = torch.stack(philox(seed, step, token & _WORD, counters, token >> 32), 1)
    bits = words.unflatten(2, (-1, 16)).transpose(1, 2).flatten(1)
    return bits[:, :width] >= _threshold(dropout)
