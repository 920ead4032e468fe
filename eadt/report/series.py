"""A run over time, for plots: power, throughput, efficiency, workers, share, loss.

Owns the binning. Every series is on the report's time axis (seconds since the run began, without
the time between an interruption and its resumption) and is downsampled to at most
:data:`MAX_POINTS` points. A bin in which something was not measured is ``None``, never zero.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from eadt.report.accounting import Account

_T = TypeVar("_T")
MAX_POINTS = 2000
_POWER_BINS = 500
_EFFICIENCY_BINS = 120
_MIN_MEASURED_FRACTION = 0.5
"""A bin of which less than this was measured has no mean power."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BinnedSeries(_Frozen):
    """Means over bins of equal width."""

    bin_s: float = Field(description="Width of a bin in s.")
    at_s: list[float] = Field(description="Middle of each bin, s since the run began.")
    values: dict[str, list[float | None]] = Field(description="By name; null where not measured.")


class SetpointSeries(_Frozen):
    """The setpoint in force from each moment on."""

    at_s: list[float] = Field(description="s since the run began.")
    num_workers: list[int | None] = Field(description="Active workers of the whole job.")
    thread_percentage: list[int | None] = Field(description="Each engine's share of its device, %.")


class LossSeries(_Frozen):
    """Loss by step."""

    step: list[int] = Field(description="Optimizer step, from 1.")
    at_s: list[float] = Field(description="End of the step, s since the run began.")
    loss: list[float | None] = Field(description="Mean loss; null where it was not finite.")


class UseBand(_Frozen):
    """A stretch of the job's time with one use."""

    from_s: float = Field(description="s since the run began.")
    to_s: float = Field(description="s since the run began.")
    use: str = Field(description="useful, restart, checkpoint, idle or lost.")


class Series(_Frozen):
    """Everything that the plots show."""

    power_w: BinnedSeries = Field(description="Mean power in W by component, and in total.")
    throughput_samples_per_s: BinnedSeries = Field(description="Samples of steps that count, per s.")
    efficiency_samples_per_j: BinnedSeries = Field(description="Samples of steps that count, per J.")
    setpoint: SetpointSeries
    loss: LossSeries
    validation_loss: LossSeries
    uses: list[UseBand] = Field(description="What the job's time was for.")


@dataclass
class _Bins:
    """Amounts that are spread evenly over intervals, collected in bins of one width from 0 to the end."""

    end_s: float
    width_s: float
    num: int
    amounts: list[float] = field(init=False)
    seconds: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.amounts = [0.0] * self.num
        self.seconds = [0.0] * self.num

    def add(self, t0: float, t1: float, amount: float) -> None:
        """Spread ``amount`` evenly over [t0, t1]."""
        if t1 <= t0:
            return
        first = max(int(t0 / self.width_s), 0)
        for place in range(first, self.num):
            left = place * self.width_s
            if left >= t1:
                break
            overlap = min(t1, left + self.width_s) - max(t0, left)
            if overlap > 0:
                self.seconds[place] += overlap
                self.amounts[place] += amount * overlap / (t1 - t0)

    def middles(self) -> list[float]:
        """The middle of each bin in s."""
        return [round(place * self.width_s + self.seconds_in(place) / 2, 3) for place in range(self.num)]

    def seconds_in(self, place: int) -> float:
        """Length of a bin in s: the last one may be cut off by the end."""
        return min(self.width_s, max(self.end_s - place * self.width_s, 1e-3))


def _end_s(account: Account) -> float:
    ends = [end for _, end, _ in account.timeline]
    return max([*ends, *(session.offset_s + session.seconds for session in account.sessions), 1e-3])


def _empty(end_s: float, at_least_s: float, num: int) -> _Bins:
    width_s = max(end_s / num, at_least_s)
    return _Bins(end_s, width_s, max(math.ceil(end_s / width_s - 1e-9), 1))


def _round(value: float) -> float:
    return float(f"{value:.6g}")


def _sampling_s(account: Account) -> float:
    lengths = [
        piece.t1 - piece.t0 for base, _ in account.bases for piece in base.energy if piece.t1 > piece.t0
    ]
    return statistics.median(lengths) if lengths else 1.0


def _power(
    account: Account, end_s: float, at_least_s: float, num: int
) -> tuple[_Bins, dict[str, list[float | None]]]:
    """Mean power per bin by component, over all nodes, and its ``total``.

    Known only where every node that should have measured in a bin did so for most of it: what one
    node did not measure is never inferred from the others.
    """
    frame = _empty(end_s, at_least_s, num)
    sources: dict[str, list[tuple[_Bins, _Bins]]] = {}  # (should be measured, was measured) per time base
    for base, _ in account.bases:
        span = base.span
        if span is None:
            continue
        of_base: dict[str, _Bins] = {}
        for component in base.components:
            should, did = _empty(end_s, at_least_s, num), _empty(end_s, at_least_s, num)
            should.add(account.axis_s(base, span[0]), account.axis_s(base, span[1]), 0.0)
            sources.setdefault(component, []).append((should, did))
            of_base[component] = did
        for piece in base.energy:
            if piece.energy_j is not None:
                t0, t1 = account.axis_s(base, piece.t0), account.axis_s(base, piece.t1)
                of_base[piece.component].add(t0, t1, piece.energy_j)
    by_component: dict[str, list[float | None]] = {
        component: [
            _mean_power(sources[component], place, frame.seconds_in(place)) for place in range(frame.num)
        ]
        for component in sorted(sources)
    }
    total: list[float | None] = []
    for place in range(frame.num):
        present = [c for c in by_component if any(should.seconds[place] > 0 for should, _ in sources[c])]
        known = [value for c in present if (value := by_component[c][place]) is not None]
        total.append(math.fsum(known) if known and len(known) == len(present) else None)
    return frame, by_component | {"total": total}


