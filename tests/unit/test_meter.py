"""Points, gaps, silence, hanging devices, notes and threads of the meter.

Readings come through the meter's own threads; a cut waits for them, so that with the fake clock every test is
exact. What hangs, hangs until the test releases it, and only the fake clock makes it late.
"""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator

import pynvml
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eadt.adapters.nvml import Nvml
from eadt.errors import EadtError, TransientDeviceError
from eadt.node.meter import Meter, Point
from eadt.node.sensors import Component, NvmlSource, Reading, UnmeasuredSource, unknown_gpu
from eadt.node.sensors.base import PowerSource
from eadt.testing.clock import FakeClock
from eadt.testing.fake_nvml import FakeGpu, FakeNvml
from eadt.units import Quality

DEADLINE_S = 0.02
"""Of a call, on the fake clock; who waits for one looks at that clock as often in real time."""

BUSY = TransientDeviceError("it is busy")


class Scripted:
    """Components whose readings the test says: a number, a Reading or an exception."""

    def __init__(self, clock: FakeClock, *components: Component) -> None:
        self._clock = clock
        self.components = components
        self.energy_j: dict[str, float] = {}
        self.power_w: dict[str, float] = {}
        self.errors: dict[str, Exception] = {}
        self.gates: dict[str, threading.Event] = {}
        self.hanging = threading.Semaphore(0)
        self.calls: list[tuple[str, str]] = []
        self.threads: list[tuple[str, int]] = []

    def read(self, component: Component) -> Reading:
        name = component.name
        self.calls.append((name, threading.current_thread().name))
        self.threads.append((name, threading.get_ident()))
        gate = self.gates.get(name)
        if gate is not None and not gate.is_set():
            self.hanging.release()
            gate.wait()
        if name in self.errors:
            raise self.errors[name]
        return Reading(component, self._clock.monotonic_s(), self.energy_j.get(name), self.power_w.get(name))

    def close(self) -> None:
        pass

    def hang(self, name: str) -> None:
        self.gates[name] = threading.Event()


def part(name: str = "cpu", quality: Quality | None = Quality.MEASURED, **facts: float) -> Component:
    return Component(name, "scripted", quality, name, name, **facts)


class Bench:
    """A meter on scripted components, its notes, and the sum that the test expects."""

    def __init__(
        self, clock: FakeClock, *components: Component, interval_s: float = 3600.0, **options
    ) -> None:
        self.clock = clock
        self.source = Scripted(clock, *(components or (part(),)))
        self.notes: list[tuple[str, str]] = []
        options.setdefault("read_deadline_s", DEADLINE_S)
        self.meter = Meter(
            [self.source],
            clock,
            interval_s,
            on_note=lambda code, text: self.notes.append((code, text)),
            **options,
        )

    def start(self, **energy_j: float) -> Bench:
        self.source.energy_j.update(energy_j or {"cpu": 0.0})
        self.meter.start()
        return self

    def cut(self, seconds: float = 0.0, **grown_j: float) -> dict[str, Point]:
        self.clock.advance(seconds)
        for name, energy_j in grown_j.items():
            self.source.energy_j[name] = self.source.energy_j.get(name, 0.0) + energy_j
        return self.meter.cut()[1]

    def codes(self) -> list[str]:
        return [code for code, _text in self.notes]


def wait_until(condition: Callable[[], bool], clock: FakeClock | None = None) -> None:
    """Wait, really and with a deadline, for what another thread does; the clock may go on meanwhile."""
    tick = threading.Event()
    for _ in range(2000):
        if condition():
            return
        if clock is not None:
            clock.advance(DEADLINE_S)
        tick.wait(0.005)
    raise AssertionError("it did not happen within 10 s")


def cut_while_hanging(bench: Bench, num_hanging: int = 1) -> dict[str, Point]:
    """A cut during which devices hang until the clock has made them late."""
    points: list[dict[str, Point]] = []
    thread = threading.Thread(target=lambda: points.append(bench.cut()), daemon=True)
    thread.start()
    for _ in range(num_hanging):
        assert bench.source.hanging.acquire(timeout=10.0)
        # It returns neither before nor after, until the call is late.
        assert not points
        bench.clock.advance(DEADLINE_S)
    thread.join(10.0)
    assert points, "the cut waits for ever"
    return points[0]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(monotonic_s=100.0)


@pytest.fixture
def make(clock: FakeClock) -> Iterator[Callable[..., Bench]]:
    """Makes benches, and ends what they started."""
    made: list[Bench] = []

    def make_one(*components: Component, **options) -> Bench:
        made.append(Bench(clock, *components, **options))
        return made[-1]

    yield make_one
    for bench in made:
        for gate in bench.source.gates.values():
            gate.set()
        bench.meter.stop()


