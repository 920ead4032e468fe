"""The only door to time. Durations come from the monotonic clock, never from the wall clock.

On one machine the monotonic clock is shared by all processes; between machines it is not, so a
monotonic time only ever leaves its node together with that node's :func:`anchor`.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Source of time; a test passes :class:`eadt.testing.clock.FakeClock`. Thread-safe."""

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary origin, never going backwards."""
        ...

    def unix_s(self) -> float:
        """Seconds since 1970-01-01 UTC, for display and for joining with outside data."""
        ...

    def sleep(self, seconds: float) -> None:
        """Block for ``seconds``."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic_s(self) -> float:
        """See :class:`Clock`."""
        return time.monotonic()  # noqa: TID251

    def unix_s(self) -> float:
        """See :class:`Clock`."""
        return time.time()  # noqa: TID251

    def sleep(self, seconds: float) -> None:
        """See :class:`Clock`."""
        time.sleep(seconds)


SYSTEM_CLOCK = SystemClock()


def monotonic_s() -> float:
    """Monotonic seconds of this machine."""
    return SYSTEM_CLOCK.monotonic_s()


def unix_s() -> float:
    """Wall-clock seconds since 1970."""
    return SYSTEM_CLOCK.unix_s()


def anchor(clock: Clock = SYSTEM_CLOCK) -> dict[str, float]:
    """One pair of (monotonic, wall) readings, by which a node's monotonic times can be placed."""
    return {"monotonic_s": clock.monotonic_s(), "unix_s": clock.unix_s()}
