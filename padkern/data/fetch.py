"""Find a data set by name: a local folder, a cache, or a checked download."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from padkern.data.prime_pantry import FILES, SOURCE_URL, convert_folder
from padkern.errors import DataError, EnvError

__all__ = ["cache_folder", "resolve_dataset"]

_TIMEOUT_S = 30
_MAX_BYTES = 64 * 2**20
_KNOWN = ("prime_pantry",)


def cache_folder() -> Path:
    """``$PADKERN_CACHE``, else ``~/.cache/padkern`` (not created)."""
    chosen = os.environ.get("PADKERN_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "padkern"


def resolve_dataset(
    name_or_path: str | Path, *, opener: Callable[[str], bytes] | None = None
) -> Path:
    """Folder (or file) of a data set.

    Looked for in this order: the path itself, ``$PADKERN_DATA/<name>``, ``<cache>/<name>``, and for
    ``prime_pantry`` the authors' public repository at a pinned commit. The download is checked
    against known SHA-256 digests, converted, and put into the cache in one step.

    Args:
        name_or_path: an existing path, or a name.
        opener: fetches the bytes of an address; for tests.

    Raises:
        DataError: if there is no such folder or name, or a downloaded file is not the expected one.
        EnvError: if the download fails, or the cache cannot be written.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    name = str(name_or_path)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise DataError(f"{path}: no such file or folder")
    places = [cache_folder()]
    if os.environ.get("PADKERN_DATA"):
        places.insert(0, Path(os.environ["PADKERN_DATA"]))
    for place in places:
        if (place / name).is_dir():
            return place / name
    if name not in _KNOWN:
        raise DataError(
            f"{name}: no such file or folder, nor a data set under PADKERN_DATA; "
            f"the names that can be downloaded are: {', '.join(_KNOWN)}"
        )
    return _download(name, cache_folder() / name, opener or _open)


def _download(name: str, target: Path, opener: Callable[[str], bytes]) -> Path:
    files: dict[str, bytes] = {}
    for file, expected in FILES.items():
        address = f"{SOURCE_URL}/{file}"
        try:
            files[file] = opener(address)
        except (OSError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", None) or error
            raise EnvError(
                f"{name}: cannot download {address} ({reason}); connect to the network, or put the "
                f"data set under a folder and set PADKERN_DATA to it, or pass the folder itself"
            ) from None
        found = hashlib.sha256(files[file]).hexdigest()
        if found != expected:
            raise DataError(
                f"{address}: SHA-256 is {found}, expected {expected}; nothing was stored"
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    except OSError as error:
        raise EnvError(
            f"{target.parent}: cannot be written ({error.strerror}); set PADKERN_CACHE to a folder "
            "that can"
        ) from None
    try:
        raw = part / "raw"
        raw.mkdir()
        for file, content in files.items():
            (raw / file).write_bytes(content)
        convert_folder(raw, part)
        part.chmod(0o777 & ~_umask())
        try:
            part.rename(target)
        except OSError as error:
            # Another process may have finished first; its files passed the same checks.
            if not target.is_dir():
                raise EnvError(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _open(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as response:
        content: bytes = response.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise OSError(f"more than {_MAX_BYTES} bytes")
    return content


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
