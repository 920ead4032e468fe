"""A run without Ray, in the calling process: for tests of elasticity and recovery.

Real: the coordinator, the node agents, the state servers and their sockets, the fork server, the
engine processes, DeepSpeed, checkpoints, the ledger. Pretended: Ray's part. Hosts are registered
directly; a "node" is a node agent with its own folder for shared memory and a loopback address of
its own, and what the engines of another node hold travels through sockets. All nodes of a test
session share one warm fork server (:class:`WarmEngines`), since its imports take seconds.

At chosen steps the engines are held at a gate until what the test asks for there has taken hold, so
that tests do not depend on the machine's speed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from eadt.clock import monotonic_s
from eadt.cluster import Devices
from eadt.config import RunConfig
from eadt.control.setpoint import Setpoint
from eadt.coordination.coordinator import Coordinator
from eadt.coordination.metering import Metered
from eadt.coordination.nodes import NodeInfo
from eadt.coordination.placement import Host
from eadt.coordination.recorder import Recorder, begin_ledger
from eadt.coordination.settings import RunSettings
from eadt.errors import EadtError, EnvironmentFailure
from eadt.node.agent import AgentSettings, NodeAgent, agent_settings
from eadt.record.ledger import LedgerContents, read_ledger
from eadt.record.rows import AnyRow, ChangeRow, GenerationRow, Row, StepsRow
from eadt.testing.engine_side import Gates
from eadt.testing.faults import FaultPlan
from eadt.trainer import identify_run, run_settings
from eadt.training.checkpoint import CheckpointStore, Manifest, Shard
from eadt.training.engine_pool import EnginePool, EventCallback
from eadt.training.engine_spec import EngineSpec
from eadt.training.state import Span, StateLayout

Action = Setpoint | Callable[["LocalRun"], Awaitable[None] | None]
"""What a schedule asks for at a step: another setpoint, or anything else, to be done meanwhile."""

SomeRow = TypeVar("SomeRow", bound=Row)

_LOOK_S = 0.01
_BEAT_S = 1.0


class WarmEngines:
    """One fork server for all pretended nodes of a test session. Thread-safe.

    Args:
        folder: For logs.
        env: Environment of the fork server and so of all engines, over the present one.
    """

    def __init__(self, folder: Path, env: dict[str, str] | None = None) -> None:
        fixed = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
        self._pool = EnginePool(folder, self._dispatch, {**fixed, **(env or {})})
        self._sinks: dict[str, EventCallback] = {}
        self._numbers = itertools.count()

    def start(self) -> None:
        """Start the fork server; blocks until it is warm."""
        self._pool.start()
        self._pool.wait_warm(timeout_s=120)

    def stop(self) -> None:
        """End the fork server and what engines are left."""
        self._pool.stop()

    def pool_for_node(self, folder: Path, on_event: EventCallback, env: dict[str, str]) -> EnginePool:
        """A pool of its own for one node; takes what :class:`EnginePool` takes."""
        del folder, env
        prefix = f"n{next(self._numbers)}-"
        self._sinks[prefix] = on_event
        return _NodePool(self._pool, prefix)

    def _dispatch(self, engine_id: str, kind: str, values: dict[str, Any]) -> None:
        prefix, _, rest = engine_id.partition("-")
        self._sinks[prefix + "-"](rest, kind, values)


class _NodePool(EnginePool):
    """The engines of one pretended node in the shared pool, under names of their own."""

    def __init__(self, shared: EnginePool, prefix: str) -> None:
        self._shared = shared
        self._prefix = prefix

    def start(self) -> None:
        """The shared one has been started."""

    def wait_warm(self, timeout_s: float) -> None:
        self._shared.wait_warm(timeout_s)

    def fork(self, spec: EngineSpec) -> None:
        # The engine says hello under the name that the shared pool knows it by.
        self._shared.fork(replace(spec, engine_id=self._prefix + spec.engine_id))

    def send(self, engine_id: str, *command: Any) -> None:
        self._shared.send(self._prefix + engine_id, *command)

    def kill(self, engine_id: str, signal_number: int = 9) -> None:
        self._shared.kill(self._prefix + engine_id, signal_number)

    def pid(self, engine_id: str) -> int | None:
        return self._shared.pid(self._prefix + engine_id)

    def live(self) -> list[str]:
        own = (engine for engine in self._shared.live() if engine.startswith(self._prefix))
        return [engine.removeprefix(self._prefix) for engine in own]

    def stop(self, timeout_s: float = 5.0) -> None:
        del timeout_s
        for engine_id in self.live():
            self.kill(engine_id)


class LocalNodeClient:
    """The coordinator's line to an agent in the same process; see ``NodeClient``.

    Attributes:
        gone: Set when the node is pretended to be lost: nothing reaches it any more.
    """

    def __init__(
        self,
        agent: NodeAgent,
        on_fork: Callable[[Sequence[EngineSpec]], None],
        on_command: Callable[[str], None],
    ) -> None:
        self.gone = False
        self._agent = agent
        self._on_fork = on_fork
        self._on_command = on_command

    def fork(self, specs: Sequence[EngineSpec]) -> None:
        """See ``NodeClient``."""
        if not self.gone:
            self._on_fork(specs)
            self._agent.fork(specs)

    def send(self, engine_ids: Sequence[str], *command: Any) -> None:
        """See ``NodeClient``."""
        if not self.gone:
            self._agent.send(engine_ids, *command)
            self._on_command(command[0])

    def kill(self, engine_ids: Sequence[str]) -> None:
        """See ``NodeClient``."""
        if not self.gone:
            self._agent.kill(engine_ids)

    def set_use(self, use: str) -> None:
        """See ``NodeClient``."""
        if not self.gone:
            self._agent.set_use(use)

    def set_metered(self, metered: Metered) -> None:
        """See ``NodeClient``."""
        if not self.gone:
            self._agent.set_metered(metered)

    async def ping(self, timeout_s: float) -> None:
        """See ``NodeClient``."""
        del timeout_s
        self._check()

    async def available_bytes(self) -> int:
        """See ``NodeClient``."""
        self._check()
        return self._agent.available_bytes()

    async def reserve(self, num_bytes: int) -> str:
        """See ``NodeClient``."""
        self._check()
        return await asyncio.to_thread(self._agent.reserve, num_bytes)

    async def write_shard(
        self, step: int, index: int, slot: int, layout: StateLayout, spans: Sequence[Span], attempt: str
    ) -> Shard:
        """See ``NodeClient``."""
        self._check()
        return await asyncio.to_thread(self._agent.write_shard, step, index, slot, layout, spans, attempt)

    async def restore(self, manifest: Manifest, shards: Sequence[int], slot: int) -> list[Span]:
        """See ``NodeClient``."""
        self._check()
        return await asyncio.to_thread(self._agent.restore, manifest, shards, slot)

    def _check(self) -> None:
        if self.gone:
            raise EnvironmentFailure("a node agent does not answer (pretended loss)", code="EADT-336")


@dataclass(frozen=True)
class LocalResult:
    """What came of a local run.

    Attributes:
        status: ``completed``, ``interrupted`` or ``failed``.
        error: Why it failed.
        ledger: All rows of the run's ledger, earlier attempts' too.
        first_row: Rows of the ledger that were there before this attempt.
        folder: The run's folder: ledger and model; checkpoints are in the configured storage.
        attempt_folder: Folder of this attempt's faults and notes.
        store: The run's checkpoints.
        specs: Every engine that was started, in order.
        samples: By optimizer step, the sample indices that engines really took, in any order; a step
            that was done twice, because its work was lost, has them twice.
        final_model_path: The exported model.
    """

    status: str
    error: EadtError | None
    ledger: LedgerContents
    first_row: int
    folder: Path
    attempt_folder: Path
    store: CheckpointStore
    specs: list[EngineSpec]
    samples: dict[int, list[int]]
    final_model_path: str | None
    changes: list[dict[str, Any]] = field(default_factory=list)

    def rows(self, kind: type[SomeRow]) -> list[SomeRow]:
        """This attempt's ledger rows of one type."""
        return [row for row in self.ledger.rows[self.first_row :] if isinstance(row, kind)]

    @property
    def losses(self) -> dict[int, float | None]:
        """Loss by optimizer step, as the last generation that did it saw it."""
        return {
            step: loss
            for row in self.rows(StepsRow)
            for step, loss in enumerate(row.loss, start=row.first_step)
        }

    @property
    def steps(self) -> list[int]:
        """Numbers of the steps in the order in which they were done; one that was lost comes again."""
        return [step for row in self.rows(StepsRow) for step in range(row.first_step, row.last_step + 1)]

    @property
    def world_sizes(self) -> dict[int, int | None]:
        """Number of ranks by optimizer step."""
        return {
            step: row.world_size
            for row in self.rows(StepsRow)
            for step in range(row.first_step, row.last_step + 1)
        }

    @property
    def generations(self) -> list[GenerationRow]:
        """Rows of the generations that came to train."""
        return [row for row in self.rows(GenerationRow) if row.event == "started"]

    @property
    def resizes(self) -> list[ChangeRow]:
        """Changes of the setting."""
        return [row for row in self.rows(ChangeRow) if not row.recovery]

    @property
    def recoveries(self) -> list[ChangeRow]:
        """Recoveries to the same setting."""
        return [row for row in self.rows(ChangeRow) if row.recovery]

    @property
    def checkpoints(self) -> list[int]:
        """Steps of the published checkpoints, newest first."""
        return self.store.steps()


