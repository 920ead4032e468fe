"""GPUs through NVML: the energy counter where there is one, else power for the meter to integrate."""

from __future__ import annotations

from collections.abc import Sequence

from eadt.adapters.nvml import Nvml, NvmlGpu
from eadt.clock import Clock
from eadt.errors import EadtError
from eadt.node.sensors.base import Component, Reading
from eadt.units import Quality

# The power field's blind spot is from Yang, Adámek, Armour, "Part-time Power Measurements: nvidia-smi's Lack
# of Attention", arXiv:2312.02741; the counter's step and its error over short windows from our design notes.
_COUNTER_DETAIL = "the card's energy counter; it steps every 100 ms, so trust differences from 5 s on"
_POWER_DETAIL = (
    "the card's power, integrated by the trapezoid rule; some cards sample it a quarter of the time, so "
    "short bursts can be missed or counted several times"
)


class NvmlSource:
    """The GPUs of this node. One that can be read neither way is answered as unknown, never left out.

    Args:
        nvml: An open library; closed with this source.
        gpus: The GPUs to meter.
        clock: Source of time.
    """

    def __init__(self, nvml: Nvml, gpus: Sequence[NvmlGpu], clock: Clock) -> None:
        self._nvml = nvml
        self._clock = clock
        self._gpus: list[tuple[NvmlGpu, Component]] = [(gpu, _describe(gpu)) for gpu in gpus]
        self._components = tuple(component for _gpu, component in self._gpus)

    @property
    def components(self) -> tuple[Component, ...]:
        """See :class:`eadt.node.sensors.PowerSource`."""
        return self._components

    @property
    def num_readable(self) -> int:
        """GPUs whose energy or power can be read."""
        return sum(component.quality is not None for component in self._components)

    def read(self) -> Sequence[Reading]:
        """See :class:`eadt.node.sensors.PowerSource`."""
        return [self._read_one(gpu, component) for gpu, component in self._gpus]

    def _read_one(self, gpu: NvmlGpu, component: Component) -> Reading:
        try:
            if component.source == "nvml_energy_counter":
                energy_j = gpu.energy_j()
                return Reading(component, self._clock.monotonic_s(), energy_j=energy_j)
            if component.source == "nvml_power":
                power_w = gpu.power_w()
                return Reading(component, self._clock.monotonic_s(), power_w=power_w)
        except EadtError as error:
            return Reading(component, self._clock.monotonic_s(), failure=error)
        return Reading(component, self._clock.monotonic_s())

    def close(self) -> None:
        """See :class:`eadt.node.sensors.PowerSource`."""
        self._nvml.close()


def _describe(gpu: NvmlGpu) -> Component:
    try:
        identity = gpu.uuid()
    except EadtError:
        identity = f"gpu-index-{gpu.index}"
    shared = ""
    try:
        if gpu.mig_enabled():
            shared = "; MIG is on: this is the whole card, with the instances of others"
        elif gpu.virtualisation() == "vgpu":
            shared = "; this is a vGPU"
    except EadtError:
        shared = ""
    name = f"gpu{gpu.index}"
    if gpu.supports_energy_counter():
        return Component(
            name, "nvml_energy_counter", Quality.MEASURED, f"{name}: {_COUNTER_DETAIL}{shared}", identity
        )
    if gpu.supports_power():
        return Component(name, "nvml_power", Quality.MEASURED, f"{name}: {_POWER_DETAIL}{shared}", identity)
    detail = f"{name}: neither energy counter nor power can be read; its energy is unknown{shared}"
    return Component(name, "none", None, detail, identity)
