"""From a YAML file to a :class:`RunConfig`, or to one error that lists everything wrong with it.

Owns the reading of the file with its line numbers and the wording of errors; starts nothing.
"""

from __future__ import annotations

import copy
import difflib
import re
import typing
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from eadt.config.aliases import ALIASES
from eadt.config.base import CONFLICT, Section, join_key, split_key
from eadt.config.root import RunConfig
from eadt.errors import ConfigError

INVALID_CODE = "EADT-201"
UNREADABLE_CODE = "EADT-202"
SYNTAX_CODE = "EADT-203"
PATH_CODE = "EADT-204"

_NOTHING_STARTED = "nothing was started"
_NEARLY = 0.1
"""Names whose likeness (0 to 1) differs by less are named together."""


@dataclass(frozen=True)
class ConfigProblem:
    """One thing that is wrong with a configuration.

    Attributes:
        key: Path of the key from the root, such as ``policy.schedule[0].at_step``; empty for the whole file.
        message: What is wrong and what to change.
        file: The file as the user named it; ``None`` for a configuration made in Python.
        line: Line in the file, from 1; ``None`` where there is none.
        nearest: Nearest valid key, for an unknown one; the message may name more.
    """

    key: str
    message: str
    file: str | None = None
    line: int | None = None
    nearest: str | None = None

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line is not None else self.file
        return ": ".join(part for part in (place, self.key, self.message) if part)


class InvalidConfigError(ConfigError):
    """A configuration with one or more problems, all of them listed.

    Args:
        problems: What is wrong, at least one.
        code: Stable code.
    """

    def __init__(self, problems: Sequence[ConfigProblem], *, code: str = INVALID_CODE) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"the configuration has {count}:", *(f"  {problem}" for problem in problems)]
        super().__init__(
            "\n".join(lines),
            code=code,
            means=_NOTHING_STARTED,
            fix="correct the keys above, then check with `eadt validate FILE`",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.problems, self.code)


def _rebuild(problems: tuple[ConfigProblem, ...], code: str) -> InvalidConfigError:
    return InvalidConfigError(problems, code=code)


def load_config(path: str | Path) -> RunConfig:
    """Read and check a run's configuration. Touches nothing but the file.

    Args:
        path: The YAML file.

    Raises:
        ConfigError: The file cannot be read (EADT-202), is not YAML (EADT-203), or its content is
            wrong (EADT-201, an :class:`InvalidConfigError` with every problem).
    """
    file = str(path)
    data, lines, problems = _parse(file, _read_text(Path(path)))
    if not isinstance(data.get("run"), dict | None) or "name" not in (data.get("run") or {}):
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).stem).lstrip("._-") or "run"
        if isinstance(data.get("run"), dict | None):
            data["run"] = {"name": stem, **(data.get("run") or {})}
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        problems += _problems(data, error, file, lines)
        problems.sort(key=lambda p: (p.line or 0, p.key))
        raise InvalidConfigError(problems) from None
    if problems:
        raise InvalidConfigError(problems)
    config._file = file
    config._lines = lines
    return config


def config_from_dict(data: dict[str, Any]) -> RunConfig:
    """A configuration from Python values, with the same errors as a file's (but without lines)."""
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise InvalidConfigError(_problems(data, error, None, {})) from None


