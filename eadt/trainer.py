"""The Python door: checks a run, wires its parts together, and waits for its end.

The only place where objects are wired. Everything that can be known before Ray is started is checked
before Ray is started.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from eadt.clock import monotonic_s
from eadt.cluster import Cluster, ClusterRun, Devices
from eadt.config import RunConfig, inactive_settings, load_config, require_paths
from eadt.control.batch_check import check_batch
from eadt.control.presets import initial_setpoint, max_workers
from eadt.coordination.settings import RunSettings
from eadt.errors import ConfigError, EadtError
from eadt.report import Report, build_report, write_report
from eadt.training.checkpoint import CheckpointStore
from eadt.training.data import PreparedData, check_dataset, default_cache_dir, prepare_dataset
from eadt.training.engine_spec import TrainingJob

EventSink = Callable[[dict[str, Any]], None]

_VERSIONS_OF = ("eadt", "ray", "torch", "deepspeed", "transformers", "datasets")
_RUN_FILE = "run.json"


@dataclass(frozen=True)
class TrainingResult:
    """What came of a run.

    Attributes:
        run_folder: Folder of the ledger and the report.
        status: ``completed``, ``interrupted`` (resume by running again) or ``failed``.
        report: The run's numbers, recomputed from the ledger.
        report_paths: The report's files by format.
        final_model_path: The trained model as a Hugging Face folder; ``None`` if none was written.
        error: Why it failed; ``None`` unless it did.
    """

    run_folder: Path
    status: str
    report: Report
    report_paths: dict[str, Path]
    final_model_path: str | None
    error: EadtError | None


class EnergyAdaptiveTrainer:
    """Trains what a configuration says, adapting the run to the energy that it draws.

    Args:
        config: A loaded configuration, or the path of a YAML file.
        on_event: Gets dictionaries on what happens, each with a ``type``: ``phase``, ``progress``,
            ``decision``, ``resize``, ``validation``, ``checkpoint``, ``fault`` or ``note``. Called
            from one background thread.
        fresh: Remove an earlier run of that name instead of going on with it.
    """

    def __init__(
        self, config: RunConfig | str | Path, *, on_event: EventSink | None = None, fresh: bool = False
    ) -> None:
        self._config = config if isinstance(config, RunConfig) else load_config(config)
        self._on_event = on_event or (lambda _: None)
        self._fresh = fresh
        self._interrupts: list[str] = []
        self._cluster_run: ClusterRun | None = None

    def interrupt(self, reason: str = "asked to") -> None:
        """End the run at its next step, with a checkpoint; safe from any thread or signal handler."""
        self._interrupts.append(reason)
        if self._cluster_run is not None:
            self._cluster_run.interrupt(reason)

    def fit(self) -> TrainingResult:
        """Train to the end. Blocks; Ctrl-C ends it at the next step, with a checkpoint.

        Raises:
            ConfigError: The configuration cannot work; nothing was started.
            EnvironmentFailure: Ray, the storage or the machine cannot do what the run needs.
        """
        config = _absolute(self._config)
        require_paths(config)
        folder = config.run_folder
        if self._fresh:
            _remove_run(folder, config.storage_path)
        run_id = _run_id(folder, config.run.name)
        store = CheckpointStore(config.storage_path)
        store.check_writable()
        for sentence in inactive_settings(config):
            self._on_event({"type": "note", "code": "EADT-205", "text": sentence})
        data = self._prepare_data(config)
        _check_early(config, data)
        _check_checkpoint(config, data, store)
        self._phase(_starting_ray(config))
        cluster = Cluster.connect(config)
        try:
            return self._run(config, run_id, data, cluster)
        finally:
            cluster.disconnect()

    def _run(
        self, config: RunConfig, run_id: str, data: PreparedData | None, cluster: Cluster
    ) -> TrainingResult:
        devices = cluster.devices(config)
        settings = run_settings(config, run_id, devices, data)
        self._phase(
            f"training on {devices.describe()}, {settings.setpoint.describe()}, "
            f"global batch {settings.train_batch_size}, {settings.job.max_steps} steps"
        )
        folder = config.run_folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _RUN_FILE).write_text(json.dumps({"run_id": run_id, "name": config.run.name}))
        with cluster.start_run(config, settings, devices, self._on_event) as run, _ctrl_c(run.interrupt):
            self._cluster_run = run
            for reason in self._interrupts:  # asked for before there was anything to end
                run.interrupt(reason)
            end = run.wait()
            self._cluster_run = None
        self._phase("writing the report")
        paths = write_report(folder, config.report.formats)
        return TrainingResult(
            run_folder=folder,
            status=end.status,
            report=build_report(folder),
            report_paths=paths,
            final_model_path=end.final_model_path,
            error=end.error,
        )

    def _prepare_data(self, config: RunConfig) -> PreparedData | None:
        training = config.training
        if training.dataset_name is None and training.dataset_path is None:
            return None
        begun_s = monotonic_s()
        self._phase("preparing the data")
        data = prepare_dataset(training, default_cache_dir(), config.run.seed, self._phase)
        for note in data.notes:
            self._on_event({"type": "note", "code": "EADT-220", "text": note})
        self._phase(f"data ready in {monotonic_s() - begun_s:.1f} s: {data.describe()}")
        return data

    def _phase(self, text: str) -> None:
        self._on_event({"type": "phase", "text": text})


# -- checks and facts -----------------------------------------------------------------------------


def _check_early(config: RunConfig, data: PreparedData | None) -> None:
    """What can be known without Ray: needs the global batch not to depend on the cluster."""
    workers = config.elastic.num_workers
    if config.training.train_batch_size is None and workers is None:
        return
    batch = config.train_batch_size(workers or 1)
    if data is not None:
        check_dataset(data, batch)
    if data is None and config.training.max_steps is None:
        raise ConfigError(
            "training.max_steps is needed, since this run has no data set whose length EADT knows",
            code="EADT-206",
            fix="set training.max_steps",
        )


def _check_checkpoint(config: RunConfig, data: PreparedData | None, store: CheckpointStore) -> None:
    """Refuse, before anything is started, to go on from a checkpoint of another model."""
    if config.checkpoint.resume == "never" or data is None or config.training.train_function:
        return
    if not store.steps():
        return
    manifest, _ = store.newest_valid(None, deep=False)
    if manifest is None:
        return
    from eadt.training.models import build_model

    model = build_model(config.training, data.vocab_size, meta=True)
    wanted = {name: tuple(param.shape) for name, param in model.named_parameters()}
    found = dict(zip(manifest.layout.names, manifest.layout.shapes, strict=True))
    different = sorted(name for name in wanted if found.get(name) != wanted[name])
    if different:
        name = different[0]
        raise ConfigError(
            f"{store.storage.display('checkpoints')} holds a checkpoint (step {manifest.step}) of another "
            f"model: {name} is {found.get(name, 'missing')} there and {wanted[name]} here",
            code="EADT-251",
            means="nothing was started, and the checkpoint is untouched",
            fix="use that model's configuration, another run.name, or --fresh to start over",
        )


def run_settings(config: RunConfig, run_id: str, devices: Devices, data: PreparedData | None) -> RunSettings:
    """What the coordinator needs to know, from the configuration and what there is to train on.

    Raises:
        ConfigError: EADT-210, a number of workers cannot hold the batch; or the data is too short.
    """
    training = config.training
    precision = training.precision or ("bf16" if devices.is_gpu else "fp32")
    setpoint = initial_setpoint(config, devices.num_devices, precision)
    most = max_workers(config, devices.num_devices)
    problems = check_batch(config, setpoint.num_workers, most)
    if problems:
        raise ConfigError("\n".join(problem.message for problem in problems), code="EADT-210")
    batch = config.train_batch_size(setpoint.num_workers)
    if data is not None:
        check_dataset(data, batch)
    max_steps = training.max_steps
    if max_steps is None:
        assert data is not None, "checked before"
        max_steps = max(1, int(training.num_train_epochs * data.num_train_sequences / batch))
    has_saves = bool(config.checkpoint.snapshot_every_steps or config.checkpoint.every_steps)
    return RunSettings(
        run_id=run_id,
        name=config.run.name,
        job=TrainingJob(
            training=training,
            deepspeed=config.deepspeed.passthrough(),
            seed=config.run.seed,
            precision=precision,
            max_steps=max_steps,
            final_model_path=str(config.run_folder / "model"),
            snapshot_every_steps=config.checkpoint.snapshot_every_steps,
        ),
        setpoint=setpoint,
        train_batch_size=batch,
        max_micro_batch=training.per_device_train_batch_size,
        min_workers=config.elastic.min_workers,
        max_workers=most,
        mode=config.elastic.mode,
        prepare_ahead=config.elastic.prepare_ahead,
        num_slots=2 if has_saves else 1,
        checkpoint_every_steps=config.checkpoint.every_steps,
        keep_checkpoints=config.checkpoint.keep,
        storage_path=config.storage_path,
        resume=config.checkpoint.resume == "auto",
        save_final_model=config.checkpoint.save_final_model,
        max_engine_failures=config.elastic.max_engine_failures,
        device="cuda" if devices.is_gpu else "cpu",
        use_mps=config.mps.enabled and devices.is_gpu,
        mps_pipe_directory=config.mps.pipe_directory,
        run_key=secrets.token_hex(16),
        run_row={"config": config.model_dump(mode="json"), "versions": versions()},
    )


def versions() -> dict[str, str]:
    """Versions of what determines a run's results."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS_OF:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _starting_ray(config: RunConfig) -> str:
    address = config.resources.address or os.environ.get("RAY_ADDRESS")
    return f"connecting to Ray at {address}" if address else "starting Ray on this machine"


