"""Values as words, the same in the report, in ``eadt status`` and in the display.

Owns the names of setpoint fields and how they, changes and moments are said. Text in, text out: it computes
no figure. Formatting of numbers is :mod:`eadt.units`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from eadt.units import NOT_MEASURED, format_number

_SETPOINT_NAMES = {
    "num_workers": ("workers", ""),
    "workers_per_gpu": ("workers a device", ""),
    "mps_active_thread_percentage": ("share", " %"),
    "power_limit_w": ("power limit", " W"),
    "num_frozen_layers": ("frozen layers", ""),
}
_UNITS = {
    "samples_per_second": " samples/s",
    "tokens_per_second": " tokens/s",
    "samples_per_j": " samples/J",
    "_percentage": " %",
    "_w": " W",
    "_j": " J",
    "_s": " s",
}
_THROTTLE_REASONS = {
    "heat": "heat",
    "power_cap": "the power limit",
    "power_brake": "the power supply",
    "hardware": "the hardware's protection",
    "other": "another reason",
}
NO_BREAK = "\u00a0"
_BEFORE_UNIT = re.compile(
    r"(?<=\d) (?=(?:[kMG]?W|[kM]?Wh|k?J|s|min|h|d|°C|[KMG]iB|MHz|samples|steps?|tokens|workers?)\b|%)"
)
_SIGNS = re.compile(r"(?<=[≥±]) | (?=±)")
_WORTH_SAYING = 0.01
"""A card that was slowed for a smaller fraction of the time has no sentence."""


def number(value: float | None, unit: str = "") -> str:
    """A number and its unit; *not measured* where it is unknown."""
    return NOT_MEASURED if value is None else format_number(value, unit)


def count(value: int | None) -> str:
    """A whole number with its thousands apart."""
    return NOT_MEASURED if value is None else f"{value:,}".replace(",", "\u202f")


def plural(number_of: int, noun: str) -> str:
    """A count with its noun: ``1 step``, ``2 steps``."""
    return f"{count(number_of)} {noun}" + ("" if number_of == 1 else "s")


def percentage(fraction: float) -> str:
    """A fraction as a percentage that is 0 or 100 only where it is: ``62 %``, ``< 1 %``."""
    if 0 < fraction < 0.01:
        return "< 1 %"
    if 0.99 < fraction < 1:
        return "> 99 %"
    return f"{100 * fraction:.0f} %"


def moment(unix_s: float | None) -> str:
    """A wall time in UTC."""
    if unix_s is None:
        return ""
    try:
        return f"{datetime.fromtimestamp(unix_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):  # a damaged row may say anything
        return "an impossible time"


def setpoint(values: Any) -> str:
    """A setpoint's dictionary as a short phrase: ``2 workers at 50 %, 250 W limit``."""
    if not isinstance(values, Mapping):
        return "?"
    parts = [workers(values.get("num_workers"), values.get("mps_active_thread_percentage"))]
    limit_w = values.get("power_limit_w")
    if limit_w is not None:
        parts.append(f"{_whole(limit_w)} W limit")
    num_frozen = values.get("num_frozen_layers")
    if num_frozen:
        parts.append(f"{num_frozen} frozen layer{'' if num_frozen == 1 else 's'}")
    if values.get("paused"):
        parts.append("paused")
    return ", ".join(part for part in parts if part)


def workers(num_workers: Any, share: Any) -> str:
    """``2 workers at 50 %``; empty where their number is unknown."""
    if num_workers is None:
        return ""
    text = "1 worker" if num_workers == 1 else f"{num_workers} workers"
    return text if share is None else f"{text} at {_whole(share)} %"


def _whole(value: Any) -> str:
    """A number without decimals; whatever else a setpoint may hold as it is."""
    return f"{value:.0f}" if isinstance(value, int | float) else str(value)


def difference(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """What differs between two setpoints, such as ``workers 4 → 2, share 50 % → 40 %``."""
    if not after:
        return "no change"
    parts: list[str] = []
    for name, value in after.items():
        old = before.get(name) if before else None
        if old != value:
            label, unit = _SETPOINT_NAMES.get(name, (name.replace("_", " "), ""))
            parts.append(f"{label} {plain(old, unit)} → {plain(value, unit)}")
    return ", ".join(parts) or "no change"


def change(row: Mapping[str, Any]) -> str:
    """What a ``change`` row, or an event of one, changed."""
    if row.get("recovery"):
        return "same setting, new engines"
    text = difference(row.get("setpoint_before"), row.get("setpoint_after"))
    from_workers, to_workers = row.get("from_workers"), row.get("to_workers")
    if text == "no change" and from_workers != to_workers:
        return f"workers {plain(from_workers)} → {plain(to_workers)}"
    return text


def plain(value: Any, unit: str = "") -> str:
    """A value of a setpoint with its unit."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unset"}[value]
    return (f"{value:.4g}" if isinstance(value, float) else str(value)) + unit


def quantity(name: str, value: Any) -> str:
    """A field of ours with the unit that its name tells: ``power_w`` 420 is ``power 420 W``."""
    suffix = next((end for end in _UNITS if name.endswith(end)), "")
    label = name.removesuffix(suffix).strip("_").replace("_", " ")
    return f"{label} {plain(value)}{_UNITS.get(suffix, '')}".strip()


def sentence(values: Mapping[str, Any] | None, key: str) -> str:
    """What was expected or found in one sentence, where there is one; else all of it."""
    return str((values or {}).get(key) or "") or pairs(values)


def pairs(values: Mapping[str, Any] | None) -> str:
    """A small mapping as text: ``power 420 W, 10.2 samples/s``."""
    parts: list[str] = []
    for name, value in (values or {}).items():
        if isinstance(value, Mapping):
            parts.append(f"{name.replace('_', ' ')}: {pairs(value)}" if value else "")
        elif value is not None:
            parts.append(quantity(name, value))
    return ", ".join(part for part in parts if part)


def throttling(component: str, throttled: Mapping[str, float]) -> str:
    """How often and why the driver slowed a card: ``gpu0 was slowed 62 % of the time: heat``.

    Reasons can be given at once, so their fractions are said one by one. Empty where it was hardly slowed.
    """
    reasons = throttle_reasons(throttled)
    return f"{component} was slowed {reasons}" if reasons else ""


def throttle_reasons(throttled: Mapping[str, float]) -> str:
    """How often the driver slowed a card, and why: ``62 % of the time: heat; 3 % of the time: ...``."""
    reasons = sorted(
        ((fraction, reason) for reason, fraction in throttled.items() if fraction >= _WORTH_SAYING),
        reverse=True,
    )
    return "; ".join(
        f"{percentage(fraction)} of the time: {_THROTTLE_REASONS.get(reason, reason.replace('_', ' '))}"
        for fraction, reason in reasons
    )


def unbroken(text: str) -> str:
    """The same text with a no-break space between each number and its unit."""
    return _SIGNS.sub(NO_BREAK, _BEFORE_UNIT.sub(NO_BREAK, text))


def listed(items: Sequence[str], most: int = 10) -> str:
    """Items in a row, not more than ``most`` of them by name."""
    shown = ", ".join(items[:most])
    return f"{shown} and {count(len(items) - most)} more" if len(items) > most else shown


def cell(value: object) -> str:
    """Text for a cell of a Markdown table: one line, nothing that ends the cell or begins a tag."""
    text = re.sub(r"\s+", " ", str(value)).strip()
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
