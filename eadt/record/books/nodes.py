"""One node's energy: the accounts into which its intervals are summed.

Owns what a node is, its columns, and how a row becomes amounts of an account. An *account* is all intervals
of a node in which its components had the same uses and qualities; a row's amounts are added to it column by
column, so that a row costs the same whatever is done with it later.

The columns of an account, in whole numbers: each component's energy, then each part of it that a model gave
to another use, then the time, then for each component that is known in part the time in which it is not.
"""

from __future__ import annotations

from operator import sub
from typing import Any

import msgspec

from eadt.record.books.amounts import MAX_MJ, share
from eadt.record.books.gaps import OpenGap
from eadt.record.books.undo import Page, Undoable
from eadt.record.rows import UNDOABLE, EnergyRow, MeteredComponent

NOTHING_MEASURES_IT = "nothing can measure it"
NOT_READ = "it was not read"
RECENT_US = 1_000_000
_ON_THE_BOARD = ("cpu", "dram")
_MAX_RECENT = 64


class Interval(msgspec.Struct, array_like=True, gc=False):
    """Some interval of a node, as far as its power goes."""

    us: int
    energy_mj: int
    expected_us: int
    unknown_us: int

    def add(self, other: Interval) -> None:
        """Make it longer by another one."""
        self.us += other.us
        self.energy_mj += other.energy_mj
        self.expected_us += other.expected_us
        self.unknown_us += other.unknown_us


class Account(msgspec.Struct):
    """Intervals of one node that were alike.

    Attributes:
        layout: Which of the node's lists of components its columns are.
        key: What sets it apart from the others of its layout.
        uses: Use of each component.
        qualities: Quality of each component; empty: nothing can measure it.
        nulls: Components of which nothing is known.
        partial: Components of which a part of the time is not known.
        shares: (component, use) of each part that a model gave to another use.
        totals: Sums of the columns.
        has_unknown: Whether there are any such components.
        is_measured: Whether there are others.
        is_undoable: Whether a rollback can make some of it void.
        useful: Columns that are useful work's energy.
        is_all_useful: Whether these are all the energy.
        lost: The account that it becomes by a rollback.
    """

    layout: int
    key: str
    uses: list[str]
    qualities: list[str]
    nulls: list[int]
    partial: list[int]
    shares: list[tuple[int, str]]
    totals: list[int]
    has_unknown: bool
    is_measured: bool
    is_undoable: bool
    useful: list[int]
    is_all_useful: bool
    lost: int | None = None

    @property
    def time_column(self) -> int:
        """Where the time is; the columns before are energy."""
        return len(self.uses) + len(self.shares)

    def unknown_us(self, amounts: list[int]) -> dict[int, int]:
        """Of these amounts, the time in which a component is not known, by component."""
        time = self.time_column
        unknown_us = dict.fromkeys(self.nulls, amounts[time])
        unknown_us |= zip(self.partial, amounts[time + 1 :], strict=True)
        return unknown_us

    def energies_mj(self, amounts: list[int]) -> list[int]:
        """Of these amounts, each component's energy for whatever use."""
        energies_mj = amounts[: len(self.uses)]
        for column, (component, _) in enumerate(self.shares, start=len(self.uses)):
            energies_mj[component] += amounts[column]
        return energies_mj

    def interval(self, amounts: list[int], recovered_us: dict[int, int]) -> Interval:
        """A row's amounts as far as its power goes: without what was used before it."""
        time = self.time_column
        us = amounts[time]
        before_mj = 0
        if recovered_us:
            energies_mj = self.energies_mj(amounts)
            before_mj = sum(
                energies_mj[component] * before_us // (us + before_us)
                for component, before_us in recovered_us.items()
            )
        unknown_us = sum(self.unknown_us(amounts).values()) if self.has_unknown else 0
        return Interval(us, sum(amounts[:time]) - before_mj, us * len(self.uses), unknown_us)


