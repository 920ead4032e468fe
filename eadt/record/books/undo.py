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
from operator import add, sub

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


class Page(msgspec.Struct):
    """Rows of one generation, setting and account one by one: the step of each, and its amounts."""

    session: int
    generation: int
    setting: int
    account: int
    steps: list[int]
    rows: list[list[int]]


class Stretch(msgspec.Struct):
    """Rows that were added up: those for steps ``from_step`` to ``to_step``."""

    session: int
    generation: int
    setting: int
    account: int
    from_step: int
    to_step: int
    amounts: list[int]


class Undone(msgspec.Struct):
    """What a rollback made void; ``is_exact``: it is no fraction of something that was added up."""

    session: int
    generation: int
    setting: int
    account: int
    amounts: list[int]
    is_exact: bool


class Undoable(msgspec.Struct):
    """What a rollback can still make void, in the order of its booking.

    Attributes:
        old: Added up.
        pages: One by one.
        num_rows: How many rows these are.
    """

    old: list[Stretch] = []
    pages: list[Page] = []
    num_rows: int = 0

    def add(self, page: Page, room: int, saved_steps: list[int]) -> None:
        """Keep a page; where it gets more than there is room for, old ones are added up."""
        self.pages.append(page)
        self.num_rows += len(page.rows)
        if self.num_rows + len(self.old) > room:
            self.compact(room, saved_steps)

    def undo(self, session: int, generation: int, resumed_step: int) -> list[Undone]:
        """Take out what a rollback made void: of these generations, and of sessions before."""
        undone: list[Undone] = []
        old: list[Stretch] = []
        for stretch in self.old:
            reached = stretch.session < session or stretch.generation <= generation
            if not reached or stretch.to_step < resumed_step:
                old.append(stretch)
                continue
            void = stretch.amounts
            is_exact = stretch.from_step >= resumed_step
            if not is_exact:
                num_steps = stretch.to_step - stretch.from_step + 1
                num_void = stretch.to_step - resumed_step + 1
                void = [amount * num_void // num_steps for amount in stretch.amounts]
                left = list(map(sub, stretch.amounts, void))
                old.append(msgspec.structs.replace(stretch, to_step=resumed_step - 1, amounts=left))
            undone.append(
                Undone(stretch.session, stretch.generation, stretch.setting, stretch.account, void, is_exact)
            )
        self.old = old
        pages: list[Page] = []
        for page in self.pages:
            reached = page.session < session or page.generation <= generation
            void_rows = [row for step, row in zip(page.steps, page.rows, strict=True) if step >= resumed_step]
            if not reached or not void_rows:
                pages.append(page)
                continue
            undone.append(
                Undone(page.session, page.generation, page.setting, page.account, added_up(void_rows), True)
            )
            kept = [
                (step, row) for step, row in zip(page.steps, page.rows, strict=True) if step < resumed_step
            ]
            page.steps, page.rows = [step for step, _ in kept], [row for _, row in kept]
            if kept:
                pages.append(page)
        self.pages = pages
        self.num_rows = sum(len(page.rows) for page in pages)
        return undone

    def compact(self, room: int, saved_steps: list[int]) -> None:
        """Add up old rows, so that about half of the room is taken, and half of that by single rows."""
        quarter = max(room // 4, 1)
        while self.pages and self.num_rows > quarter:
            page = self.pages.pop(0)
            self.num_rows -= len(page.rows)
            self.old += _stretches(page, saved_steps)
        marks = saved_steps
        self.old = _between(self.old, marks)
        while len(self.old) > quarter and marks:
            marks = marks[(len(marks) + 1) // 2 :]
            self.old = _between(self.old, marks)
        size = len(self.old) + 1
        while quarter < len(self.old) < size:
            size, middle = len(self.old), len(self.old) // 2
            oldest = _merged(self.old[:middle], lambda stretch: (stretch.account,))
            self.old = oldest + self.old[middle:]


def added_up(rows: list[list[int]]) -> list[int]:
    """The sums of the columns."""
    return rows[0] if len(rows) == 1 else list(map(sum, zip(*rows, strict=True)))


def _stretches(page: Page, marks: list[int]) -> list[Stretch]:
    """A page's rows added up between steps that the run can go back to."""
    groups: dict[int, list[int]] = {}
    for place, step in enumerate(page.steps):
        groups.setdefault(bisect_right(marks, step), []).append(place)
    return [
        Stretch(
            page.session,
            page.generation,
            page.setting,
            page.account,
            min(page.steps[place] for place in places),
            max(page.steps[place] for place in places),
            added_up([page.rows[place] for place in places]),
        )
        for places in groups.values()
    ]


def _between(stretches: list[Stretch], marks: list[int]) -> list[Stretch]:
    """Stretches of one part and account added up between steps that the run can go back to."""
    return _merged(
        stretches,
        lambda stretch: (*_part(stretch), stretch.account, bisect_right(marks, stretch.from_step)),
    )


def _part(stretch: Stretch) -> tuple[int, int, int]:
    return (stretch.session, stretch.generation, stretch.setting)


def _merged(stretches: list[Stretch], group: Callable[[Stretch], tuple[int, ...]]) -> list[Stretch]:
    sums: dict[tuple[int, ...], Stretch] = {}
    for stretch in stretches:
        total = sums.setdefault(group(stretch), stretch)
        if total is stretch:
            continue
        total.amounts = list(map(add, total.amounts, stretch.amounts))
        total.from_step = min(total.from_step, stretch.from_step)
        total.to_step = max(total.to_step, stretch.to_step)
        if _part(total) != _part(stretch):
            total.session = max(total.session, stretch.session)
            total.generation = max(total.generation, stretch.generation)
            total.setting = NO_SETTING
    return list(sums.values())