class TestPoints:
    def test_a_counters_difference(self, make, clock):
        bench = make().start(cpu=5000.0)
        at_s, first = bench.meter.cut()
        assert (at_s, first["cpu"].energy_j) == (100.0, 0.0)
        point = bench.cut(2.0, cpu=120.0)["cpu"]
        assert point == Point(102.0, 120.0, 2.0, Quality.MEASURED, "")

    def test_cutting_twice_at_one_moment_counts_nothing_twice(self, make):
        bench = make().start()
        bench.cut(1.0, cpu=7.0)
        assert bench.cut()["cpu"].energy_j == bench.cut()["cpu"].energy_j == 7.0
        assert bench.meter.totals()["cpu"].energy_j == 7.0

    def test_readings_between_cuts_change_nothing_in_a_counters_sum(self, make, clock):
        bench = make(interval_s=0.001).start()
        before = len(bench.source.calls)
        clock.advance(1.0)
        wait_until(lambda: len(bench.source.calls) > before + 3, clock)
        bench.source.energy_j["cpu"] = 50.0
        clock.advance(1.0)
        assert bench.meter.cut()[1]["cpu"].energy_j == 50.0

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.tuples(st.floats(0.01, 9.0), st.floats(0.0, 1000.0)), min_size=1, max_size=20))
    def test_trapezoid_is_exact_for_piecewise_linear_power(self, steps):
        bench = Bench(FakeClock())
        bench.source.power_w["cpu"] = before_w = 10.0
        bench.meter.start()
        expected_j = 0.0
        for seconds, power_w in steps:
            expected_j += 0.5 * (before_w + power_w) * seconds
            bench.source.power_w["cpu"] = before_w = power_w
            bench.cut(seconds)
        total = bench.meter.totals()["cpu"]
        assert total.energy_j == pytest.approx(expected_j)
        assert (total.num_gaps, total.unknown_s) == (0, 0.0)
        bench.meter.stop()

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.lists(
            st.tuples(st.floats(0.1, 30.0), st.floats(0.0, 500.0), st.booleans()), min_size=2, max_size=20
        )
    )
    def test_differences_add_up_to_the_counters_whatever_fails_between(self, steps):
        bench = Bench(FakeClock()).start(cpu=1000.0)
        points = [bench.cut()["cpu"]]
        spent_j = elapsed_s = 0.0
        for seconds, power_w, fails in [*steps, (20.0, 0.0, False), (20.0, 600.0, False)]:
            bench.source.errors = {"cpu": BUSY} if fails else {}
            spent_j += power_w * seconds
            elapsed_s += seconds
            points.append(bench.cut(seconds, cpu=power_w * seconds)["cpu"])
        grown = [later.energy_j - sooner.energy_j for sooner, later in itertools.pairwise(points)]
        assert min(grown) >= 0.0
        # The last step is long and strong enough to pay back whatever was believed too much.
        assert sum(grown) == pytest.approx(max(spent_j, points[-2].energy_j - points[0].energy_j))
        assert points[-1].known_s == pytest.approx(elapsed_s)
        assert bench.meter.totals()["cpu"].num_gaps == 0
        bench.meter.stop()

    def test_the_point_is_for_the_moment_of_the_cut_not_of_the_reading(self, make, clock):
        bench = make()
        source, real_read = bench.source, bench.source.read
        bench.start()
        bench.cut()

        def slow_read(component: Component) -> Reading:
            clock.advance(1.0)
            source.energy_j["cpu"] += 100.0
            return real_read(component)

        clock.advance(9.0)
        source.energy_j["cpu"] += 900.0
        source.read = slow_read
        at_s, points = bench.meter.cut()
        assert at_s == 109.0
        assert points["cpu"].energy_j == pytest.approx(900.0)
        assert points["cpu"].known_s == pytest.approx(9.0)
        assert points["cpu"].quality is Quality.MEASURED