def problem_at(config: RunConfig, key: str, message: str) -> ConfigProblem:
    """A problem found after loading, with file and line where they are known."""
    return ConfigProblem(key, message, config._file, _line_of(key, config._lines))


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        what, fix = f"there is no file {path}", "check the path; relative paths start at the present folder"
        if path.parent.is_dir():
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
            fix = f"did you mean {path.parent / near[0]}?" if near else fix
    except IsADirectoryError:
        what, fix = f"{path} is a folder, not a configuration file", f"name a file, such as {path}/run.yaml"
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        what, fix = f"{path}:{line}: not UTF-8 text ({error.reason})", "save the file as UTF-8"
    except OSError as error:
        what, fix = f"{path} cannot be read: {error.strerror}", "check the path and its permissions"
    raise ConfigError(what, code=UNREADABLE_CODE, means=_NOTHING_STARTED, fix=fix)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader that also reads ``5e-5`` as a number, as everybody means it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _parse(file: str, text: str) -> tuple[dict[str, Any], dict[str, int], list[ConfigProblem]]:
    """The file's values, the line of each key, and what is wrong with its form."""
    lines: dict[str, int] = {}
    problems: list[ConfigProblem] = []
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise ConfigError(
                    f"{file} is empty",
                    code=INVALID_CODE,
                    means=_NOTHING_STARTED,
                    fix="it needs at least a section `training`; configs/ has examples",
                )
            for key, line, message in _walk(loader, node, (), [], set()):
                if message is None:
                    lines[key] = line
                else:
                    problems.append(ConfigProblem(key, message, file, line))
            if any("refers to itself" in problem.message for problem in problems):
                raise InvalidConfigError(problems)
            data = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        text = ", ".join(part for part in (error.problem, error.context) if part)
        raise ConfigError(
            f"{place}: not valid YAML: {text}",
            code=SYNTAX_CODE,
            means=_NOTHING_STARTED,
            fix="indent with spaces, not tabs" if "\\t" in text else "correct the line above or before it",
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{file}: not valid YAML: {error}",
            code=SYNTAX_CODE,
            means=_NOTHING_STARTED,
            fix="correct the file",
        ) from None
    if not isinstance(data, dict):
        message = f"holds {_kind(data)}; it must be sections such as `training:` with keys under them"
        raise InvalidConfigError([ConfigProblem("", message, file, 1)])
    return data, lines, problems


