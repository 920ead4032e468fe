"""The sections ``training`` and ``deepspeed``: what is trained, on what, and how.

Owns their keys, defaults and checks that need no machine.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from eadt.config.aliases import ALIASES
from eadt.config.base import Conflict, PathText, Section, Switch, conflict, join_key

Precision = Literal["fp32", "bf16", "fp16"]

PYTHON_STDLIB = "python-stdlib"
"""Value of ``training.dataset_path`` that means the sources of Python's standard library."""

BYTE_TOKENIZER = "byte"
"""Value of ``training.tokenizer_name_or_path`` that means EADT's byte tokenizer."""

MOVABLE_OPTIMIZERS = ("AdamW", "Adam", "Lion", "SGD")
"""Values of ``deepspeed.optimizer.type`` whose state EADT carries over to another number of workers."""

POSITION_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
"""What transformers' architectures call the most tokens that a sequence may have."""


class TrainingConfig(Section):
    """The model, the data, the optimizer and the length of the training."""

    section: ClassVar[str] = "training"

    model_name_or_path: PathText | None = Field(
        None, description="Hugging Face causal language model: a hub name or a local folder."
    )
    model_init: Literal["pretrained", "random"] = Field(
        "pretrained",
        description="`pretrained` loads weights; `random` takes only the model's configuration and starts "
        "from the seed (always so without `model_name_or_path`).",
    )
    model_config_overrides: dict[str, Any] = Field(
        default_factory=dict,
        alias="model_config",
        description="Values of the transformers configuration to change. With `model_type` and no "
        "`model_name_or_path` the model is built from them alone.",
    )
    tokenizer_name_or_path: PathText | None = Field(
        None,
        description="Hub name or local folder of the tokenizer; `byte` is EADT's byte tokenizer. "
        "Default: the model's.",
    )
    dataset_name: str | None = Field(
        None, min_length=1, description="Name of a data set on the Hugging Face hub."
    )
    dataset_config_name: str | None = Field(
        None,
        min_length=1,
        description="Configuration (subset) of that data set. `wikitext` without one means "
        "`wikitext-2-raw-v1`.",
    )
    dataset_path: PathText | None = Field(
        None,
        description="Local file or folder of text, `.jsonl` or `.parquet`; `python-stdlib` is the sources "
        "of Python's standard library.",
    )
    dataset_file_pattern: str | None = Field(
        None, min_length=1, description="Which files of a folder to take, such as `**/*.txt`."
    )
    text_column: str = Field("text", min_length=1, description="Column (or JSON key) that holds the text.")
    validation_fraction: float = Field(
        0.02, ge=0, lt=1, description="Fraction of the sequences held back for validation; 0 for none."
    )
    sequence_length: int = Field(1024, ge=2, description="Tokens per training sequence.")
    per_device_train_batch_size: int = Field(
        4, ge=1, description="Sequences per worker and micro batch: the largest a worker is ever given."
    )
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Micro batches per optimizer step at the initial number of workers."
    )
    train_batch_size: int | None = Field(
        None,
        ge=1,
        description="Sequences per optimizer step of the whole job; never changes. Default: per-device batch "
        "× accumulation × initial number of workers.",
    )
    max_steps: int | None = Field(
        None, ge=1, description="Optimizer steps to train; wins over `num_train_epochs`."
    )
    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the training data.")
    learning_rate: float = Field(5e-5, ge=0, description="Peak learning rate.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's decay of the first moment.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="Adam's decay of the second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Course of the learning rate after warm-up, in optimizer steps."
    )
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps of linear warm-up.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping by global norm; 0 turns it off.")
    precision: Precision | None = Field(
        None, description="Number format. Default: `bf16` on a GPU that has it, else `fp32`."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps between validations. Default: only at the start and the end.",
    )
    eval_batches: int = Field(8, ge=1, description="Global batches per validation.")
    train_function: str | None = Field(
        None,
        description="Your own training code, as `module:function`, in place of the built-in loop.",
    )
    train_function_args: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments for `train_function`."
    )
    energy_monitoring_interval: float = Field(
        60.0, gt=0, description="Seconds between two observations of energy and throughput."
    )
    energy_efficiency_threshold: float = Field(
        0.75,
        ge=0,
        le=1,
        description="Fraction of the best efficiency (samples/s per W) seen in this run; only under it is a "
        "change worth trying.",
    )
    adaptive_precision: Switch = Field(
        False, description="Change the precision while training. Accepted, not active yet."
    )
    dynamic_layer_freezing: Switch = Field(
        False, description="Freeze layers while training. Accepted, not active yet."
    )

    @model_validator(mode="after")
    def _settle_defaults(self) -> Self:
        if self.model_name_or_path is None and "model_init" not in self.model_fields_set:
            self._settle(model_init="random")
        return self

    def conflicts(self) -> Iterator[Conflict]:
        """See :meth:`Section.conflicts`."""
        yield from self._model_conflicts()
        yield from self._data_conflicts()
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            yield conflict(
                f"{self.warmup_steps} steps of warm-up do not fit into {self.max_steps} steps: lower "
                "warmup_steps or raise max_steps",
                "training.warmup_steps",
                "training.max_steps",
            )
        if self.train_function is None and self.train_function_args:
            yield conflict(
                "has no meaning without train_function: set train_function or remove it",
                "training.train_function_args",
                "training.train_function",
            )
        if self.train_function is not None:
            module, _, function = self.train_function.partition(":")
            if not (all(part.isidentifier() for part in module.split(".")) and function.isidentifier()):
                yield conflict(
                    f"must be module:function, such as my_project.train:main, not {self.train_function!r}",
                    "training.train_function",
                )

    def _model_conflicts(self) -> Iterator[Conflict]:
        model_type = self.model_config_overrides.get("model_type")
        model_keys = ("training.model_name_or_path", "training.model_config", "training.train_function")
        if self.model_name_or_path is None and self.train_function is None:
            if model_type is None:
                yield conflict(
                    "no model: set model_name_or_path (a hub name or a folder), or model_config with a "
                    "model_type, or train_function",
                    *model_keys,
                )
            elif self.tokenizer_name_or_path is None:
                yield conflict(
                    "a model without model_name_or_path brings no tokenizer: set tokenizer_name_or_path (a "
                    "hub name, a folder, or byte)",
                    "training.tokenizer_name_or_path",
                    *model_keys,
                )
            wants_weights = self.model_init == "pretrained" and "model_init" in self.model_fields_set
            if model_type is not None and wants_weights:
                yield conflict(
                    "pretrained weights need model_name_or_path: set it, or model_init: random",
                    "training.model_init",
                    *model_keys,
                )
        if self.model_name_or_path is not None and model_type is not None:
            yield conflict(
                "model_type contradicts model_name_or_path, which has a type of its own: remove one of them",
                "training.model_config.model_type",
                "training.model_name_or_path",
            )
        if model_type is not None and not isinstance(model_type, str):
            yield conflict(
                "must be text, such as gpt_neox or llama",
                "training.model_config.model_type",
            )

    def _data_conflicts(self) -> Iterator[Conflict]:
        keys = ("training.dataset_path", "training.dataset_name", "training.train_function")
        if self.dataset_path is None and self.dataset_name is None and self.train_function is None:
            yield conflict(
                "no data: set dataset_name (a data set on the hub) or dataset_path (a local file or folder, "
                f"or {PYTHON_STDLIB})",
                *keys,
            )
        if self.dataset_path is not None and self.dataset_name is not None:
            yield conflict("two data sets: remove dataset_path or dataset_name", *keys)
        if self.dataset_config_name is not None and self.dataset_name is None:
            yield conflict(
                "belongs to dataset_name, which is not set: set dataset_name or remove it",
                "training.dataset_config_name",
                "training.dataset_name",
            )
        if self.dataset_file_pattern is not None and self.dataset_path is None:
            yield conflict(
                "belongs to dataset_path, which is not set: set dataset_path or remove it",
                "training.dataset_file_pattern",
                "training.dataset_path",
            )
        if self.eval_steps is not None and self.validation_fraction == 0:
            yield conflict(
                "validation needs data: set validation_fraction above 0 or remove eval_steps",
                "training.eval_steps",
                "training.validation_fraction",
            )


