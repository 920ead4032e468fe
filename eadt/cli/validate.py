"""``eadt validate`` and ``eadt schema``: what can be known of a configuration before anything is started."""

from __future__ import annotations

import json
from typing import Any

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
    require_paths,
)
from eadt.control.batch_check import check_batch


def require_valid(config: RunConfig) -> None:
    """Raise :class:`InvalidConfigError` for what a look at the local paths and the batch shows wrong."""
    require_paths(config)
    problems = check_batch(config)
    if problems:
        raise InvalidConfigError(problems)


def validate(file: ConfigArgument, set_: SetOption = None, output: FormatOption = OutputFormat.TEXT) -> None:
    """Check a configuration without starting anything: no Ray, no network, nothing is written.

    Every problem is listed at once, with file, line, key and the nearest valid key.

    - `eadt validate configs/training_config.yaml`

    - `eadt validate my.yaml --set elastic.max_workers=8`
    """
    with Output(output) as out:
        config = load_with_overrides(file, set_ or [])
        require_valid(config)
        inactive = inactive_settings(config)
        if out.is_json:
            out.document(
                {
                    "valid": True,
                    "file": str(file),
                    "inactive": inactive,
                    "config": config.model_dump(mode="json", by_alias=True),
                }
            )
            return
        out.text(f"{file} is valid.", style="green")
        for head, text in _plan(config):
            out.text(f"  {head + ':':<12} {text}")
        for text in inactive:
            out.text(f"  note: {text}", style="yellow")


def schema() -> None:
    """Print the JSON schema of a configuration, for editors that complete and check YAML.

    - `eadt schema > eadt.schema.json`, then as the first line of a configuration:
      `# yaml-language-server: $schema=eadt.schema.json`
    """
    typer.echo(json.dumps(json_schema(), indent=2))


def _plan(config: RunConfig) -> list[tuple[str, str]]:
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