class LocalRun:
    """One run in this process; made and used by :func:`run_local`.

    Attributes:
        coordinator: The real one.
        faults: The plan that the engines carry out.
        commands: What engines have been told so far, such as ``stop`` or ``save``.
    """

    def __init__(
        self,
        config: RunConfig,
        engines: WarmEngines,
        *,
        nodes: Sequence[int],
        schedule: Sequence[tuple[int, Action]],
        faults: FaultPlan,
        node_options: dict[str, Any],
    ) -> None:
        self.faults = faults
        self._schedule = list(schedule)
        self._gates = Gates(faults.folder)
        self._engines = engines
        self._config = _wrapped(config, faults.folder)
        self._original = config
        self._hosts_per_node = tuple(nodes)
        self._node_options = node_options
        self._run_key = secrets.token_hex(16)
        self._agents: dict[str, NodeAgent] = {}
        self._clients: dict[str, LocalNodeClient] = {}
        self._infos: dict[str, NodeInfo] = {}
        self.commands: list[str] = []
        self._specs: list[EngineSpec] = []
        self._changes: list[str] = []
        self._open = True
        self._booking = True
        self.coordinator: Coordinator
        self._settings: RunSettings
        self._loop: asyncio.AbstractEventLoop

    async def run(self, timeout_s: float) -> LocalResult:
        """Carry the run through.

        Raises:
            TimeoutError: It did not end in time.
            RuntimeError: It completed without coming by a step of the schedule.
        """
        self._loop = asyncio.get_running_loop()
        folder = self._config.run_folder
        num_rows_before = len(read_ledger(folder / "ledger").rows)
        self._settings = await asyncio.to_thread(self._make_settings)
        recorder = Recorder()
        ledger, books = begin_ledger(folder / "ledger")
        recorder.begin(ledger, books)
        self._recorder = recorder
        self.coordinator = Coordinator(self._settings, recorder)
        try:
            async with asyncio.timeout(timeout_s):
                await self._start_nodes()
                serving = asyncio.create_task(self._serve_gates())
                others = [asyncio.create_task(self._beat()), asyncio.create_task(self._control_group())]
                await self.coordinator.run()
        except TimeoutError:
            raise TimeoutError(f"the run did not end: {self.coordinator.snapshot()}") from None
        finally:
            self._open = False
            await asyncio.gather(*(asyncio.to_thread(agent.stop) for agent in self._agents.values()))
            await asyncio.sleep(0)  # the meters' last rows are on their way into this loop
            self._booking = False
            recorder.close()
            ledger.close()
        served = serving.done()
        serving.cancel()
        for task in others:
            task.cancel()
        if served:
            serving.result()
        elif self.coordinator.status == "completed":
            raise RuntimeError("the run completed without coming by every step of the schedule")
        return LocalResult(
            status=self.coordinator.status,
            error=self.coordinator.error,
            ledger=read_ledger(folder / "ledger"),
            first_row=num_rows_before,
            folder=folder,
            attempt_folder=self.faults.folder,
            store=self.store,
            specs=self._specs,
            samples=_read_samples(self.faults.folder),
            final_model_path=self.coordinator.final_model_path,
            changes=[self.coordinator.change_state(name) for name in self._changes],
        )

    # -- for actions of a schedule ------------------------------------------------------------------

    @property
    def store(self) -> CheckpointStore:
        """The run's checkpoints."""
        return CheckpointStore(self._settings.storage_path, self._settings.run_id)

    @property
    def node_ids(self) -> list[str]:
        """The pretended nodes."""
        return list(self._agents)

    def engine_pids(self, node_id: str) -> dict[str, int]:
        """Process numbers of the engines that live on a node."""
        return self._agents[node_id].engine_pids()

    def lose_node(self, node_id: str) -> None:
        """Let a node vanish: its engines are killed, its agent answers no more, its memory is gone."""
        self._clients[node_id].gone = True
        self._agents[node_id].stop()

    async def interrupt(self) -> None:
        """As Ctrl-C does; returns when the engines have been told to stop."""
        before = self.commands.count("stop")
        self.coordinator.interrupt("the test interrupts")
        await self.until(lambda: self.commands.count("stop") > before)

    async def until(self, condition: Callable[[], Any]) -> None:
        """Return when ``condition`` holds; the run's own deadline bounds it."""
        while not condition():
            await asyncio.sleep(_LOOK_S)

    @property
    def memory_folders(self) -> dict[str, Path]:
        """By node, the folder with its state slots."""
        return {node_id: Path(info.slot_paths[0]).parent for node_id, info in self._infos.items()}

    # -- inside -------------------------------------------------------------------------------------

    def _make_settings(self) -> RunSettings:
        devices = Devices(is_gpu=False, num_devices=len(self._hosts_per_node), num_cpus=os.cpu_count() or 1)
        run = identify_run(self._config)
        run.write(self._config.run_folder)
        return run_settings(self._config, run.run_id, devices, None)

    async def _start_nodes(self) -> None:
        for number in range(len(self._hosts_per_node)):
            node_id = f"node{number}"
            agent = NodeAgent(
                self._agent_settings(node_id, f"127.0.0.{number + 1}"),
                partial(self._from_agent, self._engine_event, node_id),
                partial(self._from_agent, self._book, node_id),
                make_pool=self._engines.pool_for_node,
            )
            self._agents[node_id] = agent
            self._clients[node_id] = LocalNodeClient(agent, self._specs.extend, self.commands.append)
            self._infos[node_id] = await asyncio.to_thread(agent.start, lambda _: None)
            self.coordinator.add_node(self._infos[node_id], self._clients[node_id])

    async def _control_group(self) -> None:
        """What Ray Train's controller does: give the worker group the size that the coordinator asks for."""
        places = [f"node{number}" for number, count in enumerate(self._hosts_per_node) for _ in range(count)]
        present = 0
        while True:
            target = len(places)
            if self._settings.mode in ("group", "restart"):
                target, _ = self.coordinator.host_target(
                    self.node_ids, len(places) - present, present or None, group_is_up=present > 0
                )
            if target != present:
                present = target
                for rank, node_id in enumerate(places[:present]):
                    self.coordinator.register_host(Host(rank, present, node_id))
            await asyncio.sleep(_LOOK_S)

    def _agent_settings(self, node_id: str, node_ip: str) -> AgentSettings:
        folders = {}
        for name, key in (("memory", "shared_memory_dir"), ("spill", "spill_dir")):
            folder = self._config.run_folder / f"{name}-{node_id}"
            folder.mkdir(parents=True, exist_ok=True)
            folders[key] = str(folder)
        settings = agent_settings(self._config, self._settings, node_id, node_ip)
        return replace(settings, **(folders | self._node_options))

    def _from_agent(self, callback: Callable[..., None], *arguments: Any) -> None:
        """From any of an agent's threads into the coordinator's loop, in the caller's order."""
        if self._booking:
            self._loop.call_soon_threadsafe(callback, *arguments)

    def _engine_event(self, node_id: str, engine_id: str, kind: str, values: dict[str, Any]) -> None:
        self.coordinator.heard(node_id, monotonic_s())
        if self._open and not self._clients[node_id].gone:
            self.coordinator.engine_event(node_id, engine_id, kind, values)

    def _book(self, node_id: str, row: AnyRow) -> None:
        self.coordinator.heard(node_id, monotonic_s())
        if self._booking:
            self.coordinator.book(row)

    async def _serve_gates(self) -> None:
        for step, action in self._schedule:
            stops_before = self.commands.count("stop")
            while not self._gates.is_reached(step):
                await asyncio.sleep(_LOOK_S)
            if isinstance(action, Setpoint):
                await self._apply(step, action)
            else:
                pending = action(self)
                if pending is not None:
                    await pending
            # They go on when they know of it, else the step at which they act would be chance.
            told_to_stop = self.commands.count("stop") > stops_before
            self._gates.open(step, self.coordinator.snapshot()["generation"] if told_to_stop else None)

    async def _beat(self) -> None:
        """What hosts do: keep their engines' lease."""
        while True:
            for agent in self._agents.values():
                agent.renew_lease()
            await asyncio.sleep(_BEAT_S)

    async def _apply(self, step: int, setpoint: Setpoint) -> None:
        """Ask for a setpoint, and return when the engines have been told to stop for it."""
        before = self.commands.count("stop")
        name = f"change-{step}"
        answer = self.coordinator.apply(setpoint, f"the test asks at step {step}", name)
        if not answer["accepted"]:
            raise RuntimeError(f"refused: {answer['why']}")
        self._changes.append(name)
        await self.until(lambda: self.commands.count("stop") > before)


