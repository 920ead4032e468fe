"""The threshold policy: four rules on power per device and efficiency, first match.

Power in the rules is the mean per device in W, efficiency is whole-job samples/s over whole-job power
in W. All comparisons are strict, so a value that is exactly on a threshold matches no rule for it.

=====================================  ==================================================================
rule, first match                      action
=====================================  ==================================================================
efficiency < low  and power > high     decrease: share = max(now - 10, 25)
efficiency > low  and power > high     scale replicas: share = max(now - 15, 25),
                                       workers = min(now + one per device, 4 per device)
efficiency < high and power < low      increase: share = min(now + 10, 100); at 100 one worker per device
else                                   maintain
=====================================  ==================================================================

Two readings of ours, where the table leaves something open. A bound never moves a value against the
direction of its rule: a share that starts below the minimum is not raised by *decrease*, and a worker
count that starts above the maximum is not lowered by *scale replicas*. A rule that matches but leaves
everything as it is, because all bounds are reached, is a hold.
"""

from __future__ import annotations

from eadt.control.observation import Observation
from eadt.control.policy import (
    Action,
    Change,
    DecisionContext,
    Expectation,
    Hold,
    RatioRange,
    workers_per_device,
)
from eadt.control.setpoint import Setpoint

NOISE_FRACTION = 0.02
"""How far efficiency and power may seem to worsen by noise of measurement alone."""

_MIN_POWER_FALL_FRACTION = 0.01
"""A decrease is about power, so power has to fall by more than a reading's last digit."""


