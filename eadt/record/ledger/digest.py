"""The digest beside the ledger: what its rows add up to up to a place, so that nobody need read a month.

Owns ``digest.json``. It may always be removed: everything in it can be had again from the ledger.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import eadt
from eadt.record.ledger.damage import Damage
from eadt.record.ledger.files import LedgerFile, sync_folder
from eadt.record.ledger.reader import parse
from eadt.record.rows import SCHEMA_VERSION

if TYPE_CHECKING:
    from eadt.record.ledger.opening import OpenedLedger

DIGEST_VERSION = 1
_NAME = "digest.json"


class NoDigestError(Exception):
    """There is no digest that can be used; the text says why."""


class Position(msgspec.Struct, frozen=True):
    """The end of a line in a file.

    Attributes:
        file: Number of the file.
        offset: Bytes of its content before this place.
        num_lines: Lines before this place.
        last_line_bytes: Size of the line that ends here.
        last_line_crc: Its CRC-32, by which the file is known to be the one that was meant.
    """

    file: int
    offset: int
    num_lines: int
    last_line_bytes: int
    last_line_crc: int

    def after(self, line: bytes) -> Position:
        """The place at which ``line``, written at this one, ends."""
        return Position(self.file, self.offset + len(line), self.num_lines + 1, len(line), zlib.crc32(line))


class Digest(msgspec.Struct, kw_only=True):
    """What ``digest.json`` holds.

    Attributes:
        digest_version: Version of this format.
        schema_version: Version of the rows.
        eadt_version: Version of EADT that wrote it.
        covered: Number of each file that is in ``state``, wholly or up to ``position``: size of its content;
            ``None``: it could not be opened.
        position: Where it ends, in the newest file.
        damage: What could not be read so far.
        state: What :meth:`eadt.record.books.Books.to_state` gave.
        state_crc: Its CRC-32.
    """

    digest_version: int = DIGEST_VERSION
    schema_version: int = SCHEMA_VERSION
    eadt_version: str = eadt.__version__
    covered: dict[int, int | None]
    position: Position
    damage: Damage
    state: bytes
    state_crc: int


def load_digest(folder: Path) -> Digest:
    """The ledger's digest.

    Raises:
        NoDigestError: There is none, or none that this version can use.
    """
    try:
        data = (folder / _NAME).read_bytes()
        # The version first: another one may have other fields.
        version = msgspec.json.decode(data, type=_Versions)
        if (version.digest_version, version.schema_version) != (DIGEST_VERSION, SCHEMA_VERSION):
            raise NoDigestError(f"{_NAME} is of another version")
        digest = msgspec.json.decode(data, type=Digest)
    except FileNotFoundError:
        raise NoDigestError(f"there is no {_NAME}") from None
    except OSError as error:
        raise NoDigestError(f"{_NAME} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NoDigestError(f"{_NAME} is damaged: {error}") from error
    if zlib.crc32(digest.state) != digest.state_crc or digest.position.file not in digest.covered:
        raise NoDigestError(f"{_NAME} is damaged")
    return digest


def save_digest(
    folder: Path, covered: dict[int, int | None], position: Position, damage: Damage, state: bytes
) -> None:
    """Put a new digest in the place of the last one, in one go.

    Raises:
        OSError: The disk refused; the last one stays.
    """
    digest = Digest(
        covered=covered, position=position, damage=damage, state=state, state_crc=zlib.crc32(state)
    )
    temporary = folder / f"{_NAME}.part"
    try:
        with temporary.open("wb") as target:
            target.write(msgspec.json.encode(digest))
            target.flush()
            os.fsync(target.fileno())
        temporary.replace(folder / _NAME)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(folder)


class _Versions(msgspec.Struct):
    digest_version: int
    schema_version: int


class RunningDigest:
    """Books and damage of a ledger while its writer goes on; what the next opening would find.

    Rows are taken as a reader reads them, not as they were handed to the writer. Not thread-safe.

    Args:
        opened: The ledger before this writer's first row. It is copied.
    """

    def __init__(self, opened: OpenedLedger[Any]) -> None:
        self._books = type(opened.books).from_state(opened.books.to_state())
        self._damage = deepcopy(opened.damage)
        self._covered = dict(opened.covered)
        self._position: Position | None = None
        self.has_news = False

    def begin_file(self, file: LedgerFile) -> None:
        """Lines go to a new file from now on."""
        self._damage.num_files += 1
        self._covered[file.number] = 0
        self._position = Position(file.number, 0, 0, 0, 0)

    def add(self, line: bytes, file: LedgerFile) -> None:
        """Take in a line that was written, its end included."""
        assert self._position is not None
        self._position = self._position.after(line)
        self._covered[file.number] = self._position.offset
        row = parse(line, f"{file.name}:{self._position.num_lines}", self._damage)
        if row is not None:
            self._books.add(row)
        self.has_news = True

    def leave_torn(self, file: LedgerFile, num_bytes: int) -> None:
        """The file ends with so many bytes of a line that goes to another file."""
        self._damage.torn.append(file.name)
        self._covered[file.number] = (self._covered[file.number] or 0) + num_bytes

    def save(self, folder: Path) -> None:
        """Write the digest.

        Raises:
            OSError: The disk refused.
        """
        if self._position is not None and self.has_news:
            save_digest(folder, self._covered, self._position, self._damage, self._books.to_state())
            self.has_news = False
