"""Optimizer steps: which count, which were undone, their samples and losses, and their pace.

Owns the counting. Steps are held as ranges of equal kind, so that memory grows with the number of
generations and not of steps, and any rollback is exact. A step counts once, by the newest generation that did
it. Steps of which no row arrived, but a later one did, were done: they are *filled*, their loss is unknown.
"""

from __future__ import annotations

import math

import msgspec

from eadt.record.books.common import Common
from eadt.record.books.curves import Curves
from eadt.record.books.sessions import Session
from eadt.record.books.unusable import Unusable, check_lengths, check_numbers, finite
from eadt.record.figures import Points
from eadt.record.rows import StepsRow

_MAX_POINTS = 4000
_RECENT_STEPS = 512
_RECENT_S = 300.0
_MAX_BLOCKS = 512
MIN_STEPS = 3
"""A setting that did fewer steps has no pace of its own."""


class StepRange(msgspec.Struct):
    """Steps ``first`` to ``last``, of one generation and alike.

    Attributes:
        samples: Of each step; ``None``: not said.
        tokens: Of each step; ``None``: not said.
        filled: Whether no row of theirs arrived; their samples are a whole batch each.
    """

    first: int
    last: int
    session: int
    generation: int
    setting: int
    samples: int | None = None
    tokens: int | None = None
    filled: bool = False

    @property
    def num_steps(self) -> int:
        """How many."""
        return self.last - self.first + 1

    @property
    def owner(self) -> tuple[int, int]:
        """Session and generation."""
        return (self.session, self.generation)

    def part(self, first: int, last: int) -> StepRange:
        """These of its steps."""
        return msgspec.structs.replace(self, first=first, last=last)

    def without(self, first: int, last: int) -> list[StepRange]:
        """What is left of it without these steps."""
        parts = [(self.first, min(self.last, first - 1)), (max(self.first, last + 1), self.last)]
        return [self.part(a, b) for a, b in parts if a <= b]


class StepPoint(msgspec.Struct, array_like=True, gc=False):
    """One step that was seen: when it ended on the run's axis, and what it said."""

    step: int
    at_s: float
    loss: float | None
    learning_rate: float
    world_size: int | None
    session: int
    generation: int


class Block(msgspec.Struct, array_like=True, gc=False):
    """One row of steps, for the throughput of late."""

    session: int
    setting: int
    num_steps: int
    seconds: float
    samples: int | None


class Pace(msgspec.Struct):
    """How fast steps follow each other, with what is between them, but without pauses between generations."""

    session: int = -1
    setting: int = -1
    num_steps: int = 0
    seconds: float = 0.0

    @property
    def seconds_per_step(self) -> float | None:
        """``None``: no step yet."""
        return self.seconds / self.num_steps if self.num_steps else None