class TestGaps:
    def test_one_failed_reading_of_a_counter_that_goes_on_is_no_gap(self, make):
        bench = make().start()
        bench.cut(1.0, cpu=100.0)
        bench.source.errors["cpu"] = BUSY
        failed = bench.cut(1.0, cpu=100.0)["cpu"]
        bench.source.errors.clear()
        after = bench.cut(1.0, cpu=100.0)["cpu"]
        assert (after.energy_j, after.known_s, after.quality) == (300.0, 3.0, Quality.MEASURED)
        assert (failed.quality, failed.why_unknown) == (Quality.STALE, "")
        assert bench.meter.totals()["cpu"].num_gaps == 0
        assert bench.notes == []

    def test_a_counter_that_goes_backwards_is_a_gap_and_then_starts_anew(self, make):
        bench = make().start(cpu=900.0)
        bench.cut()
        bench.source.energy_j["cpu"] = 3.0
        gap = bench.cut(1.0)["cpu"]
        assert (gap.energy_j, gap.known_s, gap.quality) == (0.0, 0.0, None)
        assert "began anew" in gap.why_unknown
        after = bench.cut(1.0, cpu=50.0)["cpu"]
        assert (after.energy_j, after.known_s, after.why_unknown) == (50.0, 1.0, "")
        total = bench.meter.totals()["cpu"]
        assert (total.energy_j, total.known_s, total.unknown_s, total.num_gaps) == (50.0, 1.0, 1.0, 1)
        assert bench.codes() == ["EADT-347"]

    @pytest.mark.parametrize(("grown_j", "is_refused"), [(700.0, False), (8000.0, True)])
    def test_a_jump_that_no_card_can_draw_is_refused(self, make, grown_j, is_refused):
        bench = make(part("gpu0", greatest_power_w=1000.0, resolution_s=0.1)).start(gpu0=10.0)
        bench.cut()
        point = bench.cut(1.0, gpu0=grown_j)["gpu0"]
        assert point.energy_j == (0.0 if is_refused else grown_j)
        assert bool(point.why_unknown) == is_refused
        assert bench.cut(1.0, gpu0=500.0)["gpu0"].energy_j == point.energy_j + 500.0

    def test_a_counter_may_show_at_once_what_it_lagged_behind(self, make):
        bench = make(part("gpu0", greatest_power_w=1000.0, resolution_s=0.1)).start(gpu0=10.0)
        bench.cut()
        # 0.1 s at full power, all of it shown after 10 ms.
        assert bench.cut(0.01, gpu0=100.0)["gpu0"].energy_j == 100.0

    def test_power_readings_too_far_apart_are_a_gap_but_a_counter_bridges(self, make):
        bench = make(part("gpu0"), part("gpu1"), interval_s=1.0)
        bench.source.power_w["gpu0"] = 100.0
        bench.start(gpu1=0.0)
        # The thread's own readings would bridge it.
        bench.meter.stop()
        bench.meter._interval_s = 3600.0
        bench.meter._readers = None
        bench.clock.advance(60.0)
        bench.source.energy_j["gpu1"] = 6000.0
        bench.meter.start()
        totals = bench.meter.totals()
        assert (totals["gpu0"].energy_j, totals["gpu0"].unknown_s) == (None, 60.0)
        assert (totals["gpu1"].energy_j, totals["gpu1"].unknown_s) == (6000.0, 0.0)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_no_number_is_no_reading(self, make, value):
        bench = make().start()
        bench.cut(1.0, cpu=100.0)
        bench.source.energy_j["cpu"] = value
        assert bench.cut(1.0)["cpu"].quality is Quality.STALE
        bench.source.energy_j["cpu"] = 200.0
        assert bench.cut(1.0)["cpu"].energy_j == 200.0

    def test_a_source_that_says_its_counter_began_anew_is_believed(self, make):
        bench = make().start(cpu=10.0)
        bench.cut()
        real_read = bench.source.read
        bench.source.read = lambda component: real_read(component)._replace(series=1)
        gap = bench.cut(1.0, cpu=5.0)["cpu"]
        assert (gap.energy_j, gap.quality) == (0.0, None)
        assert bench.cut(1.0, cpu=5.0)["cpu"].energy_j == 5.0


