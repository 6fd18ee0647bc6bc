"""Streaming readers of published data sets in their own form: Amazon, MIND, MovieLens, RecBole."""

from padkern.data.raw.read import FORMATS, authors_filters, convert_raw, read_raw

__all__ = ["FORMATS", "authors_filters", "convert_raw", "read_raw"]
