"""The records of all ops. A new op adds a module here and its record to :data:`OP_SPECS`."""

from __future__ import annotations

from padkern.testing.opspec import OpSpec
from padkern.testing.records.catalogue_loss import CATALOGUE_LOSS
from padkern.testing.records.dropout_add_norm import DROPOUT_ADD_NORM
from padkern.testing.records.gated_bce import GATED_BCE
from padkern.testing.records.gated_table import GATED_TABLE
from padkern.testing.records.linear import LINEAR
from padkern.testing.records.mkmmd import MKMMD
from padkern.testing.records.mkmmd_batched import MKMMD_BATCHED
from padkern.testing.records.mkmmd_witness import MKMMD_WITNESS
from padkern.testing.records.ranking import RANKING
from padkern.testing.records.segments import SEGMENT_SUM
from padkern.testing.records.short_attention import SHORT_ATTENTION

OP_SPECS: tuple[OpSpec, ...] = (
    MKMMD,
    MKMMD_BATCHED,
    MKMMD_WITNESS,
    GATED_BCE,
    GATED_TABLE,
    CATALOGUE_LOSS,
    RANKING,
    DROPOUT_ADD_NORM,
    SHORT_ATTENTION,
    LINEAR,
    SEGMENT_SUM,
)
