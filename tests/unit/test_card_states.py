"""How cards do: what NVML says in our words, and the summary of looks, on a pretended NVML."""

from __future__ import annotations

import threading

import pynvml
import pytest

from eadt.adapters.nvml import ComputeProcess, Nvml, NvmlGpu
from eadt.errors import DevicePermissionError, DeviceUnsupportedError, TransientDeviceError
from eadt.node.card_states import CardLook, CardStates, look_at, nvml_looks
from eadt.testing.clock import FakeClock
from eadt.testing.fake_nvml import FakeGpu, FakeNvml

WAIT_S = 20.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def library(clock) -> FakeNvml:
    return FakeNvml([FakeGpu(), FakeGpu(uuid="GPU-b")], clock)


@pytest.fixture
def gpus(library) -> list[NvmlGpu]:
    nvml = Nvml(library)
    nvml.open()
    return nvml.gpus()


class TestReadings:
    def test_units(self, library, gpus):
        library.gpus[1].temperature_c = 71
        library.gpus[1].sm_clock_mhz = 1410
        library.gpus[1].max_sm_clock_mhz = 1755
        assert gpus[1].temperature_c() == 71.0
        assert gpus[1].sm_clock_mhz() == 1410.0
        assert gpus[1].max_sm_clock_mhz() == 1755.0

    @pytest.mark.parametrize(
        ("bits", "reasons"),
        [
            (0, set()),
            (pynvml.nvmlClocksEventReasonGpuIdle, set()),
            (pynvml.nvmlClocksEventReasonApplicationsClocksSetting, set()),
            (pynvml.nvmlClocksEventReasonDisplayClockSetting | pynvml.nvmlClocksEventReasonSyncBoost, set()),
            (pynvml.nvmlClocksEventReasonSwPowerCap, {"power_cap"}),
            (pynvml.nvmlClocksEventReasonSwThermalSlowdown, {"heat"}),
            (
                pynvml.nvmlClocksEventReasonHwThermalSlowdown | pynvml.nvmlClocksEventReasonHwSlowdown,
                {"heat"},
            ),
            (
                pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown | pynvml.nvmlClocksEventReasonHwSlowdown,
                {"power_brake"},
            ),
            (pynvml.nvmlClocksEventReasonHwSlowdown, {"hardware"}),
            (
                pynvml.nvmlClocksEventReasonHwSlowdown | pynvml.nvmlClocksEventReasonSwPowerCap,
                {"hardware", "power_cap"},
            ),
            (pynvml.nvmlClocksThrottleReasonReliability, {"other"}),
            (1 << 40, {"other"}),
        ],
    )
    def test_throttle_reasons_in_our_words(self, library, gpus, bits, reasons):
        library.gpus[0].event_reasons = bits
        assert gpus[0].throttle_reasons() == reasons

    def test_throttle_reasons_of_an_older_driver(self, library, gpus):
        library.gpus[0].event_reasons = pynvml.nvmlClocksEventReasonSwPowerCap
        library.fail("nvmlDeviceGetCurrentClocksEventReasons", pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        assert gpus[0].throttle_reasons() == {"power_cap"}
        assert library.fired

    def test_processes_of_mps_are_counted_once(self, library, gpus):
        library.gpus[0].processes = [(10, 1 << 30), (11, None)]
        library.gpus[0].mps_processes = [(11, 5), (12, 6)]
        assert gpus[0].compute_processes() == [
            ComputeProcess(10, 1 << 30),
            ComputeProcess(11, None),
            ComputeProcess(12, 6),
        ]
        library.gpus[0].mps_processes = None
        assert [process.pid for process in gpus[0].compute_processes()] == [10, 11]

    @pytest.mark.parametrize(
        ("method", "function"),
        [
            ("temperature_c", "nvmlDeviceGetTemperature"),
            ("sm_clock_mhz", "nvmlDeviceGetClockInfo"),
            ("max_sm_clock_mhz", "nvmlDeviceGetMaxClockInfo"),
            ("throttle_reasons", "nvmlDeviceGetCurrentClocksEventReasons"),
            ("compute_processes", "nvmlDeviceGetComputeRunningProcesses"),
        ],
    )
    def test_errors_as_of_all_readings(self, library, gpus, method, function):
        library.fail(function, pynvml.NVML_ERROR_NO_PERMISSION, times=1)
        with pytest.raises(DevicePermissionError):
            getattr(gpus[0], method)()
        library.fail(function, pynvml.NVML_ERROR_UNKNOWN, times=1)
        with pytest.raises(TransientDeviceError):
            getattr(gpus[0], method)()
        library.fail(function, pynvml.NVML_ERROR_NOT_SUPPORTED)
        library.fail("nvmlDeviceGetCurrentClocksThrottleReasons", pynvml.NVML_ERROR_NOT_SUPPORTED)
        with pytest.raises(DeviceUnsupportedError):
            getattr(gpus[0], method)()


class TestLook:
    def test_all_that_can_be_read(self, library, gpus):
        library.gpus[0] = FakeGpu(
            utilisation_percentage=80, used_bytes=3, total_bytes=7, temperature_c=60, sm_clock_mhz=1200,
            event_reasons=pynvml.nvmlClocksEventReasonSwPowerCap, processes=[(10, 1), (11, 2)],
        )  # fmt: skip
        look = look_at(gpus[0], lambda processes: sum(process.pid != 10 for process in processes))
        assert look == CardLook(0.8, 3, 7, 60.0, 1200.0, frozenset({"power_cap"}), 1)

    def test_what_cannot_be_read_is_unknown_alone(self, library, gpus):
        library.gpus[0].mig_enabled = True
        library.fail("nvmlDeviceGetComputeRunningProcesses", pynvml.NVML_ERROR_NO_PERMISSION)
        look = look_at(gpus[0], lambda processes: 99)
        assert (look.utilisation_fraction, look.foreign_processes) == (None, None)
        assert look.temperature_c == 55.0

    def test_by_name_and_of_a_card_that_nvml_does_not_know(self, library, gpus):
        asked = []

        def count(name, processes):
            asked.append((name, [process.pid for process in processes]))
            return 3

        library.gpus[1].processes = [(7, None)]
        look = nvml_looks({"gpu1": gpus[1]}, count)
        assert look("gpu1").foreign_processes == 3
        assert look("gpu0") == CardLook()
        assert asked == [("gpu1", [7])]


class TestSummary:
    def states(self, clock, looks: dict[str, list[CardLook | Exception]]) -> CardStates:
        def look(name):
            seen = looks[name].pop(0)
            if isinstance(seen, Exception):
                raise seen
            return seen

        states = CardStates(look, clock)
        states.set_cards(list(looks))
        return states

    def test_means_and_maxima_and_fractions_of_looks(self, clock):
        heat, cap = frozenset({"heat"}), frozenset({"heat", "power_cap"})
        states = self.states(
            clock,
            {
                "gpu0": [
                    CardLook(0.5, 100, 900, 60.0, 1000.0, heat, 0),
                    CardLook(1.0, 300, 900, 50.0, 1500.0, cap, 2),
                    CardLook(0.75, 200, 900, 55.0, 1250.0, frozenset(), 1),
                    CardLook(),
                ],
                "gpu1": [CardLook(0.25), CardLook(None, 1, 2), RuntimeError("driver"), CardLook(0.75)],
            },
        )
        for _ in range(4):
            states.look("gpu0")
            states.look("gpu1")
        clock.advance(60.0)
        row = states.take("n1")
        assert (row.node, row.t0, row.t1) == ("n1", 1000.0, 1060.0)
        assert row.components == ["gpu0", "gpu1"]
        assert row.utilisation_fraction == [0.75, 0.5]
        assert row.memory_used_bytes == [300, 1]
        assert row.memory_total_bytes == [900, 2]
        assert row.temperature_c == [60.0, None]
        assert row.sm_clock_mhz == [1250.0, None]
        assert row.throttled == [{"heat": 0.6667, "power_cap": 0.3333}, {}]
        assert row.foreign_processes == [2, None]

    def test_each_take_begins_anew(self, clock):
        states = self.states(clock, {"gpu0": [CardLook(0.5), CardLook(0.9)]})
        states.look("gpu0")
        clock.advance(60.0)
        assert states.take("n").utilisation_fraction == [0.5]
        states.look("gpu0")
        clock.advance(30.0)
        row = states.take("n")
        assert (row.t0, row.t1, row.utilisation_fraction) == (1060.0, 1090.0, [0.9])

    def test_of_nothing_no_row(self, clock):
        states = self.states(clock, {"gpu0": [CardLook(), CardLook(temperature_c=0.0)], "gpu1": []})
        assert states.take("n") is None
        states.look("gpu0")
        assert states.take("n") is None
        states.look("gpu0")
        row = states.take("n")
        assert (row.components, row.temperature_c) == (["gpu0", "gpu1"], [0.0, None])

    def test_only_this_runs_cards(self, clock):
        states = self.states(
            clock, {"gpu0": [CardLook(0.1), CardLook(0.9), CardLook(0.9)], "gpu1": [CardLook(0.2)] * 2}
        )
        states.look("gpu0")
        states.look("gpu1")
        states.set_cards(["gpu1"])
        states.look("gpu0")
        assert states.take("n").utilisation_fraction == [0.1, 0.2]  # it was this run's for a while
        states.look("gpu0")
        states.look("gpu1")
        row = states.take("n")
        assert (row.components, row.utilisation_fraction) == (["gpu1"], [0.2])


class Driver:
    """Looks that wait to be let go on, and say when they came."""

    def __init__(self) -> None:
        self.came = {name: threading.Semaphore(0) for name in ("gpu0", "gpu1")}
        self.may_go = {name: threading.Semaphore(0) for name in ("gpu0", "gpu1")}

    def look(self, name: str) -> CardLook:
        self.came[name].release()
        assert self.may_go[name].acquire(timeout=WAIT_S)
        return CardLook(0.5)

    def threads(self) -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("eadt-look-")]

    def wait(self, name: str) -> None:
        assert self.came[name].acquire(timeout=WAIT_S)

    def assert_rests(self, name: str) -> None:
        assert not self.came[name].acquire(timeout=0.1)


