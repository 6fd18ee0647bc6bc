"""Dropout, residual sum and layer normalisation in one pass. Derivation: ``README.md`` here."""

from __future__ import annotations

from padkern.ops.dropout_add_norm.op import dropout_add_norm, keyed_dropout
from padkern.ops.dropout_add_norm.reference import dropout_add_norm_ref, keyed_dropout_ref

__all__ = ["dropout_add_norm", "dropout_add_norm_ref", "keyed_dropout", "keyed_dropout_ref"]
