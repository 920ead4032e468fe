"""The only module that knows Ray Train's private names (Ray 2.60; see ``tests/contract/test_ray_names.py``).

Three things have no public hook: who decides the size of the worker group, that a single lost
worker is replaced alone, and which nodes are being drained.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray._private.state import state as _cluster_state
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.scaling_policy import (  # noqa: TID251
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from eadt.clock import monotonic_s

_ASK_TIMEOUT_S = 10.0
_SETTLE_S = 1.5
"""How long freed resources may take to be seen before a smaller group is accepted."""

_EPSILON = 1e-6


class HostBackend(Backend):  # type: ignore[misc]
    """Makes no process group: engines make their own. Lost workers are replaced one by one."""

    has_replica_groups = True


class HostBackendConfig(BackendConfig):  # type: ignore[misc]
    """Configuration of :class:`HostBackend`."""

    @property
    def backend_cls(self) -> type[Backend]:
        """See Ray."""
        return HostBackend


class SupervisedScalingPolicy(ScalingPolicy):  # type: ignore[misc]
    """Gives the worker group the size that the coordinator asks for, as far as resources go.

    Runs in Ray Train's controller. Counts fractional resources itself: Ray's own policy miscounts
    fractions that are no power of two.

    Args:
        scaling_config: Resources per worker.
        coordinator: Name of the coordinator's actor.
        namespace: Its namespace.
        max_workers: Most hosts there will ever be.
    """

    def __init__(
        self, scaling_config: ScalingConfig, coordinator: str, namespace: str, max_workers: int
    ) -> None:
        super().__init__(scaling_config)
        self._name = coordinator
        self._namespace = namespace
        self._max_workers = max_workers
        self._handle: Any = None
        self._wanted_since_s: float | None = None
        self._group_is_up = False
        self._target = max_workers

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Remember whether a worker group holds resources."""
        del previous_state
        name = type(current_state).__name__
        if name in ("RunningState", "RestartingState", "ResizingState"):
            self._group_is_up = True
        elif name in ("ReschedulingState", "InitializingState"):
            self._group_is_up = False

    def _get_num_workers_for_resource_request(self) -> int:
        # Asking for more than the cluster can ever have launches nothing on KubeRay.
        return self._target

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """A group is to be started: as large as is asked for, or as fits after a moment's wait."""
        self._maybe_send_resource_request()
        target, held = self._ask()
        if target is None:
            return NoopDecision()
        now = monotonic_s()
        if self._wanted_since_s is None:
            self._wanted_since_s = now
        possible = min(target, held + self._num_free())
        if possible < 1 or (possible < target and now - self._wanted_since_s < _SETTLE_S):
            return NoopDecision()
        self._wanted_since_s = None
        return self._decide(possible)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """A group runs: resize it when another size is asked for and possible."""
        del worker_group_status
        self._maybe_send_resource_request()
        present = worker_group_state.num_workers
        target, _ = self._ask(present)
        if target is None or target == present:
            return NoopDecision()
        return self._decide(target)

    def _decide(self, num_workers: int) -> ResizeDecision:
        return ResizeDecision(
            num_workers=num_workers,
            resources_per_worker=self.scaling_config._resources_per_worker_not_none,
        )

    def _ask(self, present: int | None = None) -> tuple[int | None, int]:
        """The wanted group size and how many of its hosts are alive now; ``None`` while unknown."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        try:
            if self._handle is None:
                self._handle = ray.get_actor(self._name, namespace=self._namespace)
                # This process is the run's own too, and its CPU time is no other tenant's.
                self._handle.announce.remote(ray.get_runtime_context().get_node_id(), os.getpid())
            free = self._num_free()
            answer = ray.get(
                self._handle.host_target.remote(sorted(alive), free, present, self._group_is_up),
                timeout=_ASK_TIMEOUT_S,
            )
        except (ray.exceptions.RayError, ValueError):
            self._handle = None
            return None, 0
        self._target = answer["target"]
        return answer["target"], answer["held"]

    def _num_free(self) -> int:
        """Workers that fit beside everything that runs, on nodes that stay."""
        per_worker = {
            name: amount
            for name, amount in self.scaling_config._resources_per_worker_not_none.items()
            if amount > 0
        }
        draining = draining_nodes()
        available = _cluster_state.available_resources_per_node()
        return sum(
            min(
                math.floor(resources.get(name, 0.0) / amount + _EPSILON)
                for name, amount in per_worker.items()
            )
            for node_id, resources in available.items()
            if node_id not in draining
        )


class HostGroupTrainer(DataParallelTrainer):  # type: ignore[misc]
    """A ``DataParallelTrainer`` whose worker group the coordinator sizes."""

    def __init__(
        self, *args: Any, make_policy: Callable[[ScalingConfig], ScalingPolicy], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._make_policy = make_policy

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        kwargs["scaling_policy"] = self._make_policy(self.scaling_config)
        return super()._initialize_and_run_controller(**kwargs)

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ctrl-C is ours: the run ends with a checkpoint, not with an abort."""


def run_host_group(
    host_function: Callable[[dict[str, Any]], None],
    host_config: dict[str, Any],
    *,
    name: str,
    resources_per_worker: dict[str, float],
    max_workers: int,
    max_host_failures: int,
    storage_path: str,
    look_interval_s: float,
) -> None:
    """Run hosts until they all return. Blocks.

    Args:
        host_function: What a host does.
        host_config: Its argument; ``coordinator`` and ``namespace`` name the coordinator's actor.
        name: Ray Train's name of the run.
        resources_per_worker: Ray's resources for each host.
        max_workers: Most hosts there will ever be.
        max_host_failures: Lost hosts that are replaced before the run is given up.
        storage_path: Where Ray Train keeps its own files.
        look_interval_s: How often the controller looks at the hosts and asks for the group's size, in s.

    Raises:
        ray.train.TrainingFailedError: Hosts failed more often than allowed.
    """
    coordinator, namespace = host_config["coordinator"], host_config["namespace"]
    trainer = HostGroupTrainer(
        host_function,
        train_loop_config=host_config,
        backend_config=HostBackendConfig(),
        scaling_config=ScalingConfig(
            num_workers=max_workers,
            use_gpu=resources_per_worker.get("GPU", 0) > 0,
            resources_per_worker=resources_per_worker,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=max_host_failures),
        ),
        make_policy=lambda scaling: SupervisedScalingPolicy(scaling, coordinator, namespace, max_workers),
    )
    with _environment_default("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(look_interval_s)):
        trainer.fit()


@contextlib.contextmanager
def _environment_default(name: str, value: str) -> Iterator[None]:
    """Within it the environment has this value, unless the user gave another one."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


def draining_nodes() -> dict[str, float | None]:
    """Nodes that are being drained: Ray node id to deadline in wall-clock s (``None``: no deadline)."""
    found: dict[str, int] = _cluster_state.get_draining_nodes()
    return {node_id: deadline / 1000 if deadline else None for node_id, deadline in found.items()}
