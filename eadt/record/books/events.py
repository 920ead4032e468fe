"""What happened: rows that are reported as they stand, with their place on the run's axis.

Owns how many of each kind are kept. All are counted.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from eadt.record.books.sessions import Session
from eadt.record.figures import Points
from eadt.record.rows import (
    ChangeRow,
    CheckpointRow,
    DecisionRow,
    FaultRow,
    GenerationRow,
    NoteRow,
    ObservationRow,
    ValidationRow,
)

R = TypeVar("R")
_FIRST, _NEWEST = 100, 400
_MAX_DECISIONS = 1000
_MAX_VALIDATIONS = 4000
_MAX_SETTINGS = 2000
_NUM_OBSERVATIONS = 20
_ROWS_WITH_SHARES = 10


class Kept(msgspec.Struct, Generic[R]):
    """Rows of one kind: the first and the newest ones."""

    first: list[tuple[float, R]] = []
    newest: list[tuple[float, R]] = []

    def add(self, at_s: float, row: R) -> None:
        """Keep a row."""
        if len(self.first) < _FIRST:
            self.first.append((at_s, row))
            return
        self.newest.append((at_s, row))
        if len(self.newest) > _NEWEST:
            del self.newest[0]

    def rows(self) -> list[tuple[float, R]]:
        """(at_s on the run's axis, row), in the order in which they came."""
        return self.first + self.newest


class Validation(msgspec.Struct):
    """A validation that counts."""

    session: int
    at_s: float
    row: ValidationRow


class EventBook(msgspec.Struct):
    """All that happened.

    Attributes:
        decisions: By session and id, in the order in which they were first booked.
        settings: (at_s, setpoint) from which each setting was in force.
        setting: Session and number of the newest setting that came into force.
    """

    counts: dict[str, int] = {}
    generations: Kept[GenerationRow] = msgspec.field(default_factory=Kept)
    changes: Kept[ChangeRow] = msgspec.field(default_factory=Kept)
    checkpoints: Kept[CheckpointRow] = msgspec.field(default_factory=Kept)
    faults: Kept[FaultRow] = msgspec.field(default_factory=Kept)
    notes: Kept[NoteRow] = msgspec.field(default_factory=Kept)
    validations: dict[int, Validation] = {}
    decisions: dict[str, DecisionRow] = {}
    observations: list[ObservationRow] = []
    setpoint: dict[str, Any] | None = None
    setting: tuple[int, int] | None = None
    settings: list[tuple[float, dict[str, Any]]] = []

    def add_generation(self, row: GenerationRow, session: Session) -> None:
        """A generation began to train, or ended."""
        at_s = session.place_s(row.at_s)
        if row.event == "started":
            if row.setpoint is not None:
                self.setpoint = row.setpoint
            if row.setpoint is not None and self.setting != (session.index, row.setting):
                self.settings.append((at_s, row.setpoint))
                if len(self.settings) > _MAX_SETTINGS:
                    del self.settings[1 : _MAX_SETTINGS // 2 : 2]
            self.setting = (session.index, row.setting)
        self.generations.add(at_s, row)
        for kept in (self.generations.first, self.generations.newest):
            # Shares are as many as ranks: only those of the newest rows are kept.
            if len(kept) > _ROWS_WITH_SHARES and kept[-_ROWS_WITH_SHARES - 1][1].shares:
                old_s, old = kept[-_ROWS_WITH_SHARES - 1]
                kept[-_ROWS_WITH_SHARES - 1] = (old_s, msgspec.structs.replace(old, shares=[]))

    def add_validation(self, row: ValidationRow, session: Session) -> None:
        """A validation loss; of one step, the newest counts."""
        limit = session.limits.of(row.generation)
        if limit is not None and row.step > limit:
            return
        known = self.validations.get(row.step)
        owner = (session.index, row.generation)
        if known is not None and (known.session, known.row.generation) > owner:
            return  # of an older generation, late
        self.validations[row.step] = Validation(session.index, session.place_s(row.at_s), row)
        if len(self.validations) > _MAX_VALIDATIONS:
            for step in sorted(self.validations)[1 : _MAX_VALIDATIONS // 2 : 2]:
                del self.validations[step]

    def add_decision(self, row: DecisionRow, session: Session) -> None:
        """A decision, or news of one: what a later row leaves empty stays as it was."""
        key = f"{session.index}/{row.decision_id}"
        news = msgspec.structs.replace(
            row,
            at_s=None if row.at_s is None else session.place_s(row.at_s),
            until_s=None if row.until_s is None else session.place_s(row.until_s),
        )
        known = self.decisions.get(key)
        if known is not None:
            values = {name: getattr(news, name) for name in news.__struct_fields__}
            changed = {name: value for name, value in values.items() if value not in (None, "")}
            changed["at_s"] = known.at_s if known.at_s is not None else news.at_s
            news = msgspec.structs.replace(known, **changed)
        self.decisions[key] = news
        if len(self.decisions) > _MAX_DECISIONS:
            del self.decisions[next(iter(self.decisions))]

    def add_observation(self, row: ObservationRow, session: Session) -> None:
        """A window of the supervisor's."""
        at_s = None if row.at_s is None else session.place_s(row.at_s)
        self.observations.append(msgspec.structs.replace(row, at_s=at_s))
        del self.observations[:-_NUM_OBSERVATIONS]

    def undo(self, session: int, generation: int, resumed_step: int) -> None:
        """The run fell back: validations beyond do not count."""
        self.validations = {
            step: validation
            for step, validation in self.validations.items()
            if step <= resumed_step
            or not (validation.session < session or validation.row.generation <= generation)
        }

    def validation_losses(self) -> Points:
        """Validation loss by step."""
        rows = [self.validations[step] for step in sorted(self.validations)]
        return Points(tuple((some.row.step, some.at_s, some.row.loss) for some in rows))
