"""Outcome verification: what is kept, what is taken back, what is waited for."""

from __future__ import annotations

import json

import pytest

from eadt.control.observation import Observation
from eadt.control.policy import Action, Change, DecisionContext, Expectation
from eadt.control.setpoint import Setpoint
from eadt.control.threshold import ThresholdPolicy
from eadt.control.verification import Kept, OutcomeVerifier, Pending, Revert
from eadt.control.window import mean_observation
from eadt.units import Quality

BEFORE = {
    "decrease": (280.0, 22.4),
    "scale_replicas": (280.0, 56.0),
    "increase": (180.0, 14.4),
}
"""Power in W and samples/s of one GPU at which the policy chooses the action."""


def observe(
    setpoint: Setpoint, power_w: float | None, throughput: float | None, at_s: float = 0.0
) -> Observation:
    return Observation(at_s, 60.0, setpoint, 1, throughput, power_w, num_steps=0 if throughput is None else 5)


def started(action: str, *, intervals: int = 2) -> tuple[OutcomeVerifier, Change, Observation]:
    before = observe(Setpoint(2, 2, 50), *BEFORE[action])
    change = ThresholdPolicy().decide(before, DecisionContext())
    assert isinstance(change, Change)
    assert change.action == action
    verifier = OutcomeVerifier(intervals)
    verifier.start(change, before)
    return verifier, change, before


@pytest.mark.parametrize(
    ("action", "power_ratio", "throughput_ratio", "kept", "named"),
    [
        ("decrease", 0.85, 0.90, True, "power at 85.0%"),
        ("decrease", 0.80, 0.79, False, "throughput"),  # lost more than 20 %
        ("decrease", 1.00, 1.00, False, "power"),  # power did not fall
        ("decrease", 0.95, 0.85, False, "efficiency"),  # fell less than throughput
        ("scale_replicas", 1.02, 1.10, True, "throughput at 110.0%"),
        ("scale_replicas", 1.00, 1.00, True, "power at 100.0%"),  # moved nothing: going back costs too
        ("scale_replicas", 1.10, 1.30, False, "power"),
        ("scale_replicas", 1.00, 0.90, False, "efficiency"),
        ("increase", 1.20, 1.25, True, "efficiency at 104.2%"),
        ("increase", 1.20, 1.00, False, "efficiency"),
        ("increase", 0.80, 0.90, False, "throughput"),
    ],
)
def test_success_per_action(
    action: str, power_ratio: float, throughput_ratio: float, kept: bool, named: str
) -> None:
    verifier, change, before = started(action)
    assert before.power_w is not None
    assert before.samples_per_second is not None
    after = observe(
        change.setpoint, before.power_w * power_ratio, before.samples_per_second * throughput_ratio
    )
    assert verifier.observe(after) == Pending(1)
    verdict = verifier.observe(after)
    assert isinstance(verdict, Kept if kept else Revert)
    assert verdict.measured.power_ratio == pytest.approx(power_ratio)
    assert verdict.measured.throughput_ratio == pytest.approx(throughput_ratio)
    assert verdict.measured.efficiency_ratio == pytest.approx(throughput_ratio / power_ratio)
    assert named in verdict.measured.verdict
    if isinstance(verdict, Revert):
        assert verdict.setpoint == before.setpoint
        assert verdict.why == verdict.measured.verdict
    assert not verifier.active


def test_the_mean_of_the_windows_decides_not_the_worst_of_them() -> None:
    verifier, change, _ = started("decrease", intervals=3)
    for power_w in (300.0, 240.0):
        assert isinstance(verifier.observe(observe(change.setpoint, power_w, 22.4)), Pending)
    verdict = verifier.observe(observe(change.setpoint, 240.0, 22.4))
    assert isinstance(verdict, Kept)
    assert verdict.measured.power_w == pytest.approx(260.0)
    assert verdict.measured.num_windows == 3


def test_windows_at_another_setpoint_do_not_count() -> None:
    verifier, change, before = started("decrease")
    assert verifier.observe(before) == Pending(2)
    assert verifier.observe(observe(change.setpoint, 240.0, 22.0)) == Pending(1)


def test_unmeasured_windows_are_waited_out_and_what_is_known_decides() -> None:
    verifier, change, _ = started("decrease")
    blind = observe(change.setpoint, None, 22.4)
    for _ in range(5):
        assert isinstance(verifier.observe(blind), Pending)
    verdict = verifier.observe(blind)
    assert isinstance(verdict, Kept)  # throughput is fine, power is unknown
    assert verdict.measured.power_ratio is None
    assert verdict.measured.throughput_ratio == pytest.approx(1.0)
    assert verdict.measured.num_windows == 0


