"""Energy: from rows to the accounts of their nodes.

Owns what happens with a node row and an energy row: dropping what was delivered twice, finding what is
missing, and booking the rest. Figures are made of it by :mod:`eadt.record.books.totals`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import add, sub

import msgspec

from eadt.record.books.amounts import MAX_MJ, whole_mj
from eadt.record.books.common import Common
from eadt.record.books.curves import Curves
from eadt.record.books.gaps import NO_ROW, TOUCHING_S, ClosedGap, GapBook
from eadt.record.books.nodes import (
    NOT_READ,
    NOTHING_MEASURES_IT,
    Account,
    Interval,
    NodeBook,
    OpenPage,
    unknown_us_of,
)
from eadt.record.books.sessions import MAX_SESSION_S, Session
from eadt.record.books.undo import NO_SETTING, Page, Undone, added_up
from eadt.record.books.unusable import Unusable, check_interval, check_numbers
from eadt.record.rows import UNDOABLE, EnergyRow, MeteredComponent, NodeRow

GOES_ON = frozenset({"useful", "validation", "input", "checkpoint"})
"""Uses of rows of a run that goes on as it is; the others are paid once."""

END_GRACE_S = 5.0
"""A session that ended in order may have ended so long after its last readings."""

OPEN_GRACE_S = 60.0
"""What a node booked in a session that has not ended may be so late."""

NEW_ORIGIN_S = 60.0
"""Without a boot id: by so much a machine's clock disagrees with before when it began anew."""

MAX_STRETCHES_EACH = 2048
_MAX_STRETCHES = 32768
_MIN_STRETCHES_EACH = 16
_MAX_PAGE = 64


