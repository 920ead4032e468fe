"""Turns readings into joules: per component one sum that only grows, and a short history of its power.

Owns: the sums, gaps, extrapolation over what did not answer, and the notes about it. Must not: choose
sources, call a device (:mod:`eadt.node.readers` does, in threads of its own), write files, or know what the
energy was used for (booking splits it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.node.sensors import Component, PowerSource
from eadt.units import Quality

NoteSink = Callable[[str, str], None]
"""Gets (code, text)."""


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


@dataclass(frozen=True, slots=True)
class ComponentTotal:
    """What one component used since the meter's start.

    Attributes:
        energy_j: In J; ``None`` when nothing of it is known.
        known_s: Time covered by it, in s.
        unknown_s: Time for which the energy is not known, in s.
        num_gaps: Counters that began anew or jumped, readings too far apart.
        quality: ``None`` when nothing can measure it.
        source: Where the readings come from.
    """

    energy_j: float | None
    known_s: float
    unknown_s: float
    num_gaps: int
    quality: Quality | None
    source: str


class Meter:
    """Keeps the sums of a node's components. Nothing runs before :meth:`start`.

    Thread-safe. No method calls a device, or waits for one longer than its deadline; a failing device and
    a failing ``on_note`` never raise out of the meter.

    Args:
        sources: What to read; the caller closes them after :meth:`stop`.
        clock: Source of time.
        sampling_interval: Seconds between two readings of each device.
        on_note: Gets (code, text) once when a component becomes unknown (EADT-347) or known again
            (EADT-348), from a thread of the meter's or the caller's.
        read_deadline_s: How long a device may take to answer before it is set aside, in s.
        stale_after_s: How long a silent component's last power is believed, in s.
        history_s: How far back :meth:`mean_power_w` can look, in s.
    """

    def __init__(
        self,
        sources: Sequence[PowerSource],
        clock: Clock = SYSTEM_CLOCK,
        sampling_interval: float = 1.0,
        *,
        on_note: NoteSink | None = None,
        read_deadline_s: float = 1.0,
        stale_after_s: float = 10.0,
        history_s: float = 1800.0,
    ) -> None:
        raise NotImplementedError

    @property
    def components(self) -> list[Component]:
        """What is metered, the unknown included."""
        raise NotImplementedError

    @property
    def is_running(self) -> bool:
        """Whether it reads."""
        raise NotImplementedError

    def start(self) -> None:
        """Read every device from now on, in daemon threads. Starting twice is harmless."""
        raise NotImplementedError

    def stop(self, timeout_s: float = 1.0) -> None:
        """Read once more and end the threads; one that hangs in a driver is left to its call."""
        raise NotImplementedError

    def cut(self) -> tuple[float, dict[str, Point]]:
        """Read every device now; the moment, and a point per component."""
        raise NotImplementedError

    def mean_power_w(self, names: Sequence[str], window_s: float) -> tuple[float, Quality] | None:
        """Mean power over the last ``window_s`` s, summed over ``names``; ``None`` where a part is unknown."""
        raise NotImplementedError

    def totals(self) -> dict[str, ComponentTotal]:
        """Sums since the start, by component."""
        raise NotImplementedError