class ThresholdPolicy:
    """The rules of the module's table.

    Args:
        power_high_w: Mean power per device above which the job draws too much, W.
        power_low_w: Mean power per device below which devices are under-used, W.
        efficiency_low: Efficiency below which high power is badly spent, samples/J.
        efficiency_high: Efficiency from which on low power is well spent, samples/J.
        thread_decrease_step: Percentage points that *decrease* takes from the share.
        thread_increase_step: Percentage points that *increase* adds to the share.
        thread_scale_step: Percentage points that *scale replicas* takes from the share.
        min_thread_percentage: Least share, %.
        max_workers_per_gpu: Most workers on one device.
        max_throughput_loss_fraction: Loss of throughput up to which a change is acceptable, 0 to 1.
    """

    def __init__(
        self,
        *,
        power_high_w: float = 250.0,
        power_low_w: float = 200.0,
        efficiency_low: float = 0.1,
        efficiency_high: float = 0.2,
        thread_decrease_step: int = 10,
        thread_increase_step: int = 10,
        thread_scale_step: int = 15,
        min_thread_percentage: int = 25,
        max_workers_per_gpu: int = 4,
        max_throughput_loss_fraction: float = 0.2,
    ) -> None:
        self._power_high_w = power_high_w
        self._power_low_w = power_low_w
        self._efficiency_low = efficiency_low
        self._efficiency_high = efficiency_high
        self._thread_decrease_step = thread_decrease_step
        self._thread_increase_step = thread_increase_step
        self._thread_scale_step = thread_scale_step
        self._min_thread_percentage = min_thread_percentage
        self._max_workers_per_gpu = max_workers_per_gpu
        self._max_throughput_loss_fraction = max_throughput_loss_fraction

    def decide(self, observation: Observation, context: DecisionContext) -> Hold | Change:  # noqa: ARG002
        """See :class:`eadt.control.policy.EnergyPolicy`."""
        power_w, efficiency = observation.power_per_gpu_w, observation.efficiency
        if power_w is None:
            return Hold("Power is unknown in this window, so nothing is changed.", "power_unknown")
        if efficiency is None:
            return Hold(
                f"Efficiency is unknown in this window ({observation.num_steps} optimizer steps ended, "
                f"power is {power_w:.1f} W per device), so nothing is changed.",
                "efficiency_unknown",
            )
        if efficiency < self._efficiency_low and power_w > self._power_high_w:
            return self._decrease(observation, power_w, efficiency)
        if efficiency > self._efficiency_low and power_w > self._power_high_w:
            return self._scale_replicas(observation, power_w, efficiency)
        if efficiency < self._efficiency_high and power_w < self._power_low_w:
            return self._increase(observation, power_w, efficiency)
        return Hold(
            f"{_state(power_w, efficiency)}: no rule asks for a change "
            f"(high power is above {self._power_high_w:g} W; low power is below {self._power_low_w:g} W "
            f"with an efficiency below {self._efficiency_high:g}).",
            "maintain",
        )

    def _decrease(self, observation: Observation, power_w: float, efficiency: float) -> Hold | Change:
        now = observation.setpoint
        target = now.with_(mps_active_thread_percentage=self._lower_share(now, self._thread_decrease_step))
        why = (
            f"{_state(power_w, efficiency)}: power is above {self._power_high_w:g} W and efficiency below "
            f"{self._efficiency_low:g} samples/J"
        )
        if target == now:
            return Hold(
                f"{why}, but the thread share of {now.mps_active_thread_percentage} % is already at its "
                f"minimum ({self._min_thread_percentage} %).",
                "decrease_at_bound",
            )
        return Change(
            Action.DECREASE,
            target,
            f"{why}, so the thread share goes down from {_share(now)} % to {_share(target)} %.",
            self._expect(
                power=RatioRange(high=1 - _MIN_POWER_FALL_FRACTION),
                summary="Power falls, throughput falls by at most "
                f"{self._max_throughput_loss_fraction:.0%}, and efficiency does not get worse.",
            ),
        )

    def _scale_replicas(self, observation: Observation, power_w: float, efficiency: float) -> Hold | Change:
        now = observation.setpoint
        num_gpus = observation.num_gpus
        most = self._max_workers_per_gpu * num_gpus
        num_workers = max(now.num_workers, min(now.num_workers + num_gpus, most))
        target = now.with_(
            mps_active_thread_percentage=self._lower_share(now, self._thread_scale_step),
            num_workers=num_workers,
        )
        if num_workers != now.num_workers:
            target = target.with_(workers_per_gpu=workers_per_device(num_workers, num_gpus))
        why = (
            f"{_state(power_w, efficiency)}: power is above {self._power_high_w:g} W and efficiency above "
            f"{self._efficiency_low:g} samples/J"
        )
        if target == now:
            return Hold(
                f"{why}, but {now.num_workers} workers at {_share(now)} % share are already at their bounds "
                f"({most} workers, {self._min_thread_percentage} %).",
                "scale_replicas_at_bound",
            )
        return Change(
            Action.SCALE_REPLICAS,
            target,
            f"{why}, so the work is spread: {now.num_workers} to {num_workers} workers, thread share "
            f"{_share(now)} % to {_share(target)} %.",
            self._expect(
                power=RatioRange(high=max(1.0, _occupancy(target) / _occupancy(now)) + 0.05),
                summary="Power stays about the same, throughput falls by at most "
                f"{self._max_throughput_loss_fraction:.0%}, and efficiency does not get worse.",
            ),
        )

    def _increase(self, observation: Observation, power_w: float, efficiency: float) -> Hold | Change:
        now = observation.setpoint
        target = now.with_(mps_active_thread_percentage=min(_share(now) + self._thread_increase_step, 100))
        if target.mps_active_thread_percentage == 100:
            target = target.with_(num_workers=observation.num_gpus, workers_per_gpu=1)
        why = (
            f"{_state(power_w, efficiency)}: power is below {self._power_low_w:g} W and efficiency below "
            f"{self._efficiency_high:g} samples/J"
        )
        if target == now:
            return Hold(f"{why}, but every device already has one worker at 100 %.", "increase_at_bound")
        workers = (
            f", and the workers go from {now.num_workers} to {target.num_workers}, one per device"
            if target.num_workers != now.num_workers
            else ""
        )
        return Change(
            Action.INCREASE,
            target,
            f"{why}, so the thread share goes up from {_share(now)} % to {_share(target)} %{workers}.",
            self._expect(
                power=RatioRange(),
                summary="Power may rise, throughput rises with it, and efficiency does not get worse.",
                min_throughput=1 - NOISE_FRACTION,
            ),
        )

    def _lower_share(self, now: Setpoint, step: int) -> int:
        return min(_share(now), max(_share(now) - step, self._min_thread_percentage))

    def _expect(self, *, power: RatioRange, summary: str, min_throughput: float | None = None) -> Expectation:
        least = 1 - self._max_throughput_loss_fraction if min_throughput is None else min_throughput
        return Expectation(
            power=power,
            throughput=RatioRange(low=least),
            efficiency=RatioRange(low=1 - NOISE_FRACTION),
            summary=summary,
        )


def _state(power_w: float, efficiency: float) -> str:
    return f"Power is {power_w:.1f} W per device at {efficiency:.3g} samples/J"


def _share(setpoint: Setpoint) -> int:
    return setpoint.mps_active_thread_percentage


def _occupancy(setpoint: Setpoint) -> float:
    """Share of a device that its workers may use together, at most all of it."""
    return min(1.0, setpoint.workers_per_gpu * setpoint.mps_active_thread_percentage / 100)