class TestThreads:
    @pytest.fixture
    def driver(self):
        driver = Driver()
        yield driver
        for thread in driver.threads():
            for name in driver.may_go:
                driver.may_go[name].release(100)
            thread.join(WAIT_S)
        assert driver.threads() == []

    def states(self, driver, interval_s: float = 0.0) -> CardStates:
        states = CardStates(driver.look, FakeClock(), interval_s)
        states.set_cards(["gpu0", "gpu1"])
        return states

    def test_nothing_begins_by_itself(self, driver):
        self.states(driver)
        assert driver.threads() == []

    def test_a_look_that_hangs_is_nobody_elses_affair_and_stop_does_not_wait(self, driver):
        states = self.states(driver)
        states.start()
        states.start()
        driver.wait("gpu0")
        for _ in range(3):
            driver.wait("gpu1")
            driver.may_go["gpu1"].release()
        driver.wait("gpu1")
        row = states.take("n")
        assert row.utilisation_fraction == [None, 0.5]
        states.stop()
        states.stop()
        driver.may_go["gpu0"].release()
        driver.may_go["gpu1"].release()
        for thread in driver.threads():
            thread.join(WAIT_S)
        assert driver.threads() == []
        assert not driver.came["gpu0"].acquire(blocking=False)

    def test_a_card_that_hangs_gets_no_second_thread(self, driver):
        states = self.states(driver)
        states.start()
        driver.wait("gpu0")
        driver.wait("gpu1")
        states.set_cards(["gpu1"])
        states.take("n")
        states.set_cards(["gpu0", "gpu1"])
        assert len(driver.threads()) == 2
        driver.may_go["gpu0"].release()
        driver.wait("gpu0")
        states.stop()

    def test_a_card_that_is_no_longer_wanted_is_let_be(self, driver):
        states = self.states(driver, interval_s=3600.0)
        states.start()
        for name in ("gpu0", "gpu1"):
            driver.wait(name)
            driver.may_go[name].release()
            driver.assert_rests(name)
        (thread,) = (thread for thread in driver.threads() if thread.name == "eadt-look-gpu0")
        states.set_cards(["gpu1"])
        thread.join(WAIT_S)
        assert not thread.is_alive()
        states.set_cards(["gpu0"])
        driver.wait("gpu0")
        driver.may_go["gpu0"].release()
        driver.assert_rests("gpu0")
        states.stop()
