"""The coordinator: brings the run to its setpoint, one generation of engines after another.

One loop compares what is wanted (setpoint, hosts, drains) with what runs, and takes the next step:
build engines ahead, stop the present ones at the end of a step, let the next ones take their state.
Every lever and every recovery is this same path. It decides nothing about energy, and it is not
needed for a step: while it is away, engines train on.

Everything here runs in one asyncio loop; no method blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Coroutine
from dataclasses import asdict
from typing import Any

from eadt.control.batch import feasible_worker_counts, plan_batch
from eadt.control.setpoint import Setpoint
from eadt.coordination.generation import Generation, Phase
from eadt.coordination.hosts import HostTable
from eadt.coordination.metering import Metered, booking_nodes, elect
from eadt.coordination.nodes import NodeClient, NodeInfo, NodeTime
from eadt.coordination.placement import Host, Placement, place
from eadt.coordination.recorder import Change, Recorder, StepRecord
from eadt.coordination.settings import RunSettings
from eadt.coordination.specs import engine_bytes, make_specs
from eadt.coordination.state_keeper import StateKeeper
from eadt.errors import ConfigError, EadtError, EnvironmentFailure
from eadt.record.rows import (
    AnyRow,
    EndRow,
    FaultRow,
    GenerationRow,
    NodeRow,
    RollbackRow,
    SessionRow,
    ValidationRow,
)
from eadt.record.status import LiveFacts

logger = logging.getLogger(__name__)

_TICK_S = 0.25
_PING_TIMEOUT_S = 3.0
_FIRST_NODES_S = 120.0
"""How long a run waits at its start for the agents of all its hosts' nodes."""

LAST_SAVE_S = 600.0
"""How long a run that ends with an error takes to make its newest state durable, at most."""

_PEER_LOST_GRACE_S = 0.5
"""How long to wait for the cause, when an engine only knows that another one has gone."""


