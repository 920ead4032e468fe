"""How cards did over the run.

Owns the means and extremes of what was looked at each minute. A mean is weighted by time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from eadt.record.books.gaps import TOUCHING_S
from eadt.record.books.unusable import check_interval, check_lengths, finite
from eadt.record.figures import DeviceTally
from eadt.record.rows import DevicesRow

_Number = TypeVar("_Number", int, float)


class Mean(msgspec.Struct):
    """A mean over the time in which it is known."""

    seconds: float = 0.0
    integral: float = 0.0

    def add(self, value: float | None, seconds: float) -> None:
        """Add what held for some seconds; unknown adds nothing."""
        if (known := finite(value)) is not None:
            self.seconds += seconds
            self.integral += known * seconds

    @property
    def value(self) -> float | None:
        """The mean; ``None``: never known."""
        return self.integral / self.seconds if self.seconds > 0 else None


class Device(msgspec.Struct):
    """One card."""

    node: str
    component: str
    seconds: float = 0.0
    utilisation: Mean = msgspec.field(default_factory=Mean)
    sm_clock: Mean = msgspec.field(default_factory=Mean)
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_c: float | None = None
    throttled_s: dict[str, float] = {}
    foreign_processes: int | None = None

    def tally(self) -> DeviceTally:
        """As a figure."""
        return DeviceTally(
            node=self.node,
            component=self.component,
            seconds=self.seconds,
            utilisation_fraction=self.utilisation.value,
            memory_used_bytes=self.memory_used_bytes,
            memory_total_bytes=self.memory_total_bytes,
            temperature_c=self.temperature_c,
            sm_clock_mhz=self.sm_clock.value,
            throttled={
                reason: seconds / self.seconds
                for reason, seconds in sorted(self.throttled_s.items())
                if self.seconds > 0
            },
            foreign_processes=self.foreign_processes,
        )


class DeviceBook(msgspec.Struct):
    """All cards, by node and component; ``ends`` says up to where each node looked, node time."""

    devices: dict[str, Device] = {}
    ends: dict[str, float] = {}

    def add(self, row: DevicesRow) -> bool:
        """Book a minute. Returns whether it had not been delivered before.

        Raises:
            Unusable: The row makes no sense.
        """
        seconds = check_interval(row.t0, row.t1)
        columns: tuple[tuple[str, Sequence[object]], ...] = (
            ("utilisation_fraction", row.utilisation_fraction),
            ("memory_used_bytes", row.memory_used_bytes),
            ("memory_total_bytes", row.memory_total_bytes),
            ("temperature_c", row.temperature_c),
            ("sm_clock_mhz", row.sm_clock_mhz),
            ("throttled", row.throttled),
            ("foreign_processes", row.foreign_processes),
        )
        check_lengths(len(row.components), ((name, len(values)) for name, values in columns))
        end = self.ends.get(row.node)
        if end is not None and row.t0 < end - TOUCHING_S:
            return False
        self.ends[row.node] = max(row.t1, end or row.t1)
        for place, component in enumerate(row.components):
            device = self.devices.setdefault(f"{row.node}/{component}", Device(row.node, component))
            device.seconds += seconds
            device.utilisation.add(row.utilisation_fraction[place], seconds)
            device.sm_clock.add(row.sm_clock_mhz[place], seconds)
            device.memory_used_bytes = _most(device.memory_used_bytes, row.memory_used_bytes[place])
            device.memory_total_bytes = _most(device.memory_total_bytes, row.memory_total_bytes[place])
            device.temperature_c = _most(device.temperature_c, finite(row.temperature_c[place]))
            device.foreign_processes = _most(device.foreign_processes, row.foreign_processes[place])
            for reason, fraction in row.throttled[place].items():
                if 0.0 <= fraction <= 1.0:
                    throttled_s = device.throttled_s.get(reason, 0.0) + fraction * seconds
                    device.throttled_s[reason] = throttled_s
        return True

    def begin_time_anew(self, node: str | None = None) -> None:
        """Node time begins anew, of one node or of all."""
        if node is None:
            self.ends.clear()
        else:
            self.ends.pop(node, None)


def _most(one: _Number | None, other: _Number | None) -> _Number | None:
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)
