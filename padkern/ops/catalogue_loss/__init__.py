"""Cross-entropy over the whole catalogue."""

from padkern.ops.catalogue_loss.reference import (
    catalogue_cross_entropy,
    catalogue_cross_entropy_ref,
)

__all__ = ["catalogue_cross_entropy", "catalogue_cross_entropy_ref"]
