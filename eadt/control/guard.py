"""The guard: a policy around a policy that lets only sensible changes through.

It asks, in this order, and refuses with the numbers at the first no:

1. Would the change do anything at all?
2. Is the present state marked stable, or the last change too recent (cooldown)?
3. Is the worker count within the bounds, and can it hold the global batch? A count beyond a bound is
   cut to the bound. A count that cannot hold the batch is replaced by the nearest lower count that
   can and still moves the wanted way (going down, and with nothing lower within the bounds, the
   nearest higher one); where there is none, the change is refused with the counts that can.
4. Is it worth trying: is the present efficiency below ``energy_efficiency_threshold`` times the best
   of the run? Asked only once two setpoints have been measured, since with one measured there is
   nothing to compare and the first explorations must be possible; a threshold of 1 turns it off.
5. Is the target not known to be worse (hysteresis): was it measured lately at a lower efficiency?
6. Does it pay back its pause within the remaining run?

Of a mandatory change (a schedule's) only 1 and 3 are asked. The guard holds no state: what it needs to
know of the past is in the :class:`~eadt.control.policy.DecisionContext`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from eadt.control.batch import feasible_worker_counts
from eadt.control.observation import Observation
from eadt.control.policy import Change, DecisionContext, EnergyPolicy, Hold, workers_per_device
from eadt.control.setpoint import Setpoint
from eadt.units import format_duration, format_energy

HYSTERESIS_FRACTION = 0.02
"""A known setpoint counts as worse only when it was worse by more than this (noise)."""


@dataclass(frozen=True)
class GuardLimits:
    """The bounds of a run.

    Attributes:
        train_batch_size: Samples per optimizer step, whole job.
        max_micro_batch: Most samples of one rank's forward pass.
        min_workers: Fewest active workers.
        max_workers: Most active workers.
        cooldown_s: Least time between two changes in s.
        energy_efficiency_threshold: Fraction of the best efficiency of the run below which a change
            is worth trying, 0 to 1; 1 always tries.
    """

    train_batch_size: int
    max_micro_batch: int
    min_workers: int = 1
    max_workers: int = 2**31
    cooldown_s: float = 0.0
    energy_efficiency_threshold: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(f"need 1 <= min_workers <= max_workers: {self}")
        if not 0 <= self.energy_efficiency_threshold <= 1:
            raise ValueError(f"energy_efficiency_threshold must be 0 to 1: {self}")

    @property
    def feasible_workers(self) -> list[int]:
        """Worker counts within the bounds that can hold the batch, ascending."""
        return feasible_worker_counts(
            self.train_batch_size, self.max_micro_batch, self.min_workers, self.max_workers
        )


class Guard:
    """Wraps ``policy`` with ``limits``; implements :class:`eadt.control.policy.EnergyPolicy`.

    A refused change comes back as a :class:`~eadt.control.policy.Hold` whose ``wanted`` is the change.
    """

    def __init__(self, policy: EnergyPolicy, limits: GuardLimits) -> None:
        self._policy = policy
        self._limits = limits

    @property
    def limits(self) -> GuardLimits:
        """The bounds in force."""
        return self._limits

    def decide(self, observation: Observation, context: DecisionContext) -> Hold | Change:
        """See :class:`eadt.control.policy.EnergyPolicy`."""
        wanted = self._policy.decide(observation, context)
        if isinstance(wanted, Hold):
            return wanted
        now = observation.setpoint
        if wanted.setpoint == now:
            return Hold("The policy asks for the setpoint that is already in force.", "no_change", wanted)
        if not wanted.mandatory and (refusal := _refuse_too_soon(wanted, observation, context, self._limits)):
            return refusal
        change = self._fit_workers(wanted, observation)
        if isinstance(change, Hold) or change.mandatory:
            return change
        return (
            _refuse_not_worth_it(change, observation, context, self._limits)
            or _refuse_known_worse(change, observation, context)
            or _refuse_no_payback(change, observation, context)
            or change
        )

    def _fit_workers(self, change: Change, observation: Observation) -> Hold | Change:
        now, wanted = observation.setpoint.num_workers, change.setpoint.num_workers
        if wanted == now:
            return change
        limits = self._limits
        bounded = min(max(wanted, limits.min_workers), limits.max_workers)
        feasible = limits.feasible_workers
        if bounded == now or (bounded > now) != (wanted > now):
            fitted = now
        elif bounded in feasible:
            fitted = bounded
        else:
            low, high = min(now, bounded), max(now, bounded)
            if wanted > now:
                candidates = [count for count in feasible if low < count < high]
            else:
                below = [count for count in feasible if count < bounded]
                candidates = below or [count for count in feasible if low < count < high][:1]
            if not candidates:
                names = ", ".join(map(str, feasible)) or "none"
                return Hold(
                    f"{wanted} workers were wanted, but {bounded} cannot hold the global batch of "
                    f"{limits.train_batch_size} samples, nor can any count on the way from {now}; within "
                    f"the bounds of {limits.min_workers} to {limits.max_workers} workers the counts that "
                    f"can are: {names}.",
                    "refused_batch",
                    change,
                )
            fitted = candidates[-1]
        if fitted == wanted:
            return change
        target = _with_workers(change.setpoint, observation, fitted)
        bounds = f"the bounds are {limits.min_workers} to {limits.max_workers} workers"
        if target == observation.setpoint:
            return Hold(
                f"{wanted} workers were wanted, but {bounds} and {now} are in force.",
                "refused_bounds",
                change,
            )
        why = (
            bounds if fitted == bounded else f"a global batch of {limits.train_batch_size} does not allow it"
        )
        return replace(
            change,
            setpoint=target,
            reason=f"{change.reason} {wanted} workers were wanted; {why}, so {fitted} are taken.",
        )


def _with_workers(target: Setpoint, observation: Observation, num_workers: int) -> Setpoint:
    now = observation.setpoint
    if num_workers == now.num_workers:
        return target.with_(num_workers=now.num_workers, workers_per_gpu=now.workers_per_gpu)
    per_device = workers_per_device(num_workers, observation.num_gpus)
    return target.with_(num_workers=num_workers, workers_per_gpu=per_device)


def _refuse_too_soon(
    change: Change, observation: Observation, context: DecisionContext, limits: GuardLimits
) -> Hold | None:
    if context.stable_until_s is not None and observation.at_s < context.stable_until_s:
        return Hold(
            "The present state is marked stable for another "
            f"{format_duration(context.stable_until_s - observation.at_s)}, after a change from it had "
            "to be taken back.",
            "refused_stable",
            change,
        )
    if context.last_change_at_s is not None:
        left_s = context.last_change_at_s + limits.cooldown_s - observation.at_s
        if left_s > 0:
            return Hold(
                f"The last change was {format_duration(observation.at_s - context.last_change_at_s)} ago; "
                f"the cooldown of {format_duration(limits.cooldown_s)} lasts another "
                f"{format_duration(left_s)}.",
                "refused_cooldown",
                change,
            )
    return None


def _refuse_not_worth_it(
    change: Change, observation: Observation, context: DecisionContext, limits: GuardLimits
) -> Hold | None:
    threshold, best, present = (
        limits.energy_efficiency_threshold,
        context.best_efficiency,
        observation.efficiency,
    )
    if threshold >= 1 or best is None or present is None or context.num_setpoints_seen < 2:
        return None
    if present < threshold * best:
        return None
    return Hold(
        f"The present efficiency of {present:.3g} samples/J is {present / best:.0%} of the best seen in this "
        f"run ({best:.3g} samples/J); a change is worth trying only below {threshold:.0%}.",
        "refused_efficient_enough",
        change,
    )


def _refuse_known_worse(change: Change, observation: Observation, context: DecisionContext) -> Hold | None:
    known, present = context.known_efficiencies.get(change.setpoint), observation.efficiency
    if known is None or present is None or known >= present * (1 - HYSTERESIS_FRACTION):
        return None
    return Hold(
        f"{change.setpoint.describe()} was measured lately at {known:.3g} samples/J, worse than the present "
        f"{present:.3g} samples/J.",
        "refused_known_worse",
        change,
    )


def _refuse_no_payback(change: Change, observation: Observation, context: DecisionContext) -> Hold | None:
    if context.remaining_s is None or observation.power_w is None:
        return None
    gain = change.expected.efficiency_gain_fraction
    cost_j = context.pause_s * observation.power_w
    saved_j = context.remaining_s * observation.power_w * gain / (1 + gain)
    if saved_j > cost_j:
        return None
    return Hold(
        f"The change would not pay back: its pause of about {format_duration(context.pause_s)} costs "
        f"{format_energy(cost_j)}, and in the remaining {format_duration(context.remaining_s)} a gain of "
        f"{gain:.0%} would save {format_energy(saved_j)}.",
        "refused_no_payback",
        change,
    )