class TestSilence:
    def silent(self, make, **options) -> Bench:
        """100 W for 20 s, and then nothing."""
        bench = make(**options).start()
        for _ in range(20):
            bench.cut(1.0, cpu=100.0)
        bench.source.errors["cpu"] = BUSY
        return bench

    def test_what_is_silent_is_believed_for_a_while_and_then_unknown(self, make):
        bench = self.silent(make, interval_s=1e-3, stale_after_s=10.0)
        stale = bench.cut(4.0)["cpu"]
        assert (stale.energy_j, stale.known_s) == (pytest.approx(2400.0), 24.0)
        assert (stale.quality, stale.why_unknown) == (Quality.STALE, "")
        assert bench.notes == []
        part_known = bench.cut(10.0)["cpu"]
        assert (part_known.energy_j, part_known.known_s) == (pytest.approx(3000.0), 30.0)
        assert (part_known.quality, part_known.why_unknown) == (Quality.STALE, "it is busy")
        unknown = bench.cut(10.0)["cpu"]
        assert (unknown.energy_j, unknown.known_s) == (part_known.energy_j, 30.0)
        assert (unknown.quality, unknown.why_unknown) == (None, "it is busy")

    def test_a_counter_that_went_on_tells_afterwards_what_was_unknown(self, make):
        bench = self.silent(make, interval_s=1e-3)
        bench.cut(60.0, cpu=3000.0)
        bench.source.errors.clear()
        back = bench.cut(1.0, cpu=100.0)["cpu"]
        assert (back.energy_j, back.known_s) == (5100.0, 81.0)
        assert bench.meter.totals()["cpu"].unknown_s == 0.0

    def test_what_was_believed_too_much_is_paid_back_never_taken_back(self, make):
        bench = self.silent(make, interval_s=1e-3)
        believed = bench.cut(5.0, cpu=0.0)["cpu"]
        bench.source.errors.clear()
        held = bench.cut(1.0, cpu=10.0)["cpu"]
        assert held.energy_j == believed.energy_j == pytest.approx(2500.0)
        assert held.quality is Quality.STALE
        paid = bench.cut(10.0, cpu=1000.0)["cpu"]
        assert (paid.energy_j, paid.quality) == (3010.0, Quality.MEASURED)
        assert paid.known_s == 36.0

    def test_a_counter_that_began_anew_meanwhile_leaves_what_was_believed(self, make):
        bench = self.silent(make, interval_s=1e-3)
        believed = bench.cut(30.0)["cpu"]
        bench.source.errors.clear()
        bench.source.energy_j["cpu"] = 1.0
        back = bench.cut(1.0)["cpu"]
        assert (back.energy_j, back.known_s) == (believed.energy_j, believed.known_s) == (3000.0, 30.0)
        assert "began anew" in back.why_unknown
        assert bench.cut(1.0, cpu=70.0)["cpu"].energy_j == 3070.0

    @pytest.mark.parametrize("error", [BUSY, ValueError("a bug in a driver")])
    def test_is_said_once_when_it_becomes_unknown_and_once_when_it_is_back(self, make, error):
        bench = self.silent(make, interval_s=1e-3)
        bench.source.errors["cpu"] = error
        for _ in range(5):
            bench.cut(6.0)
        assert bench.codes() == ["EADT-347"]
        assert str(error.args[0]) in bench.notes[0][1]
        bench.source.errors.clear()
        for _ in range(3):
            bench.cut(1.0)
        assert bench.codes() == ["EADT-347", "EADT-348"]

    def test_what_nothing_measures_is_unknown_from_the_start_and_never_called(self, clock):
        notes: list[tuple[str, str]] = []
        source = UnmeasuredSource([unknown_gpu("gpu0", "it is AMD's", "amd-1")], clock)
        called: list[Component] = []
        source.read = called.append
        meter = Meter([source], clock, on_note=lambda code, text: notes.append((code, text)))
        meter.start()
        clock.advance(5.0)
        point = meter.cut()[1]["gpu0"]
        assert (point.energy_j, point.known_s, point.quality) == (0.0, 0.0, None)
        assert point.why_unknown == "gpu0: its energy is unknown: it is AMD's"
        assert meter.totals()["gpu0"].energy_j is None
        assert meter.totals()["gpu0"].unknown_s == 5.0
        assert meter.mean_power_w(["gpu0"], 1.0) is None
        assert notes == [("EADT-347", "gpu0: its energy is unknown: it is AMD's")]
        meter.stop()
        assert called == []

    def test_between_two_readings_far_apart_nothing_is_silent(self, make):
        bench = make(interval_s=60.0).start()
        bench.source.errors["cpu"] = BUSY
        bench.cut(100.0)
        assert bench.notes == []


