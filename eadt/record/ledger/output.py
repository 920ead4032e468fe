"""The files of one writer, in one thread: writes lines, syncs, rotates, compresses, keeps the digest.

It knows lines of JSON, not what they say, and nothing of threads (:mod:`eadt.record.ledger.writer`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
from collections import deque
from collections.abc import Generator, Iterable
from io import FileIO
from pathlib import Path

import eadt
from eadt.clock import Clock
from eadt.record.ledger.digest import RunningDigest
from eadt.record.ledger.files import LedgerFile, compress, ledger_files, sync_folder
from eadt.record.rows import SCHEMA_VERSION, LedgerRow, encode

_LOG = logging.getLogger(__name__)

FSYNC_INTERVAL_S = 2.0
"""Least time in s between two fsyncs: what a power cut, not a crash, of the machine can cost."""

_WRITTEN_AT_ONCE = 4096  # lines
_FULL = (errno.ENOSPC, errno.EDQUOT)


class LedgerOutput:
    """Appends lines to files of its own. Blocks for the disk; not thread-safe.

    Lines that the disk refuses wait, in order, until it takes them. A line of which it took a part is
    completed in the same file; in another file, where the first can no longer be written, it is whole, and
    the part of it that is left behind is the torn last line of that file.

    Args:
        folder: The ledger's folder; made with the first line.
        clock: Source of time.
        rotate_bytes: A file of this size is followed by another.
        rotate_s: And so is one of this age.
        digest: Takes every line that was written; ``None``: no digest is kept.
        digest_interval_s: Least time between two digests, but for the end of a file.
    """

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        *,
        rotate_bytes: int,
        rotate_s: float,
        digest: RunningDigest | None = None,
        digest_interval_s: float = 60.0,
    ) -> None:
        self._folder = folder
        self._clock = clock
        self._rotate_bytes = rotate_bytes
        self._rotate_s = rotate_s
        self._digest = digest
        self._digest_interval_s = digest_interval_s
        self._waiting: deque[bytes] = deque()  # rows without their place
        self._next: list[bytes] = []  # lines that are written next
        self._header_is_next = False
        self._half_bytes = 0  # of the first of them are in the file already
        self._seq = 0
        self._file: FileIO | None = None
        self._ledger_file: LedgerFile | None = None
        self._num_bytes = 0
        self._num_lines = 0
        self._began_s = 0.0
        self._is_unsynced = False
        self._synced_at_s = -math.inf
        self._digest_at_s = -math.inf
        self._finished: deque[tuple[LedgerFile, bool]] = deque()
        self._compression: Generator[None, None, None] | None = None
        self._said: set[str] = set()
        self.num_written = 0

    @property
    def num_waiting(self) -> int:
        """Rows that were taken and are not written yet."""
        return len(self._waiting) + len(self._next) - self._header_is_next

    @property
    def is_compressing(self) -> bool:
        """Whether :meth:`compress_piece` has something to do."""
        return self._compression is not None or bool(self._finished)

    @property
    def due_in_s(self) -> float | None:
        """Seconds until something other than a new row makes work; ``None``: nothing will."""
        due = []
        if self._is_unsynced:
            due.append(self._synced_at_s + FSYNC_INTERVAL_S)
        if self._digest is not None and self._digest.has_news:
            due.append(self._digest_at_s + self._digest_interval_s)
        return max(0.0, min(due) - self._clock.monotonic_s()) if due else None

    def take(self, rows: Iterable[bytes]) -> None:
        """Take encoded rows, for :meth:`drain` to write."""
        self._waiting.extend(rows)

    def drain(self) -> None:
        """Write all that waits.

        Raises:
            OSError: The disk refused; the rest still waits.
        """
        while self._next or self._waiting:
            if self._file is not None and not self._next and self._is_full():
                self._finish_file(self._file)
            if self._file is None:
                self._file = self._open()
            while self._waiting and len(self._next) < _WRITTEN_AT_ONCE:
                self._next.append(self._numbered(self._waiting.popleft()))
            self._write(self._file)

    def sync_if_due(self) -> None:
        """Bring what was written to the disk itself, at most every ``FSYNC_INTERVAL_S``."""
        if self._is_unsynced and self._clock.monotonic_s() - self._synced_at_s >= FSYNC_INTERVAL_S:
            self._sync()

    def save_digest_if_due(self) -> None:
        """Write the digest, if the last one is older than its interval."""
        if self._clock.monotonic_s() - self._digest_at_s >= self._digest_interval_s:
            self._save_digest()

    def compress_piece(self) -> bool:
        """Compress some more of a finished file; whether there was one."""
        if not self.is_compressing:
            return False
        if self._compression is None:
            file, is_own = self._finished.popleft()
            self._compression = compress(file, is_own=is_own)
        try:
            next(self._compression)
        except StopIteration:
            self._compression = None
        except OSError as error:  # it stays as it is, and is read as well so
            self._compression = None
            self._say_once("compressed", error)
        return True

    def close(self) -> None:
        """Sync, write the digest, close. What waits, and files still to be compressed, stay so."""
        if self._compression is not None:
            self._compression.close()
        self._sync()
        self._save_digest()
        if self._file is not None:
            self._file.close()
            self._file = None

    # -- one file -------------------------------------------------------------------------------

    def _open(self) -> FileIO:
        self._folder.mkdir(parents=True, exist_ok=True)
        earlier = ledger_files(self._folder)
        number = earlier[-1].number + 1 if earlier else 1
        while True:
            current = LedgerFile(number, self._folder)
            try:
                file = FileIO(current.path, "x")  # exclusive: two writers never share a file
                break
            except FileExistsError:
                number += 1
        # Held for as long as it is open: nobody else compresses it.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sync_folder(self._folder)
        if self._ledger_file is None:  # what writers before this one left behind
            self._finished.extend((left, False) for left in earlier if left.path.exists())
        self._ledger_file = current
        self._num_bytes = self._num_lines = 0
        self._began_s = self._clock.monotonic_s()
        if not self._header_is_next:
            header = LedgerRow(
                schema_version=SCHEMA_VERSION,
                eadt_version=eadt.__version__,
                unix_s=round(self._clock.unix_s(), 3),
            )
            self._next.insert(0, self._numbered(encode(header)))
            self._header_is_next = True
        if self._digest is not None:
            self._digest.begin_file(current)
        return file

    def _numbered(self, row: bytes) -> bytes:
        self._seq += 1
        return b'%b,"seq":%d}\n' % (row[:-1], self._seq)

    def _write(self, file: FileIO) -> None:
        assert self._ledger_file is not None
        try:
            num_bytes = file.write(memoryview(b"".join(self._next))[self._half_bytes :])
        except OSError as error:
            if error.errno not in _FULL and self._num_lines:
                self._leave_file(file)
            raise
        self._is_unsynced = True
        self._num_bytes += num_bytes
        num_bytes += self._half_bytes
        num_lines = 0
        for line in self._next:
            if num_bytes < len(line):
                break
            num_bytes -= len(line)
            num_lines += 1
            if self._digest is not None:
                self._add_to_digest(self._digest, line, self._ledger_file)
        self._half_bytes = num_bytes
        del self._next[:num_lines]
        self._num_lines += num_lines
        self.num_written += num_lines
        if num_lines and self._header_is_next:
            self._header_is_next = False
            self.num_written -= 1

    def _add_to_digest(self, digest: RunningDigest, line: bytes, file: LedgerFile) -> None:
        try:
            digest.add(line, file)
        except Exception:  # an error in adding up must not cost a row
            _LOG.exception("EADT-330: the ledger's digest is given up; reports read the whole ledger instead")
            self._digest = None

    def _is_full(self) -> bool:
        age_s = self._clock.monotonic_s() - self._began_s
        return self._num_bytes >= self._rotate_bytes or age_s >= self._rotate_s

    def _finish_file(self, file: FileIO) -> None:
        assert self._ledger_file is not None
        self._sync()
        self._file = None
        with contextlib.suppress(OSError):
            file.close()
        self._finished.append((self._ledger_file, True))
        self._save_digest()

    def _leave_file(self, file: FileIO) -> None:
        """The file can no longer be written, and another may."""
        assert self._ledger_file is not None
        self._file = None
        self._is_unsynced = False
        with contextlib.suppress(OSError):
            file.close()
        if self._half_bytes:
            if self._digest is not None:
                self._digest.leave_torn(self._ledger_file, self._half_bytes)
            self._half_bytes = 0

    # -- the disk -------------------------------------------------------------------------------

    def _sync(self) -> None:
        if self._file is None or not self._is_unsynced:
            return
        self._is_unsynced = False
        try:
            os.fsync(self._file.fileno())
        except OSError as error:  # the rows are written, only not yet safe from a power cut
            self._say_once("synchronised to disk", error)
        self._synced_at_s = self._clock.monotonic_s()

    def _save_digest(self) -> None:
        self._digest_at_s = self._clock.monotonic_s()
        if self._digest is None:
            return
        try:
            self._digest.save(self._folder)
        except OSError as error:  # the last one serves
            self._say_once("summed up in its digest", error)

    def _say_once(self, what: str, error: OSError) -> None:
        if what not in self._said:
            self._said.add(what)
            _LOG.warning("EADT-330: the ledger could not be %s (%s); nothing of it is lost", what, error)
