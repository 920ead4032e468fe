"""The Ray side of coordinator and node agents: actors around plain classes, and lines between them.

Both actors are asyncio actors: Ray then runs calls in the order in which one caller made them, and
a long one does not hold up the others.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from eadt.adapters.priority import rise_above_workers
from eadt.clock import SYSTEM_CLOCK
from eadt.control.setpoint import Setpoint
from eadt.coordination.coordinator import Coordinator
from eadt.coordination.metering import Metered
from eadt.coordination.nodes import NodeInfo, NodeReading
from eadt.coordination.outbox import Item, Outbox
from eadt.coordination.placement import Host
from eadt.coordination.progress import while_it_moves
from eadt.coordination.recorder import Recorder, begin_ledger
from eadt.coordination.settings import RunSettings
from eadt.errors import EadtError, EnvironmentFailure
from eadt.node.agent import AgentSettings, NodeAgent
from eadt.record.ledger import LedgerWriter
from eadt.record.rows import AnyRow, NoteRow
from eadt.record.status import RunStatus, run_status
from eadt.training.checkpoint import Manifest, Shard
from eadt.training.engine_spec import EngineSpec
from eadt.training.state import Span, StateLayout

NAMESPACE = "eadt"

_CALL_TIMEOUT_S = 600.0
_MOVED_TIMEOUT_S = 30.0
_DELIVERY_S = 30.0
_FLUSH_S = 30.0
_LEDGER_CLOSE_S = 30.0
_SUPERVISOR_SILENT_S = 30.0


def coordinator_name(run_id: str) -> str:
    """Name of a run's coordinator in the namespace ``eadt``."""
    return f"coordinator-{run_id}"


def agent_prefix(run_id: str) -> str:
    """Names of a run's node agents, but for the Ray node id that follows."""
    return f"node-agent-{run_id}-"


