"""The configuration described for editors (JSON schema) and for readers (Markdown)."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from eadt.config.base import Section
from eadt.config.loading import nested_section
from eadt.config.root import RunConfig

_NAMES = {int: "integer", float: "number", str: "text", bool: "true/false", dict: "mapping"}


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a run's file."""
    schema = RunConfig.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "EADT run", **schema}


def reference_markdown() -> str:
    """One table per section with every key: path, type, default, meaning."""
    parts = []
    for name, field in RunConfig.model_fields.items():
        model = nested_section(field.annotation)
        assert model is not None, f"the section {name} is no model"
        rows = [
            f"| `{key}` | {kind} | {default} | {_cell(meaning)} |"
            for key, kind, default, meaning in _rows(model, name)
        ]
        head = f"### `{name}`\n\n{field.description}" + (" Required." if field.is_required() else "")
        parts.append(
            "\n".join([f"{head}\n", "| key | type | default | meaning |", "|---|---|---|---|", *rows])
        )
    return "\n\n".join(parts) + "\n"


def _rows(model: type[Section], above: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in model.model_fields.items():
        key = f"{above}.{field.alias or name}"
        inner = nested_section(field.annotation)
        if inner is None:
            yield key, _type(field.annotation), _default(field), field.description or ""
            continue
        is_list = typing.get_origin(field.annotation) is tuple
        if is_list:
            yield key, "list", _default(field), field.description or ""
        yield from _rows(inner, f"{key}[]" if is_list else key)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(a) for a in arguments if a is not type(None)))
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    return _NAMES.get(origin or annotation, str(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "" if value is None else f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"