def run_local(
    config: RunConfig,
    engines: WarmEngines,
    folder: Path,
    *,
    nodes: Sequence[int] = (4,),
    schedule: Sequence[tuple[int, Action]] = (),
    plan_faults: Callable[[FaultPlan], None] | None = None,
    timeout_s: float = 120.0,
    **node_options: Any,
) -> LocalResult:
    """Train what a configuration says, without Ray. Blocks.

    Args:
        config: The run; its folder and storage should be the test's own.
        engines: The session's warm fork server.
        folder: For faults, gates and notes of this attempt; must be new.
        nodes: Hosts on each pretended node.
        schedule: What to ask for when the engines have computed a step (1-based), in order. They
            wait until it has taken hold, and act on it at the end of the step after.
        plan_faults: Fills in what is to go wrong.
        timeout_s: Time for everything.
        **node_options: Replace fields of every node's :class:`AgentSettings`.

    Raises:
        TimeoutError: It did not end in time.
    """
    faults = FaultPlan(folder)
    if plan_faults is not None:
        plan_faults(faults)
    gates = Gates(folder)
    for step, _ in schedule:
        gates.close(step)

    async def carry_through() -> LocalResult:
        run = LocalRun(
            config, engines, nodes=nodes, schedule=schedule, faults=faults, node_options=node_options
        )
        return await run.run(timeout_s)

    return asyncio.run(carry_through())


def _wrapped(config: RunConfig, folder: Path) -> RunConfig:
    """The same run, its training function wrapped by the one for tests."""
    training = config.training
    arguments = {
        "folder": str(folder),
        "inner": training.train_function,
        "inner_args": training.train_function_args,
    }
    changes = {"train_function": "eadt.testing.engine_side:train", "train_function_args": arguments}
    return config.model_copy(update={"training": training.model_copy(update=changes)})


def _read_samples(folder: Path) -> dict[int, list[int]]:
    samples: dict[int, list[int]] = {}
    for path in sorted(folder.glob("samples-*.jsonl")):
        for line in path.read_text().splitlines():
            step, rows = json.loads(line)
            samples.setdefault(step, []).extend(rows)
    return samples
