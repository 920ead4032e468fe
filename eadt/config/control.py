"""The sections ``mps``, ``supervisor``, ``policy`` and ``elastic``: what is adapted, when and how.

Owns their keys, defaults (those of the design) and checks that need no machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from eadt.config.base import Conflict, PathText, Section, conflict

Percentage = Annotated[int, Field(ge=1, le=100)]

MPS_PRESETS: dict[str, tuple[int, int]] = {
    "max_single_process": (100, 1),
    "balanced": (50, 2),
    "max_parallel": (25, 4),
}
"""Named patterns: (thread percentage, workers per GPU)."""


class MpsConfig(Section):
    """How workers share a device: MPS on a GPU, the node's cores on a CPU node."""

    section: ClassVar[str] = "mps"

    enabled: bool = Field(
        True, description="Let workers share a device. Off: one worker a GPU at 100 %, never changed."
    )
    initial_thread_percentage: Percentage | None = Field(
        None, description="Share of its device that each worker starts with, in %."
    )
    shared_resources: int | None = Field(
        None, ge=1, description="Workers per GPU (on a CPU node: per node) at the start."
    )
    preset: Literal["max_single_process", "balanced", "max_parallel"] | None = Field(
        None,
        description="Named pattern: 1 worker at 100 %, 2 at 50 % (the default), or 4 at 25 %. The two "
        "numbers above may be given instead.",
    )
    pipe_directory: PathText | None = Field(
        None, description="Folder of the MPS daemon's pipes. Default: `CUDA_MPS_PIPE_DIRECTORY` or NVIDIA's."
    )

    @property
    def workers_per_gpu(self) -> int:
        """Workers per GPU at the start; where only a percentage is given, as many as fill the GPU."""
        if not self.enabled:
            return 1
        if self.shared_resources is not None:
            return self.shared_resources
        if self.preset is None and self.initial_thread_percentage is not None:
            return max(1, min(4, 100 // self.initial_thread_percentage))
        return MPS_PRESETS[self.preset or "balanced"][1]

    @property
    def thread_percentage(self) -> int:
        """Share of each worker at the start, in %; where only a worker count is given, an equal share."""
        if not self.enabled:
            return 100
        if self.initial_thread_percentage is not None:
            return self.initial_thread_percentage
        if self.preset is None and self.shared_resources is not None:
            return max(1, 100 // self.shared_resources)
        return MPS_PRESETS[self.preset or "balanced"][0]

    def conflicts(self) -> Iterator[Conflict]:
        """See :meth:`Section.conflicts`."""
        if self.preset is None:
            return
        percentage, workers = MPS_PRESETS[self.preset]
        given = (
            ("initial_thread_percentage", self.initial_thread_percentage, percentage),
            ("shared_resources", self.shared_resources, workers),
        )
        for key, value, preset_value in given:
            if value is not None and value != preset_value:
                yield conflict(
                    f"{value} contradicts preset {self.preset}, which means {preset_value}: remove preset or "
                    f"{key}",
                    f"mps.{key}",
                    "mps.preset",
                )


class SupervisorConfig(Section):
    """When the energy supervisor decides, and how it verifies what it did."""

    section: ClassVar[str] = "supervisor"

    enabled: bool = Field(True, description="Adapt the run while it trains. Off: measure and report only.")
    decision_interval: float = Field(300.0, gt=0, description="Seconds between two decisions.")
    verification_intervals: int = Field(
        2, ge=1, description="Observations after a change before it is judged; 2 to 3 is typical."
    )
    stable_intervals: int = Field(
        6, ge=0, description="Decisions for which a state is held after a change was taken back."
    )
    warmup_intervals: int = Field(
        1, ge=0, description="Observations to leave out after the start and after each change."
    )


class ScheduleEntry(Section):
    """One planned change of the setpoint."""

    at_step: int = Field(ge=1, description="Optimizer step after which it happens.")
    num_workers: int | None = Field(None, ge=1, description="Active workers from then on.")
    thread_percentage: Percentage | None = Field(None, description="Share of each worker from then on, in %.")


class PolicyConfig(Section):
    """Which rules decide, and their numbers."""

    section: ClassVar[str] = "policy"

    type: Literal["threshold", "hold", "schedule"] = Field(
        "threshold",
        description="`threshold`: the rules of the design. `hold`: never change. `schedule`: planned "
        "changes, for tests, benchmarks and demonstrations; reports name it.",
    )
    power_high_w: float = Field(250.0, gt=0, description="Mean W per GPU that counts as high.")
    power_low_w: float = Field(200.0, ge=0, description="Mean W per GPU that counts as low.")
    efficiency_low: float = Field(
        0.1, ge=0, description="Samples/s per W under which high power calls for a smaller share."
    )
    efficiency_high: float = Field(
        0.2, ge=0, description="Samples/s per W under which low power calls for a larger share."
    )
    thread_decrease_step: Percentage = Field(10, description="Percentage points of one decrease.")
    thread_increase_step: Percentage = Field(10, description="Percentage points of one increase.")
    thread_scale_step: Percentage = Field(15, description="Percentage points taken when workers are added.")
    min_thread_percentage: Percentage = Field(25, description="Smallest share, in %.")
    max_workers_per_gpu: int = Field(4, ge=1, description="Most workers on one GPU.")
    max_throughput_loss_fraction: float = Field(
        0.2, ge=0, le=1, description="Loss of throughput that verification accepts."
    )
    schedule: tuple[ScheduleEntry, ...] = Field(
        (), strict=False, description="The planned changes of `type: schedule`, by rising `at_step`."
    )

    def conflicts(self) -> Iterator[Conflict]:
        """See :meth:`Section.conflicts`."""
        if self.power_low_w > self.power_high_w:
            yield conflict(
                f"must not be above power_high_w ({self.power_high_w:g} W): lower power_low_w or raise "
                "power_high_w",
                "policy.power_low_w",
                "policy.power_high_w",
            )
        if self.efficiency_low > self.efficiency_high:
            yield conflict(
                f"must not be above efficiency_high ({self.efficiency_high:g}): lower efficiency_low or "
                "raise efficiency_high",
                "policy.efficiency_low",
                "policy.efficiency_high",
            )
        if self.type == "schedule" and not self.schedule:
            yield conflict(
                "policy.type is schedule, but there is none: add entries such as {at_step: 100, "
                "num_workers: 1}",
                "policy.schedule",
                "policy.type",
            )
        if self.type != "schedule" and self.schedule:
            yield conflict(
                f"is used by policy.type schedule only, not by {self.type}: change type or remove schedule",
                "policy.schedule",
                "policy.type",
            )
        last = 0
        for index, entry in enumerate(self.schedule):
            if entry.at_step <= last:
                yield conflict(
                    f"steps must rise: {entry.at_step} comes after {last}",
                    f"policy.schedule[{index}].at_step",
                    "policy.schedule",
                )
            last = entry.at_step
            if entry.num_workers is None and entry.thread_percentage is None:
                yield conflict(
                    "changes nothing: give num_workers, thread_percentage or both",
                    f"policy.schedule[{index}]",
                    "policy.schedule",
                )


class ElasticConfig(Section):
    """How many workers there may be, and how a change is carried out."""

    section: ClassVar[str] = "elastic"

    mode: Literal["in_place", "group", "restart", "auto"] = Field(
        "auto",
        description="`in_place`: hosts stay, engines change. `group`: Ray's worker group is resized, engines "
        "train on meanwhile. `restart`: checkpoint and restart. `auto`: the cheapest that can carry it.",
    )
    num_workers: int | None = Field(
        None, ge=1, description="Workers at the start. Default: devices × workers per GPU."
    )
    min_workers: int = Field(1, ge=1, description="Fewest workers the run may continue with.")
    max_workers: int | None = Field(
        None, ge=1, description="Most workers. Default: devices × `policy.max_workers_per_gpu`."
    )
    prepare_ahead: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Build the next engines while the present ones train: shorter pauses, twice the memory "
        "for a moment. `auto`: where it fits.",
    )
    lease_s: float = Field(
        60.0, gt=0, description="Seconds for which an engine trains on without its host before it ends."
    )
    max_engine_failures: int = Field(
        3, ge=0, description="Engine failures in a row, without progress, before the run ends."
    )
    max_host_failures: int = Field(8, ge=0, description="Lost hosts before the run ends.")
    wait_for_resources_s: float = Field(
        300.0, ge=0, description="Seconds to wait for the minimum of workers to find room."
    )
    shared_memory_dir: PathText | None = Field(
        None, description="Folder for state in memory on each node. Default: `/dev/shm`."
    )
    spill_dir: PathText | None = Field(
        None,
        description="Folder on disk where shared memory is too small. Default: the system's "
        "temporary folder.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        """See :meth:`Section.conflicts`."""
        if self.max_workers is not None and self.min_workers > self.max_workers:
            yield conflict(
                f"{self.min_workers} is above max_workers ({self.max_workers}): lower min_workers or raise "
                "max_workers",
                "elastic.min_workers",
                "elastic.max_workers",
            )
        if self.num_workers is None:
            return
        if self.num_workers < self.min_workers:
            yield conflict(
                f"{self.num_workers} is below min_workers ({self.min_workers}): raise num_workers or lower "
                "min_workers",
                "elastic.num_workers",
                "elastic.min_workers",
            )
        if self.max_workers is not None and self.num_workers > self.max_workers:
            yield conflict(
                f"{self.num_workers} is above max_workers ({self.max_workers}): lower num_workers or raise "
                "max_workers",
                "elastic.num_workers",
                "elastic.max_workers",
            )
