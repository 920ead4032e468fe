"""Keeps the run's books: ledger rows, recent throughput, and how long each change paused training."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.control.setpoint import Setpoint
from eadt.record.ledger import LedgerWriter

_EVENTS_KEPT = 2000
_STEPS_KEPT = 20000
_STEPS_FOR_MEDIAN = 4
"""Steps after a change by which its ordinary step is judged, the first left out."""

_QUIET = frozenset({"energy", "phase", "step", "observation"})
"""Rows too frequent to be shown one by one."""


@dataclass
class Change:
    """A change of setting under way, from the last step before to the first after."""

    kind: str
    reason: str
    before: Setpoint
    after: Setpoint
    from_workers: int
    last_step: int
    last_step_unix_s: float
    lost_steps: int = 0
    decision_id: str | None = None
    parts: dict[str, float] = field(default_factory=dict)
    first_step_unix_s: float | None = None
    durations_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step as the whole job saw it; times in wall-clock s."""

    step: int
    ended_unix_s: float
    duration_s: float
    samples: int
    loss: float | None
    generation: int


class Recorder:
    """Single writer of the run's ledger. Not thread-safe: used from the coordinator's loop only."""

    def __init__(self, ledger: LedgerWriter, clock: Clock = SYSTEM_CLOCK) -> None:
        self._ledger = ledger
        self._clock = clock
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        self._num_events = 0
        self.steps: deque[StepRecord] = deque(maxlen=_STEPS_KEPT)
        self.began_unix_s = clock.unix_s()
        self.began_monotonic_s = clock.monotonic_s()
        self._change: Change | None = None

    @property
    def at_s(self) -> float:
        """Seconds since this attempt at the run began."""
        return self._clock.monotonic_s() - self.began_monotonic_s

    def book(self, row: dict[str, Any]) -> None:
        """Append a row to the ledger, and keep it for those who watch."""
        self._ledger.append(row)
        if row["type"] not in _QUIET:
            self._events.append({**row, "number": self._num_events})
            self._num_events += 1

    def note(self, code: str, text: str) -> None:
        """Book a sentence that the user should read."""
        self.book({"type": "note", "code": code, "text": text})

    def events_since(self, number: int) -> tuple[list[dict[str, Any]], int]:
        """Rows worth showing with at least this number, and the number to ask with next time."""
        return [row for row in self._events if row["number"] >= number], self._num_events

    def book_step(self, row: dict[str, Any], ended_unix_s: float) -> Change | None:
        """Book a step; returns the change that it completes, once its pause is known."""
        self.book(row)
        if not row["primary"]:
            return None
        duration_s = row["t1"] - row["t0"]
        self.steps.append(
            StepRecord(row["step"], ended_unix_s, duration_s, row["samples"], row["loss"], row["generation"])
        )
        change = self._change
        if change is None or row["step"] <= change.last_step - change.lost_steps:
            return None
        if change.first_step_unix_s is None:
            change.first_step_unix_s = ended_unix_s
            change.parts["first_step_s"] = duration_s
            return None
        change.durations_s.append(duration_s)
        return self.close_change() if len(change.durations_s) >= _STEPS_FOR_MEDIAN else None

    def open_change(self, change: Change) -> None:
        """A change begins; one that is still open is booked with what is known of it."""
        self.close_change()
        self._change = change

    @property
    def change(self) -> Change | None:
        """The change that is under way or being timed."""
        return self._change

    def close_change(self) -> Change | None:
        """Book the open change, if its first step was seen. Returns it."""
        change, self._change = self._change, None
        if change is None or change.first_step_unix_s is None:
            return None
        ordinary_s = median(change.durations_s) if change.durations_s else change.parts["first_step_s"]
        pause_s = max(0.0, change.first_step_unix_s - change.last_step_unix_s - ordinary_s)
        unchanged = change.before == change.after and change.from_workers == change.after.num_workers
        self.book(
            {
                "type": "recovery" if unchanged else "resize",
                "at_s": self.at_s - (self._clock.unix_s() - change.first_step_unix_s),
                "from_workers": change.from_workers,
                "to_workers": change.after.num_workers,
                "kind": change.kind,
                "reason": change.reason,
                "seconds": pause_s,
                "ordinary_step_s": ordinary_s,
                "lost_steps": change.lost_steps,
                "parts": change.parts,
                "setpoint_before": change.before.as_dict(),
                "setpoint_after": change.after.as_dict(),
                "decision_id": change.decision_id,
            }
        )
        return change

    def throughput(self, window_s: float, since_unix_s: float) -> tuple[float | None, int]:
        """Samples/s and number of the steps that ended in the last ``window_s`` s.

        Args:
            window_s: Length of the window in s.
            since_unix_s: Steps that began before are left out; the window is cut to that.
        """
        now = self._clock.unix_s()
        begin = max(now - window_s, since_unix_s)
        if self.steps:
            first = self.steps[0]
            begin = max(begin, first.ended_unix_s - first.duration_s)
        ended = [record for record in self.steps if record.ended_unix_s > begin]
        if not ended or now <= begin:
            return None, 0
        # The first step counts with the part of it that lies in the window.
        first = ended[0]
        share = min(1.0, (first.ended_unix_s - begin) / first.duration_s) if first.duration_s > 0 else 1.0
        samples = sum(record.samples for record in ended[1:]) + share * first.samples
        span_s = ended[-1].ended_unix_s - begin
        return (samples / span_s if span_s > 0 else None), len(ended)

    def close(self) -> None:
        """Write everything down."""
        self.close_change()
        self._ledger.close()
