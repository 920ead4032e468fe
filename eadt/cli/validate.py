"""``eadt validate`` and ``eadt schema``: what can be known of a configuration before anything is started.

Two stages: the file, the local paths and the batch are looked at with light libraries only; the model is
built, without weights, where the file changes values of it, since loading the libraries takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from eadt.cli.options import ConfigArgument, FormatOption, SetOption
from eadt.cli.output import Output, OutputFormat
from eadt.cli.overrides import load_with_overrides
from eadt.config import (
    PYTHON_STDLIB,
    InvalidConfigError,
    RunConfig,
    inactive_settings,
    json_schema,
    problem_at,
    require_paths,
)
from eadt.config.training import BYTE_TOKENIZER
from eadt.control.batch_check import batch_notes, check_batch
from eadt.errors import ConfigError, EadtError, EnvironmentFailure


def require_valid(config: RunConfig) -> None:
    """Raise :class:`InvalidConfigError` for what a look at the local paths and the batch shows wrong."""
    require_paths(config)
    problems = check_batch(config)
    if problems:
        raise InvalidConfigError(problems)


def validate(
    file: ConfigArgument,
    set_: SetOption = None,
    output: FormatOption = OutputFormat.TEXT,
    deep: Annotated[
        bool | None,
        typer.Option(
            "--deep/--light",
            help="Build the model too, without its weights: finds values that make none. Loads torch and "
            "transformers, some seconds; no memory, no network. Default: where model_config gives any.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check a configuration without starting anything: no Ray, no network, nothing is written.

    Every problem is listed at once, with file, line, key and the nearest valid keys.

    - `eadt validate configs/training_config.yaml`

    - `eadt validate my.yaml --set elastic.max_workers=8`

    - Without the model, in half a second:  `eadt validate my.yaml --light`
    """
    with Output(output) as out:
        config = load_with_overrides(file, set_ or [])
        require_valid(config)
        inactive, notes = inactive_settings(config), [*batch_notes(config), *_precision_notes(config)]
        num_parameters = None
        if deep or (deep is None and _is_changed_model(config)):
            num_parameters, model_notes = build_without_weights(config)
            notes += model_notes
        elif _is_changed_model(config):
            notes.append("The model was not built; --deep does it and finds values that make none.")
        if out.is_json:
            out.document(
                {
                    "valid": True,
                    "file": str(file),
                    "inactive": inactive,
                    "notes": notes,
                    "num_parameters": num_parameters,
                    "config": config.model_dump(mode="json", by_alias=True),
                }
            )
            return
        out.text(f"{file} is valid.", style="green")
        for head, text in _plan(config, num_parameters):
            out.text(f"  {head + ':':<12} {text}")
        for text in (*inactive, *notes):
            out.text(f"  note: {text}", style="yellow")


def build_without_weights(config: RunConfig) -> tuple[int | None, list[str]]:
    """Build the model of a run, without weights and without network.

    Returns:
        The number of its parameters, ``None`` where it could not be built here or the user's own code
        does it; and why it could not.

    Raises:
        InvalidConfigError: No model can be built from the configuration on any machine.
    """
    try:
        from eadt.training.hub import hub_offline
        from eadt.training.models import check_model
    except ImportError as error:
        return None, [f"The model was not built: {error}."]
    training = config.training
    tokenizer = training.tokenizer_name_or_path
    names = (training.model_name_or_path, None if tokenizer == BYTE_TOKENIZER else tokenizer)
    on_hub = any(name is not None and not Path(name).exists() for name in names)
    try:
        with hub_offline() if on_hub else contextlib.nullcontext():
            return check_model(training), []
    except EnvironmentFailure:
        return None, [
            "The model was not built: it or its tokenizer is not in this machine's Hugging Face cache, "
            "and nothing is fetched here."
        ]
    except ConfigError as error:
        key = "training.model_config" if training.model_config_overrides else "training.model_name_or_path"
        message = error.what.rstrip(".")
        if error.fix and not error.fix.startswith("correct"):  # which goes without saying
            message += f": {error.fix.rstrip('.')}"
        raise InvalidConfigError([problem_at(config, key, message)], code=error.code) from error


def schema() -> None:
    """Print the JSON schema of a configuration, for editors that complete and check YAML.

    - `eadt schema > eadt.schema.json`, then as the first line of a configuration:
      `# yaml-language-server: $schema=eadt.schema.json`
    """
    typer.echo(json.dumps(json_schema(), indent=2))


def _is_changed_model(config: RunConfig) -> bool:
    """Whether values of the file decide if there can be such a model."""
    return config.training.train_function is None and bool(config.training.model_config_overrides)


def _precision_notes(config: RunConfig) -> list[str]:
    """That ``fp16`` wants a GPU, where only the cluster knows whether it has one."""
    if config.training.precision != "fp16" or config.resources.use_gpu is not None or _sees_gpu():
        return []
    return [
        "training.precision: fp16 is for GPUs, and this machine shows none: where the cluster has none "
        "either, use bf16 or fp32."
    ]


def _sees_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that a run here may use."""
    from eadt.adapters.nvml import Nvml

    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    nvml = Nvml()
    try:
        nvml.open()
    except EadtError:
        return False
    try:
        return nvml.num_gpus() > 0
    except EadtError:
        return False
    finally:
        nvml.close()


def _plan(config: RunConfig, num_parameters: int | None) -> list[tuple[str, str]]:
    """What the configuration means, in words."""
    training, elastic = config.training, config.elastic
    model = (
        training.model_name_or_path
        or training.model_config_overrides.get("model_type")
        or "a model of your own"
    )
    start = (
        "random weights"
        if training.model_init == "random" or not training.model_name_or_path
        else "its weights"
    )
    if training.train_function:
        model, start = training.train_function, "your own code"
    if num_parameters is not None:
        start = f"{num_parameters:,} parameters, {start}"
    length = f"{training.max_steps} steps" if training.max_steps else f"{training.num_train_epochs:g} epochs"
    return [
        ("run", f"{config.run.name}, in {config.run_folder}"),
        ("model", f"{model} ({start}), ZeRO stage {_zero_stage(config)}"),
        ("data", f"{_data(config)}, sequences of {training.sequence_length} tokens"),
        ("length", f"{length}, {_batch(config)}"),
        (
            "workers",
            f"{elastic.num_workers or 'devices × ' + str(config.mps.workers_per_gpu)} at the start with "
            f"{config.mps.thread_percentage} % of their device each, {elastic.min_workers} to "
            f"{elastic.max_workers or 'as many as the devices hold'}",
        ),
        ("decisions", _decisions(config)),
        ("power", f"source {config.power.source}, a reading every {config.power.sampling_interval:g} s"),
    ]


def _zero_stage(config: RunConfig) -> Any:
    return config.deepspeed.zero_optimization.get("stage", 1)


def _data(config: RunConfig) -> str:
    training = config.training
    if training.dataset_path == PYTHON_STDLIB:
        return "the Python standard library's sources"
    return training.dataset_path or training.dataset_name or "from your own code"


def _batch(config: RunConfig) -> str:
    training, initial = config.training, config.elastic.num_workers
    if training.train_batch_size is not None or initial is not None:
        return f"{config.train_batch_size(initial or 1)} sequences a step"
    each = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return f"{each} sequences a step for each worker at the start"


def _decisions(config: RunConfig) -> str:
    if not config.supervisor.enabled:
        return "none: the supervisor is off"
    return f"{config.policy.type} policy, every {config.supervisor.decision_interval:g} s"
