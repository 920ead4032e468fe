"""A run on a Ray cluster: connects, starts the run's actors and hosts, and watches them.

The driver's side of a run. It owns the actors, so that nothing outlives the driver.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from eadt.actors import NAMESPACE, CoordinatorActor, NodeAgentActor, agent_prefix, coordinator_name
from eadt.adapters.ray_probe import cluster_address, probe, use_token_at_hand
from eadt.adapters.ray_train import draining_nodes, run_host_group
from eadt.clock import monotonic_s
from eadt.config import RunConfig
from eadt.coordination.coordinator import LAST_SAVE_S
from eadt.coordination.hosts import HOST_BEAT_S
from eadt.coordination.settings import RunSettings
from eadt.errors import EadtError, EnvironmentFailure
from eadt.node.agent import agent_settings
from eadt.supervisor_actor import EnergySupervisorActor, supervisor_name
from eadt.training.host import run_host

_WATCH_S = 1.0
_LOOK_S = 1.0
_RESTART_LOOK_S = 0.5
"""How often Ray Train's controller looks at the hosts, in s; only a restart waits for that."""

_CALL_TIMEOUT_S = 30.0
_AGENT_RETRY_S = 5.0


@dataclass(frozen=True)
class Devices:
    """What a cluster has to train on.

    Attributes:
        is_gpu: Whether training runs on GPUs.
        num_devices: GPUs, or nodes with CPUs.
        num_cpus: Ray's CPUs in all.
    """

    is_gpu: bool
    num_devices: int
    num_cpus: float

    def describe(self) -> str:
        """One phrase for people."""
        kind = "GPU" if self.is_gpu else "CPU node"
        return f"{self.num_devices} {kind}{'' if self.num_devices == 1 else 's'}"


@dataclass(frozen=True)
class RunEnd:
    """How a run ended; see ``TrainingResult``."""

    status: str
    final_model_path: str | None
    error: EadtError | None


class Cluster:
    """A connection to Ray. Made by :meth:`connect`."""

    def __init__(self, *, started: bool) -> None:
        self._started = started

    @staticmethod
    def is_joined() -> bool:
        """Whether this process is in a cluster already, which the run will use."""
        return bool(ray.is_initialized())

    @staticmethod
    def connect(config: RunConfig) -> Cluster:
        """Connect to the cluster that the configuration or RAY_ADDRESS names, else start one here.

        Raises:
            EnvironmentFailure: EADT-301, it does not answer or refuses us.
        """
        if ray.is_initialized():
            return Cluster(started=False)
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        address = cluster_address(config.resources.address)
        options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "error"}
        if address is None:
            ray.init(
                address="local",
                object_store_memory=config.resources.object_store_memory_bytes,
                include_dashboard=False,
                **options,
            )
            # Ray Train's helpers look for "the" cluster, and fail where a machine has several.
            os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
            return Cluster(started=True)
        answer = probe(address)
        if answer.state != "ok":
            raise EnvironmentFailure(
                f"the Ray cluster at {address} cannot be used: {answer.detail}",
                code="EADT-301",
                means="nothing was started",
                fix="check the address and that the cluster is up; if it wants a token, set RAY_AUTH_TOKEN "
                "or RAY_AUTH_TOKEN_PATH to the cluster's",
            )
        use_token_at_hand()
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise EnvironmentFailure(
                f"the Ray cluster at {address} could not be joined: {_first_line(error)}",
                code="EADT-301",
                means="nothing was started",
                fix="see `eadt doctor`",
            ) from error
        return Cluster(started=False)

    def disconnect(self) -> None:
        """Leave the cluster; ends it if we started it."""
        if self._started:
            ray.shutdown()
            os.environ.pop("RAY_ADDRESS", None)

    def devices(self, config: RunConfig) -> Devices:
        """What there is to train on.

        Raises:
            EnvironmentFailure: EADT-302, GPUs are asked for and there are none.
        """
        nodes = [node for node in ray.nodes() if node["Alive"]]
        num_gpus = sum(int(node["Resources"].get("GPU", 0)) for node in nodes)
        cpu_nodes = [node for node in nodes if node["Resources"].get("CPU", 0) > 0]
        num_cpus = sum(node["Resources"]["CPU"] for node in cpu_nodes)
        use_gpu = config.resources.use_gpu
        if use_gpu and not num_gpus:
            raise EnvironmentFailure(
                "resources.use_gpu is true, but no node of the Ray cluster has a GPU",
                code="EADT-302",
                means="nothing was started",
                fix="start Ray's nodes with --num-gpus, or set resources.use_gpu: false",
            )
        if use_gpu or (use_gpu is None and num_gpus):
            return Devices(True, num_gpus, num_cpus)
        return Devices(False, max(1, len(cpu_nodes)), num_cpus)

    @contextlib.contextmanager
    def start_run(
        self, config: RunConfig, settings: RunSettings, devices: Devices, on_event: Any
    ) -> Iterator[ClusterRun]:
        """Start the run's actors; ends them all on leaving."""
        run = ClusterRun(config, settings, devices, on_event)
        run.start()
        try:
            yield run
        finally:
            run.stop()


