"""What all books of a run share."""

from __future__ import annotations

import msgspec

from eadt.record.books.curves import Curves
from eadt.record.books.parts import Parts
from eadt.record.books.sessions import Session, SessionBook
from eadt.record.books.undo import note_saved_step


class Common(msgspec.Struct):
    """The time axis, the steps that the run can go back to, the settings, and the curves."""

    sessions: SessionBook = msgspec.field(default_factory=SessionBook)
    saved_steps: list[int] = []
    parts: Parts = msgspec.field(default_factory=Parts)
    curves: Curves = msgspec.field(default_factory=Curves)

    @property
    def session(self) -> Session:
        """The present session."""
        return self.sessions.present

    def see(self, at_s: float | None) -> None:
        """Time went on up to this session time at least.

        Raises:
            Unusable: It is no time of a session.
        """
        session = self.sessions.present
        session.see(at_s)
        if session.at_s >= self.curves.room_s:
            self.curves.widen(session.at_s)

    def save_step(self, step: int) -> None:
        """The run can go back to this step."""
        note_saved_step(self.saved_steps, step)
