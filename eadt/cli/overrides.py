"""``--set key=value``: changes to a configuration on the command line, checked like the file itself.

An error in such a value is located at its option; everything else keeps its file and line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from eadt.config import (
    ConfigProblem,
    InvalidConfigError,
    RunConfig,
    config_from_dict,
    load_config,
    problem_at,
)
from eadt.config.base import split_key

_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+")

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Override:
    """One ``--set``.

    Attributes:
        option: The option as the user typed it.
        location: Path of the key from the root.
        value: The value, read as YAML.
    """

    option: str
    location: Location
    value: Any


def parse_override(text: str) -> Override:
    """Read ``training.max_steps=20``.

    Raises:
        InvalidConfigError: It has not that form.
    """
    option = f"--set {text}"
    key, separator, value = text.partition("=")
    location = split_key(key.strip())
    if not separator or not location:
        raise _refused(option, key.strip(), "must have the form key=value, such as training.max_steps=20")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise _refused(option, key, f"the value {value!r} is not valid YAML; quote it") from None
    # YAML 1.1 reads 5e-5 as text; everybody means the number.
    if isinstance(parsed, str) and _EXPONENT.fullmatch(parsed):
        parsed = float(parsed)
    return Override(option, location, parsed)


def load_with_overrides(file: Path, settings: Sequence[str] = (), name: str | None = None) -> RunConfig:
    """Read a configuration file and change some of its values.

    Args:
        file: The YAML file, which must be valid by itself.
        settings: Texts of ``--set``; a later one wins.
        name: The run's name; ``None`` leaves it.

    Raises:
        ConfigError: The file or a changed value is wrong; every problem is listed.
    """
    overrides = [parse_override(text) for text in settings]
    if name is not None:
        overrides.append(Override(f"--name {name}", ("run", "name"), name))
    base = load_config(file)
    if not overrides:
        return base
    data = _as_written(yaml.safe_load(file.read_text(encoding="utf-8-sig")), base.model_dump(by_alias=True))
    data["run"] = {"name": base.run.name, **data.get("run", {})}
    problems = [problem for override in overrides if (problem := _apply(data, override))]
    if problems:
        raise InvalidConfigError(problems)
    try:
        changed = config_from_dict(data)
    except InvalidConfigError as error:
        raise InvalidConfigError(
            [_located(base, problem, overrides) for problem in error.problems], code=error.code
        ) from None
    # A copy of the file's configuration, so that later problems still know file and line.
    return base.model_copy(update={section: getattr(changed, section) for section in RunConfig.model_fields})


def _as_written(raw: Any, validated: Any) -> Any:
    """The validated values of those keys that the file gives."""
    if isinstance(raw, Mapping) and isinstance(validated, Mapping):
        return {key: _as_written(value, validated[key]) for key, value in raw.items() if key in validated}
    if raw is None and isinstance(validated, Mapping):  # a section whose lines are all commented out
        return {}
    if isinstance(validated, tuple):
        pairs = zip(raw, validated, strict=True) if isinstance(raw, list) else ()
        return [_as_written(item, value) for item, value in pairs]
    return validated


def _apply(data: dict[str, Any], override: Override) -> ConfigProblem | None:
    inner: Any = data
    for depth, part in enumerate(override.location):
        is_last = depth == len(override.location) - 1
        if isinstance(part, int):
            if not isinstance(inner, list) or part >= len(inner):
                return _problem(override, f"there is no entry [{part}] to change")
        elif not isinstance(inner, dict):
            return _problem(override, f"{override.location[depth - 1]} holds no keys")
        if is_last:
            inner[part] = override.value
        elif isinstance(part, int):
            inner = inner[part]
        else:
            if inner.get(part) is None:
                inner[part] = {}
            inner = inner[part]
    return None


def _located(base: RunConfig, problem: ConfigProblem, overrides: Sequence[Override]) -> ConfigProblem:
    location = split_key(problem.key)
    for override in reversed(overrides):
        if location[: len(override.location)] == override.location:
            return replace(problem, file=override.option)
    return replace(problem_at(base, problem.key, problem.message), nearest=problem.nearest)


def _problem(override: Override, message: str) -> ConfigProblem:
    return ConfigProblem("", message, override.option)


def _refused(option: str, key: str, message: str) -> InvalidConfigError:
    return InvalidConfigError([ConfigProblem(key, message, option)])