def _mean_power(of_nodes: list[tuple[_Bins, _Bins]], place: int, bin_s: float) -> float | None:
    energy_j = covered_s = 0.0
    for should, did in of_nodes:
        if should.seconds[place] <= 0:
            continue
        if did.seconds[place] < _MIN_MEASURED_FRACTION * should.seconds[place]:
            return None
        energy_j += did.amounts[place] / did.seconds[place] * should.seconds[place]
        covered_s += should.seconds[place]
    return energy_j / min(covered_s, bin_s) if covered_s else None


def _rounded(values: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    return {
        name: [None if value is None else _round(value) for value in column]
        for name, column in values.items()
    }


def _throughput(account: Account, end_s: float, at_least_s: float, num: int) -> _Bins:
    bins = _empty(end_s, at_least_s, num)
    for base, step in account.kept_steps:
        amount = float(step.row.get("samples") or 0)
        bins.add(account.axis_s(base, step.t0), account.axis_s(base, step.t1), amount)
    return bins


def _setpoints(account: Account) -> SetpointSeries:
    points: list[tuple[float, int | None, int | None]] = []
    for booked in account.booked.get("generation", ()):
        if booked.row.get("event") == "started":
            setpoint = booked.row.get("setpoint") or {}
            workers = booked.row.get("world_size") or setpoint.get("num_workers")
            points.append((booked.at_s, workers, setpoint.get("mps_active_thread_percentage")))
    points = _thin(points)
    return SetpointSeries(
        at_s=[round(at_s, 3) for at_s, _, _ in points],
        num_workers=[workers for _, workers, _ in points],
        thread_percentage=[share for _, _, share in points],
    )


def _thin(points: list[_T]) -> list[_T]:
    """At most :data:`MAX_POINTS` of ``points``, evenly, with the first and the last."""
    if len(points) <= MAX_POINTS:
        return points
    step = (len(points) - 1) / (MAX_POINTS - 1)
    return [points[round(place * step)] for place in range(MAX_POINTS)]


def _losses(points: list[tuple[int, float, float | None]]) -> LossSeries:
    kept = _thin(points)
    return LossSeries(
        step=[step for step, _, _ in kept],
        at_s=[round(at_s, 3) for _, at_s, _ in kept],
        loss=[loss for _, _, loss in kept],
    )


def build_series(account: Account) -> Series:
    """The plots' data of a run."""
    end_s = _end_s(account)
    sampling_s = _sampling_s(account)
    step_lengths = [step.t1 - step.t0 for _, step in account.kept_steps]
    step_s = statistics.median(step_lengths) if step_lengths else 0.0
    frame, power = _power(account, end_s, sampling_s, _POWER_BINS)
    throughput = _throughput(account, end_s, sampling_s, _POWER_BINS)
    # Efficiency is a quotient of two noisy means: wider bins, a few steps and samples in each.
    coarse_s = max(3 * sampling_s, 2 * step_s)
    coarse, coarse_power = _power(account, end_s, coarse_s, _EFFICIENCY_BINS)
    coarse_samples = _throughput(account, end_s, coarse_s, _EFFICIENCY_BINS)
    efficiency = [
        None if not power_w else samples / (power_w * coarse.seconds_in(place))
        for place, (samples, power_w) in enumerate(
            zip(coarse_samples.amounts, coarse_power["total"], strict=True)
        )
    ]
    per_second: list[float | None] = [
        amount / throughput.seconds_in(place) for place, amount in enumerate(throughput.amounts)
    ]
    bands = [(start, end, use) for start, end, use in account.timeline if end - start >= end_s / MAX_POINTS]
    return Series(
        power_w=BinnedSeries(bin_s=frame.width_s, at_s=frame.middles(), values=_rounded(power)),
        throughput_samples_per_s=BinnedSeries(
            bin_s=throughput.width_s, at_s=throughput.middles(), values=_rounded({"total": per_second})
        ),
        efficiency_samples_per_j=BinnedSeries(
            bin_s=coarse.width_s, at_s=coarse.middles(), values=_rounded({"total": efficiency})
        ),
        setpoint=_setpoints(account),
        loss=_losses(
            [
                (step.step, account.axis_s(base, step.t1), step.row.get("loss"))
                for base, step in account.kept_steps
            ]
        ),
        validation_loss=_losses(
            [(int(booked.row["step"]), booked.at_s, booked.row.get("loss")) for booked in account.validations]
        ),
        uses=[
            UseBand(from_s=round(start, 3), to_s=round(end, 3), use=use) for start, end, use in _thin(bands)
        ],
    )
