"""A clock that a test moves."""

from __future__ import annotations


class FakeClock:
    """Implements :class:`eadt.clock.Clock`; ``sleep`` advances it at once."""

    def __init__(self, monotonic_s: float = 1000.0, unix_s: float = 1_700_000_000.0) -> None:
        self._monotonic_s = monotonic_s
        self._unix_s = unix_s

    def monotonic_s(self) -> float:
        """Fake monotonic seconds."""
        return self._monotonic_s

    def unix_s(self) -> float:
        """Fake wall-clock seconds."""
        return self._unix_s

    def sleep(self, seconds: float) -> None:
        """Advance without waiting."""
        self.advance(seconds)

    def advance(self, seconds: float) -> None:
        """Move both clocks on by ``seconds``."""
        self._monotonic_s += seconds
        self._unix_s += seconds

    def step_unix_s(self, seconds: float) -> None:
        """Set the wall clock forward (or back), as an administrator or a time server does."""
        self._unix_s += seconds
