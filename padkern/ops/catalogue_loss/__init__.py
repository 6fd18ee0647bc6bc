"""Cross-entropy over the whole catalogue; see ``README.md`` for the derivation."""

from padkern.ops.catalogue_loss.op import catalogue_cross_entropy
from padkern.ops.catalogue_loss.reference import catalogue_cross_entropy_ref

__all__ = ["catalogue_cross_entropy", "catalogue_cross_entropy_ref"]