class OpenPage(msgspec.Struct):
    """The page that a node writes on: rows that are alike in all but their amounts, and fall into one bin.

    Attributes:
        page: The rows.
        key: Their key, before a rollback made them void.
        goes_on: Whether their use is one of a run that goes on as it is.
        has_unknown: Whether something in them is not known.
        recovered_us: Of its only row, time before it that a component's energy covers too.
        from_t: The bin's stretch of node time,
        to_t: up to here. Nothing: its only row is in several bins, and has been drawn.
        num_summed: How many of the rows are in the sums already.
    """

    page: Page
    key: str
    goes_on: bool
    has_unknown: bool
    recovered_us: dict[int, int]
    from_t: float
    to_t: float
    num_summed: int = 0


class NodeBook(msgspec.Struct):
    """One node.

    Attributes:
        session: The session in which it was met last.
        to_session_s: Added to node time gives session time.
        layout: Which of ``layouts`` its columns are now; -1: it never told.
        end_t: Up to where it booked, node time; ``None``: nothing yet since node time began anew.
        begins: From where each component is expected, node time, until the first row since its node row.
        keys: The account of each key, of the present layout.
        uses: The use that each component had in its last row.
        variance_j2: By use, what cutting between two uses may have put into the wrong one, squared.
        unknown_us: Component-time that is not known, by component; without
        recovered_us: what a counter told of it afterwards, by component and by quality.
        hole_us: Component-time without a row: in all, and by component, by use and by quality.
        recent: Its last intervals on pages before this one.
        num_intervals: How many it booked, and their length in all.
        open: The page that it writes on.
        pace_setting: The setting that ``pace`` is of:
        pace: all its intervals in which the run went on as it is.
    """

    name: str
    hostname: str | None = None
    boot_id: str | None = None
    num_gpus: int | None = None
    num_cores: int | None = None
    not_metered: list[str] = []
    session: int = -1
    to_session_s: float = 0.0
    layouts: list[list[MeteredComponent]] = []
    layout: int = -1
    width: int = 0
    has_unmeasurable: bool = False
    on_the_board: list[int] = []
    end_t: float | None = None
    begins: dict[str, float] = {}
    accounts: list[Account] = []
    keys: dict[str, int] = {}
    uses: dict[str, str] = {}
    last_key: str = ""
    variance_j2: dict[str, float] = {}
    gaps: dict[str, OpenGap] = {}
    unknown_us: dict[str, int] = {}
    recovered_us: dict[str, int] = {}
    recovered_us_by_quality: dict[str, int] = {}
    hole_us: int = 0
    hole_us_by_component: dict[str, int] = {}
    hole_us_by_use: dict[str, int] = {}
    hole_us_by_quality: dict[str, int] = {}
    undoable: Undoable = msgspec.field(default_factory=Undoable)
    open: OpenPage | None = None
    recent: list[Interval] = []
    num_intervals: int = 0
    interval_us: int = 0
    pace_setting: int = -1
    pace: Interval = msgspec.field(default_factory=lambda: Interval(0, 0, 0, 0))

    @property
    def components(self) -> list[MeteredComponent]:
        """Its columns now."""
        return self.layouts[self.layout] if self.layout >= 0 else []

    def covered_to(self, component: str) -> float | None:
        """Up to where a component is accounted for, node time."""
        return self.begins.get(component, self.end_t)

    def components_ever(self) -> tuple[dict[str, Any], ...]:
        """All that it ever booked, each once, with the fields of the same name in its row."""
        ever: list[dict[str, Any]] = []
        for components in self.layouts:
            for component in components:
                names = ("component", "source", "quality", "detail", "resolution_s", "relative_uncertainty")
                facts = {name: getattr(component, name) for name in names}
                if facts not in ever:
                    ever.append(facts)
        return tuple(ever)

    def lay_out(self, components: list[MeteredComponent]) -> None:
        """These are its columns from now on."""
        if components not in self.layouts:
            self.layouts.append(components)
        self.layout = self.layouts.index(components)
        self.width = len(components)
        self.on_the_board = [
            place for place, component in enumerate(components) if component.component in _ON_THE_BOARD
        ]
        self.has_unmeasurable = not all(component.quality for component in components)
        self.keys = {
            account.key: place for place, account in enumerate(self.accounts) if account.layout == self.layout
        }
        self.last_key = ""

    def recovered_by(self, row: EnergyRow, nulls: list[int]) -> dict[int, int]:
        """Time before a row that its energy covers too and that was not known, by component."""
        recovered_us: dict[int, int] = {}
        for number, component in enumerate(self.components):
            name = component.component
            seconds = row.recovered_s.get(name, 0.0)
            before_us = round(seconds * 1e6) if 0.0 < seconds < 1e9 else 0
            before_us = min(before_us, self.unknown_us.get(name, 0))
            if before_us and number not in nulls:
                recovered_us[number] = before_us
        return recovered_us

    def last_intervals(self) -> list[Interval]:
        """Its newest intervals, so many that they are 1 s at least, where there are."""
        rows = self.open.page.rows if self.open is not None else []
        account = self.accounts[self.open.page.account] if self.open is not None else None
        intervals: list[Interval] = []
        us = 0
        for row in reversed(rows):
            assert account is not None
            assert self.open is not None
            intervals.append(account.interval(row, self.open.recovered_us))
            us += intervals[-1].us
            if us >= RECENT_US or len(intervals) >= _MAX_RECENT:
                return intervals[::-1]
        for recent in reversed(self.recent):
            intervals.append(recent)
            us += recent.us
            if us >= RECENT_US or len(intervals) >= _MAX_RECENT:
                break
        return intervals[::-1]

    def begin_time_anew(self) -> None:
        """What comes is of another session, or of another start of the machine."""
        self.end_t = None
        self.begins = {}
        self.uses = {}
        self.last_key = ""
        self.recent = []

    def share_out(self, row: EnergyRow, read_mj: list[int], us: int) -> tuple[str, list[int]]:
        """The key and the amounts of a row of which all is known and has one use, and parts go to others.

        Args:
            row: The row.
            read_mj: Its energies.
            us: Its length, in millionths of a second.
        """
        amounts = read_mj
        shared: list[int] = []
        for use, fraction in row.shared.items():
            if use != row.use:
                if amounts is read_mj and 0.0 <= fraction <= 1.0:  # the common case, in which all is left
                    parts = [round(whole * fraction) for whole in read_mj]
                else:
                    parts = [
                        share(whole, fraction, left) for whole, left in zip(read_mj, amounts, strict=True)
                    ]
                amounts = list(map(sub, amounts, parts))
                shared += parts
        for use, fraction in row.shared_cpu.items():
            if use != row.use:
                amounts = amounts.copy()
                for place in self.on_the_board:
                    part = share(read_mj[place], fraction, amounts[place])
                    amounts[place] -= part
                    shared.append(part)
        return _shared_key(row), [*amounts, *shared, us]

    def sort_out(self, row: EnergyRow, read_mj: list[int], us: int) -> tuple[str, list[int]]:
        """The key and the amounts of a row in which components differ or are unknown.

        Args:
            row: The row.
            read_mj: Its energies; -1: unknown. Unknown ones are set to 0 in place.
            us: Its length, in millionths of a second.
        """
        components = self.components
        nulls: list[int] = []
        partial: list[int] = []
        partial_us: list[int] = []
        for place, component in enumerate(components):
            name = component.component
            quality = row.qualities.get(name, component.quality)
            if not quality or not 0 <= read_mj[place] <= MAX_MJ:
                nulls.append(place)
                read_mj[place] = 0
            elif row.unknown_s and (unknown_us := unknown_us_of(row, name, us)):
                partial.append(place)
                partial_us.append(unknown_us)
        amounts = read_mj.copy()
        shared: list[int] = []
        shares: list[tuple[int, str]] = []
        for fractions, places in ((row.shared, range(len(components))), (row.shared_cpu, self.on_the_board)):
            for use, fraction in fractions.items():
                for place in places:
                    own = row.uses.get(components[place].component, row.use)
                    if use != row.use and place not in nulls and own == row.use:
                        part = share(read_mj[place], fraction, amounts[place])
                        amounts[place] -= part
                        shared.append(part)
                        shares.append((place, use))
        # A row that tells of time before it has a page of its own, but no account of its own.
        key = f"{_shared_key(row)}{row.uses}{row.qualities}{nulls}{partial}"
        if key not in self.keys:
            uses = [row.uses.get(component.component, row.use) for component in components]
            self._open_account(key, uses, row.qualities, nulls, partial, shares)
        return key, [*amounts, *shared, us, *partial_us]

    def account_of(self, row: EnergyRow, key: str) -> int:
        """The account of a key; a new one where the row is the first of its kind."""
        place = self.keys.get(key)
        if place is not None:
            return place
        shares = [(place, use) for use in row.shared if use != row.use for place in range(self.width)]
        shares += [(place, use) for use in row.shared_cpu if use != row.use for place in self.on_the_board]
        return self._open_account(key, [row.use] * self.width, {}, [], [], shares)

    def as_lost(self, place: int) -> int:
        """The account that holds what was in this one and is void."""
        account = self.accounts[place]
        if account.lost is None:
            uses = [_lost(use) for use in account.uses]
            shares = [(component, _lost(use)) for component, use in account.shares]
            key = f"{uses}{account.qualities}{account.nulls}{account.partial}{shares}"
            account.lost = self._find_account(account.layout, key)
            if account.lost is None:
                account.lost = self._append_account(
                    account.layout, key, uses, account.qualities, account.nulls, account.partial, shares
                )
        return account.lost

    def _find_account(self, layout: int, key: str) -> int | None:
        for place, account in enumerate(self.accounts):
            if account.layout == layout and account.key == key:
                return place
        return None

    def _open_account(
        self,
        key: str,
        uses: list[str],
        row_qualities: dict[str, str],
        nulls: list[int],
        partial: list[int],
        shares: list[tuple[int, str]],
    ) -> int:
        qualities = [
            row_qualities.get(component.component, component.quality) or "" for component in self.components
        ]
        place = self._append_account(self.layout, key, uses, qualities, nulls, partial, shares)
        self.keys[key] = place
        return place

    def _append_account(
        self,
        layout: int,
        key: str,
        uses: list[str],
        qualities: list[str],
        nulls: list[int],
        partial: list[int],
        shares: list[tuple[int, str]],
    ) -> int:
        all_uses = [*uses, *(use for _, use in shares)]
        useful = [place for place, use in enumerate(all_uses) if use == "useful"]
        self.accounts.append(
            Account(
                layout=layout,
                key=key,
                uses=uses,
                qualities=qualities,
                nulls=nulls,
                partial=partial,
                shares=shares,
                totals=[0] * (len(all_uses) + 1 + len(partial)),
                has_unknown=bool(nulls or partial),
                is_measured=len(nulls) < len(uses),
                is_undoable=any(use in UNDOABLE for use in all_uses),
                useful=useful,
                is_all_useful=len(useful) == len(all_uses),
            )
        )
        return len(self.accounts) - 1


def unknown_us_of(row: EnergyRow, component: str, us: int) -> int:
    """How much of a component's time in a row is not in its joules."""
    seconds = row.unknown_s.get(component, 0.0)
    return min(round(seconds * 1e6), us) if 0.0 < seconds < 1e9 else 0


def _shared_key(row: EnergyRow) -> str:
    """What sets accounts of rows with parts given to other uses apart; no use has a line's end in it."""
    return "\n".join((row.use, *row.shared, "", *row.shared_cpu))


def _lost(use: str) -> str:
    return "lost" if use in UNDOABLE else use
