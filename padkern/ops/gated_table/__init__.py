"""Gated item matrix of several experts; see ``README.md`` for the derivation."""

from padkern.ops.gated_table.op import gated_table
from padkern.ops.gated_table.reference import gated_table_ref

__all__ = ["gated_table", "gated_table_ref"]
