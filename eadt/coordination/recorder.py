"""Keeps the run's record: books and ledger, recent throughput, and how long each change paused training.

All its times are session time: monotonic seconds of the coordinator since the session began. Nodes' times
reach it converted (:class:`eadt.coordination.nodes.NodeTime`), so that no wall clock plays a part.
"""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.control.setpoint import Setpoint
from eadt.coordination.job_time import JobTime
from eadt.record.books import Books
from eadt.record.ledger import LedgerWriter, open_books
from eadt.record.rows import (
    AnyRow,
    ChangeRow,
    DevicesRow,
    EnergyRow,
    NoteRow,
    ObservationRow,
    SessionRow,
    StepsRow,
    TimeRow,
    as_event,
)

_EVENTS_KEPT = 2000
_STEPS_KEPT = 20000
_STEPS_FOR_MEDIAN = 4
"""Steps after a change by which its ordinary step is judged, the first left out."""

_BLOCK_S = 5.0
"""Steps are written in blocks of so many seconds: what a crash of the coordinator can cost."""

_BLOCK_STEPS = 512
_TIME_S = 30.0
"""A stretch of job time that goes on is written down this often."""

_QUIET = (EnergyRow, DevicesRow, StepsRow, TimeRow, ObservationRow)
"""Rows too frequent to be shown one by one. All others come after the steps that came before them."""


class Ledger(Protocol):
    """Where rows go; see :class:`eadt.record.ledger.LedgerWriter`. Never blocks, never raises."""

    def append(self, row: AnyRow) -> None:
        """Write a row down soon."""
        ...


