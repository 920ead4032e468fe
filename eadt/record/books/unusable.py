"""What a book raises when a row makes no sense; ``Books`` counts and names it, and goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable


class Unusable(ValueError):
    """A row that makes no sense, and why."""


def check_numbers(*numbers: int) -> None:
    """Steps, generations and settings are counted from 0.

    Raises:
        Unusable: One of them is no such number.
    """
    for number in numbers:
        if not 0 <= number < 2**31:
            raise Unusable(f"{number} is no number of a step, generation or setting")


def check_interval(t0: float, t1: float) -> float:
    """The length in s of an interval.

    Raises:
        Unusable: It ends before it begins, or is not finite.
    """
    seconds = t1 - t0
    if not 0.0 <= seconds < 1e9:
        raise Unusable(f"an interval from {t0} to {t1} s")
    return seconds


def check_lengths(wanted: int, lists: Iterable[tuple[str, int]]) -> None:
    """Lists of one row belong together.

    Raises:
        Unusable: One has another length.
    """
    for name, length in lists:
        if length != wanted:
            raise Unusable(f"{length} values of {name} instead of {wanted}")


def finite(value: float | None) -> float | None:
    """The value; ``None`` for NaN and infinities, as in the ledger."""
    return value if value is not None and math.isfinite(value) else None
