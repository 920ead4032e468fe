"""Builds the DeepSpeed engine of a generation: its configuration, optimizer and schedule."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from eadt.config.training import MOVABLE_OPTIMIZERS, TrainingConfig
from eadt.errors import ConfigError
from eadt.training.engine_spec import EngineSpec
from eadt.training.zero_state import moment_names

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
    if config.get("optimizer") is not None:
        config["optimizer"] = _named_optimizer(training, config["optimizer"])
    return config


def _named_optimizer(training: TrainingConfig, section: dict[str, Any]) -> dict[str, Any]:
    """The user's optimizer, with the numbers of ``training`` where the section gives none."""
    known = {name.lower(): name for name in MOVABLE_OPTIMIZERS}
    name = known.get(str(section.get("type", "AdamW")).lower(), section.get("type"))
    # Weight decay is given with the parameter groups.
    parameters: dict[str, Any] = {"lr": training.learning_rate}
    if name in ("Adam", "AdamW"):
        # DeepSpeed's own Adam kernels want a compiler on every machine.
        parameters |= {
            "betas": [training.adam_beta1, training.adam_beta2],
            "eps": training.adam_epsilon,
            "torch_adam": True,
        }
    return {**section, "type": name, "params": {**parameters, **section.get("params", {})}}


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
        require_movable(optimizer)
    scheduler: Any = None
    if "scheduler" not in config:
        # Of the optimizer that DeepSpeed makes, too.
        scheduler = partial(_schedule, spec) if optimizer is None else _schedule(spec, optimizer)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=None if optimizer is not None else list(_parameter_groups(spec, model)),
        lr_scheduler=scheduler,
        config=config,
        dist_init_required=False,
    )
    return engine


def require_movable(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose state EADT cannot carry over to another number of workers.

    Raises:
        ConfigError: EADT-240.
    """
    moment_names(optimizer)
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ConfigError(
            "an optimizer with amsgrad cannot be resized while training",
            code="EADT-240",
            fix="leave amsgrad out",
        )


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
