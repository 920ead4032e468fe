"""Outcome verification: did a change do what it was expected to do?

After a change, two to three measured windows are averaged and compared with the window before it, as
ratios after/before of power, throughput and efficiency. Each known ratio has to lie in the range that
the policy stated in its :class:`~eadt.control.policy.Expectation`; otherwise the job goes back to the
setpoint before. So what counts as success is stated with each action, by the policy. For the threshold
policy:

- *decrease*: power fell (by 1 % or more), throughput fell by no more than the accepted loss, and
  efficiency is not worse (2 % allowed for noise).
- *scale replicas*: power rose by at most 5 % beyond what the larger share of the device explains,
  throughput fell by no more than the accepted loss, and efficiency is not worse.
- *increase*: throughput and efficiency are not worse; power is free to rise.

"Not worse" rather than "better", since going back costs a second pause: a change that moved nothing
measurable is kept. A mandatory change (a schedule's) is measured in the same way and always kept.

A window in which power or throughput is unknown is waited out, up to three times the wanted number of
windows; then what is known decides. If no optimizer step has ended by then although steps ended before
the change, training has stalled, and the job goes back.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from eadt.control.observation import Observation
from eadt.control.policy import Action, Change, Expectation, RatioRange
from eadt.control.setpoint import Setpoint
from eadt.control.window import mean_observation
from eadt.units import Quality

_PATIENCE_FACTOR = 3
"""Windows waited for in all, in units of the wanted number of measured windows."""


@dataclass(frozen=True)
class Measured:
    """What a change did.

    Attributes:
        power_w: Mean whole-job power after the change in W; ``None`` when unknown.
        samples_per_second: Mean whole-job throughput after it; ``None`` when unknown.
        efficiency_samples_per_j: Mean efficiency after it; ``None`` when unknown.
        power_ratio: Power after/before; ``None`` when either is unknown.
        throughput_ratio: Throughput after/before; ``None`` when either is unknown.
        efficiency_ratio: Efficiency after/before; ``None`` when either is unknown.
        num_windows: Measured windows that the means are over.
        quality: The worst quality among the readings; ``None`` without any.
        verdict: One sentence: kept or taken back, and why.
    """

    power_w: float | None
    samples_per_second: float | None
    efficiency_samples_per_j: float | None
    power_ratio: float | None
    throughput_ratio: float | None
    efficiency_ratio: float | None
    num_windows: int
    quality: str | None
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the ledger and for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Pending:
    """Not known yet.

    Attributes:
        num_windows_left: Measured windows that are still needed.
    """

    num_windows_left: int


@dataclass(frozen=True)
class Kept:
    """The change did what was expected, and stays.

    Attributes:
        measured: What it did.
        after: The mean observation after the change; ``None`` when no window could be measured.
    """

    measured: Measured
    after: Observation | None


@dataclass(frozen=True)
class Revert:
    """The change did not do what was expected.

    Attributes:
        setpoint: Where to go back to.
        measured: What it did.
        after: The mean observation after the change; ``None`` when no window could be measured.
        why: Full sentence with the numbers.
    """

    setpoint: Setpoint
    measured: Measured
    after: Observation | None
    why: str


class OutcomeVerifier:
    """Verifies one change at a time; a state machine fed with observations.

    Args:
        intervals: Measured windows to average, 2 to 3 usually.
    """

    def __init__(self, intervals: int = 2) -> None:
        if intervals < 1:
            raise ValueError(f"intervals must be at least 1, not {intervals}")
        self._intervals = intervals
        self._change: Change | None = None
        self._before: Observation | None = None
        self._windows: list[Observation] = []
        self._num_unmeasured = 0

    @property
    def active(self) -> bool:
        """Whether a change is being verified."""
        return self._change is not None

    @property
    def mandatory(self) -> bool:
        """Whether the change that is being verified is a mandatory one."""
        return self._change is not None and self._change.mandatory

    def start(self, change: Change, before: Observation) -> None:
        """Begin verifying ``change``, which has just been applied; ``before`` is what it started from."""
        self.cancel()
        self._change = change
        self._before = before

    def cancel(self) -> None:
        """Forget the change that is being verified, if any."""
        self._change = None
        self._before = None
        self._windows = []
        self._num_unmeasured = 0

    def observe(self, observation: Observation) -> Pending | Kept | Revert:
        """Take one window after the change. Windows at another setpoint are passed over.

        Raises:
            RuntimeError: Nothing is being verified.
        """
        change, before = self._change, self._before
        if change is None or before is None:
            raise RuntimeError("no change is being verified")
        if observation.setpoint == change.setpoint:
            self._windows.append(observation)
            if observation.efficiency is None:
                self._num_unmeasured += 1
        num_left = self._intervals - (len(self._windows) - self._num_unmeasured)
        if num_left > 0 and len(self._windows) < self._intervals * _PATIENCE_FACTOR:
            return Pending(num_left)
        after = mean_observation(self._windows)
        failures = _failures(change.expected, before, after)
        reverted = bool(failures) and not change.mandatory
        verdict = _verdict(change, before, after, failures, reverted=reverted)
        measured = self._measure(before, after, verdict)
        self.cancel()
        if reverted:
            return Revert(before.setpoint, measured, after, verdict)
        return Kept(measured, after)

    def conclude(self, verdict: str) -> Measured:
        """End without a judgement, with what was measured so far; ``verdict`` says why.

        Raises:
            RuntimeError: Nothing is being verified.
        """
        if self._before is None:
            raise RuntimeError("no change is being verified")
        after = mean_observation(self._windows) if self._windows else None
        measured = self._measure(self._before, after, verdict)
        self.cancel()
        return measured

    def _measure(self, before: Observation, after: Observation | None, verdict: str) -> Measured:
        power_w = after.power_w if after else None
        throughput = after.samples_per_second if after else None
        efficiency = after.efficiency if after else None
        return Measured(
            power_w=power_w,
            samples_per_second=throughput,
            efficiency_samples_per_j=efficiency,
            power_ratio=_ratio(power_w, before.power_w),
            throughput_ratio=_ratio(throughput, before.samples_per_second),
            efficiency_ratio=_ratio(efficiency, before.efficiency),
            num_windows=len(self._windows) - self._num_unmeasured,
            quality=str(after.quality) if after else None,
            verdict=verdict,
        )

    def to_state(self) -> dict[str, Any] | None:
        """JSON-serialisable state; ``None`` when nothing is being verified."""
        if self._change is None or self._before is None:
            return None
        return {
            "change": change_to_state(self._change),
            "before": observation_to_state(self._before),
            "windows": [observation_to_state(window) for window in self._windows],
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from what :meth:`to_state` gave."""
        self.cancel()
        if state is None:
            return
        self.start(change_from_state(state["change"]), observation_from_state(state["before"]))
        self._windows = [observation_from_state(window) for window in state["windows"]]
        self._num_unmeasured = sum(window.efficiency is None for window in self._windows)


