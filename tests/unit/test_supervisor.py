"""The energy supervisor against a run that is a small simulation, on a fake clock."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from eadt.config import RunConfig
from eadt.control.factory import make_control_loop
from eadt.control.loop import ControlLoop
from eadt.control.observation import Observation
from eadt.control.setpoint import Setpoint
from eadt.coordination.nodes import NodeReading
from eadt.errors import EnvironmentFailure
from eadt.record.rows import AnyRow, as_event
from eadt.supervisor import EnergySupervisor, SupervisorSettings
from eadt.testing.clock import FakeClock
from eadt.units import Quality

START = Setpoint(6, 2, 50)
NODES = ["node-a", "node-b", "node-c"]
Physics = Callable[[Setpoint], tuple[float | None, float]]
"""Samples/s of the job and W of each of the three nodes at a setpoint."""


def goes_down_well(setpoint: Setpoint) -> tuple[float, float]:
    """The worked example's start: 280 W per GPU, 0.08 samples/J; a lower share saves power only."""
    return 67.2, 280.0 - 4.0 * (50 - setpoint.mps_active_thread_percentage)


def never_asks(setpoint: Setpoint) -> tuple[float, float]:
    return 70.0, 220.0


class FakeRun:
    """Implements ``RunView``: three nodes with one GPU each, and a coordinator that can fall silent."""

    def __init__(self, clock: FakeClock, physics: Physics) -> None:
        self.clock, self.physics = clock, physics
        self.began_s = clock.monotonic_s()
        self.setpoint = self.desired = START
        self.generation = 1
        self.is_training = True
        self.status = "running"
        self.placeable = 12
        self.change_takes_s = 3.0
        self.refusal = ""
        self.silent_methods: set[str] = set()
        self.hears_but_is_silent = False
        self.quality = dict.fromkeys(NODES, Quality.MEASURED)
        self.unreadable: set[str] = set()
        self.booking_nodes = list(NODES)
        self.while_reading: Callable[[], None] = lambda: None
        self.applied: list[tuple[Setpoint, str | None]] = []
        self.windows: list[tuple[float, float]] = []
        self.rows: list[dict[str, Any]] = []
        self.kept: str | None = None
        self.changes: dict[str, tuple[float, Setpoint]] = {}
        self.states: dict[str, dict[str, Any]] = {}

    @property
    def at_s(self) -> float:
        return self.clock.monotonic_s() - self.began_s

    def answer(self, method: str) -> None:
        """Carry on with changes; then fail if this method is to."""
        for decision_id, (asked_s, setpoint) in list(self.changes.items()):
            if self.at_s >= asked_s + self.change_takes_s:
                del self.changes[decision_id]
                placed = min(setpoint.num_workers, self.placeable)
                if setpoint.with_(num_workers=placed) == self.setpoint:
                    continue  # nothing to do, and nothing is ever reported
                self.enter(setpoint.with_(num_workers=placed))
                self.states[decision_id] = {
                    "state": "applied", "at_s": self.at_s, "pause_s": 0.7, "num_workers": placed
                }  # fmt: skip
        if method in self.silent_methods or "all" in self.silent_methods:
            raise EnvironmentFailure("the coordinator does not answer", code="EADT-371")

    def enter(self, setpoint: Setpoint) -> None:
        self.setpoint, self.generation = setpoint, self.generation + 1

    async def snapshot(self) -> dict[str, Any]:
        self.answer("snapshot")
        return {
            "run_id": "demo-1a2b", "name": "demo", "status": self.status, "at_s": self.at_s,
            "step": int(self.at_s), "max_steps": 100_000, "loss": 2.5,
            "is_training": self.is_training, "generation": self.generation,
            "setpoint": self.setpoint if self.is_training else None, "desired": self.desired,
            "num_devices": 3, "booking_node_ids": self.booking_nodes, "waiting_for": "",
        }  # fmt: skip

    async def throughput(self, window_s: float, since_s: float) -> tuple[float | None, int]:
        self.answer("throughput")
        self.windows.append((since_s, window_s))
        throughput = self.physics(self.setpoint)[0]
        return throughput, 0 if throughput is None else 12

    async def readings(self, node_ids: Sequence[str], window_s: float) -> dict[str, NodeReading | None]:
        self.while_reading()
        readings: dict[str, NodeReading | None] = {}
        for node in node_ids:
            reading = NodeReading(self.physics(self.setpoint)[1], self.quality[node])
            readings[node] = None if node in self.unreadable else reading
        return readings

    async def apply(self, setpoint: Setpoint, reason: str, decision_id: str | None) -> dict[str, Any]:
        if not self.hears_but_is_silent:
            self.answer("apply")
        if self.refusal:
            return {"accepted": False, "why": self.refusal}
        self.applied.append((setpoint, decision_id))
        self.desired = setpoint
        if decision_id is None:
            self.changes.clear()
        else:
            self.changes[decision_id] = (self.at_s, setpoint)
            self.states[decision_id] = {"state": "pending"}
        self.answer("apply")
        return {"accepted": True, "why": ""}

    async def change_state(self, decision_id: str) -> dict[str, Any]:
        self.answer("change_state")
        return self.states.get(decision_id, {"state": "unknown"})

    async def book(self, row: AnyRow) -> None:
        self.answer("book")
        self.rows.append(json.loads(json.dumps(as_event(row))))

    async def keep_state(self, state: dict[str, Any]) -> None:
        self.answer("keep_state")
        self.kept = json.dumps(state)

    async def kept_state(self) -> dict[str, Any] | None:
        self.answer("kept_state")
        return None if self.kept is None else json.loads(self.kept)

    def decision(self, decision_id: str) -> dict[str, Any]:
        """The decision as the ledger has it now."""
        found = [row for row in self.rows if row.get("decision_id") == decision_id]
        assert found, f"{decision_id} was never booked"
        return found[-1]

    def notes(self, code: str) -> list[str]:
        return [row["text"] for row in self.rows if row["type"] == "note" and row["code"] == code]


