"""One component's sum of energy: what readings made known, what a silence makes believe, what is a gap.

Owns: the arithmetic of one component. Pure but for its state; whoever uses it holds a lock.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from eadt.node.sensors import Component, Reading
from eadt.units import Quality

# Two readings of a counter at almost one moment may differ by a step of the counter, in J: RAPL's 1 ms at
# 1 kW is 1 J. What a coarser counter may lag behind by is in its component's resolution.
_COUNTER_STEP_J = 2.0
# Entries of the history, or up to twice as many: about one a second of its usual half hour.
_NUM_HISTORY = 1800
# Less time than this without a value is rounding.
_ROUNDING_S = 1e-6


@dataclass(frozen=True, slots=True)
class Point:
    """One component at one moment, cumulative since the meter's start.

    The difference of two points is what was used between them; differences add up exactly.

    Attributes:
        at_s: Monotonic moment that it stands for, the cut's.
        energy_j: J so far; never decreases.
        known_s: Seconds that ``energy_j`` covers. Grows by less than the time where something is unknown;
            by more where a counter that went on tells afterwards what was unknown before: the unknown
            seconds of an interval are ``max(0, elapsed - grown)``.
        quality: Of what was added since the previous point; ``STALE`` where it was extrapolated, ``None``
            where nothing was known.
        why_unknown: Why a part since the previous point is unknown; empty while all is known.
    """

    at_s: float
    energy_j: float
    known_s: float
    quality: Quality | None
    why_unknown: str = ""


class Track:
    """See the module.

    Args:
        component: Whose.
        start_s: Moment from which its energy is to be known.
        stale_after_s: How long its last power is believed while it is silent, in s.
        most_trapezoid_s: Two power readings further apart say nothing about the time between them, in s.
        history_s: How far back :meth:`mean_power_w` can look, in s.
    """

    def __init__(
        self,
        component: Component,
        start_s: float,
        *,
        stale_after_s: float,
        most_trapezoid_s: float,
        history_s: float,
    ) -> None:
        self.component = component
        self.start_s = start_s
        self.num_gaps = 0
        self.is_unknown = False
        self._stale_after_s = stale_after_s
        self._most_trapezoid_s = most_trapezoid_s
        self._history_s = history_s
        self._grain_s = history_s / _NUM_HISTORY
        self._resolution_s = component.resolution_s
        self._greatest_power_w = component.greatest_power_w
        # What readings made known, up to the last of them; None before the first.
        self.last_s: float | None = None
        self.energy_j = 0.0
        self.known_s = 0.0
        # The last reading, and where its counter's present stretch without a gap began.
        self._last: Reading | None = None
        self._base = (0.0, 0.0, 0.0, 0.0)  # at, counter, energy, known
        # The furthest that points have said.
        self._given = Point(start_s, 0.0, 0.0, None)
        # The moment that the next reading is to say something about, and what it said: energy, known.
        self._mark_s: float | None = None
        self._marked: tuple[float, float] | None = None
        self._gap = ""
        self._failure = ""
        # (moment of a reading, energy, known), oldest first, about evenly spaced.
        self._history: deque[tuple[float, float, float]] = deque()

    # -- readings -------------------------------------------------------------------------------

    def add(self, reading: Reading) -> str:
        """Take a reading in.

        Returns:
            What is wrong with it, where its counter began anew or jumped; else empty.
        """
        value = reading.power_w if reading.energy_j is None else reading.energy_j
        if value is None or not math.isfinite(value):
            self._failure = f"it reads {value}" if reading.failure is None else reading.failure.what
            return ""
        at_s, last_s, last = reading.at_s, self.last_s, self._last
        if last_s is not None and at_s <= last_s:
            return ""
        before_j, before_known_s = self.energy_j, self.known_s
        trouble = ""
        if last is None or last_s is None:
            self._begin_stretch(reading)
        else:
            trouble = self._trouble(last, reading)
            if trouble:
                # What was believed during a silence stays; nothing is added to it.
                self.energy_j = max(self.energy_j, self._given.energy_j)
                self.known_s = max(self.known_s, self._given.known_s)
                self.num_gaps += 1
                self._gap = trouble
                self._begin_stretch(reading)
            elif reading.energy_j is not None:
                # From the stretch's beginning: no sum of roundings.
                base_s, counter_j, base_j, base_known_s = self._base
                self.energy_j = base_j + (reading.energy_j - counter_j)
                self.known_s = base_known_s + (at_s - base_s)
            elif reading.power_w is not None and last.power_w is not None:
                self.energy_j += 0.5 * (reading.power_w + last.power_w) * (at_s - last_s)
                self.known_s = self._base[3] + (at_s - self._base[0])
        if self._mark_s is not None and self._marked is None and at_s >= self._mark_s:
            self._marked = (before_j, before_known_s)
            if last_s is not None and at_s > last_s:
                part = max(self._mark_s - last_s, 0.0) / (at_s - last_s)
                self._marked = (
                    before_j + part * (self.energy_j - before_j),
                    before_known_s + part * (self.known_s - before_known_s),
                )
        self._failure = ""
        self._last = reading
        self.last_s = at_s
        self._remember(at_s)
        return trouble if reading.energy_j is not None else ""

    def _begin_stretch(self, reading: Reading) -> None:
        self._base = (reading.at_s, reading.energy_j or 0.0, self.energy_j, self.known_s)

    def _trouble(self, last: Reading, reading: Reading) -> str:
        """Why the energy between two readings is not known; empty where it is."""
        elapsed_s = reading.at_s - last.at_s
        if reading.energy_j is None or last.energy_j is None:
            if elapsed_s <= self._most_trapezoid_s:
                return ""
            return f"its power was not read for {elapsed_s:.0f} s"
        grown_j = reading.energy_j - last.energy_j
        if grown_j < 0.0 or reading.series != last.series:
            return "its energy counter began anew (driver or device reset)"
        if self._greatest_power_w is None:
            return ""
        most_j = self._greatest_power_w * (elapsed_s + self._resolution_s) + _COUNTER_STEP_J
        if grown_j > most_j:
            return (
                f"its energy counter jumped by {grown_j:.0f} J in {elapsed_s:.2f} s, "
                f"more than it can draw ({self._greatest_power_w:.0f} W)"
            )
        return ""

    def _remember(self, at_s: float) -> None:
        history = self._history
        entry = (at_s, self.energy_j, self.known_s)
        if len(history) > 1 and at_s - history[-2][0] < self._grain_s:
            history[-1] = entry
            return
        history.append(entry)
        while len(history) > 2 and history[1][0] < at_s - self._history_s:
            history.popleft()

    # -- points ---------------------------------------------------------------------------------

    def mark(self, at_s: float) -> None:
        """The next point is for this moment: the first reading after it decides."""
        self._mark_s = at_s
        self._marked = None

    def point(self, at_s: float, why_silent: str = "") -> Point:
        """The point at the mark, or now.

        Args:
            at_s: Moment, not before the last point's.
            why_silent: Why there was no reading, where the caller knows.
        """
        energy_j, known_s, is_read = self._at(at_s)
        given = self._given
        point_j, point_known_s = max(energy_j, given.energy_j), max(known_s, given.known_s)
        grown_s, elapsed_s = point_known_s - given.known_s, at_s - given.at_s
        quality = self.component.quality
        if grown_s <= 0.0 and elapsed_s > 0.0:
            quality = None
        elif not is_read or energy_j < given.energy_j:
            # Extrapolated, or still paying back what was extrapolated too high.
            quality = Quality.STALE
        why = ""
        if elapsed_s - grown_s > _ROUNDING_S:
            why = self._gap or self.why_silent(why_silent)
        if is_read:
            self._gap = ""
        self._mark_s = self._marked = None
        self._given = Point(at_s, point_j, point_known_s, quality, why)
        return self._given

    def why_silent(self, why: str = "") -> str:
        """Why there is no reading."""
        if self.component.quality is None:
            return self.component.detail
        return why or self._failure or ("it was not read yet" if self._last is None else "it was not read")

    def _at(self, at_s: float) -> tuple[float, float, bool]:
        """Energy, known seconds, and whether readings say so, at a moment that is not long ago."""
        if self.last_s is None:
            return 0.0, 0.0, False
        if self._marked is not None:
            return *self._marked, True
        ahead_s = at_s - self.last_s
        if ahead_s <= 0.0:
            return self.energy_j, self.known_s, True
        power_w = self._last_power_w()
        if power_w is None:
            return self.energy_j, self.known_s, False
        believed_s = min(ahead_s, self._stale_after_s)
        return self.energy_j + power_w * believed_s, self.known_s + believed_s, False

    def _last_power_w(self) -> float | None:
        """Mean power over the shortest honest window before the last reading."""
        history = self._history
        if len(history) > 1:
            last_s, last_j, last_known_s = history[-1]
            from_j, from_known_s = history[-2][1], history[-2][2]
            for at_s, energy_j, known_s in reversed(history):
                from_j, from_known_s = energy_j, known_s
                if last_s - at_s >= max(self.component.honest_window_s, self._grain_s):
                    break
            if last_known_s > from_known_s:
                return (last_j - from_j) / (last_known_s - from_known_s)
        return None if self._last is None else self._last.power_w

    # -- being asked ----------------------------------------------------------------------------

    def silent_s(self, now_s: float) -> float:
        """Since when there is no reading, in s."""
        return now_s - (self.start_s if self.last_s is None else self.last_s)

    def mean_power_w(self, now_s: float, window_s: float, fresh_s: float) -> tuple[float, bool] | None:
        """Mean power in W, and whether it is of the present.

        Args:
            now_s: The window's end, unless the last reading is not long before it.
            window_s: Its length.
            fresh_s: A reading younger than this is of the present.

        Returns:
            ``None`` where less than half of the window is known.
        """
        if not self._history:
            return None
        end_s, end_j, end_known_s = self._history[-1]
        silent_s = now_s - end_s
        from_s = (end_s if silent_s <= self._stale_after_s else now_s) - window_s
        later = self._history[-1]
        from_j, from_known_s = self._history[0][1], self._history[0][2]
        for entry in reversed(self._history):
            if entry[0] <= from_s:
                part = (from_s - entry[0]) / (later[0] - entry[0]) if later[0] > entry[0] else 1.0
                from_j = entry[1] + part * (later[1] - entry[1])
                from_known_s = entry[2] + part * (later[2] - entry[2])
                break
            later = entry
        known_s = end_known_s - from_known_s
        if known_s <= 0.0 or known_s < 0.5 * window_s:
            return None
        return (end_j - from_j) / known_s, silent_s <= fresh_s

    def total(self) -> tuple[float, float, float]:
        """Energy in J, known seconds and all seconds since the start, as far as readings and points say."""
        until_s = max(self._given.at_s, self.start_s if self.last_s is None else self.last_s)
        energy_j, known_s = max(self.energy_j, self._given.energy_j), max(self.known_s, self._given.known_s)
        return energy_j, known_s, until_s - self.start_s
