"""The CPU's energy where nothing measures it: a stated model over the machine's utilisation.

P = ``idle_w`` + ``per_core_w`` × busy cores. Both the time and the busy core-seconds are counters, so
the energy is one too: exact for the model however seldom it is read.
"""

from __future__ import annotations

from pathlib import Path

from eadt.clock import Clock
from eadt.node.sensors.base import Component, Reading
from eadt.node.sensors.cpu_models import CpuPower, cpu_power
from eadt.node.utilisation import CpuTimes, cgroup_core_limit, machine_id, num_cores
from eadt.units import Quality

CPU_INFO = Path("/proc/cpuinfo")

_RESOLUTION_S = 0.01  # one tick, in which the kernel counts busy time


class CpuEstimateSource:
    """Component ``cpu``, quality ``estimated``.

    Args:
        idle_w: Power of the machine's CPUs when idle, in W; ``None``: from the table of CPU families.
        per_core_w: Power that each busy logical core adds, in W; ``None``: from the same table.
        clock: Source of time.
        cpu_times: Source of the busy core-seconds.
        cpu_info: The file that says which CPU it is.

    Raises:
        DeviceUnsupportedError: The machine does not count CPU time.
    """

    def __init__(
        self,
        idle_w: float | None,
        per_core_w: float | None,
        clock: Clock,
        cpu_times: CpuTimes,
        cpu_info: Path = CPU_INFO,
    ) -> None:
        model = _model(idle_w, per_core_w, cpu_info)
        self._idle_w = model.idle_w
        self._per_core_w = model.per_core_w
        self._clock = clock
        self._cpu_times = cpu_times
        self._first_s = clock.monotonic_s()
        self._first_busy_s = cpu_times.busy_core_seconds()
        self._component = Component(
            name="cpu",
            source="cpu_estimate",
            quality=Quality.ESTIMATED,
            detail=_detail(model),
            identity=f"{machine_id() or 'machine'}/cpu",
            resolution_s=_RESOLUTION_S,
            relative_uncertainty=model.relative_uncertainty,
        )

    @property
    def components(self) -> tuple[Component, ...]:
        """See :class:`eadt.node.sensors.PowerSource`."""
        return (self._component,)

    def read(self, component: Component) -> Reading:
        """See :class:`eadt.node.sensors.PowerSource`."""
        busy_s = self._cpu_times.busy_core_seconds() - self._first_busy_s
        at_s = self._clock.monotonic_s()
        energy_j = self._idle_w * (at_s - self._first_s) + self._per_core_w * busy_s
        return Reading(component, at_s, energy_j=energy_j)

    def close(self) -> None:
        """See :class:`eadt.node.sensors.PowerSource`."""
        self._cpu_times.close()


def _model(idle_w: float | None, per_core_w: float | None, cpu_info: Path) -> CpuPower:
    """The configured values, and the table's where there are none.

    How good values are that the user gave, only the user knows: with both, the uncertainty is unknown.
    """
    if idle_w is not None and per_core_w is not None:
        return CpuPower(idle_w, per_core_w, None, "as configured; how far that is off is not known")
    try:
        text = cpu_info.read_text(errors="replace")
    except OSError:
        text = ""
    table = cpu_power(text, num_cores())
    basis = table.basis
    if idle_w is not None or per_core_w is not None:
        basis += f"; the {'idle' if idle_w is not None else 'busy core'}'s as configured"
    return CpuPower(
        idle_w=table.idle_w if idle_w is None else idle_w,
        per_core_w=table.per_core_w if per_core_w is None else per_core_w,
        relative_uncertainty=table.relative_uncertainty,
        basis=basis,
    )


def _detail(model: CpuPower) -> str:
    detail = f"cpu: estimated as {model.idle_w:.3g} W + {model.per_core_w:.3g} W per busy core"
    if model.relative_uncertainty is not None:
        detail += f", each ± {model.relative_uncertainty:.0%}"
    detail += f" ({model.basis}), over the {num_cores()} cores of the whole machine: others' work is in it"
    limit = cgroup_core_limit()
    if limit is not None and limit < num_cores():
        detail += (
            f"; this container may use {limit:g} of them, but the machine's idle power is counted in full"
        )
    return detail
