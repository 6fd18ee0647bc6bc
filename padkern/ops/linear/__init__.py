"""Linear maps of packed tokens."""

from padkern.ops.linear.op import linear
from padkern.ops.linear.reference import linear_ref

__all__ = ["linear", "linear_ref"]
