"""Sums of rows over segments, and the gather whose gradient they are. See ``README.md``."""

from __future__ import annotations

from padkern.ops.segments.op import expand, segment_sum
from padkern.ops.segments.reference import segment_sum_ref

__all__ = ["expand", "segment_sum", "segment_sum_ref"]
