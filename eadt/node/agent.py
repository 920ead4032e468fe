"""The node agent: one node's sensors, engines, state slots and leases.

One per node, outliving worker groups. It carries out what the coordinator asks and reports what
happens; it decides nothing. :class:`NodeAgent` is a plain class; :mod:`eadt.actors` makes it a Ray
actor.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from eadt.adapters.nvml import ComputeProcess, Nvml
from eadt.clock import SYSTEM_CLOCK, monotonic_s
from eadt.config import PowerConfig, RunConfig, TrainingConfig
from eadt.coordination.metering import Metered, component_of, unknown_name
from eadt.coordination.nodes import NodeInfo, NodeReading
from eadt.coordination.settings import RunSettings
from eadt.errors import EnvironmentFailure
from eadt.node.booking import Doing, NodeBooking, NodeFacts, RowSink
from eadt.node.card_states import CardLook, CardStates, look_at
from eadt.node.deadline import DeviceCall
from eadt.node.meter import Meter
from eadt.node.sensors import Component, NvmlSource, SourceSelection, detect_sources
from eadt.node.tenants import Tenants, remove_tenant, write_tenant
from eadt.node.utilisation import machine_id
from eadt.record.rows import NoteRow
from eadt.training.checkpoint import CheckpointStore, Manifest, Shard
from eadt.training.engine_pool import EnginePool
from eadt.training.engine_spec import EngineSpec
from eadt.training.state import Span, StateLayout, StateSlot
from eadt.training.state_server import StateServer
from eadt.units import format_bytes

_LEASE_CHECK_S = 1.0
_ASK_DEVICE_S = 5.0
CPU_ENGINE_ENV = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 32))
"""Bytes; memory that an engine has freed stays with it, up to this, until it ends with its generation.

Else glibc gives each large tensor back to the kernel and takes it anew, zeroed, in every step.
"""
_SHARED_MEMORY_MARGIN_BYTES = 64 << 20
"""Left free in shared memory for everybody else on the node (NCCL, data loaders)."""


@dataclass(frozen=True)
class AgentSettings:
    """What an agent needs to know.

    Attributes:
        run_id: The run's id; part of its folders' names.
        node_id: Ray's id of the node.
        node_ip: Address that other nodes reach it at.
        num_slots: State slots to offer.
        shared_memory_dir: Folder in memory for the slots.
        spill_dir: Folder on disk for slots that shared memory has no room for.
        storage_path: Where checkpoints go.
        training: The configuration's ``training`` section, for preparing data.
        seed: The run's seed.
        power: What energy is measured with.
        training_cores: CPU cores that engines share; ``None`` for all usable ones.
        device: ``cpu`` or ``cuda``.
        lease_s: How long engines train on without a host.
        run_key: Secret for reading state over the network, hexadecimal.
        preload_model_type: transformers model type that the fork server imports ahead.
        driver_pids: The run's driver, where it runs on this node.
    """

    run_id: str
    node_id: str
    node_ip: str
    num_slots: int
    shared_memory_dir: str
    spill_dir: str
    storage_path: str
    training: TrainingConfig
    seed: int
    power: PowerConfig
    training_cores: int | None
    device: str
    lease_s: float
    run_key: str
    preload_model_type: str = ""
    driver_pids: tuple[int, ...] = ()


def agent_settings(
    config: RunConfig,
    settings: RunSettings,
    node_id: str,
    node_ip: str,
    driver_pids: tuple[int, ...] = (),
) -> AgentSettings:
    """The settings of the agent of one node of a run."""
    return AgentSettings(
        run_id=settings.run_id,
        node_id=node_id,
        node_ip=node_ip,
        num_slots=settings.num_slots,
        shared_memory_dir=config.elastic.shared_memory_dir or "/dev/shm",
        spill_dir=config.elastic.spill_dir or tempfile.gettempdir(),
        storage_path=settings.storage_path,
        training=config.training,
        seed=config.run.seed,
        power=config.power,
        training_cores=config.resources.training_cores_per_node,
        device=settings.device,
        lease_s=config.elastic.lease_s,
        run_key=settings.run_key,
        preload_model_type=str(config.training.model_config_overrides.get("model_type", "")),
        driver_pids=driver_pids,
    )


EventSink = Callable[[str, str, dict[str, Any]], None]
"""Gets (engine_id, kind, values)."""


@dataclass
class _Sensors:
    """What measures and books, from the agent's start to its end."""

    selection: SourceSelection
    meter: Meter
    booking: NodeBooking
    cards: CardStates

    @property
    def components(self) -> list[Component]:
        """What can be booked here."""
        return self.meter.components

    def stop(self) -> None:
        """Book the time up to now, and let go of the devices. Waits for no device that hangs."""
        self.booking.stop()
        self.cards.stop()
        self.meter.stop()
        self.selection.close()


