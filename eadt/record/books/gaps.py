"""Stretches in which a component's energy is unknown.

Owns their list: neighbours with one reason are one gap, and the longest are kept, the others counted.
"""

from __future__ import annotations

import msgspec

from eadt.record.figures import Gap

MAX_GAPS = 100
TOUCHING_S = 1e-3
"""Intervals that are no further apart follow each other: the rest is rounding."""

NO_ROW = "no row"
"""Why energy is unknown of which no row tells."""


class OpenGap(msgspec.Struct):
    """A gap that the next interval can make longer.

    Attributes:
        at_s: Its begin, on the run's axis.
        unknown_us: How much of it is unknown, in millionths of a second.
        reason: Why.
        to_t: Its end, node time.
    """

    at_s: float
    unknown_us: int
    reason: str
    to_t: float

    def goes_on(self, from_t: float, reason: str) -> bool:
        """Whether what begins there, for this reason, is a part of it."""
        return reason == self.reason and abs(from_t - self.to_t) <= TOUCHING_S


class ClosedGap(msgspec.Struct, array_like=True, gc=False):
    """A gap that has ended."""

    node: str
    component: str
    at_s: float
    unknown_us: int
    reason: str


class GapBook(msgspec.Struct):
    """The gaps of all nodes."""

    closed: list[ClosedGap] = []
    num_gaps: int = 0

    def note(
        self,
        node: str,
        gaps: dict[str, OpenGap],
        component: str,
        at_s: float,
        from_t: float,
        to_t: float,
        unknown_us: int,
        reason: str,
    ) -> None:
        """Book an unknown stretch that begins at ``at_s``; ``gaps`` are its node's open ones."""
        gap = gaps.get(component)
        if gap is not None and gap.goes_on(from_t, reason):
            gap.unknown_us += unknown_us
            gap.to_t = to_t
            return
        if gap is not None:
            self._close(node, component, gap)
        gaps[component] = OpenGap(at_s, unknown_us, reason, to_t)
        self.num_gaps += 1

    def shorten(self, gaps: dict[str, OpenGap], component: str, to_t: float, known_us: int) -> None:
        """A part of the gap that ends there is known after all; nothing is left of one that is."""
        gap = gaps.get(component)
        if gap is None or abs(to_t - gap.to_t) > TOUCHING_S:
            return
        gap.unknown_us -= known_us
        if gap.unknown_us <= 0:
            del gaps[component]
            self.num_gaps -= 1

    def close(self, node: str, gaps: dict[str, OpenGap]) -> None:
        """A node's open gaps have ended."""
        for component, gap in gaps.items():
            self._close(node, component, gap)
        gaps.clear()

    def _close(self, node: str, component: str, gap: OpenGap) -> None:
        self.closed.append(ClosedGap(node, component, gap.at_s, gap.unknown_us, gap.reason))
        if len(self.closed) >= 2 * MAX_GAPS:
            self.closed = longest_of(self.closed)


def longest_of(gaps: list[ClosedGap]) -> list[ClosedGap]:
    """The longest of them, longest first."""
    return sorted(gaps, key=lambda gap: (-gap.unknown_us, gap.at_s, gap.node, gap.component))[:MAX_GAPS]


def as_figures(gaps: list[ClosedGap]) -> tuple[Gap, ...]:
    """The longest of them as figures."""
    return tuple(
        Gap(gap.node, gap.component, gap.at_s, gap.unknown_us / 1e6, gap.reason) for gap in longest_of(gaps)
    )
