"""The sessions of a run and its time axis.

Owns which session goes on, how long each was and how it ended. A session's time is its own: where it begins
on the run's axis is where the one before was last heard of, so that the time between them is not the run's.
"""

from __future__ import annotations

from typing import Any

import msgspec

from eadt.record.books.undo import Limits
from eadt.record.books.unusable import Unusable
from eadt.record.figures import RunFacts, SessionTally
from eadt.record.rows import EndRow, SessionRow

MAX_SESSION_S = 1e9
"""A time that is further from a session's start makes no sense."""


class Session(msgspec.Struct):
    """One session of the run.

    Attributes:
        index: From 0.
        offset_s: Where it begins on the run's axis.
        seconds: The largest session time that a row told of.
        metered_s: The largest session time up to which energy was booked.
        started_unix_s: Wall time of its first row; 0: not known.
        heard_unix_s: Wall time of its newest row; 0: not known.
        resumed_step: Steps that were done before it.
        has_row: Whether it had its own row.
        has_content: Whether anything was booked in it.
        ended: How it ended; empty: it did not say.
        reason: Why.
        limits: What its rollbacks made void.
    """

    index: int = 0
    offset_s: float = 0.0
    seconds: float = 0.0
    metered_s: float = 0.0
    started_unix_s: float = 0.0
    heard_unix_s: float = 0.0
    resumed_step: int = 0
    has_row: bool = False
    has_content: bool = False
    ended: str = ""
    reason: str = ""
    limits: Limits = msgspec.field(default_factory=Limits)

    @property
    def at_s(self) -> float:
        """Its newest moment on the run's axis, in s."""
        return self.offset_s + self.seconds

    def see(self, at_s: float | None) -> None:
        """Time went on up to this session time at least.

        Raises:
            Unusable: It is no time of a session.
        """
        if at_s is None:
            return
        if not -MAX_SESSION_S < at_s < MAX_SESSION_S:
            raise Unusable(f"{at_s} s is no time of a session")
        if at_s > self.seconds:
            self.seconds = at_s

    def place_s(self, at_s: float | None) -> float:
        """A session time on the run's axis; an unknown one is now."""
        return self.offset_s + (self.seconds if at_s is None else max(at_s, 0.0))


class SessionBook(msgspec.Struct):
    """All sessions, and what they said of the run."""

    present: Session = msgspec.field(default_factory=Session)
    earlier: list[Session] = []
    run_id: str | None = None
    name: str | None = None
    num_params: int | None = None
    train_batch_size: int | None = None
    sequence_length: int | None = None
    max_steps: int | None = None
    config: dict[str, Any] = {}
    versions: dict[str, str] = {}

    @property
    def has_begun(self) -> bool:
        """Whether the present session is more than what came before the first one's own row."""
        return self.present.has_row or self.present.has_content

    def begin(self, row: SessionRow) -> None:
        """A session began."""
        if self.has_begun:
            last = self.present
            last.limits = Limits()  # its rows have all been written
            self.earlier.append(last)
            self.present = Session(index=last.index + 1, offset_s=last.at_s, started_unix_s=row.unix_s)
        self.present.has_row = True
        self.present.resumed_step = row.resumed_step
        self.run_id, self.name = row.run_id, row.name
        self.train_batch_size = row.train_batch_size or self.train_batch_size
        self.sequence_length = row.sequence_length or self.sequence_length
        self.max_steps = row.max_steps if row.max_steps is not None else self.max_steps
        self.config, self.versions = row.config, row.versions

    def end(self, row: EndRow) -> None:
        """The session said how it ended."""
        self.present.ended, self.present.reason = row.status or "ended", row.reason
        if row.num_params is not None:
            self.num_params = row.num_params

    def hear(self, unix_s: float) -> None:
        """A row of the present session was written at this wall time."""
        present = self.present
        if unix_s > present.heard_unix_s:
            present.heard_unix_s = unix_s
        if present.started_unix_s <= 0.0:
            present.started_unix_s = unix_s

    def run(self) -> RunFacts:
        """Which run this is."""
        return RunFacts(
            run_id=self.run_id,
            name=self.name,
            num_params=self.num_params,
            train_batch_size=self.train_batch_size,
            sequence_length=self.sequence_length,
            max_steps=self.max_steps,
            config=dict(self.config),
            versions=dict(self.versions),
        )

    def tallies(self) -> list[SessionTally]:
        """The sessions in their order; none before the first row of one."""
        sessions = list(self.earlier)
        if self.has_begun:
            sessions.append(self.present)
        return [
            SessionTally(
                index=session.index,
                started_unix_s=session.started_unix_s,
                heard_unix_s=session.heard_unix_s,
                offset_s=session.offset_s,
                seconds=session.seconds,
                resumed_step=session.resumed_step,
                status=session.ended or ("running" if session is self.present else "no word"),
                reason=session.reason,
            )
            for session in sessions
        ]
