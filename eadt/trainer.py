"""The Python door: checks a run, wires its parts together, and waits for its end.

The only place where objects are wired. Everything that can be known before Ray is started is checked
before Ray is started.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from eadt.clock import monotonic_s
from eadt.cluster import Cluster, ClusterRun, Devices
from eadt.config import RunConfig, inactive_settings, load_config, require_paths
from eadt.config.checks import require_precision
from eadt.control.batch import feasible_worker_counts
from eadt.control.batch_check import check_batch
from eadt.control.policy import workers_per_device
from eadt.control.presets import initial_setpoint, max_workers
from eadt.control.setpoint import Setpoint
from eadt.coordination.settings import RunSettings
from eadt.errors import ConfigError, EadtError, EnvironmentFailure
from eadt.report import LEDGER_FOLDER, Report, build_report, write_report
from eadt.training.checkpoint import (
    Manifest,
    RunFile,
    RunPlace,
    SampleOrder,
    Storage,
    runs_in,
)
from eadt.training.data import PreparedData, check_dataset, default_cache_dir, prepare_dataset
from eadt.training.engine_spec import TrainingJob
from eadt.training.models import check_model

EventSink = Callable[[dict[str, Any]], None]

_VERSIONS_OF = ("eadt", "ray", "torch", "deepspeed", "transformers", "datasets")


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
            ``decision``, ``change``, ``validation``, ``checkpoint``, ``fault`` or ``note``. Called
            from one background thread.
        fresh: Begin a new run; what was begun in the run's folder before is removed with its checkpoints,
            wherever they lie, once all that can be checked before Ray is started is well.
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
        if self._fresh:
            _require_a_run(config.run_folder)
        run = identify_run(config, fresh=self._fresh)
        Storage(config.storage_path).check_writable()
        for sentence in inactive_settings(config):
            self._note("EADT-205", sentence)
        check_model(config.training)  # before the data, which may take hours to prepare
        if not _cluster_address(config) and not Cluster.is_joined():
            require_precision(config, is_gpu=_may_use_gpu(config))
        data = self._prepare_data(config)
        checkpoint = _find_checkpoint(config, run)
        order = checkpoint.order if checkpoint is not None else None
        _check_early(_with_batch_of(order, config), data)
        if checkpoint is not None:
            _check_checkpoint(config, data, run, checkpoint)
        if not run.earlier and (self._fresh or not (config.run_folder / RunFile.NAME).exists()):
            self._name_others(config)
        if self._fresh:
            run = self._remove_earlier(config, run)
        self._phase(_starting_ray(config))
        cluster = Cluster.connect(config)
        try:
            return self._run(config, run, order, data, cluster)
        finally:
            cluster.disconnect()

    def _run(
        self,
        config: RunConfig,
        run_file: RunFile,
        order: SampleOrder | None,
        data: PreparedData | None,
        cluster: Cluster,
    ) -> TrainingResult:
        devices = cluster.devices(config)
        require_precision(config, is_gpu=devices.is_gpu)
        settings = run_settings(config, run_file.run_id, devices, data, order)
        batch = config.train_batch_size(settings.setpoint.num_workers)
        if batch != settings.train_batch_size:
            self._note(
                "EADT-258",
                f"the global batch stays {settings.train_batch_size}, as in the checkpoint: with "
                f"{settings.setpoint.num_workers} workers a new run would have {batch}",
            )
        self._phase(
            f"training on {devices.describe()}, {settings.setpoint.describe()}, "
            f"global batch {settings.train_batch_size}, {settings.job.max_steps} steps"
        )
        folder = config.run_folder
        kept = set_ledger_aside(folder, run_file)
        if kept is not None:
            self._note("EADT-261", f"the ledger of the run that was here before is kept in {kept}")
        run_file.write(folder)
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
            self._note("EADT-220", note)
        self._phase(f"data ready in {monotonic_s() - begun_s:.1f} s: {data.describe()}")
        return data

    def _remove_earlier(self, config: RunConfig, run: RunFile) -> RunFile:
        """Remove what was begun in the run's folder before; returns the run, which knows what is left."""
        left = []
        for place in run.earlier:
            try:
                files = place.store(config.run_folder).remove()
            except EnvironmentFailure as error:
                files = [error.what]
            if files:
                left.append(place)
                self._note(
                    "EADT-355",
                    f"checkpoints of {place.run_id}, a run that was to be removed, are still in "
                    f"{place.storage_path or config.run_folder} ({files[0]}); this run does not use them, "
                    "and the next --fresh tries again",
                )
        if config.run_folder.exists():
            shutil.rmtree(config.run_folder)
        run = replace(run, earlier=tuple(left))
        run.write(config.run_folder)
        return run

    def _name_others(self, config: RunConfig) -> None:
        """Say which runs of this name lie in the storage: the folder that knows them may have been lost."""
        runs = runs_in(Storage(config.storage_path)) if config.storage.path is not None else []
        others = [run_id for run_id in runs if run_id.rpartition("-")[0] == config.run.name]
        if others:
            self._note(
                "EADT-259",
                f"{config.storage_path} holds checkpoints of other runs that are called {config.run.name} "
                f"({', '.join(others)}). They are left alone: which run is gone on with stands in "
                f"{config.run_folder / RunFile.NAME}, which is new: let run.folder outlive the job",
            )

    def _note(self, code: str, text: str) -> None:
        self._on_event({"type": "note", "code": code, "text": text})

    def _phase(self, text: str) -> None:
        self._on_event({"type": "phase", "text": text})


