"""Data in: readers, filters, audit, splits and frequency bins.

Readers load pyarrow and pydantic; they come on first use, because models need only the containers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from padkern.data.audit import audit, format_audit
from padkern.data.bins import FrequencyBins, frequency_bins
from padkern.data.dataset import Dataset, Ragged
from padkern.data.split import EvalSplit, Split, global_time, leave_one_out, make_split
from padkern.data.write import write_dataset

if TYPE_CHECKING:
    from padkern.data.cold import ColdData, cold_targets, hold_out_items
    from padkern.data.fetch import resolve_dataset
    from padkern.data.filters import Filters
    from padkern.data.io import Columns, read_dataset
    from padkern.data.raw import authors_filters, convert_raw, read_raw

_LAZY = {
    "ColdData": "cold",
    "Columns": "io",
    "Filters": "filters",
    "authors_filters": "raw",
    "cold_targets": "cold",
    "convert_raw": "raw",
    "hold_out_items": "cold",
    "read_dataset": "io",
    "read_raw": "raw",
    "resolve_dataset": "fetch",
}

__all__ = [
    "ColdData",
    "Columns",
    "Dataset",
    "EvalSplit",
    "Filters",
    "FrequencyBins",
    "Ragged",
    "Split",
    "audit",
    "authors_filters",
    "cold_targets",
    "convert_raw",
    "format_audit",
    "frequency_bins",
    "global_time",
    "hold_out_items",
    "leave_one_out",
    "make_split",
    "read_dataset",
    "read_raw",
    "resolve_dataset",
    "write_dataset",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
