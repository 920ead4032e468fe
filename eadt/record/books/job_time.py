"""What the whole job's time was for.

Owns seconds by use and the bands of a plot. Time is summed in whole millionths of a second.
"""

from __future__ import annotations

from operator import add, sub

import msgspec

from eadt.record.books.amounts import share
from eadt.record.books.common import Common
from eadt.record.books.undo import Page, Undoable
from eadt.record.books.unusable import check_interval, check_numbers
from eadt.record.rows import UNDOABLE, TimeRow

_ROOM = 1024
_MAX_BANDS = 2048
_EXACT_BANDS = 512
TOUCHING_S = 1e-3
"""Intervals that are no further apart follow each other."""


class TimeAccount(msgspec.Struct):
    """Time of one use, then what a model gave to others of it, in millionths of a second."""

    uses: list[str]
    totals: list[int]
    lost: int | None = None


class Band(msgspec.Struct, array_like=True, gc=False):
    """A stretch on the run's axis with one use, and the work that it was for."""

    from_s: float
    to_s: float
    use: str
    session: int
    generation: int
    from_step: int
    to_step: int


class TimeBook(msgspec.Struct):
    """The job's time."""

    accounts: list[TimeAccount] = []
    keys: dict[str, int] = {}
    undoable: Undoable = msgspec.field(default_factory=Undoable)
    bands: list[Band] = []
    shortest_s: float = 0.0

    def add(self, row: TimeRow, common: Common) -> None:
        """Book a stretch of time.

        Raises:
            Unusable: The row makes no sense.
        """
        check_interval(row.t0_s, row.t1_s)
        check_numbers(row.step, row.generation, row.setting)
        common.see(row.t1_s)
        session = common.session
        left = total = round(row.t1_s * 1e6) - round(row.t0_s * 1e6)
        uses, amounts = [row.use], [total]
        for use, fraction in row.shared.items():
            if use != row.use:
                part = share(total, fraction, left)
                left -= part
                uses.append(use)
                amounts.append(part)
        amounts[0] = left
        is_void = session.limits.void(row.generation, row.step)
        place = self._account(uses)
        if is_void:
            place = self._as_lost(place)
        account = self.accounts[place]
        account.totals = list(map(add, account.totals, amounts))
        common.parts.add_time(session.index, row.generation, row.setting, total)
        if any(use in UNDOABLE for use in account.uses):
            page = Page(session.index, row.generation, row.setting, place, [row.step], [amounts])
            self.undoable.add(page, _ROOM, common.saved_steps)
        use = "lost" if is_void and row.use in UNDOABLE else row.use
        band = Band(
            session.place_s(row.t0_s),
            session.place_s(row.t1_s),
            use,
            session.index,
            row.generation,
            row.step,
            row.step,
        )
        self.bands.append(band)
        if len(self.bands) > _MAX_BANDS:
            self._compact_bands()

    def undo(self, session: int, generation: int, resumed_step: int) -> None:
        """The run fell back; see :meth:`eadt.record.books.undo.Undoable.undo`."""
        for undone in self.undoable.undo(session, generation, resumed_step):
            account = self.accounts[undone.account]
            account.totals = list(map(sub, account.totals, undone.amounts))
            lost = self.accounts[self._as_lost(undone.account)]
            lost.totals = list(map(add, lost.totals, undone.amounts))
        bands: list[Band] = []
        for band in self.bands:
            reached = band.session < session or band.generation <= generation
            if band.use not in UNDOABLE or not reached or band.to_step < resumed_step:
                bands.append(band)
            elif band.from_step >= resumed_step:
                bands.append(msgspec.structs.replace(band, use="lost"))
            else:
                kept = (resumed_step - band.from_step) / (band.to_step - band.from_step + 1)
                at_s = band.from_s + kept * (band.to_s - band.from_s)
                bands.append(msgspec.structs.replace(band, to_s=at_s, to_step=resumed_step - 1))
                bands.append(msgspec.structs.replace(band, from_s=at_s, from_step=resumed_step, use="lost"))
        self.bands = bands

    def seconds_by_use(self) -> dict[str, float]:
        """Seconds of each use that there was."""
        sums: dict[str, int] = {}
        for account in self.accounts:
            for use, total in zip(account.uses, account.totals, strict=True):
                if total:
                    sums[use] = sums.get(use, 0) + total
        return {use: total / 1e6 for use, total in sums.items()}

    def use_bands(self) -> tuple[tuple[float, float, str], ...]:
        """(from_s, to_s, use) on the run's axis; neighbours of one use are one band."""
        bands: list[tuple[float, float, str]] = []
        for band in sorted(self.bands, key=lambda band: band.from_s):
            if bands and bands[-1][2] == band.use and band.from_s - bands[-1][1] <= TOUCHING_S:
                bands[-1] = (bands[-1][0], max(bands[-1][1], band.to_s), band.use)
            elif band.to_s > band.from_s:
                bands.append((band.from_s, band.to_s, band.use))
        return tuple(bands)

    def _account(self, uses: list[str]) -> int:
        key = "/".join(uses)
        place = self.keys.get(key)
        if place is None:
            place = self.keys[key] = len(self.accounts)
            self.accounts.append(TimeAccount(uses, [0] * len(uses)))
        return place

    def _as_lost(self, place: int) -> int:
        account = self.accounts[place]
        if account.lost is None:
            account.lost = self._account(["lost" if use in UNDOABLE else use for use in account.uses])
        return account.lost

    def _compact_bands(self) -> None:
        """Merge old bands of one use and generation; then let the shortest be part of the one before."""
        old, new = self.bands[:-_EXACT_BANDS], self.bands[-_EXACT_BANDS:]
        old = _merged(old, self.shortest_s)
        while len(old) > _MAX_BANDS // 2:
            self.shortest_s = max(2 * self.shortest_s, (new[-1].to_s - old[0].from_s) / (8 * _MAX_BANDS))
            size = len(old)
            old = _merged(old, self.shortest_s)
            if len(old) == size and self.shortest_s > new[-1].to_s:
                break
        self.bands = old + new


def _merged(bands: list[Band], shortest_s: float) -> list[Band]:
    """With neighbours of one use merged; bands under ``shortest_s`` become part of the one before."""
    merged: list[Band] = []
    for band in bands:
        last = merged[-1] if merged else None
        if last is None:
            merged.append(msgspec.structs.replace(band))
            continue
        is_same = (last.use, last.session, last.generation) == (band.use, band.session, band.generation)
        if is_same and band.from_s - last.to_s <= TOUCHING_S:
            last.to_s = max(last.to_s, band.to_s)
            last.from_step = min(last.from_step, band.from_step)
            last.to_step = max(last.to_step, band.to_step)
        elif band.to_s - band.from_s < shortest_s:
            last.to_s = max(last.to_s, band.to_s)
        else:
            merged.append(msgspec.structs.replace(band))
    return merged