# -- checks and facts -----------------------------------------------------------------------------


def _check_early(config: RunConfig, data: PreparedData | None) -> None:
    """What can be known without Ray: needs the global batch not to depend on the cluster."""
    workers = config.elastic.num_workers
    if config.training.train_batch_size is None and workers is None:
        return
    _require_batch(config)
    if data is not None:
        check_dataset(data, config.train_batch_size(workers or 1))
    if data is None and config.training.max_steps is None:
        raise ConfigError(
            "training.max_steps is needed, since this run has no data set whose length EADT knows",
            code="EADT-206",
            fix="set training.max_steps",
        )


def _require_batch(config: RunConfig, num_workers: int | None = None, max_workers: int | None = None) -> None:
    """Refuse numbers of workers that cannot hold the global batch; takes what :func:`check_batch` takes."""
    problems = check_batch(config, num_workers, max_workers)
    if problems:
        raise ConfigError("\n".join(problem.message for problem in problems), code="EADT-210")


def identify_run(config: RunConfig, *, fresh: bool = False) -> RunFile:
    """Which run this is: the one that the run's folder holds, or a new one.

    A new one where the folder holds none, with ``fresh``, and with ``checkpoint.resume: never``: it then
    has a folder of its own beside the checkpoints of the one before, which stay.

    Raises:
        ConfigError: EADT-254, the folder does not say which run it holds.
    """
    try:
        found = RunFile.read(config.run_folder)
    except ConfigError:
        if not fresh:
            raise
        found = None
    if found is None:
        return RunFile.begin(config.run.name, config.storage.path)
    if fresh or config.checkpoint.resume == "never":
        return RunFile.begin(config.run.name, config.storage.path, found.places)
    return found.moved_to(config.storage.path)


def _find_checkpoint(config: RunConfig, run: RunFile) -> Manifest | None:
    """The checkpoint that the run would go on from, by its sizes; ``None`` for the beginning.

    Raises:
        ConfigError: EADT-257, the run's checkpoints lie in another storage.
    """
    newest, _ = run.place.store(config.run_folder).newest_valid(None, deep=False)
    if newest is None:
        for before in run.earlier:
            if before.run_id == run.run_id and _has_checkpoints(before, config.run_folder):
                raise _other_settings(
                    run,
                    "the checkpoints of this run are not in its storage",
                    [
                        f"storage.path: was {before.storage_path or 'not set'}, "
                        f"is {config.storage.path or 'not set'}"
                    ],
                )
    return newest


def _has_checkpoints(place: RunPlace, folder: Path) -> bool:
    try:
        return bool(place.store(folder).steps())
    except EadtError:
        return False  # a storage that is no more


def _with_batch_of(order: SampleOrder | None, config: RunConfig) -> RunConfig:
    """The configuration with the global batch of the run's checkpoint, unless it names one itself."""
    if order is None or config.training.train_batch_size is not None:
        return config
    named = config.training.model_copy(update={"train_batch_size": order.train_batch_size})
    return config.model_copy(update={"training": named})


def _sample_order(config: RunConfig, batch: int, data: PreparedData | None) -> SampleOrder:
    return SampleOrder(
        train_batch_size=batch,
        seed=config.run.seed,
        sequence_length=config.training.sequence_length,
        data_fingerprint=data.content_fingerprint if data is not None else None,
        data_source=data.source if data is not None else None,
    )


def _check_checkpoint(
    config: RunConfig, data: PreparedData | None, run: RunFile, checkpoint: Manifest
) -> None:
    """Refuse, before anything is started, to go on where samples would be lost or the model is another.

    Raises:
        ConfigError: EADT-257, other batch, seed, sequence length or data; EADT-251, another model.
    """
    if checkpoint.order is not None:
        batch = config.training.train_batch_size or checkpoint.order.train_batch_size
        differences = checkpoint.order.differences(_sample_order(config, batch, data))
        if differences:
            raise _other_settings(
                run,
                f"the checkpoint of step {checkpoint.step} of this run was made with other settings; with "
                "these, samples would be lost and repeated",
                differences,
            )
    if data is None or config.training.train_function:
        return
    from eadt.training.models import build_model

    model = build_model(config.training, data.vocab_size, meta=True)
    wanted = {name: tuple(param.shape) for name, param in model.named_parameters()}
    found = dict(zip(checkpoint.layout.names, checkpoint.layout.shapes, strict=True))
    different = sorted(name for name in wanted if found.get(name) != wanted[name])
    if different:
        name = different[0]
        store = run.place.store(config.run_folder)
        raise ConfigError(
            f"{store.storage.display(store.folder)} holds a checkpoint (step {checkpoint.step}) of another "
            f"model: {name} is {found.get(name, 'missing')} there and {wanted[name]} here",
            code="EADT-251",
            means="nothing was started, and the checkpoint is untouched",
            fix="use that model's configuration, another run.name, or --fresh to start over",
        )