def _walk(
    loader: yaml.SafeLoader, node: yaml.Node, loc: tuple[str | int, ...], above: list[int], seen: set[int]
) -> Iterator[tuple[str, int, str | None]]:
    """Yields (key, line, None) for each key and (key, line, message) for each fault of form."""
    if id(node) in above:
        yield join_key(loc), node.start_mark.line + 1, "an alias here refers to itself"
        return
    if id(node) in seen:
        return
    seen.add(id(node))
    above = [*above, id(node)]
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield join_key((*loc, index)), item.start_mark.line + 1, None
            yield from _walk(loader, item, (*loc, index), above, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                yield join_key((*loc, str(key))), line, f"a key must be text, not {_kind(key)}: quote it"
                continue
            if key in first:
                yield join_key((*loc, key)), line, f"given twice, first in line {first[key]}: keep one"
                continue
            first[key] = line
            yield join_key((*loc, key)), line, None
            yield from _walk(loader, value_node, (*loc, key), above, seen)


def _line_of(key: str, lines: dict[str, int]) -> int | None:
    """Line of the key, or of the nearest key above it that the file has."""
    loc = split_key(key)
    while loc:
        if join_key(loc) in lines:
            return lines[join_key(loc)]
        loc = loc[:-1]
    return 1 if lines else None


def _problems(
    data: dict[str, Any], error: ValidationError, file: str | None, lines: dict[str, int]
) -> list[ConfigProblem]:
    """Everything wrong with ``data``, in one go.

    Pydantic leaves out the checks over several keys of a section in which anything is wrong. So what is
    wrong is taken out and the rest is checked again; only conflicts between keys that are really there,
    and right, are added.
    """
    details = error.errors(include_url=False)
    # A key that is no text was found with its line when the file was read.
    found = [_problem(d, file, lines) for d in details if d["type"] != "invalid_key" or file is None]
    meant = {p.nearest for p in found if p.nearest}
    found = [p for p in found if not (p.message == _MISSING and p.key in meant)]
    removed = [split_key(key) for key in meant]
    pruned = copy.deepcopy(data)
    for detail in details:
        removed += [loc for loc in [_prune(pruned, detail)] if loc]
    try:
        RunConfig.model_validate(pruned)
    except ValidationError as second:
        for detail in second.errors(include_url=False):
            keys = [split_key(key) for key in detail.get("ctx", {}).get("keys", [])]
            if detail["type"] == CONFLICT and not any(_touch(k, r) for k in keys for r in removed):
                found.append(_problem(detail, file, lines))
    unique = {(p.key, p.message): p for p in found}
    return sorted(unique.values(), key=lambda p: (p.line or 0, p.key))


def _touch(one: tuple[str | int, ...], other: tuple[str | int, ...]) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _prune(data: dict[str, Any], detail: ErrorDetails) -> tuple[str | int, ...]:
    """Take the value that an error is about out of ``data``; returns where that was."""
    loc = detail["loc"][:-1] if detail["type"] == "missing" else detail["loc"]
    loc = loc[: next((i for i, part in enumerate(loc) if isinstance(part, int)), len(loc))]
    inner: Any = data
    for depth, part in enumerate(loc):
        if not isinstance(inner, dict) or part not in inner:
            break
        if depth == len(loc) - 1:
            del inner[part]
        else:
            inner = inner[part]
    return loc


def _problem(detail: ErrorDetails, file: str | None, lines: dict[str, int]) -> ConfigProblem:
    loc = tuple(part for part in detail["loc"] if part != "[key]")
    key = join_key(loc)
    nearest = None
    if detail["type"] == "extra_forbidden":
        nearest, message = _unknown(loc)
    else:
        message = _message(detail)
    return ConfigProblem(key, message, file, _line_of(key, lines), nearest)


def _unknown(loc: tuple[str | int, ...]) -> tuple[str | None, str]:
    """Nearest valid key for an unknown one, and the message, which may name a few."""
    name, section = str(loc[-1]), loc[:-1]
    model = _model_at(section)
    siblings = _keys(model) if model else []
    # What other programs call it, but not within lists and sections of sections.
    meant = list(ALIASES.get(name.lower().replace("-", "_"), ())) if len(loc) <= 2 else []
    if not meant:
        # Of several sections with such a key, the one nearest to the root is meant.
        paths = sorted(_all_keys(RunConfig, ()), key=len, reverse=True)
        elsewhere = {path[-1]: join_key(path) for path in paths}
        # Nearest first: a slip of the pen here, the right name in the wrong section, then the less alike.
        meant = (
            [join_key((*section, near)) for near in _alike(name, siblings, 0.8)]
            or [elsewhere[near] for near in _alike(name, elsewhere, 0.8)]
            or [join_key((*section, near)) for near in _alike(name, siblings, 0.6)]
        )
    if not meant:
        return None, f"unknown key; valid here are {', '.join(siblings)}"
    inside = all(split_key(key)[:-1] == section for key in meant)
    names = [str(split_key(key)[-1]) if inside else key for key in meant]
    return meant[0], f"unknown key{'' if inside else ' here'}; did you mean {_either(names)}?"


def _alike(name: str, names: Iterable[str], cutoff: float) -> list[str]:
    """The name that is most alike, and up to two more that are nearly as much."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=cutoff)
    ratios = {other: difflib.SequenceMatcher(None, other, name).ratio() for other in near}
    near.sort(key=lambda other: (-ratios[other], known.index(other)))
    return [other for other in near if ratios[other] >= ratios[near[0]] - _NEARLY]


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _all_keys(model: type[BaseModel], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        path = (*above, field.alias or name)
        yield path
        inner = nested_section(field.annotation)
        if inner is not None:
            yield from _all_keys(inner, path)


def _model_at(loc: tuple[str | int, ...]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = RunConfig
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model else None
        model = nested_section(field.annotation) if field else None
    return model


def nested_section(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds, alone or in a list; ``None`` for plain values."""
    arguments = typing.get_args(annotation)
    if not arguments and isinstance(annotation, type):
        return annotation if issubclass(annotation, Section) else None
    for argument in arguments:
        inner = nested_section(argument)
        if inner is not None:
            return inner
    return None


_MISSING = "is missing; a run needs it"
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "tuple_type": "a list",
    "list_type": "a list",
}
_BOUNDS = {
    "greater_than": ("gt", "must be above"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be below"),
    "less_than_equal": ("le", "must be at most"),
}


def _message(detail: ErrorDetails) -> str:
    """One error of pydantic in the words of this program."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind in _EXPECTED:
        hint = ": put it in quotes" if kind == "string_type" and not isinstance(value, dict | list) else ""
        return f"must be {_EXPECTED[kind]}, not {_kind(value)}{hint}"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"{words} {context[bound]:g}, not {value!r}"
    if kind == "literal_error":
        expected = context["expected"].replace("'", "")
        near = difflib.get_close_matches(str(value), re.split(r", | or ", expected), n=1)
        return f"must be {expected}, not {value!r}" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "missing":
        return _MISSING
    if kind == "string_too_short":
        return "must not be empty; leave the key out for the default"
    if kind == "string_pattern_mismatch":
        return f"must start with a letter or digit, then also '.', '_' and '-'; not {value!r}"
    return detail["msg"]


def _kind(value: Any) -> str:
    """A value as people name it: its kind, and itself where it is short."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 40 else f"the text {value[:37]!r}..."
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    return f"a {type(value).__name__} ({value})"
