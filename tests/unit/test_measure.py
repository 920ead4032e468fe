"""``eadt.measure()`` on a pretended driver and a clock that the test moves."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

import eadt
from eadt import measurement
from eadt.adapters.nvml import Nvml
from eadt.errors import TransientDeviceError
from eadt.measurement import Measurement, SharedMeter
from eadt.node.sensors import Component, NvmlSource, Reading, SourceSelection, UnmeasuredSource, unknown_gpu
from eadt.testing.clock import FakeClock
from eadt.testing.fake_nvml import FakeGpu, FakeNvml
from eadt.units import Quality


class Cpu:
    """30 W, estimated to 20 %; or what the test says."""

    def __init__(self, clock: FakeClock) -> None:
        self._clock = clock
        self.components = (
            Component(
                "cpu", "cpu_estimate", Quality.ESTIMATED, "cpu", "m/cpu", 0.01, relative_uncertainty=0.2
            ),
        )
        self.error: Exception | None = None

    def read(self, component: Component) -> Reading:
        if self.error is not None:
            raise self.error
        now_s = self._clock.monotonic_s()
        return Reading(component, now_s, 30.0 * now_s)

    def close(self) -> None:
        pass


class Machine:
    """Two cards of 100 and 200 W and a CPU."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.library = FakeNvml(
            [FakeGpu(uuid="GPU-aa", power_w=100.0), FakeGpu(uuid="GPU-bb", power_w=200.0)], clock
        )
        self.cpu = Cpu(clock)
        self.more: list = []
        self.has_gpus = True
        self.num_detections = 0

    def detect(self) -> SourceSelection:
        self.num_detections += 1
        sources: list = [self.cpu, *self.more]
        if self.has_gpus:
            nvml = Nvml(self.library)
            nvml.open()
            sources.insert(0, NvmlSource(nvml, nvml.gpus(), self.clock))
        return SourceSelection(sources)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def machine(clock, monkeypatch) -> Iterator[Machine]:
    machine = Machine(clock)
    shared = SharedMeter(machine.detect, clock)
    monkeypatch.setattr(measurement, "_shared", shared)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield machine
    assert shared._num_open == 0
    assert shared._meter is None or not shared._meter.is_running


def num_readers() -> int:
    return sum(thread.name == "eadt-reader" for thread in threading.enumerate())


