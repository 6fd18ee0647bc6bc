"""Texts to vectors: batched by length, resumable, cached by content."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from padkern.errors import DataError
from padkern.text.cache import EmbeddingCache, content_key
from padkern.text.encoders import (
    ATTENTIONS,
    DTYPES,
    POOLINGS,
    Encoder,
    load_encoder,
    resolve_model,
)

_LOG = logging.getLogger(__name__)
_SHARD_SECONDS = 10.0  # at most this much work, and one batch, is lost by a kill
_FORMAT = 1  # raised when the same inputs would give other numbers


def embed_texts(
    texts: Sequence[str],
    model: str,
    *,
    pooling: str = "mean",
    attention: str = "model",
    batch_tokens: int = 4096,
    max_tokens: int | None = None,
    normalize: bool = True,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """One vector per text from any Hugging Face encoder or decoder.

    Each distinct text is encoded once, in batches of texts of similar length; the vector of a text
    does not depend on its companions (differences below 1e-5 in float32). With ``cache_dir`` a
    finished matrix is found again by the content of model, options and texts, whatever the order of
    the texts, and an interrupted call continues where it stopped, with the same bytes.

    Args:
        texts: any strings; an empty or blank one, or one without a token, gives the zero vector.
        model: "minilm" (all-MiniLM-L6-v2), "wordllama" (static token vectors), a local folder, a
            .gguf file, or a name on the Hugging Face hub.
        pooling: of the last layer's states, padding never counted: "mean"; "weighted", the mean
            with weight t on token t = 1, 2, ... (a decoder's later tokens have seen more of the
            text; Muennighoff 2022, SGPT, arXiv:2202.08904); "last" token; "cls" (first token).
        attention: "model", as the model was trained, or "bidirectional": every token of a decoder
            sees the whole text. No change in a model that is bidirectional by itself.
        batch_tokens: padded tokens per batch, >= 1 (a longer text is a batch of its own).
        max_tokens: longer texts are cut; None: what the model takes, at most 512 (wordllama: all).
        normalize: divide each vector by its Euclidean norm.
        device: torch device of the encoder.
        dtype: "float32", "bfloat16" or "float16" weights and states; pooling is float32 always.
        revision: branch, tag or commit of a hub model.
        cache_dir: folder for finished matrices and shards of unfinished ones; None: no cache.
        progress: called with (texts done, texts in all), counting distinct texts.

    Returns:
        float32 [len(texts), E].

    Raises:
        ValueError: an unknown pooling, attention or dtype, a size below 1, or an architecture whose
            attention cannot be made bidirectional.
        EnvError: a missing package, model, network or device.
        DataError: an unusable model folder, or a vector that is NaN or Inf.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1 or None, got {max_tokens}")

    # Sorted distinct texts: the same set in another order is the same cache entry.
    distinct = sorted({text for text in texts if text.strip()})
    source = resolve_model(model, revision)
    options = {
        "format": _FORMAT,
        "fingerprint": source.fingerprint,
        "pooling": pooling,
        "batch_tokens": batch_tokens,
        "max_tokens": max_tokens,
        "device": device.split(":")[0],
        "dtype": dtype,
    }
    if attention != "model":  # absent otherwise, so that matrices cached before are found
        options["attention"] = attention
    cache = None
    vectors = None
    if cache_dir is not None:
        cache = EmbeddingCache(cache_dir, content_key(options, distinct), len(distinct))
        vectors = cache.load()
    if vectors is None:
        encoder = load_encoder(
            source,
            pooling=pooling,
            max_tokens=max_tokens,
            device=device,
            dtype=dtype,
            attention=attention,
        )
        vectors = _encode_all(distinct, encoder, batch_tokens, cache, progress, model)
        if cache is not None:
            cache.store(vectors, {**options, "model": model, "texts": len(distinct)})
    elif progress is not None:
        progress(len(distinct), len(distinct))

    if normalize:
        norm = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        vectors = (vectors / np.where(norm > 0, norm, 1.0)).astype(np.float32)
    place = {text: row for row, text in enumerate(distinct)}
    out = np.zeros((len(texts), vectors.shape[1]), np.float32)
    rows = np.array([place.get(text, -1) for text in texts], np.int64)
    out[rows >= 0] = vectors[rows[rows >= 0]]
    return out


def plan_batches(lengths: np.ndarray, batch_tokens: int) -> tuple[np.ndarray, list[int]]:
    """Texts by falling length (memory peaks at the start), cut so that padding stays small.

    Args:
        lengths: int [n] tokens per text; texts without a token are left out.
        batch_tokens: padded tokens per batch.

    Returns:
        Indices int64 [n'] in encoding order, and the batches' boundaries [0, ..., n'].
    """
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    bounds = [0]
    while bounds[-1] < len(order):
        longest = int(lengths[order[bounds[-1]]])
        bounds.append(min(len(order), bounds[-1] + max(1, batch_tokens // longest)))
    return order, bounds


def _encode_all(
    texts: list[str],
    encoder: Encoder,
    batch_tokens: int,
    cache: EmbeddingCache | None,
    progress: Callable[[int, int], None] | None,
    model: str,
) -> np.ndarray:
    """float32 [len(texts), E] in the order of the texts."""
    tokens: list[list[int]] = []
    for start in range(0, len(texts), 8192):
        tokens += encoder.tokenize(texts[start : start + 8192])
    lengths = np.array([len(row) for row in tokens], np.int64)
    order, bounds = plan_batches(lengths, batch_tokens)
    parts = cache.read_shards(set(bounds)) if cache is not None else []
    if any(part.shape[1] != encoder.dim for part in parts):
        parts = []
    done = sum(len(part) for part in parts)
    if done:
        _LOG.info("continuing after %d of %d texts", done, len(order))
    pending: list[np.ndarray] = []
    pending_start, flushed = done, time.monotonic()
    for start, end in itertools.pairwise(bounds):
        if end <= done:
            continue
        vectors = encoder.encode([tokens[row] for row in order[start:end]])
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            text = texts[order[start + bad[0]]]
            raise DataError(
                f"text model {model!r} gave a vector with NaN or Inf for the text {text[:60]!r}; "
                "try dtype float32"
            )
        pending.append(vectors)
        if cache is not None and time.monotonic() - flushed >= _SHARD_SECONDS and end < len(order):
            cache.write_shard(pending_start, np.concatenate(pending))
            parts, pending = [*parts, *pending], []
            pending_start, flushed = end, time.monotonic()
        if progress is not None:
            progress(end, len(order))
    out = np.zeros((len(texts), encoder.dim), np.float32)
    if len(order):
        out[order] = np.concatenate([*parts, *pending])
    return out
