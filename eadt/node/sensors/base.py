"""What a power source answers, and the one interface of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
    """

    name: str
    source: str
    quality: Quality | None
    detail: str
    identity: str

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
        }


@dataclass(frozen=True, slots=True)
class Reading:
    """One component at one moment. With neither energy nor power it says "unknown".

    Attributes:
        component: Whose reading.
        at_s: Monotonic s at which it was taken.
        energy_j: A counter's value in J, its origin arbitrary; ``None`` where there is no counter.
        power_w: Momentary power in W; ``None`` where the counter makes it unnecessary.
        failure: Why the reading is unknown.
    """

    component: Component
    at_s: float
    energy_j: float | None = None
    power_w: float | None = None
    failure: EadtError | None = None


class PowerSource(Protocol):
    """A sensor of one or more components of this node."""

    @property
    def components(self) -> tuple[Component, ...]:
        """The components that every :meth:`read` answers, fixed for the source's life."""
        ...

    def read(self) -> Sequence[Reading]:
        """One reading per component, now.

        Takes milliseconds at most; not thread-safe (the meter calls it under a lock). A component that
        cannot be read is answered as unknown with its failure, and does not spoil the others.

        Raises:
            EadtError: Nothing could be read at all.
        """
        ...

    def close(self) -> None:
        """Let go of files and libraries. Idempotent."""
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

    def read(self) -> Sequence[Reading]:
        """See :class:`PowerSource`."""
        at_s = self._clock.monotonic_s()
        return [Reading(component, at_s) for component in self._components]

    def close(self) -> None:
        """See :class:`PowerSource`."""
