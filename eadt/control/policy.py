"""The one interface behind which policies decide, and the two simplest policies.

A policy is one small class with ``decide(observation, context)``. It returns :class:`Hold` or
:class:`Change`, each with its reason, and does nothing else: who applies a change, checks its outcome
and remembers it is :class:`eadt.control.loop.ControlLoop`; what keeps a policy within bounds is
:class:`eadt.control.guard.Guard`, which is itself a policy that wraps one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from eadt.control.observation import Observation
from eadt.control.setpoint import Setpoint


class Action(StrEnum):
    """What a decision does, as it is named in the ledger and the report."""

    DECREASE = "decrease"
    SCALE_REPLICAS = "scale_replicas"
    INCREASE = "increase"
    MAINTAIN = "maintain"
    SCHEDULED = "scheduled"
    """Asked for by a schedule in the configuration, not decided from measurements."""
    REVERT = "revert"
    """Back to the setpoint before, because verification failed."""


@dataclass(frozen=True)
class RatioRange:
    """Where the ratio of a quantity after a change to the same before it is expected, both included.

    Attributes:
        low: Least ratio; ``None`` for no lower bound.
        high: Greatest ratio; ``None`` for no upper bound.
    """

    low: float | None = None
    high: float | None = None

    def contains(self, ratio: float) -> bool:
        """Whether ``ratio`` is within the range."""
        return (self.low is None or ratio >= self.low) and (self.high is None or ratio <= self.high)

    def describe(self) -> str:
        """Such as ``between 80 % and 99 %`` (of the value before)."""
        if self.low is not None and self.high is not None:
            return f"between {self.low:.0%} and {self.high:.0%}"
        if self.low is not None:
            return f"at least {self.low:.0%}"
        if self.high is not None:
            return f"at most {self.high:.0%}"
        return "anything"


@dataclass(frozen=True)
class Expectation:
    """What a change is expected to do, as ratios after/before. Outcome verification tests just this.

    Attributes:
        power: Whole-job power.
        throughput: Whole-job samples/s.
        efficiency: Samples per joule.
        summary: The same as one sentence.
        efficiency_gain_fraction: Assumed relative gain in efficiency, used only to judge whether
            the change pays back its pause; a policy that knows better says so.
    """

    power: RatioRange = field(default_factory=RatioRange)
    throughput: RatioRange = field(default_factory=RatioRange)
    efficiency: RatioRange = field(default_factory=RatioRange)
    summary: str = ""
    efficiency_gain_fraction: float = 0.05

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the ledger and for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Expectation:
        """The inverse of :meth:`as_dict`."""
        ranges = {name: RatioRange(**values[name]) for name in ("power", "throughput", "efficiency")}
        return cls(
            **ranges,
            summary=values["summary"],
            efficiency_gain_fraction=values["efficiency_gain_fraction"],
        )


@dataclass(frozen=True)
class Hold:
    """Leave the setpoint as it is.

    Attributes:
        reason: Full sentence with the numbers it rests on.
        kind: Short stable name of the reason without its numbers, by which repeated holds are
            recognised as the same.
        wanted: The change that a guard refused; ``None`` where the policy itself holds.
    """

    reason: str
    kind: str = "maintain"
    wanted: Change | None = None


@dataclass(frozen=True)
class Change:
    """Go to another setpoint.

    Attributes:
        action: Which kind of change.
        setpoint: The whole new setpoint.
        reason: Full sentence with the numbers it rests on.
        expected: What it should do; verification tests this.
        mandatory: Whether only the bounds may refuse it: cooldown, payback and outcome
            verification are for changes that a policy tries, not for those that a user asked for.
    """

    action: Action
    setpoint: Setpoint
    reason: str
    expected: Expectation
    mandatory: bool = False


@dataclass(frozen=True)
class DecisionContext:
    """What the control loop knows beyond the present window.

    Attributes:
        completed_steps: Optimizer steps completed since the run began.
        remaining_s: Estimated training time left in s; ``None`` when unknown.
        pause_s: Estimated pause of a change in s.
        last_change_at_s: When the setpoint last changed, seconds since the run began; ``None``
            when it never did.
        stable_until_s: Until when the present state is marked stable; ``None`` when it is not.
        best_efficiency: Best efficiency seen in the run in samples/J; ``None`` when none is known.
        known_efficiencies: Recently measured efficiency in samples/J by setpoint.
        num_setpoints_seen: Distinct setpoints of the run whose efficiency was measured.
    """

    completed_steps: int = 0
    remaining_s: float | None = None
    pause_s: float = 0.0
    last_change_at_s: float | None = None
    stable_until_s: float | None = None
    best_efficiency: float | None = None
    known_efficiencies: dict[Setpoint, float] = field(default_factory=dict)
    num_setpoints_seen: int = 0


class EnergyPolicy(Protocol):
    """Chooses the next setpoint. Pure: equal arguments give equal answers, and nothing else happens."""

    def decide(self, observation: Observation, context: DecisionContext) -> Hold | Change:
        """Decide on one window of measurements. Does not block; idempotent; thread-safe."""
        ...


def workers_per_device(num_workers: int, num_gpus: int) -> int:
    """Ranks on the fullest of ``num_gpus`` devices when ``num_workers`` are spread evenly."""
    return math.ceil(num_workers / num_gpus)


class HoldPolicy:
    """Never changes anything: measuring only.

    Args:
        reason: Why, as a full sentence.
    """

    def __init__(self, reason: str = "The hold policy measures and never changes the setpoint.") -> None:
        self._reason = reason

    def decide(self, observation: Observation, context: DecisionContext) -> Hold:  # noqa: ARG002
        """See :class:`EnergyPolicy`."""
        return Hold(self._reason, kind="hold_policy")


@dataclass(frozen=True)
class ScheduleEntry:
    """From ``at_step`` completed steps on, these values; ``None`` leaves one as it is.

    Attributes:
        at_step: Completed optimizer steps from which on the entry holds.
        num_workers: Active workers of the whole job.
        thread_percentage: Each engine's share in %.
    """

    at_step: int
    num_workers: int | None = None
    thread_percentage: int | None = None


class SchedulePolicy:
    """Setpoints by step number, for tests, benchmarks and demonstrations.

    The entries up to the present step are laid over one another, and the result is asked for if it
    is not in force. An entry that comes and goes between two decisions is therefore never seen.
    """

    def __init__(self, entries: Sequence[ScheduleEntry]) -> None:
        self._entries = sorted(entries, key=lambda entry: entry.at_step)

    def decide(self, observation: Observation, context: DecisionContext) -> Hold | Change:
        """See :class:`EnergyPolicy`."""
        now = observation.setpoint
        num_workers, share, since = now.num_workers, now.mps_active_thread_percentage, 0
        for entry in self._entries:
            if entry.at_step <= context.completed_steps:
                num_workers = entry.num_workers or num_workers
                share = entry.thread_percentage or share
                since = entry.at_step
        target = now.with_(num_workers=num_workers, mps_active_thread_percentage=share)
        if num_workers != now.num_workers:
            target = target.with_(workers_per_gpu=workers_per_device(num_workers, observation.num_gpus))
        if target == now:
            return Hold(f"The schedule asks for nothing else at step {context.completed_steps}.", "schedule")
        return Change(
            Action.SCHEDULED,
            target,
            f"The configured schedule (not a measurement) asks for {target.describe()} "
            f"from step {since} on; step {context.completed_steps} is done.",
            Expectation(summary="Nothing is expected of a scheduled change."),
            mandatory=True,
        )