class TestHanging:
    def hanging(self, make, *names: str) -> Bench:
        """Four cards at 100 W, of which some hang from now on."""
        bench = make(*(part(f"gpu{n}") for n in range(4)))
        cards = {f"gpu{n}": 0.0 for n in range(4)}
        bench.start(**cards)
        bench.cut(10.0, **dict.fromkeys(cards, 1000.0))
        bench.clock.advance(10.0)
        for name in cards:
            bench.source.energy_j[name] += 1000.0
        for name in names:
            bench.source.hang(name)
        return bench

    @pytest.mark.parametrize("name", ["gpu0", "gpu2", "gpu3"])
    def test_a_card_that_hangs_is_stale_then_unknown_and_nobody_else(self, make, name):
        bench = self.hanging(make, name)
        points = cut_while_hanging(bench)
        assert {n: point.quality for n, point in points.items()} == {
            n: Quality.STALE if n == name else Quality.MEASURED for n in points
        }
        # The others' counters stood still while the clock went on to the deadline: hence not quite 2000.
        assert all(point.energy_j == pytest.approx(2000.0, rel=0.01) for point in points.values())
        # It does not delay the next ones at all: they would wait for ever, for the clock stands still.
        bench.clock.advance(3600.0 * 2.5)
        unknown = bench.cut()
        assert "has not answered" in unknown[name].why_unknown
        assert all(not point.why_unknown for n, point in unknown.items() if n != name)
        assert bench.codes() == ["EADT-347"]
        assert bench.notes[0][1].startswith(f"{name}: ")

    def test_a_whole_driver_that_hangs_delays_a_cut_by_two_deadlines_at_most(self, make):
        bench = self.hanging(make, "gpu0", "gpu1", "gpu2", "gpu3")
        begun_s = bench.clock.monotonic_s()
        results: list[dict[str, Point]] = []
        thread = threading.Thread(target=lambda: results.append(bench.cut()), daemon=True)
        thread.start()
        assert bench.source.hanging.acquire(timeout=10.0)
        bench.clock.advance(DEADLINE_S)
        for _ in range(3):  # each by a thread of its own
            assert bench.source.hanging.acquire(timeout=10.0)
        bench.clock.advance(DEADLINE_S)
        thread.join(10.0)
        assert results
        assert bench.clock.monotonic_s() - begun_s == pytest.approx(2.0 * DEADLINE_S)
        assert {point.quality for point in results[0].values()} == {Quality.STALE}

    def test_a_call_that_returns_is_taken_in_again_and_its_card_proves_itself(self, make):
        bench = self.hanging(make, "gpu1")
        cut_while_hanging(bench)
        bench.source.gates["gpu1"].set()
        wait_until(lambda: not bench.meter._readers._devices["gpu1"].is_late)
        back = bench.cut(1.0, gpu1=100.0)["gpu1"]
        assert (back.energy_j, back.quality) == (2100.0, Quality.MEASURED)
        readers = bench.meter._readers
        assert readers._devices["gpu1"].lane is not readers._devices["gpu0"].lane
        for _ in range(12):
            bench.cut(1.0)
        wait_until(lambda: len({id(device.lane) for device in readers._devices.values()}) == 1)
        # And it may hang a second time.
        bench.source.hang("gpu1")
        bench.clock.advance(1.0)
        points = cut_while_hanging(bench)
        assert [n for n, point in points.items() if point.quality is Quality.STALE] == ["gpu1"]

    def test_one_that_keeps_hanging_does_not_delay_the_others_again(self, make):
        bench = self.hanging(make, "gpu1")
        cut_while_hanging(bench)
        bench.source.gates["gpu1"].set()
        wait_until(lambda: not bench.meter._readers._devices["gpu1"].is_late)
        bench.source.hang("gpu1")
        points: list[dict[str, Point]] = []
        bench.clock.advance(1.0)
        thread = threading.Thread(target=lambda: points.append(bench.cut()), daemon=True)
        thread.start()
        assert bench.source.hanging.acquire(timeout=10.0)
        readers = bench.meter._readers
        # While it hangs, and no time has passed, the others have answered.
        wait_until(
            lambda: all(d.answered == readers._wanted for n, d in readers._devices.items() if n != "gpu1")
        )
        bench.clock.advance(DEADLINE_S)
        thread.join(10.0)
        assert points

    def test_where_nobody_asks_the_others_are_read_on(self, make, clock):
        bench = make(part("gpu0"), part("gpu1"), interval_s=0.001, stale_after_s=0.1)
        bench.start(gpu0=0.0, gpu1=0.0)
        bench.source.hang("gpu0")
        clock.advance(0.01)
        assert bench.source.hanging.acquire(timeout=10.0)
        num_before = len(bench.source.calls)
        # The watching thread sees it, once the clock says so.
        wait_until(lambda: len(bench.source.calls) > num_before + 5, clock)
        assert {name for name, _thread in bench.source.calls[num_before + 1 :]} == {"gpu1"}

    def test_never_two_calls_of_one_device_at_a_time(self, make, clock):
        bench = make(*(part(f"gpu{n}") for n in range(4)), interval_s=0.001)
        inside: dict[str, int] = dict.fromkeys((f"gpu{n}" for n in range(4)), 0)
        worst: list[int] = []
        read = bench.source.read

        def watched(component: Component) -> Reading:
            inside[component.name] += 1
            worst.append(inside[component.name])
            try:
                return read(component)
            finally:
                inside[component.name] -= 1

        bench.source.read = watched
        bench.start(**dict.fromkeys(inside, 0.0))
        for name in ("gpu0", "gpu2", "gpu0"):
            bench.source.hang(name)
            clock.advance(1.0)
            assert bench.source.hanging.acquire(timeout=10.0)
            clock.advance(DEADLINE_S)
            bench.cut()
            assert bench.meter._readers._devices[name].is_late
            bench.source.gates[name].set()
            for _ in range(15):
                bench.cut(0.001)
        assert max(worst) == 1

    def test_a_thread_that_hung_keeps_to_its_own_card(self, make):
        bench = self.hanging(make, "gpu0")
        cut_while_hanging(bench)
        hung = next(ident for name, ident in reversed(bench.source.threads) if name == "gpu0")
        bench.source.threads.clear()
        bench.source.gates["gpu0"].set()
        wait_until(lambda: not bench.meter._readers._devices["gpu0"].is_late)
        bench.cut(1.0)
        assert {name for name, ident in bench.source.threads if ident == hung} == {"gpu0"}

    def test_what_is_stopped_in_the_middle_of_a_round_calls_no_other_card(self, make):
        bench = self.hanging(make, "gpu0")
        stopping = threading.Thread(target=lambda: bench.meter.stop(DEADLINE_S / 2), daemon=True)
        stopping.start()
        assert bench.source.hanging.acquire(timeout=10.0)
        bench.clock.advance(DEADLINE_S / 2)
        stopping.join(10.0)
        assert not stopping.is_alive()
        num_calls = len(bench.source.calls)
        reader = next(t for t in threading.enumerate() if t.name == "eadt-reader")
        bench.source.gates["gpu0"].set()
        reader.join(10.0)
        assert not reader.is_alive()
        assert len(bench.source.calls) == num_calls

    def test_stop_waits_for_no_call(self, make, clock):
        bench = self.hanging(make, "gpu2")
        cut_while_hanging(bench)
        # With the clock standing still, waiting would be for ever.
        bench.meter.stop(timeout_s=5.0)
        assert not bench.meter.is_running
        num_calls = len(bench.source.calls)
        late = [t for t in threading.enumerate() if t.name == "eadt-reader"]
        assert late
        assert all(thread.daemon for thread in late)
        bench.source.gates["gpu2"].set()
        for thread in late:
            thread.join(10.0)
            assert not thread.is_alive()
        assert len(bench.source.calls) == num_calls

    def test_no_caller_ever_calls_a_device(self, make):
        bench = self.hanging(make)
        bench.cut(1.0)
        bench.meter.mean_power_w(["gpu0"], 1.0)
        bench.meter.totals()
        bench.meter.stop()
        assert {thread for _name, thread in bench.source.calls} == {"eadt-reader"}

    def test_one_thread_reads_all_devices(self, make):
        bench = self.hanging(make)
        readers = [t for t in threading.enumerate() if t.name == "eadt-reader"]
        assert len(readers) == 1
        assert bench.cut(1.0)["gpu0"].quality is Quality.MEASURED


