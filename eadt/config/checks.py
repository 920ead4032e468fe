"""Checks beyond the file itself that can be made before Ray is started.

Looks at local paths only: no network, no cluster, nothing written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eadt.config.base import is_on
from eadt.config.loading import PATH_CODE, ConfigProblem, InvalidConfigError, problem_at
from eadt.config.root import RunConfig
from eadt.config.training import BYTE_TOKENIZER, POSITION_NAMES, PYTHON_STDLIB

_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_WEIGHTS = ("*.safetensors", "*.bin")


def check_paths(config: RunConfig) -> list[ConfigProblem]:
    """What is wrong with the local paths of a configuration; empty if nothing is.

    Names on the hub and remote storage are not looked at; nor are ``elastic.shared_memory_dir`` and
    ``elastic.spill_dir``, which belong to the nodes.
    """
    return [problem_at(config, key, message) for key, message in _path_problems(config)]


def require_paths(config: RunConfig) -> None:
    """Raise :class:`InvalidConfigError` (EADT-204) if :func:`check_paths` finds anything."""
    problems = check_paths(config)
    if problems:
        raise InvalidConfigError(problems, code=PATH_CODE)


def require_precision(config: RunConfig, *, is_gpu: bool) -> None:
    """Refuse a number format that the devices do not compute in.

    Args:
        config: The run.
        is_gpu: Whether it will train on GPUs.

    Raises:
        InvalidConfigError: EADT-201, ``fp16`` without a GPU.
    """
    if config.training.precision == "fp16" and not is_gpu:
        message = "fp16 is for GPUs, and this run has none: set training.precision: bf16 or fp32"
        raise InvalidConfigError([problem_at(config, "training.precision", message)])


def inactive_settings(config: RunConfig) -> list[str]:
    """Sentences on settings that are accepted but do nothing in this version or combination."""
    text = "{key} is accepted but not active yet: {why}."
    found = []
    levers = (
        (
            "training.adaptive_precision",
            is_on(config.training.adaptive_precision),
            "the precision stays as it is at the start",
        ),
        (
            "training.dynamic_layer_freezing",
            is_on(config.training.dynamic_layer_freezing),
            "all layers are trained",
        ),
        (
            "deepspeed.adaptive_training.enabled",
            config.deepspeed.adaptive_training.enabled,
            "its two thresholds belong to the precision and freezing levers, which are not built",
        ),
    )
    found += [text.format(key=key, why=why) for key, on, why in levers if on]
    if not config.mps.enabled:
        for key in ("initial_thread_percentage", "shared_resources", "preset"):
            if getattr(config.mps, key) is not None:
                found.append(f"mps.{key} has no effect: mps.enabled is false.")
    return found


def _path_problems(config: RunConfig) -> Iterator[tuple[str, str]]:
    training = config.training
    if training.dataset_path not in (None, PYTHON_STDLIB) and "://" not in str(training.dataset_path):
        message = _data_problem(Path(str(training.dataset_path)), training.dataset_file_pattern)
        if message:
            yield "training.dataset_path", message
    if training.model_name_or_path is not None:
        message = _model_problem(training.model_name_or_path, weights=training.model_init == "pretrained")
        if message:
            yield "training.model_name_or_path", message
        positions = _positions(Path(training.model_name_or_path), training.model_config_overrides)
        own_code = training.train_function is not None
        if positions is not None and training.sequence_length > positions and not own_code:
            yield (
                "training.sequence_length",
                f"{training.sequence_length} tokens are more than the {positions} positions of the model "
                f"{training.model_name_or_path}: lower it",
            )
    tokenizer = training.tokenizer_name_or_path
    if tokenizer not in (None, BYTE_TOKENIZER) and _missing_folder(str(tokenizer)):
        yield (
            "training.tokenizer_name_or_path",
            f"there is no folder {tokenizer}, and it is no name on the hub",
        )
    message = _unwritable(config.run_folder)
    if message:
        yield "run.folder", message
    path = config.storage.path
    if path is not None:
        local = path.removeprefix("file://")
        message = _unwritable(Path(local)) if "://" not in local else None
        if message:
            yield "storage.path", message


def _data_problem(path: Path, pattern: str | None) -> str | None:
    if not path.exists():
        return f"there is no file or folder {path} (searched from {Path.cwd()})"
    if not os.access(path, os.R_OK):
        return f"{path} cannot be read: check its permissions"
    if path.is_file():
        return f"{path} is empty" if path.stat().st_size == 0 else None
    files = path.glob(pattern) if pattern else path.rglob("*")
    visible = (f for f in files if f.is_file() and not f.name.startswith("."))
    sizes = list(_first_nonempty(visible))
    if not sizes:
        which = f"matches {pattern!r}" if pattern else "is in it"
        return f"the folder {path} holds no data: no file {which}"
    return None if sizes[-1] > 0 else f"all files of the folder {path} are empty"


def _first_nonempty(files: Iterator[Path]) -> Iterator[int]:
    """Sizes of files in bytes, up to the first that is not empty."""
    for file in files:
        size = file.stat().st_size
        yield size
        if size > 0:
            return


def _missing_folder(name: str) -> bool:
    """Whether ``name`` can only be meant as a local folder, and is none.

    ``models/tiny`` has the form of a name on the hub; it is taken for a path if ``models`` is here.
    """
    if Path(name).exists():
        return False
    return not _HUB_NAME.match(name) or name.startswith(".") or ("/" in name and Path(name).parent.is_dir())


def _model_problem(name: str, *, weights: bool) -> str | None:
    if _missing_folder(name):
        return f"there is no folder {name}, and it is no name on the hub"
    path = Path(name)
    if path.is_file():
        return f"{name} is a file: name the folder that holds config.json"
    if path.is_dir():
        if not (path / "config.json").is_file():
            return f"the folder {name} holds no config.json, so it is no Hugging Face model"
        if weights and not any(file for pattern in _WEIGHTS for file in path.glob(pattern)):
            return f"the folder {name} holds no weights: add them, or set training.model_init: random"
    return None


def _positions(folder: Path, changes: Mapping[str, Any]) -> int | None:
    """Most tokens of a sequence, as a model's folder says it; ``None`` where it says nothing."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # there is none, or another check names what is wrong with it
    if not isinstance(values, dict) or any(name in changes for name in POSITION_NAMES):
        return None  # its own values were changed, which is checked with the file
    found = next((values[name] for name in POSITION_NAMES if name in values), None)
    return found if isinstance(found, int) and found > 0 else None


def _unwritable(path: Path) -> str | None:
    """Why nothing could be written under ``path``, without writing."""
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is a file, so no folder {path} can be made"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} cannot be written: check its permissions, or choose another folder"
    return None
