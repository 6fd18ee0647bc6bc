"""Embeddings on disk: one folder per key, shards while a run is under way, one matrix at the end.

``<cache>/<key>/rows-START-END.npy`` hold finished rows of an interrupted run;
``<cache>/<key>/embeddings.npy`` and ``manifest.json`` the finished matrix. Every file is written
beside its place, flushed and renamed, so a kill leaves whole files only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_LOG = logging.getLogger(__name__)
_SHARD = re.compile(r"rows-(\d{10})-(\d{10})\.npy")


def content_key(options: dict[str, Any], texts: Iterable[str]) -> str:
    """SHA-256 of the options and of every text (length first, so no two lists collide)."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls ``write(stream)`` on a file beside ``path``, flushes it to disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class EmbeddingCache:
    """The folder of one key.

    Args:
        cache_dir: parent folder; created when something is written.
        key: from ``content_key``.
        rows: rows of the finished matrix.
    """

    def __init__(self, cache_dir: str | Path, key: str, rows: int) -> None:
        self.folder = Path(cache_dir).expanduser() / key
        self._rows = rows

    def load(self) -> np.ndarray | None:
        """The finished matrix, or None; a damaged one is reported and ignored."""
        path = self.folder / "embeddings.npy"
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            matrix = np.load(path, allow_pickle=False)
            if matrix.shape[0] == self._rows and _digest(matrix) == manifest["sha256"]:
                return matrix
            reason = "its SHA-256 or shape is not the manifest's"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            reason = str(error)
        _LOG.warning("%s is damaged (%s): the texts are embedded again", path, reason)
        return None

    def store(self, matrix: np.ndarray, description: dict[str, Any]) -> None:
        """Writes the finished matrix, then its manifest, then removes the shards."""
        manifest = {**description, "rows": len(matrix), "dim": matrix.shape[1]}
        manifest["sha256"] = _digest(matrix)
        write_atomic(self.folder / "embeddings.npy", lambda stream: np.save(stream, matrix))
        text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        write_atomic(self.folder / "manifest.json", lambda stream: stream.write(text.encode()))
        for path in self.folder.glob("rows-*.npy"):
            path.unlink(missing_ok=True)

    def write_shard(self, start: int, matrix: np.ndarray) -> None:
        """Keeps rows start .. start + len(matrix)."""
        name = f"rows-{start:010d}-{start + len(matrix):010d}.npy"
        write_atomic(self.folder / name, lambda stream: np.save(stream, matrix))

    def read_shards(self, boundaries: set[int]) -> list[np.ndarray]:
        """Finished rows from 0 on without a gap; every shard ends at one of the boundaries."""
        found: dict[int, tuple[int, Path]] = {}
        for path in sorted(self.folder.glob("rows-*.npy")):
            match = _SHARD.fullmatch(path.name)
            if match:
                found[int(match[1])] = (int(match[2]), path)
        shards: list[np.ndarray] = []
        row = 0
        while row in found:
            end, path = found[row]
            try:
                part = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                _LOG.warning("%s cannot be read (%s): its rows are embedded again", path, error)
                break
            if part.ndim != 2 or len(part) != end - row or end not in boundaries:
                break
            shards.append(part)
            row = end
        return shards


def _digest(matrix: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(matrix).data).hexdigest()
