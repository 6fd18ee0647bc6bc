"""The gated item matrix in plain torch: the oracle and the export path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gated_table_ref(tables: Tensor | Sequence[Tensor], gate: Tensor, item_bins: Tensor) -> Tensor:
    """``W[i] = [gate[bin(i), 0] tables[0][i], gate[bin(i), 1] tables[1][i], ...]``.

    Args:
        tables: E tables ``[N, d_e]``, or one tensor ``[E, N, d]``.
        gate: ``[bins, E]`` weights.
        item_bins: ``[N]`` int64 rows of ``gate``.

    Returns:
        ``[N, sum d_e]``, dtype of the inputs.
    """
    weights = gate.index_select(0, item_bins)
    return torch.cat([weights[:, e : e + 1] * table for e, table in enumerate(tables)], 1)
