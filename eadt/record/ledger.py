"""The ledger: the append-only record of a run, from which every total is recomputed.

Owns the files ``events-<k>.jsonl`` in a run's ledger folder: one JSON object a line, one new file
for each writer. It knows nothing of what the rows mean (that is
:mod:`eadt.report.accounting`), and never rewrites or deletes a file.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from eadt.clock import SYSTEM_CLOCK, Clock

_LOG = logging.getLogger(__name__)
_FILE_NAME = re.compile(r"events-(\d+)\.jsonl")
FSYNC_INTERVAL_S = 2.0
"""Least time in s between two fsyncs: what a power cut, not a crash, of the machine can cost."""


def _plain(value: Any) -> Any:
    """``value`` with JSON types only; NaN and infinities become ``None`` (JSON has neither)."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):  # an Enum's member too
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):  # a number of numpy or torch
        return _plain(value.item())
    raise TypeError(f"a ledger row cannot hold {type(value).__name__}: {value!r}")


def _file_number(path: Path) -> int | None:
    match = _FILE_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


def ledger_files(folder: Path) -> list[Path]:
    """The ledger's files in the order in which they were begun; empty when there is no folder."""
    if not folder.is_dir():
        return []
    numbered = [(number, path) for path in folder.iterdir() if (number := _file_number(path)) is not None]
    return [path for _, path in sorted(numbered)]


class LedgerWriter:
    """Appends rows to a new file of its own. Thread-safe; blocks for the disk only.

    Each row reaches the operating system before :meth:`append` returns, so it survives the death of
    this process. A full or failing disk never stops training: the row is dropped, the first failure
    is logged, and the next row that can be written is preceded by a ``note`` row that says how many
    were lost.

    Args:
        folder: The run's ledger folder; made with the first row.
        clock: Source of ``unix_s`` in the rows and of the fsync interval.
    """

    def __init__(self, folder: Path, clock: Clock = SYSTEM_CLOCK) -> None:
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()
        self._file: FileIO | None = None
        self._path: Path | None = None
        self._seq = 0
        self._synced_at_s = -math.inf
        self._num_unwritten = 0
        self._line_is_broken = False
        self._closed = False

    @property
    def path(self) -> Path | None:
        """This writer's file; ``None`` before the first row."""
        return self._path

    @property
    def num_unwritten(self) -> int:
        """Rows that the disk refused since the last one that it took."""
        return self._num_unwritten

    def append(self, row: Mapping[str, Any]) -> int:
        """Add ``seq`` and ``unix_s`` to ``row`` and write it as one line.

        Args:
            row: At least ``type``. An explicit ``unix_s`` is kept. Non-finite numbers are written
                as null.

        Returns:
            The row's ``seq``: 1 for the first row of this writer's file.

        Raises:
            TypeError: The row holds what JSON cannot.
            ValueError: The row has no ``type``, or the writer is closed.
        """
        if not isinstance(row.get("type"), str):
            raise ValueError(f"a ledger row needs a type: {dict(row)!r}")
        plain = _plain(row)
        with self._lock:
            if self._closed:
                raise ValueError("the ledger writer is closed")
            try:
                if self._num_unwritten:
                    self._write(
                        {
                            "type": "note",
                            "code": "EADT-330",
                            "text": f"{self._num_unwritten} ledger rows could not be written before this one",
                        }
                    )
                    self._num_unwritten = 0
                self._write(plain)
            except OSError as error:
                if not self._num_unwritten:
                    _LOG.warning("EADT-330: ledger row not written (%s); totals will lack it", error)
                self._num_unwritten += 1
            return self._seq

    def _write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            self._open()
        assert self._file is not None
        head = {"type": row["type"], "seq": self._seq + 1, "unix_s": row.get("unix_s", self._clock.unix_s())}
        line = json.dumps(head | {k: v for k, v in row.items() if k not in head}, separators=(",", ":"))
        data = line.encode() + b"\n"
        if self._line_is_broken:  # a half-written line stays by itself: the reader counts it
            data = b"\n" + data
        num_written = self._file.write(data)
        self._line_is_broken = num_written != len(data)
        if self._line_is_broken:
            raise OSError(f"only {num_written} of {len(data)} bytes were written to {self._path}")
        self._seq += 1
        now_s = self._clock.monotonic_s()
        if now_s - self._synced_at_s >= FSYNC_INTERVAL_S:
            self._synced_at_s = now_s
            self._sync(self._file)

    @staticmethod
    def _sync(file: FileIO) -> None:
        try:
            os.fsync(file.fileno())
        except OSError as error:  # the row is written, only not yet safe from a power cut
            _LOG.warning("EADT-330: the ledger could not be synchronised to disk (%s)", error)

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        files = ledger_files(self._folder)
        number = (_file_number(files[-1]) or 0) + 1 if files else 1
        while self._file is None:
            path = self._folder / f"events-{number}.jsonl"
            try:
                self._file = FileIO(path, "x")  # exclusive: two writers never share a file
                self._path = path
            except FileExistsError:
                number += 1

    def close(self) -> None:
        """Fsync and close. Idempotent."""
        with self._lock:
            self._closed = True
            if self._file is not None:
                self._sync(self._file)
                self._file.close()
                self._file = None

    def __enter__(self) -> LedgerWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class LedgerContents:
    """What :func:`read_ledger` found.

    Attributes:
        rows: All readable rows, by file, then by ``seq``.
        num_torn: Files whose last line was cut off (the writer died while writing it).
        corrupt: Every other unreadable line, as ``events-1.jsonl:17``.
        num_files: Ledger files that were read.
    """

    rows: tuple[dict[str, Any], ...]
    num_torn: int = 0
    corrupt: tuple[str, ...] = ()
    num_files: int = 0

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        """The rows of one type, in order."""
        return [row for row in self.rows if row["type"] == kind]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one too
        return None
    usable = (
        isinstance(row, dict)
        and isinstance(row.get("type"), str)
        and isinstance(row.get("seq"), int)
        and isinstance(row.get("unix_s"), int | float)
    )
    return row if usable else None


def read_ledger(folder: Path) -> LedgerContents:
    """Read all files of a ledger, also while a writer is at work.

    A line that cannot be read is left out and counted; nothing is repaired.

    Args:
        folder: The run's ledger folder; a missing one reads as empty.
    """
    rows: list[dict[str, Any]] = []
    corrupt: list[str] = []
    num_torn = 0
    files = ledger_files(folder)
    for path in files:
        lines = path.read_bytes().split(b"\n")
        of_file: list[dict[str, Any]] = []
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            row = _parse(line)
            if row is not None:
                of_file.append(row)
            elif number == len(lines):  # no newline after it
                num_torn += 1
            else:
                corrupt.append(f"{path.name}:{number}")
        rows += sorted(of_file, key=lambda row: int(row["seq"]))
    return LedgerContents(tuple(rows), num_torn, tuple(corrupt), len(files))
