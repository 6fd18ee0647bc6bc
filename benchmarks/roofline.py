"""The least time a GPU could take for MK-MMD: tensor cores, FP32 units and exponential units, each
fully busy and perfectly overlapped.

Per unordered pair of the n + m rows: 2 D tensor operations forward, 6 D with the gradient; 11 or 19
FP32 instructions; one exponential.
"""

from __future__ import annotations

from typing import NamedTuple

FP32_SLOTS_FORWARD, FP32_SLOTS_GRADIENT = 11, 19
FP32_LANES, EXP_LANES = 128, 16  # per multiprocessor and clock, sm_86 to sm_100
# Dense bf16 operations per multiprocessor and clock. sm_90: the 800 TFLOP/s that an H100 (132
# multiprocessors at 1.755 GHz) sustains; its data sheet has 4096. sm_80: the data sheet.
_TENSOR_BF16 = {80: 2048.0, 90: 800e12 / (132 * 1.755e9)}
# float32 accuracy takes three bf16 products, float64 is not modelled.
_PRODUCTS = {"bfloat16": 1, "float16": 1, "float32": 3}


class Device(NamedTuple):
    """What of a GPU bounds the loss."""

    multiprocessors: int
    clock_hz: float
    capability: int  # 90 for sm_90

    @property
    def fp32_lanes(self) -> int:
        """FP32 instructions per multiprocessor and clock."""
        return 64 if self.capability == 80 else FP32_LANES


class Roofline(NamedTuple):
    """Least time in ms by each unit."""

    tensor_ms: float
    fp32_ms: float
    exp_ms: float

    @property
    def ms(self) -> float:
        """The slowest unit's time."""
        return max(self)


def roofline(n: int, m: int, dim: int, dtype: str, gradient: bool, device: Device) -> Roofline:
    """Bounds for one call.

    Args:
        n: Rows of the source.
        m: Rows of the target.
        dim: Width of the rows.
        dtype: "bfloat16", "float16" or "float32" (three bf16 products).
        gradient: With the gradient by both samples.
        device: The GPU; sm_80 and sm_90 are known.

    Raises:
        ValueError: The dtype or the capability is not known.
    """
    if dtype not in _PRODUCTS:
        raise ValueError(f"dtype must be one of {', '.join(_PRODUCTS)}, got {dtype!r}")
    if device.capability not in _TENSOR_BF16:
        raise ValueError(f"capability must be 80 or 90, got {device.capability}")
    pairs = (n + m) * (n + m - 1) / 2
    cycles = device.multiprocessors * device.clock_hz / 1e3  # a millisecond's, all together
    operations = (6 if gradient else 2) * dim * pairs * _PRODUCTS[dtype]
    slots = FP32_SLOTS_GRADIENT if gradient else FP32_SLOTS_FORWARD
    return Roofline(
        operations / (_TENSOR_BF16[device.capability] * cycles),
        slots * pairs / (device.fp32_lanes * cycles),
        pairs / (EXP_LANES * cycles),
    )
