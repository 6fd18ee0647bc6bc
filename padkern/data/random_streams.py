"""Random streams that are named, not consumed: a draw depends on its key and counter alone.

So a run that was killed and resumed, or cut over any number of workers, draws the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from padkern.ops.keyed_dropout import philox


def stream_seed(*parts: int | str) -> int:
    """A 63-bit seed for one named random stream."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox_words(key: int, counter: np.ndarray) -> np.ndarray:
    """Philox 4x32-10 as in :func:`padkern.ops.keyed_dropout.philox`, in numpy.

    Args:
        key: 64 bits.
        counter: ``[..., 4]`` integers of 32 bits, any integer dtype.

    Returns:
        ``[...]`` uint64: the first two of the four output words, the first one high.
    """
    words = torch.from_numpy(counter.astype(np.int64)).unbind(-1)
    high, low, _, _ = philox(key, *words)
    return ((high << 32) | low).numpy().view(np.uint64)


def scaled(words: np.ndarray, count: int) -> np.ndarray:
    """Uniform 64-bit words scaled to int64 ``0..count - 1``, for ``count`` below 2**32."""
    wide = np.uint64(count)
    high, low = (words >> _HALF) * wide, (words & _LOW) * wide
    return ((high + (low >> _HALF)) >> _HALF).astype(np.int64)


def unit(words: np.ndarray) -> np.ndarray:
    """Uniform 64-bit words as float64 in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
