"""One node's energy: the accounts into which its intervals are summed.

Owns what a node is, its columns, and how a row becomes amounts of an account. An *account* is all intervals
of a node in which its components had the same uses and qualities; a row's amounts are added to it column by
column, so that a row costs the same whatever is done with it later.

The columns of an account, in whole numbers: each component's energy, then each part of it that a model gave
to another use, then the time, then for each component that is known in part the time in which it is not.
"""

from __future__ import annotations

from typing import Any

import msgspec

from eadt.record.books.amounts import MAX_MJ, share
from eadt.record.books.gaps import OpenGap
from eadt.record.books.undo import Undoable
from eadt.record.rows import UNDOABLE, EnergyRow, MeteredComponent

NOTHING_MEASURES_IT = "nothing can measure it"
NOT_READ = "it was not read"
_ON_THE_BOARD = ("cpu", "dram")


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
        """Where the time is."""
        return len(self.uses) + len(self.shares)


class Recent(msgspec.Struct, array_like=True, gc=False):
    """One of a node's last intervals, as far as its power goes."""

    us: int
    energy_mj: int
    expected_us: int
    unknown_us: int


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
        hole_us: Component-time without a row: in all, and by component, by use and by quality.
        recent: Its last intervals.
        num_intervals: How many it booked, and their length in all.
        bin_from_t: The stretch of node time, up to ``bin_to_t``, that ``bin_amounts`` are of.
        pace_setting: The setting that the next four are of: energy and time of a run that goes on as it is.
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
    end_t: float | None = None
    begins: dict[str, float] = {}
    accounts: list[Account] = []
    keys: dict[str, int] = {}
    uses: dict[str, str] = {}
    last_place: int = -1
    variance_j2: dict[str, float] = {}
    gaps: dict[str, OpenGap] = {}
    hole_us: int = 0
    hole_us_by_component: dict[str, int] = {}
    hole_us_by_use: dict[str, int] = {}
    hole_us_by_quality: dict[str, int] = {}
    undoable: Undoable = msgspec.field(default_factory=Undoable)
    bin_from_t: float = 0.0
    bin_to_t: float = -1.0
    bin_amounts: list[int] = []
    recent: list[Recent] = []
    num_intervals: int = 0
    interval_s: float = 0.0
    pace_setting: int = -1
    pace_mj: int = 0
    pace_us: int = 0
    pace_expected_us: int = 0
    pace_unknown_us: int = 0

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
        self.has_unmeasurable = not all(component.quality for component in components)
        self.keys = {
            account.key: place for place, account in enumerate(self.accounts) if account.layout == self.layout
        }
        self.last_place = -1

    def begin_time_anew(self) -> None:
        """What comes is of another session, or of another start of the machine."""
        self.end_t = None
        self.begins = {}
        self.uses = {}
        self.last_place = -1
        self.recent = []

    def plain_account(self, use: str) -> int:
        """The account of rows of which all is known and has one use."""
        return self._open_account(use, [use] * self.width, None, [], [], [])

    def sort_out(self, row: EnergyRow, read_mj: list[int], us: int) -> tuple[int, list[int], int]:
        """The account and the amounts of a row in which components differ, are shared out or are unknown.

        Args:
            row: The row.
            read_mj: Its energies; -1: unknown. Unknown ones are set to 0 in place.
            us: Its length, in millionths of a second.

        Returns:
            The account's place, the amounts and all the energy in them.
        """
        components = self.components
        row_uses, row_qualities = row.uses, row.qualities
        nulls: list[int] = []
        partial: list[int] = []
        partial_us: list[int] = []
        for place, component in enumerate(components):
            name = component.component
            quality = row_qualities.get(name, component.quality) if row_qualities else component.quality
            if not quality or not 0 <= read_mj[place] <= MAX_MJ:
                nulls.append(place)
                read_mj[place] = 0
            elif row.unknown_s and (unknown_us := unknown_us_of(row, name, us)):
                partial.append(place)
                partial_us.append(unknown_us)
        energy_mj = sum(read_mj)
        amounts = read_mj.copy()
        shared: list[int] = []
        shares: list[tuple[int, str]] = []
        for fractions, names in ((row.shared, None), (row.shared_cpu, _ON_THE_BOARD)):
            for use, fraction in fractions.items():
                if use == row.use:
                    continue
                for place, component in enumerate(components):
                    name = component.component
                    if place in nulls or (names is not None and name not in names):
                        continue
                    if row_uses and row_uses.get(name, row.use) != row.use:
                        continue
                    part = share(read_mj[place], fraction, amounts[place])
                    amounts[place] -= part
                    shared.append(part)
                    shares.append((place, use))
        amounts += shared
        amounts.append(us)
        amounts += partial_us
        if row_uses or row_qualities or nulls or partial:
            extra = f"{row_uses}{row_qualities}{nulls}{partial}"
        else:
            extra = ""
        key = f"{row.use!r}{extra}{list(row.shared)}{list(row.shared_cpu)}"
        account = self.keys.get(key)
        if account is None:
            uses = [row_uses.get(component.component, row.use) for component in components]
            account = self._open_account(key, uses, row_qualities, nulls, partial, shares)
        return account, amounts, energy_mj

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
        row_qualities: dict[str, str] | None,
        nulls: list[int],
        partial: list[int],
        shares: list[tuple[int, str]],
    ) -> int:
        qualities = [
            (row_qualities or {}).get(component.component, component.quality) or ""
            for component in self.components
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


def _lost(use: str) -> str:
    return "lost" if use in UNDOABLE else use
