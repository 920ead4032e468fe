"""Means over several observation windows of one setpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eadt.control.observation import Observation
from eadt.units import Quality


def mean_observation(windows: Sequence[Observation]) -> Observation:
    """One observation over all ``windows``, weighted by their lengths.

    A value that is unknown in some windows is the mean of the others, and unknown only where it is
    unknown in all: unknown is never zero.

    Args:
        windows: At least one, oldest first, all at the same setpoint.
    """
    if not windows:
        raise ValueError("no windows to take the mean of")
    last = windows[-1]
    if any(window.setpoint != last.setpoint for window in windows):
        raise ValueError("windows at different setpoints have no common mean")
    return Observation(
        at_s=last.at_s,
        window_s=sum(window.window_s for window in windows),
        setpoint=last.setpoint,
        num_gpus=last.num_gpus,
        samples_per_second=_weighted_mean(windows, lambda window: window.samples_per_second),
        power_w=_weighted_mean(windows, lambda window: window.power_w),
        num_steps=sum(window.num_steps for window in windows),
        quality=Quality.worst(window.quality for window in windows),
    )


def _weighted_mean(
    windows: Sequence[Observation], value: Callable[[Observation], float | None]
) -> float | None:
    known = [(number, window.window_s) for window in windows if (number := value(window)) is not None]
    total_s = sum(seconds for _, seconds in known)
    if total_s <= 0:
        return known[-1][0] if known else None
    return sum(number * seconds for number, seconds in known) / total_s
