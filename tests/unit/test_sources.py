"""Sensors on pretended files and a pretended NVML: what is counted, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pynvml
import pytest

from eadt.adapters.nvml import Nvml
from eadt.config import PowerConfig
from eadt.errors import DevicePermissionError, DeviceUnsupportedError, EadtError, EnvironmentFailure
from eadt.node import utilisation
from eadt.node.sensors import (
    CpuEstimateSource,
    Host,
    RaplSource,
    Reading,
    SimulatedGpuSource,
    detect_sources,
)
from eadt.node.utilisation import CpuTimes, cgroup_core_limit, cgroup_memory_limit_bytes
from eadt.testing.clock import FakeClock
from eadt.testing.fake_nvml import FakeGpu, FakeNvml
from eadt.units import Quality


def power_config(source: str = "auto", num_gpus: int = 1) -> PowerConfig:
    return PowerConfig.model_validate({"source": source, "simulated": {"num_gpus": num_gpus}})


class Machine:
    """Folders that look like /proc, /sys/class/powercap and /dev."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.powercap = root / "powercap"
        self.proc_stat = root / "stat"
        self.devices = root / "dev"
        self.powercap.mkdir()
        self.devices.mkdir()
        self.set_cpu_ticks(user=1000, idle=9000)

    @property
    def host(self) -> Host:
        return Host(
            powercap_root=self.powercap,
            proc_stat=self.proc_stat,
            device_root=self.devices,
            kfd_root=self.root / "kfd",
        )

    def set_cpu_ticks(self, user: int = 0, system: int = 0, idle: int = 0, iowait: int = 0, steal: int = 0):
        self.proc_stat.write_text(f"cpu  {user} 0 {system} {idle} {iowait} 0 0 {steal} 0 0\ncpu0 1 2 3 4\n")

    def set_kfd_node(self, number: int, gpu_id: int, simd_count: int, unique_id: int = 0) -> None:
        folder = self.root / "kfd" / str(number)
        folder.mkdir(parents=True)
        (folder / "gpu_id").write_text(f"{gpu_id}\n")
        (folder / "properties").write_text(
            f"cpu_cores_count 0\nsimd_count {simd_count}\nvendor_id 4098\nunique_id {unique_id}\n"
        )

    def set_zone(self, zone: str, name: str, energy_j: float, range_j: float = 262143.0) -> Path:
        folder = self.powercap / zone
        folder.mkdir(exist_ok=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{int(range_j * 1e6)}\n")
        (folder / "energy_uj").write_text(f"{int(energy_j * 1e6)}\n")
        return folder


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def read(source) -> list[Reading]:
    """Every component of the source, as the reading thread does one after the other."""
    return [source.read(component) for component in source.components]


def energies(source) -> dict[str, float | None]:
    return {reading.component.name: reading.energy_j for reading in read(source)}


class TestRapl:
    def test_parts_of_a_package_and_second_views_of_it_are_not_counted_twice(self, machine, clock):
        machine.set_zone("intel-rapl:0", "package-0", 100.0)
        machine.set_zone("intel-rapl:0:0", "core", 60.0)
        machine.set_zone("intel-rapl:0:1", "uncore", 5.0)
        machine.set_zone("intel-rapl:0:2", "dram", 20.0)
        machine.set_zone("intel-rapl:1", "package-1", 200.0)
        machine.set_zone("intel-rapl:1:0", "dram", 30.0)
        machine.set_zone("intel-rapl:2", "psys", 900.0)
        machine.set_zone("intel-rapl-mmio:0", "package-0", 100.0)
        source = RaplSource(clock, machine.powercap)
        assert energies(source) == {"cpu": 0.0, "dram": 0.0}
        clock.advance(1.0)
        machine.set_zone("intel-rapl:0", "package-0", 150.0)
        machine.set_zone("intel-rapl:0:0", "core", 100.0)
        machine.set_zone("intel-rapl:1", "package-1", 270.0)
        machine.set_zone("intel-rapl:0:2", "dram", 23.0)
        machine.set_zone("intel-rapl:1:0", "dram", 34.0)
        machine.set_zone("intel-rapl:2", "psys", 1900.0)
        machine.set_zone("intel-rapl-mmio:0", "package-0", 150.0)
        assert energies(source) == pytest.approx({"cpu": 120.0, "dram": 7.0})
        assert {component.quality for component in source.components} == {Quality.MEASURED}

    def test_amd_has_no_dram_component(self, machine, clock):
        machine.set_zone("intel-rapl:0", "package-0", 100.0)
        machine.set_zone("intel-rapl:0:0", "core", 60.0)
        assert [c.name for c in RaplSource(clock, machine.powercap).components] == ["cpu"]

    def test_counter_wraps_around(self, machine, clock):
        machine.set_zone("intel-rapl:0", "package-0", 262100.0)
        source = RaplSource(clock, machine.powercap)
        read(source)
        clock.advance(1.0)
        machine.set_zone("intel-rapl:0", "package-0", 57.0)
        assert energies(source)["cpu"] == pytest.approx(100.0)

    def test_a_reset_begins_a_new_series(self, machine, clock):
        machine.set_zone("intel-rapl:0", "package-0", 1000.0)
        source = RaplSource(clock, machine.powercap)
        (first,) = read(source)
        clock.advance(1.0)
        machine.set_zone("intel-rapl:0", "package-0", 5.0)
        (reset,) = read(source)
        clock.advance(1.0)
        machine.set_zone("intel-rapl:0", "package-0", 105.0)
        (after,) = read(source)
        assert first.series != reset.series == after.series
        assert after.energy_j - reset.energy_j == pytest.approx(100.0)

    def test_not_read_for_so_long_that_it_may_have_wrapped_twice_begins_a_new_series(self, machine, clock):
        machine.set_zone("intel-rapl:0", "package-0", 1000.0)
        source = RaplSource(clock, machine.powercap)
        (first,) = read(source)
        clock.advance(3600.0)
        machine.set_zone("intel-rapl:0", "package-0", 2000.0)
        (late,) = read(source)
        assert late.series != first.series

    def test_one_failed_reading_loses_nothing(self, machine, clock):
        machine.set_zone("intel-rapl:0", "package-0", 1000.0)
        folder = machine.set_zone("intel-rapl:1", "package-1", 500.0)
        source = RaplSource(clock, machine.powercap)
        read(source)
        clock.advance(1.0)
        machine.set_zone("intel-rapl:0", "package-0", 1010.0)
        (folder / "energy_uj").write_text("nonsense")
        (failed,) = read(source)
        assert failed.energy_j is None
        assert "intel-rapl:1" in failed.failure.what
        clock.advance(1.0)
        machine.set_zone("intel-rapl:0", "package-0", 1020.0)
        machine.set_zone("intel-rapl:1", "package-1", 530.0)
        (after,) = read(source)
        assert (after.energy_j, after.series) == (pytest.approx(50.0), failed.series)

    def test_states_its_error_and_what_it_can_resolve(self, machine, clock):
        for package in range(2):
            machine.set_zone(f"intel-rapl:{package}", f"package-{package}", 1.0)
        machine.set_zone("intel-rapl:0:0", "dram", 1.0)
        cpu, dram = RaplSource(clock, machine.powercap).components
        assert 0.0 < cpu.relative_uncertainty < dram.relative_uncertainty < 1.0
        assert 0.0 < cpu.resolution_s < cpu.honest_window_s < 1.0
        # Two packages may draw twice as much as one before it is a jump.
        assert (cpu.greatest_power_w, dram.greatest_power_w) == (2000.0, 400.0)

    def test_a_late_first_reading_is_no_gap(self, machine, clock):
        machine.set_zone("intel-rapl:0", "package-0", 1000.0)
        source = RaplSource(clock, machine.powercap)
        clock.advance(3600.0)
        assert energies(source)["cpu"] == 0.0

    def test_only_root_may_read(self, machine, clock, monkeypatch):
        # Tests may run as root, whom no file mode stops: refuse at the opening of the file.
        folder = machine.set_zone("intel-rapl:0", "package-0", 1000.0)
        refused: list[str] = []
        real_open = utilisation.os.open

        def refusing_open(path, *args, **kwargs):
            if Path(path) == folder / "energy_uj":
                refused.append(str(path))
                raise PermissionError(13, "Permission denied", str(path))
            return real_open(path, *args, **kwargs)

        monkeypatch.setattr("eadt.node.sensors.rapl.os.open", refusing_open)
        with pytest.raises(DevicePermissionError) as caught:
            RaplSource(clock, machine.powercap)
        assert refused
        assert caught.value.code == "EADT-345"
        assert "chmod o+r" in caught.value.fix

    def test_counter_that_stands_still_at_zero_is_no_counter(self, machine, clock):
        machine.set_zone("intel-rapl:0", "package-0", 0.0)
        with pytest.raises(DeviceUnsupportedError, match="stand still"):
            RaplSource(clock, machine.powercap)


class TestCpuTimes:
    def test_waiting_and_stolen_time_is_not_busy(self, machine):
        machine.set_cpu_ticks(user=300, system=200, idle=10_000, iowait=5_000, steal=7_000)
        assert CpuTimes(machine.proc_stat).busy_core_seconds() == pytest.approx(5.0)

    def test_only_zeros_is_unknown_not_idle(self, machine):
        machine.set_cpu_ticks()
        with pytest.raises(DeviceUnsupportedError, match="counts no CPU time"):
            CpuTimes(machine.proc_stat).busy_core_seconds()

    def test_without_proc_psutil_answers(self, tmp_path):
        assert CpuTimes(tmp_path / "nothing").busy_core_seconds() > 0.0


class TestCpuEstimate:
    def test_energy_is_idle_time_plus_busy_cores(self, machine, clock):
        source = CpuEstimateSource(15.0, 12.0, clock, CpuTimes(machine.proc_stat))
        machine.set_cpu_ticks(user=1300, idle=9100)
        clock.advance(2.0)
        (reading,) = read(source)
        assert reading.energy_j == pytest.approx(15.0 * 2.0 + 12.0 * 3.0)
        assert reading.component.quality is Quality.ESTIMATED
        assert reading.at_s == clock.monotonic_s()

    def test_says_that_a_container_limit_plays_no_part(self, machine, clock, monkeypatch):
        monkeypatch.setattr("eadt.node.sensors.estimate.cgroup_core_limit", lambda: 0.5)
        source = CpuEstimateSource(15.0, 12.0, clock, CpuTimes(machine.proc_stat))
        assert "this container may use 0.5 of them" in source.components[0].detail


class TestCgroups:
    def test_version_2_takes_the_tightest_of_the_parents(self, tmp_path):
        inner = tmp_path / "outer" / "inner"
        inner.mkdir(parents=True)
        (inner / "cpu.max").write_text("400000 100000\n")
        (inner.parent / "cpu.max").write_text("150000 100000\n")
        (inner / "memory.max").write_text("max\n")
        (inner.parent / "memory.max").write_text("1000000\n")
        proc = tmp_path / "cgroup"
        proc.write_text("0::/outer/inner\n")
        assert cgroup_core_limit(tmp_path, proc) == 1.5
        assert cgroup_memory_limit_bytes(tmp_path, proc) == 1_000_000

    def test_version_1_and_no_limit(self, tmp_path):
        for controller in ("cpu", "memory"):
            (tmp_path / controller / "job").mkdir(parents=True)
        (tmp_path / "cpu" / "job" / "cpu.cfs_quota_us").write_text("-1\n")
        (tmp_path / "cpu" / "job" / "cpu.cfs_period_us").write_text("100000\n")
        (tmp_path / "memory" / "job" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
        proc = tmp_path / "cgroup"
        proc.write_text("4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n")
        assert cgroup_core_limit(tmp_path, proc) is None
        assert cgroup_memory_limit_bytes(tmp_path, proc) is None


class TestSimulated:
    def simulated(self, clock, seed=0, num_gpus=2) -> SimulatedGpuSource:
        return SimulatedGpuSource(num_gpus, 70.0, 300.0, seed, clock)

    def test_power_stays_between_idle_and_max(self, clock):
        source = self.simulated(clock)
        clock.advance(10.0)
        assert energies(source) == pytest.approx({"gpu0": 700.0, "gpu1": 700.0})
        source.set_utilisation(1.0)
        before = energies(source)
        for _ in range(40):
            clock.advance(0.5)
            now = energies(source)
            assert 0.95 * 300.0 < (now["gpu0"] - before["gpu0"]) / 0.5 <= 300.0
            before = now

    def test_sampling_rate_plays_no_part(self):
        totals = []
        for step_s in (0.1, 2.0):
            clock = FakeClock()
            source = self.simulated(clock)
            source.set_utilisation(0.6)
            for _ in range(round(20.0 / step_s)):
                clock.advance(step_s)
                read(source)
            totals.append(energies(source))
        assert totals[0] == pytest.approx(totals[1], rel=1e-9)

    def test_seed_decides(self):
        def total(seed: int) -> float | None:
            clock = FakeClock()
            source = self.simulated(clock, seed)
            source.set_utilisation(1.0)
            clock.advance(3.0)
            return energies(source)["gpu0"]

        assert total(1) == total(1)
        assert total(1) != total(2)

    def test_one_card_can_be_told_alone(self, clock):
        source = self.simulated(clock)
        source.set_utilisation(0.0)
        source.set_utilisation(1.0, gpu_index=1)
        clock.advance(100.0)
        readings = energies(source)
        assert readings["gpu0"] == pytest.approx(7000.0)
        assert readings["gpu1"] > 28_000.0

    def test_until_told_it_follows_the_cores(self, machine, clock, monkeypatch):
        monkeypatch.setattr("eadt.node.sensors.simulated.num_cores", lambda: 2)
        source = SimulatedGpuSource(1, 70.0, 300.0, 0, clock, CpuTimes(machine.proc_stat))
        machine.set_cpu_ticks(user=1000 + 1000, idle=10_000)
        clock.advance(10.0)
        # 10 core-seconds of 20: half busy.
        assert energies(source)["gpu0"] == pytest.approx(10.0 * (70.0 + 115.0), rel=0.02)


class TestDetection:
    def nvml(self, clock, *gpus: FakeGpu, **kwargs) -> Nvml:
        return Nvml(FakeNvml(list(gpus), clock, **kwargs))

    def detect(self, machine, clock, config=None, **kwargs):
        nvml = kwargs.pop("nvml", None) or self.nvml(clock, driver_loaded=False)
        return detect_sources(config or power_config(), clock, nvml=nvml, host=machine.host, **kwargs)

    def test_a_machine_with_nothing_gets_the_estimate_and_the_reasons(self, machine, clock):
        selection = self.detect(machine, clock)
        assert [(c.name, c.source, c.quality) for c in selection.components] == [
            ("cpu", "cpu_estimate", Quality.ESTIMATED)
        ]
        assert any("NVML" in line and "driver" in line for line in selection.not_chosen)
        assert any("RAPL" in line for line in selection.not_chosen)

    def test_gpu_node_prefers_the_counter_then_power_then_says_unknown(self, machine, clock):
        machine.set_zone("intel-rapl:0", "package-0", 10.0)
        nvml = self.nvml(
            clock,
            FakeGpu(uuid="GPU-a"),
            FakeGpu(uuid="GPU-b", has_energy_counter=False),
            FakeGpu(uuid="GPU-c", has_energy_counter=False, has_power=False, virtualisation_mode=2),
            FakeGpu(uuid="GPU-d", mig_enabled=True),
        )
        selection = self.detect(machine, clock, nvml=nvml)
        assert [(c.name, c.source, c.quality, c.identity) for c in selection.components[:4]] == [
            ("gpu0", "nvml_energy_counter", Quality.MEASURED, "GPU-a"),
            ("gpu1", "nvml_power", Quality.MEASURED, "GPU-b"),
            ("gpu2", "none", None, "GPU-c"),
            ("gpu3", "nvml_energy_counter", Quality.MEASURED, "GPU-d"),
        ]
        assert selection.components[4].source == "rapl"
        assert "MIG" in selection.components[3].detail
        assert "vGPU" in selection.components[2].detail
        readings = {r.component.name: r for r in read(selection.sources[0])}
        assert readings["gpu0"].energy_j == 5000.0
        assert readings["gpu1"].power_w == 100.0
        assert (readings["gpu2"].energy_j, readings["gpu2"].power_w) == (None, None)

    def test_one_failing_gpu_does_not_spoil_the_others(self, machine, clock):
        library = FakeNvml([FakeGpu(), FakeGpu(uuid="GPU-b")], clock)
        selection = self.detect(machine, clock, nvml=Nvml(library))
        library.fail("nvmlDeviceGetTotalEnergyConsumption", pynvml.NVML_ERROR_GPU_IS_LOST, index=1)
        source = selection.sources[0]
        first, second = source.components
        with pytest.raises(EadtError, match="lost"):
            source.read(second)
        assert library.fired
        assert source.read(first).energy_j is not None

    def test_only_the_named_gpus(self, machine, clock):
        gpus = (FakeGpu(), FakeGpu(uuid="GPU-b"), FakeGpu(uuid="GPU-c"))
        selection = self.detect(machine, clock, nvml=self.nvml(clock, *gpus), gpus=[0, "GPU-c"])
        assert [c.name for c in selection.components] == ["gpu0", "gpu2", "cpu"]
        selection = self.detect(machine, clock, nvml=self.nvml(clock, *gpus), gpus=())
        assert [c.name for c in selection.components] == ["cpu"]

    def test_gpus_that_the_kernel_shows_without_nvml_are_unknown(self, machine, clock):
        for name in ("nvidia0", "nvidia1", "nvidiactl"):
            (machine.devices / name).touch()
        selection = self.detect(machine, clock)
        assert [(c.name, c.quality) for c in selection.components] == [
            ("gpu0", None),
            ("gpu1", None),
            ("cpu", Quality.ESTIMATED),
        ]
        # Why, and what to do: it goes to the run's notes and to `eadt doctor`.
        assert any("NVML" in line and "driver" in line for line in selection.not_chosen)
        assert "Driver Not Loaded" in selection.components[0].detail

    def test_device_files_are_counted_not_sorted_as_text(self, machine, clock):
        for number in range(11):
            (machine.devices / f"nvidia{number}").touch()
        details = [c.detail for c in self.detect(machine, clock).components[:11]]
        assert [f"nvidia{n} " in detail for n, detail in enumerate(details)] == [True] * 11

    def test_gpus_of_amd_are_unknown_never_absent(self, machine, clock):
        machine.set_kfd_node(0, gpu_id=0, simd_count=0)
        machine.set_kfd_node(1, gpu_id=51110, simd_count=440, unique_id=98765)
        machine.set_kfd_node(2, gpu_id=4321, simd_count=440)
        selection = self.detect(machine, clock)
        first, second, cpu = selection.components
        assert [(c.name, c.source, c.quality) for c in (first, second)] == [
            ("gpu0", "none", None),
            ("gpu1", "none", None),
        ]
        assert first.identity == "amd-98765"
        assert second.identity.endswith("/kfd-4321")
        assert "AMD" in first.detail
        assert cpu.name == "cpu"
        assert any("AMD" in line and "rocm-smi" in line for line in selection.not_chosen)

    def test_gpus_of_amd_beside_nvidias_are_counted_on(self, machine, clock):
        machine.set_kfd_node(1, gpu_id=51110, simd_count=440)
        selection = self.detect(machine, clock, nvml=self.nvml(clock, FakeGpu(), FakeGpu(uuid="GPU-b")))
        assert [(c.name, c.quality) for c in selection.components[:3]] == [
            ("gpu0", Quality.MEASURED),
            ("gpu1", Quality.MEASURED),
            ("gpu2", None),
        ]

    def test_an_amd_driver_that_shows_no_gpu_is_said(self, machine, clock):
        (machine.devices / "kfd").touch()
        selection = self.detect(machine, clock)
        assert [c.name for c in selection.components] == ["cpu"]
        assert any("/dev/kfd" in line and "in no number" in line for line in selection.not_chosen)

    def test_a_card_that_shows_neither_counter_nor_power_is_said_with_the_fix(self, machine, clock):
        nvml = self.nvml(clock, FakeGpu(has_energy_counter=False, has_power=False, virtualisation_mode=2))
        selection = self.detect(machine, clock, nvml=nvml)
        assert any("gpu0" in line and "host" in line for line in selection.not_chosen)

    def test_nvml_sources_state_their_error_and_what_they_can_resolve(self, machine, clock):
        counter, power, odd = self.detect(
            machine,
            clock,
            nvml=self.nvml(
                clock,
                FakeGpu(uuid="GPU-a", power_limit_range_w=(200.0, 700.0)),
                FakeGpu(uuid="GPU-b", has_energy_counter=False),
                FakeGpu(uuid="GPU-c", has_power_limit=False),
            ),
        ).components[:3]
        assert counter.honest_window_s == 5.0
        assert 0.1 < counter.resolution_s < 0.2
        assert counter.relative_uncertainty == 0.05
        # Integrated power says more error, and about longer windows.
        assert power.relative_uncertainty > counter.relative_uncertainty
        assert power.resolution_s > counter.resolution_s
        assert power.honest_window_s > counter.honest_window_s
        assert (counter.greatest_power_w, odd.greatest_power_w) == (1050.0, 2000.0)

    def test_a_driver_that_hangs_is_given_up_and_its_cards_are_unknown(self, machine, clock, monkeypatch):
        monkeypatch.setattr("eadt.node.sensors.detect.NVML_DEADLINE_S", 0.05)
        (machine.devices / "nvidia0").touch()
        library = FakeNvml([FakeGpu()], clock)
        hang = library.hang("nvmlDeviceGetCount")
        selection = self.detect(machine, clock, nvml=Nvml(library))
        assert hang.reached.is_set()
        hang.release()
        assert [(c.name, c.quality) for c in selection.components] == [
            ("gpu0", None),
            ("cpu", Quality.ESTIMATED),
        ]
        assert any("not answered" in line for line in selection.not_chosen)

    def test_closing_waits_for_no_driver_that_hangs(self, machine, clock, monkeypatch):
        monkeypatch.setattr("eadt.node.sensors.detect._CLOSING_DEADLINE_S", 0.05)
        library = FakeNvml([FakeGpu()], clock)
        selection = self.detect(machine, clock, nvml=Nvml(library))
        hang = library.hang("nvmlShutdown")
        selection.close()
        assert hang.reached.is_set()
        hang.release()

    def test_how_cards_do_is_asked_of_those_that_nvml_knows(self, machine, clock):
        machine.set_kfd_node(1, gpu_id=51110, simd_count=440)
        selection = self.detect(machine, clock, nvml=self.nvml(clock, FakeGpu(utilisation_percentage=70)))
        states = selection.card_states(lambda _name, processes: len(processes), clock)
        states.set_cards(["gpu0", "gpu1"])
        for name in ("gpu0", "gpu1"):
            states.look(name)
        clock.advance(60.0)
        row = states.take("n1")
        assert dict(zip(row.components, row.utilisation_fraction, strict=True)) == {"gpu0": 0.7, "gpu1": None}

    def test_simulated_adds_gpus_to_the_cpu(self, machine, clock):
        selection = self.detect(machine, clock, power_config("simulated", num_gpus=2))
        assert [c.name for c in selection.components] == ["gpu0", "gpu1", "cpu"]
        assert selection.simulated is selection.sources[0]
        assert selection.as_dicts()[0]["quality"] == "simulated"

    @pytest.mark.parametrize("source", ["nvml", "rapl", "estimate"])
    def test_a_demanded_source_that_is_missing_stops_the_run(self, machine, clock, source):
        machine.set_cpu_ticks()
        with pytest.raises(EnvironmentFailure, match=f"power.source is {source}") as caught:
            self.detect(machine, clock, power_config(source))
        assert caught.value.code == "EADT-346"
        assert "power.source" in caught.value.fix

    def test_demanding_nvml_needs_one_readable_gpu(self, machine, clock):
        library = FakeNvml([FakeGpu(has_energy_counter=False, has_power=False)], clock)
        with pytest.raises(EnvironmentFailure, match="no GPU of this node can be read"):
            self.detect(machine, clock, power_config("nvml"), nvml=Nvml(library))
        assert library.num_inits == 0

    def test_demanding_the_estimate_ignores_better_ones(self, machine, clock):
        machine.set_zone("intel-rapl:0", "package-0", 10.0)
        selection = self.detect(machine, clock, power_config("estimate"), nvml=self.nvml(clock, FakeGpu()))
        assert [c.source for c in selection.components] == ["cpu_estimate"]

    def test_a_machine_that_counts_nothing_is_unknown_not_zero(self, machine, clock):
        machine.set_cpu_ticks()
        selection = self.detect(machine, clock)
        assert [(c.name, c.source, c.quality) for c in selection.components] == [("cpu", "none", None)]
        (reading,) = read(selection.sources[0])
        assert (reading.energy_j, reading.power_w) == (None, None)

    def test_closing_gives_the_library_back(self, machine, clock):
        library = FakeNvml([FakeGpu()], clock)
        selection = self.detect(machine, clock, nvml=Nvml(library))
        assert library.num_inits == 1
        selection.close()
        selection.close()
        assert library.num_inits == 0