class TestNvml:
    """The driver hangs and restarts under the real adapter and source."""

    @pytest.fixture
    def library(self, clock) -> Iterator[FakeNvml]:
        library = FakeNvml([FakeGpu(uuid=f"GPU-{n}", power_w=100.0) for n in range(3)], clock)
        yield library
        for hang in library._hangs:
            hang.release()

    @pytest.fixture
    def metered(self, library, clock) -> Iterator[tuple[Meter, list[tuple[str, str]]]]:
        nvml = Nvml(library)
        nvml.open()
        notes: list[tuple[str, str]] = []
        meter = Meter(
            [NvmlSource(nvml, nvml.gpus(), clock)],
            clock,
            3600.0,
            on_note=lambda code, text: notes.append((code, text)),
            read_deadline_s=DEADLINE_S,
        )
        meter._stale_after_s = meter._fresh_s = 10.0
        meter.start()
        yield meter, notes
        meter.stop()

    def test_a_hung_call_of_the_driver(self, library, metered, clock):
        meter, _notes = metered
        hang = library.hang("nvmlDeviceGetTotalEnergyConsumption", index=1)
        clock.advance(5.0)
        points: list[dict[str, Point]] = []
        thread = threading.Thread(target=lambda: points.append(meter.cut()[1]), daemon=True)
        thread.start()
        assert hang.reached.wait(10.0)
        clock.advance(DEADLINE_S)
        thread.join(10.0)
        assert [point.quality for point in points[0].values()] == [Quality.MEASURED, None, Quality.MEASURED]

    def test_a_restart_of_the_driver_is_a_gap_after_which_it_goes_on(self, library, metered, clock):
        meter, notes = metered
        for _ in range(3):
            clock.advance(10.0)
            meter.cut()
        library.unload_driver()
        for _ in range(3):
            clock.advance(11.0)
            down = meter.cut()[1]
        assert {point.quality for point in down.values()} == {None}
        library.gpus.reverse()
        library.load_driver()
        inits_before = library.calls["nvmlInit"]
        for _ in range(60):
            clock.advance(1.0)
            meter.cut()
        # Opened anew once, not at every reading.
        assert library.calls["nvmlInit"] - inits_before == 1
        before = meter.cut()[1]
        clock.advance(10.0)
        after = meter.cut()[1]
        for name, point in after.items():
            assert point.energy_j - before[name].energy_j == pytest.approx(1000.0)
            assert point.quality is Quality.MEASURED
        # Each card: unknown, known again, and that its counter began anew. Once.
        for name in after:
            told = [code for code, text in notes if text.startswith(name)]
            assert sorted(told) == ["EADT-347", "EADT-347", "EADT-348"]

    def test_is_not_opened_anew_more_often_than_every_ten_seconds(self, library, metered, clock):
        meter, _notes = metered
        library.unload_driver()
        inits_before = library.calls["nvmlInit"]
        for _ in range(100):
            clock.advance(0.5)
            meter.cut()
        # At 0, 10 and 30 s.
        assert library.calls["nvmlInit"] - inits_before == 3

    def test_one_failure_is_no_restart(self, library, metered, clock):
        meter, _notes = metered
        library.fail("nvmlDeviceGetTotalEnergyConsumption", pynvml.NVML_ERROR_UNKNOWN, index=0, times=1)
        inits_before = library.calls["nvmlInit"]
        for _ in range(3):
            clock.advance(1.0)
            points = meter.cut()[1]
        assert library.fired
        assert library.calls["nvmlInit"] == inits_before
        assert points["gpu0"].energy_j == pytest.approx(300.0)

    def test_a_counter_that_may_have_begun_anew_is_not_taken_for_one_that_went_on(self, clock):
        library = FakeNvml([FakeGpu(power_w=100.0, energy_j=5.0)], clock)
        nvml = Nvml(library)
        nvml.open()
        source = NvmlSource(nvml, nvml.gpus(), clock)
        (component,) = source.components
        first = source.read(component)
        library.unload_driver()
        library.load_driver()
        clock.advance(20.0)
        for _ in range(2):
            with pytest.raises(EadtError):
                source.read(component)
        again = source.read(component)
        assert again.energy_j > first.energy_j
        assert again.series == first.series + 1

    def test_a_counter_that_went_on_after_a_reopening_is_one_series(self, clock):
        library = FakeNvml([FakeGpu(power_w=100.0, energy_j=1e6)], clock)
        nvml = Nvml(library)
        nvml.open()
        source = NvmlSource(nvml, nvml.gpus(), clock)
        (component,) = source.components
        first = source.read(component)
        library.fail("nvmlDeviceGetTotalEnergyConsumption", pynvml.NVML_ERROR_GPU_IS_LOST, times=2)
        clock.advance(20.0)
        for _ in range(2):
            with pytest.raises(EadtError):
                source.read(component)
        assert nvml.opening == 2
        assert source.read(component).series == first.series


