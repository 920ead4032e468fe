"""How this node's cards do: utilisation, memory, temperature, clock, throttling, and who else is there.

Owns: the looks at the cards, each in its own thread, and their summary of about a minute. Must not: measure
energy, or say in words what the figures mean.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import TypeVar

from eadt.adapters.nvml import ComputeProcess, NvmlGpu
from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.errors import EadtError
from eadt.record.rows import DevicesRow

T = TypeVar("T")
N = TypeVar("N", int, float)

CountForeign = Callable[[str, Sequence[ComputeProcess]], int | None]
"""How many of a card's processes are others', by the card's name; ``None``: not known."""


@dataclass(frozen=True, slots=True)
class CardLook:
    """One card at one moment; each value ``None`` where it is unknown.

    Attributes:
        utilisation_fraction: Fraction of the driver's last sampling period in which a kernel ran.
        memory_used_bytes: Device memory in use.
        memory_total_bytes: All of it.
        temperature_c: Of the GPU's core, in °C.
        sm_clock_mhz: Clock of the SMs, in MHz.
        throttle_reasons: Why it is slowed, in the words of ``NvmlGpu.throttle_reasons``; empty: it is not.
        foreign_processes: Processes on it that are not this run's.
    """

    utilisation_fraction: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    throttle_reasons: frozenset[str] | None = None
    foreign_processes: int | None = None


def look_at(gpu: NvmlGpu, count_foreign: Callable[[Sequence[ComputeProcess]], int | None]) -> CardLook:
    """Look at one card through NVML; what cannot be read now is ``None``. May block in the driver."""
    memory = _known(gpu.memory)
    processes = _known(gpu.compute_processes)
    return CardLook(
        utilisation_fraction=_known(gpu.utilisation_fraction),
        memory_used_bytes=None if memory is None else memory.used_bytes,
        memory_total_bytes=None if memory is None else memory.total_bytes,
        temperature_c=_known(gpu.temperature_c),
        sm_clock_mhz=_known(gpu.sm_clock_mhz),
        throttle_reasons=_known(gpu.throttle_reasons),
        foreign_processes=None if processes is None else count_foreign(processes),
    )


def nvml_looks(gpus: Mapping[str, NvmlGpu], count_foreign: CountForeign) -> Callable[[str], CardLook]:
    """What :class:`CardStates` looks with, where NVML knows the cards; of others everything is unknown.

    Args:
        gpus: The cards, by name (``gpu0``).
        count_foreign: Counts others' processes; called in the threads that look.
    """

    def look(name: str) -> CardLook:
        gpu = gpus.get(name)
        return CardLook() if gpu is None else look_at(gpu, partial(count_foreign, name))

    return look


@dataclass
class _Card:
    """What was seen of one card since the last take."""

    is_wanted: bool = True
    has_thread: bool = False
    wake: threading.Event = field(default_factory=threading.Event)
    looks: list[CardLook] = field(default_factory=list)


class CardStates:
    """Looks at each card of this run now and then, each in its own thread, and sums up. Thread-safe.

    A look that hangs ends the looks at that card until it returns, and nobody else's; what is not seen
    is unknown.

    Args:
        look: Looks at the card of that name (``gpu0``). May block; if it raises, all of that look is unknown.
        clock: Source of time.
        interval_s: Seconds between two looks at a card.
    """

    def __init__(
        self, look: Callable[[str], CardLook], clock: Clock = SYSTEM_CLOCK, interval_s: float = 10.0
    ) -> None:
        self._look = look
        self._clock = clock
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._is_running = False
        self._cards: dict[str, _Card] = {}
        self._since_s = clock.monotonic_s()

    def set_cards(self, names: Collection[str]) -> None:
        """Which cards to look at from now on: those that this run's hosts were given."""
        with self._lock:
            for name in names:
                self._cards.setdefault(name, _Card())
            for name, card in self._cards.items():
                card.is_wanted = name in names
                if not card.is_wanted:
                    card.wake.set()
            self._start_threads()

    def start(self) -> None:
        """Begin to look. Idempotent."""
        with self._lock:
            self._is_running = True
            self._start_threads()

    def stop(self) -> None:
        """End looking; does not wait for a look that hangs. Idempotent."""
        with self._lock:
            self._is_running = False
            for card in self._cards.values():
                card.wake.set()

    def look(self, name: str) -> None:
        """One look at one card, now; blocks as long as the driver does. What its threads do."""
        try:
            seen = self._look(name)
        except Exception:  # monitoring is never in training's way, whatever its driver answers
            seen = CardLook()
        with self._lock:
            card = self._cards.get(name)
            if card is not None and card.is_wanted:
                card.looks.append(seen)

    def take(self, node: str) -> DevicesRow | None:
        """What was seen since the last take, as a row of that node; ``None`` where nothing was."""
        with self._lock:
            t0, t1 = self._since_s, self._clock.monotonic_s()
            self._since_s = t1
            looks = {name: card.looks for name, card in self._cards.items() if card.is_wanted or card.looks}
            for card in self._cards.values():
                card.looks = []
        if all(look == CardLook() for seen in looks.values() for look in seen):
            return None
        return DevicesRow(
            node=node,
            t0=t0,
            t1=t1,
            components=list(looks),
            utilisation_fraction=[
                _mean(look.utilisation_fraction for look in seen) for seen in looks.values()
            ],
            memory_used_bytes=[_most(look.memory_used_bytes for look in seen) for seen in looks.values()],
            memory_total_bytes=[_most(look.memory_total_bytes for look in seen) for seen in looks.values()],
            temperature_c=[_most(look.temperature_c for look in seen) for seen in looks.values()],
            sm_clock_mhz=[_mean(look.sm_clock_mhz for look in seen) for seen in looks.values()],
            throttled=[_throttled(seen) for seen in looks.values()],
            foreign_processes=[_most(look.foreign_processes for look in seen) for seen in looks.values()],
        )

    def _start_threads(self) -> None:
        for name, card in self._cards.items():
            if self._is_running and card.is_wanted and not card.has_thread:
                card.has_thread = True
                target = partial(self._look_on, name, card)
                threading.Thread(target=target, name=f"eadt-look-{name}", daemon=True).start()

    def _look_on(self, name: str, card: _Card) -> None:
        while True:
            with self._lock:
                card.wake.clear()
                if not (self._is_running and card.is_wanted):
                    card.has_thread = False
                    return
            self.look(name)
            card.wake.wait(self._interval_s)


def _known(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except EadtError:
        return None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(fmean(known), 4) if known else None


def _most(values: Iterable[N | None]) -> N | None:
    return max((value for value in values if value is not None), default=None)


def _throttled(looks: Sequence[CardLook]) -> dict[str, float]:
    known = [look.throttle_reasons for look in looks if look.throttle_reasons is not None]
    counts = Counter(reason for reasons in known for reason in reasons)
    return {reason: round(count / len(known), 4) for reason, count in sorted(counts.items())}