def begin_ledger(folder: Path) -> tuple[LedgerWriter, Books]:
    """A writer that goes on with a run's ledger, and the books of what is in it. Blocks for the disk."""
    opened = open_books(folder)
    writer = LedgerWriter(folder, opened=opened)  # which keeps books of its own
    writer.start()
    return writer, opened.books


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step as the whole job saw it.

    Attributes:
        step: Its number, from 1.
        node_id: The node that told it, whose clock ``t0`` and ``t1`` are of.
        t0: Begin, node time in s.
        t1: End, node time in s.
        ended_at_s: End, session time in s.
        samples: Samples in it.
        loss: Mean loss.
        generation: Generation that did it.
    """

    step: int
    node_id: str
    t0: float
    t1: float
    ended_at_s: float
    samples: int
    loss: float | None
    generation: int

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.t1 - self.t0

    def seconds_until(self, later: StepRecord) -> float:
        """From its end to a later step's; by one machine's own clock where both were told by it."""
        if later.node_id == self.node_id:
            return later.t1 - self.t1
        return later.ended_at_s - self.ended_at_s


@dataclass
class Change:
    """A change of setting under way, from the last step before to the first after."""

    kind: str
    reason: str
    before: Setpoint
    after: Setpoint
    from_workers: int
    last_step: StepRecord | None
    resumed_step: int
    lost_steps: int = 0
    decision_id: str | None = None
    parts: dict[str, float] = field(default_factory=dict)
    first_step: StepRecord | None = None
    durations_s: list[float] = field(default_factory=list)

    @property
    def gap_s(self) -> float | None:
        """From the end of the last step before to the end of the first after; ``None``: not known."""
        if self.first_step is None or self.last_step is None:
            return None
        return self.last_step.seconds_until(self.first_step)


class Recorder:
    """Single writer of the run's record. Not thread-safe: used from the coordinator's loop only.

    Rows wait until :meth:`begin` and the session's own row; nothing is lost before.

    Args:
        clock: Source of session time.

    Attributes:
        books: The run so far, with what earlier sessions left.
        steps: The newest steps, oldest first.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._ledger: Ledger | None = None
        self.books = Books()
        self._clock = clock
        self._began_s = clock.monotonic_s()
        self._waiting: list[AnyRow] | None = []  # until the session's own row
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        self._num_events = 0
        self._block: StepsRow | None = None
        self._block_since_s = 0.0
        self._time = JobTime()
        self.steps: deque[StepRecord] = deque(maxlen=_STEPS_KEPT)
        self._change: Change | None = None

    def begin(self, ledger: Ledger, books: Books) -> None:
        """Write into this ledger from now on.

        Args:
            ledger: Where rows go.
            books: What earlier sessions of the run left.
        """
        self._ledger, self.books = ledger, books

    @property
    def at_s(self) -> float:
        """Session time now."""
        return self._clock.monotonic_s() - self._began_s

    def session_s(self, monotonic_s: float) -> float:
        """A time of the coordinator's monotonic clock as session time."""
        return monotonic_s - self._began_s

    def book(self, row: AnyRow) -> None:
        """Take a row into the books and the ledger, and keep it for those who watch."""
        if getattr(row, "at_s", 0.0) is None:
            row.at_s = self.at_s  # type: ignore[union-attr]
        if self._waiting is not None:
            if not isinstance(row, SessionRow):
                self._waiting.append(row)
                return
            waiting, self._waiting = self._waiting, None
            self._take(row)
            for other in waiting:
                self.book(other)
            return
        if not isinstance(row, _QUIET):
            self._write_block()
        self._take(row)

    def _take(self, row: AnyRow) -> None:
        assert self._ledger is not None, "the session has begun"
        self._ledger.append(row)
        self.books.add(row)
        if not isinstance(row, _QUIET):
            self._events.append({**as_event(row), "number": self._num_events})
            self._num_events += 1

    def note(self, code: str, text: str) -> None:
        """Book a sentence that the user should read."""
        self.book(NoteRow(code=code, text=text))

    def events_since(self, number: int) -> tuple[list[dict[str, Any]], int]:
        """Rows worth showing with at least this number, and the number to ask with next time."""
        return [row for row in self._events if row["number"] >= number], self._num_events

    def tick(self, step: int) -> None:
        """Write down what has been open for long."""
        at_s = self.at_s
        if self._block is not None and at_s - self._block_since_s >= _BLOCK_S:
            self._write_block()
        if self._time.age_s(at_s) >= _TIME_S:
            self._book_time(self._time.cut(at_s, step))

    # -- time -----------------------------------------------------------------------------------

    @property
    def job_use(self) -> str:
        """What the job's time is for now."""
        return self._time.use

    def become(self, use: str, at_s: float, step: int, generation: int, setting: int) -> None:
        """The job's time is for ``use`` from ``at_s`` on."""
        self._book_time(self._time.become(use, at_s, step, generation, setting))

    def _book_time(self, row: TimeRow | None) -> None:
        if row is not None:
            self.book(row)

    # -- steps ----------------------------------------------------------------------------------

    def book_step(self, record: StepRecord, setting: int, values: dict[str, Any]) -> Change | None:
        """Book a step; returns the change that it completes, once its pause is known."""
        row = StepsRow(
            node=record.node_id,
            generation=record.generation,
            setting=setting,
            first_step=record.step,
            t0=[round(record.t0, 6)],
            seconds=[round(record.seconds, 6)],
            loss=[record.loss],
            learning_rate=[values["learning_rate"]],
            samples=record.samples,
            tokens=values["tokens"],
            world_size=values["world_size"],
            input_s=[round(values["input_s"], 6)] if values["input_s"] else [],
        )
        self.books.add(row)
        self._time.waited_for_input(values["input_s"])
        if not self._joins_block(row):
            self._write_block()
            # A copy, since it grows.
            self._block, self._block_since_s = deepcopy(row), self.at_s
        self.steps.append(record)
        change = self._change
        if change is None or record.step <= change.resumed_step:
            return None
        if change.first_step is None:
            change.first_step = record
            change.parts["first_step_s"] = record.seconds
            return None
        change.durations_s.append(record.seconds)
        return self.close_change() if len(change.durations_s) >= _STEPS_FOR_MEDIAN else None

    def _joins_block(self, row: StepsRow) -> bool:
        """Put a step into the open block, if it is of the same kind as those in it."""
        block = self._block
        if (
            block is None
            or row.first_step != block.last_step + 1
            or bool(row.input_s) != bool(block.input_s)
            or len(block.t0) >= _BLOCK_STEPS
            or _constants(row) != _constants(block)
        ):
            return False
        for name in ("t0", "seconds", "loss", "learning_rate", "input_s"):
            getattr(block, name).extend(getattr(row, name))
        return True

    def _write_block(self) -> None:
        block, self._block = self._block, None
        if block is not None and self._ledger is not None:
            self._ledger.append(block)

    def throughput(self, window_s: float, since_s: float) -> tuple[float | None, int]:
        """Samples/s and number of the steps that ended in the last ``window_s`` s.

        Args:
            window_s: Length of the window in s.
            since_s: Session time; steps that began before are left out, and the window is cut to that.
        """
        now_s = self.at_s
        begin = max(now_s - window_s, since_s)
        if self.steps:
            first = self.steps[0]
            begin = max(begin, first.ended_at_s - first.seconds)
        ended = [record for record in self.steps if record.ended_at_s > begin]
        if not ended or now_s <= begin:
            return None, 0
        # The first step counts with the part of it that lies in the window.
        first = ended[0]
        part_s = min(first.ended_at_s - begin, first.seconds)
        share = part_s / first.seconds if first.seconds > 0 else 1.0
        samples = sum(record.samples for record in ended[1:]) + share * first.samples
        span_s = part_s + first.seconds_until(ended[-1])
        return (samples / span_s if span_s > 0 else None), len(ended)

    # -- changes --------------------------------------------------------------------------------

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
        if change is None or change.first_step is None:
            return None
        first = change.first_step
        ordinary_s = median(change.durations_s) if change.durations_s else first.seconds
        gap_s = change.gap_s
        self.book(
            ChangeRow(
                at_s=first.ended_at_s,
                recovery=change.before == change.after and change.from_workers == change.after.num_workers,
                from_workers=change.from_workers,
                to_workers=change.after.num_workers,
                kind=change.kind,
                reason=change.reason,
                seconds=None if gap_s is None else max(0.0, gap_s - ordinary_s),
                ordinary_step_s=ordinary_s,
                lost_steps=change.lost_steps,
                parts=change.parts,
                setpoint_before=change.before.as_dict(),
                setpoint_after=change.after.as_dict(),
                decision_id=change.decision_id,
            )
        )
        return change

    def close(self) -> None:
        """Book everything that is open."""
        self.close_change()
        self._book_time(self._time.cut(self.at_s, 0))
        self._write_block()


def _constants(row: StepsRow) -> tuple[Any, ...]:
    """What all steps of a block have in common."""
    return row.node, row.generation, row.setting, row.samples, row.tokens, row.world_size
