"""The control loop: the pure heart of the energy supervisor.

It is fed with observations and with what became of its changes, and answers with effects: what to
apply and what to write down. It owns the setpoint in force, the decision log, the best efficiency seen
and the state of verification and guard, all of which survive a restart through :meth:`ControlLoop.to_state`.
It never chooses (a policy does), applies, measures or waits.

Intervals. Every observation is one collection interval (60 s by default). ``warmup_intervals`` and
``verification_intervals`` count collection intervals; ``stable_intervals`` counts decision intervals
(5 minutes by default). A decision rests on the mean of all windows since the one before.

One change at a time: between :class:`ApplySetpoint` and the event that says what became of it,
observations are passed over; then the warm-up windows are passed over; then the change is verified;
only then the policy is asked again. Scheduled changes are measured but do not hold up the schedule.

The log. Every decision has an id and a row. A hold that only repeats the one before (the same kind of
reason, whatever its numbers) is counted in that one's row (``repeats``, ``until_s``), which is written
again at each doubling of the count and when the streak ends: a night of holding is some ten rows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from eadt.control.guard import Guard
from eadt.control.observation import Observation
from eadt.control.policy import Action, Change, DecisionContext, Expectation, Hold
from eadt.control.setpoint import Setpoint
from eadt.control.verification import (
    Kept,
    OutcomeVerifier,
    Pending,
    Revert,
    change_from_state,
    change_to_state,
    observation_from_state,
    observation_to_state,
)
from eadt.control.window import mean_observation
from eadt.units import Quality, format_duration

_LOG_LENGTH = 200
_NUM_PAUSES_REMEMBERED = 5
_MEMORY_IN_STABLE_PERIODS = 4
"""How long a measured efficiency counts as known, in units of the time a state is held stable."""


@dataclass(frozen=True)
class LoopSettings:
    """The loop's numbers.

    Attributes:
        decision_interval_s: Time between two decisions in s.
        verification_intervals: Measured windows by which a change is judged.
        stable_intervals: Decision intervals for which a state is held after a change from it failed.
        warmup_intervals: Windows passed over at the start and after each change.
        initial_pause_s: Assumed pause of a change in s until one has been measured.
    """

    decision_interval_s: float = 300.0
    verification_intervals: int = 2
    stable_intervals: int = 6
    warmup_intervals: int = 1
    initial_pause_s: float = 15.0

    @property
    def stable_s(self) -> float:
        """How long a state is held stable, in s."""
        return self.stable_intervals * self.decision_interval_s


@dataclass(frozen=True)
class ApplySetpoint:
    """Bring the job to ``setpoint``, then call one of the loop's ``change_*`` methods.

    Attributes:
        decision_id: The decision that asks for it.
        action: Which kind of change.
        setpoint: The whole new setpoint.
        reason: Full sentence, for the ledger.
    """

    decision_id: str
    action: Action
    setpoint: Setpoint
    reason: str


@dataclass(frozen=True)
class RecordDecision:
    """Write ``row`` into the ledger; a later row of the same ``decision_id`` updates it."""

    row: dict[str, Any]


Effect = ApplySetpoint | RecordDecision


@dataclass
class _InFlight:
    decision_id: str
    change: Change
    before: Observation


@dataclass
class _Streak:
    decision_id: str
    kind: str
    count: int


class ControlLoop:
    """Observe, decide, verify; see the module's description. Not thread-safe.

    Args:
        guard: The policy within its bounds.
        setpoint: The setpoint in force.
        settings: The loop's numbers.
    """

    def __init__(self, guard: Guard, setpoint: Setpoint, settings: LoopSettings | None = None) -> None:
        self._guard = guard
        self._settings = settings or LoopSettings()
        self._setpoint = setpoint
        self._verifier = OutcomeVerifier(self._settings.verification_intervals)
        self._verified_id: str | None = None
        self._in_flight: _InFlight | None = None
        self._windows: list[Observation] = []
        self._warmup_left = self._settings.warmup_intervals
        self._last_decision_at_s: float | None = None
        self._last_change_at_s: float | None = None
        self._stable_until_s: float | None = None
        self._failed_until_s: dict[Setpoint, float] = {}
        self._best_efficiency: float | None = None
        self._measured: dict[Setpoint, tuple[float, float]] = {}  # efficiency, at_s
        self._pauses_s: deque[float] = deque(maxlen=_NUM_PAUSES_REMEMBERED)
        self._streak: _Streak | None = None
        self._num_decisions = 0
        self._log: dict[str, dict[str, Any]] = {}

    @property
    def setpoint(self) -> Setpoint:
        """The setpoint in force, as far as the loop knows."""
        return self._setpoint

    @property
    def phase(self) -> str:
        """What the loop is doing: ``changing``, ``warming_up``, ``verifying`` or ``observing``."""
        if self._in_flight is not None:
            return "changing"
        if self._warmup_left > 0:
            return "warming_up"
        return "verifying" if self._verifier.active else "observing"

    @property
    def best_efficiency(self) -> float | None:
        """Best efficiency seen in the run in samples/J; ``None`` when none was measured."""
        return self._best_efficiency

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """The latest row of each of the last decisions, oldest first."""
        return [dict(row) for row in self._log.values()]

    def step(
        self, observation: Observation, *, completed_steps: int = 0, remaining_s: float | None = None
    ) -> list[Effect]:
        """Take one window of measurements and say what to do.

        A stale power reading counts as unknown.

        Args:
            observation: The window.
            completed_steps: Optimizer steps completed since the run began.
            remaining_s: Estimated training time left in s; ``None`` when unknown.
        """
        if self._in_flight is not None:
            return []
        effects: list[Effect] = []
        if observation.setpoint != self._setpoint:
            began_s = observation.at_s - observation.window_s
            if self._last_change_at_s is not None and began_s < self._last_change_at_s:
                return []  # a window from before the last change that arrives late
            why = f"the job was found at {observation.setpoint.describe()}"
            effects += self.setpoint_found(observation.setpoint, observation.at_s, why)
        if observation.quality is Quality.STALE:
            observation = replace(observation, power_w=None)
        if self._warmup_left > 0:
            self._warmup_left -= 1
            return effects
        if self._last_decision_at_s is None:
            self._last_decision_at_s = observation.at_s - observation.window_s
        if not self._verifier.active:
            self._windows.append(observation)
        else:
            mandatory = self._verifier.mandatory
            verdict = self._verifier.observe(observation)
            if isinstance(verdict, Pending):
                if not mandatory:
                    return effects
                self._windows.append(observation)
            else:
                effects += self._conclude(verdict, observation.at_s)
                if isinstance(verdict, Revert):
                    return effects
        elapsed_s = observation.at_s - self._last_decision_at_s
        if self._windows and elapsed_s >= self._settings.decision_interval_s - observation.window_s / 2:
            effects += self._decide(completed_steps, remaining_s)
        return effects

    def change_applied(self, decision_id: str, at_s: float, pause_s: float | None = None) -> list[Effect]:
        """The change of ``decision_id`` is in force since ``at_s``; it paused training for ``pause_s``.

        An id that is not in flight is passed over: the event of a change that was settled otherwise.
        """
        in_flight = self._in_flight
        if in_flight is None or in_flight.decision_id != decision_id:
            return []
        self._in_flight = None
        if pause_s is not None:
            self._pauses_s.append(pause_s)
        self._enter(in_flight.change.setpoint, at_s)
        if in_flight.change.action is Action.REVERT:
            self._stable_until_s = at_s + self._settings.stable_s
            return [self._update(decision_id, outcome="kept")]
        self._verifier.start(in_flight.change, in_flight.before)
        self._verified_id = decision_id
        return []

    def change_failed(self, decision_id: str, at_s: float, why: str) -> list[Effect]:
        """The change could not be carried out and the setpoint before is still in force.

        The same setpoint is not tried again for as long as a state is held stable.
        """
        return self._abandon(decision_id, at_s, why, "failed")

    def change_refused(self, decision_id: str, at_s: float, why: str) -> list[Effect]:
        """The change was not begun (the job was busy, or cannot carry it); otherwise as a failure."""
        return self._abandon(decision_id, at_s, why, "refused")

    def setpoint_found(self, setpoint: Setpoint, at_s: float, why: str) -> list[Effect]:
        """What is really in force, when something else changed it or after a restart of the loop.

        Args:
            setpoint: The setpoint in force.
            at_s: Since when, seconds since the run began.
            why: What changed it; a phrase that can follow a colon.
        """
        in_flight = self._in_flight
        if in_flight is not None:
            if setpoint == in_flight.change.setpoint:
                return self.change_applied(in_flight.decision_id, at_s)
            effects = self.change_failed(in_flight.decision_id, at_s, why)
            if setpoint != self._setpoint:
                self._enter(setpoint, at_s)
            return effects
        if setpoint == self._setpoint:
            return []
        effects = []
        if self._verifier.active and self._verified_id is not None:
            measured = self._verifier.conclude(f"Not verified to the end: {why}.")
            effects.append(self._update(self._verified_id, outcome="failed", measured=measured.as_dict()))
        self._enter(setpoint, at_s)
        return effects

    def finish(self) -> list[Effect]:
        """The run ends: bring the log up to date. A change that is not verified stays ``pending``."""
        effects = self._end_streak()
        if self._verifier.active and self._verified_id is not None:
            measured = self._verifier.conclude("The run ended before the outcome was known.")
            effects.append(self._update(self._verified_id, measured=measured.as_dict()))
        return effects

    def _decide(self, completed_steps: int, remaining_s: float | None) -> list[Effect]:
        mean = mean_observation(self._windows)
        self._windows = []
        self._last_decision_at_s = mean.at_s
        self._remember(mean)
        decision = self._guard.decide(mean, self._context(mean, completed_steps, remaining_s))
        if isinstance(decision, Change):
            until_s = self._failed_until_s.get(decision.setpoint, mean.at_s)
            if until_s > mean.at_s:
                decision = Hold(
                    f"A change to {decision.setpoint.describe()} failed lately and is not tried again for "
                    f"{format_duration(until_s - mean.at_s)}.",
                    "refused_failed_lately",
                    decision,
                )
        if isinstance(decision, Hold):
            return self._hold(decision, mean)
        effects = self._end_streak()
        if self._verifier.active and self._verified_id is not None:
            measured = self._verifier.conclude("Kept because it was scheduled, until the next entry.")
            effects.append(self._update(self._verified_id, outcome="kept", measured=measured.as_dict()))
        return effects + self._start(decision, mean)

    def _context(
        self, observation: Observation, completed_steps: int, remaining_s: float | None
    ) -> DecisionContext:
        oldest_s = observation.at_s - _MEMORY_IN_STABLE_PERIODS * self._settings.stable_s
        return DecisionContext(
            completed_steps=completed_steps,
            remaining_s=remaining_s,
            pause_s=fmean(self._pauses_s) if self._pauses_s else self._settings.initial_pause_s,
            last_change_at_s=self._last_change_at_s,
            stable_until_s=self._stable_until_s,
            best_efficiency=self._best_efficiency,
            known_efficiencies={
                setpoint: efficiency
                for setpoint, (efficiency, at_s) in self._measured.items()
                if at_s >= oldest_s
            },
            num_setpoints_seen=len(self._measured),
        )

    def _start(self, change: Change, before: Observation) -> list[Effect]:
        row = self._new_row(change.action, change.reason, before.at_s, change.setpoint, "pending")
        row["expected"] = change.expected.as_dict()
        decision_id = row["decision_id"]
        self._in_flight = _InFlight(decision_id, change, before)
        self._windows = []
        return [
            RecordDecision(dict(row)),
            ApplySetpoint(decision_id, change.action, change.setpoint, change.reason),
        ]

    def _hold(self, hold: Hold, observation: Observation) -> list[Effect]:
        streak = self._streak
        if streak is not None and streak.kind == hold.kind:
            streak.count += 1
            update = self._update(
                streak.decision_id, reason=hold.reason, repeats=streak.count, until_s=observation.at_s
            )
            return [update] if _is_power_of_two(streak.count) else []
        effects = self._end_streak()
        wanted = hold.wanted
        row = self._new_row(
            wanted.action if wanted else Action.MAINTAIN,
            hold.reason,
            observation.at_s,
            wanted.setpoint if wanted else self._setpoint,
            "refused" if wanted else "held",
        )
        row["expected"] = wanted.expected.as_dict() if wanted else {}
        row |= {"repeats": 1, "until_s": observation.at_s}
        self._streak = _Streak(row["decision_id"], hold.kind, 1)
        return [*effects, RecordDecision(dict(row))]

    def _end_streak(self) -> list[Effect]:
        streak, self._streak = self._streak, None
        if streak is None or _is_power_of_two(streak.count):
            return []
        return [self._update(streak.decision_id)]

    def _conclude(self, verdict: Kept | Revert, at_s: float) -> list[Effect]:
        decision_id, self._verified_id = self._verified_id, None
        assert decision_id is not None
        if verdict.after is not None:
            self._remember(verdict.after)
        outcome = "kept" if isinstance(verdict, Kept) else "reverted"
        effects: list[Effect] = [
            self._update(decision_id, outcome=outcome, measured=verdict.measured.as_dict())
        ]
        if isinstance(verdict, Kept):
            self._windows = [verdict.after] if verdict.after is not None else []
            return effects
        self._stable_until_s = at_s + self._settings.stable_s
        assert verdict.after is not None
        back = Change(
            Action.REVERT,
            verdict.setpoint,
            f"Decision {decision_id} is taken back to {verdict.setpoint.describe()}. {verdict.why}",
            Expectation(summary="Everything goes back to what it was before."),
            mandatory=True,
        )
        return effects + self._start(back, verdict.after)

    def _abandon(self, decision_id: str, at_s: float, why: str, outcome: str) -> list[Effect]:
        in_flight = self._in_flight
        if in_flight is None or in_flight.decision_id != decision_id:
            return []
        self._in_flight = None
        self._failed_until_s[in_flight.change.setpoint] = at_s + self._settings.stable_s
        self._warmup_left = self._settings.warmup_intervals
        return [self._update(decision_id, outcome=outcome, measured={"verdict": f"Not carried out: {why}."})]

    def _enter(self, setpoint: Setpoint, at_s: float) -> None:
        self._setpoint = setpoint
        self._last_change_at_s = at_s
        self._windows = []
        self._warmup_left = self._settings.warmup_intervals
        self._stable_until_s = None

    def _remember(self, mean: Observation) -> None:
        if mean.efficiency is None:
            return
        self._measured[mean.setpoint] = (mean.efficiency, mean.at_s)
        self._best_efficiency = max(mean.efficiency, self._best_efficiency or 0.0)

    def _new_row(
        self, action: Action, reason: str, at_s: float, target: Setpoint, outcome: str
    ) -> dict[str, Any]:
        self._num_decisions += 1
        decision_id = f"d{self._num_decisions:04d}"
        row: dict[str, Any] = {
            "type": "decision",
            "decision_id": decision_id,
            "at_s": at_s,
            "action": str(action),
            "reason": reason,
            "setpoint_before": self._setpoint.as_dict(),
            "setpoint_after": target.as_dict() if outcome == "pending" else self._setpoint.as_dict(),
            "expected": {},
            "measured": None,
            "outcome": outcome,
        }
        if outcome == "refused":
            row["setpoint_wanted"] = target.as_dict()
        self._log[decision_id] = row
        while len(self._log) > _LOG_LENGTH:
            del self._log[next(iter(self._log))]
        return row

    def _update(self, decision_id: str, **changes: Any) -> RecordDecision:
        row = self._log[decision_id]
        row |= changes
        if row["outcome"] in ("failed", "refused"):
            row["setpoint_after"] = row["setpoint_before"]
        return RecordDecision(dict(row))

    def to_state(self) -> dict[str, Any]:
        """Everything that a restarted loop needs, JSON-serialisable."""
        in_flight = self._in_flight
        return {
            "setpoint": self._setpoint.as_dict(),
            "verifier": self._verifier.to_state(),
            "verified_id": self._verified_id,
            "in_flight": None
            if in_flight is None
            else {
                "decision_id": in_flight.decision_id,
                "change": change_to_state(in_flight.change),
                "before": observation_to_state(in_flight.before),
            },
            "windows": [observation_to_state(window) for window in self._windows],
            "warmup_left": self._warmup_left,
            "last_decision_at_s": self._last_decision_at_s,
            "last_change_at_s": self._last_change_at_s,
            "stable_until_s": self._stable_until_s,
            "failed_until_s": [[key.as_dict(), until_s] for key, until_s in self._failed_until_s.items()],
            "best_efficiency": self._best_efficiency,
            "measured": [[key.as_dict(), *value] for key, value in self._measured.items()],
            "pauses_s": list(self._pauses_s),
            "streak": vars(self._streak) if self._streak else None,
            "num_decisions": self._num_decisions,
            "log": self.decisions,
        }

    @classmethod
    def from_state(
        cls, state: dict[str, Any], guard: Guard, settings: LoopSettings | None = None
    ) -> ControlLoop:
        """Go on from what :meth:`to_state` gave; then tell the truth by :meth:`setpoint_found`."""
        loop = cls(guard, Setpoint(**state["setpoint"]), settings)
        loop._verifier.restore(state["verifier"])
        loop._verified_id = state["verified_id"]
        if flight := state["in_flight"]:
            loop._in_flight = _InFlight(
                flight["decision_id"],
                change_from_state(flight["change"]),
                observation_from_state(flight["before"]),
            )
        loop._windows = [observation_from_state(window) for window in state["windows"]]
        loop._warmup_left = state["warmup_left"]
        loop._last_decision_at_s = state["last_decision_at_s"]
        loop._last_change_at_s = state["last_change_at_s"]
        loop._stable_until_s = state["stable_until_s"]
        loop._failed_until_s = {Setpoint(**key): until_s for key, until_s in state["failed_until_s"]}
        loop._best_efficiency = state["best_efficiency"]
        loop._measured = {Setpoint(**key): (efficiency, at_s) for key, efficiency, at_s in state["measured"]}
        loop._pauses_s.extend(state["pauses_s"])
        loop._streak = _Streak(**state["streak"]) if state["streak"] else None
        loop._num_decisions = state["num_decisions"]
        loop._log = {row["decision_id"]: dict(row) for row in state["log"]}
        return loop


def _is_power_of_two(count: int) -> bool:
    return count & (count - 1) == 0
