"""What a power source answers, and the one interface of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from eadt.clock import Clock
from eadt.errors import EadtError
from eadt.units import Quality


@dataclass(frozen=True, slots=True)
class Component:
    """One metered part of a node.

    Attributes:
        name: ``cpu``, ``dram`` or ``gpu<index>``; unique on its node.
        source: Where its readings come from: ``nvml_energy_counter``, ``nvml_power``, ``rapl``,
            ``cpu_estimate``, ``simulated`` or ``none``.
        quality: How far they can be trusted; ``None`` when there are none at all.
        detail: One sentence on how, with the known error.
        identity: Names the hardware itself, the same from wherever it is seen, so that two Ray nodes on
            one machine do not both book it.
        resolution_s: Phases shorter than this (s) two readings cannot tell apart. 0: no such limit.
        honest_window_s: A mean over less than this (s) is biased. 0: no such limit.
        relative_uncertainty: Stated error of the source over long windows, a fraction; ``None``: not known.
        greatest_power_w: What it cannot exceed, in W: a counter that grows faster has jumped. ``None``: not
            known, and not checked.
    """

    name: str
    source: str
    quality: Quality | None
    detail: str
    identity: str
    resolution_s: float = 0.0
    honest_window_s: float = 0.0
    relative_uncertainty: float | None = None
    greatest_power_w: float | None = None

    @property
    def is_gpu(self) -> bool:
        """Whether this is a training device rather than a part of the host."""
        return self.name.startswith("gpu")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the ledger's ``node`` row."""
        return {
            "component": self.name,
            "source": self.source,
            "quality": None if self.quality is None else str(self.quality),
            "detail": self.detail,
            "identity": self.identity,
            "resolution_s": self.resolution_s,
            "relative_uncertainty": self.relative_uncertainty,
        }


def unknown_gpu(name: str, why: str, identity: str) -> Component:
    """A card that is there but that nothing here can measure: it draws power, so it is never left out.

    Args:
        name: ``gpu<index>``.
        why: Why nothing can, as the part of a sentence after "its energy is unknown:".
        identity: Names the hardware, as in :class:`Component`.
    """
    return Component(name, "none", None, f"{name}: its energy is unknown: {why}", identity)


class Reading(NamedTuple):
    """One component at one moment. With neither energy nor power it says "unknown".

    Attributes:
        component: Whose reading.
        at_s: Monotonic s at which it was taken.
        energy_j: A counter's value in J, its origin arbitrary; ``None`` where there is no counter.
        power_w: Momentary power in W; ``None`` where the counter makes it unnecessary.
        failure: Why the reading is unknown.
        series: Readings of two series have nothing to do with each other: the counter began anew.
    """

    component: Component
    at_s: float
    energy_j: float | None = None
    power_w: float | None = None
    failure: EadtError | None = None
    series: int = 0


class PowerSource(Protocol):
    """A sensor of one or more components of this node."""

    @property
    def components(self) -> tuple[Component, ...]:
        """What it can be asked for, fixed for the source's life."""
        ...

    def read(self, component: Component) -> Reading:
        """One device, now.

        Usually takes microseconds, but may block in its driver for ever: only the threads of
        :mod:`eadt.node.readers` call it, never two at a time for one component. Different components are
        read by different threads at once after one of them has hung.

        Raises:
            EadtError: It cannot be read now.
        """
        ...

    def close(self) -> None:
        """Let go of files and libraries. Idempotent. May block like :meth:`read`."""
        ...


class UnmeasuredSource:
    """Components that exist but that nothing here can measure: their energy is unknown, not zero."""

    def __init__(self, components: Sequence[Component], clock: Clock) -> None:
        self._components = tuple(components)
        self._clock = clock

    @property
    def components(self) -> tuple[Component, ...]:
        """See :class:`PowerSource`."""
        return self._components

    def read(self, component: Component) -> Reading:
        """See :class:`PowerSource`."""
        return Reading(component, self._clock.monotonic_s())

    def close(self) -> None:
        """See :class:`PowerSource`."""