class Job:
    """A run and its supervisor, which can be killed and started again."""

    def __init__(self, physics: Physics = goes_down_well, **supervisor: Any) -> None:
        self.clock = FakeClock()
        self.run = FakeRun(self.clock, physics)
        training = {"model_name_or_path": "m", "dataset_path": "d", "per_device_train_batch_size": 12}
        self.config = RunConfig.model_validate(
            {
                "run": {"name": "demo"},
                "training": {**training, "train_batch_size": 72},
                "mps": {"preset": "balanced"},
                "supervisor": supervisor,
            }
        )
        self.observations: list[Observation] = []
        self.start_supervisor()

    def start_supervisor(self) -> None:
        """Also what Ray does after a crash: nothing is left but what the coordinator keeps."""
        self.supervisor = EnergySupervisor(
            self.run,
            self.make_loop,
            SupervisorSettings(60.0, change_deadline_s=200.0, train_batch_size=72, policy="threshold"),
            self.clock,
        )

    def make_loop(self, state: dict[str, Any] | None) -> ControlLoop:
        return make_control_loop(self.config, START, 3, initial_pause_s=1.0, state=state)

    @property
    def phase(self) -> str:
        return str(self.supervisor.to_state()["phase"])

    def tick(self) -> Observation | None:
        observation = asyncio.run(self.supervisor.tick())
        if observation is not None:
            self.observations.append(observation)
        return observation

    def run_for(self, seconds: float) -> None:
        self.run_until(lambda: False, seconds, must=False)

    def run_until(self, condition: Callable[[], bool], limit_s: float = 3600, *, must: bool = True) -> None:
        end_s = self.clock.monotonic_s() + limit_s
        while self.clock.monotonic_s() < end_s:
            self.tick()
            if condition():
                return
            self.clock.advance(min(self.supervisor.next_tick_s, end_s - self.clock.monotonic_s()))
        assert not must, f"not within {limit_s} s; last rows: {self.run.rows[-3:]}"

    def run_until_asked(self) -> tuple[Setpoint, str]:
        count = len(self.run.applied)
        self.run_until(lambda: len(self.run.applied) > count)
        setpoint, decision_id = self.run.applied[-1]
        assert decision_id is not None
        return setpoint, decision_id


# -- observing ------------------------------------------------------------------------------------