class TestMeanPower:
    def run(self, make, clock, seconds: int = 20, **power_w: float) -> Bench:
        qualities = {"gpu1": Quality.SIMULATED, "cpu": Quality.ESTIMATED}
        bench = make(*(part(name, qualities.get(name, Quality.MEASURED)) for name in power_w), interval_s=1.0)
        bench.start(**dict.fromkeys(power_w, 0.0))
        for _ in range(seconds):
            bench.cut(1.0, **power_w)
        return bench

    def test_of_the_named_components(self, make, clock):
        meter = self.run(make, clock, gpu0=200.0, gpu1=50.0, cpu=30.0).meter
        assert meter.mean_power_w(["gpu0", "gpu1"], 10.0) == (pytest.approx(250.0), Quality.SIMULATED)
        assert meter.mean_power_w(["gpu0"], 10.0) == (pytest.approx(200.0), Quality.MEASURED)
        assert meter.mean_power_w(["gpu0", "gpu7"], 10.0) is None
        assert meter.mean_power_w([], 10.0) is None

    def test_window_edge_inside_an_interval(self, make):
        bench = make().start()
        bench.cut(10.0, cpu=1000.0)
        bench.cut(10.0, cpu=2000.0)
        power_w, _ = bench.meter.mean_power_w(["cpu"], 15.0)
        assert power_w == pytest.approx((500.0 + 2000.0) / 15.0)

    def test_half_a_window_must_be_known(self, make, clock):
        meter = self.run(make, clock, cpu=30.0).meter
        assert meter.mean_power_w(["cpu"], 40.0) == (pytest.approx(30.0), Quality.ESTIMATED)
        assert meter.mean_power_w(["cpu"], 41.0) is None

    def test_a_part_is_not_presented_as_the_whole(self, make, clock):
        bench = make(part("gpu0"), part("gpu1"))
        bench.source.errors["gpu1"] = BUSY
        bench.start(gpu0=0.0)
        for _ in range(10):
            bench.cut(1.0, gpu0=100.0)
        assert bench.meter.mean_power_w(["gpu0", "gpu1"], 5.0) is None

    def test_what_is_no_longer_read_becomes_stale_then_unknown(self, make, clock):
        bench = self.run(make, clock, gpu0=30.0)
        bench.source.errors["gpu0"] = BUSY
        for seconds, expected in [(2.0, Quality.MEASURED), (5.0, Quality.STALE), (60.0, None)]:
            bench.clock.advance(seconds)
            power = bench.meter.mean_power_w(["gpu0"], 10.0)
            assert (power and power[1]) == expected

    def test_history_is_bounded_at_any_rate(self, make):
        bench = make(history_s=4.5).start()
        for _ in range(6000):
            bench.cut(0.001, cpu=0.03)
        history = bench.meter._sums.tracks["cpu"]._history
        # Kept are every second or third of the 4500.
        assert len(history) <= 2 * 1800
        assert history[0][0] >= bench.clock.monotonic_s() - 4.6
        assert bench.meter.mean_power_w(["cpu"], 1.0) == (pytest.approx(30.0), Quality.MEASURED)


