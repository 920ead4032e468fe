"""Energy: from rows to the accounts of their nodes.

Owns what happens with a node row and an energy row: dropping what was delivered twice, finding what is
missing, and booking the rest. Figures are made of it by :mod:`eadt.record.books.totals`.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import add, sub

import msgspec

from eadt.record.books.amounts import MAX_MJ, whole_mj
from eadt.record.books.curves import Curves
from eadt.record.books.gaps import NO_ROW, TOUCHING_S, ClosedGap, GapBook
from eadt.record.books.nodes import (
    NOT_READ,
    NOTHING_MEASURES_IT,
    Account,
    NodeBook,
    Recent,
    unknown_us_of,
)
from eadt.record.books.parts import Parts
from eadt.record.books.sessions import MAX_SESSION_S, Session
from eadt.record.books.undo import NO_SETTING, Stretch, Undone
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
_RECENT_US = 1_000_000
_MAX_RECENT = 64


class EnergyBook(msgspec.Struct):
    """All nodes' energy.

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

    def meet(self, row: NodeRow, session: Session, saved_steps: list[int], curves: Curves) -> bool:
        """A node began to book, or books other components from now on.

        Returns:
            Whether its node time began anew.

        Raises:
            Unusable: The row makes no sense.
        """
        names = [component.component for component in row.components]
        if len(set(names)) < len(names):
            raise Unusable("a component twice")
        if not abs(row.monotonic_s) < MAX_SESSION_S * 10:
            raise Unusable("no moment in it")
        session.see(row.at_s)
        curves.widen(session.at_s)
        node = self.nodes.get(row.node)
        if node is None:
            node = self._take_in(row.node, saved_steps)
        self._draw_bin(node, session, curves)
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
                    self._miss(node, component, covered_to, moment, uses, session, curves)
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

    def add(
        self, row: EnergyRow, session: Session, saved_steps: list[int], parts: Parts, curves: Curves
    ) -> bool:
        """Book an interval. Returns whether it had not been delivered before.

        Raises:
            Unusable: The row makes no sense.
        """
        node = self.nodes.get(row.node)
        if node is None or node.layout < 0:
            raise Unusable("no node row names its components")
        t0, t1, joules = row.t0, row.t1, row.joules
        generation, setting, step = row.generation, row.setting, row.step
        if len(joules) != node.width:
            raise Unusable(f"{len(joules)} values for {node.width} components")
        seconds = check_interval(t0, t1)
        if (generation | setting | step) >> 31:
            check_numbers(generation, setting, step)
        if node.session != session.index:
            self._meet_again(node, t0, session)
        end_t = node.end_t
        if end_t is not None and t0 < end_t - TOUCHING_S:
            return False
        at_s = t1 + node.to_session_s
        if at_s > session.seconds:
            session.see(at_s)
            curves.widen(session.at_s)
        if at_s > session.metered_s:
            session.metered_s = at_s

        us = round(seconds * 1e6)
        try:
            read_mj = [-1 if value is None else round(value * 1000) for value in joules]
        except (OverflowError, ValueError):  # not finite
            read_mj = [whole_mj(value) for value in joules]
        energy_mj = sum(read_mj)
        if (
            row.shared
            or row.shared_cpu
            or row.uses
            or row.unknown_s
            or row.qualities
            or energy_mj > MAX_MJ
            or not read_mj
            or min(read_mj) < 0
            or node.has_unmeasurable
        ):
            place, amounts, energy_mj = node.sort_out(row, read_mj, us)
            read_mj.append(us)
        else:
            found = node.keys.get(row.use)
            place = node.plain_account(row.use) if found is None else found
            read_mj.append(us)
            amounts = read_mj
        if node.begins or (end_t is not None and t0 - end_t > TOUCHING_S):
            self._find_missing(node, row, session, curves)
        if place != node.last_place:
            self._change_uses(node, row, place, read_mj, seconds)
        node.end_t = t1 if end_t is None or t1 > end_t else end_t

        limits = session.limits
        if generation <= limits.newest and limits.void(generation, step):
            place = node.as_lost(place)
        account = node.accounts[place]
        account.totals = list(map(add, account.totals, amounts))
        expected_us = us * node.width
        unknown_us = self._note_unknown(node, row, account, us, session) if account.has_unknown else 0

        part = parts.setting(session.index, setting)
        of_generation = parts.generation(session.index, generation)
        part.energy_mj += energy_mj
        of_generation.energy_mj += energy_mj
        if account.useful:
            useful_mj = energy_mj if account.is_all_useful else sum(amounts[c] for c in account.useful)
            part.useful_mj += useful_mj
            of_generation.useful_mj += useful_mj
        if account.is_measured:
            part.is_measured = of_generation.is_measured = True
        if account.is_undoable:
            stretches = node.undoable.stretches
            stretches.append(Stretch(session.index, generation, setting, step, step, place, amounts))
            if len(stretches) > self.room:
                node.undoable.compact(saved_steps, self.room // 2)

        if t1 <= node.bin_to_t and t0 >= node.bin_from_t and not unknown_us:
            node.bin_amounts = list(map(add, node.bin_amounts, read_mj))
        else:
            self._draw(node, row, account, read_mj, session, curves)
        node.num_intervals += 1
        node.interval_s += seconds
        recent = Recent(us, energy_mj, expected_us, unknown_us)
        if us >= _RECENT_US:
            node.recent = [recent]
        else:
            node.recent.append(recent)
            while sum(some.us for some in node.recent[1:]) >= _RECENT_US or len(node.recent) > _MAX_RECENT:
                del node.recent[0]
        if row.use in GOES_ON:
            self.going_on_mj += energy_mj
            self.going_on_expected_us += expected_us
            self.going_on_unknown_us += unknown_us
            if node.pace_setting != setting:
                node.pace_setting, node.pace_us, node.pace_mj = setting, 0, 0
                node.pace_expected_us = node.pace_unknown_us = 0
            node.pace_us += us
            node.pace_mj += energy_mj
            node.pace_expected_us += expected_us
            node.pace_unknown_us += unknown_us
        if row.own_fraction is not None:
            self.shared_machine_us += us
        if row.foreign:
            self._note_foreign(node, row, read_mj)
        return True

    def undo(self, session: int, generation: int, resumed_step: int, parts: Parts) -> None:
        """The run fell back; see :meth:`eadt.record.books.undo.Undoable.undo`."""
        for node in self.nodes.values():
            for undone in node.undoable.undo(session, generation, resumed_step):
                self._undo(node, undone, parts)

    def end_session(self, session: Session, curves: Curves) -> None:
        """Another session begins: what nodes did not book of this one is missing; their time begins anew."""
        for node in self.nodes.values():
            self._draw_bin(node, session, curves)
            for component, covered_to, end_t in list(self.tails(node, session, has_followed=True)):
                uses = {node.uses.get(component.component)}
                self._miss(node, component, covered_to, end_t, uses, session, curves)
            self.gaps.close(node.name, node.gaps)
            node.begin_time_anew()
            node.pace_setting = -1

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

    def _take_in(self, name: str, saved_steps: list[int]) -> NodeBook:
        """A new node; the more there are, the less of each is kept one by one."""
        node = self.nodes[name] = NodeBook(name)
        room = max(min(_MAX_STRETCHES // len(self.nodes), MAX_STRETCHES_EACH), _MIN_STRETCHES_EACH)
        if room < self.room:
            self.room = room
            for other in self.nodes.values():
                if len(other.undoable.stretches) > room:
                    other.undoable.compact(saved_steps, room // 2)
        return node

    def _meet_again(self, node: NodeBook, t: float, session: Session) -> None:
        """A node that this session did not introduce: what it books first is taken to begin now."""
        node.session = session.index
        node.to_session_s = session.seconds - t

    def _change_uses(
        self, node: NodeBook, row: EnergyRow, place: int, read_mj: list[int], seconds: float
    ) -> None:
        """Where a component's use changed, a reading may be late by the source's resolution."""
        nulls = node.accounts[place].nulls
        for number, component in enumerate(node.components):
            name = component.component
            use = row.uses.get(name, row.use)
            before = node.uses.get(name)
            if before is not None and before != use and seconds > 0 and number not in nulls:
                power_w = read_mj[number] / 1e3 / seconds
                variance_j2 = (power_w * component.resolution_s) ** 2
                for either in (before, use):
                    node.variance_j2[either] = node.variance_j2.get(either, 0.0) + variance_j2
            node.uses[name] = use
        node.last_place = place

    def _find_missing(self, node: NodeBook, row: EnergyRow, session: Session, curves: Curves) -> None:
        """What should have been booked before this interval."""
        for component in node.components:
            name = component.component
            covered_to = node.covered_to(name)
            if covered_to is not None:
                uses = {node.uses.get(name), row.uses.get(name, row.use)}
                self._miss(node, component, covered_to, row.t0, uses, session, curves)
        node.begins = {}

    def _miss(
        self,
        node: NodeBook,
        component: MeteredComponent,
        from_t: float,
        to_t: float,
        uses: set[str | None],
        session: Session,
        curves: Curves,
    ) -> None:
        """A stretch of node time of which no row tells; ``uses`` are those before and after it."""
        if to_t - from_t <= TOUCHING_S:
            return
        name = component.component
        us = round((to_t - from_t) * 1e6)
        node.hole_us += us
        _count(node.hole_us_by_component, name, us)
        if component.quality:
            _count(node.hole_us_by_quality, component.quality, us)
        for use in uses:
            if use is not None:
                _count(node.hole_us_by_use, use, us)
        from_s, to_s = (session.place_s(t + node.to_session_s) for t in (from_t, to_t))
        for place, fraction in curves.spread(from_s, to_s):
            curves.add_power(name, place, 0.0, us * fraction, us * fraction)
        self.gaps.note(node.name, node.gaps, name, from_s, from_t, to_t, us, NO_ROW)

    def _note_unknown(
        self, node: NodeBook, row: EnergyRow, account: Account, us: int, session: Session
    ) -> int:
        """Note what is not known of an interval. Returns the component-time, in millionths of a second."""
        total_us = 0
        at_s = session.place_s(row.t0 + node.to_session_s)
        components = node.components
        for place in (*account.nulls, *account.partial):
            component = components[place]
            name = component.component
            unknown_us = unknown_us_of(row, name, us) if place in account.partial else us
            if unknown_us:
                otherwise = NOT_READ if account.qualities[place] else component.detail or NOTHING_MEASURES_IT
                reason = row.why_unknown.get(name) or otherwise
                self.gaps.note(node.name, node.gaps, name, at_s, row.t0, row.t1, unknown_us, reason)
                total_us += unknown_us
        return total_us

    def _note_foreign(self, node: NodeBook, row: EnergyRow, read_mj: list[int]) -> None:
        for component, energy_mj in zip(node.components, read_mj, strict=False):
            if component.component in row.foreign:
                _count(self.foreign_mj, component.component, energy_mj)

    def _draw(
        self,
        node: NodeBook,
        row: EnergyRow,
        account: Account,
        amounts: list[int],
        session: Session,
        curves: Curves,
    ) -> None:
        """Put an interval into the curves; ``amounts`` are each component's energy, and the time."""
        to_axis_s = node.to_session_s + session.offset_s
        pieces = curves.spread(max(row.t0 + to_axis_s, 0.0), max(row.t1 + to_axis_s, 0.0))
        if len(pieces) == 1 and not account.has_unknown:
            # What follows in the same bin is only added up: most rows, once the bins are wide.
            self._draw_bin(node, session, curves)
            place = pieces[0][0]
            node.bin_from_t = place * curves.bin_s - to_axis_s
            node.bin_to_t = (place + 1) * curves.bin_s - to_axis_s
            node.bin_amounts = amounts
            return
        us = amounts[-1]
        for number, component in enumerate(node.components):
            unknown_us = 0
            if number in account.nulls:
                unknown_us = us
            elif number in account.partial:
                unknown_us = unknown_us_of(row, component.component, us)
            for place, fraction in pieces:
                curves.add_power(
                    component.component,
                    place,
                    amounts[number] * fraction,
                    us * fraction,
                    unknown_us * fraction,
                )

    def _draw_bin(self, node: NodeBook, session: Session, curves: Curves) -> None:
        """Put what was added up for one bin into the curves."""
        draw_open_bin(node, session, curves)
        node.bin_from_t, node.bin_to_t, node.bin_amounts = 0.0, -1.0, []

    def _undo(self, node: NodeBook, undone: Undone, parts: Parts) -> None:
        """Move what is void to the accounts of lost work."""
        stretch, amounts = undone.stretch, undone.amounts
        account = node.accounts[stretch.account]
        account.totals = list(map(sub, account.totals, amounts))
        lost = node.accounts[node.as_lost(stretch.account)]
        lost.totals = list(map(add, lost.totals, amounts))
        if stretch.setting != NO_SETTING:
            useful_mj = sum(amounts[column] for column in account.useful)
            parts.setting(stretch.session, stretch.setting).useful_mj -= useful_mj
            parts.generation(stretch.session, stretch.generation).useful_mj -= useful_mj
        if not undone.exact:
            uses = [*account.uses, *(use for _, use in account.shares)]
            for use, energy_mj in zip(uses, amounts, strict=False):
                if use in UNDOABLE:
                    _count(self.split_mj, use, energy_mj)
                    _count(self.split_mj, "lost", energy_mj)


def draw_open_bin(node: NodeBook, session: Session, curves: Curves) -> None:
    """Add to the curves what the node has added up for one bin and not yet put there."""
    if node.bin_amounts:
        middle_t = (node.bin_from_t + node.bin_to_t) / 2
        place = curves.place(session.place_s(middle_t + node.to_session_s))
        us = float(node.bin_amounts[-1])
        for component, energy_mj in zip(node.components, node.bin_amounts, strict=False):
            curves.add_power(component.component, place, float(energy_mj), us, 0.0)


def _count(counts: dict[str, int], name: str, amount: int) -> None:
    counts[name] = counts.get(name, 0) + amount
