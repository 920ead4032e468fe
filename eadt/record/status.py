"""What a run says of itself now, as one typed value; every door shows this and computes nothing.

Owns :class:`RunStatus` and how it is made of the books and of what only the live run knows. It must not
measure, read files or ask a clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from eadt.record.books import Books
from eadt.record.figures import SessionTally
from eadt.record.rows import Row
from eadt.units import Quantity

HEARD_WITHIN_S = 120.0
"""A run without an end row that was heard of so recently (s) is taken to go on."""

OVER = frozenset({"completed", "interrupted", "failed", "crashed"})
"""Statuses of a run that does not go on."""

NUM_ROWS, NUM_NOTES = 20, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveFacts:
    """What the coordinator knows and the ledger does not.

    Attributes:
        status: What the run is about: ``starting``, ``running``, ``paused``, ...
        at_s: Now, in session time, s; ``None``: as the books have it.
        desired: The setpoint that is wanted; ``None``: not known.
        waiting_for: What it waits for, in words; empty: nothing.
        is_training: Whether steps are being done.
        generation: Number of the generation in force; 0: none.
        num_devices: GPUs (CPU nodes) with ranks.
        policy: Name of the energy policy.
        supervisor_phase: What the supervisor is about.
        supervisor_answers: Whether it answers; ``None``: not known.
        best_efficiency: Most samples per joule that it has seen.
    """

    status: str = "running"
    at_s: float | None = None
    desired: dict[str, Any] | None = None
    waiting_for: str = ""
    is_training: bool = False
    generation: int = 0
    num_devices: int | None = None
    policy: str | None = None
    supervisor_phase: str | None = None
    supervisor_answers: bool | None = None
    best_efficiency: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run now. ``None`` is unknown.

    Attributes:
        source: ``supervisor`` (it was asked) or ``ledger`` (its files were read).
        run: Name.
        run_id: Id.
        status: ``running``, ``completed``, ``interrupted``, ``failed``, ``crashed``, ``unknown`` (nothing was
            booked yet), or what the live run says.
        heard_unix_s: Wall time of the newest row.
        age_s: How long ago that is, in s.
        session: Number of the session, from 1; 0: none yet.
        num_sessions: Sessions so far.
        setpoint: In force.
        desired: Wanted.
        waiting_for: What the run waits for; empty: nothing.
        policy: Name of the energy policy.
        phase: What the supervisor is about.
        step: Newest step that counts.
        max_steps: Steps at which it is complete.
        loss: Of that step.
        learning_rate: Of that step.
        world_size: Ranks.
        generation: Number of the generation in force; 0: none.
        at_s: Now, on the run's axis, in s.
        samples_per_second: Over the last steps; ``None`` while it does not train.
        power_w: Of the newest intervals, in W.
        energy_j: So far, in J.
        joules_per_sample: So far, in J.
        seconds_to_go: In s, at the present setting.
        energy_to_go_j: In J, at the present setting.
        energy_by_use: So far, in J.
        observations: Newest 20, as plain values.
        decisions: Newest 20, as plain values.
        notes: Last 5, as plain values.
        is_training: Whether steps are being done.
        num_devices: GPUs (CPU nodes) with ranks.
        supervisor_answers: Whether the supervisor answers.
        best_efficiency: Most samples per joule that the supervisor has seen.
    """

    source: str
    run: str | None
    run_id: str | None
    status: str
    heard_unix_s: float | None
    age_s: float | None
    session: int
    num_sessions: int
    setpoint: dict[str, Any] | None
    desired: dict[str, Any] | None
    waiting_for: str
    policy: str | None
    phase: str | None
    step: int
    max_steps: int | None
    loss: float | None
    learning_rate: float | None
    world_size: int | None
    generation: int
    at_s: float
    samples_per_second: float | None
    power_w: Quantity | None
    energy_j: Quantity | None
    joules_per_sample: Quantity | None
    seconds_to_go: float | None
    energy_to_go_j: Quantity | None
    energy_by_use: dict[str, Quantity] = field(default_factory=dict)
    observations: tuple[dict[str, Any], ...] = ()
    decisions: tuple[dict[str, Any], ...] = ()
    notes: tuple[dict[str, Any], ...] = ()
    is_training: bool | None = None
    num_devices: int | None = None
    supervisor_answers: bool | None = None
    best_efficiency: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As plain values that JSON can hold; what is not finite is ``None``."""
        values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return values


def run_status(books: Books, live: LiveFacts | None, *, now_unix_s: float) -> RunStatus:
    """The run's status, from its books and, where the run itself is asked, from what it knows now.

    Args:
        books: The run's books.
        live: What the coordinator knows; ``None``: only the ledger was read.
        now_unix_s: Wall time.
    """
    run, sessions = books.run, books.sessions
    session = sessions[-1] if sessions else None
    heard_unix_s = session.heard_unix_s if session is not None and session.heard_unix_s > 0 else None
    age_s = None if heard_unix_s is None else max(now_unix_s - heard_unix_s, 0.0)
    status = live.status if live is not None else _status_of(session, age_s)
    is_over = status in OVER
    is_training = live.is_training if live is not None else None
    at_s = books.at_s
    if live is not None and live.at_s is not None and session is not None:
        at_s = max(at_s, session.offset_s + live.at_s)
    return RunStatus(
        source="ledger" if live is None else "supervisor",
        run=run.name,
        run_id=run.run_id,
        status=status,
        heard_unix_s=heard_unix_s,
        age_s=age_s,
        session=len(sessions),
        num_sessions=len(sessions),
        setpoint=books.setpoint,
        desired=None if live is None else live.desired,
        waiting_for="" if live is None else live.waiting_for,
        policy=None if live is None else live.policy,
        phase=None if live is None else live.supervisor_phase,
        step=books.step,
        max_steps=run.max_steps,
        loss=books.loss,
        learning_rate=books.learning_rate,
        world_size=books.world_size,
        generation=_generation(books) if live is None else live.generation,
        at_s=at_s,
        samples_per_second=None if is_over or is_training is False else books.recent_samples_per_second(),
        power_w=None if is_over else books.recent_power_w(),
        energy_j=books.energy(),
        joules_per_sample=books.joules_per_sample(),
        seconds_to_go=None if is_over else books.seconds_to_go(),
        energy_to_go_j=None if is_over else books.energy_to_go_j(),
        energy_by_use=books.energy_by("use"),
        observations=tuple(_plain(row) for row in books.observations[-NUM_ROWS:]),
        decisions=tuple(_plain(row) for row in books.decisions[-NUM_ROWS:]),
        notes=tuple(_plain(row) | {"at_s": at_s} for at_s, row in books.notes[-NUM_NOTES:]),
        is_training=is_training,
        num_devices=None if live is None else live.num_devices,
        supervisor_answers=None if live is None else live.supervisor_answers,
        best_efficiency=None if live is None else live.best_efficiency,
    )


def _status_of(session: SessionTally | None, age_s: float | None) -> str:
    """What the ledger alone says."""
    if session is None:
        return "unknown"
    if session.status != "running":
        return session.status
    return "running" if age_s is not None and age_s <= HEARD_WITHIN_S else "crashed"


def _generation(books: Books) -> int:
    """The newest generation of the present session that began to train; 0 where it has ended, or none did."""
    rows = books.generation_rows
    if not rows or not books.sessions or rows[-1][0] < books.sessions[-1].offset_s:
        return 0
    newest = rows[-1][1]
    return newest.generation if newest.event == "started" else 0


def _plain(row: Row) -> dict[str, Any]:
    """A row's own fields as plain values."""
    return {
        name: msgspec.to_builtins(getattr(row, name))
        for name in row.__struct_fields__
        if name not in ("seq", "unix_s")
    }
