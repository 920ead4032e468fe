"""What the guard lets through, adjusts and refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eadt.control.guard import Guard, GuardLimits
from eadt.control.observation import Observation
from eadt.control.policy import Action, Change, DecisionContext, Expectation, Hold
from eadt.control.setpoint import Setpoint

NO_CONTEXT = DecisionContext()


class FixedPolicy:
    """Always asks for the same setpoint."""

    def __init__(self, setpoint: Setpoint, *, mandatory: bool = False) -> None:
        self._change = Change(
            Action.SCHEDULED, setpoint, "A test asks for it.", Expectation(), mandatory=mandatory
        )

    def decide(self, observation: Observation, context: DecisionContext) -> Hold | Change:
        return self._change


def observe(setpoint: Setpoint, *, num_gpus: int = 3, efficiency: float = 0.1) -> Observation:
    return Observation(1000.0, 60.0, setpoint, num_gpus, samples_per_second=efficiency * 600, power_w=600.0)


def guarded(
    now: Setpoint,
    wanted: Setpoint,
    context: DecisionContext = NO_CONTEXT,
    *,
    batch: int = 72,
    min_workers: int = 1,
    max_workers: int = 12,
    cooldown_s: float = 0.0,
    threshold: float = 1.0,
    mandatory: bool = False,
    efficiency: float = 0.1,
) -> Hold | Change:
    limits = GuardLimits(batch, 4, min_workers, max_workers, cooldown_s, threshold)
    policy = FixedPolicy(wanted, mandatory=mandatory)
    return Guard(policy, limits).decide(observe(now, efficiency=efficiency), context)


def test_a_sensible_change_passes_unchanged() -> None:
    decision = guarded(Setpoint(6, 2, 50), Setpoint(9, 3, 35))
    assert isinstance(decision, Change)
    assert decision.setpoint == Setpoint(9, 3, 35)
    assert decision.reason == "A test asks for it."


def test_a_change_that_changes_nothing_is_refused_even_when_mandatory() -> None:
    now = Setpoint(6, 2, 50)
    decision = guarded(now, now, mandatory=True)
    assert isinstance(decision, Hold)
    assert decision.kind == "no_change"
    assert decision.wanted is not None


@pytest.mark.parametrize(
    ("now", "wanted", "batch", "bounds", "taken"),
    [
        (6, 9, 64 * 6, (1, 12), 8),  # 9 does not divide 384; 8 does, and is more than 6
        (6, 9, 72, (1, 8), 8),  # the bound
        (6, 9, 60, (1, 8), 6),  # bound 8 cannot hold it, nor can 7: refused
        (6, 9, 12, (1, 12), 6),  # no count in 7 to 9: refused
        (6, 5, 72, (1, 12), 4),  # going down: the nearest lower
        (6, 5, 72, (4, 12), 4),
        (9, 7, 72, (5, 12), 6),
        (9, 2, 72, (5, 12), 6),  # cut to 5, which cannot; nothing lower in the bounds: nearest higher
        (9, 1, 72, (4, 12), 4),  # cut to the lower bound
        (6, 1, 72, (6, 12), 6),  # already at the bound: refused
    ],
)
def test_worker_counts_are_fitted_to_bounds_and_batch_in_the_wanted_direction(
    now: int, wanted: int, batch: int, bounds: tuple[int, int], taken: int
) -> None:
    decision = guarded(
        Setpoint(now, 3, 50),
        Setpoint(wanted, 3, 50),
        batch=batch,
        min_workers=bounds[0],
        max_workers=bounds[1],
    )
    if taken == now:
        assert isinstance(decision, Hold)
        assert decision.kind in ("refused_batch", "refused_bounds")
        assert decision.wanted is not None
        assert decision.wanted.setpoint.num_workers == wanted
        return
    assert isinstance(decision, Change)
    assert decision.setpoint.num_workers == taken
    assert decision.setpoint.workers_per_gpu == -(-taken // 3)
    assert f"so {taken} are taken" in decision.reason


def test_a_refused_batch_names_the_counts_that_can() -> None:
    decision = guarded(Setpoint(6, 2, 50), Setpoint(9, 3, 35), batch=12)
    assert isinstance(decision, Hold)
    assert "1, 2, 3, 4, 6, 12" in decision.reason
    assert "12 samples" in decision.reason


def test_at_the_workers_bound_the_rest_of_the_change_still_happens() -> None:
    decision = guarded(Setpoint(6, 2, 50), Setpoint(9, 3, 35), max_workers=6)
    assert isinstance(decision, Change)
    assert decision.setpoint == Setpoint(6, 2, 35)
    assert "the bounds are 1 to 6 workers" in decision.reason


@given(
    st.integers(1, 16),
    st.integers(1, 16),
    st.sampled_from([1, 7, 12, 30, 48, 64, 72]),
    st.integers(1, 6),
    st.integers(6, 16),
)
def test_whatever_passes_is_within_bounds_holds_the_batch_and_moves_the_wanted_way(
    now: int, wanted: int, batch: int, least: int, most: int
) -> None:
    decision = guarded(
        Setpoint(now, 1, 50), Setpoint(wanted, 1, 50), batch=batch, min_workers=least, max_workers=most
    )
    if isinstance(decision, Change):
        taken = decision.setpoint.num_workers
        assert least <= taken <= most
        assert batch % taken == 0
        assert (taken > now) == (wanted > now)
        assert taken != now


def test_a_stable_state_is_left_alone_until_its_time_is_over() -> None:
    now, wanted = Setpoint(6, 2, 50), Setpoint(6, 2, 40)
    held = guarded(now, wanted, DecisionContext(stable_until_s=1000.5))
    assert isinstance(held, Hold)
    assert held.kind == "refused_stable"
    assert isinstance(guarded(now, wanted, DecisionContext(stable_until_s=1000.0)), Change)


def test_the_cooldown_after_a_change() -> None:
    now, wanted = Setpoint(6, 2, 50), Setpoint(6, 2, 40)
    held = guarded(now, wanted, DecisionContext(last_change_at_s=900.0), cooldown_s=101.0)
    assert isinstance(held, Hold)
    assert held.kind == "refused_cooldown"
    assert isinstance(guarded(now, wanted, DecisionContext(last_change_at_s=900.0), cooldown_s=100.0), Change)


def test_a_mandatory_change_is_bound_by_the_batch_only() -> None:
    context = DecisionContext(
        stable_until_s=2000.0, last_change_at_s=999.0, remaining_s=1.0, pause_s=100.0, best_efficiency=0.1
    )
    now = Setpoint(6, 2, 50)
    assert isinstance(guarded(now, Setpoint(4, 2, 50), context, cooldown_s=500, mandatory=True), Change)
    refused = guarded(now, Setpoint(7, 3, 50), context, mandatory=True)
    assert isinstance(refused, Hold)
    assert refused.kind == "refused_batch"


@pytest.mark.parametrize(
    ("efficiency", "seen", "threshold", "passes"),
    [
        (0.0625, 2, 0.5, False),  # exactly at the threshold: not below it
        (0.0624, 2, 0.5, True),
        (0.125, 2, 0.75, False),
        (0.125, 1, 0.75, True),  # first exploration
        (0.125, 2, 1.0, True),  # a threshold of 1 always tries
        (0.01, 2, 0.0, False),  # a threshold of 0 never tries
    ],
)
def test_a_change_is_worth_trying_below_a_fraction_of_the_best_efficiency(
    efficiency: float, seen: int, threshold: float, passes: bool
) -> None:
    context = DecisionContext(best_efficiency=0.125, num_setpoints_seen=seen)
    decision = guarded(
        Setpoint(6, 2, 50), Setpoint(6, 2, 40), context, threshold=threshold, efficiency=efficiency
    )
    assert isinstance(decision, Change) == passes
    if isinstance(decision, Hold):
        assert decision.kind == "refused_efficient_enough"


def test_a_setpoint_that_was_measured_to_be_worse_is_not_tried_again() -> None:
    now, wanted = Setpoint(6, 2, 50), Setpoint(6, 2, 40)
    worse = guarded(now, wanted, DecisionContext(known_efficiencies={wanted: 0.09}))
    assert isinstance(worse, Hold)
    assert worse.kind == "refused_known_worse"
    about_equal = DecisionContext(known_efficiencies={wanted: 0.099})
    assert isinstance(guarded(now, wanted, about_equal), Change)


def test_a_change_that_cannot_pay_back_its_pause_is_refused() -> None:
    now, wanted = Setpoint(6, 2, 50), Setpoint(6, 2, 40)
    # A gain of 5 % saves 1/21 of the energy: 14 s are paid back after 294 s.
    short = guarded(now, wanted, DecisionContext(remaining_s=290.0, pause_s=14.0))
    assert isinstance(short, Hold)
    assert short.kind == "refused_no_payback"
    assert "8.40 kJ" in short.reason
    assert isinstance(guarded(now, wanted, DecisionContext(remaining_s=300.0, pause_s=14.0)), Change)
    assert isinstance(guarded(now, wanted, DecisionContext(remaining_s=None, pause_s=14.0)), Change)


@pytest.mark.parametrize(
    "wrong", [{"min_workers": 0}, {"min_workers": 5, "max_workers": 4}, {"energy_efficiency_threshold": 75}]
)
def test_limits_that_make_no_sense_cannot_be_made(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="GuardLimits"):
        GuardLimits(train_batch_size=8, max_micro_batch=4, **wrong)
