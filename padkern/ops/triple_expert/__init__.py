"""Gated expert score and its loss with sampled negatives. Derivation: ``README.md`` here."""

from __future__ import annotations

from padkern.ops.triple_expert.calibration import gbce_beta, gbce_positive_weight
from padkern.ops.triple_expert.op import gated_bce_loss
from padkern.ops.triple_expert.reference import gated_bce_loss_ref, gated_score_ref

__all__ = [
    "gated_bce_loss",
    "gated_bce_loss_ref",
    "gated_score_ref",
    "gbce_beta",
    "gbce_positive_weight",
]