class ClusterRun:
    """One run's actors and hosts, as its driver sees them."""

    def __init__(self, config: RunConfig, settings: RunSettings, devices: Devices, on_event: Any) -> None:
        self._config = config
        self._settings = settings
        self._devices = devices
        self._on_event = on_event
        self._coordinator: Any = None
        self._supervisor: Any = None
        self._agents: dict[str, Any] = {}
        self._agent_starts: dict[Any, str] = {}
        self._interrupts: list[str] = []
        self._over = threading.Event()
        self._watcher: threading.Thread | None = None
        self._events_seen = 0
        self._waiting_since_s: float | None = None
        self._last_phase = ""
        self._is_reporting = False
        self._agents_due_s: dict[str, float] = {}
        self._pings: dict[str, Any] = {}

    def start(self) -> None:
        """Start coordinator, supervisor and node agents.

        Raises:
            EnvironmentFailure: EADT-303, this run is being trained already.
        """
        name = coordinator_name(self._settings.run_id)
        with contextlib.suppress(ValueError):
            ray.get_actor(name, namespace=NAMESPACE)
            raise EnvironmentFailure(
                f"the run {self._settings.name} is being trained on this cluster already",
                code="EADT-303",
                means="nothing was started",
                fix="watch it with: eadt status; or give this one another name with --name",
            )
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._coordinator = (
            ray.remote(CoordinatorActor)
            .options(name=name, namespace=NAMESPACE, num_cpus=0, scheduling_strategy=here)
            .remote(self._settings, str(self._config.run_folder))
        )
        self._run_reference = self._coordinator.run.remote()
        settings = self._settings
        self._supervisor = (
            ray.remote(EnergySupervisorActor)
            .options(
                name=supervisor_name(settings.run_id),
                namespace=NAMESPACE,
                num_cpus=0,
                max_restarts=-1,
                scheduling_strategy=here,
            )
            .remote(
                self._config,
                settings.run_id,
                settings.setpoint,
                settings.train_batch_size,
                self._devices.num_devices,
            )
        )
        self._supervisor.start.remote()
        self._watch_nodes()
        self._watcher = threading.Thread(target=self._watch, name="eadt-watch", daemon=True)
        self._watcher.start()

    def wait(self) -> RunEnd:
        """Run the hosts until the run is over. Blocks."""
        error: EadtError | None = None
        try:
            run_host_group(
                run_host,
                {
                    "coordinator": coordinator_name(self._settings.run_id),
                    "agent_prefix": agent_prefix(self._settings.run_id),
                    "namespace": NAMESPACE,
                    "beat_s": HOST_BEAT_S,
                },
                name=f"hosts-{self._settings.run_id}",
                resources_per_worker=self._resources_per_host(),
                max_workers=self._settings.max_workers,
                max_host_failures=self._config.elastic.max_host_failures,
                storage_path=os.path.join(tempfile.gettempdir(), "eadt-ray-train"),
                look_interval_s=_RESTART_LOOK_S if self._config.elastic.mode == "restart" else _LOOK_S,
            )
        except ray.train.TrainingFailedError as failure:
            error = EnvironmentFailure(
                f"Ray Train gave up on the run's hosts: {_first_line(failure)}",
                code="EADT-304",
                means="training stopped; the newest checkpoint is kept",
                fix="see Ray's logs; elastic.max_host_failures says how many lost hosts are forgiven",
            )
            self._ask(self._coordinator.fail.remote(error))
        ray.get(self._run_reference, timeout=LAST_SAVE_S + _CALL_TIMEOUT_S)
        end = self._ask(self._coordinator.snapshot.remote())
        return RunEnd(end["status"], end["final_model_path"], end["error"])

    def interrupt(self, reason: str) -> None:
        """Ask the run to end with a checkpoint. Safe in a signal handler."""
        self._interrupts.append(reason)

    def stop(self) -> None:
        """End all actors of the run, and write the last rows of the ledger."""
        self._over.set()
        if self._watcher is not None:
            self._watcher.join(timeout=10)
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            self._ask(self._supervisor.stop.remote())
            self._watch_run()  # what came since the last look
        with contextlib.suppress(ray.exceptions.RayError):
            ray.wait([agent.stop.remote() for agent in self._agents.values()], num_returns=len(self._agents))
        with contextlib.suppress(ray.exceptions.RayError):
            self._ask(self._coordinator.close.remote())
        for actor in [*self._agents.values(), self._supervisor, self._coordinator]:
            if actor is not None:
                ray.kill(actor)

    # -- hosts ------------------------------------------------------------------------------------

    def _resources_per_host(self) -> dict[str, float]:
        """What Ray is asked for per host. Placement only: shares are another matter."""
        cpus = self._config.resources.cpus_per_worker
        if self._devices.is_gpu:
            per_gpu = -(-self._settings.max_workers // self._devices.num_devices)
            # Rounded down at Ray's resolution, so that three at a third fit on one GPU.
            return {"GPU": (10000 // per_gpu) / 10000, "CPU": 1.0 if cpus is None else cpus}
        if cpus is None:
            per_node = -(-self._settings.max_workers // self._devices.num_devices)
            cpus = min(1.0, int(self._devices.num_cpus / self._devices.num_devices / per_node * 100) / 100)
        return {"CPU": cpus}

    # -- watching -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over.wait(_WATCH_S):
            try:
                self._watch_nodes()
                self._watch_agents()
                self._watch_run()
            except (ray.exceptions.RayError, TimeoutError) as error:
                self._on_event({"type": "note", "code": "EADT-305", "text": _first_line(error)})

    def _watch_run(self) -> None:
        while self._interrupts:
            self._ask(self._coordinator.interrupt.remote(self._interrupts.pop(0)))
        look = self._ask(self._coordinator.look.remote(self._events_seen))
        self._events_seen, snapshot = look["events_seen"], look["snapshot"]
        for event in look["events"]:
            self._on_event(event)
        self._watch_resources(snapshot)
        if snapshot["is_training"] or (snapshot["status"] == "completed" and self._is_reporting):
            self._is_reporting = snapshot["is_training"]  # once more at the end
            self._on_event({"type": "progress", "status": look["status"]})
        elif snapshot["waiting_for"] and snapshot["waiting_for"] != self._last_phase:
            self._last_phase = snapshot["waiting_for"]
            self._on_event({"type": "phase", "text": f"waiting for {self._last_phase}"})

    def _watch_resources(self, snapshot: dict[str, Any]) -> None:
        """End a run that no hosts can be placed for."""
        if snapshot["hosts"] or snapshot["status"] != "starting":
            self._waiting_since_s = None
            return
        if self._waiting_since_s is None:
            self._waiting_since_s = monotonic_s()
        limit_s = self._config.elastic.wait_for_resources_s
        if monotonic_s() - self._waiting_since_s > limit_s:
            wanted = ", ".join(f"{v:g} {k}" for k, v in self._resources_per_host().items())
            there = ", ".join(f"{v:g} {k}" for k, v in ray.available_resources().items() if k in "CPUGPU")
            self._ask(
                self._coordinator.fail.remote(
                    EnvironmentFailure(
                        f"no worker could be placed within {limit_s:.0f} s: each needs {wanted}; "
                        f"free on the cluster: {there or 'nothing'}",
                        code="EADT-306",
                        means="training did not start; checkpoints are untouched",
                        fix="free resources, add nodes, or lower resources.cpus_per_worker",
                    )
                )
            )

    # -- nodes ------------------------------------------------------------------------------------

    def _watch_nodes(self) -> None:
        """An agent for each node that is there; tell the coordinator of those that go."""
        alive = {
            node["NodeID"]: node["NodeManagerAddress"]
            for node in ray.nodes()
            if node["Alive"] and self._is_for_training(node["Resources"])
        }
        for node_id in set(self._agents) - set(alive):
            self._lose_agent(node_id, "Ray says that it is dead")
        for node_id in set(alive) - set(self._agents):
            if monotonic_s() >= self._agents_due_s.get(node_id, 0.0):
                self._start_agent(node_id, alive[node_id])
        for node_id, deadline in draining_nodes().items():
            self._coordinator.drain.remote(node_id, deadline)
        done, _ = ray.wait(list(self._agent_starts), num_returns=len(self._agent_starts), timeout=0) \
            if self._agent_starts else ([], [])  # fmt: skip
        for reference in done:
            node_id = self._agent_starts.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayActorError:
                self._lose_agent(node_id, "its agent died while it started")
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, EadtError) else None
                failure = cause or EnvironmentFailure(
                    f"the node agent on {node_id[:8]} failed: {_first_line(error)}", code="EADT-336"
                )
                self._coordinator.fail.remote(failure)

    def _lose_agent(self, node_id: str, why: str) -> None:
        """A node agent has gone, perhaps with its node; it is started again if the node is there."""
        if self._agents.pop(node_id, None) is not None:
            self._agents_due_s[node_id] = monotonic_s() + _AGENT_RETRY_S
            self._coordinator.lose_node.remote(node_id, why)

    def _watch_agents(self) -> None:
        """Notice agents that died while their nodes live. Does not wait for one that is slow to answer."""
        for node_id, agent in self._agents.items():
            self._pings.setdefault(node_id, agent.ping.remote())
        done, _ = ray.wait(list(self._pings.values()), num_returns=len(self._pings), timeout=0) \
            if self._pings else ([], [])  # fmt: skip
        for node_id, reference in list(self._pings.items()):
            if reference in done:
                del self._pings[node_id]
                try:
                    ray.get(reference)
                except ray.exceptions.ActorDiedError:
                    self._lose_agent(node_id, "its agent has died")
                except ray.exceptions.RayError:
                    pass  # not now

    def _is_for_training(self, resources: dict[str, float]) -> bool:
        return resources.get("GPU" if self._devices.is_gpu else "CPU", 0) > 0

    def _start_agent(self, node_id: str, node_ip: str) -> None:
        config, settings = self._config, self._settings
        agent = (
            ray.remote(NodeAgentActor)
            .options(
                name=agent_prefix(settings.run_id) + node_id,
                namespace=NAMESPACE,
                num_cpus=0,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            )
            .remote(
                agent_settings(config, settings, node_id, node_ip, self._driver_pids(node_id)),
                coordinator_name(settings.run_id),
            )
        )
        self._agents[node_id] = agent
        self._agent_starts[agent.start.remote()] = node_id

    @staticmethod
    def _driver_pids(node_id: str) -> tuple[int, ...]:
        return (os.getpid(),) if ray.get_runtime_context().get_node_id() == node_id else ()

    def _ask(self, references: Any) -> Any:
        return ray.get(references, timeout=_CALL_TIMEOUT_S)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
