"""Energy and time as whole numbers, so that sums are exact in any order.

Energy is held in thousandths of a joule, as the ledger writes it; time in millionths of a second.
"""

from __future__ import annotations

MAX_MJ = 10**15
"""No component uses so much (in thousandths of a joule) between two readings; more makes no sense."""


def share(whole: int, fraction: float, left: int) -> int:
    """The part that a fraction of a whole number is: at most what is left of it, at least nothing."""
    return min(round(whole * min(fraction, 1.0)), left) if fraction > 0.0 else 0


def whole_mj(joules: float | None) -> int:
    """Joules as whole thousandths; -1: unknown, or no energy that there can be."""
    if joules is None or not abs(joules) < MAX_MJ:
        return -1
    energy_mj = round(joules * 1000)
    return energy_mj if 0 <= energy_mj <= MAX_MJ else -1
