"""The host: what a Ray Train worker does for its engine. Never touches a device, imports no torch.

It says where it is and which GPUs Ray gave it, renews the lease of its node's engines, and waits
for the run to end. The engine itself is forked by the node agent and may outlive it.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any


def run_host(config: dict[str, Any]) -> None:
    """Ray Train's training function.

    Args:
        config: ``coordinator`` and ``agent_prefix``, names of actors; ``namespace``; ``beat_s``, how often
            to say that it is there, in s.
    """
    import ray
    import ray.train

    context = ray.train.get_context()
    runtime = ray.get_runtime_context()
    node_id = runtime.get_node_id()
    gpu_ids = tuple(str(gpu) for gpu in runtime.get_accelerator_ids().get("GPU", []))
    coordinator = ray.get_actor(config["coordinator"], namespace=config["namespace"])
    place = {
        "world_rank": context.get_world_rank(),
        "group_size": context.get_world_size(),
        "node_id": node_id,
        "gpu_ids": gpu_ids,
        "pid": os.getpid(),
    }
    ray.get(coordinator.register_host.remote(place))
    agent: Any = None
    is_wanted = True
    while is_wanted:
        if agent is None:
            with contextlib.suppress(ValueError):  # it is still starting
                agent = ray.get_actor(config["agent_prefix"] + node_id, namespace=config["namespace"])
        if agent is not None:
            agent.renew_lease.remote()
        is_wanted = ray.get(coordinator.host_beat.remote(place["world_rank"], config["beat_s"]))
