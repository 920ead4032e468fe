"""The setpoint that a run starts from, and the bounds on its workers, from its configuration.

The three named patterns of sharing a device (one worker at 100 %, two at 50 %, four at 25 %) are
``eadt.config.MPS_PRESETS``; in each the shares of a device's workers add up to the whole device.
"""

from __future__ import annotations

from eadt.config import MPS_PRESETS, RunConfig
from eadt.control.policy import workers_per_device
from eadt.control.setpoint import Setpoint


def preset_setpoint(name: str, num_devices: int, precision: str = "fp32") -> Setpoint:
    """The setpoint of a named pattern on every one of ``num_devices`` devices.

    Raises:
        KeyError: There is no pattern of that name.
    """
    thread_percentage, workers_per_gpu = MPS_PRESETS[name]
    return Setpoint(
        num_workers=workers_per_gpu * num_devices,
        workers_per_gpu=workers_per_gpu,
        mps_active_thread_percentage=thread_percentage,
        precision=precision,
    )


def initial_setpoint(config: RunConfig, num_devices: int, precision: str = "fp32") -> Setpoint:
    """The setpoint of a run's first generation.

    Args:
        config: The run; ``elastic.num_workers`` wins over workers per device.
        num_devices: GPUs of the job, or CPU nodes where there is no GPU.
        precision: ``fp32``, ``bf16`` or ``fp16``.
    """
    num_workers = config.elastic.num_workers
    if num_workers is None:
        most = max_workers(config, num_devices)
        num_workers = max(config.elastic.min_workers, min(config.mps.workers_per_gpu * num_devices, most))
    return Setpoint(
        num_workers=num_workers,
        workers_per_gpu=workers_per_device(num_workers, num_devices),
        mps_active_thread_percentage=config.mps.thread_percentage,
        precision=precision,
    )


def max_workers(config: RunConfig, num_devices: int) -> int:
    """Most active workers: ``elastic.max_workers``, else as many as the policy allows on each device.

    With ``mps.enabled: false`` that is one per device. Never fewer than the run starts with.
    """
    elastic = config.elastic
    if elastic.max_workers is not None:
        return elastic.max_workers
    per_device = config.policy.max_workers_per_gpu if config.mps.enabled else 1
    return max(per_device * num_devices, elastic.min_workers, elastic.num_workers or 1)
