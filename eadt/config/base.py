"""What all sections of the configuration share: strictness, and errors that name several keys.

Must not know any single section.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

CONFLICT = "conflict"
"""Error type of a check over several keys, to tell it from a check of one value."""


class Conflict(NamedTuple):
    """A combination of settings that cannot work.

    Attributes:
        message: What is wrong and which option to change.
        keys: Full paths of all keys that are involved; the first is where the error is reported.
    """

    message: str
    keys: tuple[str, ...]


def conflict(message: str, *keys: str) -> Conflict:
    """Shorthand to write a check: ``conflict("...", "training.a", "training.b")``."""
    return Conflict(message, keys)


def split_key(key: str) -> tuple[str | int, ...]:
    """``policy.schedule[1].at_step`` as ``("policy", "schedule", 1, "at_step")``."""
    parts = re.findall(r"[^.\[\]]+|\[\d+\]", key)
    return tuple(int(part[1:-1]) if part.startswith("[") else part for part in parts)


def join_key(loc: Iterable[str | int]) -> str:
    """The reverse of :func:`split_key`."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def refuse(conflicts: list[Conflict], title: str, section: str) -> None:
    """Raise one validation error that carries all ``conflicts``, if there are any.

    Args:
        conflicts: What was found.
        title: Name of the model that was checked.
        section: Path of that model from the root; empty for the root.
    """
    if not conflicts:
        return
    depth = len(split_key(section))
    raise ValidationError.from_exception_data(
        title,
        [
            InitErrorDetails(
                type=PydanticCustomError(CONFLICT, "{message}", {"message": c.message, "keys": list(c.keys)}),
                loc=split_key(c.keys[0])[depth:],
                input=None,
            )
            for c in conflicts
        ],
    )


class Section(BaseModel):
    """A part of the configuration: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )

    section: ClassVar[str] = ""
    """Path of this section from the root."""

    def conflicts(self) -> Iterator[Conflict]:
        """Combinations of this section's own keys that cannot work. Needs no machine, no clock."""
        return iter(())

    @model_validator(mode="after")
    def _check_conflicts(self) -> Self:
        refuse(list(self.conflicts()), type(self).__name__, self.section)
        return self

    def _settle(self, **values: Any) -> None:
        """Write down values that follow from others, while validating; nobody has seen the object yet."""
        self.__dict__.update(values)


def _switch(value: Any) -> Any:
    if not isinstance(value, bool | dict):
        raise PydanticCustomError("switch", "must be true, false or a mapping of its settings")
    if isinstance(value, dict) and not isinstance(value.get("enabled", True), bool):
        raise PydanticCustomError("switch", "its key 'enabled' must be true or false")
    return value


Switch = Annotated[bool | dict[str, Any], BeforeValidator(_switch)]
"""``true``, ``false``, or a mapping of settings (on, unless it says ``enabled: false``)."""


def is_on(switch: bool | dict[str, Any]) -> bool:
    """Whether a :data:`Switch` asks for its lever."""
    return bool(switch.get("enabled", True)) if isinstance(switch, dict) else switch


def _local_path(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("empty_path", "must not be empty; leave the key out for the default")
    return os.path.expanduser(value)


PathText = Annotated[str, AfterValidator(_local_path)]
"""A path or URI as text, with ``~`` expanded; relative paths start at the folder EADT is run in."""