class TestWindow:
    def test_says_what_was_used_and_how_well_that_is_known(self, machine, clock):
        with eadt.measure("load") as m:
            assert str(m) == "load: not over yet"
            assert m.energy_j is None
            clock.advance(10.0)
        assert m.by_component == pytest.approx({"gpu0": 1000.0, "gpu1": 2000.0, "cpu": 300.0})
        assert (m.seconds, m.energy_j, m.mean_power_w) == (10.0, pytest.approx(3300.0), pytest.approx(330.0))
        assert m.quality is Quality.ESTIMATED
        assert m.qualities == {
            "gpu0": Quality.MEASURED,
            "gpu1": Quality.MEASURED,
            "cpu": Quality.ESTIMATED,
        }
        assert (m.at_least, m.notes) == (False, [])
        # 5 % of 1 and 2 kJ, 20 % of 300 J, in quadrature, and a little for the ends.
        assert m.uncertainty_j == pytest.approx((50**2 + 100**2 + 60**2) ** 0.5, rel=0.1)
        assert str(m) == "load: 3.30 ± 0.13 kJ in 10 s, 330 W on average, estimated + measured"

    def test_a_window_too_short_for_its_sources_says_so(self, machine, clock):
        with eadt.measure() as long:
            clock.advance(6.0)
        with eadt.measure() as m:
            clock.advance(0.5)
        assert not long.notes
        (note,) = m.notes
        assert "gpu0, gpu1" in note
        assert "5 s" in note
        assert "0.50 s is shorter" in str(m)
        # At each end 0.13 s of the power may be in or out.
        assert m.uncertainty_j > 0.13 * 200.0

    def test_a_counter_that_has_not_stepped_is_not_certainly_zero(self, machine, clock):
        machine.library.gpus[0].power_w = machine.library.gpus[1].power_w = 0.0
        with eadt.measure() as m:
            clock.advance(0.001)
        assert m.by_component["gpu0"] == 0.0
        # What the cards can draw: 1050 W each.
        assert m.uncertainty_j > 0.13 * 1050.0

    def test_nothing_measurable_is_unknown_never_zero(self, machine, clock):
        machine.has_gpus = False
        machine.cpu.error = TransientDeviceError("the counter is away")
        with eadt.measure("x") as m:
            clock.advance(1.0)
        assert (m.energy_j, m.mean_power_w, m.quality, m.uncertainty_j) == (None, None, None, None)
        assert m.by_component == {"cpu": None}
        assert m.seconds == 1.0
        assert "the counter is away" in m.notes[0]
        assert str(m).startswith("x: energy not measured, 1.00 s")
        assert "the counter is away" in str(m)

    def test_a_card_that_nothing_can_measure_makes_it_at_least(self, machine, clock):
        machine.more = [UnmeasuredSource([unknown_gpu("gpu2", "it is AMD's", "amd-1")], clock)]
        with eadt.measure() as m:
            clock.advance(10.0)
        assert m.at_least
        assert m.energy_j == pytest.approx(3300.0)
        assert m.mean_power_w is None
        assert m.by_component["gpu2"] is None
        assert m.notes == ["gpu2: its energy is unknown: it is AMD's"]
        assert "at least 3.30" in str(m)

    def test_where_a_source_states_no_error_the_sum_has_none(self, machine, clock):
        part = machine.cpu.components[0]
        machine.cpu.components = (
            Component(part.name, part.source, part.quality, part.detail, part.identity),
        )
        with eadt.measure() as m:
            clock.advance(10.0)
        assert m.uncertainty_j is None
        assert "uncertainty not known" in str(m)

    def test_what_is_silent_at_the_end_is_stale(self, machine, clock):
        with eadt.measure() as m:
            for _ in range(3):
                clock.advance(2.0)
                with eadt.measure():
                    pass
            machine.cpu.error = TransientDeviceError("busy")
            clock.advance(2.0)
        assert m.by_component["cpu"] == pytest.approx(240.0)
        assert m.qualities["cpu"] is Quality.STALE
        assert m.quality is Quality.STALE

    def test_energy_from_before_the_window_is_not_in_it(self, machine, clock):
        with eadt.measure():
            clock.advance(1.0)
            machine.cpu.error = TransientDeviceError("busy")
            clock.advance(90.0)
            with eadt.measure() as m:
                machine.cpu.error = None
                clock.advance(10.0)
        assert m.by_component["cpu"] == pytest.approx(300.0)
        assert m.qualities["cpu"] is Quality.STALE
        assert any("silent before" in note for note in m.notes)

    def test_an_exception_passes_through_and_the_measurement_is_filled(self, machine, clock):
        def fail() -> None:
            clock.advance(10.0)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), eadt.measure() as m:
            fail()
        assert m.energy_j == pytest.approx(3300.0)

    def test_sensors_that_cannot_be_found_never_end_the_work(self, machine, clock, monkeypatch):
        def broken() -> SourceSelection:
            raise RuntimeError("no /proc here")

        monkeypatch.setattr(measurement, "_shared", SharedMeter(broken, clock))
        with eadt.measure() as m:
            clock.advance(2.0)
        assert (m.energy_j, m.seconds) == (None, 2.0)
        assert "no /proc here" in m.notes[0]

    def test_in_a_forked_child_it_says_that_it_does_not_know(self, machine, clock, monkeypatch):
        window = eadt.measure()
        with window as m:
            clock.advance(2.0)
            with monkeypatch.context() as patch:
                patch.setattr(measurement.os, "getpid", lambda: -1)
                child = eadt.measure()
                child._open = window._open
                child.__exit__(None, None, None)
            assert m.energy_j is None
            assert "forked" in m.notes[0]
        assert m.energy_j is not None


