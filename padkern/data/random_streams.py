"""Random streams that are named, not consumed: a draw depends on its key and counter alone.

So a run that was killed and resumed, or cut over any number of workers, draws the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream_seed(*parts: int | str) -> int:
    """A 63-bit seed for one named random stream."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_STEPS = 0x9E3779B9, 0xBB67AE85


def philox_words(key: int, counter: np.ndarray) -> np.ndarray:
    """Philox 4x32-10, the twin of ``csrc/common/philox.h``.

    Args:
        key: 64 bits.
        counter: ``[..., 4]`` integers of 32 bits, any integer dtype.

    Returns:
        ``[...]`` uint64: the first two of the four output words, the first one high.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    keys = [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    a, b, c, d = (counter[..., i].astype(np.uint64) & _LOW for i in range(4))
    for _ in range(10):
        left, right = _MULTIPLIERS[0] * a, _MULTIPLIERS[1] * c
        a, b = (right >> _HALF) ^ b ^ np.uint64(keys[0]), right & _LOW
        c, d = (left >> _HALF) ^ d ^ np.uint64(keys[1]), left & _LOW
        keys = [(word + step) & 0xFFFFFFFF for word, step in zip(keys, _STEPS, strict=True)]
    return (a << _HALF) | b


def scaled(words: np.ndarray, count: int) -> np.ndarray:
    """Uniform 64-bit words scaled to int64 ``0..count - 1``, for ``count`` below 2**32."""
    wide = np.uint64(count)
    high, low = (words >> _HALF) * wide, (words & _LOW) * wide
    return ((high + (low >> _HALF)) >> _HALF).astype(np.int64)


def unit(words: np.ndarray) -> np.ndarray:
    """Uniform 64-bit words as float64 in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
