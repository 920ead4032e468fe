"""Builds the DeepSpeed engine of a generation: its configuration, optimizer and schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from eadt.training.engine_spec import EngineSpec

OptimizerFactory = Callable[[torch.nn.Module], torch.optim.Optimizer]


def deepspeed_config(spec: EngineSpec) -> dict[str, Any]:
    """DeepSpeed's configuration for this generation: the user's keys and what EADT sets."""
    training, job = spec.job.training, spec.job
    config: dict[str, Any] = {
        "train_batch_size": spec.batch.train_batch_size,
        "train_micro_batch_size_per_gpu": spec.batch.micro_batch,
        "gradient_accumulation_steps": spec.batch.accumulation,
        "gradient_clipping": training.max_grad_norm,
        "steps_per_print": 1 << 30,
        # EADT says itself which optimizers it can move, and refuses the others.
        "zero_allow_untested_optimizer": True,
    }
    config.update(job.deepspeed)
    for precision in ("bf16", "fp16"):
        section = dict(job.deepspeed.get(precision) or {})
        section["enabled"] = job.precision == precision
        config[precision] = section
    optimizer = config.get("optimizer")
    if optimizer is not None and optimizer.get("type", "").lower() in ("adam", "adamw"):
        # DeepSpeed's own Adam kernels want a compiler on every machine.
        parameters = {"torch_adam": True, **optimizer.get("params", {})}
        config["optimizer"] = {**optimizer, "params": parameters}
    return config


def initialize_deepspeed(
    spec: EngineSpec,
    model: torch.nn.Module,
    optimizer_factory: OptimizerFactory | None,
    config: dict[str, Any],
    device: torch.device,
) -> Any:
    """``deepspeed.initialize`` on the process group that exists; collective over all ranks."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # Else the first engine on a machine compiles it for a minute; gloo does as well here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend=spec.backend, dist_init_required=False, verbose=False, auto_mpi_discovery=False
    )
    optimizer: torch.optim.Optimizer | None = None
    if "optimizer" not in config:
        optimizer = (optimizer_factory or default_optimizer(spec))(model)
    scheduler: Any = None
    if "scheduler" not in config and optimizer is not None:
        scheduler = _schedule(spec, optimizer)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=None if optimizer is not None else list(_parameter_groups(spec, model)),
        lr_scheduler=scheduler,
        config=config,
        dist_init_required=False,
    )
    return engine


def default_optimizer(spec: EngineSpec) -> OptimizerFactory:
    """AdamW with the configuration's numbers."""
    training = spec.job.training

    def build(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            list(_parameter_groups(spec, model)),
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
        )

    return build


def _parameter_groups(spec: EngineSpec, model: torch.nn.Module) -> list[dict[str, Any]]:
    """Weight decay on matrices only, not on biases and norms."""
    trained = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {
            "params": [param for param in trained if _num_dims(param) >= 2],
            "weight_decay": spec.job.training.weight_decay,
        },
        {"params": [param for param in trained if _num_dims(param) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _num_dims(param: Any) -> int:
    return len(getattr(param, "ds_shape", param.shape))


def _schedule(spec: EngineSpec, optimizer: torch.optim.Optimizer) -> Any:
    from transformers import get_scheduler

    training = spec.job.training
    name: str = training.lr_scheduler_type
    if name == "constant" and training.warmup_steps:
        name = "constant_with_warmup"
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=training.warmup_steps,
        num_training_steps=spec.job.max_steps,
    )
