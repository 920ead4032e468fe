"""A run over time in bins of one width, which doubles when there would be too many.

Owns how energy, time and samples are spread over the run's axis, and the means made of them. Bounded: at most
:data:`MAX_BINS` bins for each component.
"""

from __future__ import annotations

import math

import msgspec

from eadt.record.figures import Binned

MAX_BINS = 1024
MIN_KNOWN_FRACTION = 0.5
"""A bin of which less than this was measured has no mean power."""


class PowerColumn(msgspec.Struct):
    """One component over time, all nodes together; a value for each bin.

    Attributes:
        energy_mj: What was measured, in thousandths of a joule.
        expected_us: Time of which it should be known, in millionths of a second.
        unknown_us: What of that is not.
    """

    energy_mj: list[float]
    expected_us: list[float]
    unknown_us: list[float]

    def mean_w(self, place: int, bin_s: float) -> float | None:
        """Mean power over a bin, or over what of it there was; ``None``: too little is known."""
        expected_us = self.expected_us[place]
        known_us = expected_us - self.unknown_us[place]
        if expected_us <= 0 or known_us < MIN_KNOWN_FRACTION * expected_us:
            return None
        energy_j = self.energy_mj[place] / 1e3 * (expected_us / known_us)
        return energy_j / min(expected_us / 1e6, bin_s)


class Curves(msgspec.Struct):
    """Power by component and samples, in bins from the run's begin on."""

    bin_s: float = 1.0
    power: dict[str, PowerColumn] = {}
    samples: list[float] = msgspec.field(default_factory=lambda: [0.0] * MAX_BINS)

    @property
    def room_s(self) -> float:
        """Up to where the bins reach on the run's axis, in s."""
        return self.bin_s * MAX_BINS

    def widen(self, at_s: float) -> None:
        """Make the bins so wide that they reach this moment."""
        while at_s >= self.room_s:
            self.bin_s *= 2
            self.samples = _by_two(self.samples)
            for column in self.power.values():
                column.energy_mj = _by_two(column.energy_mj)
                column.expected_us = _by_two(column.expected_us)
                column.unknown_us = _by_two(column.unknown_us)

    def place(self, at_s: float) -> int:
        """The bin of a moment."""
        return min(max(int(at_s / self.bin_s), 0), MAX_BINS - 1)

    def spread(self, from_s: float, to_s: float) -> list[tuple[int, float]]:
        """The bins that an interval touches, each with its fraction of the interval; they sum to 1."""
        first, last = self.place(from_s), self.place(to_s)
        if first == last:
            return [(first, 1.0)]
        edges = [from_s, *(place * self.bin_s for place in range(first + 1, last + 1)), to_s]
        return [
            (place, max(edges[number + 1] - edges[number], 0.0) / (to_s - from_s))
            for number, place in enumerate(range(first, last + 1))
        ]

    def column(self, component: str) -> PowerColumn:
        """One component's."""
        column = self.power.get(component)
        if column is None:
            column = PowerColumn([0.0] * MAX_BINS, [0.0] * MAX_BINS, [0.0] * MAX_BINS)
            self.power[component] = column
        return column

    def add_samples(self, from_s: float, to_s: float, samples: float) -> None:
        """Book the samples of a step, or of some in one bin."""
        for place, fraction in self.spread(from_s, to_s):
            self.samples[place] += samples * fraction

    def take_samples(self, samples: float) -> None:
        """Take out the newest so many samples: what a rollback undid is what was done last."""
        place = MAX_BINS - 1
        while samples > 1e-9 and place >= 0:
            taken = min(self.samples[place], samples)
            self.samples[place] -= taken
            samples -= taken
            place -= 1

    def binned(self, at_s: float, coarse_s: float) -> tuple[Binned, Binned, Binned]:
        """Power by component, samples per second, and samples per joule in bins of ``coarse_s`` at least.

        Args:
            at_s: The end of the run so far, on its axis.
            coarse_s: Width in s from which a quotient of samples and energy makes sense.
        """
        num = min(math.ceil(at_s / self.bin_s), MAX_BINS)
        widths = [min(self.bin_s, at_s - place * self.bin_s) for place in range(num)]
        power: dict[str, tuple[float | None, ...]] = {
            component: tuple(column.mean_w(place, self.bin_s) for place in range(num))
            for component, column in sorted(self.power.items())
        }
        total = tuple(self._total_w(place, power) for place in range(num))
        per_second = tuple(self.samples[place] / widths[place] for place in range(num))
        factor = max(math.ceil(coarse_s / self.bin_s), 1)
        per_joule: list[float | None] = []
        for begin in range(0, num, factor):
            part = range(begin, min(begin + factor, num))
            energies = [None if (w := total[place]) is None else w * widths[place] for place in part]
            known = [energy for energy in energies if energy is not None]
            energy_j = sum(known)
            done = sum(self.samples[place] for place in part)
            per_joule.append(done / energy_j if len(known) == len(energies) and energy_j > 0 else None)
        return (
            Binned(self.bin_s, {**power, "total": total}),
            Binned(self.bin_s, {"total": per_second}),
            Binned(self.bin_s * factor, {"total": tuple(per_joule)}),
        )

    def _total_w(self, place: int, power: dict[str, tuple[float | None, ...]]) -> float | None:
        """Sum over the components that there were; ``None`` where one of them is not known."""
        values = [power[name][place] for name, column in self.power.items() if column.expected_us[place] > 0]
        known = [value for value in values if value is not None]
        return sum(known) if known and len(known) == len(values) else None


def _by_two(values: list[float]) -> list[float]:
    """Each two neighbours added up; as long as before."""
    return [*map(sum, zip(values[::2], values[1::2], strict=True)), *([0.0] * (MAX_BINS // 2))]
