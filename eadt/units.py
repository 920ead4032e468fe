"""Quantities as users read them, and the quality that every measured value carries."""

from __future__ import annotations

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


def format_energy(energy_j: float | None) -> str:
    """Joules as text with a unit that keeps 3 to 4 digits: ``812 J``, ``3.41 kJ``, ``1.20 kWh``."""
    if energy_j is None:
        return "not measured"
    if abs(energy_j) < 1e3:
        return f"{energy_j:.3g} J" if abs(energy_j) < 100 else f"{energy_j:.0f} J"
    if abs(energy_j) < 3.6e6:
        return f"{energy_j / 1e3:.2f} kJ"
    return f"{energy_j / 3.6e6:.2f} kWh"


def format_duration(seconds: float | None) -> str:
    """Seconds as text: ``0.42 s``, ``38 s``, ``4 min 05 s``, ``3 h 12 min``."""
    if seconds is None:
        return "unknown"
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(num_bytes: float) -> str:
    """Bytes as text with binary units: ``1.50 GiB``."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"
