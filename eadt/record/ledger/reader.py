"""Reads the ledger's rows, in constant memory, also while a writer is at work.

What cannot be read is left out, counted and named in a :class:`Damage`; nothing is repaired and nothing
raises. It adds nothing up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from eadt.record.ledger.damage import Damage
from eadt.record.ledger.files import LedgerFile, UnreadableError, ledger_files
from eadt.record.rows import ROW_TYPES, SCHEMA_VERSION, AnyRow, Row

MAX_LINE_BYTES = 16 * 1024 * 1024
"""A longer line is no row: a file may hold gigabytes of zeros after a power cut."""

_KINDS = frozenset(kind.__struct_config__.tag for kind in ROW_TYPES)
_DECODER: msgspec.json.Decoder[AnyRow] = msgspec.json.Decoder(AnyRow)
_NO_ROW = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class LedgerContents:
    """What :func:`read_ledger` found.

    Attributes:
        rows: All readable rows, by file, in the order in which they were written.
        damage: What could not be read.
    """

    rows: tuple[AnyRow, ...]
    damage: Damage

    def of_type(self, kind: type[R]) -> list[R]:
        """The rows of one type, in order."""
        return [row for row in self.rows if isinstance(row, kind)]


def read_ledger(folder: Path) -> LedgerContents:
    """All rows of a ledger at once, for short runs and tests.

    Args:
        folder: The run's ledger folder; a missing one reads as empty.
    """
    damage = Damage()
    return LedgerContents(tuple(iter_ledger(folder, damage)), damage)


def iter_ledger(folder: Path, damage: Damage | None = None) -> Iterator[AnyRow]:
    """The rows of a ledger, one after the other.

    Args:
        folder: The run's ledger folder; a missing one reads as empty.
        damage: Takes what cannot be read, and is complete once the last row was given.
    """
    damage = Damage() if damage is None else damage
    for file in list_files(folder, damage):
        for rows in rows_of_file(file, damage):
            yield from rows


def list_files(folder: Path, damage: Damage) -> list[LedgerFile]:
    """The files of a ledger; notes those that are missing, and a folder that cannot be listed."""
    try:
        files = ledger_files(folder)
    except OSError as error:
        damage.unreadable.append(f"{folder.name}: {error.strerror}")
        return []
    numbers = {file.number for file in files}
    last = max(numbers, default=0)
    damage.missing = [LedgerFile(k, folder).name for k in range(1, last) if k not in numbers]
    return files


def rows_of_file(file: LedgerFile, damage: Damage) -> Iterator[list[AnyRow]]:
    """The rows of one file, some thousand at a time, unless it is of a newer version."""
    damage.num_files += 1
    yield from rows_of(file, file.pieces(), 1, damage)


def rows_of(
    file: LedgerFile, pieces: Iterator[bytes], first_line: int, damage: Damage
) -> Iterator[list[AnyRow]]:
    """The rows in the pieces of a file, the first of which begins with line ``first_line``."""
    number = first_line
    rest = b""
    try:
        for block in _whole_lines(pieces):
            if not block.endswith(b"\n"):
                rest = block
                break
            if number == 1 and (version := _newer_version(block)):
                damage.newer.append(f"{file.name}: version {version}")
                return
            num_lines = block.count(b"\n")
            yield _rows_of_block(block, num_lines, file.name, number, damage)
            number += num_lines
    except UnreadableError as error:
        damage.unreadable.append(f"{error} (read up to line {number - 1})")
    if rest.strip():
        row = parse(rest, f"{file.name}:{number}", damage, torn_file=file.name)
        if row is not None:
            yield [row]


def parse(line: bytes, place: str, damage: Damage, torn_file: str = "") -> AnyRow | None:
    """The row in a line; ``None``, with a word in ``damage``, where it holds none.

    Args:
        line: With or without its end.
        place: Names it.
        damage: Takes what is wrong, and the count of rows.
        torn_file: Set where the line has no end: the file whose last line is cut off if it is no JSON.
    """
    try:
        row = _DECODER.decode(line)
    except _NO_ROW as error:
        _classify(line, error, place, damage, torn_file)
        return None
    damage.num_rows += 1
    return row


def _rows_of_block(block: bytes, num_lines: int, name: str, first: int, damage: Damage) -> list[AnyRow]:
    try:
        rows = _DECODER.decode_lines(block)
        if len(rows) == num_lines:
            damage.num_rows += num_lines
            return rows
    except _NO_ROW:
        pass
    found = (
        parse(line, f"{name}:{number}", damage)
        for number, line in enumerate(block.split(b"\n"), start=first)
        if line.strip()
    )
    return [row for row in found if row is not None]


def _classify(line: bytes, error: Exception, place: str, damage: Damage, torn_file: str) -> None:
    try:
        values: Any = msgspec.json.decode(line)
    except _NO_ROW:
        if torn_file:
            damage.torn.append(torn_file)
        else:
            damage.add_corrupt(place)
        return
    kind = values.get("type") if isinstance(values, dict) else None
    if not isinstance(kind, str):
        damage.add_corrupt(place)
    elif kind in _KINDS:
        damage.add_senseless(place, kind, str(error))
    else:
        damage.add_unknown(kind)


def _newer_version(block: bytes) -> int | None:
    """The version that a file's first line says, if this code is too old for it."""
    try:
        values: Any = msgspec.json.decode(block[: block.index(b"\n")])
    except _NO_ROW:
        return None
    if not isinstance(values, dict) or values.get("type") != "ledger":
        return None
    version = values.get("schema_version")
    return version if isinstance(version, int) and version > SCHEMA_VERSION else None


def _whole_lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Blocks of whole lines; at last what has no end, if there is such a thing."""
    rest = b""
    for piece in pieces:
        end = piece.rfind(b"\n") + 1
        if not end:
            # What is longer than a row can be is kept in part: it is corrupt as well, and fits in memory.
            rest += piece[: MAX_LINE_BYTES - len(rest)]
            continue
        yield rest + piece[:end]
        rest = piece[end:]
    if rest:
        yield rest
