"""Writes the ledger in a thread of its own, so that no disk is in the way of those who append."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from msgspec import structs

from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.record.ledger.digest import RunningDigest
from eadt.record.ledger.opening import OpenedLedger
from eadt.record.ledger.output import LedgerOutput
from eadt.record.ledger.reader import MAX_LINE_BYTES
from eadt.record.rows import NoteRow, Row, kind_of

_LOG = logging.getLogger(__name__)

QUEUE_BOUND = 100_000
"""Rows that wait for the disk: days of an ordinary run, tens of megabytes."""

ROTATE_BYTES = 64 * 1024 * 1024
ROTATE_S = 86400.0
DIGEST_INTERVAL_S = 60.0
_RETRY_S = 1.0
_CODE = "EADT-330"


class LedgerWriter:
    """Appends rows to new files of its own; the rows of one thread stay in their order. Thread-safe.

    A row reaches the operating system some milliseconds after :meth:`append`, and then survives the death
    of this process. While the disk refuses, rows wait; those beyond the bound are dropped and counted, and a
    ``note`` row in their place says how many.

    Args:
        folder: The run's ledger folder; made with the first row.
        clock: Source of ``unix_s`` in the rows, and of all intervals.
        opened: The ledger as it was opened, before rows were added to its books (they are copied here):
            the digest is kept. ``None``: it is not.
        queue_bound: Rows that may wait.
        rotate_bytes: A file of this size is followed by another, and compressed.
        rotate_s: And so is one of this age in s.
        digest_interval_s: Least time in s between two digests.
    """

    def __init__(
        self,
        folder: Path,
        clock: Clock = SYSTEM_CLOCK,
        *,
        opened: OpenedLedger[Any] | None = None,
        queue_bound: int = QUEUE_BOUND,
        rotate_bytes: int = ROTATE_BYTES,
        rotate_s: float = ROTATE_S,
        digest_interval_s: float = DIGEST_INTERVAL_S,
    ) -> None:
        self._clock = clock
        self._queue_bound = queue_bound
        self._output = LedgerOutput(
            folder,
            clock,
            rotate_bytes=rotate_bytes,
            rotate_s=rotate_s,
            digest=None if opened is None else RunningDigest(opened),
            digest_interval_s=digest_interval_s,
        )
        self._encoder = msgspec.json.Encoder(enc_hook=_plain)
        self._thread: threading.Thread | None = None
        self._condition = threading.Condition()
        # All below is guarded by the condition's lock.
        self._queue: deque[bytes] = deque()
        self._num_in_hand = 0  # taken from the queue, and not written yet
        self._num_accepted = 0
        self._num_written = 0
        self._num_dropped = 0
        self._num_untold = 0  # of them, no row says so yet
        self._num_failures = 0
        self._trouble: str | None = None
        self._is_urged = False
        self._is_closed = False
        self._gives_up = False

    @property
    def num_dropped(self) -> int:
        """Rows that were given up."""
        return self._num_dropped

    @property
    def num_unwritten(self) -> int:
        """Rows that were appended and are not in the file: those that wait, and those given up."""
        with self._condition:
            return len(self._queue) + self._num_in_hand + self._num_dropped

    @property
    def trouble(self) -> str | None:
        """What the disk said, for as long as it refuses; ``None`` while all is well."""
        return self._trouble

    def start(self) -> None:
        """Begin to write. Idempotent."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="eadt-ledger", daemon=True)
            self._thread.start()

    def append(self, row: Row) -> None:
        """Have a row written, as it is now. Fills in its ``unix_s``. Never blocks, never raises."""
        if not row.unix_s:
            row.unix_s = round(self._clock.unix_s(), 3)
        line = self._encode(structs.replace(row, seq=0) if row.seq else row)
        with self._condition:
            if self._is_closed or len(self._queue) + self._num_in_hand >= self._queue_bound:
                self._drop()
                return
            self._tell_dropped()
            self._enqueue(line)
            self._condition.notify_all()

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until the rows appended so far are in the operating system's hands.

        Returns:
            Whether they are: not if the disk refused, or took longer than ``timeout_s``.
        """
        with self._condition:
            target, failures = self._num_accepted, self._num_failures
            self._is_urged = True
            self._condition.notify_all()
            self._condition.wait_for(
                lambda: self._num_written >= target or self._num_failures != failures, timeout_s
            )
            return self._num_written >= target

    def close(self, timeout_s: float = 10.0) -> bool:
        """Write all that waits, sync, and end. Idempotent; later rows are dropped.

        Returns:
            Whether every row is written: not if the disk refused for ``timeout_s``.
        """
        with self._condition:
            if not self._is_closed:
                self._tell_dropped()
            self._is_closed = True
            self._condition.notify_all()
        if self._thread is None and not self._queue:
            return self._num_dropped == 0
        self.start()
        assert self._thread is not None
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            with self._condition:
                self._gives_up = True
                self._condition.notify_all()
            self._thread.join(1.0)  # it hangs if the disk does; it is a daemon
        if num_lost := self.num_unwritten - self._num_dropped:
            _LOG.warning("%s: the last %d ledger rows were not written; totals lack them", _CODE, num_lost)
        return self.num_unwritten == 0

    def __enter__(self) -> LedgerWriter:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- appending ------------------------------------------------------------------------------

    def _encode(self, row: Row) -> bytes:
        try:
            line = self._encoder.encode(row)
            if len(line) <= MAX_LINE_BYTES:
                return line
            reason = f"{len(line)} bytes are more than the {MAX_LINE_BYTES} of the longest row"
        except Exception as error:  # whatever a row holds: that must not end a training run
            reason = str(error)
        text = f"a row of kind {kind_of(row)} could not be written: {reason}"
        _LOG.warning("%s: %s", _CODE, text)
        return self._encoder.encode(NoteRow(code=_CODE, text=text, unix_s=row.unix_s))

    def _enqueue(self, line: bytes) -> None:
        self._queue.append(line)
        self._num_accepted += 1

    def _drop(self) -> None:
        if not self._num_untold:
            why = "its writer is closed" if self._is_closed else self._trouble or "the disk is too slow"
            _LOG.warning("%s: the ledger takes no more rows: %s; totals will lack them", _CODE, why)
        self._num_dropped += 1
        self._num_untold += 1

    def _tell_dropped(self) -> None:
        if self._num_untold:
            text = f"{self._num_untold} ledger rows could not be written before this one; totals lack them"
            note = NoteRow(code=_CODE, text=text, unix_s=round(self._clock.unix_s(), 3))
            self._num_untold = 0
            self._enqueue(self._encoder.encode(note))

    # -- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        is_done = False
        while not is_done:
            try:
                is_done = self._turn()
            except Exception:  # an error of ours must not end the record
                _LOG.exception("%s: the ledger's thread failed, and goes on", _CODE)
                with self._condition:
                    is_done = self._condition.wait_for(lambda: self._gives_up, _RETRY_S)
        self._output.close()

    def _turn(self) -> bool:
        """Wait for work and do it; whether there will be no more."""
        output = self._output
        with self._condition:
            self._condition.wait_for(self._is_wanted, self._idle_s())
            self._is_urged = False
            is_closing, gives_up = self._is_closed, self._gives_up
            if not output.num_waiting:
                output.take(self._queue)
                self._queue.clear()
            self._num_in_hand = output.num_waiting
        trouble = self._drain()
        with self._condition:
            self._num_written = output.num_written
            self._num_in_hand = output.num_waiting
            self._num_failures += trouble is not None
            self._trouble = trouble
            has_rows = bool(self._queue) or self._num_in_hand > 0
            self._condition.notify_all()
        output.sync_if_due()
        output.save_digest_if_due()
        if trouble is None:
            output.compress_piece()
        return is_closing and (gives_up or not (has_rows or output.is_compressing))

    def _is_wanted(self) -> bool:
        """Whether there is something to do at once."""
        if self._trouble is not None:
            return self._is_urged or self._gives_up
        return bool(self._queue) or self._is_urged or self._is_closed or self._output.is_compressing

    def _idle_s(self) -> float | None:
        return _RETRY_S if self._trouble is not None else self._output.due_in_s

    def _drain(self) -> str | None:
        """Write; what the disk said against it."""
        try:
            self._output.drain()
        except OSError as error:
            if self._trouble is None:
                _LOG.warning(
                    "%s: ledger rows cannot be written (%s); they wait, and up to %d are kept",
                    _CODE,
                    error,
                    self._queue_bound,
                )
            return str(error)
        return None


def _plain(value: Any) -> Any:
    """What JSON has no word for, in its words: numbers of numpy and torch, and paths."""
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"a ledger row cannot hold {type(value).__name__}: {value!r}")