class TestSharing:
    def test_windows_nested_and_at_once_share_one_meter(self, machine, clock):
        with eadt.measure("outer") as outer:
            clock.advance(5.0)
            with eadt.measure("inner") as inner:
                clock.advance(5.0)
                assert num_readers() == 1
            clock.advance(5.0)
        assert machine.num_detections == 1
        assert inner.energy_j == pytest.approx(1650.0)
        assert outer.energy_j == pytest.approx(4950.0)
        assert num_readers() == 0

    def test_windows_of_several_threads(self, machine, clock):
        begun, go_on = threading.Barrier(9), threading.Event()
        results: list[Measurement] = []

        def work() -> None:
            with eadt.measure() as m:
                begun.wait(10.0)
                assert go_on.wait(10.0)
            results.append(m)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        begun.wait(10.0)
        assert num_readers() == 1
        clock.advance(10.0)
        go_on.set()
        for thread in threads:
            thread.join(10.0)
        assert [m.energy_j for m in results] == [pytest.approx(3300.0)] * 8

    def test_between_windows_nothing_runs_and_the_sensors_are_kept(self, machine, clock):
        for _ in range(3):
            with eadt.measure():
                clock.advance(1.0)
            assert num_readers() == 0
        assert machine.num_detections == 1

    def test_one_object_measures_one_window_at_a_time(self, machine):
        window = eadt.measure()
        with window, pytest.raises(RuntimeError, match="open already"), window:
            pass
        with window as again:
            pass
        assert again.seconds is not None


class TestWhichCards:
    @pytest.mark.parametrize(
        ("visible", "expected"),
        [
            (None, ["gpu0", "gpu1", "cpu"]),
            ("1", ["gpu1", "cpu"]),
            ("GPU-a", ["gpu0", "cpu"]),
            ("GPU-bb, 0", ["gpu0", "gpu1", "cpu"]),
            ("", ["cpu"]),
            ("-1", ["cpu"]),
        ],
    )
    def test_those_that_cuda_may_use(self, machine, clock, monkeypatch, visible, expected):
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with eadt.measure() as m:
            clock.advance(10.0)
        assert list(m.by_component) == expected

    def test_the_argument_beats_the_environment(self, machine, clock, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        with eadt.measure(gpus=[0]) as m:
            clock.advance(10.0)
        assert list(m.by_component) == ["gpu0", "cpu"]


class TestDecorator:
    def test_measures_each_call(self, machine, clock):
        ended: list[Measurement] = []

        @eadt.measure(on_end=ended.append)
        def work(seconds: float, *, twice: bool = False) -> str:
            """Works."""
            clock.advance(seconds)
            if twice:
                work(seconds)
            return "done"

        assert work(10.0) == "done"
        assert work(5.0, twice=True) == "done"
        assert (work.__name__, work.__doc__) == ("work", "Works.")
        # The inner call ends before the outer.
        assert [m.seconds for m in work.measurements] == [10.0, 5.0, 10.0]
        assert ended == list(work.measurements)
        assert ended[0].name.endswith("work")

    def test_methods_and_coroutines(self, machine, clock):
        class Model:
            @eadt.measure("load")
            def load(self) -> int:
                clock.advance(10.0)
                return 7

        @eadt.measure()
        async def serve() -> int:
            await asyncio.sleep(0)
            clock.advance(10.0)
            return 8

        assert Model().load() == 7
        assert asyncio.run(serve()) == 8
        assert Model.load.measurements[0].energy_j == serve.measurements[0].energy_j == pytest.approx(3300.0)

    def test_an_exception_passes_through(self, machine, clock):
        @eadt.measure()
        def fail() -> None:
            clock.advance(10.0)
            raise KeyError("x")

        with pytest.raises(KeyError):
            fail()
        assert fail.measurements[0].energy_j == pytest.approx(3300.0)

    def test_a_listener_that_fails_does_not_end_the_work(self, machine, clock):
        def refuse(_m: Measurement) -> None:
            raise OSError("disk full")

        with eadt.measure(on_end=refuse) as m:
            clock.advance(10.0)
        assert m.energy_j is not None

    def test_what_would_measure_nothing_is_refused(self):
        def numbers() -> Iterator[int]:
            yield 1

        with pytest.raises(TypeError, match="generator"):
            eadt.measure()(numbers)
        with pytest.raises(TypeError, match="parentheses"):
            eadt.measure(numbers)


def test_importing_the_package_touches_nothing():
    code = (
        "import sys, threading, eadt\n"
        "heavy = {'torch', 'ray', 'pynvml', 'pydantic', 'psutil'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "eadt.measure\n"
        "assert not {'torch', 'ray', 'pynvml'} & set(sys.modules)\n"
        "assert callable(eadt.measure)\n"
        "assert threading.active_count() == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
