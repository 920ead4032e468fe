"""What the whole job's time is for: adjoining stretches of session time, each with one use.

Rank 0's node speaks for the job. Owns the stretch that is open; writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from eadt.record.rows import TimeRow


@dataclass
class _Stretch:
    use: str
    since_s: float
    step: int
    generation: int
    setting: int
    input_s: float = 0.0


class JobTime:
    """See the module. Begins with ``startup`` at session time 0."""

    def __init__(self) -> None:
        self._open = _Stretch("startup", 0.0, 0, 0, 0)

    @property
    def use(self) -> str:
        """What the job's time is for now."""
        return self._open.use

    def become(self, use: str, at_s: float, step: int, generation: int, setting: int) -> TimeRow | None:
        """From ``at_s`` on the time is for ``use``; returns the stretch that this ends, if it took any time.

        A moment before the open stretch's begin, as of an event that came late, counts as its begin.
        """
        ended = self._ended(at_s)
        begun_s = self._open.since_s if ended is None else ended.t1_s
        self._open = _Stretch(use, begun_s, step, generation, setting)
        return ended

    def cut(self, at_s: float, step: int) -> TimeRow | None:
        """End the stretch and go on with the same use."""
        before = self._open
        return self.become(before.use, at_s, step, before.generation, before.setting)

    def age_s(self, at_s: float) -> float:
        """For how long the stretch has been open."""
        return at_s - self._open.since_s

    def waited_for_input(self, seconds: float) -> None:
        """So much of the open stretch was spent waiting for data."""
        self._open.input_s += seconds

    def _ended(self, at_s: float) -> TimeRow | None:
        stretch = self._open
        seconds = at_s - stretch.since_s
        if seconds <= 0.0:
            return None
        shared = {}
        if stretch.use == "useful" and stretch.input_s > 0.0:
            shared["input"] = round(min(stretch.input_s / seconds, 1.0), 6)
        return TimeRow(
            use=stretch.use,
            t0_s=stretch.since_s,
            t1_s=at_s,
            step=stretch.step,
            generation=stretch.generation,
            setting=stretch.setting,
            shared=shared,
        )
