"""Intervals, gaps, integration, qualities and the sampling thread of the meter."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eadt.errors import TransientDeviceError
from eadt.node.meter import Meter
from eadt.node.sensors import Component, Reading
from eadt.testing.clock import FakeClock
from eadt.units import Quality


class ScriptedSource:
    """A sensor that answers what the test last said; an exception is raised by ``read``."""

    def __init__(
        self, clock: FakeClock, name: str = "cpu", quality: Quality | None = Quality.MEASURED
    ) -> None:
        self._clock = clock
        self.component = Component(name, "scripted", quality, name, name)
        self.energy_j: float | None = None
        self.power_w: float | None = None
        self.error: Exception | None = None
        self.num_errors_raised = 0
        self.was_read = threading.Event()

    @property
    def components(self) -> tuple[Component, ...]:
        return (self.component,)

    def read(self) -> Sequence[Reading]:
        self.was_read.set()
        if self.error is not None:
            self.num_errors_raised += 1
            raise self.error
        return [Reading(self.component, self._clock.monotonic_s(), self.energy_j, self.power_w)]

    def close(self) -> None:
        pass


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(monotonic_s=100.0)


def energy_rows(rows):
    return [row for row in rows if row["type"] == "energy"]


def notes(rows):
    return [row for row in rows if row["type"] == "note"]


def step(meter: Meter, clock: FakeClock, seconds: float = 1.0):
    clock.advance(seconds)
    return meter.sample()


class TestIntervals:
    def test_counter_rows(self, clock):
        source = ScriptedSource(clock)
        source.energy_j = 5000.0
        meter = Meter([source], clock, node="n1")
        assert meter.sample() == []
        source.energy_j = 5120.0
        assert step(meter, clock, 2.0) == [
            {
                "type": "energy",
                "node": "n1",
                "t0": 100.0,
                "t1": 102.0,
                "component": "cpu",
                "energy_j": 120.0,
                "quality": "measured",
                "source": "scripted",
                "gap": False,
            }
        ]

    def test_sampling_twice_at_one_moment_books_nothing_twice(self, clock):
        source = ScriptedSource(clock)
        source.energy_j = 0.0
        meter = Meter([source], clock)
        meter.sample()
        source.energy_j = 7.0
        assert len(step(meter, clock)) == 1
        assert meter.sample() == []
        assert meter.totals()["cpu"].energy_j == 7.0

    @given(
        st.lists(
            st.tuples(st.floats(0.01, 9.0), st.floats(0.0, 1000.0)),
            min_size=1,
            max_size=30,
        )
    )
    def test_trapezoid_is_exact_for_piecewise_linear_power(self, points):
        clock = FakeClock()
        source = ScriptedSource(clock)
        source.power_w = before_w = 10.0
        meter = Meter([source], clock)
        meter.sample()
        expected_j = 0.0
        for seconds, power_w in points:
            expected_j += 0.5 * (before_w + power_w) * seconds
            source.power_w = before_w = power_w
            step(meter, clock, seconds)
        assert meter.totals()["cpu"].energy_j == pytest.approx(expected_j)
        assert meter.totals()["cpu"].num_gaps == 0

    def test_power_readings_too_far_apart_are_a_gap_but_a_counter_bridges(self, clock):
        power, counter = ScriptedSource(clock, "gpu0"), ScriptedSource(clock, "gpu1")
        power.power_w, counter.energy_j = 100.0, 0.0
        meter = Meter([power, counter], clock, sampling_interval=1.0)
        meter.sample()
        counter.energy_j = 6000.0
        first, second = energy_rows(step(meter, clock, 60.0))
        assert (first["gap"], first["energy_j"]) == (True, None)
        assert (second["gap"], second["energy_j"]) == (False, 6000.0)


class TestGaps:
    def test_counter_that_goes_backwards_is_a_gap_and_then_starts_anew(self, clock):
        source = ScriptedSource(clock)
        source.energy_j = 900.0
        meter = Meter([source], clock)
        meter.sample()
        source.energy_j = 3.0
        rows = step(meter, clock)
        assert [(row["energy_j"], row["gap"]) for row in energy_rows(rows)] == [(None, True)]
        assert [row["code"] for row in notes(rows)] == ["EADT-347"]
        source.energy_j = 53.0
        assert energy_rows(step(meter, clock))[0]["energy_j"] == 50.0
        total = meter.totals()["cpu"]
        assert (total.energy_j, total.known_s, total.gap_s, total.num_gaps) == (50.0, 1.0, 1.0, 1)

    @pytest.mark.parametrize("error", [TransientDeviceError("busy"), ValueError("a bug in a driver")])
    def test_failing_source_is_gaps_said_once(self, clock, error):
        source = ScriptedSource(clock)
        source.energy_j = 0.0
        meter = Meter([source], clock)
        meter.sample()
        source.error = error
        failing = [step(meter, clock) for _ in range(3)]
        assert source.num_errors_raised == 3
        assert [energy_rows(rows)[0]["gap"] for rows in failing] == [True, True, True]
        assert [len(notes(rows)) for rows in failing] == [1, 0, 0]
        source.error, source.energy_j = None, 400.0
        back = step(meter, clock)
        # The first reading after the gap is only a new starting point.
        assert energy_rows(back)[0]["energy_j"] is None
        assert [row["code"] for row in notes(back)] == ["EADT-348"]
        source.energy_j = 410.0
        assert energy_rows(step(meter, clock))[0]["energy_j"] == 10.0

    def test_rows_cover_all_time_without_overlap(self, clock):
        source = ScriptedSource(clock)
        source.energy_j = 0.0
        meter = Meter([source], clock)
        rows = meter.sample()
        for position in range(12):
            source.error = TransientDeviceError("busy") if position % 4 == 1 else None
            source.energy_j += 5.0
            rows += step(meter, clock, 0.5 + position)
        intervals = [(row["t0"], row["t1"]) for row in energy_rows(rows)]
        assert intervals[0][0] == 100.0
        assert intervals[-1][1] == clock.monotonic_s()
        assert all(left[1] == right[0] for left, right in itertools.pairwise(intervals))

    def test_what_nothing_measures_is_unknown(self, clock):
        source = ScriptedSource(clock, "gpu0", quality=None)
        meter = Meter([source], clock)
        meter.sample()
        (row,) = energy_rows(step(meter, clock))
        assert (row["energy_j"], row["quality"], row["gap"]) == (None, None, True)
        assert meter.totals()["gpu0"].energy_j is None
        assert meter.mean_power_w(1.0) is None


class TestMeanPower:
    def run(
        self, clock, qualities: dict[str, Quality], power_w: dict[str, float], seconds: int = 20
    ) -> Meter:
        sources = [ScriptedSource(clock, name, quality) for name, quality in qualities.items()]
        for source in sources:
            source.energy_j = 0.0
        meter = Meter(sources, clock)
        meter.sample()
        for _ in range(seconds):
            for source in sources:
                source.energy_j += power_w[source.component.name]
            step(meter, clock)
        return meter

    def test_devices_are_the_gpus_where_there_are_any(self, clock):
        meter = self.run(
            clock,
            {"gpu0": Quality.MEASURED, "gpu1": Quality.SIMULATED, "cpu": Quality.ESTIMATED},
            {"gpu0": 200.0, "gpu1": 50.0, "cpu": 30.0},
        )
        assert meter.mean_power_w(10.0) == (pytest.approx(250.0), Quality.SIMULATED)
        assert meter.mean_power_w(10.0, "cpu") == (pytest.approx(30.0), Quality.ESTIMATED)
        assert meter.mean_power_w(10.0, "all") == (pytest.approx(280.0), Quality.SIMULATED)

    def test_devices_are_the_cpu_with_its_memory_elsewhere(self, clock):
        meter = self.run(
            clock, {"cpu": Quality.MEASURED, "dram": Quality.MEASURED}, {"cpu": 30.0, "dram": 4.0}
        )
        assert meter.mean_power_w(10.0) == (pytest.approx(34.0), Quality.MEASURED)
        assert meter.mean_power_w(10.0, "gpu") is None

    def test_window_edge_inside_an_interval(self, clock):
        source = ScriptedSource(clock)
        source.energy_j = 0.0
        meter = Meter([source], clock)
        meter.sample()
        source.energy_j = 1000.0
        step(meter, clock, 10.0)
        source.energy_j = 3000.0
        step(meter, clock, 10.0)
        power_w, _ = meter.mean_power_w(15.0)
        assert power_w == pytest.approx((500.0 + 2000.0) / 15.0)

    def test_half_a_window_must_be_known(self, clock):
        meter = self.run(clock, {"cpu": Quality.MEASURED}, {"cpu": 30.0}, seconds=20)
        assert meter.mean_power_w(40.0) == (pytest.approx(30.0), Quality.MEASURED)
        assert meter.mean_power_w(41.0) is None

    def test_a_part_is_not_presented_as_the_whole(self, clock):
        good, bad = ScriptedSource(clock, "gpu0"), ScriptedSource(clock, "gpu1")
        good.energy_j = 0.0
        bad.error = TransientDeviceError("lost")
        meter = Meter([good, bad], clock)
        meter.sample()
        for _ in range(10):
            good.energy_j += 100.0
            step(meter, clock)
        assert bad.num_errors_raised == 11
        assert meter.mean_power_w(5.0) is None

    def test_what_is_no_longer_sampled_becomes_unknown(self, clock):
        meter = self.run(clock, {"cpu": Quality.MEASURED}, {"cpu": 30.0})
        clock.advance(2.0)
        assert meter.mean_power_w(10.0) is not None
        clock.advance(60.0)
        assert meter.mean_power_w(10.0) is None

    def test_history_is_bounded(self, clock):
        source = ScriptedSource(clock)
        source.energy_j = 0.0
        meter = Meter([source], clock, history_s=10.0)
        meter.sample()
        for _ in range(500):
            source.energy_j += 30.0
            step(meter, clock)
        assert len(meter._tracks["cpu"].history) <= 13
        assert meter.mean_power_w(10.0) == (pytest.approx(30.0), Quality.MEASURED)


class TestSink:
    def test_gets_each_row_once(self, clock):
        source, booked = ScriptedSource(clock), []
        source.energy_j = 0.0
        meter = Meter([source], clock, sink=booked.extend)
        rows = meter.sample()
        rows += step(meter, clock)
        assert booked == rows
        assert len(booked) == 1

    def test_rows_outlive_a_failing_sink(self, clock):
        source, booked, refusals = ScriptedSource(clock), [], []

        def sink(rows):
            if len(refusals) < 2:
                refusals.append(len(rows))
                raise ConnectionError("coordinator is away")
            booked.extend(rows)

        source.energy_j = 0.0
        meter = Meter([source], clock, sink=sink)
        meter.sample()
        for _ in range(4):
            source.energy_j += 10.0
            step(meter, clock)
        # The second offer holds the two rows that wait and the note that will tell of it.
        assert refusals == [1, 3]
        assert [row["energy_j"] for row in energy_rows(booked)] == [10.0] * 4
        assert [row["code"] for row in notes(booked)] == ["EADT-349"]
        assert "none was lost" in notes(booked)[0]["text"]


class TestThread:
    def test_samples_until_stopped_and_books_the_rest(self, clock):
        source, booked, arrived = ScriptedSource(clock), [], threading.Event()

        def sink(rows):
            booked.extend(rows)
            arrived.set()

        source.energy_j = 0.0
        meter = Meter([source], clock, sampling_interval=0.001, sink=sink)
        meter.start()
        meter.start()
        assert meter.is_running
        source.energy_j = 5.0
        clock.advance(1.0)
        assert arrived.wait(10.0)
        source.energy_j = 9.0
        clock.advance(1.0)
        meter.stop()
        meter.stop()
        assert not meter.is_running
        assert sum(row["energy_j"] for row in energy_rows(booked)) == 9.0
        assert energy_rows(booked)[-1]["t1"] == clock.monotonic_s()

    def test_survives_a_source_that_raises(self, clock):
        source = ScriptedSource(clock)
        source.error = OSError("device gone")
        meter = Meter([source], clock, sampling_interval=0.001)
        meter.start()
        for _ in range(3):
            source.was_read.clear()
            clock.advance(1.0)
            assert source.was_read.wait(10.0)
        assert meter.is_running
        meter.stop()
        assert source.num_errors_raised >= 3

    def test_ends_with_its_meter(self, clock):
        source = ScriptedSource(clock)
        source.energy_j = 0.0
        meter = Meter([source], clock, sampling_interval=0.001)
        meter.start()
        thread = meter._thread
        assert thread.daemon
        del meter
        gc.collect()
        clock.advance(1.0)
        thread.join(10.0)
        assert not thread.is_alive()
