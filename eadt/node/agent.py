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
from pathlib import Path
from typing import Any

import psutil

from eadt.clock import SYSTEM_CLOCK, anchor, monotonic_s
from eadt.config import PowerConfig, RunConfig, TrainingConfig
from eadt.coordination.nodes import NodeInfo, NodeReading
from eadt.coordination.settings import RunSettings
from eadt.errors import EnvironmentFailure
from eadt.node.meter import Meter
from eadt.node.sensors import SimulatedGpuSource, detect_sources
from eadt.training.checkpoint import CheckpointStore, Manifest, Shard
from eadt.training.engine_pool import EnginePool
from eadt.training.engine_spec import EngineSpec
from eadt.training.state import Span, StateLayout, StateSlot
from eadt.training.state_server import StateServer
from eadt.units import Quality, format_bytes, sum_if_known

_LEASE_CHECK_S = 1.0
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


def agent_settings(config: RunConfig, settings: RunSettings, node_id: str, node_ip: str) -> AgentSettings:
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
    )


EventSink = Callable[[str, str, dict[str, Any]], None]
"""Gets (engine_id, kind, values)."""

RowSink = Callable[[dict[str, Any]], None]


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
        self._pool = make_pool(self._folder, self._engine_event, self._fork_server_env())
        self._server = StateServer(
            [self._folder, self._spill], settings.node_ip, bytes.fromhex(settings.run_key)
        )
        self._store = CheckpointStore(settings.storage_path)
        self._selection = detect_sources(settings.power, SYSTEM_CLOCK)
        self._meter = Meter(
            self._selection.sources,
            SYSTEM_CLOCK,
            settings.power.sampling_interval,
            self._book,
            node=settings.node_id,
        )
        self._booked: set[str] | None = None  # not said yet: rows wait
        self._waiting_rows: list[dict[str, Any]] = []
        self._booking = threading.Lock()
        self._shares: dict[str, float] = {}
        self._primary: set[str] = set()
        self._lease_until_s = monotonic_s() + settings.lease_s
        self._lease_reported = False
        self._stopped = threading.Event()
        self._num_cores = _training_cores(settings.training_cores)

    # -- life -----------------------------------------------------------------------------------

    def start(self, progress: Callable[[str], None]) -> NodeInfo:
        """Start measuring and the fork server, and prepare the data here. Blocks until ready.

        Raises:
            ConfigError: The data cannot be used.
            EnvironmentFailure: The fork server does not start.
        """
        _remove_leftovers(Path(self._settings.shared_memory_dir))
        for folder in (self._folder, self._spill):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self._folder / "pid").write_text(str(os.getpid()))
        self._meter.start()
        self.set_phase("restart")
        self._pool.start()
        self._server.start()
        data_path = self._prepare_data(progress)
        self._pool.wait_warm(timeout_s=300)
        threading.Thread(target=self._watch_leases, name="eadt-leases", daemon=True).start()
        return NodeInfo(
            node_id=self._settings.node_id,
            ip=self._settings.node_ip,
            hostname=os.uname().nodename,
            num_cores=self._num_cores,
            num_gpus=sum(component.is_gpu for component in self._meter.components),
            state_address=self._server.address,
            slot_paths=tuple(str(self._folder / f"slot-{n}") for n in range(self._settings.num_slots)),
            anchor=anchor(),
            sources=self._selection.as_dicts(),
            identities={component.name: component.identity for component in self._meter.components},
            data_path=data_path,
        )

    def stop(self) -> None:
        """End engines, measuring and serving; remove this run's memory. Idempotent."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._pool.stop()
        self._meter.stop()
        self._server.stop()
        self._selection.close()
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
            self._shares[spec.engine_id] = spec.share.percentage / 100
            if spec.primary_on_node:
                self._primary.add(spec.engine_id)
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
        if kind in ("loaded", "exit"):
            self._set_simulated_load(engine_id, running=kind == "loaded")
        if kind == "exit" and engine_id in self._primary:
            self._primary.discard(engine_id)
            if values["status"] != 0:
                self.set_phase("restart")
        self._on_event(engine_id, kind, values)

    def _set_simulated_load(self, engine_id: str, *, running: bool) -> None:
        """A simulated GPU has no load of its own: it takes the sum of its engines' shares."""
        if not running:
            self._shares.pop(engine_id, None)
        load = min(1.0, sum(self._shares.get(engine, 0.0) for engine in self._pool.live()))
        for source in self._selection.sources:
            if isinstance(source, SimulatedGpuSource):
                source.set_utilisation(load)

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

    def set_phase(self, phase: str) -> None:
        """Book this node's energy under ``phase`` from now on."""
        self._on_row({"type": "phase", "node": self._settings.node_id, "phase": phase, "t": monotonic_s()})

    def set_booked(self, components: Sequence[str]) -> None:
        """Which components this node books; another Ray node on the same machine has the others."""
        with self._booking:
            self._booked = set(components)
            rows, self._waiting_rows = self._waiting_rows, []
        self._book(rows)

    def reading(self, window_s: float) -> NodeReading:
        """What the meter says of the last ``window_s`` s."""
        booked = self._booked
        if booked is not None and not booked:
            return NodeReading(0.0, Quality.MEASURED, 0.0)  # another Ray node measures this machine
        power = self._meter.mean_power_w(window_s)
        power_w, quality = power if power is not None else (None, Quality.MEASURED)
        totals = self._meter.totals()
        booked_j = [total.energy_j for name, total in totals.items() if booked is None or name in booked]
        return NodeReading(power_w, quality, sum_if_known(booked_j))

    def _book(self, rows: list[dict[str, Any]]) -> None:
        with self._booking:
            if self._booked is None:
                self._waiting_rows.extend(rows)
                return
            booked = self._booked
        for row in rows:
            if row["type"] != "energy" or row["component"] in booked:
                self._on_row(row)

    # -- state --------------------------------------------------------------------------------------

    def available_bytes(self) -> int:
        """Memory that new engines could take here."""
        if self._settings.device == "cuda":
            from eadt.adapters.nvml import Nvml

            nvml = Nvml()
            nvml.open()
            try:
                return min(gpu.memory().total_bytes - gpu.memory().used_bytes for gpu in nvml.gpus())
            finally:
                nvml.close()
        return int(psutil.virtual_memory().available)

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
            return self._store.write_shard(step, index, source, spans, attempt)
        finally:
            source.close()

    def restore(self, manifest: Manifest, shards: Sequence[int], slot: int) -> list[Span]:
        """Read shards of a checkpoint into a slot. Blocks.

        Raises:
            CheckpointCorruptError: A shard is not what the manifest says.
        """
        target = StateSlot(self._folder / f"slot-{slot}", manifest.layout, writable=True)
        try:
            return self._store.restore(manifest, shards, target)
        finally:
            target.close()


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _training_cores(wanted: int | None) -> int:
    usable = len(os.sched_getaffinity(0))
    return usable if wanted is None else min(wanted, usable)


def _remove_leftovers(folder: Path) -> None:
    """Remove the memory of runs whose agent was killed: nobody else will."""
    for leftover in folder.glob("eadt-*"):
        with contextlib.suppress(OSError, ValueError):
            if not psutil.pid_exists(int((leftover / "pid").read_text())):
                shutil.rmtree(leftover, ignore_errors=True)
