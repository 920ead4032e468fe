"""The control loop through whole scenarios, with measurements that the test makes up."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from eadt.config import RunConfig
from eadt.control.factory import make_control_loop
from eadt.control.guard import Guard, GuardLimits
from eadt.control.loop import ApplySetpoint, ControlLoop, Effect, LoopSettings, RecordDecision
from eadt.control.observation import Observation
from eadt.control.policy import EnergyPolicy, ScheduleEntry, SchedulePolicy
from eadt.control.presets import initial_setpoint, max_workers, preset_setpoint
from eadt.control.setpoint import Setpoint
from eadt.control.threshold import ThresholdPolicy
from eadt.units import Quality

START = Setpoint(2, 2, 50)
Physics = Callable[[Setpoint], tuple[float | None, float | None]]
"""Power in W and samples/s of the one device at a setpoint."""


def loads_well(setpoint: Setpoint) -> tuple[float, float]:
    """A lower share takes much power and little throughput: going down pays."""
    return 200 + 2.0 * setpoint.mps_active_thread_percentage, 20.0


def loads_badly(setpoint: Setpoint) -> tuple[float, float]:
    """A lower share takes throughput only: going down does not pay."""
    return 300.0, 0.4 * setpoint.mps_active_thread_percentage


class Job:
    """A job in one-minute windows, its loop, and everything the loop asked for."""

    def __init__(
        self,
        physics: Physics,
        *,
        policy: EnergyPolicy | None = None,
        batch: int = 16,
        threshold: float = 1.0,
        settings: LoopSettings | None = None,
    ) -> None:
        self.guard = Guard(
            policy or ThresholdPolicy(), GuardLimits(batch, 4, energy_efficiency_threshold=threshold)
        )
        self.settings = settings or LoopSettings(initial_pause_s=0.5)
        self.loop = ControlLoop(self.guard, START, self.settings)
        self.physics = physics
        self.setpoint = START
        self.at_s = 0.0
        self.rows: list[dict[str, Any]] = []

    def window(self, quality: Quality = Quality.MEASURED) -> Observation:
        self.at_s += 60.0
        power_w, throughput = self.physics(self.setpoint)
        return Observation(self.at_s, 60.0, self.setpoint, 1, throughput, power_w, 5, quality)

    def book(self, effects: list[Effect]) -> list[ApplySetpoint]:
        self.rows += [effect.row for effect in effects if isinstance(effect, RecordDecision)]
        return [effect for effect in effects if isinstance(effect, ApplySetpoint)]

    def minute(self, **arguments: Any) -> ApplySetpoint | None:
        """One window; returns the change that the loop asks for, not yet applied."""
        asked = self.book(self.loop.step(self.window(), **arguments))
        assert len(asked) <= 1
        return asked[0] if asked else None

    def until_asked(self, limit: int = 60, **arguments: Any) -> ApplySetpoint:
        for _ in range(limit):
            if asked := self.minute(**arguments):
                return asked
        raise AssertionError(f"nothing was asked for within {limit} windows: {self.rows}")

    def apply(self, asked: ApplySetpoint, pause_s: float = 0.5) -> None:
        self.setpoint = asked.setpoint
        self.book(self.loop.change_applied(asked.decision_id, self.at_s, pause_s))

    def latest(self, decision_id: str) -> dict[str, Any]:
        return [row for row in self.rows if row["decision_id"] == decision_id][-1]


def test_the_first_decision_comes_after_warmup_and_one_decision_interval() -> None:
    job = Job(loads_well)
    assert job.loop.phase == "warming_up"
    asked = job.until_asked()
    assert job.at_s == 360.0
    assert asked.setpoint == Setpoint(2, 2, 40)
    assert job.loop.phase == "changing"
    assert job.minute() is None  # one change at a time


def test_a_change_that_does_what_was_expected_is_kept_and_the_loop_goes_on() -> None:
    job = Job(loads_well)
    first = job.until_asked()
    job.apply(first)
    row = job.latest(first.decision_id)
    assert row["outcome"] == "pending"
    assert row["setpoint_before"] == START.as_dict()
    assert row["setpoint_after"] == Setpoint(2, 2, 40).as_dict()
    assert row["expected"]["power"] == {"low": None, "high": 0.99}
    for phase in ("warming_up", "verifying", "verifying"):
        assert job.loop.phase == phase
        assert job.minute() is None
    assert job.loop.phase == "observing"
    row = job.latest(first.decision_id)
    assert row["outcome"] == "kept"
    assert row["measured"]["power_ratio"] == pytest.approx(280 / 300)
    second = job.until_asked()
    assert second.setpoint == Setpoint(2, 2, 30)
    assert job.at_s == 660.0  # one decision interval after the first decision
    assert job.loop.best_efficiency == pytest.approx(20 / 280)


def test_a_change_that_disappoints_is_taken_back_and_the_state_held_stable() -> None:
    job = Job(loads_badly)
    first = job.until_asked()
    assert first.setpoint == Setpoint(2, 2, 40)
    job.apply(first)
    back = job.until_asked()
    assert job.latest(first.decision_id)["outcome"] == "reverted"
    assert job.latest(first.decision_id)["measured"]["throughput_ratio"] == pytest.approx(0.8)
    assert back.action == "revert"
    assert back.setpoint == START
    assert first.decision_id in back.reason
    job.apply(back)
    assert job.latest(back.decision_id)["outcome"] == "kept"
    assert job.loop.setpoint == START
    reverted_at_s = job.at_s
    while job.at_s < reverted_at_s + job.settings.stable_s - 60:
        assert job.minute() is None
    held = job.rows[-1]
    assert held["outcome"] == "refused"
    assert held["action"] == "decrease"
    assert "stable" in held["reason"]
    assert held["setpoint_after"] == START.as_dict()
    assert held["setpoint_wanted"] == Setpoint(2, 2, 40).as_dict()
    for _ in range(10):
        assert job.minute() is None
    assert "was measured lately" in job.rows[-1]["reason"]


def test_a_batch_that_cannot_be_held_is_refused_and_booked_as_such() -> None:
    job = Job(lambda setpoint: (300.0, 60.0), batch=2)
    for _ in range(6):
        assert job.minute() is None
    (row,) = job.rows
    assert row["action"] == "scale_replicas"
    assert row["outcome"] == "refused"
    assert "3 workers were wanted" in row["reason"]
    assert "1, 2" in row["reason"]


@pytest.mark.parametrize("outcome", ["failed", "refused"])
def test_a_change_that_could_not_be_made_is_not_tried_again_for_a_while(outcome: str) -> None:
    job = Job(loads_well)
    first = job.until_asked()
    event = job.loop.change_failed if outcome == "failed" else job.loop.change_refused
    assert job.book(event(first.decision_id, job.at_s, "no room on the node")) == []
    row = job.latest(first.decision_id)
    assert row["outcome"] == outcome
    assert row["setpoint_after"] == START.as_dict()
    assert "no room on the node" in row["measured"]["verdict"]
    assert job.loop.setpoint == START
    failed_at_s = job.at_s
    again = job.until_asked()
    assert again.setpoint == first.setpoint
    assert job.at_s - failed_at_s >= job.settings.stable_s
    assert any("failed lately" in row["reason"] for row in job.rows)


def test_events_of_changes_that_are_not_in_flight_are_passed_over() -> None:
    job = Job(loads_well)
    assert job.loop.change_applied("d0007", 10.0) == []
    assert job.loop.change_failed("d0007", 10.0, "late") == []
    assert job.loop.setpoint == START


def test_equal_holds_are_one_decision_that_is_rewritten_at_each_doubling() -> None:
    job = Job(lambda setpoint: (225.0, 50.0))
    for _ in range(1 + 5 * 11):
        assert job.minute() is None
    assert {row["decision_id"] for row in job.rows} == {"d0001"}
    assert [row["repeats"] for row in job.rows] == [1, 2, 4, 8]
    assert job.loop.decisions[0]["repeats"] == 11
    job.book(job.loop.finish())
    assert job.rows[-1]["repeats"] == 11
    assert job.rows[-1]["at_s"] == 360.0
    assert job.rows[-1]["until_s"] == job.at_s
    assert job.rows[-1]["action"] == "maintain"
    assert job.rows[-1]["outcome"] == "held"


def test_another_kind_of_hold_is_another_decision() -> None:
    power_w: list[float | None] = [225.0]
    job = Job(lambda setpoint: (power_w[0], 50.0))
    for _ in range(1 + 5 * 3):
        job.minute()
    power_w[0] = None
    for _ in range(5):
        job.minute()
    assert [(row["decision_id"], row["repeats"]) for row in job.rows] == [
        ("d0001", 1),
        ("d0001", 2),
        ("d0001", 3),
        ("d0002", 1),
    ]
    assert "unknown" in job.rows[-1]["reason"]


def test_stale_power_counts_as_unknown() -> None:
    job = Job(loads_well)
    for _ in range(6):
        assert job.book(job.loop.step(job.window(Quality.STALE))) == []
    assert "Power is unknown" in job.rows[-1]["reason"]


def test_the_efficiency_threshold_stops_trying_once_two_setpoints_are_known() -> None:
    job = Job(loads_well, threshold=0.75)
    job.apply(job.until_asked())
    for _ in range(10):
        assert job.minute() is None
    assert "worth trying only below 75%" in job.rows[-1]["reason"]


def test_a_run_that_is_nearly_over_is_left_alone() -> None:
    job = Job(loads_well, settings=LoopSettings(initial_pause_s=14.0))
    for _ in range(6):
        assert job.minute(remaining_s=100.0) is None
    assert "would not pay back" in job.rows[-1]["reason"]


def test_measured_pauses_replace_the_assumed_one() -> None:
    job = Job(loads_well)
    job.apply(job.until_asked(remaining_s=10_000.0), pause_s=40.0)
    for _ in range(10):
        assert job.minute(remaining_s=800.0) is None
    assert "pause of about 40 s" in job.rows[-1]["reason"]


def test_a_setpoint_that_something_else_changed_ends_verification() -> None:
    job = Job(loads_well)
    asked = job.until_asked()
    job.apply(asked)
    job.minute()
    job.minute()
    assert job.loop.phase == "verifying"
    job.setpoint = Setpoint(1, 1, 40)
    job.book(job.loop.setpoint_found(job.setpoint, job.at_s, "a node was lost"))
    row = job.latest(asked.decision_id)
    assert row["outcome"] == "failed"
    assert "a node was lost" in row["measured"]["verdict"]
    assert job.loop.setpoint == Setpoint(1, 1, 40)
    assert job.loop.phase == "warming_up"


def test_an_observation_at_another_setpoint_tells_the_truth_unless_it_is_late() -> None:
    job = Job(loads_well)
    late = job.window()
    asked = job.until_asked()
    job.apply(asked)
    assert job.loop.step(late) == []
    assert job.loop.setpoint == asked.setpoint
    job.setpoint = Setpoint(1, 1, 40)
    job.minute()
    assert job.loop.setpoint == Setpoint(1, 1, 40)
    assert job.latest(asked.decision_id)["outcome"] == "failed"


def restarted(job: Job) -> None:
    """The supervisor dies and comes back with its state."""
    state = json.loads(json.dumps(job.loop.to_state()))
    job.loop = ControlLoop.from_state(state, job.guard, job.settings)
    assert json.loads(json.dumps(job.loop.to_state())) == state


@pytest.mark.parametrize("physics", [loads_well, loads_badly])
def test_a_loop_restarted_at_every_window_decides_the_same(physics: Physics) -> None:
    steady, shaken = Job(physics), Job(physics)
    for _ in range(80):
        for job in (steady, shaken):
            if asked := job.minute():
                job.apply(asked)
        restarted(shaken)
        assert shaken.loop.phase == steady.loop.phase
    assert shaken.rows == steady.rows
    outcomes = {row["outcome"] for row in steady.rows}
    assert ("kept" if physics is loads_well else "reverted") in outcomes


@pytest.mark.parametrize("was_applied", [True, False])
def test_a_loop_that_died_during_a_change_asks_for_the_truth(was_applied: bool) -> None:
    job = Job(loads_well)
    asked = job.until_asked()
    restarted(job)
    assert job.loop.phase == "changing"
    truth = asked.setpoint if was_applied else START
    job.setpoint = truth
    job.book(job.loop.setpoint_found(truth, job.at_s, "the change was not made"))
    assert job.loop.setpoint == truth
    for _ in range(3):
        job.minute()
    assert job.latest(asked.decision_id)["outcome"] == ("kept" if was_applied else "failed")


def test_a_run_that_ends_during_verification_leaves_the_decision_pending() -> None:
    job = Job(loads_well)
    asked = job.until_asked()
    job.apply(asked)
    job.minute()
    job.minute()
    job.book(job.loop.finish())
    row = job.latest(asked.decision_id)
    assert row["outcome"] == "pending"
    assert row["measured"]["num_windows"] == 1
    assert "ended" in row["measured"]["verdict"]


def test_a_schedule_is_followed_without_waiting_for_verification_and_never_taken_back() -> None:
    schedule = SchedulePolicy([ScheduleEntry(10, num_workers=1), ScheduleEntry(20, num_workers=4)])
    job = Job(
        lambda setpoint: (100.0, 1.0 * setpoint.num_workers),
        policy=schedule,
        settings=LoopSettings(decision_interval_s=60.0, verification_intervals=3, warmup_intervals=0),
    )
    assert job.minute(completed_steps=5) is None
    first = job.minute(completed_steps=10)
    assert first is not None
    job.apply(first)
    second = job.minute(completed_steps=20)
    assert second is not None
    assert second.setpoint.num_workers == 4
    assert second.action == "scheduled"
    row = job.latest(first.decision_id)
    assert row["outcome"] == "kept"
    assert row["measured"]["throughput_ratio"] == pytest.approx(0.5)
    job.apply(second)
    for _ in range(3):
        assert job.minute(completed_steps=30) is None
    assert job.latest(second.decision_id)["outcome"] == "kept"


def test_the_log_keeps_the_latest_row_of_the_last_decisions() -> None:
    power_w: list[float | None] = [225.0]
    job = Job(
        lambda setpoint: (power_w[0], 50.0),
        settings=LoopSettings(decision_interval_s=60.0, warmup_intervals=0),
    )
    for index in range(250):
        power_w[0] = None if index % 2 else 225.0
        job.minute()
    assert len({row["decision_id"] for row in job.rows}) == 250
    assert len(job.loop.decisions) == 200
    assert job.loop.decisions[-1] == job.rows[-1]


def make_config(**sections: dict[str, Any]) -> RunConfig:
    training = {"model_name_or_path": "some/model", "dataset_path": "python-stdlib"}
    training |= sections.pop("training", {})
    return RunConfig.model_validate({"training": training, **sections})


def test_a_run_starts_at_the_pattern_that_its_configuration_names() -> None:
    assert initial_setpoint(make_config(), 3) == Setpoint(6, 2, 50)
    assert initial_setpoint(make_config(mps={"preset": "max_parallel"}), 2) == Setpoint(8, 4, 25)
    assert initial_setpoint(make_config(mps={"enabled": False}), 2, "bf16") == Setpoint(2, precision="bf16")
    assert initial_setpoint(make_config(elastic={"num_workers": 3}), 2) == Setpoint(3, 2, 50)
    assert initial_setpoint(make_config(elastic={"max_workers": 3}), 2) == Setpoint(3, 2, 50)
    assert preset_setpoint("max_single_process", 3) == Setpoint(3, 1, 100)
    assert max_workers(make_config(), 3) == 12
    assert max_workers(make_config(mps={"enabled": False}), 3) == 3
    assert max_workers(make_config(elastic={"max_workers": 5}), 3) == 5


def test_the_loop_of_a_configuration_has_its_numbers() -> None:
    config = make_config(
        training={"gradient_accumulation_steps": 4, "energy_monitoring_interval": 60},
        supervisor={"decision_interval": 120.0, "warmup_intervals": 0},
    )
    loop = make_control_loop(config, START, 1)
    for at_s in (60.0, 120.0):
        effects = loop.step(Observation(at_s, 60.0, START, 1, 20.0, 300.0, 5))
    asked = effects[-1]
    assert isinstance(asked, ApplySetpoint)
    assert asked.setpoint == Setpoint(2, 2, 40)
    again = make_control_loop(config, START, 1, state=loop.to_state())
    assert again.phase == "changing"
    assert again.decisions == loop.decisions


@pytest.mark.parametrize(
    ("section", "reason"),
    [("supervisor", "supervisor.enabled: false"), ("mps", "mps.enabled: false")],
)
def test_a_run_whose_levers_are_off_only_measures(section: str, reason: str) -> None:
    loop = make_control_loop(make_config(**{section: {"enabled": False}}), START, 1)
    effects: list[Effect] = []
    for index in range(1, 8):
        effects += loop.step(Observation(60.0 * index, 60.0, START, 1, 20.0, 300.0, 5))
    (effect,) = effects
    assert isinstance(effect, RecordDecision)
    assert reason in effect.row["reason"]


def test_two_cores_go_down_and_up_by_their_own_measurements() -> None:
    """The demonstration's way: 15 W idle and 12 W a core, two ranks cost 5 % of throughput."""

    def two_cores(setpoint: Setpoint) -> tuple[float, float]:
        cores = 2 * min(1.0, setpoint.num_workers * setpoint.mps_active_thread_percentage / 100)
        return 15 + 12 * cores, 10 * cores * (1.0 if setpoint.num_workers == 1 else 0.95)

    policy = ThresholdPolicy(
        power_high_w=33,
        power_low_w=30,
        efficiency_low=0.2,
        efficiency_high=0.6,
        thread_increase_step=75,
        thread_scale_step=50,
        max_workers_per_gpu=2,
    )
    job = Job(two_cores, policy=policy)
    job.setpoint = Setpoint(2, 2, 25)
    job.loop = ControlLoop(job.guard, job.setpoint, job.settings)
    changes: list[tuple[str, int, int]] = []
    for _ in range(25):
        if asked := job.minute(remaining_s=600.0):
            target = asked.setpoint
            changes.append((str(asked.action), target.num_workers, target.mps_active_thread_percentage))
            job.apply(asked)
    assert changes == [("increase", 1, 100), ("scale_replicas", 2, 50), ("revert", 1, 100)]
    outcomes = {row["decision_id"]: row["outcome"] for row in job.rows}
    assert list(outcomes.values())[:3] == ["kept", "reverted", "kept"]