class TestLife:
    def test_reads_on_a_grid_until_stopped_and_knows_the_rest(self, make, clock):
        bench = make(interval_s=0.001).start()
        bench.meter.start()
        assert bench.meter.is_running
        num_before = len(bench.source.calls)
        wait_until(lambda: len(bench.source.calls) > num_before + 3, clock)
        bench.source.energy_j["cpu"] = 9.0
        clock.advance(1.0)
        bench.meter.stop()
        bench.meter.stop()
        assert not bench.meter.is_running
        assert bench.meter.totals()["cpu"].energy_j == 9.0
        assert bench.meter.totals()["cpu"].unknown_s == 0.0
        assert not [t for t in threading.enumerate() if t.name == "eadt-reader"]

    def test_can_be_started_again_and_a_counter_tells_what_was_between(self, make, clock):
        bench = make().start()
        bench.meter.stop()
        bench.source.energy_j["cpu"] = 40.0
        clock.advance(5.0)
        bench.meter.start()
        assert bench.meter.totals()["cpu"].energy_j == 40.0

    def test_survives_sources_and_listeners_that_raise(self, clock):
        source = Scripted(clock, part())
        heard: list[str] = []

        def raise_on_note(code: str, text: str) -> None:
            heard.append(code)
            raise RuntimeError("the listener is broken")

        meter = Meter(
            [source],
            clock,
            0.001,
            on_note=raise_on_note,
            read_deadline_s=DEADLINE_S,
            stale_after_s=0.1,
        )
        source.errors["cpu"] = OSError("device gone")
        meter.start()
        clock.advance(100.0)
        # Said by the watching thread, without anybody asking.
        wait_until(lambda: heard == ["EADT-347"])
        num_before = len(source.calls)
        wait_until(lambda: len(source.calls) > num_before + 3, clock)
        source.errors.clear()
        source.energy_j["cpu"] = 0.0
        clock.advance(1.0)
        wait_until(lambda: heard == ["EADT-347", "EADT-348"])
        source.energy_j["cpu"] = -1.0
        clock.advance(1.0)
        # Whoever cuts does not hear of it either.
        meter.cut()
        meter.stop()
        assert heard == ["EADT-347", "EADT-348", "EADT-347"]

    @pytest.mark.parametrize("answer", [None, "12 J", [1.0]])
    def test_survives_sources_that_answer_nonsense(self, clock, answer):
        source = Scripted(clock, part())
        source.energy_j["cpu"] = 0.0
        meter = Meter([source], clock, 3600.0)
        meter.start()
        real_read, source.read = source.read, lambda _component: answer
        clock.advance(1.0)
        assert meter.cut()[1]["cpu"].energy_j == 0.0
        source.read = real_read
        source.energy_j["cpu"] = 12.0
        clock.advance(1.0)
        assert meter.cut()[1]["cpu"].energy_j == 12.0
        meter.stop()

    def test_ends_its_threads_with_itself(self, clock):
        source: PowerSource = Scripted(clock, part())
        source.energy_j["cpu"] = 0.0
        meter = Meter([source], clock, 0.001, read_deadline_s=DEADLINE_S, stale_after_s=0.1)
        meter.start()
        threads = [t for t in threading.enumerate() if t.name in ("eadt-reader", "eadt-meter")]
        assert len(threads) == 2
        assert all(thread.daemon for thread in threads)
        gone = weakref.ref(meter)
        del meter
        gc.collect()
        wait_until(lambda: gone() is None)
        for thread in threads:
            thread.join(10.0)
            assert not thread.is_alive()

    def test_cuts_from_many_threads_agree(self, make, clock):
        bench = make().start()
        results: list[dict[str, Point]] = []
        bench.clock.advance(1.0)
        bench.source.energy_j["cpu"] = 10.0
        threads = [
            threading.Thread(target=lambda: results.append(bench.meter.cut()[1]), daemon=True)
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10.0)
        assert [points["cpu"].energy_j for points in results] == [10.0] * 8

    def test_a_meter_that_does_not_run_reads_nothing(self, make):
        bench = make()
        assert bench.meter.cut()[1] == {}
        assert bench.source.calls == []
