"""Pretended GPUs for trials without one: their power follows a utilisation that they are told."""

from __future__ import annotations

import math
import random
import threading

from eadt.clock import Clock
from eadt.errors import EadtError
from eadt.node.sensors.base import Component, Reading
from eadt.node.utilisation import CpuTimes, num_cores
from eadt.units import Quality

# The load of a real card is never quite steady: it ripples by this fraction of its dynamic range.
_RIPPLE_FRACTION = 0.04


class _SimulatedGpu:
    def __init__(self, component: Component, generator: random.Random) -> None:
        self.component = component
        self.energy_j = 0.0
        self.told_fraction: float | None = None
        self._angular_per_s = 2.0 * math.pi / generator.uniform(7.0, 13.0)
        self._phase = generator.uniform(0.0, 2.0 * math.pi)

    def mean_load(self, from_s: float, to_s: float) -> float:
        """Mean of 1 - ripple × (1 + sin) / 2 over an interval, integrated exactly: sampling plays no part."""
        if to_s <= from_s:
            return 1.0
        rate, phase = self._angular_per_s, self._phase
        sine_s = (math.cos(rate * from_s + phase) - math.cos(rate * to_s + phase)) / rate
        return 1.0 - _RIPPLE_FRACTION * (1.0 + sine_s / (to_s - from_s)) / 2.0


class SimulatedGpuSource:
    """Components ``gpu0``...; power goes from ``idle_w`` to ``max_w`` with the utilisation.

    The same utilisations at the same times and the same seed give the same joules, however often they
    are read.

    Args:
        num_gpus: How many.
        idle_w: Power of each at utilisation 0, in W.
        max_w: Power of each at utilisation 1, in W.
        seed: Picks each card's ripple.
        clock: Source of time.
        cpu_times: Gives the utilisation of the cards that nobody has told one: the machine's busy cores
            over its cores since the last reading. ``None``: such cards are idle.
    """

    def __init__(
        self,
        num_gpus: int,
        idle_w: float,
        max_w: float,
        seed: int,
        clock: Clock,
        cpu_times: CpuTimes | None = None,
    ) -> None:
        self._idle_w = idle_w
        self._max_w = max_w
        self._clock = clock
        self._cpu_times = cpu_times
        # The node agent tells utilisations while the meter's threads read.
        self._lock = threading.Lock()
        self._start_s = self._read_at_s = clock.monotonic_s()
        self._busy_core_s = self._busy_now()
        gpus = [
            _SimulatedGpu(
                Component(
                    name=f"gpu{index}",
                    source="simulated",
                    quality=Quality.SIMULATED,
                    detail=f"gpu{index}: pretended, {idle_w:g} W idle to {max_w:g} W busy",
                    identity=f"simulated-{seed}-{index}",
                    relative_uncertainty=0.0,
                    greatest_power_w=max_w,
                ),
                random.Random(f"{seed}/{index}"),
            )
            for index in range(num_gpus)
        ]
        self._gpus = {gpu.component.name: gpu for gpu in gpus}

    @property
    def components(self) -> tuple[Component, ...]:
        """See :class:`eadt.node.sensors.PowerSource`."""
        return tuple(gpu.component for gpu in self._gpus.values())

    def set_utilisation(self, utilisation_fraction: float, gpu_index: int | None = None) -> None:
        """From now on one card, or all, is busy to this fraction (cut to 0..1). Thread-safe."""
        with self._lock:
            self._integrate()
            for index, gpu in enumerate(self._gpus.values()):
                if gpu_index is None or index == gpu_index:
                    gpu.told_fraction = min(max(utilisation_fraction, 0.0), 1.0)

    def read(self, component: Component) -> Reading:
        """See :class:`eadt.node.sensors.PowerSource`."""
        with self._lock:
            self._integrate()
            return Reading(component, self._read_at_s, energy_j=self._gpus[component.name].energy_j)

    def _integrate(self) -> None:
        now_s = self._clock.monotonic_s()
        elapsed_s = now_s - self._read_at_s
        if elapsed_s <= 0.0:
            return
        from_s, to_s = self._read_at_s - self._start_s, now_s - self._start_s
        cpu_fraction: float | None = None
        for gpu in self._gpus.values():
            fraction = gpu.told_fraction
            if fraction is None:
                if cpu_fraction is None:
                    cpu_fraction = self._cpu_fraction(elapsed_s)
                fraction = cpu_fraction
            load = fraction * gpu.mean_load(from_s, to_s)
            gpu.energy_j += (self._idle_w + (self._max_w - self._idle_w) * load) * elapsed_s
        self._read_at_s = now_s

    def _cpu_fraction(self, elapsed_s: float) -> float:
        before_s, self._busy_core_s = self._busy_core_s, self._busy_now()
        if before_s is None or self._busy_core_s is None:
            return 0.0
        return min(max((self._busy_core_s - before_s) / (elapsed_s * num_cores()), 0.0), 1.0)

    def _busy_now(self) -> float | None:
        if self._cpu_times is None:
            return None
        try:
            return self._cpu_times.busy_core_seconds()
        except EadtError:
            return None

    def close(self) -> None:
        """See :class:`eadt.node.sensors.PowerSource`."""
        if self._cpu_times is not None:
            self._cpu_times.close()
