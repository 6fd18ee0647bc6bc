"""Numbers that Triton kernels are given."""

from __future__ import annotations

import struct


def float64_bits(value: float) -> int:
    """A float64 as an integer: float arguments of a kernel are float32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