def _ratio(after: float | None, before: float | None) -> float | None:
    return None if after is None or not before else after / before


def _failures(expected: Expectation, before: Observation, after: Observation) -> list[str]:
    if after.samples_per_second is None and before.samples_per_second is not None:
        return [f"no optimizer step ended in {after.window_s:.0f} s after the change"]
    tested: list[tuple[str, RatioRange, float | None]] = [
        ("power", expected.power, _ratio(after.power_w, before.power_w)),
        (
            "throughput",
            expected.throughput,
            _ratio(after.samples_per_second, before.samples_per_second),
        ),
        ("efficiency", expected.efficiency, _ratio(after.efficiency, before.efficiency)),
    ]
    return [
        f"{name} is at {ratio:.1%} of what it was, where {allowed.describe()} was expected"
        for name, allowed, ratio in tested
        if ratio is not None and not allowed.contains(ratio)
    ]


def _verdict(
    change: Change, before: Observation, after: Observation, failures: list[str], *, reverted: bool
) -> str:
    if reverted:
        return f"Taken back, since {'; '.join(failures)}."
    ratios = [
        f"{name} at {ratio:.1%}"
        for name, ratio in (
            ("power", _ratio(after.power_w, before.power_w)),
            ("throughput", _ratio(after.samples_per_second, before.samples_per_second)),
            ("efficiency", _ratio(after.efficiency, before.efficiency)),
        )
        if ratio is not None
    ]
    seen = f"{', '.join(ratios)} of what it was" if ratios else "what it did could not be measured"
    if change.mandatory:
        return f"Kept because it was scheduled: {seen}."
    return f"Kept: {seen}."


def observation_to_state(observation: Observation) -> dict[str, Any]:
    """JSON-serialisable form of an observation, without the derived values."""
    return asdict(observation) | {"quality": str(observation.quality)}


def observation_from_state(state: dict[str, Any]) -> Observation:
    """The inverse of :func:`observation_to_state`."""
    return Observation(
        **(state | {"setpoint": Setpoint(**state["setpoint"]), "quality": Quality(state["quality"])})
    )


def change_to_state(change: Change) -> dict[str, Any]:
    """JSON-serialisable form of a change."""
    return asdict(change) | {"action": str(change.action)}


def change_from_state(state: dict[str, Any]) -> Change:
    """The inverse of :func:`change_to_state`."""
    return Change(
        **(
            state
            | {
                "action": Action(state["action"]),
                "setpoint": Setpoint(**state["setpoint"]),
                "expected": Expectation.from_dict(state["expected"]),
            }
        )
    )