def test_an_observation_has_the_whole_jobs_numbers_and_is_booked() -> None:
    job = Job(never_asks)
    job.run.quality["node-b"] = Quality.ESTIMATED
    job.run_for(61)
    [observation] = job.observations
    assert observation.at_s == pytest.approx(60.0)
    assert observation.window_s == pytest.approx(60.0)
    assert job.run.windows[0] == pytest.approx((0.0, 60.0))
    assert observation.samples_per_second == 70.0
    assert observation.power_w == 660.0
    assert observation.num_gpus == 3
    assert observation.num_steps == 12
    assert observation.quality is Quality.ESTIMATED
    [row] = [row for row in job.run.rows if row["type"] == "observation"]
    assert row["efficiency_samples_per_j"] == pytest.approx(70 / 660)
    assert row["power_per_gpu_w"] == pytest.approx(220)
    assert row["setpoint"] == START.as_dict()


def test_windows_follow_each_other_without_a_gap() -> None:
    job = Job(never_asks)
    job.run_for(301)
    assert [observation.at_s for observation in job.observations] == pytest.approx([60, 120, 180, 240, 300])
    assert [since_s for since_s, _ in job.run.windows] == pytest.approx([0, 60, 120, 180, 240])


def test_power_that_one_node_does_not_know_is_unknown_and_said_once() -> None:
    job = Job()
    job.run.unreadable = {"node-b"}
    job.run_for(601)
    assert len(job.observations) == 10
    assert all(observation.power_w is None for observation in job.observations)
    assert all(observation.samples_per_second == 67.2 for observation in job.observations)
    assert job.run.applied == []
    [said] = job.run.notes("EADT-370")
    assert "node-b" in said
    job.run.unreadable = set()
    job.run_for(120)
    assert job.observations[-1].power_w == 840.0
    assert len(job.run.notes("EADT-370")) == 2


def test_power_is_asked_of_the_nodes_that_book_what_trains() -> None:
    job = Job(never_asks)
    job.run.booking_nodes = ["node-a"]  # it meters the machine on which others train
    job.run_for(61)
    assert job.observations[0].power_w == 220.0
    job.run.booking_nodes = []
    job.run_for(60)
    assert job.observations[1].power_w is None  # nobody meters: unknown is not zero


def test_a_window_begins_anew_where_the_generation_changes() -> None:
    job = Job(never_asks)
    job.run_for(31)
    job.run.enter(START)  # an engine died and was started again
    job.run_for(40)
    assert job.observations == []
    job.run_for(40)
    [observation] = job.observations
    [(since_s, window_s)] = job.run.windows
    assert since_s == pytest.approx(32, abs=2)
    assert window_s == pytest.approx(60, abs=0.1)
    assert observation.at_s == pytest.approx(since_s + 60, abs=0.1)


def test_a_window_in_which_the_generation_changes_while_meters_are_read_is_not_fed() -> None:
    job = Job(never_asks)
    job.run_for(59)

    def change_once() -> None:
        job.run.while_reading = lambda: None
        job.run.enter(START)

    job.run.while_reading = change_once
    job.run_for(4)
    assert len(job.run.windows) == 1  # it was read
    assert job.observations == []
    job.run_for(60)
    assert len(job.observations) == 1


def test_while_training_is_not_under_way_nothing_is_observed() -> None:
    job = Job(never_asks)
    job.run.is_training = False
    job.run_for(300)
    job.run.is_training = True
    job.run_for(62)
    assert [since_s for since_s, _ in job.run.windows] == pytest.approx([300], abs=2)


# -- acting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("power_w", "efficiency", "expected"),
    [
        (280.0, 0.08, Setpoint(6, 2, 40)),
        (270.0, 0.22, Setpoint(9, 3, 35)),
        (180.0, 0.08, Setpoint(6, 2, 60)),
    ],
)
def test_the_worked_examples_end_in_a_call_of_apply(
    power_w: float, efficiency: float, expected: Setpoint
) -> None:
    job = Job(lambda _: (efficiency * 3 * power_w, power_w))
    setpoint, decision_id = job.run_until_asked()
    assert setpoint == expected
    assert job.run.at_s == pytest.approx(360, abs=1)  # one warm-up window, then one decision interval
    row = job.run.decision(decision_id)
    assert row["outcome"] == "pending"
    assert row["setpoint_after"] == expected.as_dict()


