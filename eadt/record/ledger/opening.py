"""Opens a run's books: from the digest and what came after it, or from all of the ledger."""

from __future__ import annotations

import contextlib
import gc
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from eadt.record.ledger.damage import Damage
from eadt.record.ledger.digest import NoDigestError, Position, load_digest
from eadt.record.ledger.files import LedgerFile
from eadt.record.ledger.reader import list_files, rows_of, rows_of_file
from eadt.record.rows import AnyRow

if TYPE_CHECKING:
    from eadt.record.books import Books


class AddsUp(Protocol):
    """What adds rows up and can be put away; see :class:`eadt.record.books.Books`."""

    def add(self, row: AnyRow) -> None:
        """Take one row in; never raises."""
        ...

    def to_state(self) -> bytes:
        """All that it is, to go on from later."""
        ...

    @classmethod
    def from_state(cls: type[B], state: bytes) -> B:
        """The one that gave ``state``; ``ValueError`` where it is of another version."""
        ...


B = TypeVar("B", bound=AddsUp)


@dataclass(frozen=True)
class OpenedLedger(Generic[B]):
    """A ledger that was read.

    Attributes:
        books: What its rows add up to.
        damage: What of it could not be read.
        covered: Number of each file that was read: size of its content; ``None``: it could not be opened.
        why_all: Why all of the ledger was read; empty where the digest was used.
    """

    books: B
    damage: Damage
    covered: dict[int, int | None]
    why_all: str = ""


def open_books(folder: Path, *, from_ledger: bool = False) -> OpenedLedger[Books]:
    """The books of a run.

    Args:
        folder: The run's ledger folder; a missing one gives empty books.
        from_ledger: Read all of the ledger, whether or not there is a digest.
    """
    # Not needed by those who only write or only look at rows.
    from eadt.record.books import Books

    return open_ledger(folder, Books, from_ledger=from_ledger)


def open_ledger(folder: Path, kind: type[B], *, from_ledger: bool = False) -> OpenedLedger[B]:
    """As :func:`open_books`, with other books."""
    with _without_garbage_search():
        if from_ledger:
            return _from_ledger(folder, kind, "it was asked for")
        try:
            return _from_digest(folder, kind)
        except NoDigestError as reason:
            return _from_ledger(folder, kind, str(reason))


@contextlib.contextmanager
def _without_garbage_search() -> Iterator[None]:
    """Rows do not refer to themselves; to search millions of them for it takes an eighth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _from_ledger(folder: Path, kind: type[B], why: str) -> OpenedLedger[B]:
    books, damage = kind(), Damage()
    files = list_files(folder, damage)
    # Sizes before reading: what another writer appends meanwhile makes the next opening read all again.
    covered = {file.number: file.size_bytes() for file in files}
    for file in files:
        _add(books, rows_of_file(file, damage))
    return OpenedLedger(books, damage, covered, why)


def _from_digest(folder: Path, kind: type[B]) -> OpenedLedger[B]:
    # The digest first: files that come after it was read are then seen.
    digest = load_digest(folder)
    try:
        books = kind.from_state(digest.state)
    except ValueError as error:
        raise NoDigestError(f"the books in the digest cannot be used: {error}") from error
    damage, position = digest.damage, digest.position
    files = list_files(folder, damage)
    sizes = {file.number: file.size_bytes() for file in files}
    earlier = {number: size for number, size in digest.covered.items() if number != position.file}
    if earlier != {number: size for number, size in sizes.items() if number < position.file}:
        raise NoDigestError("the ledger's files are not those that the digest was made from")
    if position.file not in sizes:
        raise NoDigestError("the file that the digest ends in is missing")
    for file in files:
        if file.number == position.file:
            _add(books, rows_of(file, _after(position, file), position.num_lines + 1, damage))
        elif file.number > position.file:
            _add(books, rows_of_file(file, damage))
    return OpenedLedger(books, damage, sizes)


def _add(books: AddsUp, lists: Iterator[list[AnyRow]]) -> None:
    add = books.add
    for rows in lists:
        for row in rows:
            add(row)


def _after(position: Position, file: LedgerFile) -> Iterator[bytes]:
    """What is in a file after a place.

    Raises:
        NoDigestError: It is not the file that was meant.
        UnreadableError: It cannot be read further.
    """
    size = position.last_line_bytes
    pieces = file.pieces(position.offset - size)
    line = b""
    for piece in pieces:
        line += piece
        if len(line) >= size:
            break
    if len(line) < size or zlib.crc32(line[:size]) != position.last_line_crc:
        raise NoDigestError(f"{file.name} is not the file that the digest was made from")
    yield line[size:]
    yield from pieces