class RayNodeClient:
    """A node agent's actor as the coordinator sees it; see ``NodeClient``."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def fork(self, specs: Sequence[EngineSpec]) -> None:
        """See ``NodeClient``."""
        self._handle.fork.remote(specs)

    def send(self, engine_ids: Sequence[str], *command: Any) -> None:
        """See ``NodeClient``."""
        self._handle.send.remote(engine_ids, command)

    def kill(self, engine_ids: Sequence[str]) -> None:
        """See ``NodeClient``."""
        self._handle.kill.remote(engine_ids)

    def set_use(self, use: str) -> None:
        """See ``NodeClient``."""
        self._handle.set_use.remote(use)

    def set_metered(self, metered: Metered) -> None:
        """See ``NodeClient``."""
        self._handle.set_metered.remote(metered)

    async def ping(self, timeout_s: float) -> None:
        """See ``NodeClient``."""
        await self._call(self._handle.ping.remote(), timeout_s)

    async def available_bytes(self) -> int:
        """See ``NodeClient``."""
        return int(await self._call(self._handle.available_bytes.remote()))

    async def reserve(self, num_bytes: int) -> str:
        """See ``NodeClient``."""
        return str(await self._call(self._handle.reserve.remote(num_bytes)))

    async def write_shard(
        self, step: int, index: int, slot: int, layout: StateLayout, spans: Sequence[Span], attempt: str
    ) -> Shard:
        """See ``NodeClient``."""
        reference = self._handle.write_shard.remote(step, index, slot, layout, spans, attempt)
        shard: Shard = await self._carry(reference)
        return shard

    async def restore(self, manifest: Manifest, shards: Sequence[int], slot: int) -> list[Span]:
        """See ``NodeClient``."""
        spans: list[Span] = await self._carry(self._handle.restore.remote(manifest, shards, slot))
        return spans

    async def _carry(self, reference: Any) -> Any:
        """The result of a call that writes or reads the storage: it may take as long as bytes move."""
        return await while_it_moves(self._call(reference, None), self._moved_bytes)

    async def _moved_bytes(self) -> int:
        return int(await self._call(self._handle.moved_bytes.remote(), _MOVED_TIMEOUT_S))

    async def _call(self, reference: Any, timeout_s: float | None = _CALL_TIMEOUT_S) -> Any:
        try:
            return await asyncio.wait_for(reference, timeout_s)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EadtError):
                raise error.cause from None
            raise EnvironmentFailure(f"a node agent failed: {error.cause}", code="EADT-336") from error
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise EnvironmentFailure(
                f"a node agent does not answer ({type(error).__name__})", code="EADT-336"
            ) from error


class CoordinatorActor:
    """Actor around :class:`~eadt.coordination.coordinator.Coordinator`."""

    def __init__(self, settings: RunSettings, run_folder: str) -> None:
        rise_above_workers()
        self._ledger_folder = Path(run_folder) / "ledger"
        self._ledger: LedgerWriter | None = None
        self._recorder = Recorder()
        self._coordinator = Coordinator(settings, self._recorder)
        self._kept: dict[str, dict[str, Any]] = {}
        self._batches: dict[tuple[str, str], int] = {}
        self._supervisor_heard_s: float | None = None
        self._coordinator.announce(ray.get_runtime_context().get_node_id(), os.getpid())

    async def run(self) -> None:
        """Carry the run through; returns at its end."""
        ledger, books = await asyncio.to_thread(begin_ledger, self._ledger_folder)
        self._ledger = ledger
        self._recorder.begin(ledger, books)
        await self._coordinator.run()

    async def close(self) -> None:
        """Write the last rows down."""
        self._recorder.close()
        if self._ledger is not None:
            await asyncio.to_thread(self._ledger.close, _LEDGER_CLOSE_S)

    # From hosts and from Ray Train's controller.

    async def register_host(self, place: dict[str, Any]) -> None:
        """A host has come."""
        self._coordinator.register_host(Host(**place))

    async def host_beat(self, world_rank: int, hold_s: float) -> bool:
        """A host is there; returns at the run's end, or after ``hold_s`` s: whether it should stay."""
        self._coordinator.host_beat(world_rank)
        return not await self._coordinator.wait_for_end(hold_s)

    async def host_target(
        self, alive_nodes: list[str], num_free: int, present: int | None, group_is_up: bool
    ) -> dict[str, int]:
        """Wanted size of the worker group."""
        if present is None:  # a host was lost, perhaps with its node: Ray may not know yet
            await self._coordinator.drop_dead_nodes()
        target, held = self._coordinator.host_target(alive_nodes, num_free, present, group_is_up=group_is_up)
        return {"target": target, "held": held}

    # From node agents.

    async def add_node(self, info: NodeInfo, agent: Any) -> None:
        """A node agent is up."""
        self._coordinator.add_node(info, RayNodeClient(agent))

    async def announce(self, node_id: str, pid: int) -> None:
        """A process is this run's."""
        self._coordinator.announce(node_id, pid)

    async def deliver(
        self, node_id: str, agent_id: str, number: int, sent_s: float, items: list[Item]
    ) -> None:
        """What engines said and ledger rows of a node, in order. A batch that comes again is left out.

        Args:
            node_id: The node.
            agent_id: The agent's life: another one counts its batches anew.
            number: The batch's number.
            sent_s: When it was sent, node time in s.
            items: Events and rows.
        """
        self._coordinator.heard(node_id, sent_s)
        if number <= self._batches.get((node_id, agent_id), 0):
            return
        self._batches[node_id, agent_id] = number
        for item in items:
            if len(item) == 1:
                self._coordinator.book(item[0])
            else:
                self._coordinator.engine_event(node_id, *item)

    async def book(self, row: AnyRow) -> None:
        """A ledger row of the supervisor."""
        self._recorder.book(row)

    # From the driver and the supervisor.

    async def lose_node(self, node_id: str, why: str) -> None:
        """A node has gone."""
        self._coordinator.lose_node(node_id, why)

    async def drain(self, node_id: str, deadline_unix_s: float | None) -> None:
        """A node will be taken away."""
        self._coordinator.drain(node_id, deadline_unix_s)

    async def interrupt(self, reason: str) -> None:
        """End the run with a checkpoint."""
        self._coordinator.interrupt(reason)

    async def fail(self, error: EadtError) -> None:
        """End the run at once."""
        self._coordinator.fail(error)

    async def apply(self, setpoint: Setpoint, reason: str, decision_id: str | None) -> dict[str, Any]:
        """Ask for a new setpoint."""
        return self._coordinator.apply(setpoint, reason, decision_id)

    async def change_state(self, decision_id: str) -> dict[str, Any]:
        """What came of an accepted change."""
        return self._coordinator.change_state(decision_id)

    async def snapshot(self) -> dict[str, Any]:
        """The run as it stands, for the supervisor and for the end of the driver."""
        self._supervisor_heard_s = self._recorder.at_s
        return self._coordinator.snapshot()

    async def look(self, events_seen: int) -> dict[str, Any]:
        """What the driver shows: ``snapshot``, ``status`` (a ``RunStatus``), ``events`` since a number, and
        ``events_seen`` for the next look."""
        events, events_seen = self._recorder.events_since(events_seen)
        return {
            "snapshot": self._coordinator.snapshot(),
            "status": self._status(),
            "events": events,
            "events_seen": events_seen,
        }

    async def status(self) -> dict[str, Any]:
        """What the run says of itself; see ``eadt.record.status.RunStatus``."""
        return self._status().as_dict()

    def _status(self) -> RunStatus:
        kept = self._kept.get("supervisor", {})
        heard_s = self._supervisor_heard_s
        live = replace(
            self._coordinator.live_facts(),
            policy=kept.get("policy"),
            supervisor_phase=kept.get("phase", "starting"),
            supervisor_answers=heard_s is not None and self._recorder.at_s - heard_s < _SUPERVISOR_SILENT_S,
            best_efficiency=kept.get("best_efficiency"),
        )
        return run_status(self._recorder.books, live, now_unix_s=SYSTEM_CLOCK.unix_s())

    async def throughput(self, window_s: float, since_s: float) -> tuple[float | None, int]:
        """Samples/s and number of the steps of the last ``window_s`` s; session time."""
        return self._recorder.throughput(window_s, since_s)

    async def keep_state(self, name: str, value: dict[str, Any]) -> None:
        """Keep what an actor needs when it is started again."""
        self._kept[name] = value

    async def kept_state(self, name: str) -> dict[str, Any] | None:
        """What :meth:`keep_state` was last given; ``None`` without any."""
        return self._kept.get(name)


