"""What other programs and the literature call a key of the configuration.

Only for the wording of errors: no alias is accepted, so that each setting has one name.
"""

from __future__ import annotations

_BATCH = ("training.train_batch_size", "training.per_device_train_batch_size")
_MICRO_BATCH = ("training.per_device_train_batch_size",)
_ACCUMULATION = ("training.gradient_accumulation_steps",)
_STEPS = ("training.max_steps",)
_EPOCHS = ("training.num_train_epochs",)
_LENGTH = ("training.sequence_length",)
_MODEL = ("training.model_name_or_path", "training.model_config")
_DATA = ("training.dataset_name", "training.dataset_path")
_LOCAL_DATA = ("training.dataset_path",)
_TOKENIZER = ("training.tokenizer_name_or_path",)
_RATE = ("training.learning_rate",)
_CLIP = ("training.max_grad_norm",)
_SCHEDULE = ("training.lr_scheduler_type",)
_WARMUP = ("training.warmup_steps",)
_PRECISION = ("training.precision",)
_WORKERS = ("elastic.num_workers",)
_GPUS = ("resources.use_gpu", "elastic.num_workers")
_PER_GPU = ("mps.shared_resources",)
_SHARE = ("mps.initial_thread_percentage",)
_CHECKPOINTS = ("checkpoint.every_steps",)
_FOLDER = ("run.folder", "storage.path")

ALIASES: dict[str, tuple[str, ...]] = {
    "accumulate_grad_batches": _ACCUMULATION,
    "accumulation_steps": _ACCUMULATION,
    "adam_eps": ("training.adam_epsilon",),
    "base_model": _MODEL,
    "batch": _BATCH,
    "batch_size": _BATCH,
    "betas": ("training.adam_beta1", "training.adam_beta2"),
    "bf16": _PRECISION,
    "block_size": _LENGTH,
    "checkpoint_dir": ("storage.path",),
    "checkpoint_every": _CHECKPOINTS,
    "clip_grad": _CLIP,
    "clip_grad_norm": _CLIP,
    "context_length": _LENGTH,
    "data": _DATA,
    "data_dir": _LOCAL_DATA,
    "data_path": _LOCAL_DATA,
    "dataset": _DATA,
    "dataset_config": ("training.dataset_config_name",),
    "device_batch_size": _MICRO_BATCH,
    "dtype": _PRECISION,
    "epochs": _EPOCHS,
    "eps": ("training.adam_epsilon",),
    "eval_every": ("training.eval_steps",),
    "eval_interval": ("training.eval_steps",),
    "fp16": _PRECISION,
    "global_batch_size": ("training.train_batch_size",),
    "gpus": _GPUS,
    "grad_accum": _ACCUMULATION,
    "grad_accum_steps": _ACCUMULATION,
    "grad_accumulation_steps": _ACCUMULATION,
    "grad_clip": _CLIP,
    "gradient_accumulation": _ACCUMULATION,
    "gradient_clip_val": _CLIP,
    "initial_lr": _RATE,
    "iterations": _STEPS,
    "log_dir": ("run.folder",),
    "lr": _RATE,
    "lr_schedule": _SCHEDULE,
    "lr_scheduler": _SCHEDULE,
    "max_epochs": _EPOCHS,
    "max_iters": _STEPS,
    "max_length": _LENGTH,
    "max_lr": _RATE,
    "max_seq_len": _LENGTH,
    "max_seq_length": _LENGTH,
    "max_train_steps": _STEPS,
    "micro_batch": _MICRO_BATCH,
    "micro_batch_size": _MICRO_BATCH,
    "mixed_precision": _PRECISION,
    "model": _MODEL,
    "model_id": _MODEL,
    "model_name": _MODEL,
    "model_path": _MODEL,
    "mps_percentage": _SHARE,
    "n_epochs": _EPOCHS,
    "name": ("run.name",),
    "nproc_per_node": _PER_GPU,
    "num_epochs": _EPOCHS,
    "num_gpus": _GPUS,
    "num_iterations": _STEPS,
    "num_iters": _STEPS,
    "num_processes": _WORKERS,
    "num_steps": _STEPS,
    "num_train_steps": _STEPS,
    "num_training_steps": _STEPS,
    "num_warmup_steps": _WARMUP,
    "optim": ("deepspeed.optimizer",),
    "optimizer": ("deepspeed.optimizer",),
    "out_dir": _FOLDER,
    "output_dir": _FOLDER,
    "output_path": _FOLDER,
    "per_device_batch_size": _MICRO_BATCH,
    "pretrained_model_name_or_path": _MODEL,
    "processes": _WORKERS,
    "random_seed": ("run.seed",),
    "ray_address": ("resources.address",),
    "replicas": _WORKERS,
    "resume_from_checkpoint": ("checkpoint.resume",),
    "run_name": ("run.name",),
    "save_every": _CHECKPOINTS,
    "save_interval": _CHECKPOINTS,
    "save_steps": _CHECKPOINTS,
    "save_total_limit": ("checkpoint.keep",),
    "scheduler": (*_SCHEDULE, "deepspeed.scheduler"),
    "seed": ("run.seed",),
    "seq_len": _LENGTH,
    "seq_length": _LENGTH,
    "share": _SHARE,
    "stage": ("deepspeed.zero_optimization.stage",),
    "step": _STEPS,
    "steps": _STEPS,
    "thread_percentage": _SHARE,
    "tokenizer": _TOKENIZER,
    "tokenizer_name": _TOKENIZER,
    "tokenizer_path": _TOKENIZER,
    "torch_dtype": _PRECISION,
    "total_steps": _STEPS,
    "train_data": _DATA,
    "train_file": _LOCAL_DATA,
    "train_steps": _STEPS,
    "training_steps": _STEPS,
    "val_fraction": ("training.validation_fraction",),
    "val_interval": ("training.eval_steps",),
    "warmup": _WARMUP,
    "wd": ("training.weight_decay",),
    "workers": _WORKERS,
    "workers_per_gpu": _PER_GPU,
    "world_size": _WORKERS,
    "zero_stage": ("deepspeed.zero_optimization.stage",),
}
"""Full keys that are meant, the likeliest first, by the name in lower case with underscores."""