class StepBook(msgspec.Struct):
    """All steps of the run."""

    base: int = 0
    kept: list[StepRange] = []
    lost: list[StepRange] = []
    num_rollbacks: int = 0
    recent: list[StepPoint] = []
    points: dict[int, StepPoint] = {}
    every: int = 1
    blocks: list[Block] = []
    pace: Pace = msgspec.field(default_factory=Pace)
    pace_of_all: Pace = msgspec.field(default_factory=Pace)
    last_end: tuple[int, int, str, float] = (-1, -1, "", 0.0)

    @property
    def position(self) -> int:
        """Newest step that counts, or that was done before this record."""
        return self.kept[-1].last if self.kept else self.base

    # -- rows -------------------------------------------------------------------------------------------

    def add(self, row: StepsRow, to_session_s: float | None, common: Common) -> bool:
        """Book steps.

        Args:
            row: The steps.
            to_session_s: What has to be added to the row's node time to get session time; ``None``: its node
                told no moment in both, and the steps end now.
            common: What all books share.

        Returns:
            Whether there was a step in it that had not been booked before.

        Raises:
            Unusable: The row makes no sense.
        """
        _check(row)
        session, curves = common.session, common.curves
        end_t = row.t0[-1] + row.seconds[-1]
        if to_session_s is None:
            to_session_s = session.seconds - end_t
        common.see(end_t + to_session_s)
        limit = session.limits.of(row.generation)
        last = row.last_step if limit is None else min(row.last_step, limit)
        news = StepRange(
            row.first_step, row.last_step, session.index, row.generation, row.setting, row.samples, row.tokens
        )
        is_new = False
        if last < row.last_step:
            is_new = self._lose(news.part(max(row.first_step, last + 1), row.last_step))
        if last >= row.first_step:
            counted, is_known = self._count(news.part(row.first_step, last), curves)
            is_new = is_new or not is_known
            for first, final in counted:
                self._draw(row, first, final, session, to_session_s, curves)
        if is_new:
            self._time(row, session)
        return is_new

    def undo(self, session: int, generation: int, resumed_step: int, curves: Curves) -> None:
        """The run fell back: of these generations, and of sessions before, nothing beyond it counts."""
        kept: list[StepRange] = []
        for steps in self.kept:
            reached = steps.session < session or steps.generation <= generation
            if not reached or steps.last <= resumed_step:
                kept.append(steps)
                continue
            void = steps.part(max(steps.first, resumed_step + 1), steps.last)
            self._void(void, curves)
            kept += steps.without(void.first, void.last)
        self.kept = kept
        self.base = min(self.base, resumed_step)

        def stays(point: StepPoint) -> bool:
            reached = point.session < session or point.generation <= generation
            return not reached or point.step <= resumed_step

        self.recent = [point for point in self.recent if stays(point)]
        self.points = {step: point for step, point in self.points.items() if stays(point)}

    def prove(self, step: int, session: int, generation: int | None = None) -> None:
        """Steps up to this one were done, whether or not their rows arrived."""
        position = self.position
        if step > position:
            setting = self.kept[-1].setting if self.kept else 0
            if generation is None:
                generation = self.kept[-1].generation if self.kept else 0
            self.kept.append(StepRange(position + 1, step, session, generation, setting, filled=True))

    # -- figures ----------------------------------------------------------------------------------------

    def optimizer_steps(self) -> int:
        """Steps that count."""
        return sum(steps.num_steps for steps in self.kept)

    def lost_steps(self) -> int:
        """Steps that were done and undone."""
        return sum(steps.num_steps for steps in self.lost)

    def newest(self) -> StepPoint | None:
        """What the newest step that counts said; ``None``: no row of it arrived."""
        point = max(
            self.recent, key=lambda point: (point.step, point.session, point.generation), default=None
        )
        return point if point is not None and point.step == self.position else None

    def samples_per_second(self, window_s: float) -> float | None:
        """Over the newest rows of the newest setting, or of all where that did too few steps."""
        if not self.blocks:
            return None
        newest = self.blocks[-1]
        own = [
            block
            for block in self.blocks
            if (block.session, block.setting) == (newest.session, newest.setting)
        ]
        blocks = own if sum(block.num_steps for block in own) >= MIN_STEPS else self.blocks
        samples, seconds = 0, 0.0
        for block in reversed(blocks):
            if block.samples is None:
                return None
            samples += block.samples
            seconds += block.seconds
            if seconds >= window_s:
                break
        return samples / seconds if seconds > 0 else None

    def losses(self) -> Points:
        """Loss by step, thinned."""
        points = dict(self.points)
        if (newest := self.newest()) is not None:
            points[newest.step] = newest
        return Points(tuple((step, points[step].at_s, points[step].loss) for step in sorted(points)))

    # -- how --------------------------------------------------------------------------------------------

    def _count(self, news: StepRange, curves: Curves) -> tuple[list[tuple[int, int]], bool]:
        """Let steps count. Returns which of them do, and whether all had been booked before."""
        position = self.position
        if news.first > position:
            if news.first > position + 1:
                fill = msgspec.structs.replace(
                    news, first=position + 1, last=news.first - 1, samples=None, tokens=None, filled=True
                )
                self.kept.append(fill)
            self._append(news)
            return [(news.first, news.last)], False
        return self._overlap(news, curves)

    def _append(self, news: StepRange) -> None:
        last = self.kept[-1] if self.kept else None
        if last is not None and last.last + 1 == news.first and _alike(last, news):
            last.last = news.last
        else:
            self.kept.append(news)

    def _overlap(self, news: StepRange, curves: Curves) -> tuple[list[tuple[int, int]], bool]:
        """Steps that come again: rows delivered twice or late, or a newer generation that does them anew."""
        counted = [news]
        is_known = True
        kept: list[StepRange] = []
        for steps in self.kept:
            first, last = max(steps.first, news.first), min(steps.last, news.last)
            if first > last:
                kept.append(steps)
                continue
            if not steps.filled and steps.owner >= news.owner:
                counted = [part for some in counted for part in some.without(first, last)]
                if steps.owner > news.owner and self._lose(news.part(first, last)):
                    is_known = False
                kept.append(steps)
                continue
            if not steps.filled:
                self._void(steps.part(first, last), curves)
            kept += steps.without(first, last)
        if counted:
            is_known = False
            if news.first <= self.base:
                self.base = news.first - 1
        self.kept = sorted([*kept, *counted], key=lambda steps: steps.first)
        return [(part.first, part.last) for part in counted], is_known

    def _void(self, steps: StepRange, curves: Curves) -> None:
        """Steps that counted do so no more."""
        self.lost.append(steps)
        if not steps.filled:
            curves.take_samples(float((steps.samples or 0) * steps.num_steps))

    def _lose(self, news: StepRange) -> bool:
        """Book steps that were undone before their row arrived. Returns whether one was not booked before."""
        parts = [news]
        lost: list[StepRange] = []
        for steps in self.lost:
            first, last = max(steps.first, news.first), min(steps.last, news.last)
            if first > last or steps.owner != news.owner:
                lost.append(steps)
            elif steps.filled:
                lost += steps.without(first, last)
            else:
                lost.append(steps)
                parts = [part for some in parts for part in some.without(first, last)]
        self.lost = [*lost, *parts]
        return bool(parts)

    def _draw(
        self, row: StepsRow, first: int, last: int, session: Session, to_session_s: float, curves: Curves
    ) -> None:
        """Place steps that count on the run's axis."""
        begin, end = first - row.first_step, last - row.first_step
        to_axis_s = session.offset_s + to_session_s
        from_s, to_s = row.t0[begin] + to_axis_s, row.t0[end] + row.seconds[end] + to_axis_s
        samples = float(row.samples or 0)
        if curves.place(from_s) == curves.place(to_s):
            curves.add_samples(from_s, to_s, samples * (last - first + 1))
        else:
            for place in range(begin, end + 1):
                start_s = row.t0[place] + to_axis_s
                curves.add_samples(start_s, start_s + row.seconds[place], samples)
        self.recent += [
            StepPoint(
                row.first_step + place,
                max(row.t0[place] + row.seconds[place] + to_axis_s, 0.0),
                finite(row.loss[place]),
                row.learning_rate[place],
                row.world_size,
                session.index,
                row.generation,
            )
            for place in range(begin, end + 1)
        ]
        drawn = end - begin + 1
        for point in self.recent[-drawn:]:
            if point.step % self.every == 0:
                self.points[point.step] = point
        if len(self.recent) > 2 * _RECENT_STEPS:
            del self.recent[:-_RECENT_STEPS]
        while len(self.points) > _MAX_POINTS:
            self.every *= 2
            self.points = {step: point for step, point in self.points.items() if step % self.every == 0}

    def _time(self, row: StepsRow, session: Session) -> None:
        """Keep how long the steps took, whether or not they still count."""
        num_steps, seconds = len(row.t0), math.fsum(row.seconds)
        samples = None if row.samples is None else row.samples * num_steps
        self.blocks.append(Block(session.index, row.setting, num_steps, seconds, samples))
        while len(self.blocks) > _MAX_BLOCKS or (
            len(self.blocks) > 1 and sum(block.seconds for block in self.blocks[1:]) > _RECENT_S
        ):
            del self.blocks[0]
        end = row.t0[-1] + row.seconds[-1]
        owner = (session.index, row.generation, row.node)
        begin = self.last_end[3] if self.last_end[:3] == owner else row.t0[0]
        span_s = end - begin if end > begin else seconds
        self.last_end = (*owner, max(end, begin))
        if (self.pace.session, self.pace.setting) != (session.index, row.setting):
            self.pace = Pace(session.index, row.setting)
        for pace in (self.pace, self.pace_of_all):
            pace.num_steps += num_steps
            pace.seconds += span_s


