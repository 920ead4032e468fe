"""The CPU's energy where nothing measures it: a stated model over the machine's utilisation.

P = ``idle_w`` + ``per_core_w`` × busy cores. Both the time and the busy core-seconds are counters, so
the energy is one too: exact for the model however seldom it is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from eadt.clock import Clock
from eadt.node.sensors.base import Component, Reading
from eadt.node.utilisation import CpuTimes, cgroup_core_limit, machine_id, num_cores
from eadt.units import Quality


class CpuEstimateSource:
    """Component ``cpu``, quality ``estimated``.

    Args:
        idle_w: Power of the node's CPU when idle, in W.
        per_core_w: Power that each busy logical core adds, in W.
        clock: Source of time.
        cpu_times: Source of the busy core-seconds.

    Raises:
        DeviceUnsupportedError: The machine does not count CPU time.
    """

    def __init__(self, idle_w: float, per_core_w: float, clock: Clock, cpu_times: CpuTimes) -> None:
        self._idle_w = idle_w
        self._per_core_w = per_core_w
        self._clock = clock
        self._cpu_times = cpu_times
        self._first_s = clock.monotonic_s()
        self._first_busy_s = cpu_times.busy_core_seconds()
        self._component = Component(
            name="cpu",
            source="cpu_estimate",
            quality=Quality.ESTIMATED,
            detail=_detail(idle_w, per_core_w),
            identity=f"{machine_id() or 'machine'}/cpu",
        )

    @property
    def components(self) -> tuple[Component, ...]:
        """See :class:`eadt.node.sensors.PowerSource`."""
        return (self._component,)

    def read(self) -> Sequence[Reading]:
        """See :class:`eadt.node.sensors.PowerSource`."""
        busy_s = self._cpu_times.busy_core_seconds() - self._first_busy_s
        at_s = self._clock.monotonic_s()
        energy_j = self._idle_w * (at_s - self._first_s) + self._per_core_w * busy_s
        return [Reading(self._component, at_s, energy_j=energy_j)]

    def close(self) -> None:
        """See :class:`eadt.node.sensors.PowerSource`."""
        self._cpu_times.close()


def _detail(idle_w: float, per_core_w: float) -> str:
    detail = (
        f"cpu: estimated as {idle_w:g} W + {per_core_w:g} W per busy core, of {num_cores()} cores of the "
        "whole machine (the work of other programs on it is in it)"
    )
    limit = cgroup_core_limit()
    if limit is not None and limit < num_cores():
        detail += (
            f"; this container may use {limit:g} of them, but the machine's idle power is counted in full"
        )
    return detail