def test_a_change_is_followed_verified_and_kept() -> None:
    job = Job()
    setpoint, decision_id = job.run_until_asked()
    job.run_for(10)
    assert job.run.setpoint == setpoint
    assert job.phase == "warming_up"
    job.run_until(lambda: job.run.decision(decision_id)["outcome"] != "pending")
    row = job.run.decision(decision_id)
    assert row["outcome"] == "kept"
    assert row["measured"]["power_w"] == pytest.approx(3 * 240)
    assert row["measured"]["power_ratio"] == pytest.approx(240 / 280)
    assert job.supervisor.to_state()["loop"]["pauses_s"] == [0.7]


def test_a_change_that_does_not_do_what_was_expected_is_taken_back() -> None:
    job = Job(lambda setpoint: (1.344 * setpoint.mps_active_thread_percentage, 280.0))
    _, decision_id = job.run_until_asked()
    setpoint, revert_id = job.run_until_asked()
    assert setpoint == START
    assert job.run.decision(decision_id)["outcome"] == "reverted"
    assert job.run.decision(revert_id)["action"] == "revert"
    job.run_until(lambda: job.run.decision(revert_id)["outcome"] == "kept")
    assert job.run.setpoint == START


def test_a_change_that_the_coordinator_refuses_is_booked_with_its_reason() -> None:
    job = Job()
    job.run.refusal = "the run is ending"
    job.run_until(lambda: any(row.get("outcome") == "refused" for row in job.run.rows))
    row = job.run.decision("d0001")
    assert "the run is ending" in row["measured"]["verdict"]
    assert row["setpoint_after"] == START.as_dict()
    assert job.run.applied == []


def test_a_change_that_is_never_done_is_given_up_at_the_deadline_and_asked_back() -> None:
    job = Job()
    job.run.change_takes_s = 1e9
    _, decision_id = job.run_until_asked()
    asked_s = job.run.at_s
    job.run_until(lambda: job.run.decision(decision_id)["outcome"] == "failed")
    assert job.run.at_s - asked_s == pytest.approx(200, abs=3)
    assert job.run.applied[-1] == (START, None)
    assert job.run.desired == START
    assert "not done after 3 min" in job.run.decision(decision_id)["measured"]["verdict"]


def test_a_change_that_is_in_force_though_never_reported_is_taken_as_done_at_the_deadline() -> None:
    job = Job()
    job.run.change_takes_s = 1e9
    setpoint, decision_id = job.run_until_asked()
    job.run.enter(setpoint)  # its steps are so slow that its pause is still being timed
    job.run_for(150)
    assert job.phase == "changing"
    job.run_for(60)
    assert job.phase != "changing"
    assert job.run.decision(decision_id)["outcome"] == "pending"  # being verified
    assert len(job.run.applied) == 1


def test_fewer_workers_than_were_wanted_are_taken_as_they_are_and_grow_again() -> None:
    job = Job(lambda _: (0.22 * 3 * 270, 270.0), stable_intervals=0)
    job.run.placeable = 6
    first, decision_id = job.run_until_asked()
    assert first == Setpoint(9, 3, 35)
    job.run_until(lambda: job.run.decision(decision_id)["outcome"] == "failed")
    assert "only 6 of 9 workers" in job.run.decision(decision_id)["measured"]["verdict"]
    assert job.supervisor.to_state()["loop"]["setpoint"]["num_workers"] == 6
    assert job.run.desired.num_workers == 9


def test_a_change_of_share_does_not_cancel_workers_that_are_still_to_come() -> None:
    job = Job()
    job.run.desired, job.run.placeable = START.with_(num_workers=9), 6
    setpoint, decision_id = job.run_until_asked()
    assert setpoint == Setpoint(9, 2, 40)
    job.run_until(lambda: job.run.decision(decision_id)["outcome"] == "kept")
    assert job.run.setpoint == Setpoint(6, 2, 40)


def test_a_change_of_which_the_coordinator_heard_but_gave_no_answer_is_asked_for_once() -> None:
    job = Job()
    job.run.silent_methods, job.run.hears_but_is_silent = {"apply"}, True
    setpoint, decision_id = job.run_until_asked()
    job.run.silent_methods = set()
    job.run_until(lambda: job.run.decision(decision_id)["outcome"] == "kept")
    assert len(job.run.applied) == 1
    assert job.run.setpoint == setpoint


# -- a coordinator that does not answer -----------------------------------------------------------