class EnergyBook(msgspec.Struct):
    """All nodes' energy.

    A node's rows that are alike are written on one page, and added up when another page begins or somebody
    asks (:meth:`sum_up`).

    Attributes:
        nodes: By Ray's id.
        gaps: What is not measured, in stretches.
        foreign_mj: Energy of cards while others ran on them too, by component.
        shared_machine_us: Node-time in which a share of the machine was booked.
        split_mj: By use, what a rollback into the middle of something added up moved from or to it.
        room: How many stretches that can still be undone a node may hold.
        going_on_mj: Energy of rows of a run that goes on as it is; see :data:`GOES_ON`.
        going_on_unknown_us: Component-time of these rows that is not known,
        going_on_expected_us: and all of it.
    """

    nodes: dict[str, NodeBook] = {}
    gaps: GapBook = msgspec.field(default_factory=GapBook)
    foreign_mj: dict[str, int] = {}
    shared_machine_us: int = 0
    split_mj: dict[str, int] = {}
    room: int = MAX_STRETCHES_EACH
    going_on_mj: int = 0
    going_on_unknown_us: int = 0
    going_on_expected_us: int = 0

    # -- rows -------------------------------------------------------------------------------------------

    def meet(self, row: NodeRow, common: Common) -> bool:
        """A node began to book, or books other components from now on.

        Returns:
            Whether its node time began anew.

        Raises:
            Unusable: The row makes no sense.
        """
        names = [component.component for component in row.components]
        if len(set(names)) < len(names):
            raise Unusable("a component twice")
        if not abs(row.monotonic_s) < MAX_SESSION_S:
            raise Unusable("no moment in it")
        common.see(row.at_s)
        session = common.session
        node = self.nodes.get(row.node)
        if node is None:
            node = self._take_in(row.node, common)
        self._close_page(node, common)
        was_here = node.session == session.index
        to_session_s = row.at_s - row.monotonic_s
        is_same_time = was_here and node.boot_id == row.boot_id
        if row.boot_id is None and abs(to_session_s - node.to_session_s) > NEW_ORIGIN_S:
            is_same_time = False
        begins = dict.fromkeys(names, row.monotonic_s)
        if was_here:
            # Where node time began anew, the new moment is put into the old time by way of session time.
            moment = row.monotonic_s if is_same_time else row.at_s - node.to_session_s
            for component in node.components:
                covered_to = node.covered_to(component.component)
                if covered_to is None:
                    continue
                if is_same_time and component.component in begins:
                    begins[component.component] = covered_to
                else:
                    uses = {node.uses.get(component.component)}
                    self._miss(node, component, covered_to, moment, uses, common)
        if not is_same_time:
            self.gaps.close(node.name, node.gaps)
            node.begin_time_anew()
        node.begins = begins
        node.session, node.to_session_s, node.boot_id = session.index, to_session_s, row.boot_id
        node.hostname = row.hostname or node.hostname
        node.num_gpus = row.num_gpus if row.num_gpus is not None else node.num_gpus
        node.num_cores = row.num_cores if row.num_cores is not None else node.num_cores
        node.not_metered = row.not_metered
        node.lay_out(row.components)
        return not is_same_time

    def add(self, row: EnergyRow, common: Common) -> bool:
        """Book an interval. Returns whether it had not been delivered before.

        Raises:
            Unusable: The row makes no sense.
        """
        session = common.sessions.present
        node = self.nodes.get(row.node)
        if node is None or node.layout < 0:
            raise Unusable("no node row names its components")
        t0, t1, joules = row.t0, row.t1, row.joules
        generation, setting, step = row.generation, row.setting, row.step
        seconds = t1 - t0
        if len(joules) != node.width:
            raise Unusable(f"{len(joules)} values for {node.width} components")
        if not 0.0 <= seconds < MAX_SESSION_S:
            check_interval(t0, t1)
        if (generation | setting | step) >> 31:
            check_numbers(generation, setting, step)
        if node.session != session.index:
            self._meet_again(node, t0, session)
        end_t = node.end_t
        if end_t is not None and t0 < end_t - TOUCHING_S:
            return False
        at_s = t1 + node.to_session_s
        if at_s > session.seconds:
            common.see(at_s)
        if at_s > session.metered_s:
            session.metered_s = at_s

        us = round(seconds * 1e6)
        try:
            amounts = [-1 if value is None else round(value * 1000) for value in joules]
        except (OverflowError, ValueError):  # not finite
            amounts = [whole_mj(value) for value in joules]
        if (
            row.uses
            or row.unknown_s
            or row.recovered_s
            or row.qualities
            or not amounts
            or min(amounts) < 0
            or sum(amounts) > MAX_MJ
            or node.has_unmeasurable
        ):
            key, amounts = node.sort_out(row, amounts, us)
        elif row.shared or row.shared_cpu:
            key, amounts = node.share_out(row, amounts, us)
        else:
            key = row.use
            amounts.append(us)

        if node.begins or (end_t is not None and t0 - end_t > TOUCHING_S):
            self._find_missing(node, row, common)
        written = node.open
        if (
            written is None
            or key != written.key
            or t1 > written.to_t
            or t0 < written.from_t
            or generation != written.page.generation
            or setting != written.page.setting
            or generation <= session.limits.newest
            or len(written.page.rows) >= _MAX_PAGE
            or row.recovered_s
        ):
            self._close_page(node, common)
            written = self._open_page(node, row, key, amounts, common)
        written.page.steps.append(step)
        written.page.rows.append(amounts)
        if end_t is None or t1 > end_t:
            node.end_t = t1
        if row.recovered_s:
            self._recover(node, row, written)
        if written.has_unknown:
            self._note_unknown(node, row, written, us, session)
        if row.own_fraction is not None:
            self.shared_machine_us += us
        if row.foreign:
            energies_mj = node.accounts[written.page.account].energies_mj(amounts)
            for component, energy_mj in zip(node.components, energies_mj, strict=True):
                if component.component in row.foreign and energy_mj:
                    _count(self.foreign_mj, component.component, energy_mj)
        return True

    def undo(self, session: int, generation: int, resumed_step: int, common: Common) -> None:
        """The run fell back; see :meth:`eadt.record.books.undo.Undoable.undo`."""
        for node in self.nodes.values():
            self._close_page(node, common)
            for undone in node.undoable.undo(session, generation, resumed_step):
                self._undo(node, undone, common)

    def end_session(self, common: Common) -> None:
        """Another session begins: what nodes did not book of this one is missing; their time begins anew."""
        for node in self.nodes.values():
            self._close_page(node, common)
            for component, covered_to, end_t in list(self.tails(node, common.session, has_followed=True)):
                uses = {node.uses.get(component.component)}
                self._miss(node, component, covered_to, end_t, uses, common)
            self.gaps.close(node.name, node.gaps)
            node.begin_time_anew()
            node.pace_setting = -1

    def sum_up(self, common: Common) -> None:
        """Add up what is on open pages, so that the sums hold every row. It changes no figure."""
        for node in self.nodes.values():
            if node.open is not None:
                self._sum_up(node, node.open, common)

    # -- figures ----------------------------------------------------------------------------------------

    def tails(
        self, node: NodeBook, session: Session, *, has_followed: bool = False
    ) -> Iterable[tuple[MeteredComponent, float, float]]:
        """What a node has not booked of the present session: (component, from, to) in node time.

        Args:
            node: The node.
            session: The present session.
            has_followed: Whether another one begins, so that nothing more of this one can come.
        """
        if node.session != session.index:
            return
        if session.ended:
            grace_s = END_GRACE_S
        else:
            grace_s = TOUCHING_S if has_followed else OPEN_GRACE_S
        end_t = session.seconds - node.to_session_s
        for component in node.components:
            covered_to = node.covered_to(component.component)
            if covered_to is not None and end_t - covered_to > grace_s:
                yield component, covered_to, end_t

    def all_gaps(self, session: Session) -> tuple[list[ClosedGap], int]:
        """All gaps of which the longest are kept, and how many there were; with what is missing until now."""
        gaps = list(self.gaps.closed)
        num_gaps = self.gaps.num_gaps
        for node in self.nodes.values():
            still = {component: msgspec.structs.replace(gap) for component, gap in node.gaps.items()}
            late = GapBook()
            for component, covered_to, end_t in self.tails(node, session):
                at_s = session.place_s(covered_to + node.to_session_s)
                us = round((end_t - covered_to) * 1e6)
                late.note(node.name, still, component.component, at_s, covered_to, end_t, us, NO_ROW)
            late.close(node.name, still)
            gaps += late.closed
            num_gaps += late.num_gaps
        return gaps, num_gaps

    # -- how --------------------------------------------------------------------------------------------

    def _take_in(self, name: str, common: Common) -> NodeBook:
        """A new node; the more there are, the less of each is kept one by one."""
        node = self.nodes[name] = NodeBook(name)
        room = max(min(_MAX_STRETCHES // len(self.nodes), MAX_STRETCHES_EACH), _MIN_STRETCHES_EACH)
        if room < self.room:
            self.room = room
            for other in self.nodes.values():
                if len(other.undoable.old) + other.undoable.num_rows > room:
                    other.undoable.compact(room, common.saved_steps)
        return node

    def _meet_again(self, node: NodeBook, t: float, session: Session) -> None:
        """A node that this session did not introduce: what it books first is taken to begin now."""
        node.session = session.index
        node.to_session_s = session.seconds - t

    def _open_page(
        self, node: NodeBook, row: EnergyRow, key: str, amounts: list[int], common: Common
    ) -> OpenPage:
        """A page that begins with this row."""
        session, curves = common.session, common.curves
        place = node.account_of(row, key)
        account = node.accounts[place]
        if len(amounts) != len(account.totals):
            raise Unusable(f"{row.use!r} is no use")
        if key != node.last_key:
            self._change_uses(node, row, account, amounts)
            node.last_key = key
        if session.limits.void(row.generation, row.step):
            place = node.as_lost(place)
        to_axis_s = node.to_session_s + session.offset_s
        from_s, to_s = (max(t + to_axis_s, 0.0) for t in (row.t0, row.t1))
        number = curves.place(from_s)
        recovered_us = node.recovered_by(row, account.nulls) if row.recovered_s else {}
        if number == curves.place(to_s) and not recovered_us:
            from_t, to_t = (edge * curves.bin_s - to_axis_s for edge in (number, number + 1))
        else:
            # In several bins, which no other row will be: it is drawn at once.
            from_t, to_t = math.inf, -math.inf
            self._draw(node, account, amounts, curves.spread(from_s, to_s), curves)
            self._draw_recovered(node, account, amounts, recovered_us, from_s, to_s, curves)
        page = Page(session.index, row.generation, row.setting, place, [], [])
        node.open = OpenPage(page, key, row.use in GOES_ON, account.has_unknown, recovered_us, from_t, to_t)
        return node.open

    def _close_page(self, node: NodeBook, common: Common) -> None:
        """Add up what is on a node's page, and keep it where it can be undone."""
        written = node.open
        if written is None:
            return
        self._sum_up(node, written, common)
        node.recent = node.last_intervals()
        node.open = None
        if node.accounts[written.page.account].is_undoable:
            node.undoable.add(written.page, self.room, common.saved_steps)

    def _sum_up(self, node: NodeBook, written: OpenPage, common: Common) -> None:
        """Add up what is on a page and has not been added up yet."""
        page = written.page
        rows = page.rows[written.num_summed :]
        if not rows:
            return
        written.num_summed = len(page.rows)
        amounts = added_up(rows)
        account = node.accounts[page.account]
        account.totals = list(map(add, account.totals, amounts))
        interval = account.interval(amounts, written.recovered_us)
        energy_mj = sum(amounts[: account.time_column])
        useful_mj = sum(amounts[column] for column in account.useful)
        for part in (
            common.parts.setting(page.session, page.setting),
            common.parts.generation(page.session, page.generation),
        ):
            part.energy_mj += energy_mj
            part.useful_mj += useful_mj
            part.is_measured = part.is_measured or account.is_measured
        node.num_intervals += len(rows)
        node.interval_us += interval.us
        if written.goes_on:
            self.going_on_mj += interval.energy_mj
            self.going_on_expected_us += interval.expected_us
            self.going_on_unknown_us += interval.unknown_us
            if node.pace_setting != page.setting:
                node.pace_setting, node.pace = page.setting, Interval(0, 0, 0, 0)
            node.pace.add(interval)
        if written.from_t < written.to_t:
            middle_s = (written.from_t + written.to_t) / 2 + node.to_session_s
            number = common.curves.place(common.session.place_s(middle_s))
            self._draw(node, account, amounts, [(number, 1.0)], common.curves)

    def _draw(
        self,
        node: NodeBook,
        account: Account,
        amounts: list[int],
        pieces: list[tuple[int, float]],
        curves: Curves,
    ) -> None:
        """Put an interval's amounts into the curves, in fractions by bin."""
        us = amounts[account.time_column]
        unknown_us = account.unknown_us(amounts)
        energies_mj = account.energies_mj(amounts)
        for number, component in enumerate(node.components):
            column = curves.column(component.component)
            for place, fraction in pieces:
                column.energy_mj[place] += energies_mj[number] * fraction
                column.expected_us[place] += us * fraction
                column.unknown_us[place] += unknown_us.get(number, 0) * fraction

    def _draw_recovered(
        self,
        node: NodeBook,
        account: Account,
        amounts: list[int],
        recovered_us: dict[int, int],
        from_s: float,
        to_s: float,
        curves: Curves,
    ) -> None:
        """Spread what a row tells of time before it over that time too."""
        for number, before_us in recovered_us.items():
            column = curves.column(node.components[number].component)
            energy_mj = account.energies_mj(amounts)[number]
            for place, fraction in curves.spread(from_s, to_s):
                column.energy_mj[place] -= energy_mj * fraction
            begin_s = max(from_s - before_us / 1e6, 0.0)
            for place, fraction in curves.spread(begin_s, to_s):
                column.energy_mj[place] += energy_mj * fraction
            for place, fraction in curves.spread(begin_s, from_s):
                column.unknown_us[place] = max(column.unknown_us[place] - before_us * fraction, 0.0)

    def _recover(self, node: NodeBook, row: EnergyRow, written: OpenPage) -> None:
        """What was unknown before a row is known now."""
        for number, before_us in written.recovered_us.items():
            name = node.components[number].component
            node.unknown_us[name] -= before_us
            _count(node.recovered_us, name, before_us)
            quality = node.accounts[written.page.account].qualities[number]
            _count(node.recovered_us_by_quality, quality, before_us)
            self.gaps.shorten(node.gaps, name, row.t0, before_us)

    def _change_uses(self, node: NodeBook, row: EnergyRow, account: Account, amounts: list[int]) -> None:
        """Where a component's use changed, a reading may be late by the source's resolution."""
        us = amounts[account.time_column]
        energies_mj = account.energies_mj(amounts)
        for number, component in enumerate(node.components):
            name = component.component
            use = row.uses.get(name, row.use)
            before = node.uses.get(name)
            if before is not None and before != use and us > 0:
                power_w = energies_mj[number] * 1e3 / us
                variance_j2 = (power_w * component.resolution_s) ** 2
                for either in (before, use):
                    node.variance_j2[either] = node.variance_j2.get(either, 0.0) + variance_j2
            node.uses[name] = use

    def _find_missing(self, node: NodeBook, row: EnergyRow, common: Common) -> None:
        """What should have been booked before this interval."""
        for component in node.components:
            name = component.component
            covered_to = node.covered_to(name)
            if covered_to is not None:
                uses = {node.uses.get(name), row.uses.get(name, row.use)}
                self._miss(node, component, covered_to, row.t0, uses, common)
        node.begins = {}

    def _miss(
        self,
        node: NodeBook,
        component: MeteredComponent,
        from_t: float,
        to_t: float,
        uses: set[str | None],
        common: Common,
    ) -> None:
        """A stretch of node time of which no row tells; ``uses`` are those before and after it."""
        if to_t - from_t <= TOUCHING_S:
            return
        session, curves = common.session, common.curves
        name = component.component
        us = round((to_t - from_t) * 1e6)
        node.hole_us += us
        _count(node.unknown_us, name, us)
        _count(node.hole_us_by_component, name, us)
        if component.quality:
            _count(node.hole_us_by_quality, component.quality, us)
        for use in uses:
            if use is not None:
                _count(node.hole_us_by_use, use, us)
        from_s, to_s = (session.place_s(t + node.to_session_s) for t in (from_t, to_t))
        column = curves.column(name)
        for place, fraction in curves.spread(from_s, to_s):
            column.expected_us[place] += us * fraction
            column.unknown_us[place] += us * fraction
        self.gaps.note(node.name, node.gaps, name, from_s, from_t, to_t, us, NO_ROW)

    def _note_unknown(
        self, node: NodeBook, row: EnergyRow, written: OpenPage, us: int, session: Session
    ) -> None:
        """Note what is not known of an interval."""
        account = node.accounts[written.page.account]
        at_s = session.place_s(row.t0 + node.to_session_s)
        components = node.components
        for number in (*account.nulls, *account.partial):
            component = components[number]
            name = component.component
            unknown_us = us if number in account.nulls else unknown_us_of(row, name, us)
            if unknown_us:
                is_measurable = account.qualities[number]
                otherwise = NOT_READ if is_measurable else component.detail or NOTHING_MEASURES_IT
                reason = row.why_unknown.get(name) or otherwise
                self.gaps.note(node.name, node.gaps, name, at_s, row.t0, row.t1, unknown_us, reason)
                _count(node.unknown_us, name, unknown_us)

    def _undo(self, node: NodeBook, undone: Undone, common: Common) -> None:
        """Move what is void to the accounts of lost work."""
        amounts = undone.amounts
        account = node.accounts[undone.account]
        account.totals = list(map(sub, account.totals, amounts))
        lost = node.accounts[node.as_lost(undone.account)]
        lost.totals = list(map(add, lost.totals, amounts))
        if undone.setting != NO_SETTING:
            useful_mj = sum(amounts[column] for column in account.useful)
            common.parts.setting(undone.session, undone.setting).useful_mj -= useful_mj
            common.parts.generation(undone.session, undone.generation).useful_mj -= useful_mj
        if not undone.is_exact:
            uses = [*account.uses, *(use for _, use in account.shares)]
            for use, energy_mj in zip(uses, amounts, strict=False):
                if use in UNDOABLE:
                    _count(self.split_mj, use, energy_mj)
                    _count(self.split_mj, "lost", energy_mj)


def _count(counts: dict[str, int], name: str, amount: int) -> None:
    counts[name] = counts.get(name, 0) + amount
