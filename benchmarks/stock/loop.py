"""A stock DeepSpeed training loop on Ray Train, that can be resized by Ray Train's own restart.

On a resize the state goes the one way that DeepSpeed 0.19 offers for another number of ranks: its
checkpoint, converted to a universal one (in this process: starting workers for it takes longer at
these sizes), reported to Ray Train, and loaded by the new worker group. Model, data, batch plan,
threads and cores are those of EADT's engines. Wherever there was a choice, it is the one that makes
stock faster: it is told when to save, just before the restart, so that no step is lost; DeepSpeed's
extension that would be compiled is left out; the data lies ready.

Nothing here is imported before the training function runs, as in any user's script.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any


def train(config: dict[str, Any]) -> None:
    """Ray Train's training function.

    Args:
        config: ``training`` (EADT's section, for model and batch), ``data_path``, ``vocab_size``,
            ``zero_stage``, ``step_log``, ``resizes`` (step to number of workers from then on) and
            ``max_steps`` (``None``: until killed).
    """
    entered_s = time.perf_counter()
    import ray.train

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    _take_cores(rank, world_size)
    import deepspeed  # noqa: F401
    import torch
    import torch.distributed as dist

    imported_s = time.perf_counter()
    checkpoint = ray.train.get_checkpoint()
    engine, batch, data = _build(config, world_size, is_resumed=checkpoint is not None)
    built_s = time.perf_counter()
    step = _load(engine, checkpoint) if checkpoint is not None else 0
    loaded_s = time.perf_counter()
    log = Path(config["step_log"]).open("a") if rank == 0 else None  # noqa: SIM115
    parts = {
        "import_s": imported_s - entered_s,
        "build_s": built_s - imported_s,
        "load_s": loaded_s - built_s,
    }
    if log is not None:
        _write(log, event="start", step=step, world_size=world_size, t=entered_s, parts=parts)
    while config["max_steps"] is None or step < config["max_steps"]:
        begun_s = time.perf_counter()
        first = step * batch.train_batch_size + rank * batch.micro_batch * batch.accumulation
        loss_sum = 0.0
        for number in range(batch.accumulation):
            start = first + number * batch.micro_batch
            rows = [(start + offset) % len(data.train) for offset in range(batch.micro_batch)]
            tokens_BT = torch.from_numpy(data.train.batch(_as_rows(rows)))
            loss = engine(input_ids=tokens_BT, labels=tokens_BT).loss
            engine.backward(loss)
            engine.step()
            loss_sum += float(loss.detach())
        step += 1
        ended_s = time.perf_counter()
        if log is not None:
            _write(log, event="step", step=step, world_size=world_size, t0=begun_s, t1=ended_s,
                   loss=loss_sum / batch.accumulation)  # fmt: skip
        if str(step) in config["resizes"]:
            folder = _save(engine, rank, config["scratch"], step)
            if log is not None:
                _write(log, event="saved", step=step, t=time.perf_counter())
            metrics = {"resize_to": config["resizes"][str(step)]}
            found = ray.train.Checkpoint.from_directory(folder) if rank == 0 else None
            ray.train.report(metrics, checkpoint=found)
            if log is not None:
                _write(log, event="reported", step=step, t=time.perf_counter())
            time.sleep(3600)  # Ray Train ends this worker group now
    dist.barrier()


def _build(config: dict[str, Any], world_size: int, *, is_resumed: bool) -> tuple[Any, Any, Any]:
    import deepspeed
    import torch
    from deepspeed.utils import logger

    from eadt.config import TrainingConfig
    from eadt.control.batch import plan_batch
    from eadt.training.data import open_prepared
    from eadt.training.models import build_model

    logger.setLevel("WARNING")
    training = TrainingConfig.model_validate(config["training"])
    batch = plan_batch(training.train_batch_size or 0, world_size, training.per_device_train_batch_size)
    model = build_model(training, config["vocab_size"], seed=0, initialise=not is_resumed)
    # As in EADT's engines: weight decay on matrices only.
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
    )
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, auto_mpi_discovery=False)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        config={
            "train_batch_size": batch.train_batch_size,
            "train_micro_batch_size_per_gpu": batch.micro_batch,
            "gradient_accumulation_steps": batch.accumulation,
            "gradient_clipping": training.max_grad_norm,
            "zero_optimization": {"stage": config["zero_stage"]},
            "bf16": {"enabled": False},
            "fp16": {"enabled": False},
            "checkpoint": {"load_universal": is_resumed},
            "steps_per_print": 1 << 30,
        },
    )
    return engine, batch, open_prepared(config["data_path"])


def _save(engine: Any, rank: int, scratch: str, step: int) -> str:
    """DeepSpeed's checkpoint, made universal by the first rank. Returns the folder to report."""
    import torch.distributed as dist

    source = Path(scratch) / f"step-{step}"
    engine.save_checkpoint(str(source), tag="state")
    dist.barrier()
    target = tempfile.mkdtemp(dir=scratch)
    if rank == 0:
        from types import SimpleNamespace

        from deepspeed.checkpoint.ds_to_universal import main as to_universal

        to_universal(
            SimpleNamespace(
                input_folder=str(source / "state"),
                output_folder=str(Path(target) / "state"),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
        (Path(target) / "latest_universal").write_text("state")
        (Path(target) / "step").write_text(str(step))
    return target


def _load(engine: Any, checkpoint: Any) -> int:
    with checkpoint.as_directory() as folder:
        engine.load_checkpoint(folder, tag="state")
        return int((Path(folder) / "step").read_text())


def _take_cores(rank: int, world_size: int) -> None:
    """The threads and cores that EADT gives its engines: an even split of the first two cores."""
    import torch

    num_cores = min(2, len(os.sched_getaffinity(0)))
    num_threads = max(1, num_cores // world_size)
    cores = {(rank * num_threads + offset) % num_cores for offset in range(num_threads)}
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(num_threads)


def _as_rows(rows: list[int]) -> Any:
    import numpy as np

    return np.asarray(rows, dtype=np.int64)


def _write(log: Any, **values: Any) -> None:
    log.write(json.dumps(values) + "\n")
    log.flush()
