"""What a run says of itself now, as one typed value; every door shows this and computes nothing.

Owns :class:`RunStatus` and how it is made of the books and of what only the live run knows. It must not
measure, read files or ask a clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from eadt.record.books import Books
from eadt.units import Quantity

HEARD_WITHIN_S = 120.0
"""A run without an end row that was heard of so recently (s) is taken to go on."""


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
        """As plain values that JSON can hold."""
        raise NotImplementedError


def run_status(books: Books, live: LiveFacts | None, *, now_unix_s: float) -> RunStatus:
    """The run's status, from its books and, where the run itself is asked, from what it knows now.

    Args:
        books: The run's books.
        live: What the coordinator knows; ``None``: only the ledger was read.
        now_unix_s: Wall time.
    """
    raise NotImplementedError
