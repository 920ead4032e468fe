"""The sections ``run``, ``checkpoint``, ``storage``, ``power``, ``resources`` and ``report``.

What the run is called, where it leaves things, what it measures with and what it asks Ray for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from eadt.config.base import Conflict, PathText, Section, conflict

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class RunSection(Section):
    """The run's name, seed and folder."""

    section: ClassVar[str] = "run"

    name: str = Field(
        "run",
        pattern=NAME_PATTERN,
        description="Name of the run: letters, digits, `.`, `_`, `-`. Default: the file's name.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the model, the order of data and dropout.")
    folder: PathText | None = Field(
        None, description="Folder for the ledger and the report. Default: `runs/<name>`."
    )


class CheckpointConfig(Section):
    """What is saved, and when."""

    section: ClassVar[str] = "checkpoint"

    every_steps: int | None = Field(
        500, ge=1, description="Optimizer steps between checkpoints in storage; `null`: only when needed."
    )
    keep: int = Field(2, ge=1, description="Checkpoints to keep.")
    snapshot_every_steps: int | None = Field(
        50,
        ge=1,
        description="Optimizer steps between snapshots in memory, which bound what a kill loses; "
        "`null`: none.",
    )
    save_final_model: bool = Field(
        True, description="Save the trained model as a Hugging Face folder at the end."
    )
    resume: Literal["auto", "never"] = Field(
        "auto",
        description="`auto`: go on from the newest checkpoint of this run, if there is one. `never`: each "
        "start is a new run with an id and a folder of its own in the storage; checkpoints of the one before "
        "stay until `--fresh`.",
    )


class StorageConfig(Section):
    """Where checkpoints and the final model go."""

    section: ClassVar[str] = "storage"

    path: PathText | None = Field(
        None,
        description="Folder or URI that Ray's `storage_path` takes (local, `s3://`, `gs://`, `hdfs://`); "
        "runs can share it, each has a folder `checkpoints/<run id>`. Default: the run's folder.",
    )


class PowerEstimateConfig(Section):
    """The power model for machines where nothing can be read; its values are flagged `estimated`."""

    section: ClassVar[str] = "power.estimate"

    idle_w: float | None = Field(
        None, ge=0, description="W of the node's idle CPUs. Default: by the family of its CPU."
    )
    per_core_w: float | None = Field(
        None, ge=0, description="W that one fully used logical core adds. Default: by the family of its CPU."
    )


class SimulatedPowerConfig(Section):
    """Pretended GPUs for trials; their values are flagged `simulated`."""

    section: ClassVar[str] = "power.simulated"

    num_gpus: int = Field(1, ge=1, description="Pretended GPUs per node.")
    idle_w: float = Field(70.0, ge=0, description="W of an idle pretended GPU.")
    max_w: float = Field(300.0, gt=0, description="W of a fully used pretended GPU.")
    seed: int = Field(0, ge=0, description="Seed of its noise.")

    def conflicts(self) -> Iterator[Conflict]:
        """See :meth:`Section.conflicts`."""
        if self.idle_w > self.max_w:
            yield conflict(
                f"must not be above max_w ({self.max_w:g} W): lower idle_w or raise max_w",
                "power.simulated.idle_w",
                "power.simulated.max_w",
            )


class PowerConfig(Section):
    """What energy is measured with."""

    section: ClassVar[str] = "power"

    source: Literal["auto", "nvml", "rapl", "estimate", "simulated"] = Field(
        "auto",
        description="`auto`: NVML, then RAPL, then an estimate, whichever each part of a node can give.",
    )
    sampling_interval: float = Field(1.0, ge=0.02, description="Seconds between two readings on a node.")
    booking_interval: float = Field(
        10.0,
        ge=0.1,
        description="Longest interval in s in which a node's energy is written down; a change of what it is "
        "for always ends one.",
    )
    estimate: PowerEstimateConfig = Field(
        default_factory=PowerEstimateConfig, description="Power model of the estimate."
    )
    simulated: SimulatedPowerConfig = Field(
        default_factory=SimulatedPowerConfig, description="Pretended GPUs of the simulated source."
    )


class ResourcesConfig(Section):
    """What is asked of Ray."""

    section: ClassVar[str] = "resources"

    cpus_per_worker: float | None = Field(
        None,
        gt=0,
        description="Ray CPUs per worker, for placement. Default: 1 on GPU nodes, else such that "
        "`elastic.max_workers` fit.",
    )
    training_cores_per_node: int | None = Field(
        None, ge=1, description="Cores of a CPU node that its engines share. Default: all."
    )
    use_gpu: bool | None = Field(None, description="Train on GPUs. Default: if the cluster has any.")
    address: str | None = Field(
        None,
        min_length=1,
        description="Ray cluster to use. Default: `RAY_ADDRESS`, else a local cluster is started.",
    )
    object_store_memory_bytes: int = Field(
        200_000_000, ge=80_000_000, description="Object store of a local cluster that EADT starts, in bytes."
    )


class ReportConfig(Section):
    """The report at the end of a run."""

    section: ClassVar[str] = "report"

    formats: tuple[Literal["json", "markdown", "html"], ...] = Field(
        ("json", "markdown", "html"), strict=False, description="Files to write."
    )
