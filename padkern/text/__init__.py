"""Item texts as a frozen matrix: encoders, matrices the user brings, linear transforms, cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from padkern.errors import DataError
from padkern.text.encode import embed_texts
from padkern.text.encoders import BUILTIN_MODELS
from padkern.text.matrix import MATRIX_SUFFIXES, load_matrix, save_matrix
from padkern.text.transform import FittedTransform, TextTransform

if TYPE_CHECKING:
    from padkern.data.dataset import Dataset

__all__ = [
    "BUILTIN_MODELS",
    "FittedTransform",
    "TextTransform",
    "default_cache_dir",
    "embed_texts",
    "is_matrix_file",
    "load_matrix",
    "load_text",
    "save_matrix",
]

_LOG = logging.getLogger(__name__)


def load_text(
    source: str | Path,
    dataset: Dataset,
    *,
    transform: TextTransform | None = None,
    cache_dir: str | Path | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    pooling: str = "mean",
    attention: str = "model",
    batch_tokens: int = 4096,
    max_tokens: int | None = None,
    normalize: bool = True,
    dtype: str = "float32",
    revision: str | None = None,
) -> np.ndarray:
    """The text matrix of a data set's items, from an encoder or a matrix file.

    Args:
        source: a matrix file (.npy, .safetensors, .parquet; joined by item id), or a model as in
            ``embed_texts``: "minilm", "wordllama", a local folder, a .gguf file, a hub name.
        dataset: gives item ids and texts.
        transform: fitted on the items' rows and applied; None: the matrix as it is.
        cache_dir: as in ``embed_texts``; ``default_cache_dir()`` is the user's own.
        device, progress, pooling, attention, batch_tokens, max_tokens, normalize, dtype, revision:
            as in ``embed_texts``; for a matrix file they have no effect.

    Returns:
        float32 [N + 1, E]; row 0 (padding) is zero, and so is the row of an item without text,
        before and after the transform. Such items are counted in a logged warning.

    Raises:
        DataError: a broken matrix file or model folder, or no item with text.
        EnvError: a missing package, model, network or device.
        ValueError: an option out of its range.
    """
    if is_matrix_file(source):
        matrix = load_matrix(source, dataset.items)
    else:
        if not any(text.strip() for text in dataset.texts):
            raise DataError(f"data set {dataset.name!r}: no item has a text to embed")
        matrix = embed_texts(
            dataset.texts,
            str(source),
            pooling=pooling,
            attention=attention,
            batch_tokens=batch_tokens,
            max_tokens=max_tokens,
            normalize=normalize,
            device=device,
            dtype=dtype,
            revision=revision,
            cache_dir=cache_dir,
            progress=progress,
        )
    matrix[0] = 0.0
    empty = int((~matrix[1:].any(axis=1)).sum())
    if empty:
        _LOG.warning("%d of %d items have no text (zero vector)", empty, len(matrix) - 1)
    return matrix if transform is None else transform.fit_apply(matrix)


def is_matrix_file(source: str | Path) -> bool:
    """Whether ``load_text`` reads this source as a matrix file (by its suffix)."""
    return Path(source).suffix in MATRIX_SUFFIXES


def default_cache_dir() -> Path:
    """``PADKERN_CACHE``, else ``padkern/text`` under ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("PADKERN_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "padkern" / "text"