class NodeAgent:
    """See the module. Methods may be called from several threads.

    Args:
        settings: What it needs to know.
        on_event: Gets what engines say, and their end.
        on_row: Gets ledger rows of this node.
        make_pool: Makes the engine pool; takes its folder, where its events go and the fork server's
            environment. Several pretended nodes of a test share one fork server through it.
    """

    def __init__(
        self,
        settings: AgentSettings,
        on_event: EventSink,
        on_row: RowSink,
        make_pool: Callable[[Path, EventSink, dict[str, str]], EnginePool] = EnginePool,
    ) -> None:
        self._settings = settings
        self._on_event = on_event
        self._on_row = on_row
        name = f"eadt-{settings.run_id}-{settings.node_id[:12]}"
        self._folder = Path(settings.shared_memory_dir) / name
        self._spill = Path(settings.spill_dir) / name
        # Logs lie on disk: memory is for the state.
        self._pool = make_pool(self._spill, self._engine_event, self._fork_server_env())
        self._server = StateServer(
            [self._folder, self._spill], settings.node_ip, bytes.fromhex(settings.run_key)
        )
        self._store = CheckpointStore(settings.storage_path, settings.run_id)
        self._moved_bytes = 0
        self._metered = Metered()
        self._card_memory = DeviceCall(self._free_card_bytes, "the cards' free memory", _ASK_DEVICE_S)
        self._tenants = Tenants(
            Path(settings.shared_memory_dir),
            settings.run_id,
            lambda: (*settings.driver_pids, *self._metered.own_pids),
        )
        self._sensors: _Sensors | None = None
        self._specs: dict[str, EngineSpec] = {}
        self._lease_until_s = monotonic_s() + settings.lease_s
        self._lease_reported = False
        self._stopped = threading.Event()
        self._cores = training_cores(settings.training_cores)

    # -- life -----------------------------------------------------------------------------------

    def start(self, progress: Callable[[str], None]) -> NodeInfo:
        """Start measuring and the fork server, and prepare the data here. Blocks until ready.

        Raises:
            ConfigError: The data cannot be used.
            EnvironmentFailure: The fork server does not start.
        """
        _remove_leftovers(Path(self._settings.shared_memory_dir), Path(self._settings.spill_dir))
        for folder in (self._folder, self._spill):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self._folder / "pid").write_text(str(os.getpid()))
        write_tenant(self._folder, self._settings.run_id, self._settings.node_id)
        sensors = self._sensors = self._start_sensors()
        self._pool.start()
        self._server.start()
        data_path = self._prepare_data(progress)
        self._pool.wait_warm(timeout_s=300)
        threading.Thread(target=self._watch_leases, name="eadt-leases", daemon=True).start()
        return NodeInfo(
            node_id=self._settings.node_id,
            ip=self._settings.node_ip,
            hostname=os.uname().nodename,
            cores=self._cores,
            num_gpus=sum(component.is_gpu for component in sensors.components),
            state_address=self._server.address,
            slot_paths=tuple(str(self._folder / f"slot-{n}") for n in range(self._settings.num_slots)),
            identities={component.name: component.identity for component in sensors.components},
            pretended=frozenset(
                component.name
                for component in sensors.components
                if component.is_gpu and component.source == "simulated"
            ),
            honest_window_s=max((c.honest_window_s for c in sensors.components), default=0.0),
            notes=tuple(("EADT-350", sentence) for sentence in self._worth_saying(sensors)),
            data_path=data_path,
        )

    def _worth_saying(self, sensors: _Sensors) -> list[str]:
        """Why sources are not used, without cards where there are none and nobody wants any."""
        has_cards = self._settings.device == "cuda" or any(c.is_gpu for c in sensors.components)
        return [text for text in sensors.selection.not_chosen if has_cards or not text.startswith("GPUs ")]

    def _start_sensors(self) -> _Sensors:
        """Find this node's sensors and begin to measure and to book. Touches devices."""
        settings = self._settings
        selection = detect_sources(settings.power, SYSTEM_CLOCK)
        hostname = os.uname().nodename
        meter = Meter(
            selection.sources,
            SYSTEM_CLOCK,
            settings.power.sampling_interval,
            on_note=lambda code, text: self._on_row(NoteRow(code=code, text=f"{hostname}: {text}")),
        )
        meter.start()
        self._tenants.start()
        cards = CardStates(partial(self._look_at_card, selection))
        booking = NodeBooking(
            NodeFacts(
                node=settings.node_id,
                hostname=hostname,
                boot_id=machine_id(),
                num_gpus=sum(component.is_gpu for component in selection.components),
                num_cores=len(self._cores),
                not_metered=tuple(selection.not_chosen),
            ),
            meter,
            self._on_row,
            interval_s=settings.power.booking_interval,
            on_cpu=settings.device == "cpu",
            shares=self._tenants,
            cards=cards,
            pid_of=self._pool.pid,
        )
        booking.start()
        cards.start()
        return _Sensors(selection, meter, booking, cards)

    def _look_at_card(self, selection: SourceSelection, component: str) -> CardLook:
        """How a card does; may block in its driver."""
        nvml = next((source for source in selection.sources if isinstance(source, NvmlSource)), None)
        gpu = nvml.gpus.get(component) if nvml is not None else None
        return CardLook() if gpu is None else look_at(gpu, partial(self._foreign_processes, component))

    def _foreign_processes(self, component: str, processes: Sequence[ComputeProcess]) -> int:
        """How many of a card's processes are not this run's."""
        own = sum(component in self._cards_of([spec]) for spec in self._specs.values())
        return self._tenants.foreign_on_card(processes, own)

    def stop(self) -> None:
        """End engines, measuring and serving; remove this run's memory. Idempotent."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._pool.stop()
        if self._sensors is not None:
            self._sensors.stop()
        self._server.stop()
        remove_tenant(self._folder)
        for folder in (self._folder, self._spill):
            shutil.rmtree(folder, ignore_errors=True)

    def _fork_server_env(self) -> dict[str, str]:
        env = {
            "DS_ACCELERATOR": self._settings.device,
            "TOKENIZERS_PARALLELISM": "false",
            "EADT_PRELOAD_MODEL_TYPE": self._settings.preload_model_type,
        }
        if self._settings.device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""
            env.update({name: os.environ.get(name, value) for name, value in CPU_ENGINE_ENV.items()})
        return env

    def _prepare_data(self, progress: Callable[[str], None]) -> str:
        training = self._settings.training
        if training.dataset_name is None and training.dataset_path is None:
            return ""  # the user's train function brings its own
        from eadt.training.data import default_cache_dir, prepare_dataset

        prepared = prepare_dataset(training, default_cache_dir(), self._settings.seed, progress)
        return str(prepared.path)

    # -- engines ----------------------------------------------------------------------------------

    def fork(self, specs: Sequence[EngineSpec]) -> None:
        """Start engines."""
        for spec in specs:
            self._specs[spec.engine_id] = spec
            self._booking.engine_forked(spec.engine_id)
            self._pool.fork(spec)

    def send(self, engine_ids: Sequence[str], *command: Any) -> None:
        """Send a command to engines."""
        for engine_id in engine_ids:
            self._pool.send(engine_id, *command)

    def kill(self, engine_ids: Sequence[str], signal_number: int = signal.SIGKILL) -> None:
        """End engines at once."""
        for engine_id in engine_ids:
            self._pool.kill(engine_id, signal_number)

    def engine_pids(self) -> dict[str, int]:
        """Process numbers of live engines, by engine id."""
        pids = {engine_id: self._pool.pid(engine_id) for engine_id in self._pool.live()}
        return {engine_id: pid for engine_id, pid in pids.items() if pid is not None}

    def _engine_event(self, engine_id: str, kind: str, values: dict[str, Any]) -> None:
        spec = self._specs.get(engine_id)
        try:
            if spec is not None:
                self._book_event(spec, kind, values)
        finally:  # whatever fails in booking: the coordinator must hear of it
            # Of steps and uses, rank 0's node speaks for the job.
            if kind not in ("use", "step") or values["primary"]:
                self._on_event(engine_id, kind, values)

    def _book_event(self, spec: EngineSpec, kind: str, values: dict[str, Any]) -> None:
        """What this node's energy is for, by what its engines say."""
        if kind == "use":
            self._booking.become(values["use"], at_s=values["t"], step=values["step"])
        elif kind == "step":
            self._booking.step_done(values["step"], values["input_s"])
        elif kind == "loaded":
            doing = None
            if spec.primary_on_node:
                same = [other for other in self._specs.values() if other.generation == spec.generation]
                doing = Doing("useful", values["step"], spec.generation, spec.setting, self._cards_of(same))
            self._booking.engine_loaded(spec.engine_id, doing, values["t"])
            self._set_simulated_load()
        elif kind == "exit":
            del self._specs[spec.engine_id]
            self._booking.engine_ended(spec.engine_id)
            if spec.primary_on_node and values["status"] != 0:
                self._booking.become("change")
            self._set_simulated_load()

    def _cards_of(self, specs: Sequence[EngineSpec]) -> frozenset[str]:
        """The components on which engines run."""
        if self._sensors is None:
            return frozenset()
        given = {
            gpu_id
            for spec in specs
            for gpu_id in spec.env.get("CUDA_VISIBLE_DEVICES", "").split(",")
            if gpu_id
        }
        identities = {component.name: component.identity for component in self._sensors.components}
        return frozenset(component_of(gpu_id, identities) or unknown_name(gpu_id) for gpu_id in given)

    def _set_simulated_load(self) -> None:
        """A simulated GPU has no load of its own: it takes the sum of its engines' shares."""
        simulated = self._sensors.selection.simulated if self._sensors is not None else None
        if simulated is not None:
            live = set(self._pool.live()) & set(self._specs)
            load = sum(self._specs[engine].share.percentage / 100 for engine in live)
            simulated.set_utilisation(min(1.0, load))

    # -- leases -----------------------------------------------------------------------------------

    def renew_lease(self) -> None:
        """A host on this node is there: its engines may train on."""
        self._lease_until_s = monotonic_s() + self._settings.lease_s
        self._lease_reported = False

    def _watch_leases(self) -> None:
        while not self._stopped.wait(_LEASE_CHECK_S):
            live = self._pool.live()
            if live and monotonic_s() > self._lease_until_s and not self._lease_reported:
                self._lease_reported = True
                self._on_event(live[0], "lease_expired", {"lease_s": self._settings.lease_s})

    # -- energy -----------------------------------------------------------------------------------

    @property
    def _booking(self) -> NodeBooking:
        assert self._sensors is not None, "the agent was started"
        return self._sensors.booking

    def set_use(self, use: str) -> None:
        """Book this node's energy under ``use`` from now on."""
        self._booking.become(use)

    def set_metered(self, metered: Metered) -> None:
        """Which components this node books; another Ray node on the same machine may have the others."""
        self._metered = metered
        self._booking.set_metered(metered)

    def reading(self, window_s: float) -> NodeReading:
        """What the meter says of the last ``window_s`` s."""
        return self._booking.reading(window_s)

    # -- state --------------------------------------------------------------------------------------

    def available_bytes(self) -> int:
        """Memory that new engines could take here (of this run's cards, the fullest). Blocks for 5 s at most.

        Raises:
            EadtError: The cards cannot be asked, or do not answer.
        """
        if self._settings.device == "cuda":
            return self._card_memory.ask()
        return int(psutil.virtual_memory().available)

    def _free_card_bytes(self) -> int:
        nvml = Nvml()
        nvml.open()
        try:
            memories = [gpu.memory() for gpu in nvml.gpus() if f"gpu{gpu.index}" in self._metered.components]
        finally:
            nvml.close()
        return min((memory.total_bytes - memory.used_bytes for memory in memories), default=0)

    def reserve(self, num_bytes: int) -> str:
        """See to it that the slots have room for ``num_bytes`` in all.

        Returns:
            Empty, or a sentence that says that slots went to disk.

        Raises:
            EnvironmentFailure: EADT-320, neither memory nor disk has room.
        """
        if _free_bytes(self._folder) - _SHARED_MEMORY_MARGIN_BYTES >= num_bytes:
            return ""
        if _free_bytes(self._spill) < num_bytes:
            raise EnvironmentFailure(
                f"no room for {format_bytes(num_bytes)} of state, neither in "
                f"{self._settings.shared_memory_dir} nor in {self._settings.spill_dir}",
                code="EADT-320",
                means="the run cannot be resized or recovered on this node",
                fix="give the container more shared memory or set elastic.spill_dir to a larger disk",
            )
        for number in range(self._settings.num_slots):
            link, target = self._folder / f"slot-{number}", self._spill / f"slot-{number}"
            if not link.exists():
                target.touch(mode=0o600)
                link.symlink_to(target)
        return (
            f"shared memory on {os.uname().nodename} has no room for {format_bytes(num_bytes)} of state; "
            f"it goes through {self._settings.spill_dir}, so changes take longer"
        )

    def write_shard(
        self, step: int, index: int, slot: int, layout: StateLayout, spans: Sequence[Span], attempt: str
    ) -> Shard:
        """Write this node's part of a saved state to the storage. Blocks."""
        source = StateSlot(self._folder / f"slot-{slot}", layout, writable=False)
        try:
            return self._store.write_shard(step, index, source, spans, attempt, self._moved)
        finally:
            source.close()

    def restore(self, manifest: Manifest, shards: Sequence[int], slot: int) -> list[Span]:
        """Read shards of a checkpoint into a slot, whose former content is given up. Blocks.

        Raises:
            CheckpointCorruptError: A shard is not what the manifest says.
            EnvironmentFailure: EADT-320, neither memory nor disk has room.
        """
        # Another file, too: engines that were killed may have the old one mapped until they have ended.
        self._give_up_slot(slot)
        note = self.reserve(sum(manifest.shards[index].num_bytes for index in shards))
        if note:
            self._on_row(NoteRow(code="EADT-335", text=note))
        target = StateSlot(self._folder / f"slot-{slot}", manifest.layout, writable=True)
        try:
            return self._store.restore(manifest, shards, target, self._moved)
        except BaseException:
            self._give_up_slot(slot)
            raise
        finally:
            target.close()

    def _give_up_slot(self, number: int) -> None:
        for folder in (self._folder, self._spill):
            (folder / f"slot-{number}").unlink(missing_ok=True)

    @property
    def moved_bytes(self) -> int:
        """Bytes that went to and came from the storage so far: whether transfers make progress."""
        return self._moved_bytes

    def _moved(self, num_bytes: int) -> None:
        self._moved_bytes += num_bytes


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def training_cores(wanted: int | None) -> tuple[int, ...]:
    """The cores that engines of this node may use: so many of those that this process may use, or all.

    Their numbers need not begin at 0, nor follow on each other (cpusets, ``taskset``).
    """
    return tuple(sorted(os.sched_getaffinity(0))[:wanted])


def _remove_leftovers(folder: Path, spill: Path) -> None:
    """Remove the memory and the files of runs whose agent was killed: nobody else will."""
    for leftover in folder.glob("eadt-*"):
        with contextlib.suppress(OSError, ValueError):
            if not psutil.pid_exists(int((leftover / "pid").read_text())):
                shutil.rmtree(leftover, ignore_errors=True)
                # Known by its name only: the disk may be another node's too, whose processes are not ours.
                shutil.rmtree(spill / leftover.name, ignore_errors=True)
