"""What of a ledger could not be read: counted, and named. It reads nothing itself."""

from __future__ import annotations

import msgspec

NUM_NAMED = 50
"""Places that are named one by one; of more, the number is kept."""


class Damage(msgspec.Struct, omit_defaults=True):
    """What was found while a ledger was read; false where nothing is amiss.

    Attributes:
        num_files: Files that were read, wholly or in part.
        num_rows: Rows that were read.
        torn: Files whose last line was cut off: its writer died while writing it.
        num_corrupt: Other lines that are no row in JSON.
        corrupt: The first of them, as ``events-1.jsonl:17``.
        unknown: Rows of kinds that this version does not know, by kind: how many.
        num_senseless: Rows of a known kind with a field missing or of the wrong type.
        senseless: The first of them: place, kind, and what is wrong.
        newer: Files of a newer version, which were not read: ``events-3.jsonl: version 7``.
        unreadable: Files that could not be read to their end, each with the reason.
        missing: Files that the numbers of the others say there must have been.
    """

    num_files: int = 0
    num_rows: int = 0
    torn: list[str] = []
    num_corrupt: int = 0
    corrupt: list[str] = []
    unknown: dict[str, int] = {}
    num_senseless: int = 0
    senseless: list[str] = []
    newer: list[str] = []
    unreadable: list[str] = []
    missing: list[str] = []

    @property
    def num_torn(self) -> int:
        """Files whose last line was cut off."""
        return len(self.torn)

    def __bool__(self) -> bool:
        return bool(
            self.torn
            or self.num_corrupt
            or self.unknown
            or self.num_senseless
            or self.newer
            or self.unreadable
            or self.missing
        )

    def add_corrupt(self, place: str) -> None:
        """Count a line that is no row in JSON."""
        self.num_corrupt += 1
        if len(self.corrupt) < NUM_NAMED:
            self.corrupt.append(place)

    def add_senseless(self, place: str, kind: str, reason: str) -> None:
        """Count a row of a known kind that makes no sense."""
        self.num_senseless += 1
        if len(self.senseless) < NUM_NAMED:
            self.senseless.append(f"{place}: {kind}: {reason}")

    def add_unknown(self, kind: str) -> None:
        """Count a row of an unknown kind."""
        name = kind[:40]
        if name not in self.unknown and len(self.unknown) >= NUM_NAMED:
            name = "others"
        self.unknown[name] = self.unknown.get(name, 0) + 1

    def sentences(self) -> list[str]:
        """For people: one sentence for each sort of damage; none where nothing is amiss."""
        found = []
        if self.newer:
            found.append(f"Written by a newer version of EADT and not read: {_named(self.newer)}.")
        if self.unreadable:
            found.append(f"Not read to the end: {_named(self.unreadable)}.")
        if self.missing:
            found.append(f"Files of the ledger are missing: {_named(self.missing)}.")
        if self.num_corrupt:
            found.append(f"Damaged lines ({self.num_corrupt}): {_named(self.corrupt, self.num_corrupt)}.")
        if self.num_senseless:
            named = _named(self.senseless, self.num_senseless)
            found.append(f"Rows that make no sense, left out ({self.num_senseless}): {named}.")
        if self.unknown:
            kinds = [f"{kind} ({count})" for kind, count in self.unknown.items()]
            found.append(f"Rows of unknown kinds, left out: {_named(kinds)}.")
        if self.torn:
            found.append(f"The last line was cut off when the writer died: {_named(self.torn)}.")
        return found


def _named(names: list[str], count: int | None = None, num_shown: int = 5) -> str:
    count = len(names) if count is None else count
    shown = "; ".join(names[:num_shown])
    return shown if count <= num_shown else f"{shown}; and {count - num_shown} more"
