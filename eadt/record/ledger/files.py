"""The ledger's files by name and number, and their bytes, compressed or not. It knows no rows."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_NAME = re.compile(r"events-([1-9]\d*)\.jsonl(?:\.gz)?")
_GZIP = 31  # zlib's word for: a gzip header and checksum around it
_PIECE_BYTES = 256 * 1024
_COMPRESSED_AT_ONCE_BYTES = 1024 * 1024


class UnreadableError(Exception):
    """A file cannot be read, or not to its end; the text names it and says why."""


@dataclass(frozen=True, order=True)
class LedgerFile:
    """One file of a ledger, wherever its bytes are just now.

    Attributes:
        number: Its place among the ledger's files, from 1.
        folder: The ledger's folder.
    """

    number: int
    folder: Path

    @property
    def name(self) -> str:
        """By which its lines are named, compressed or not."""
        return f"events-{self.number}.jsonl"

    @property
    def path(self) -> Path:
        """Where it is as long as it is not compressed."""
        return self.folder / self.name

    @property
    def compressed_path(self) -> Path:
        """Where it is once it is compressed."""
        return self.folder / f"{self.name}.gz"

    def size_bytes(self) -> int | None:
        """Size of its content; ``None`` if it cannot be opened. Of a compressed file: what its end says."""
        try:
            source = self._open()
            with source:
                is_compressed = source.name.endswith(".gz")
                size = source.seek(0, os.SEEK_END)
                if not is_compressed:
                    return size
                source.seek(max(0, size - 4))
                return int.from_bytes(source.read(4), "little")
        except OSError:
            return None

    def pieces(self, offset: int = 0) -> Iterator[bytes]:
        """Its content from ``offset`` on, in pieces of no set size.

        Raises:
            UnreadableError: It cannot be read further. All that could be was yielded before.
        """
        name = self.name
        try:
            with self._open() as source:
                name = Path(source.name).name
                if name.endswith(".gz"):
                    yield from _skip(_inflate(source), offset)
                else:
                    source.seek(offset)
                    while piece := source.read(_PIECE_BYTES):
                        yield piece
        except FileNotFoundError:
            raise UnreadableError(f"{name}: is gone") from None
        except (OSError, EOFError, zlib.error) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UnreadableError(f"{name}: {reason}") from error

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb")
        except FileNotFoundError:  # it is compressed, or was compressed and removed this moment
            return self.compressed_path.open("rb")


def ledger_files(folder: Path) -> list[LedgerFile]:
    """The ledger's files in the order in which they were begun; none where there is no folder.

    Raises:
        OSError: The folder cannot be listed.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    numbers = {int(match.group(1)) for name in names if (match := _NAME.fullmatch(name))}
    return [LedgerFile(number, folder) for number in sorted(numbers)]


def compress(file: LedgerFile, *, is_own: bool) -> Generator[None, None, None]:
    """Put a finished file's compressed copy in its place, a piece with each step of the iterator.

    A file that somebody writes to (it is locked) stays as it is. The copy takes its place only once it is
    whole and on the disk, so that a death at any moment leaves one of the two, or both.

    Args:
        file: The file.
        is_own: Whether the caller wrote it itself, and needs no lock to know that it is finished.

    Raises:
        OSError: The disk refused; the file stays as it is.
    """
    try:
        source = file.path.open("rb")
    except FileNotFoundError:  # another writer did it
        return
    with source:
        try:
            fcntl.flock(source, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # no locks on this file system: nobody can say whether it is finished
            if not is_own:
                return
        temporary = file.compressed_path.with_name(f"{file.compressed_path.name}.part")
        try:
            with temporary.open("wb") as target:
                deflate = zlib.compressobj(9, zlib.DEFLATED, _GZIP)
                while piece := source.read(_COMPRESSED_AT_ONCE_BYTES):
                    target.write(deflate.compress(piece))
                    yield
                target.write(deflate.flush())
                target.flush()
                os.fsync(target.fileno())
            temporary.replace(file.compressed_path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(file.folder)
        file.path.unlink()


def sync_folder(folder: Path) -> None:
    """Bring the folder's list of names to the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _inflate(source: BinaryIO) -> Iterator[bytes]:
    """Decompress; of a damaged file, everything before the damage."""
    inflate = zlib.decompressobj(_GZIP)
    while data := source.read(_PIECE_BYTES // 4):
        while data and not inflate.eof:
            before = inflate.copy()
            try:
                yield inflate.decompress(data, _PIECE_BYTES)
            except zlib.error:
                yield from _salvage(before, data)
                raise
            data = inflate.unconsumed_tail
    yield inflate.flush()
    if not inflate.eof:
        raise EOFError("ends before its end: the compressed data was cut off")


def _salvage(inflate: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 64):
        try:
            yield inflate.decompress(data[start : start + 64])
        except zlib.error:
            return


def _skip(pieces: Iterator[bytes], num_bytes: int) -> Iterator[bytes]:
    for piece in pieces:
        if num_bytes < len(piece):
            yield piece[num_bytes:]
        num_bytes = max(0, num_bytes - len(piece))
