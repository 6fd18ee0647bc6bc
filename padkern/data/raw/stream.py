"""A text file as pieces of whole lines: plain or gzip, counted, digested, of bounded size."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from padkern.errors import DataError

__all__ = ["LineFile", "Lines", "first_lines"]

_PIECE = 32 * 2**20
_LONGEST_LINE = 64 * 2**20
_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Lines:
    """Whole lines of a file.

    Attributes:
        data: the lines; each ends in ``\\n``, except perhaps the last of the file.
        first: number of the first line, from 1.
    """

    data: bytes
    first: int

    def records(self) -> list[tuple[int, bytes]]:
        """Number and bytes of each line that is not empty."""
        lines = self.data.split(b"\n")
        return [(self.first + i, line) for i, line in enumerate(lines) if line]


class LineFile:
    """One pass over a file; ``summary`` is complete after it.

    Args:
        path: the file. It is taken as gzip if it starts as gzip does, whatever its name.
        piece: bytes (uncompressed) to read at once; a piece is longer by less than one line.
    """

    def __init__(self, path: Path, piece: int | None = None) -> None:
        self.path = path
        self.rows_read = 0
        self._piece = piece or _PIECE
        self._digest = hashlib.sha256()
        self._size = 0

    def pieces(self) -> Iterator[Lines]:
        """All lines in order. ``\\r\\n`` and ``\\r`` become ``\\n``; a byte order mark is dropped.

        The next piece is read and decompressed in a thread while the caller works on this one.

        Raises:
            DataError: if the file cannot be read, is empty or UTF-16, ends within its gzip data, or
                has a line above 64 MiB.
        """
        source = self._pieces()
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(next, source, None)
            while (lines := following.result()) is not None:
                following = pool.submit(next, source, None)
                yield lines

    def _pieces(self) -> Generator[Lines, None, None]:
        first, rest = 1, b""
        started = False
        for block in self._blocks():
            if not started:
                if block[:2] in _UTF16:
                    raise DataError(f"{self.path}: the file is UTF-16; save it as UTF-8")
                block = block.removeprefix(_BOM)
                started = True
            end = block.rfind(b"\n") + 1
            if not end:
                rest += block
                if len(rest) > _LONGEST_LINE:
                    raise DataError(
                        f"{self.path} line {first}: the line is longer than "
                        f"{_LONGEST_LINE // 2**20} MiB; is this a text file?"
                    )
                continue
            data = _newlines(rest + block[:end])
            yield Lines(data, first)
            first += data.count(b"\n")
            rest = block[end:]
        if not started:
            raise DataError(f"{self.path}: the file is empty")
        if rest:
            yield Lines(_newlines(rest), first)

    def _blocks(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as raw:
                packed = raw.read(2) == _GZIP
                raw.seek(0)
                counted = io.BufferedReader(_Counted(raw, self), 2**20)
                stream: Any = gzip.GzipFile(fileobj=counted) if packed else counted
                while block := stream.read(self._piece):
                    yield block
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self.path}: the gzip data is damaged: {error}") from None
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from None

    def note(self, data: bytes) -> None:
        """Take bytes of the file itself into digest and size."""
        self._digest.update(data)
        self._size += len(data)

    @property
    def summary(self) -> dict[str, Any]:
        """JSON-serialisable facts about the file."""
        return {
            "name": self.path.name,
            "sha256": self._digest.hexdigest(),
            "bytes": self._size,
            "rows_read": self.rows_read,
        }


class _Counted(io.RawIOBase):
    """Passes a file on and shows each byte to the :class:`LineFile`."""

    def __init__(self, raw: IO[bytes], owner: LineFile) -> None:
        self._raw = raw
        self._owner = owner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self._owner.note(data)
        return len(data)


def first_lines(path: Path, count: int = 1) -> list[str]:
    """The first lines of a file that are not empty, damaged bytes replaced; [] if unreadable."""
    try:
        pieces = LineFile(path, 2**16)._pieces()
        lines = next(pieces, Lines(b"", 1)).records()
        pieces.close()
    except DataError:
        return []
    return [line.decode("utf-8", "replace") for _, line in lines[:count]]


def _newlines(data: bytes) -> bytes:
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return data
