"""Quantities as users read them, and the quality that every measured value carries."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum


class Quality(StrEnum):
    """How far a value can be trusted. Unknown values are ``None``, never zero."""

    MEASURED = "measured"
    ESTIMATED = "estimated"
    SIMULATED = "simulated"
    STALE = "stale"

    @classmethod
    def worst(cls, qualities: Iterable[Quality]) -> Quality:
        """The least trustworthy of them, in the order of this class; of none: ``MEASURED``."""
        order = list(cls)
        return max(qualities, key=order.index, default=cls.MEASURED)


@dataclass(frozen=True, slots=True)
class Quantity:
    """A figure with what is known of its truth. Immutable.

    Attributes:
        value: In the unit that the owner's name says.
        uncertainty: Half-width of the interval that the sources state, in the same unit; ``None``: not known.
        at_least: Whether parts of it are unknown, so that the true value is at least this.
        qualities: What went into it, as in :class:`Quality`, sorted.
    """

    value: float
    uncertainty: float | None = None
    at_least: bool = False
    qualities: tuple[str, ...] = ()

    def over(self, divisor: float) -> Quantity:
        """The quotient; as uncertain, and as much "at least", as the whole."""
        part = None if self.uncertainty is None else self.uncertainty / divisor
        return Quantity(self.value / divisor, part, self.at_least, self.qualities)


def sum_if_known(values: Collection[float | None]) -> float | None:
    """The sum; ``None`` if a part of it is, or there is none."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


NOT_MEASURED = "not measured"
"""What stands in the place of a figure that is unknown."""

_SCALES = {
    "J": ((0.0, 1.0, "J"), (1e3, 1e3, "kJ"), (3.6e6, 3.6e6, "kWh"), (3.6e9, 3.6e9, "MWh")),
    "W": ((0.0, 1.0, "W"), (1e4, 1e3, "kW"), (1e7, 1e6, "MW")),
}
"""Units as (smallest value that is shown in it, its size, its name)."""


def _scaled(value: float, unit: str) -> tuple[float, str]:
    """Size and name of the unit in which a value of ``unit`` is shown."""
    steps = _SCALES.get(unit, ((0.0, 1.0, unit),))
    _, size, name = next(step for step in reversed(steps) if abs(value) >= step[0])
    return size, name


def format_number(value: float, unit: str = "") -> str:
    """A number with 3 to 4 digits and its unit: ``1.71 J``, ``3.41 kJ``, ``12 346``, ``1.23e-05 J``.

    Joules and watts get the prefix that keeps them short; other units are left as they are.
    """
    size, name = _scaled(value, unit)
    value /= size
    if size > 1:
        digits = _grouped(value, 2)
    elif abs(value) >= 999.5:
        digits = _grouped(value, 0)
    else:
        digits = f"{value:.3g}"
    return f"{digits} {name}".rstrip()


def format_energy(energy_j: float | None) -> str:
    """Joules as text with a unit that keeps 3 to 4 digits: ``812 J``, ``3.41 kJ``, ``1.20 kWh``."""
    return NOT_MEASURED if energy_j is None else format_number(energy_j, "J")


def format_quantity(quantity: Quantity | None, unit: str, *, brief: bool = False) -> str:
    """A figure with what is known of its truth: ``at least 112.9 ± 5.6 kJ``.

    Args:
        quantity: The figure; ``None``: it is unknown.
        unit: ``J``, ``W``, ``J/sample`` and so on. See :func:`format_number`.
        brief: Without the uncertainty, and with a sign for "at least": ``≥ 112.88 kJ``.
    """
    if quantity is None:
        return NOT_MEASURED
    bound = ("≥ " if brief else "at least ") if quantity.at_least else ""
    if brief or not quantity.uncertainty:
        return bound + format_number(quantity.value, unit)
    size, name = _scaled(quantity.value, unit)
    value, uncertainty = quantity.value / size, quantity.uncertainty / size
    return f"{bound}{_with_uncertainty(value, uncertainty)} {name}"


def _with_uncertainty(value: float, uncertainty: float) -> str:
    """Both to the uncertainty's second digit, but a value has no more than 4 digits."""
    if max(abs(value), uncertainty) < 1e-3:
        return f"{value:.3g} ± {uncertainty:.2g}"
    decimals = 1 - math.floor(math.log10(uncertainty))
    if value:
        decimals = min(decimals, 3 - math.floor(math.log10(abs(value))))
    decimals = max(decimals, 0)
    return f"{_grouped(value, decimals)} ± {_grouped(max(uncertainty, 10.0**-decimals), decimals)}"


def _grouped(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}".replace(",", "\u202f")


def format_qualities(qualities: Iterable[str]) -> str:
    """Qualities as one phrase: ``estimated``, ``estimated + measured``; *not measured* for none."""
    return " + ".join(qualities) or NOT_MEASURED


def format_duration(seconds: float | None) -> str:
    """Seconds as text: ``0.42 s``, ``38 s``, ``4 min 05 s``, ``3 h 12 min``, ``12 d 3 h``."""
    if seconds is None:
        return "unknown"
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 100 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def format_bytes(num_bytes: float) -> str:
    """Bytes as text with binary units: ``1.50 GiB``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"
