"""A run folder: plain files, written so that a crash at any moment leaves the last good state.

Small files are replaced in one rename. Tensors go into a folder of their own, staged beside the
target on the same file system, with a manifest of sizes and SHA-256 digests written last. Nothing
here reads or writes pickle.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from padkern.errors import CheckpointError, EnvError
from padkern.pad.tensor_files import (
    MANIFEST,
    plain,
    read_tensors,
    reason,
    sync_folder,
    write_file,
    write_tensors,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RunFolder"]

_LOCK = ".lock"
_STALE = re.compile(r"\.tmp-\d+$")


class RunFolder:
    """The files of one run.

    ``create=True`` opens the folder for writing: it is made if needed, locked against a second
    writer, and swept of what a killed writer left. The lock belongs to the process and ends with
    it, so the lock of a dead process is taken over. ``create=False`` opens an existing folder for
    reading and takes no lock.

    Args:
        path: the folder.
        create: open for writing.

    Raises:
        CheckpointError: the folder does not exist (reading) or another process writes to it.
        EnvError: the folder cannot be created.
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        self.writable = create
        self._release: weakref.finalize | None = None
        if create:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise EnvError(
                    f"{self.path}: cannot create the run folder: {reason(error)}"
                ) from None
            known = (self.path / _LOCK).exists()
            self._lock()
            if known:  # never tidy up in a folder that was not ours before
                self._sweep()
        elif not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such run folder")

    def close(self) -> None:
        """Gives the lock back; reading stays possible."""
        self.writable = False
        if self._release is not None:
            self._release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- small files -------------------------------------------------------------------------

    def file(self, name: str) -> Path:
        """Path of a file in the folder.

        Raises:
            CheckpointError: ``name`` is absolute, climbs out of the folder or passes a symbolic
                link.
        """
        parts = PurePosixPath(name).parts
        if (
            not parts
            or name.startswith("/")
            or ".." in parts
            or any(character in name for character in "\\\0:")
        ):
            raise CheckpointError(f"{self.path}: {name!r} is not a path inside the run folder")
        path = self.path
        for part in parts:
            path = path / part
            if path.is_symlink():
                raise CheckpointError(f"{path}: symbolic links are refused in a run folder")
        return path

    def exists(self, name: str) -> bool:
        """Whether the file or folder is there."""
        return self.file(name).exists()

    def write_text(self, name: str, text: str) -> Path:
        """Replaces a UTF-8 text file in one step."""
        path = self._target(name)
        stage = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        data = text.encode("utf-8")
        try:
            write_file(stage, data)
            os.replace(stage, path)
        except OSError as error:
            stage.unlink(missing_ok=True)
            raise _write_error(path, len(data), error) from None
        sync_folder(path.parent)
        return path

    def write_yaml(self, name: str, text: str) -> Path:
        """Replaces a YAML file given as text."""
        return self.write_text(name, text)

    def write_json(self, name: str, obj: Any) -> Path:
        """Replaces a JSON file; NaN and infinities become null, numpy values become plain ones."""
        return self.write_text(name, json.dumps(plain(obj), indent=2, ensure_ascii=False) + "\n")

    def read_text(self, name: str) -> str:
        """Reads a UTF-8 text file.

        Raises:
            CheckpointError: it is missing or not UTF-8.
        """
        path = self.file(name)
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; is this a finished run?") from None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from None

    def read_json(self, name: str) -> Any:
        """Reads a JSON file.

        Raises:
            CheckpointError: it is missing or not JSON.
        """
        text = self.read_text(name)
        try:
            return json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{self.file(name)}: not valid JSON: {error}") from None

    # ---- logs --------------------------------------------------------------------------------

    def append_jsonl(self, name: str, obj: Any) -> None:
        """Appends one record and flushes it to the disk; a torn last line is cut off first."""
        path = self._target(name)
        line = json.dumps(plain(obj), ensure_ascii=False).encode("utf-8") + b"\n"
        try:
            with open(path, "ab") as file:
                whole = _whole_lines(path)
                if whole != file.tell():
                    file.truncate(whole)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _write_error(path, len(line), error) from None

    def read_jsonl(self, name: str) -> list[Any]:
        """All records, oldest first; a torn last line is dropped, a missing file is empty.

        Raises:
            CheckpointError: a whole line is not JSON.
        """
        path = self.file(name)
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise CheckpointError(f"{path}: line {number} is not JSON: {error}") from None
        return records

    def truncate_jsonl(self, name: str, keep: int) -> None:
        """Keeps the first ``keep`` records; used on resume to drop what was logged after the
        checkpoint."""
        if keep < 0:
            raise ValueError(f"keep must not be negative, got {keep}")
        if not self.exists(name):
            return
        lines = self.file(name).read_bytes().split(b"\n")[:-1][:keep]
        self.write_text(name, b"".join(line + b"\n" for line in lines).decode("utf-8"))

    # ---- tensors -----------------------------------------------------------------------------

    def save_tensors(
        self, relative_folder: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
    ) -> Path:
        """Writes tensors and their metadata as one folder, replacing an older one.

        At every moment either the older or the new version can be loaded.

        Args:
            relative_folder: for example ``"models/pad"``.
            tensors: named tensors of any shape, dtype and device; stored on the CPU.
            meta: JSON-serialisable; not for NaN or infinities, which become null.

        Returns:
            The folder.

        Raises:
            EnvError: the disk is full or cannot be written; the older version stays.
        """
        from safetensors import SafetensorError

        target = self._target(relative_folder)
        old = _old(target)
        stage = target.with_name(f"{target.name}.tmp-{os.getpid()}")
        size = sum(tensor.nbytes for tensor in tensors.values())
        shutil.rmtree(stage, ignore_errors=True)
        try:
            write_tensors(stage, tensors, meta)
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)  # the target is whole, so this one is spare
                os.rename(target, old)
            os.rename(stage, target)
            sync_folder(target.parent)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(stage, ignore_errors=True)
            if not target.exists() and old.exists():
                os.rename(old, target)
            raise _write_error(target, size, error) from None
        shutil.rmtree(old, ignore_errors=True)
        return target

    def load_tensors(self, relative_folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Reads tensors and metadata back, after checking every size and SHA-256.

        Returns:
            The tensors (on the CPU, contiguous) and the metadata.

        Raises:
            CheckpointError: something is missing, changed, linked or of a newer format; the
                message names the file and the reason. Nothing is used before all is checked.
        """
        folder = self._current(relative_folder)
        if folder is None:
            raise CheckpointError(f"{self.file(relative_folder)}: no such checkpoint")
        return read_tensors(folder)

    def has(self, relative_folder: str) -> bool:
        """Whether there is a version to load (not yet verified)."""
        return self._current(relative_folder) is not None

    def remove(self, relative_folder: str) -> None:
        """Removes a tensor folder, if it is there."""
        target = self._target(relative_folder)
        shutil.rmtree(_old(target), ignore_errors=True)  # first, or it would come back as current
        if target.exists():
            stage = target.with_name(f"{target.name}.tmp-{os.getpid()}")
            shutil.rmtree(stage, ignore_errors=True)
            os.rename(target, stage)
            sync_folder(target.parent)
            shutil.rmtree(stage)

    # ---- inside ------------------------------------------------------------------------------

    def _target(self, name: str) -> Path:
        if not self.writable:
            raise CheckpointError(f"{self.path}: the run folder is open for reading only")
        path = self.file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _current(self, relative_folder: str) -> Path | None:
        target = self.file(relative_folder)
        for folder in (target, _old(target)):  # killed between two renames: the old one counts
            if (folder / MANIFEST).exists():
                return folder
        return None

    def _lock(self) -> None:
        path = self.file(_LOCK)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise EnvError(f"{path}: cannot be written: {reason(error)}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(handle, 64).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise EnvError(f"{path}: cannot be locked: {reason(error)}") from None
            raise CheckpointError(
                f"{self.path}: another process (PID {owner}) is writing to this run folder"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        self._release = weakref.finalize(self, os.close, handle)

    def _sweep(self) -> None:
        """Removes what killed writers staged and brings back what they had set aside."""
        for root, folders, files in os.walk(self.path):
            for name in list(folders):
                path = Path(root, name)
                if _STALE.search(name):
                    shutil.rmtree(path, ignore_errors=True)
                    folders.remove(name)
                elif name.endswith(".old") and (path / MANIFEST).exists():
                    target = path.with_name(name[: -len(".old")])
                    if target.exists():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        os.rename(path, target)
                    folders.remove(name)
            for name in files:
                if _STALE.search(name):
                    Path(root, name).unlink(missing_ok=True)


def _old(target: Path) -> Path:
    return target.with_name(target.name + ".old")


def _write_error(path: Path, size: int, error: BaseException) -> EnvError:
    return EnvError(f"{path}: cannot write {size} bytes: {reason(error)}")


def _whole_lines(path: Path) -> int:
    """Number of bytes up to and including the last newline."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0
