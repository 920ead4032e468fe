"""What was measured under each setting and by each generation.

Owns these sums alone. Memory grows with the number of settings and generations of the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from eadt.record.figures import PartTally
from eadt.record.rows import GenerationRow

if TYPE_CHECKING:
    from eadt.record.books.steps import StepRange


class Part(msgspec.Struct):
    """One setting or generation: energy in thousandths of a joule, time in millionths of a second."""

    session: int
    number: int
    setpoint: dict[str, Any] | None = None
    energy_mj: int = 0
    useful_mj: int = 0
    is_measured: bool = False
    time_us: int = 0


class Parts(msgspec.Struct):
    """All of them, by :func:`part_key`."""

    settings: dict[int, Part] = {}
    generations: dict[int, Part] = {}

    def setting(self, session: int, number: int) -> Part:
        """The sums of one setting."""
        return _part(self.settings, session, number)

    def generation(self, session: int, number: int) -> Part:
        """The sums of one generation."""
        return _part(self.generations, session, number)

    def add_time(self, session: int, generation: int, setting: int, time_us: int) -> None:
        """Book job time."""
        self.setting(session, setting).time_us += time_us
        self.generation(session, generation).time_us += time_us

    def note(self, row: GenerationRow, session: int) -> None:
        """A generation said what its setpoint is."""
        if row.setpoint is not None:
            self.setting(session, row.setting).setpoint = row.setpoint
            self.generation(session, row.generation).setpoint = row.setpoint

    def tallies(self, kind: str, steps: list[StepRange], batch: int | None) -> list[PartTally]:
        """The parts in order.

        Args:
            kind: ``setting`` or ``generation``.
            steps: The steps that count.
            batch: Samples of a step of which no row arrived.
        """
        parts = dict(self.settings if kind == "setting" else self.generations)
        samples: dict[int, int] = {}
        num_steps: dict[int, int] = {}
        for some in steps:
            key = part_key(some.session, getattr(some, kind))
            parts.setdefault(key, Part(some.session, getattr(some, kind)))
            each = batch if some.filled else some.samples
            samples[key] = samples.get(key, 0) + (each or 0) * some.num_steps
            num_steps[key] = num_steps.get(key, 0) + some.num_steps
        return [
            PartTally(
                number=part.number,
                session=part.session,
                setpoint=part.setpoint,
                seconds=part.time_us / 1e6,
                energy_j=part.energy_mj / 1e3 if part.is_measured else None,
                useful_j=part.useful_mj / 1e3 if part.is_measured else None,
                samples=samples.get(key, 0),
                num_steps=num_steps.get(key, 0),
            )
            for key, part in sorted(parts.items())
        ]


def part_key(session: int, number: int) -> int:
    """One number for a session and a number in it, in their order."""
    return (session << 32) + number


def _part(parts: dict[int, Part], session: int, number: int) -> Part:
    key = part_key(session, number)
    part = parts.get(key)
    if part is None:
        part = parts[key] = Part(session, number)
    return part