def _absolute(config: RunConfig) -> RunConfig:
    """Local paths made absolute, since actors run in other folders."""
    training = config.training
    changes = {
        key: str(Path(value).resolve())
        for key in ("model_name_or_path", "tokenizer_name_or_path", "dataset_path")
        if (value := getattr(training, key)) is not None and Path(value).exists()
    }
    run = config.run.model_copy(update={"folder": str(config.run_folder.resolve())})
    storage = config.storage
    if storage.path is not None and "://" not in storage.path:
        storage = storage.model_copy(update={"path": str(Path(storage.path).resolve())})
    return config.model_copy(
        update={"training": training.model_copy(update=changes), "run": run, "storage": storage}
    )


def _run_id(folder: Path, name: str) -> str:
    """The id of the run in ``folder``, the same after an interruption; else a new one."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads((folder / _RUN_FILE).read_text())["run_id"])
    return f"{name}-{secrets.token_hex(3)}"


def _remove_run(folder: Path, storage_path: str) -> None:
    """Remove an earlier run; refuses a folder that does not look like one."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _RUN_FILE).exists() and not (folder / "ledger").exists():
            raise ConfigError(
                f"{folder} is not empty and holds no run of EADT: it is not removed",
                code="EADT-207",
                fix="choose another run.folder or run.name, or empty the folder yourself",
            )
        shutil.rmtree(folder)
    checkpoints = Path(storage_path) / "checkpoints"
    if "://" not in storage_path and checkpoints.exists():
        shutil.rmtree(checkpoints)


@contextlib.contextmanager
def _ctrl_c(interrupt: Callable[[str], None]) -> Iterator[None]:
    """While inside, Ctrl-C and SIGTERM ask the run to end; a third one is taken at its word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    count = 0

    def handle(number: int, frame: Any) -> None:
        del frame
        nonlocal count
        count += 1
        if count >= 3:
            raise KeyboardInterrupt
        interrupt("Ctrl-C" if number == signal.SIGINT else "SIGTERM")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
