"""Builds the control objects that a configuration names. The only module here that knows both."""

from __future__ import annotations

from typing import Any

from eadt.config import PolicyConfig, RunConfig
from eadt.control.guard import Guard, GuardLimits
from eadt.control.loop import ControlLoop, LoopSettings
from eadt.control.policy import EnergyPolicy, HoldPolicy, ScheduleEntry, SchedulePolicy
from eadt.control.presets import max_workers
from eadt.control.setpoint import Setpoint
from eadt.control.threshold import ThresholdPolicy

_COOLDOWN_IN_DECISION_INTERVALS = 0.5
"""Verification already takes most of a decision interval; the cooldown is for runs where it does not."""


def make_policy(config: PolicyConfig) -> EnergyPolicy:
    """The policy that ``policy.type`` names, with its numbers, and without a guard."""
    if config.type == "hold":
        return HoldPolicy()
    if config.type == "schedule":
        return SchedulePolicy(
            [
                ScheduleEntry(entry.at_step, entry.num_workers, entry.thread_percentage)
                for entry in config.schedule
            ]
        )
    return ThresholdPolicy(
        power_high_w=config.power_high_w,
        power_low_w=config.power_low_w,
        efficiency_low=config.efficiency_low,
        efficiency_high=config.efficiency_high,
        thread_decrease_step=config.thread_decrease_step,
        thread_increase_step=config.thread_increase_step,
        thread_scale_step=config.thread_scale_step,
        min_thread_percentage=config.min_thread_percentage,
        max_workers_per_gpu=config.max_workers_per_gpu,
        max_throughput_loss_fraction=config.max_throughput_loss_fraction,
    )


def make_control_loop(
    config: RunConfig,
    setpoint: Setpoint,
    num_devices: int,
    *,
    initial_pause_s: float = 15.0,
    state: dict[str, Any] | None = None,
) -> ControlLoop:
    """The control loop of a run.

    A run with ``supervisor.enabled: false`` only measures, and so does the threshold policy with
    ``mps.enabled: false``, whose levers are then all off.

    Args:
        config: The run.
        setpoint: The initial setpoint, also where ``state`` is given: the global batch follows from
            the run's first number of workers, not from the present one.
        num_devices: GPUs of the job, or CPU nodes where there is no GPU.
        initial_pause_s: Assumed pause of a change in s until one has been measured.
        state: What :meth:`ControlLoop.to_state` gave, to go on from; ``None`` to begin.
    """
    limits = GuardLimits(
        train_batch_size=config.train_batch_size(setpoint.num_workers),
        max_micro_batch=config.training.per_device_train_batch_size,
        min_workers=config.elastic.min_workers,
        max_workers=max_workers(config, num_devices),
        cooldown_s=_COOLDOWN_IN_DECISION_INTERVALS * config.supervisor.decision_interval,
        energy_efficiency_threshold=config.training.energy_efficiency_threshold,
    )
    settings = LoopSettings(
        decision_interval_s=config.supervisor.decision_interval,
        verification_intervals=config.supervisor.verification_intervals,
        stable_intervals=config.supervisor.stable_intervals,
        warmup_intervals=config.supervisor.warmup_intervals,
        initial_pause_s=initial_pause_s,
    )
    guard = Guard(_run_policy(config), limits)
    if state is not None:
        return ControlLoop.from_state(state, guard, settings)
    return ControlLoop(guard, setpoint, settings)


def _run_policy(config: RunConfig) -> EnergyPolicy:
    if not config.supervisor.enabled:
        return HoldPolicy("The supervisor is off (supervisor.enabled: false): it measures only.")
    if config.policy.type == "threshold" and not config.mps.enabled:
        return HoldPolicy("Sharing of devices is off (mps.enabled: false), so the policy has no lever.")
    return make_policy(config.policy)