class NodeAgentActor:
    """Actor around :class:`~eadt.node.agent.NodeAgent`."""

    def __init__(self, settings: AgentSettings, coordinator: str) -> None:
        rise_above_workers()
        self._settings = settings
        self._coordinator = ray.get_actor(coordinator, namespace=NAMESPACE)
        self._agent = NodeAgent(settings, self._on_event, self._on_row)
        self._outbox = Outbox(self._deliver)
        self._life = secrets.token_hex(8)
        self._num_dropped_said = 0

    def _on_event(self, engine_id: str, kind: str, values: dict[str, Any]) -> None:
        self._outbox.put((engine_id, kind, values))

    def _on_row(self, row: AnyRow) -> None:
        self._outbox.put((row,))

    def _deliver(self, number: int, items: list[Item]) -> None:
        ray.get(
            self._coordinator.deliver.remote(
                self._settings.node_id, self._life, number, SYSTEM_CLOCK.monotonic_s(), items
            ),
            timeout=_DELIVERY_S,
        )
        num_dropped = self._outbox.num_dropped
        if num_dropped > self._num_dropped_said:
            self._num_dropped_said = num_dropped
            text = (
                f"{num_dropped} rows of node {self._settings.node_id[:8]} could not be delivered and are lost"
            )
            self._on_row(NoteRow(code="EADT-349", text=text))

    async def start(self) -> None:
        """Start everything on this node and join the run."""
        self._outbox.start()
        info = await asyncio.to_thread(self._agent.start, lambda _: None)
        me = ray.get_runtime_context().current_actor
        await self._coordinator.add_node.remote(info, me)

    async def stop(self) -> None:
        """End everything on this node."""
        await asyncio.to_thread(self._agent.stop)
        await asyncio.to_thread(self._outbox.flush, _FLUSH_S)
        self._outbox.close()

    async def ping(self) -> str:
        """Answer."""
        return self._settings.node_id

    async def fork(self, specs: Sequence[EngineSpec]) -> None:
        """Start engines."""
        self._agent.fork(specs)

    async def send(self, engine_ids: Sequence[str], command: tuple[Any, ...]) -> None:
        """Send a command to engines."""
        self._agent.send(engine_ids, *command)

    async def kill(self, engine_ids: Sequence[str], signal_number: int = 9) -> None:
        """End engines at once."""
        self._agent.kill(engine_ids, signal_number)

    async def engine_pids(self) -> dict[str, int]:
        """Process numbers of live engines."""
        return self._agent.engine_pids()

    async def set_use(self, use: str) -> None:
        """Book energy under a use."""
        self._agent.set_use(use)

    async def set_metered(self, metered: Metered) -> None:
        """Which components this node books."""
        self._agent.set_metered(metered)

    async def renew_lease(self) -> None:
        """A host is there."""
        self._agent.renew_lease()

    async def reading(self, window_s: float) -> NodeReading:
        """What the meter says of the last ``window_s`` s."""
        return self._agent.reading(window_s)

    async def available_bytes(self) -> int:
        """Memory for new engines."""
        return await asyncio.to_thread(self._agent.available_bytes)

    async def reserve(self, num_bytes: int) -> str:
        """Room for state."""
        return await asyncio.to_thread(self._agent.reserve, num_bytes)

    async def write_shard(
        self, step: int, index: int, slot: int, layout: StateLayout, spans: Sequence[Span], attempt: str
    ) -> Shard:
        """Write this node's part of a saved state."""
        return await asyncio.to_thread(self._agent.write_shard, step, index, slot, layout, spans, attempt)

    async def restore(self, manifest: Manifest, shards: Sequence[int], slot: int) -> list[Span]:
        """Read shards of a checkpoint."""
        return await asyncio.to_thread(self._agent.restore, manifest, shards, slot)

    async def moved_bytes(self) -> int:
        """Bytes that went to and came from the storage so far."""
        return self._agent.moved_bytes
