"""What a run draws now, and what is left to do at this pace.

Owns how the newest intervals and the present setting's own steps are made into figures. It changes nothing.
"""

from __future__ import annotations

from eadt.record.books.energy import OPEN_GRACE_S, EnergyBook
from eadt.record.books.nodes import RECENT_US, Interval, NodeBook
from eadt.record.books.sessions import Session
from eadt.record.books.steps import MIN_STEPS, Pace, StepBook
from eadt.record.books.totals import is_at_least
from eadt.units import Quantity


def recent_power_w(book: EnergyBook, session: Session, relative: float | None) -> Quantity | None:
    """Power of all nodes that book now, each over its newest intervals.

    Args:
        book: The energy.
        session: The present session.
        relative: How uncertain the energy is, as a fraction.
    """
    if session.ended:
        return None
    power_w, expected_us, unknown_us = 0.0, 0, 0
    qualities: set[str] = set()
    is_known = False
    for node in _booking(book, session):
        newest = Interval(0, 0, 0, 0)
        for interval in node.last_intervals():
            newest.add(interval)
        is_late = node.end_t is None or session.seconds - (node.end_t + node.to_session_s) > OPEN_GRACE_S
        if is_late or newest.unknown_us >= newest.expected_us:
            expected_us += node.width * RECENT_US
            unknown_us += node.width * RECENT_US
            continue
        is_known = True
        power_w += newest.energy_mj * 1e3 / newest.us
        expected_us += newest.expected_us
        unknown_us += newest.unknown_us
        qualities |= {component.quality for component in node.components if component.quality}
    if not is_known:
        return None
    return _quantity(power_w, relative, is_at_least(unknown_us, expected_us), qualities)


def seconds_per_step(steps: StepBook, session: Session, setting: int | None) -> float | None:
    """Of the present setting; of all where it did too few steps to have a pace."""
    pace = _own_pace(steps, session, setting) or steps.pace_of_all
    return pace.seconds_per_step


def energy_of_steps(
    num_steps: int,
    book: EnergyBook,
    steps: StepBook,
    session: Session,
    setting: int | None,
    relative: float | None,
) -> Quantity | None:
    """All energy of so many steps of the present setting; of all where it did too few to have its own.

    What is paid once (startup, changes, pauses) is left out; validation and checkpoints are in it. A
    setting's own is its nodes' mean power for as long as its steps take, so that neither has to wait for the
    other.
    """
    qualities = {
        component.quality
        for node in book.nodes.values()
        for component in node.components
        if component.quality
    }
    pace = _own_pace(steps, session, setting)
    nodes = _booking(book, session)
    if pace is not None and nodes:
        has_pace = all(node.pace_setting == pace.setting and node.pace.us >= RECENT_US for node in nodes)
        expected_us = sum(node.pace.expected_us for node in nodes)
        unknown_us = sum(node.pace.unknown_us for node in nodes)
        if has_pace and unknown_us < expected_us:
            power_w = sum(node.pace.energy_mj * 1e3 / node.pace.us for node in nodes)
            joules = power_w * (pace.seconds_per_step or 0.0)
            return _quantity(joules * num_steps, relative, is_at_least(unknown_us, expected_us), qualities)
    num_done = steps.pace_of_all.num_steps
    if not num_done or book.going_on_unknown_us >= book.going_on_expected_us:
        return None
    lower = is_at_least(book.going_on_unknown_us, book.going_on_expected_us)
    return _quantity(book.going_on_mj / 1e3 / num_done * num_steps, relative, lower, qualities)


def _own_pace(steps: StepBook, session: Session, setting: int | None) -> Pace | None:
    pace = steps.pace
    is_present = pace.session == session.index and setting in (None, pace.setting)
    return pace if is_present and pace.num_steps >= MIN_STEPS else None


def _booking(book: EnergyBook, session: Session) -> list[NodeBook]:
    """Nodes that are expected to book now."""
    return [node for node in book.nodes.values() if node.session == session.index and node.width]


def _quantity(value: float, relative: float | None, at_least: bool, qualities: set[str]) -> Quantity:
    uncertainty = None if relative is None else value * relative
    return Quantity(value, uncertainty, at_least, tuple(sorted(qualities)))
