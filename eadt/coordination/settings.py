"""What the coordinator needs to know of a run; plain data, sent to its actor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eadt.control.setpoint import Setpoint
from eadt.training.checkpoint import SampleOrder
from eadt.training.engine_spec import TrainingJob


@dataclass(frozen=True)
class RunSettings:
    """Facts and limits of a run.

    Attributes:
        run_id: Unique id of the run, kept through resumes.
        name: The run's name.
        job: What is trained; ``data_path`` is filled in for each node.
        setpoint: The first setpoint.
        train_batch_size: Samples per optimizer step, whole job; constant.
        sample_order: What decides which samples the steps take; goes into each checkpoint.
        max_micro_batch: Most samples of one forward pass.
        min_workers: Fewest active workers.
        max_workers: Most active workers.
        mode: ``in_place``, ``group``, ``restart`` or ``auto``.
        prepare_ahead: ``auto``, ``always`` or ``never``.
        num_slots: State slots a node.
        checkpoint_every_steps: Cadence of durable checkpoints; ``None`` for none but at the end.
        keep_checkpoints: Checkpoints kept.
        storage_path: Where checkpoints go, below the run's id; the newest valid one there is gone on from.
        save_final_model: Whether the trained model is exported.
        max_engine_failures: Failures in a row, without a step between them, that end the run.
        device: ``cpu`` or ``cuda``.
        use_mps: Whether shares are enforced through CUDA MPS.
        mps_pipe_directory: MPS control daemon's pipe folder; ``None`` for its default.
        run_key: Secret by which engines may read each other's nodes' state, hexadecimal.
        run_row: Values for the ledger's ``run`` row: configuration, versions.
    """

    run_id: str
    name: str
    job: TrainingJob
    setpoint: Setpoint
    train_batch_size: int
    sample_order: SampleOrder
    max_micro_batch: int
    min_workers: int
    max_workers: int
    mode: str
    prepare_ahead: str
    num_slots: int
    checkpoint_every_steps: int | None
    keep_checkpoints: int
    storage_path: str
    save_final_model: bool
    max_engine_failures: int
    device: str
    use_mps: bool
    mps_pipe_directory: str | None
    run_key: str
    run_row: dict[str, Any]