class AdaptiveTrainingConfig(Section):
    """Thresholds of the precision and freezing levers."""

    section: ClassVar[str] = "deepspeed.adaptive_training"

    enabled: bool = Field(
        False, description="Adapt precision and freezing to power. Accepted, not active yet."
    )
    energy_threshold_high: float = Field(
        250.0, gt=0, description="Mean W per GPU above which these levers save energy."
    )
    energy_threshold_low: float = Field(
        150.0, ge=0, description="Mean W per GPU below which these levers are released."
    )

    def conflicts(self) -> Iterator[Conflict]:
        """See :meth:`Section.conflicts`."""
        if self.energy_threshold_low >= self.energy_threshold_high:
            yield conflict(
                f"must be below energy_threshold_high ({self.energy_threshold_high:g} W): lower "
                "energy_threshold_low or raise energy_threshold_high",
                "deepspeed.adaptive_training.energy_threshold_low",
                "deepspeed.adaptive_training.energy_threshold_high",
            )


_SET_ELSEWHERE = {
    "train_batch_size": "training.train_batch_size",
    "train_micro_batch_size_per_gpu": "training.per_device_train_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
}
_COMMON_KEYS = (
    "activation_checkpointing",
    "aio",
    "amp",
    "bf16",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "compile",
    "compression_training",
    "csv_monitor",
    "curriculum_learning",
    "data_efficiency",
    "data_types",
    "disable_allgather",
    "dump_state",
    "elasticity",
    "eigenvalue",
    "flops_profiler",
    "fp16",
    "gradient_clipping",
    "gradient_predivide_factor",
    "hybrid_engine",
    "memory_breakdown",
    "optimizer",
    "prescale_gradients",
    "scheduler",
    "seq_parallel_communication_data_type",
    "sparse_attention",
    "sparse_gradients",
    "steps_per_print",
    "tensorboard",
    "torch_autocast",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
    "adaptive_training",
)