class Coordinator:
    """See the module. Started by :meth:`run`, which ends with the run."""

    def __init__(self, settings: RunSettings, recorder: Recorder) -> None:
        self.settings = settings
        self.recorder = recorder
        self.status = "starting"
        self.error: EadtError | None = None
        self.final_model_path: str | None = None
        self.num_params: int | None = None
        self._nodes: dict[str, tuple[NodeInfo, NodeClient]] = {}
        self._times: dict[str, NodeTime] = {}
        self._metered: dict[str, Metered] = {}
        self._own_pids: dict[str, set[int]] = {}
        self._said: set[str] = set()
        self._draining: dict[str, float | None] = {}
        self._hosts = HostTable()
        self._num_recovering = 0
        self._host_target: int | None = None
        self._desired = settings.setpoint
        self._desired_reason = "the run starts"
        self._decision_id: str | None = None
        self._changes: dict[str, dict[str, Any]] = {}
        self._current: Generation | None = None
        self._next: Generation | None = None
        self._number = 0
        self._state = StateKeeper(settings, recorder, self._nodes, self._on_granted)
        self._ahead_failed: Setpoint | None = None
        self._proven: Setpoint | None = None
        self._num_failures = 0
        self._failed_at_step = -1
        self._step = 0
        self._last_step: StepRecord | None = None
        self._setting = 0
        self._in_force: Setpoint | None = None
        self._interrupt_reason: str | None = None
        self._failure: EadtError | None = None
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._busy: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._feasible = feasible_worker_counts(
            settings.train_batch_size, settings.max_micro_batch, settings.min_workers, settings.max_workers
        )

    # -- the loop -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Carry the run through to its end. Errors end the run, and are kept in ``error``."""
        try:
            await self._start()
            while not self.is_over and self._failure is None:
                self._wake.clear()
                self._reconcile()
                self.recorder.tick(self._step)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), _TICK_S)
        except EadtError as error:
            self.fail(error)
        except Exception as error:
            self.fail(_internal(error))
        if self._failure is not None and not self.is_over:
            await self._conclude_failed(self._failure)

    @property
    def is_over(self) -> bool:
        """Whether the run has reached its end, good or bad."""
        return self.status in ("completed", "interrupted", "failed")

    async def _start(self) -> None:
        await self._state.find_checkpoint()
        self._step = self._state.resumed_step
        self.recorder.book(
            SessionRow(
                run_id=self.settings.run_id,
                name=self.settings.name,
                resumed_step=self._state.resumed_step,
                train_batch_size=self.settings.train_batch_size,
                sequence_length=self.settings.job.training.sequence_length,
                max_steps=self.settings.job.max_steps,
                config=self.settings.run_row["config"],
                versions=self.settings.run_row["versions"],
            )
        )

    def _reconcile(self) -> None:
        """Compare what is wanted with what runs, and take the next step towards it."""
        if self._num_recovering:
            return  # which nodes are left is being found out
        if self._busy is not None:
            if not self._busy.done():
                return
            task, self._busy = self._busy, None
            task.result()
        current, following = self._current, self._next
        if self._interrupt_reason is not None:
            self._reconcile_interrupt(current)
        elif current is None or not current.is_alive:
            if following is None:
                placement = self._wanted_placement()
                if placement is not None:
                    self._busy = self._spawn(self._begin(placement))
            elif following.phase is Phase.READY:
                self._busy = self._spawn(self._go(following))
        elif current.phase is Phase.TRAINING:
            self._reconcile_training(current, following)

    def _reconcile_training(self, current: Generation, following: Generation | None) -> None:
        placement = self._wanted_placement()
        if following is not None:
            if placement is None or not self._is_for(following, placement):
                self._discard(following)
            elif following.phase is Phase.READY:
                self._ask_stop(current)
            return
        if placement is None:
            if self._must_leave(current):
                self._ask_stop(current)
        elif not self._is_for(current, placement):
            if self.settings.mode == "restart" or self._ahead_failed == self._effective(placement):
                self._ask_stop(current)
            else:
                self._busy = self._spawn(self._begin_ahead(current, placement))

    def _reconcile_interrupt(self, current: Generation | None) -> None:
        if self._next is not None:
            self._discard(self._next)
        if current is not None and current.phase is Phase.TRAINING:
            self._ask_stop(current)
        elif current is None or not current.is_alive:
            self._busy = self._spawn(self._conclude_interrupted())

    # -- what is wanted ---------------------------------------------------------------------------

    def _effective(self, placement: Placement) -> Setpoint:
        """The setpoint with the number of workers that can be placed."""
        return self._desired.with_(num_workers=placement.num_workers)

    def _is_for(self, generation: Generation, placement: Placement) -> bool:
        devices = sorted(seat.host.device for seat in placement.seats)
        return generation.setpoint == self._effective(placement) and devices == sorted(
            seat.host.device for seat in generation.placement.seats
        )

    def _wanted_placement(self) -> Placement | None:
        """Where engines should run now; ``None`` while that cannot be said, or none should."""
        if self._desired.paused or not self._hosts.is_complete:
            return None
        hosts_follow_workers = self.settings.mode in ("group", "restart")
        if self._host_target is None:
            if hosts_follow_workers:
                return None  # Ray Train has not asked yet how many hosts this setpoint wants
        elif self._hosts.group_size != self._host_target and (hosts_follow_workers or self._is_training):
            return None  # Ray Train is about to resize the worker group; a recovery does not wait for it
        gone = self._hosts.node_ids - set(self._nodes)
        if gone and self._current is None and self.recorder.at_s < _FIRST_NODES_S:
            return None  # better to begin with all nodes than to resize at once
        placement = place(self._hosts.hosts, self._desired, self._feasible, gone | set(self._draining))
        return placement if placement.num_workers else None

    def _must_leave(self, current: Generation) -> bool:
        """Whether the engines should stop though no others can take over."""
        if self._desired.paused:
            return True
        if self.settings.mode == "restart" and self._desired.num_workers != current.setpoint.num_workers:
            return True
        return any(node_id in self._draining for node_id in current.placement.node_ids)

    def host_target(
        self, alive_nodes: Collection[str], num_free: int, present: int | None, *, group_is_up: bool
    ) -> tuple[int, int]:
        """Hosts that Ray Train's worker group should have; asked by its scaling policy.

        In ``group`` and ``restart`` mode hosts come and go with the workers; else there are as many
        as could ever be active, and those without an engine are parked.

        Args:
            alive_nodes: Ray nodes that are alive.
            num_free: Hosts that fit beside everything that runs now.
            present: Hosts of the group that runs; ``None`` while none runs undisturbed.
            group_is_up: Whether the hosts that are known still hold their resources.

        Returns:
            The wanted size, and how many hosts hold resources now.
        """
        held = present
        if held is None:
            held = self._hosts.num_holding(set(alive_nodes) & set(self._nodes), group_is_up=group_is_up)
        most = self.settings.max_workers
        if self.settings.mode in ("group", "restart"):
            most = self._desired.num_workers
            if self.settings.mode == "restart" and self._is_training:
                most = held or most  # first the checkpoint
        self._host_target = max(1, min(most, held + num_free))
        return self._host_target, held

    def host_beat(self, world_rank: int) -> None:
        """A host is there."""
        self._hosts.beat(world_rank)

    async def wait_for_end(self, timeout_s: float) -> bool:
        """Wait for the run's end; returns whether it has come."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), timeout_s)
        return self.is_over

    @property
    def _is_training(self) -> bool:
        return self._current is not None and self._current.is_alive

    # -- building the next generation ---------------------------------------------------------------

    async def _begin(self, placement: Placement) -> None:
        """Build a generation while none trains, from the newest state that is complete."""
        self._state.drop_lost()
        if self._state.newest is None and self._state.has_checkpoint:
            await self._state.restore(placement.node_ids)
            self._step = max(self._step, self._state.resumed_step)
        self._fork(placement, resume=self._state.newest is not None)

    async def _begin_ahead(self, current: Generation, placement: Placement) -> None:
        """Build the next generation beside the one that trains, where memory allows."""
        ahead = self.settings.prepare_ahead
        if ahead == "never" or (ahead == "auto" and not await self._has_room(current, placement)):
            self._ahead_failed = self._effective(placement)
            return
        if current.phase is Phase.TRAINING and self._next is None:
            self._fork(placement, resume=True)

    async def _has_room(self, current: Generation, placement: Placement) -> bool:
        for node_id in placement.node_ids:
            seats = [seat for seat in placement.seats if seat.host.node_id == node_id]
            needed = engine_bytes(current, placement.num_workers) * len(seats)
            try:
                available = await self._nodes[node_id][1].available_bytes()
            except EadtError:
                return False
            if available < needed:
                return False
        return True

    def _fork(self, placement: Placement, *, resume: bool) -> None:
        self._number += 1
        batch = plan_batch(
            self.settings.train_batch_size, placement.num_workers, self.settings.max_micro_batch
        )
        setpoint = self._effective(placement)
        infos = {node_id: self._nodes[node_id][0] for node_id in placement.node_ids}
        self._next = Generation(
            number=self._number,
            setpoint=setpoint,
            placement=placement,
            batch=batch,
            specs=make_specs(
                self.settings,
                self._number,
                self._setting_for(setpoint),
                placement,
                batch,
                setpoint,
                infos,
                resume=resume,
            ),
            reason=self._desired_reason,
            decision_id=self._decision_id,
            setting=self._setting_for(setpoint),
            started_at_s=self.recorder.at_s,
        )
        for node_id in placement.node_ids:
            specs = [spec for spec in self._next.specs if spec.node_id == node_id]
            self._nodes[node_id][1].fork(specs)

    def _setting_for(self, setpoint: Setpoint) -> int:
        """Number of the setting that a next generation trains at."""
        same = self._in_force is not None and self._in_force == setpoint
        return self._setting if same else self._setting + 1

    def _discard(self, generation: Generation) -> None:
        """Give up a generation that does not train."""
        generation.phase = Phase.FAILED
        self._kill(generation)
        if self._next is generation:
            self._next = None

    def _kill(self, generation: Generation) -> None:
        alive = {spec.rank for spec in generation.specs} - generation.ended
        for node_id, engine_ids in generation.engines_by_node(alive).items():
            if node_id in self._nodes:
                self._nodes[node_id][1].kill(engine_ids)

    def _tell(self, generation: Generation, *command: Any, ranks: set[int] | None = None) -> None:
        for node_id, engine_ids in generation.engines_by_node(ranks).items():
            if node_id in self._nodes:
                self._nodes[node_id][1].send(engine_ids, *command)

    # -- changing over ------------------------------------------------------------------------------

    def _ask_stop(self, current: Generation) -> None:
        if self._state.can_save():
            current.phase = Phase.STOPPING
            self._tell(current, "stop", ranks={0})

    async def _go(self, generation: Generation) -> None:
        """Let a generation that is ready take the newest state and train."""
        saved = self._state.newest
        if saved is None and generation.specs[0].resume:
            self._discard(generation)  # it was built for a state that has been lost since
            return
        if saved is not None and saved.layout.fingerprint != generation.layout.fingerprint:
            raise ConfigError(
                f"the state of step {saved.step} is of another model than the configuration's",
                code="EADT-252",
                means="going on would throw that state away",
                fix="give this run another run.name, or start it anew with --fresh",
            )
        await self._state.reserve(generation)
        slots = self._state.begin_loading()
        generation.phase = Phase.LOADING
        previous = self._current
        self._current, self._next = generation, None
        self._tell(generation, "go", saved, slots)
        self._open_change(previous, generation)
        taking_part = set(generation.placement.node_ids)
        for node_id, (_, client) in self._nodes.items():
            if node_id not in taking_part:
                client.set_use("idle")

    def _open_change(self, previous: Generation | None, generation: Generation) -> None:
        if previous is None:
            return
        resumed = self._state.newest.step if self._state.newest is not None else 0
        group_changed = self._hosts.take_group_change()
        kind = "restart" if self.settings.mode == "restart" else "group" if group_changed else "in_place"
        parts: dict[str, float] = {}
        for save in previous.saves.get(resumed, {}).values():
            parts["save_s"] = max(parts.get("save_s", 0.0), save["seconds"])
        parts["prepare_s"] = self.recorder.at_s - generation.started_at_s
        self.recorder.open_change(
            Change(
                kind=kind,
                reason=generation.reason,
                before=previous.setpoint,
                after=generation.setpoint,
                from_workers=previous.placement.num_workers,
                last_step=self._last_step,
                resumed_step=resumed,
                lost_steps=max(0, self._step - resumed),
                decision_id=generation.decision_id,
                parts=parts,
            )
        )

    def _on_loaded(self, generation: Generation) -> None:
        generation.phase = Phase.TRAINING
        self.status = "training"
        # What the next generation is for, unless somebody says so.
        self._desired_reason, self._decision_id = "the hosts have changed", None
        change = self.recorder.change
        if change is not None:
            change.parts["load_s"] = max(event["timings"]["load_s"] for event in generation.loaded.values())
        self._state.end_loading()
        self._setting, self._in_force = generation.setting, generation.setpoint
        first = generation.loaded[0]
        began_s = self._session_s(generation.specs[0].node_id, first["t"])
        self.recorder.become("useful", began_s, first["step"], generation.number, generation.setting)
        self.recorder.book(
            GenerationRow(
                event="started",
                at_s=began_s,
                generation=generation.number,
                setting=generation.setting,
                step=first["step"],
                setpoint=generation.setpoint.as_dict(),
                world_size=generation.batch.num_workers,
                micro_batch=generation.batch.micro_batch,
                accumulation=generation.batch.accumulation,
                num_devices=generation.placement.num_devices,
                shares=[asdict(spec.share) for spec in generation.specs],
                remote_bytes=sum(event["num_remote_bytes"] for event in generation.loaded.values()),
                reason=generation.reason,
            )
        )

    def _on_granted(self, slot: int) -> None:
        current = self._current
        if current is not None and current.is_alive:
            self._tell(current, "free", slot, ranks={0})

    def _on_saved(self, generation: Generation, values: dict[str, Any]) -> None:
        slot: int = values["slot"]
        self._state.saving(slot)
        state = generation.saved_state(
            values["step"],
            slot,
            {node_id: info.slot_paths for node_id, (info, _) in self._nodes.items()},
            {node_id: info.state_address for node_id, (info, _) in self._nodes.items()},
        )
        if state is None:
            return
        self._state.saved(state, slot)
        generation.saves = {state.step: generation.saves[state.step]}
        if values["stopped"]:
            generation.phase = Phase.STOPPED
            if self._desired.paused:
                self._all_become("idle")
            self._end_generation(generation)
            if values["final"]:
                self._busy = self._spawn(self._conclude_completed(generation))
            else:
                self._tell(generation, "exit")
                if self.settings.mode == "restart":
                    self._busy = self._spawn(self._restart_from_storage())
                elif self._next is None and self._wanted_placement() is None:
                    # Paused, or no place to go on at: nobody takes the state over.
                    self._spawn(self._state.persist("just_in_time"))
        elif self._state.is_checkpoint_due(self._step):
            self._spawn(self._state.persist("periodic"))

    def _end_generation(self, generation: Generation) -> None:
        self.recorder.book(
            GenerationRow(
                event="ended", generation=generation.number, setting=generation.setting, step=self._step
            )
        )

    def _all_become(self, use: str) -> None:
        """Neither the job's time nor any node's energy is for training now."""
        generation = self._current.number if self._current is not None else 0
        self.recorder.become(use, self.recorder.at_s, self._step, generation, self._setting)
        for _, client in self._nodes.values():
            client.set_use(use)

    async def _restart_from_storage(self) -> None:
        """Restart mode: the state goes through a checkpoint, and memory is given back."""
        self._host_target = None
        await self._state.move_to_storage()

    # -- events from engines --------------------------------------------------------------------------

    def engine_event(self, node_id: str, engine_id: str, kind: str, values: dict[str, Any]) -> None:
        """Something that an engine said, or its end (``exit``)."""
        generation, rank = self._find(engine_id)
        if generation is None or rank is None:
            return
        if generation.phase is Phase.FAILED and kind != "exit":
            return  # said before it was killed, heard after its work was given up
        handler = getattr(self, f"_engine_{kind}", None)
        if handler is not None:
            handler(generation, rank, node_id, values)
        self._wake.set()

    def _find(self, engine_id: str) -> tuple[Generation | None, int | None]:
        for generation in (self._current, self._next):
            if generation is not None and (rank := generation.rank_of(engine_id)) is not None:
                return generation, rank
        return None, None

    def _engine_store(self, generation: Generation, rank: int, node_id: str, values: dict[str, Any]) -> None:
        del node_id
        others = {spec.rank for spec in generation.specs} - {rank}
        self._tell(generation, "rendezvous", values["address"], ranks=others)

    def _engine_ready(self, generation: Generation, rank: int, node_id: str, values: dict[str, Any]) -> None:
        del node_id
        generation.ready[rank] = values
        self.num_params = values["num_params"]
        if len(generation.ready) == len(generation.specs) and generation.phase is Phase.BUILDING:
            generation.phase = Phase.READY

    def _engine_loaded(self, generation: Generation, rank: int, node_id: str, values: dict[str, Any]) -> None:
        generation.loaded[rank] = values
        del node_id
        if len(generation.loaded) == len(generation.specs) and generation.phase is Phase.LOADING:
            self._on_loaded(generation)

    def _engine_use(self, generation: Generation, rank: int, node_id: str, values: dict[str, Any]) -> None:
        if rank == 0 and generation is self._current:
            at_s = self._session_s(node_id, values["t"])
            self.recorder.become(values["use"], at_s, values["step"], generation.number, generation.setting)

    def _engine_step(self, generation: Generation, rank: int, node_id: str, values: dict[str, Any]) -> None:
        if rank != 0:
            return
        record = StepRecord(
            step=values["step"],
            node_id=node_id,
            t0=values["t0"],
            t1=values["t1"],
            ended_at_s=self._session_s(node_id, values["t1"]),
            samples=values["samples"],
            loss=values["loss"],
            generation=generation.number,
        )
        change = self.recorder.book_step(record, generation.setting, values)
        if change is not None:
            self._change_done(change)
        self._step, self._last_step = record.step, record
        if record.step > self._failed_at_step:
            self._num_failures = 0
        if self._is_wanted(generation):
            self._proven = self._desired
        if self._state.is_checkpoint_due(record.step) and generation.phase is Phase.TRAINING:
            self._tell(generation, "save", ranks={0})

    def _session_s(self, node_id: str, node_s: float) -> float:
        """A node's monotonic time as session time."""
        time = self._times.get(node_id)
        return self.recorder.at_s if time is None else min(time.session_s(node_s), self.recorder.at_s)

    def _engine_validation(
        self, generation: Generation, rank: int, node_id: str, values: dict[str, Any]
    ) -> None:
        del rank, node_id
        self.recorder.book(
            ValidationRow(step=values["step"], loss=values["loss"], generation=generation.number)
        )

    def _engine_saved(self, generation: Generation, rank: int, node_id: str, values: dict[str, Any]) -> None:
        del node_id
        generation.saves.setdefault(values["step"], {})[rank] = values
        self._on_saved(generation, values)

    def _engine_slot_wanted(
        self, generation: Generation, rank: int, node_id: str, values: dict[str, Any]
    ) -> None:
        """The last step is done, and there is no room for its state."""
        del generation, rank, node_id, values
        self._state.make_room()

    def _engine_exported(
        self, generation: Generation, rank: int, node_id: str, values: dict[str, Any]
    ) -> None:
        del rank, node_id
        self.final_model_path = values["path"]
        self._tell(generation, "exit")

    def _engine_lease_expired(
        self, generation: Generation, rank: int, node_id: str, values: dict[str, Any]
    ) -> None:
        """No host has come back to these engines: they end, their state saved."""
        del rank
        text = f"engines on node {node_id[:8]} had no host for {values['lease_s']:.0f} s and were ended"
        self.recorder.book(FaultRow(kind="lease_expired", node=node_id, detail=text))
        self._hosts.clear()
        if generation.phase is Phase.TRAINING:
            self._ask_stop(generation)

    def _engine_error(self, generation: Generation, rank: int, node_id: str, values: dict[str, Any]) -> None:
        del node_id
        generation.errors[rank] = values

    def _engine_exit(self, generation: Generation, rank: int, node_id: str, values: dict[str, Any]) -> None:
        generation.ended.add(rank)
        if not generation.is_alive or values["status"] == 0:
            return
        error = generation.errors.get(rank, {"cause": "killed", "text": _describe_exit(values)})
        if error["cause"] == "peer_lost":
            # Another engine is the cause: give its end a moment to be heard of.
            self._spawn(self._fail_later(generation, node_id, error, values["log_tail"]))
        else:
            self._spawn(self._fail(generation, node_id, error, values["log_tail"]))

    # -- failures ---------------------------------------------------------------------------------

    async def _fail_later(
        self, generation: Generation, node_id: str, error: dict[str, Any], log_tail: str
    ) -> None:
        await asyncio.sleep(_PEER_LOST_GRACE_S)
        await self._fail(generation, node_id, error, log_tail)

    async def _fail(self, generation: Generation, node_id: str, error: dict[str, Any], log_tail: str) -> None:
        """A generation has lost an engine: end the rest, and go on from the newest state."""
        if not generation.is_alive:
            return
        was_training = generation is self._current
        generation.phase = Phase.FAILED
        self._kill(generation)
        nodes_before = set(self._nodes)
        await self.drop_dead_nodes()
        lost = nodes_before - set(self._nodes)
        if lost and error["cause"] == "peer_lost":  # what the survivors' network said is not the cause
            error = {"cause": "node_lost", "text": f"node {min(lost)[:8]} has gone"}
        self.recorder.book(
            FaultRow(kind=error["cause"], node=node_id, detail=error["text"], generation=generation.number)
        )
        if error["cause"] in ("user", "environment"):
            raise _as_error(error)
        if not was_training:
            self._next = None
            if self._current is not None and self._current.is_alive:
                self._ahead_failed = generation.setpoint
                self.recorder.note(
                    "EADT-331", f"engines built ahead failed ({error['text']}); stopping first"
                )
            elif not self._go_back(generation, error):
                self._count_failure(error, log_tail)
            return
        self._state.engines_failed()
        self._all_become("change")
        self.recorder.book(
            RollbackRow(
                generation=generation.number,
                resumed_step=self._state.resumed_step,
                reason=error["text"],
            )
        )
        self._end_generation(generation)
        self._desired_reason = f"recovery: {error['text']}"
        if not self._go_back(generation, error):
            self._count_failure(error, log_tail)

    def _is_wanted(self, generation: Generation) -> bool:
        """Whether a generation has the setting that is wanted, but for workers that found no place."""
        return generation.setpoint == self._desired.with_(num_workers=generation.setpoint.num_workers)

    def _go_back(self, generation: Generation, error: dict[str, Any]) -> bool:
        """Give up a setting that failed before its first step; returns whether there was one before it."""
        proven, wanted = self._proven, self._desired
        if proven is None or proven == wanted or not self._is_wanted(generation):
            return False
        if error["cause"] == "node_lost":
            return False  # the setting is not to blame
        text = f"{wanted.describe()} failed before its first step ({error['text']})"
        self.recorder.note("EADT-338", f"{text}; going back to {proven.describe()}")
        if generation.decision_id is not None:
            self._changes[generation.decision_id] = {"state": "failed", "why": text}
        self._desired, self._decision_id, self._ahead_failed = proven, None, None
        self._desired_reason = f"{text}: back to the setting before"
        return True

    def _count_failure(self, error: dict[str, Any], log_tail: str) -> None:
        self._num_failures += 1
        self._failed_at_step = self._step
        if self._num_failures >= self.settings.max_engine_failures:
            raise EnvironmentFailure(
                f"engines failed {self._num_failures} times in a row without a step between: {error['text']}",
                code="EADT-337",
                means="training stopped; the newest checkpoint is kept",
                fix="see the engine's output:\n" + log_tail.strip(),
            )

    async def drop_dead_nodes(self) -> None:
        """Ask all nodes whether they are there, and forget those that do not answer."""
        self._num_recovering += 1
        try:
            await self._ping_nodes()
        finally:
            self._num_recovering -= 1
            self._wake.set()

    async def _ping_nodes(self) -> None:
        async def check(node_id: str, client: NodeClient) -> None:
            try:
                await client.ping(_PING_TIMEOUT_S)
            except EnvironmentFailure:
                self.lose_node(node_id, "its agent does not answer")

        await asyncio.gather(*(check(node_id, client) for node_id, (_, client) in list(self._nodes.items())))

    # -- the end ----------------------------------------------------------------------------------

    async def _conclude_completed(self, generation: Generation) -> None:
        self.status = "saving"
        await self._state.persist_at_last("final")
        path = self.settings.job.final_model_path
        if path and self.settings.save_final_model and self._state.newest is not None:
            self._tell(generation, "export", self._state.newest, path, ranks={0})
            while 0 not in generation.ended:
                await asyncio.sleep(0.05)
            if self.final_model_path is None:
                self.recorder.note("EADT-333", "the final model could not be exported; see the engine's log")
        else:
            self._tell(generation, "exit")
        self._conclude("completed")

    async def _conclude_interrupted(self) -> None:
        self.status = "saving"
        await self._state.persist_at_last("just_in_time")
        self._conclude("interrupted")

    async def _conclude_failed(self, error: EadtError) -> None:
        """End with an error; the newest state in memory, which goes with the run, is made durable first."""
        for generation in (self._current, self._next):
            if generation is not None and generation.is_alive:
                generation.phase = Phase.FAILED
                self._kill(generation)
        self._state.drop_lost()
        if not self._state.is_durable:
            self.status = "saving"
        try:
            async with asyncio.timeout(LAST_SAVE_S):
                await self._state.persist_at_last("just_in_time")
        except TimeoutError:
            self.recorder.note(
                "EADT-255", f"the newest state could not be saved within {LAST_SAVE_S:.0f} s, and is lost"
            )
        except Exception:
            logger.exception("the newest state could not be saved")
        finally:
            self._conclude("failed", error)

    def _conclude(self, status: str, error: EadtError | None = None) -> None:
        if self.is_over:
            return
        self.status, self.error = status, error
        self._ended.set()
        for generation in (self._current, self._next):
            if generation is not None:
                self._kill(generation)
        self._all_become("idle")
        self.recorder.close_change()
        if error is not None:
            self.recorder.note(error.code, f"{error.what}. {error.fix}".strip())
        self.recorder.book(
            EndRow(
                status=status,
                num_params=self.num_params,
                reason=self._interrupt_reason or (error.what if error else ""),
            )
        )

    def interrupt(self, reason: str) -> None:
        """End the run at the end of the present step, with a checkpoint."""
        self._interrupt_reason = reason
        self._wake.set()

    def fail(self, error: EadtError) -> None:
        """End the run, its newest state made durable: it cannot go on. The first of several errors counts."""
        if self._failure is None:
            self._failure = error
        self._wake.set()

    # -- hosts and nodes ------------------------------------------------------------------------------

    def register_host(self, host: Host) -> None:
        """A host has come; hosts of an earlier worker group are forgotten."""
        self._hosts.register(host)
        if self._hosts.is_complete:  # while a group assembles, nodes go on booking as before
            self._elect_meters()
        self._wake.set()

    def add_node(self, info: NodeInfo, client: NodeClient) -> None:
        """A node's agent is up, for the first time or again."""
        self._nodes[info.node_id] = (info, client)
        self._draining.pop(info.node_id, None)
        for code, text in info.notes:
            self._say_once(code, text, f"{info.hostname}: {text}")
        interval_s = self.settings.job.training.energy_monitoring_interval
        if interval_s < info.honest_window_s:
            self._say_once(
                "EADT-357",
                "short windows",
                f"training.energy_monitoring_interval is {interval_s:g} s, but the meters of {info.hostname} "
                f"are right over windows of {info.honest_window_s:g} s and more: decisions would rest on "
                "coarse readings; set it higher",
            )
        self._state.node_came(info.node_id)
        self._metered.pop(info.node_id, None)  # a new agent books nothing until it is told
        self._elect_meters()
        self._wake.set()

    def _say_once(self, code: str, what: str, text: str) -> None:
        """Book a sentence on something that many nodes may have in common."""
        if what not in self._said:
            self._said.add(what)
            self.recorder.note(code, text)

    def announce(self, node_id: str, pid: int) -> None:
        """A process on a node is this run's, though its agent did not start it."""
        known = self._own_pids.setdefault(node_id, set())
        if pid not in known:
            known.add(pid)
            self._elect_meters()

    def heard(self, node_id: str, sent_s: float) -> None:
        """Something came from a node's agent, which sent it at this time of the node's monotonic clock."""
        self._times.setdefault(node_id, NodeTime()).heard(sent_s, self.recorder.at_s)

    def book(self, row: AnyRow) -> None:
        """A row of a node agent or of the supervisor."""
        if isinstance(row, NodeRow):
            row.at_s = self._session_s(row.node, row.monotonic_s)
        self.recorder.book(row)

    def _elect_meters(self) -> None:
        """Let each piece of the run's own hardware be booked once, however many Ray nodes see it."""
        infos = {node_id: info for node_id, (info, _) in self._nodes.items()}
        elected = elect(infos, self._hosts.hosts, self._metered, self._own_pids)
        for node_id, metered in elected.items():
            if metered != self._metered.get(node_id, Metered()):
                self._nodes[node_id][1].set_metered(metered)
        self._metered = elected

    def lose_node(self, node_id: str, why: str) -> None:
        """A node has gone, with its engines, its hosts and its part of the state."""
        if self._nodes.pop(node_id, None) is None:
            return
        self._hosts.lose_node(node_id)
        self.recorder.book(FaultRow(kind="node_lost", node=node_id, detail=why))
        self._elect_meters()
        for generation in (self._current, self._next):
            if generation is not None and generation.is_alive and node_id in generation.placement.node_ids:
                for spec in generation.specs:
                    if spec.node_id == node_id:
                        generation.ended.add(spec.rank)
                error = {"cause": "node_lost", "text": f"node {node_id[:8]} has gone: {why}"}
                self._spawn(self._fail(generation, node_id, error, ""))
        self._wake.set()

    def drain(self, node_id: str, deadline_unix_s: float | None) -> None:
        """A node will be taken away: leave it, with its state, before the deadline."""
        if node_id in self._draining or node_id not in self._nodes:
            return
        self._draining[node_id] = deadline_unix_s
        self._desired_reason = f"node {node_id[:8]} is being drained"
        detail = "preemption notice" if deadline_unix_s else "drain without a deadline"
        self.recorder.book(FaultRow(kind="drain", node=node_id, detail=detail))
        self._wake.set()

    # -- setpoints --------------------------------------------------------------------------------

    def apply(self, setpoint: Setpoint, reason: str, decision_id: str | None) -> dict[str, Any]:
        """Ask for a new setpoint.

        Returns:
            ``accepted`` and, where it is not, ``why``. What came of it: :meth:`change_state`.
        """
        if setpoint.num_workers not in self._feasible:
            why = (
                f"{setpoint.num_workers} workers cannot hold a batch of {self.settings.train_batch_size}; "
                f"possible: {', '.join(map(str, self._feasible))}"
            )
            return {"accepted": False, "why": why}
        if self.is_over or self._interrupt_reason is not None or self._failure is not None:
            return {"accepted": False, "why": "the run is ending"}
        self._desired, self._desired_reason, self._decision_id = setpoint, reason, decision_id
        self._ahead_failed = None
        self._host_target = None
        if decision_id is not None:
            self._changes[decision_id] = {"state": "pending"}
        self._wake.set()
        return {"accepted": True, "why": ""}

    def _change_done(self, change: Change) -> None:
        if change.decision_id is not None and change.first_step is not None:
            self._changes[change.decision_id] = {
                "state": "applied",
                "at_s": self.recorder.at_s,
                "pause_s": change.gap_s,
                "num_workers": change.after.num_workers,
            }

    def change_state(self, decision_id: str) -> dict[str, Any]:
        """``state`` of an accepted change: ``pending``, ``applied`` (with ``pause_s``) or ``failed``."""
        return self._changes.get(decision_id, {"state": "unknown"})

    # -- being asked ------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """The run as it stands: for the supervisor, the display and ``eadt status``."""
        current = self._current
        training = current is not None and current.phase in (Phase.TRAINING, Phase.STOPPING)
        last = self._last_step
        nodes = {node_id: info for node_id, (info, _) in self._nodes.items()}
        training_nodes = current.placement.node_ids if current else []
        return {
            "run_id": self.settings.run_id,
            "name": self.settings.name,
            "status": self.status,
            "at_s": self.recorder.at_s,
            "step": self._step,
            "max_steps": self.settings.job.max_steps,
            "loss": last.loss if last else None,
            "num_params": self.num_params,
            "is_training": training,
            "generation": current.number if current else 0,
            "setpoint": current.setpoint if current and training else None,
            "desired": self._desired,
            "num_devices": current.placement.num_devices if current else 0,
            "node_ids": training_nodes,
            "booking_node_ids": booking_nodes(nodes, self._metered, training_nodes),
            "hosts": [host.__dict__ for host in self._hosts.hosts],
            "num_nodes": len(self._nodes),
            "waiting_for": self._waiting_for(),
            "error": self.error,
            "final_model_path": self.final_model_path,
        }

    def live_facts(self) -> LiveFacts:
        """What the record does not say: how the run stands at this moment."""
        current = self._current
        return LiveFacts(
            status=self.status,
            at_s=self.recorder.at_s,
            desired=self._desired.as_dict(),
            waiting_for=self._waiting_for(),
            is_training=current is not None and current.phase in (Phase.TRAINING, Phase.STOPPING),
            generation=current.number if current else 0,
            num_devices=current.placement.num_devices if current else 0,
        )

    def _waiting_for(self) -> str:
        """One phrase on what the run waits for; empty while it trains."""
        current = self._current
        if self.is_over or (current is not None and current.phase is Phase.TRAINING):
            return ""
        if self.status == "saving":
            return "saving the state and the model"
        if self._desired.paused:
            return "paused"
        if not self._nodes:
            return "the node agents to start"
        if not self._hosts.hosts:
            return "Ray Train to start the hosts"
        if self._next is not None and self._next.phase is Phase.BUILDING:
            return "the engines to build the model"
        if self._wanted_placement() is None:
            return "enough hosts for the smallest number of workers"
        return "the engines to take over the state"

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run beside the loop; an error in it ends the run."""

        async def guarded() -> None:
            try:
                await work
            except EadtError as error:
                self.fail(error)
            except Exception as error:
                self.fail(_internal(error))
            finally:
                self._wake.set()

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _describe_exit(values: dict[str, Any]) -> str:
    status = values["status"]
    return f"an engine was ended by signal {-status}" if status < 0 else f"an engine exited with {status}"


def _internal(error: Exception) -> EadtError:
    """A defect of ours: the run ends with what is needed to find it in the actor's log."""
    logger.error("the coordinator failed", exc_info=error)
    return EadtError(
        f"internal error in the coordinator: {type(error).__name__}: {error}",
        code="EADT-199",
        means="training stopped; the newest checkpoint is kept, and the same command goes on from it",
        fix="please report it, with the coordinator's log from Ray's session folder",
    )


def _as_error(error: dict[str, Any]) -> EadtError:
    kind = ConfigError if error["cause"] == "user" else EnvironmentFailure
    return kind(error["text"], code=error.get("code", "EADT-230"))
