"""How this node's cards do: utilisation, memory, temperature, clock, throttling, and who else is there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from eadt.adapters.nvml import ComputeProcess, NvmlGpu
from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.record.rows import DevicesRow


@dataclass(frozen=True, slots=True)
class CardLook:
    """One card at one moment; each value ``None`` where it is unknown."""

    utilisation_fraction: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    throttle_reasons: frozenset[str] | None = None
    foreign_processes: int | None = None


def look_at(gpu: NvmlGpu, count_foreign: Callable[[Sequence[ComputeProcess]], int | None]) -> CardLook:
    """Look at one card through NVML; what cannot be read is ``None``. Raises nothing of NVML's."""
    raise NotImplementedError


class CardStates:
    """Looks at each card of this run now and then, each in its own thread, and sums up. Thread-safe.

    Args:
        look: Looks at the card of that name (``gpu0``); may block, may raise
            :class:`eadt.errors.EadtError`.
        clock: Source of time.
        interval_s: Seconds between two looks at a card.
    """

    def __init__(
        self, look: Callable[[str], CardLook], clock: Clock = SYSTEM_CLOCK, interval_s: float = 10.0
    ) -> None:
        raise NotImplementedError

    def set_cards(self, names: Collection[str]) -> None:
        """Which cards to look at from now on: those that this run's hosts were given."""
        raise NotImplementedError

    def start(self) -> None:
        """Begin to look. Idempotent."""
        raise NotImplementedError

    def stop(self) -> None:
        """End looking; does not wait for a look that hangs. Idempotent."""
        raise NotImplementedError

    def look(self, name: str) -> None:
        """One look at one card, now."""
        raise NotImplementedError

    def take(self, node: str) -> DevicesRow | None:
        """What was seen since the last take, as a row; ``None`` where nothing was."""
        raise NotImplementedError
