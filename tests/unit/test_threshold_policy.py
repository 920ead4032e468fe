"""The decision matrix of the threshold policy, its worked examples and its boundary values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eadt.config import PolicyConfig
from eadt.control.factory import make_policy
from eadt.control.observation import Observation
from eadt.control.policy import (
    Action,
    Change,
    DecisionContext,
    EnergyPolicy,
    Hold,
    HoldPolicy,
    RatioRange,
    ScheduleEntry,
    SchedulePolicy,
)
from eadt.control.setpoint import Setpoint
from eadt.control.threshold import ThresholdPolicy

NO_CONTEXT = DecisionContext()


def observe(
    share: int,
    workers: int,
    power_per_gpu_w: float | None,
    efficiency: float | None,
    *,
    num_gpus: int = 3,
) -> Observation:
    power_w = None if power_per_gpu_w is None else power_per_gpu_w * num_gpus
    throughput = None if efficiency is None or power_w is None else efficiency * power_w
    setpoint = Setpoint(workers, -(-workers // num_gpus), share)
    return Observation(300.0, 300.0, setpoint, num_gpus, throughput, power_w, num_steps=10)


def decide(observation: Observation, policy: EnergyPolicy | None = None) -> Hold | Change:
    return (policy or ThresholdPolicy()).decide(observation, NO_CONTEXT)


@pytest.mark.parametrize(
    ("share", "workers", "power_w", "efficiency", "action", "share_after", "workers_after"),
    [
        # the design's worked examples, with 3 GPUs
        (50, 6, 280, 0.08, "decrease", 40, 6),
        (50, 6, 270, 0.22, "scale_replicas", 35, 9),
        (50, 6, 180, 0.08, "increase", 60, 6),
        (90, 6, 180, 0.08, "increase", 100, 3),
        # bounds of the share
        (30, 6, 280, 0.08, "decrease", 25, 6),
        (35, 6, 270, 0.22, "scale_replicas", 25, 9),
        (95, 6, 180, 0.08, "increase", 100, 3),
        # bounds of the workers: at most 4 per GPU
        (50, 11, 270, 0.22, "scale_replicas", 35, 12),
        (50, 12, 270, 0.22, "scale_replicas", 35, 12),
        # at 100 % with more than one worker a GPU: one per GPU
        (100, 6, 180, 0.08, "increase", 100, 3),
        # low efficiency at low power is the increase rule, whichever of the two marks it is below
        (50, 6, 199.9, 0.199, "increase", 60, 6),
    ],
)
def test_rules_and_worked_examples(
    share: int,
    workers: int,
    power_w: float,
    efficiency: float,
    action: str,
    share_after: int,
    workers_after: int,
) -> None:
    decision = decide(observe(share, workers, power_w, efficiency))
    assert isinstance(decision, Change)
    assert decision.action == action
    assert decision.setpoint.mps_active_thread_percentage == share_after
    assert decision.setpoint.num_workers == workers_after
    assert decision.setpoint.workers_per_gpu == -(-workers_after // 3)
    assert f"{power_w:.1f} W" in decision.reason
    assert f"{share} %" in decision.reason
    assert f"{share_after} %" in decision.reason
    assert decision.expected.summary.endswith(".")


@pytest.mark.parametrize(
    ("power_w", "efficiency", "action"),
    [
        (250.0, 0.08, "maintain"),
        (250.5, 0.08, "decrease"),
        (250.0, 0.15, "maintain"),
        (250.5, 0.15, "scale_replicas"),
        (200.0, 0.08, "maintain"),
        (199.5, 0.08, "increase"),
        (199.5, 0.25, "maintain"),
        (225.0, 0.05, "maintain"),
        (300.0, 0.5, "scale_replicas"),
    ],
)
def test_thresholds_are_strict(power_w: float, efficiency: float, action: str) -> None:
    decision = decide(observe(50, 6, power_w, efficiency))
    assert (str(decision.action) if isinstance(decision, Change) else decision.kind) == action


def test_an_efficiency_exactly_on_a_mark_matches_no_rule_for_it() -> None:
    setpoint = Setpoint(2, 2, 50)
    on_low = Observation(0.0, 60.0, setpoint, 1, samples_per_second=32.0, power_w=256.0)
    policy = ThresholdPolicy(efficiency_low=0.125, efficiency_high=0.25)
    assert on_low.efficiency == 0.125
    assert isinstance(decide(on_low, policy), Hold)
    on_high = Observation(0.0, 60.0, setpoint, 1, samples_per_second=32.0, power_w=128.0)
    assert on_high.efficiency == 0.25
    assert isinstance(decide(on_high, policy), Hold)


def test_power_in_the_rules_is_per_device_and_efficiency_is_of_the_whole_job() -> None:
    observation = Observation(0.0, 60.0, Setpoint(6, 2, 50), 3, samples_per_second=60.0, power_w=600.0)
    decision = decide(observation)
    assert isinstance(decision, Hold)
    assert "200.0 W per device at 0.1 samples/J" in decision.reason


@pytest.mark.parametrize(
    ("observation", "kind"),
    [
        (observe(25, 6, 280, 0.08), "decrease_at_bound"),
        (observe(20, 6, 280, 0.08), "decrease_at_bound"),
        (observe(25, 12, 270, 0.22), "scale_replicas_at_bound"),
        (observe(25, 15, 270, 0.22), "scale_replicas_at_bound"),
        (observe(100, 3, 180, 0.08), "increase_at_bound"),
        (observe(50, 6, None, None), "power_unknown"),
        (observe(50, 6, 280, None), "efficiency_unknown"),
    ],
)
def test_holds_at_the_bounds_and_when_something_is_unknown(observation: Observation, kind: str) -> None:
    decision = decide(observation)
    assert isinstance(decision, Hold)
    assert decision.kind == kind
    assert decision.reason.endswith(".")


@given(
    share=st.integers(1, 100),
    workers=st.integers(1, 40),
    num_gpus=st.integers(1, 8),
    power_w=st.floats(1, 700),
    efficiency=st.floats(0.001, 1),
)
def test_no_rule_moves_a_value_against_its_direction_or_beyond_its_bound(
    share: int, workers: int, num_gpus: int, power_w: float, efficiency: float
) -> None:
    observation = observe(share, workers, power_w, efficiency, num_gpus=num_gpus)
    decision = decide(observation)
    if isinstance(decision, Hold):
        return
    after = decision.setpoint
    assert after != observation.setpoint
    if decision.action is Action.INCREASE:
        assert share <= after.mps_active_thread_percentage <= 100
        assert after.num_workers in (workers, num_gpus)
    else:
        assert min(share, 25) <= after.mps_active_thread_percentage <= share
        assert workers <= after.num_workers <= max(workers, 4 * num_gpus)


def test_other_numbers_are_taken_from_the_configuration() -> None:
    policy = make_policy(
        PolicyConfig(
            power_high_w=30,
            power_low_w=20,
            efficiency_low=0.5,
            efficiency_high=1.0,
            thread_decrease_step=7,
            thread_increase_step=70,
            thread_scale_step=20,
            min_thread_percentage=40,
            max_workers_per_gpu=2,
            max_throughput_loss_fraction=0.3,
        )
    )
    lower = policy.decide(observe(50, 1, 31, 0.4, num_gpus=1), NO_CONTEXT)
    assert isinstance(lower, Change)
    assert lower.setpoint.mps_active_thread_percentage == 43
    assert lower.expected.throughput == RatioRange(low=0.7)
    spread = policy.decide(observe(50, 1, 31, 0.6, num_gpus=1), NO_CONTEXT)
    assert isinstance(spread, Change)
    assert (spread.setpoint.mps_active_thread_percentage, spread.setpoint.num_workers) == (40, 2)
    higher = policy.decide(observe(30, 2, 19, 0.9, num_gpus=1), NO_CONTEXT)
    assert isinstance(higher, Change)
    assert (higher.setpoint.mps_active_thread_percentage, higher.setpoint.num_workers) == (100, 1)


def test_the_hold_policy_holds_whatever_it_sees() -> None:
    policy = make_policy(PolicyConfig(type="hold"))
    assert isinstance(policy, HoldPolicy)
    assert isinstance(policy.decide(observe(50, 6, 600, 0.01), NO_CONTEXT), Hold)


def test_a_schedule_lays_its_entries_over_one_another_and_says_that_it_is_one() -> None:
    policy = SchedulePolicy([ScheduleEntry(20, num_workers=1), ScheduleEntry(10, thread_percentage=80)])
    now = observe(50, 2, 100, 0.1, num_gpus=1)
    assert isinstance(policy.decide(now, DecisionContext(completed_steps=9)), Hold)
    first = policy.decide(now, DecisionContext(completed_steps=10))
    assert isinstance(first, Change)
    assert first.setpoint == Setpoint(2, 2, 80)
    assert first.action is Action.SCHEDULED
    assert first.mandatory
    assert "schedule (not a measurement)" in first.reason
    both = policy.decide(now, DecisionContext(completed_steps=25))
    assert isinstance(both, Change)
    assert both.setpoint == Setpoint(1, 1, 80)
    done = observe(80, 1, 100, 0.1, num_gpus=1)
    assert isinstance(policy.decide(done, DecisionContext(completed_steps=25)), Hold)


def test_a_schedule_is_made_from_the_configuration() -> None:
    entries = [{"at_step": 5, "num_workers": 3}]
    policy = make_policy(PolicyConfig.model_validate({"type": "schedule", "schedule": entries}))
    change = policy.decide(observe(50, 2, 100, 0.1, num_gpus=2), DecisionContext(completed_steps=5))
    assert isinstance(change, Change)
    assert change.setpoint == Setpoint(3, 2, 50)


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "text"),
    [
        (RatioRange(0.8, 0.99), [0.8, 0.99], [0.79, 1.0], "between 80% and 99%"),
        (RatioRange(low=0.98), [0.98, 5.0], [0.97], "at least 98%"),
        (RatioRange(high=1.05), [0.1, 1.05], [1.06], "at most 105%"),
        (RatioRange(), [0.0, 9.0], [], "anything"),
    ],
)
def test_ratio_ranges(limits: RatioRange, inside: list[float], outside: list[float], text: str) -> None:
    assert all(limits.contains(ratio) for ratio in inside)
    assert not any(limits.contains(ratio) for ratio in outside)
    assert limits.describe() == text
