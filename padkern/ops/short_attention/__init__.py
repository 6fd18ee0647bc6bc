"""Causal attention within short packed sequences. Derivation: ``README.md`` here."""

from __future__ import annotations

from padkern.ops.short_attention.op import short_attention, short_attention_qkv
from padkern.ops.short_attention.reference import short_attention_ref

__all__ = ["short_attention", "short_attention_qkv", "short_attention_ref"]
