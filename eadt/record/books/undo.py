"""What a rollback undoes: which work is void, and keeping apart what still can become void.

Owns :class:`Limits` (rows that arrive after a rollback) and :class:`Undoable` (what was booked before it). It
does not know what the amounts are: energy and time use it alike.

Work is held by the step that it was for. The newest rows are held one by one; older ones are added up between
the steps to which the run can go back (its saved steps), and the oldest over several of them. Only a rollback
into the middle of what was added up is inexact: it takes the undone steps' fraction.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable
from operator import add

import msgspec

NO_SETTING = -1
"""Setting of stretches that were added up over several settings or generations."""

_MAX_SAVED_STEPS = 256
_MAX_LIMITS = 256


class Limits(msgspec.Struct):
    """Up to which step the work of each generation of the present session counts.

    Attributes:
        stairs: (generation, step), both ascending: work of generations up to this one counts up to this step.
        newest: The last of these generations; later ones have no limit.
    """

    stairs: list[tuple[int, int]] = []
    newest: int = -1

    def undo(self, generation: int, resumed_step: int) -> None:
        """Generations up to this one count up to ``resumed_step``."""
        kept = [stair for stair in self.stairs if stair[0] > generation or stair[1] < resumed_step]
        if not any(stair[0] >= generation and stair[1] <= resumed_step for stair in kept):
            insort(kept, (generation, resumed_step))
        self.stairs = kept[-_MAX_LIMITS:]
        self.newest = kept[-1][0]

    def of(self, generation: int) -> int | None:
        """The last step that counts of this generation; ``None``: all do."""
        if generation > self.newest:
            return None
        return next((step for upto, step in self.stairs if upto >= generation), None)

    def void(self, generation: int, step: int) -> bool:
        """Whether work that was begun with ``step`` steps done has been undone already."""
        limit = self.of(generation)
        return limit is not None and step >= limit


def note_saved_step(saved_steps: list[int], step: int) -> None:
    """Remember in order, without end, a step that the run can go back to; old ones more thinly."""
    place = bisect_right(saved_steps, step)
    if place == 0 or saved_steps[place - 1] != step:
        saved_steps.insert(place, step)
    if len(saved_steps) > _MAX_SAVED_STEPS:
        del saved_steps[: _MAX_SAVED_STEPS // 2 : 2]


class Stretch(msgspec.Struct, array_like=True, gc=False):
    """What was booked for steps ``from_step`` to ``to_step`` (done when it began) under one account."""

    session: int
    generation: int
    setting: int
    from_step: int
    to_step: int
    account: int
    amounts: list[int]


class Undone(msgspec.Struct):
    """A part of a stretch that a rollback made void; ``exact``: not a fraction of something added up."""

    stretch: Stretch
    amounts: list[int]
    exact: bool


class Undoable(msgspec.Struct):
    """Stretches that a rollback can still make void, in the order of their booking."""

    stretches: list[Stretch] = []

    def undo(self, session: int, generation: int, resumed_step: int) -> list[Undone]:
        """Take out what a rollback made void."""
        undone: list[Undone] = []
        kept: list[Stretch] = []
        for stretch in self.stretches:
            reached = stretch.session < session or stretch.generation <= generation
            if not reached or stretch.to_step < resumed_step:
                kept.append(stretch)
            elif stretch.from_step >= resumed_step:
                undone.append(Undone(stretch, stretch.amounts, True))
            else:
                num_steps = stretch.to_step - stretch.from_step + 1
                num_void = stretch.to_step - resumed_step + 1
                void = [amount * num_void // num_steps for amount in stretch.amounts]
                left = [amount - part for amount, part in zip(stretch.amounts, void, strict=True)]
                undone.append(Undone(stretch, void, False))
                kept.append(
                    msgspec.structs.replace(
                        stretch, to_step=max(resumed_step - 1, stretch.from_step), amounts=left
                    )
                )
        self.stretches = kept
        return undone

    def compact(self, saved_steps: list[int], room: int) -> None:
        """Add up the older ones, so that about ``room`` are left; at least half of the room stays exact."""
        half = max(room // 2, 1)
        old, new = self.stretches[:-half], self.stretches[-half:]
        marks = saved_steps
        old = _between(old, marks)
        while len(old) > half and marks:
            marks = marks[(len(marks) + 1) // 2 :]
            old = _between(old, marks)
        size = len(old) + 1
        while half < len(old) < size:
            size, middle = len(old), len(old) // 2
            old = _added_up(old[:middle], lambda stretch: (stretch.account,)) + old[middle:]
        self.stretches = old + new


def _between(stretches: list[Stretch], marks: list[int]) -> list[Stretch]:
    """Stretches of one generation, setting and account added up between steps that the run can go back to."""
    return _added_up(
        stretches,
        lambda stretch: (
            stretch.session,
            stretch.generation,
            stretch.setting,
            stretch.account,
            bisect_right(marks, stretch.from_step),
        ),
    )


def _part(stretch: Stretch) -> tuple[int, int, int]:
    return (stretch.session, stretch.generation, stretch.setting)


def _added_up(stretches: list[Stretch], group: Callable[[Stretch], tuple[int, ...]]) -> list[Stretch]:
    sums: dict[tuple[int, ...], Stretch] = {}
    for stretch in stretches:
        key = group(stretch)
        total = sums.get(key)
        if total is None:
            sums[key] = msgspec.structs.replace(stretch)
            continue
        total.amounts = list(map(add, total.amounts, stretch.amounts))
        total.from_step = min(total.from_step, stretch.from_step)
        total.to_step = max(total.to_step, stretch.to_step)
        if _part(total) != _part(stretch):
            total.session = max(total.session, stretch.session)
            total.generation = max(total.generation, stretch.generation)
            total.setting = NO_SETTING
    return list(sums.values())
