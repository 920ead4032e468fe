"""What an engine process is told at its start, and the words it exchanges with its node agent.

Plain data: importable without torch, so that the coordinator and the node agent can use it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from eadt.config import TrainingConfig
from eadt.control.batch import BatchPlan


@dataclass(frozen=True)
class ComputeShare:
    """An engine's share of its device, and how it is made real.

    Attributes:
        percentage: The share that was asked for: of a GPU's SMs, or of the node's training cores.
        cores: CPU cores that the engine may run on; empty leaves affinity alone.
        num_threads: Threads for compute; 0 leaves torch's default.
        duty_fraction: Part of the time that the engine computes; below 1 it pauses between
            micro-batches, where the share is not a whole number of cores.
    """

    percentage: int = 100
    cores: tuple[int, ...] = ()
    num_threads: int = 0
    duty_fraction: float = 1.0


@dataclass(frozen=True)
class TrainingJob:
    """What is trained; the same for all generations and ranks of a run.

    Attributes:
        training: The configuration's ``training`` section.
        deepspeed: DeepSpeed's own keys, passed through.
        seed: The run's seed.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        max_steps: Optimizer steps at which the run is complete.
        data_path: Folder of the prepared data set on this node; empty for a user's train function.
        final_model_path: Where the first rank writes the Hugging Face folder; empty for nowhere.
        snapshot_every_steps: Cadence of in-memory snapshots; ``None`` for none.
    """

    training: TrainingConfig
    deepspeed: dict[str, Any]
    seed: int
    precision: str
    max_steps: int
    data_path: str = ""
    final_model_path: str = ""
    snapshot_every_steps: int | None = None


@dataclass(frozen=True)
class EngineSpec:
    """One engine: one rank of one generation.

    Attributes:
        engine_id: Unique in the run.
        generation: Number of the generation.
        setting: Number of the setting that it trains at.
        rank: Rank in it; the batch plan gives the world size.
        node_id: The Ray node that it runs on.
        node_ip: Address at which rank 0's store is reached.
        job: What is trained.
        batch: The split of the global batch.
        share: Share of the device.
        device: ``cpu`` or ``cuda``.
        backend: ``gloo`` or ``nccl``.
        env: Environment taken over from the host: visible devices, MPS.
        slot_paths: This node's state slots, by slot number.
        resume: Whether a saved state will be loaded (so initial weights do not matter).
        primary_on_node: Whether this engine reports the node's step times.
    """

    engine_id: str
    generation: int
    rank: int
    node_id: str
    node_ip: str
    job: TrainingJob
    batch: BatchPlan
    share: ComputeShare
    device: str = "cpu"
    backend: str = "gloo"
    env: dict[str, str] = field(default_factory=dict)
    slot_paths: tuple[str, ...] = ()
    resume: bool = False
    primary_on_node: bool = True
    setting: int = 0

    @property
    def world_size(self) -> int:
        """Ranks in the generation."""
        return self.batch.num_workers


class Action(IntEnum):
    """What all ranks do at the end of a step; rank 0 decides, all learn of it in that step."""

    GO_ON = 0
    SAVE = 1
    SAVE_AND_STOP = 2
