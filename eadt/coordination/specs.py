"""Turns a placement into the specs of its engines: shares, devices, environment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from eadt.control.batch import BatchPlan
from eadt.control.setpoint import Setpoint
from eadt.coordination.generation import Generation
from eadt.coordination.nodes import NodeInfo
from eadt.coordination.placement import Placement, Seat, cpu_share
from eadt.coordination.settings import RunSettings
from eadt.training.engine_spec import ComputeShare, EngineSpec

_ENGINE_BASE_BYTES = 300 << 20
"""Private memory of an engine beside its model, over what it shares with the fork server."""

_BYTES_PER_PARAMETER = 24
"""Weights, gradients, fp32 master, two moments and a communication buffer, before partitioning."""


def make_specs(
    settings: RunSettings,
    number: int,
    setting: int,
    placement: Placement,
    batch: BatchPlan,
    setpoint: Setpoint,
    nodes: Mapping[str, NodeInfo],
    *,
    resume: bool,
) -> tuple[EngineSpec, ...]:
    """The engines of generation ``number``, at setting ``setting``, by rank."""
    # Two ranks on one GPU: NCCL before 2.30 refuses them, gloo does not.
    backend = "nccl" if settings.device == "cuda" and not placement.shares_a_device else "gloo"
    specs = []
    for seat in placement.seats:
        node = nodes[seat.host.node_id]
        specs.append(
            EngineSpec(
                engine_id=f"engine-{number}-{seat.rank}",
                generation=number,
                setting=setting,
                rank=seat.rank,
                node_id=node.node_id,
                node_ip=node.ip,
                job=replace(settings.job, precision=setpoint.precision, data_path=node.data_path),
                batch=batch,
                share=_share(settings, seat, setpoint, node),
                device=settings.device,
                backend=backend,
                env=_environment(settings, seat, setpoint),
                slot_paths=node.slot_paths,
                resume=resume,
                primary_on_node=seat.rank
                == min(other.rank for other in placement.seats if other.host.node_id == node.node_id),
            )
        )
    return tuple(specs)


def engine_bytes(running: Generation, num_workers: int) -> int:
    """Memory that one engine of a next generation will need, from what the running ones told."""
    ready = next(iter(running.ready.values()))
    if ready["device_bytes"]:
        fewer = max(1.0, running.placement.num_workers / num_workers)
        device_bytes: int = ready["device_bytes"]
        return math.ceil(device_bytes * 1.2 * fewer)
    num_params: int = ready["num_params"]
    return _ENGINE_BASE_BYTES + num_params * _BYTES_PER_PARAMETER


def _share(settings: RunSettings, seat: Seat, setpoint: Setpoint, node: NodeInfo) -> ComputeShare:
    percentage = setpoint.mps_active_thread_percentage
    if settings.device == "cuda":
        return ComputeShare(percentage=percentage if settings.use_mps else 100)
    return cpu_share(percentage, node.cores, seat.index_on_device)


def _environment(settings: RunSettings, seat: Seat, setpoint: Setpoint) -> dict[str, str]:
    env = {"EADT_RUN_KEY": settings.run_key}
    if settings.device != "cuda":
        return env
    env["CUDA_VISIBLE_DEVICES"] = ",".join(seat.host.gpu_ids)
    if settings.use_mps:
        env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(setpoint.mps_active_thread_percentage)
        if settings.mps_pipe_directory:
            env["CUDA_MPS_PIPE_DIRECTORY"] = settings.mps_pipe_directory
    return env