def test_training_that_stalls_after_a_change_is_taken_back() -> None:
    verifier, change, before = started("increase")
    stalled = observe(change.setpoint, 100.0, None)
    verdicts = [verifier.observe(stalled) for _ in range(6)]
    assert all(isinstance(verdict, Pending) for verdict in verdicts[:5])
    assert isinstance(verdicts[-1], Revert)
    assert verdicts[-1].setpoint == before.setpoint
    assert "no optimizer step ended in 360 s" in verdicts[-1].why


def test_a_mandatory_change_is_measured_and_kept_whatever_it_did() -> None:
    before = observe(Setpoint(2, 2, 50), 100.0, 10.0)
    expected = ThresholdPolicy().decide(observe(Setpoint(2, 2, 50), 280.0, 22.4), DecisionContext())
    assert isinstance(expected, Change)
    change = Change(Action.SCHEDULED, Setpoint(1, 1, 50), "Asked for.", expected.expected, mandatory=True)
    verifier = OutcomeVerifier(1)
    verifier.start(change, before)
    assert verifier.mandatory
    verdict = verifier.observe(observe(change.setpoint, 100.0, 2.0))
    assert isinstance(verdict, Kept)
    assert verdict.measured.throughput_ratio == pytest.approx(0.2)
    assert "scheduled" in verdict.measured.verdict


def test_an_unknown_before_leaves_the_ratios_unknown_and_the_change_kept() -> None:
    verifier = OutcomeVerifier(1)
    change = Change(Action.SCHEDULED, Setpoint(1), "Asked for.", Expectation(), mandatory=True)
    verifier.start(change, observe(Setpoint(2), None, None))
    verdict = verifier.observe(observe(Setpoint(1), 50.0, 5.0))
    assert isinstance(verdict, Kept)
    assert verdict.measured.efficiency_ratio is None
    assert verdict.measured.efficiency_samples_per_j == pytest.approx(0.1)


def test_concluding_early_gives_what_was_measured_so_far() -> None:
    verifier, change, _ = started("decrease")
    verifier.observe(observe(change.setpoint, 140.0, 22.4))
    measured = verifier.conclude("The run ended.")
    assert measured.power_ratio == pytest.approx(0.5)
    assert measured.num_windows == 1
    assert measured.verdict == "The run ended."
    assert not verifier.active


def test_nothing_to_verify_is_a_programming_error() -> None:
    verifier = OutcomeVerifier()
    with pytest.raises(RuntimeError, match="no change"):
        verifier.observe(observe(Setpoint(1), 1.0, 1.0))
    with pytest.raises(RuntimeError, match="no change"):
        verifier.conclude("x")
    with pytest.raises(ValueError, match="at least 1"):
        OutcomeVerifier(0)


def test_a_verifier_goes_on_from_its_state() -> None:
    verifier, change, _ = started("decrease")
    verifier.observe(observe(change.setpoint, None, 22.4))
    verifier.observe(observe(change.setpoint, 240.0, 22.4))
    again = OutcomeVerifier(2)
    again.restore(json.loads(json.dumps(verifier.to_state())))
    last = observe(change.setpoint, 250.0, 22.4)
    assert again.observe(last) == verifier.observe(last)
    again.restore(OutcomeVerifier().to_state())
    assert not again.active


def test_means_weigh_windows_by_length_and_skip_what_is_unknown() -> None:
    setpoint = Setpoint(2)
    windows = [
        Observation(10.0, 10.0, setpoint, 1, 4.0, 100.0, 2),
        Observation(40.0, 30.0, setpoint, 1, 8.0, None, 6, Quality.ESTIMATED),
        Observation(50.0, 10.0, setpoint, 1, None, 200.0, 0),
    ]
    mean = mean_observation(windows)
    assert mean.at_s == 50.0
    assert mean.window_s == 50.0
    assert mean.samples_per_second == pytest.approx(7.0)
    assert mean.power_w == pytest.approx(150.0)
    assert mean.num_steps == 8
    assert mean.quality is Quality.ESTIMATED
    unknown = mean_observation([Observation(1.0, 1.0, setpoint, 1, None, None)])
    assert unknown.power_w is None
    with pytest.raises(ValueError, match="different setpoints"):
        mean_observation([windows[0], Observation(1.0, 1.0, Setpoint(1), 1, None, None)])
    with pytest.raises(ValueError, match="no windows"):
        mean_observation([])
