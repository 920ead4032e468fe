"""The whole configuration of a run: its sections, and the checks across them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator

from eadt.config.base import Conflict, Section, conflict
from eadt.config.control import ElasticConfig, MpsConfig, PolicyConfig, SupervisorConfig
from eadt.config.outside import (
    CheckpointConfig,
    PowerConfig,
    ReportConfig,
    ResourcesConfig,
    RunSection,
    StorageConfig,
)
from eadt.config.training import POSITION_NAMES, DeepSpeedConfig, TrainingConfig


class RunConfig(Section):
    """One run. Immutable; attribute names are the keys of the YAML file."""

    run: RunSection = Field(default_factory=RunSection, description="The run's name, seed and folder.")
    training: TrainingConfig = Field(description="The model, the data, the optimizer and the length.")
    deepspeed: DeepSpeedConfig = Field(
        default_factory=DeepSpeedConfig, description="DeepSpeed's own configuration, passed through."
    )
    mps: MpsConfig = Field(default_factory=MpsConfig, description="How workers share a device.")
    supervisor: SupervisorConfig = Field(
        default_factory=SupervisorConfig, description="When decisions are made and verified."
    )
    policy: PolicyConfig = Field(
        default_factory=PolicyConfig, description="Which rules decide, and their numbers."
    )
    elastic: ElasticConfig = Field(
        default_factory=ElasticConfig, description="How many workers, and how their number changes."
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="What is saved, and when."
    )
    storage: StorageConfig = Field(
        default_factory=StorageConfig, description="Where checkpoints and the final model go."
    )
    power: PowerConfig = Field(default_factory=PowerConfig, description="What energy is measured with.")
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig, description="What is asked of Ray.")
    report: ReportConfig = Field(default_factory=ReportConfig, description="The report at the end.")

    # Where each key stands in the file, so that checks made later can say it too.
    _file: str | None = PrivateAttr(None)
    _lines: dict[str, int] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, data: Any) -> Any:
        """A section whose lines are all commented out reads as null: it means the defaults."""
        if not isinstance(data, dict):
            return data
        return {
            key: {} if value is None and key in cls.model_fields else value for key, value in data.items()
        }

    @model_validator(mode="after")
    def _adopt_deepspeed_values(self) -> Self:
        """What DeepSpeed's section gives is written into ``training``, where all code reads it."""
        adopted = {
            key: value
            for key, (value, _) in self._deepspeed_values().items()
            if key not in self.training.model_fields_set
        }
        if adopted:
            self._settle(training=self.training.model_copy(update=adopted))
        return self

    @property
    def run_folder(self) -> Path:
        """Folder of the ledger and the report."""
        return Path(self.run.folder or f"runs/{self.run.name}")

    @property
    def storage_path(self) -> str:
        """Where checkpoints and the final model go: a local path or a URI."""
        return self.storage.path or str(self.run_folder)

    def train_batch_size(self, num_workers: int) -> int:
        """Sequences per optimizer step of the whole job, for ``num_workers`` workers at the start."""
        training = self.training
        return training.train_batch_size or (
            training.per_device_train_batch_size * training.gradient_accumulation_steps * num_workers
        )

    def conflicts(self) -> Iterator[Conflict]:
        """See :meth:`Section.conflicts`."""
        yield from self._deepspeed_conflicts()
        yield from self._interval_conflicts()
        yield from self._share_conflicts()
        yield from self._schedule_conflicts()
        yield from self._precision_conflicts()
        yield from self._length_conflicts()

    def _deepspeed_values(self) -> dict[str, tuple[Any, str]]:
        """Keys of ``training`` that DeepSpeed's section also gives: their value and where it stands."""
        deepspeed = self.deepspeed
        values: dict[str, tuple[Any, str]] = {}
        if deepspeed.gradient_clipping is not None:
            values["max_grad_norm"] = deepspeed.gradient_clipping, "deepspeed.gradient_clipping"
        if deepspeed.precision is not None:
            values["precision"] = deepspeed.precision, f"deepspeed.{deepspeed.precision}.enabled"
        params = (deepspeed.optimizer or {}).get("params")
        if isinstance(params, dict):
            named = {"lr": "learning_rate", "weight_decay": "weight_decay", "eps": "adam_epsilon"}
            for name, key in named.items():
                if isinstance(params.get(name), int | float):
                    values[key] = float(params[name]), f"deepspeed.optimizer.params.{name}"
            betas = params.get("betas")
            if isinstance(betas, list) and len(betas) == 2 and all(isinstance(b, int | float) for b in betas):
                for index, key in enumerate(("adam_beta1", "adam_beta2")):
                    values[key] = float(betas[index]), "deepspeed.optimizer.params.betas"
        return values

    def _deepspeed_conflicts(self) -> Iterator[Conflict]:
        training = self.training
        for key, (value, place) in self._deepspeed_values().items():
            given = getattr(training, key)
            if key in training.model_fields_set and given != value:
                yield conflict(
                    f"says {value}, but training.{key} says {given}: remove one of them",
                    place,
                    f"training.{key}",
                )
        if self.deepspeed.scheduler is not None:
            for key in ("lr_scheduler_type", "warmup_steps"):
                if getattr(training, key) != TrainingConfig.model_fields[key].default:
                    yield conflict(
                        f"replaces training.{key}, which is set too: remove one of them",
                        "deepspeed.scheduler",
                        f"training.{key}",
                    )

    def _interval_conflicts(self) -> Iterator[Conflict]:
        observe_s = self.training.energy_monitoring_interval
        if self.supervisor.enabled and self.supervisor.decision_interval < observe_s:
            yield conflict(
                f"{self.supervisor.decision_interval:g} s is shorter than "
                f"training.energy_monitoring_interval ({observe_s:g} s), so there would be nothing new "
                "to decide on: raise supervisor.decision_interval or lower "
                "training.energy_monitoring_interval",
                "supervisor.decision_interval",
                "training.energy_monitoring_interval",
            )
        if self.power.sampling_interval > observe_s:
            yield conflict(
                f"{self.power.sampling_interval:g} s is longer than training.energy_monitoring_interval "
                f"({observe_s:g} s): lower power.sampling_interval or raise "
                "training.energy_monitoring_interval",
                "power.sampling_interval",
                "training.energy_monitoring_interval",
            )

    def _share_conflicts(self) -> Iterator[Conflict]:
        share, least = self.mps.thread_percentage, self.policy.min_thread_percentage
        if self.policy.type == "threshold" and share < least:
            yield conflict(
                f"workers would start with {share} %, under policy.min_thread_percentage ({least} %): raise "
                "mps.initial_thread_percentage or lower policy.min_thread_percentage",
                "mps.initial_thread_percentage",
                "mps.shared_resources",
                "policy.min_thread_percentage",
                "policy.type",
            )
        count, most = self.mps.workers_per_gpu, self.policy.max_workers_per_gpu
        if count > most:
            yield conflict(
                f"{count} workers per GPU are more than policy.max_workers_per_gpu ({most}): lower "
                "mps.shared_resources or raise policy.max_workers_per_gpu",
                "mps.shared_resources",
                "mps.preset",
                "policy.max_workers_per_gpu",
            )

    def _schedule_conflicts(self) -> Iterator[Conflict]:
        if self.policy.type == "schedule" and not self.supervisor.enabled:
            yield conflict(
                "the schedule is carried out by the supervisor, which is off: set supervisor.enabled: true "
                "or policy.type: hold",
                "policy.type",
                "supervisor.enabled",
            )
        least, most = self.elastic.min_workers, self.elastic.max_workers
        for index, entry in enumerate(self.policy.schedule):
            count = entry.num_workers
            if count is not None and (count < least or (most is not None and count > most)):
                bounds = f"at least {least}" if most is None else f"{least} to {most}"
                yield conflict(
                    f"{count} is outside the allowed number of workers ({bounds}): change it, or "
                    "elastic.min_workers and elastic.max_workers",
                    f"policy.schedule[{index}].num_workers",
                    "policy.schedule",
                    "elastic.min_workers",
                    "elastic.max_workers",
                )

    def _precision_conflicts(self) -> Iterator[Conflict]:
        place = "deepspeed.fp16.enabled" if self.deepspeed.precision == "fp16" else "training.precision"
        if (
            self.deepspeed.precision or self.training.precision
        ) == "fp16" and self.resources.use_gpu is False:
            yield conflict(
                "fp16 is for GPUs, and resources.use_gpu is false: set training.precision: bf16 or fp32, or "
                "resources.use_gpu: true",
                place,
                "training.precision",
                "deepspeed.fp16.enabled",
                "resources.use_gpu",
            )

    def _length_conflicts(self) -> Iterator[Conflict]:
        training = self.training
        if training.train_function is not None:
            return  # what its own code does with the length, only it knows
        for name in POSITION_NAMES:
            positions = training.model_config_overrides.get(name)
            if isinstance(positions, int) and 0 < positions < training.sequence_length:
                yield conflict(
                    f"{training.sequence_length} tokens are more than the model's {positions} positions "
                    f"(training.model_config.{name}): lower training.sequence_length or raise that",
                    "training.sequence_length",
                    f"training.model_config.{name}",
                )
