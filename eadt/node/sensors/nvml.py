"""GPUs through NVML: the energy counter where there is one, else power for the meter to integrate."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from eadt.adapters.nvml import Nvml, NvmlGpu
from eadt.clock import Clock
from eadt.errors import EadtError
from eadt.node.sensors.base import Component, Reading
from eadt.units import Quality

logger = logging.getLogger(__name__)

# The counter steps about every 100 ms and lags behind by a little more: a window lacked 26 % of its energy at
# 0.5 s, 12 % at 1 s and 3.7 % at 2 s (our design notes; A100 and H100), which is 0.13, 0.12 and 0.07 s of its
# power. From 5 s on what is missing is less than the sensor's own error.
_COUNTER_RESOLUTION_S = 0.13
_COUNTER_WINDOW_S = 5.0
# NVIDIA states +-5 % of the power for the sensor (NVML's documentation of nvmlDeviceGetPowerUsage, there of
# older cards; nothing is stated of newer ones). The counter sums up the same sensor.
_COUNTER_UNCERTAINTY = 0.05
# The power field is a mean over 1 s on Ampere (but GA100) and newer cards (the same documentation), and on
# A100 and H100 25 ms of each 100 ms are sampled: Yang, Adamek, Armour, "Part-time Power Measurements:
# nvidia-smi's Lack of Attention", arXiv:2312.02741. So it answers up to a second late, which is 10 % of a
# window of 10 s whose edge saw the power change. 10 % is our own guess at its error over long windows, twice
# the sensor's, for what is not sampled differs from what is; for loads in step with the sampling the paper
# found more.
_POWER_RESOLUTION_S = 1.0
_POWER_WINDOW_S = 10.0
_POWER_UNCERTAINTY = 0.10
# No card exceeds its highest power limit for longer than milliseconds by more than half.
_LIMIT_MARGIN = 1.5
_GREATEST_POWER_W = 2000.0
_COUNTER_DETAIL = "the card's energy counter; it steps every 100 ms, so trust differences from 5 s on"
_POWER_DETAIL = (
    "the card's power, integrated by the trapezoid rule; some cards sample it a quarter of the time, so "
    "short bursts can be missed or counted several times: 10 % or more"
)

# After a driver restart the library is opened anew, first after so long, then each time twice as long, up to
# the most: a card that is lost for good must not disturb the others for ever.
_FIRST_REOPENING_S = 10.0
_MOST_REOPENING_S = 320.0


class _Card:
    """One GPU and its counter: opening of the library and moment of the last reading, and the series."""

    __slots__ = ("gpu", "has_counter", "last_s", "opening", "series")

    def __init__(self, gpu: NvmlGpu, component: Component) -> None:
        self.gpu = gpu
        self.has_counter = component.source == "nvml_energy_counter"
        self.opening: int | None = None
        self.last_s = 0.0
        self.series = 0


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
        self._components = tuple(_describe(gpu) for gpu in gpus)
        self._cards = {
            component.name: _Card(gpu, component)
            for component, gpu in zip(self._components, gpus, strict=True)
        }
        # Cards whose last call failed as after a restart of the driver.
        self._gone: set[str] = set()
        self._reopening = threading.Lock()
        self._next_reopening_s = 0.0
        self._pause_s = _FIRST_REOPENING_S

    @property
    def components(self) -> tuple[Component, ...]:
        """See :class:`eadt.node.sensors.PowerSource`."""
        return self._components

    @property
    def num_readable(self) -> int:
        """GPUs whose energy or power can be read."""
        return sum(component.quality is not None for component in self._components)

    @property
    def gpus(self) -> dict[str, NvmlGpu]:
        """The GPUs by component; calls to them may block."""
        return {name: card.gpu for name, card in self._cards.items()}

    def read(self, component: Component) -> Reading:
        """See :class:`eadt.node.sensors.PowerSource`.

        Where the driver was restarted, the library is opened anew here, in the thread that reads.
        """
        card = self._cards[component.name]
        opening = self._nvml.opening
        energy_j = power_w = None
        try:
            if card.has_counter:
                energy_j = card.gpu.energy_j()
            elif component.quality is not None:
                power_w = card.gpu.power_w()
        except EadtError as error:
            if self._nvml.seems_gone(error):
                self._reopen(component.name)
            raise
        if self._gone:
            self._is_back(component.name)
        at_s = self._clock.monotonic_s()
        if energy_j is not None:
            if card.opening is not None and card.opening != opening:
                # A counter that is larger than before may have gone on; one so small that the card can have
                # drawn it since the last reading may as well have begun at zero.
                assert component.greatest_power_w is not None
                card.series += energy_j <= component.greatest_power_w * (at_s - card.last_s)
            card.opening, card.last_s = opening, at_s
        return Reading(component, at_s, energy_j, power_w, None, card.series)

    def _reopen(self, name: str) -> None:
        """Open the library anew if a second call in a row failed so, and not too often."""
        # One thread does it; another that comes by meanwhile reads again later.
        if not self._reopening.acquire(blocking=False):
            return
        try:
            now_s = self._clock.monotonic_s()
            if name not in self._gone:
                self._gone.add(name)
                return
            if now_s < self._next_reopening_s:
                return
            self._next_reopening_s = now_s + self._pause_s
            self._pause_s = min(2.0 * self._pause_s, _MOST_REOPENING_S)
            self._nvml.reopen()
            logger.warning("NVML was opened anew: the driver was restarted, or %s is lost", name)
        except EadtError as error:
            logger.info("NVML cannot be opened anew yet: %s", error.what)
        finally:
            self._reopening.release()

    def _is_back(self, name: str) -> None:
        with self._reopening:
            self._gone.discard(name)
            if not self._gone:
                self._pause_s = _FIRST_REOPENING_S

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
            name,
            "nvml_energy_counter",
            Quality.MEASURED,
            f"{name}: {_COUNTER_DETAIL}{shared}",
            identity,
            resolution_s=_COUNTER_RESOLUTION_S,
            honest_window_s=_COUNTER_WINDOW_S,
            relative_uncertainty=_COUNTER_UNCERTAINTY,
            greatest_power_w=_greatest_power_w(gpu),
        )
    if gpu.supports_power():
        return Component(
            name,
            "nvml_power",
            Quality.MEASURED,
            f"{name}: {_POWER_DETAIL}{shared}",
            identity,
            resolution_s=_POWER_RESOLUTION_S,
            honest_window_s=_POWER_WINDOW_S,
            relative_uncertainty=_POWER_UNCERTAINTY,
            greatest_power_w=_greatest_power_w(gpu),
        )
    detail = f"{name}: its energy is unknown: neither energy counter nor power can be read{shared}"
    return Component(name, "none", None, detail, identity)


def _greatest_power_w(gpu: NvmlGpu) -> float:
    try:
        return _LIMIT_MARGIN * gpu.power_limit_range_w()[1]
    except EadtError:
        return _GREATEST_POWER_W