class DeepSpeedConfig(Section):
    """DeepSpeed's own configuration, passed through, but for the keys that EADT sets itself."""

    model_config = ConfigDict(extra="allow")
    section: ClassVar[str] = "deepspeed"

    zero_optimization: dict[str, Any] = Field(
        default_factory=lambda: {"stage": 1},
        description="ZeRO: `stage` 0 to 3 (default 1) and any other DeepSpeed key of this section.",
    )
    adaptive_training: AdaptiveTrainingConfig = Field(
        default_factory=AdaptiveTrainingConfig,
        description="Thresholds of the precision and freezing levers.",
    )
    gradient_clipping: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Same as `training.max_grad_norm`."
    )
    bf16: dict[str, Any] | None = Field(None, description="Same as `training.precision: bf16` when enabled.")
    fp16: dict[str, Any] | None = Field(
        None, description="Same as `training.precision: fp16` when enabled; may hold loss-scale settings."
    )
    optimizer: dict[str, Any] | None = Field(
        None,
        description="DeepSpeed optimizer (`type`, `params`) in place of AdamW: "
        + ", ".join(f"`{name}`" for name in MOVABLE_OPTIMIZERS)
        + ". Numbers that `params` leaves out are those of `training`.",
    )
    scheduler: dict[str, Any] | None = Field(
        None, description="DeepSpeed scheduler in place of `training.lr_scheduler_type`."
    )

    @model_validator(mode="after")
    def _settle_stage(self) -> Self:
        self._settle(zero_optimization={"stage": 1, **self.zero_optimization})
        return self

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.zero_optimization.get("stage", 1))

    @property
    def precision(self) -> Precision | None:
        """The number format that the sections ``bf16`` and ``fp16`` ask for; ``None`` if neither does."""
        for name in ("bf16", "fp16"):
            if (getattr(self, name) or {}).get("enabled") is True:
                return "bf16" if name == "bf16" else "fp16"
        return None

    def passthrough(self) -> dict[str, Any]:
        """What is handed to ``deepspeed.initialize``, before EADT adds its own keys. A fresh copy."""
        return self.model_dump(exclude={"adaptive_training"}, exclude_none=True)

    def conflicts(self) -> Iterator[Conflict]:
        """See :meth:`Section.conflicts`."""
        stage = self.zero_optimization.get("stage", 1)
        if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage <= 3:
            yield conflict(f"must be 0, 1, 2 or 3, not {stage!r}", "deepspeed.zero_optimization.stage")
        for key in self.model_extra or {}:
            if key in _SET_ELSEWHERE:
                yield conflict(
                    f"EADT sets this itself: set {_SET_ELSEWHERE[key]} instead", f"deepspeed.{key}"
                )
            elif key not in _COMMON_KEYS:
                near = difflib.get_close_matches(key, _COMMON_KEYS, n=2, cutoff=0.85) or ALIASES.get(key, ())
                if near:
                    yield conflict(
                        f"unknown key, which DeepSpeed would ignore; did you mean {' or '.join(near)}?",
                        f"deepspeed.{key}",
                    )
        for name in ("bf16", "fp16"):
            enabled = (getattr(self, name) or {}).get("enabled", False)
            if not isinstance(enabled, bool) and enabled != "auto":
                yield conflict(f"must be true or false, not {enabled!r}", f"deepspeed.{name}.enabled")
        yield from self._optimizer_conflicts()
        if (self.bf16 or {}).get("enabled") is True and (self.fp16 or {}).get("enabled") is True:
            yield conflict(
                "bf16 and fp16 are both enabled: keep one", "deepspeed.fp16.enabled", "deepspeed.bf16.enabled"
            )
        for loc in _auto_values({**self.__dict__, **(self.model_extra or {})}, ()):
            if loc[0] not in _SET_ELSEWHERE and loc[0] != "autotuning":
                yield conflict(
                    "'auto' is filled in by the Hugging Face Trainer only: give a value, or remove the key "
                    "to let EADT or DeepSpeed choose",
                    join_key(("deepspeed", *loc)),
                )

    def _optimizer_conflicts(self) -> Iterator[Conflict]:
        section = self.optimizer or {}
        name, params = section.get("type", MOVABLE_OPTIMIZERS[0]), section.get("params", {})
        movable = ", ".join(MOVABLE_OPTIMIZERS[:-1]) + f" or {MOVABLE_OPTIMIZERS[-1]}"
        known = {"auto", *(name.lower() for name in MOVABLE_OPTIMIZERS)}  # auto is refused as such
        if not isinstance(name, str) or name.lower() not in known:
            yield conflict(
                f"EADT cannot carry the state of {name!r} over to another number of workers: use {movable}",
                "deepspeed.optimizer.type",
            )
        if not isinstance(params, dict):
            if params != "auto":
                yield conflict("must be a mapping of keys to values", "deepspeed.optimizer.params")
        elif params.get("amsgrad") is True:
            yield conflict(
                "EADT cannot carry the largest second moments that amsgrad keeps over to another number of "
                "workers: remove it",
                "deepspeed.optimizer.params.amsgrad",
            )


def _auto_values(value: Any, loc: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    """Places where a DeepSpeed file written for the Hugging Face Trainer says ``auto``."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _auto_values(item, (*loc, str(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _auto_values(item, (*loc, index))
    elif value == "auto":
        yield loc