def total_of(ranges: list[StepRange], name: str, of_filled: int | None) -> int | None:
    """Sum of ``samples`` or ``tokens`` over steps; ``None`` as soon as one does not say.

    Args:
        ranges: The steps.
        name: Which of the two.
        of_filled: What a step has of which no row arrived.
    """
    total = 0
    for steps in ranges:
        each: int | None = of_filled if steps.filled else getattr(steps, name)
        if each is None:
            return None
        total += each * steps.num_steps
    return total


def _alike(one: StepRange, other: StepRange) -> bool:
    return (
        one.owner == other.owner
        and one.setting == other.setting
        and (one.samples, one.tokens, one.filled) == (other.samples, other.tokens, other.filled)
    )


def _check(row: StepsRow) -> None:
    """Raises :class:`Unusable` for a row that makes no sense."""
    num_steps = len(row.t0)
    if not num_steps:
        raise Unusable("no steps in it")
    check_lengths(
        num_steps,
        (("seconds", len(row.seconds)), ("loss", len(row.loss)), ("learning_rate", len(row.learning_rate))),
    )
    check_numbers(row.generation, row.setting, row.first_step, row.last_step)
    if row.first_step < 1:
        raise Unusable("steps are counted from 1")
    if not all(0.0 <= seconds < 1e9 for seconds in row.seconds) or not all(map(math.isfinite, row.t0)):
        raise Unusable("a step without a time")
    if (row.samples or 0) < 0 or (row.tokens or 0) < 0:
        raise Unusable("less than no samples")