def test_a_silent_coordinator_is_said_once_and_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    job = Job(never_asks)
    job.run_for(61)
    job.run.silent_methods = {"all"}
    job.run_for(600)
    assert len([record for record in caplog.records if "EADT-371" in record.getMessage()]) == 1
    job.run.silent_methods = set()
    job.run_for(4)
    [said] = job.run.notes("EADT-371")
    assert "10 min" in said
    # Training went on, but meters remember only so long: the window is cut.
    assert job.observations[-1].window_s == pytest.approx(60)
    assert job.observations[-1].at_s == pytest.approx(job.run.at_s, abs=4)


def test_what_could_not_be_booked_is_booked_later_and_nothing_is_asked_for_before() -> None:
    job = Job()
    job.run.silent_methods = {"book"}
    job.run_for(400)
    assert job.run.applied == []
    assert job.run.rows == []
    job.run.silent_methods = set()
    job.run_until_asked()
    assert job.run.decision("d0001")["outcome"] == "pending"
    assert next(row["at_s"] for row in job.run.rows if row["type"] == "observation") == pytest.approx(60)


# -- a supervisor that is started again -----------------------------------------------------------


def test_a_supervisor_started_again_in_mid_verification_goes_on_with_it() -> None:
    job = Job()
    _, decision_id = job.run_until_asked()
    job.run_until(lambda: job.phase == "verifying")
    before = job.supervisor.to_state()
    job.start_supervisor()
    job.tick()
    after = job.supervisor.to_state()
    assert after["phase"] == "verifying"
    assert after["loop"]["log"] == before["loop"]["log"]
    assert after["best_efficiency"] == before["best_efficiency"]
    assert len(job.run.notes("EADT-372")) == 1
    job.run_until(lambda: job.run.decision(decision_id)["outcome"] == "kept")
    job.run_until(lambda: job.run.rows[-1].get("decision_id") == "d0002")
    assert decision_id == "d0001"  # ids are not used twice


def test_a_supervisor_started_again_in_mid_change_follows_it() -> None:
    job = Job()
    job.run.change_takes_s = 30.0
    setpoint, decision_id = job.run_until_asked()
    job.run_for(10)
    job.start_supervisor()
    job.run_until(lambda: job.run.setpoint == setpoint, 60)
    job.run_until(lambda: job.run.decision(decision_id)["outcome"] == "kept")
    assert len(job.run.applied) == 1


def test_a_decision_that_was_kept_but_not_carried_out_is_carried_out_by_the_successor() -> None:
    job = Job()
    job.run.silent_methods = {"book", "change_state"}
    job.run_until(lambda: job.run.kept is not None and json.loads(job.run.kept)["change"] is not None, 400,
                  must=False)  # fmt: skip
    job.start_supervisor()  # the first one died with a decision that nobody was told of
    job.run.silent_methods = set()
    setpoint, decision_id = job.run_until_asked()
    assert setpoint == Setpoint(6, 2, 40)
    assert job.run.decision(decision_id)["outcome"] == "pending"


def test_a_supervisor_started_again_finds_what_changed_meanwhile() -> None:
    job = Job()
    _, decision_id = job.run_until_asked()
    job.run_until(lambda: job.phase == "verifying")
    job.run.enter(Setpoint(3, 1, 40))
    job.start_supervisor()
    job.tick()
    assert job.supervisor.to_state()["loop"]["setpoint"]["num_workers"] == 3
    job.tick()
    row = job.run.decision(decision_id)
    assert row["outcome"] == "failed"
    assert "after a restart of the supervisor" in row["measured"]["verdict"]


# -- the end, and being asked ---------------------------------------------------------------------


def test_at_the_runs_end_the_log_is_brought_up_to_date_once() -> None:
    job = Job()
    _, decision_id = job.run_until_asked()
    job.run_until(lambda: job.phase == "verifying")
    job.run.status, job.run.is_training = "completed", False
    job.tick()
    assert job.supervisor.is_over
    assert "run ended" in job.run.decision(decision_id)["measured"]["verdict"]
    count = len(job.run.rows)
    asyncio.run(job.supervisor.finish())
    assert len(job.run.rows) == count


def test_what_is_kept_says_how_the_supervisor_stands() -> None:
    job = Job()
    job.run_until_asked()
    job.run_for(1500)
    assert job.run.kept is not None
    kept = json.loads(job.run.kept)
    assert kept["policy"] == "threshold"
    assert kept["phase"] == job.phase
    assert kept["best_efficiency"] >= 0.08