def _other_settings(run: RunFile, what: str, differences: list[str]) -> ConfigError:
    return ConfigError(
        f"{what} ({run.run_id}):\n    " + "\n    ".join(differences),
        code="EADT-257",
        means="nothing was started, and the checkpoints are untouched",
        fix="set them back to go on, or train a run of its own with another run.name, or remove this one and "
        "start over with --fresh",
    )


def run_settings(
    config: RunConfig,
    run_id: str,
    devices: Devices,
    data: PreparedData | None,
    order: SampleOrder | None = None,
) -> RunSettings:
    """What the coordinator needs to know, from the configuration and what there is to train on.

    Args:
        config: The run.
        run_id: Its id.
        devices: What there is to train on.
        data: The prepared data; ``None`` where the run brings its own.
        order: Of the checkpoint that the run goes on from: its batch is kept on other devices, by fewer
            workers where these cannot all hold it; ``None`` for a new run.

    Raises:
        ConfigError: EADT-210, a number of workers cannot hold the batch; or the data is too short.
    """
    training = config.training
    precision = training.precision or ("bf16" if devices.is_gpu else "fp32")
    setpoint = initial_setpoint(config, devices.num_devices, precision)
    most = max_workers(config, devices.num_devices)
    is_kept = order is not None and training.train_batch_size is None
    config = _with_batch_of(order, config)
    if is_kept and config.elastic.num_workers is None:
        setpoint = _that_can_hold(config.train_batch_size(1), setpoint, config, devices.num_devices)
    _require_batch(config, setpoint.num_workers, most)
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
        sample_order=_sample_order(config, batch, data),
        max_micro_batch=training.per_device_train_batch_size,
        min_workers=config.elastic.min_workers,
        max_workers=most,
        mode=config.elastic.mode,
        prepare_ahead=config.elastic.prepare_ahead,
        num_slots=2 if has_saves else 1,
        checkpoint_every_steps=config.checkpoint.every_steps,
        keep_checkpoints=config.checkpoint.keep,
        storage_path=config.storage_path,
        save_final_model=config.checkpoint.save_final_model,
        max_engine_failures=config.elastic.max_engine_failures,
        device="cuda" if devices.is_gpu else "cpu",
        use_mps=config.mps.enabled and devices.is_gpu,
        mps_pipe_directory=config.mps.pipe_directory,
        run_key=secrets.token_hex(16),
        run_row={"config": config.model_dump(mode="json"), "versions": versions()},
    )


def _that_can_hold(batch: int, setpoint: Setpoint, config: RunConfig, num_devices: int) -> Setpoint:
    """The setpoint with the most workers, up to its own number, that can hold a batch; itself if none can."""
    counts = feasible_worker_counts(
        batch,
        config.training.per_device_train_batch_size,
        config.elastic.min_workers,
        setpoint.num_workers,
    )
    if not counts:
        return setpoint
    return setpoint.with_(num_workers=counts[-1], workers_per_gpu=workers_per_device(counts[-1], num_devices))


def set_ledger_aside(folder: Path, run_file: RunFile) -> Path | None:
    """Keep the ledger of another run in this folder apart: a ledger is one run's, and so are its totals.

    Returns:
        Where it is now; ``None`` where there is none.
    """
    before = RunFile.read(folder)
    ledger = folder / LEDGER_FOLDER
    if before is None or before.run_id == run_file.run_id or not ledger.is_dir():
        return None
    return ledger.rename(folder / f"{LEDGER_FOLDER}-{before.run_id}")


def versions() -> dict[str, str]:
    """Versions of what determines a run's results."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS_OF:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _cluster_address(config: RunConfig) -> str | None:
    """The Ray cluster that the run joins; ``None`` where it starts one on this machine."""
    return config.resources.address or os.environ.get("RAY_ADDRESS")


def _may_use_gpu(config: RunConfig) -> bool:
    """Whether a cluster that starts on this machine will train on GPUs."""
    if config.resources.use_gpu is not None:
        return config.resources.use_gpu
    return torch.cuda.device_count() > 0


def _starting_ray(config: RunConfig) -> str:
    address = _cluster_address(config)
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


def _require_a_run(folder: Path) -> None:
    """Refuse to remove a folder that does not look like a run's."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / RunFile.NAME).exists() and not (folder / "ledger").exists():
        raise ConfigError(
            f"{folder} is not empty and holds no run of EADT: it is not removed",
            code="EADT-207",
            fix="choose another run.folder or run.name, or empty the folder yourself",
        )


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
