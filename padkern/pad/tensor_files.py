"""Tensors on the disk: safetensors and JSON under a manifest of sizes and SHA-256 digests."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from padkern.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "padkern-tensors"
VERSION = 1
MANIFEST = "MANIFEST.json"
TENSORS = "tensors.safetensors"
META = "meta.json"


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Creates ``folder`` with tensors, metadata and, last, the manifest; all flushed to the disk.

    Raises:
        OSError, SafetensorError: it cannot be written; a part may be left behind.
    """
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(_storable(tensors), str(folder / TENSORS))
    with open(folder / TENSORS, "rb+") as file:
        os.fsync(file.fileno())
    text = json.dumps(plain(meta), indent=2, ensure_ascii=False) + "\n"
    write_file(folder / META, text.encode("utf-8"))
    entries = [_entry(folder / name) for name in (TENSORS, META)]
    manifest = {"format": FORMAT, "version": VERSION, "files": entries}
    write_file(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    sync_folder(folder)


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what ``write_tensors`` wrote, after checking every size and digest.

    Raises:
        CheckpointError: naming the file and the reason; nothing is used before all is checked.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    contents = {name: _verified(folder / name, entry) for name, entry in _manifest(folder).items()}
    try:
        meta = json.loads(contents[META])
    except ValueError as error:
        raise CheckpointError(f"{folder / META}: not valid JSON: {error}") from None
    try:
        tensors = load(contents[TENSORS])
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / TENSORS}: not a valid safetensors file: {reason(error)}"
        ) from None
    return tensors, meta


def reason(error: BaseException) -> str:
    """The first line of an error's own words."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0]


def write_file(path: Path, data: bytes) -> None:
    """Writes a whole file and flushes it to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flushes a folder's entries, so that a rename in it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def plain(obj: Any) -> Any:
    """A copy made of JSON types only."""
    if isinstance(obj, Mapping):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value) for value in obj]
    if isinstance(obj, np.ndarray):
        return plain(obj.tolist())
    if isinstance(obj, np.generic):
        return plain(obj.item())
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    if isinstance(obj, Path):
        return str(obj)
    return obj


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies that share no memory, which safetensors requires."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    return {"name": path.name, "size": path.stat().st_size, "sha256": _digest(path)}


def _manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Entries by file name; exactly the two files this format has."""
    path = folder / MANIFEST
    if path.is_symlink():
        raise CheckpointError(f"{path}: symbolic links are refused in a checkpoint")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a valid manifest: {reason(error)}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a {FORMAT} manifest")
    version = manifest.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r}, this padkern reads version {VERSION}"
        )
    entries = manifest.get("files")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path}: 'files' must be a list of entries")
    names = [entry.get("name") for entry in entries]
    if sorted(map(str, names)) != sorted((TENSORS, META)):
        raise CheckpointError(f"{path}: must list {TENSORS} and {META} once each, got {names}")
    return {entry["name"]: entry for entry in entries}


def _verified(path: Path, entry: Mapping[str, Any]) -> bytes:
    """The content of a file whose size and digest agree with the manifest."""
    if path.is_symlink():
        raise CheckpointError(f"{path}: symbolic links are refused in a checkpoint")
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing")
    size = path.stat().st_size
    if size != entry.get("size"):
        raise CheckpointError(f"{path}: {size} bytes, the manifest says {entry.get('size')}")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise CheckpointError(f"{path}: SHA-256 differs from the manifest; the file was changed")
    return data
