"""The CPU estimate: which model a machine gets, and the energy that follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from eadt.config import PowerConfig
from eadt.node.sensors import CpuEstimateSource
from eadt.node.sensors.cpu_models import cpu_power
from eadt.node.utilisation import CpuTimes
from eadt.testing.clock import FakeClock
from eadt.units import Quality

INTEL, AMD = "GenuineIntel", "AuthenticAMD"


def x86(
    vendor: str, family: int, model: int, name: str, threads: int, sockets: int = 1, flags: str = "fpu"
) -> str:
    return "\n".join(
        f"processor\t: {thread}\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
        f"model name\t: {name}\nphysical id\t: {thread * sockets // threads}\nflags\t\t: {flags}\n"
        for thread in range(threads)
    )


def arm(part: str, threads: int, implementer: str = "0x41") -> str:
    return "\n".join(
        f"processor\t: {thread}\nCPU implementer\t: {implementer}\nCPU architecture: 8\nCPU part\t: {part}\n"
        for thread in range(threads)
    )


class TestServers:
    # Thermal design power and threads from the makers' specifications.
    @pytest.mark.parametrize(
        ("vendor", "family", "model", "name", "threads", "tdp_w"),
        [
            (INTEL, 6, 63, "Intel(R) Xeon(R) CPU E5-2680 v3 @ 2.50GHz", 24, 120),
            (INTEL, 6, 79, "Intel(R) Xeon(R) CPU E5-2699 v4 @ 2.20GHz", 44, 145),
            (INTEL, 6, 79, "Intel(R) Xeon(R) CPU E5-2630 v4 @ 2.20GHz", 20, 85),
            (INTEL, 6, 85, "Intel(R) Xeon(R) Platinum 8180 CPU @ 2.50GHz", 56, 205),
            (INTEL, 6, 85, "Intel(R) Xeon(R) Gold 6148 CPU @ 2.40GHz", 40, 150),
            (INTEL, 6, 85, "Intel(R) Xeon(R) Gold 6248R CPU @ 3.00GHz", 48, 205),
            (INTEL, 6, 85, "Intel(R) Xeon(R) Gold 5218 CPU @ 2.30GHz", 32, 125),
            (INTEL, 6, 106, "Intel(R) Xeon(R) Platinum 8380 CPU @ 2.30GHz", 80, 270),
            (INTEL, 6, 106, "Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", 64, 205),
            (INTEL, 6, 106, "Intel(R) Xeon(R) Silver 4314 CPU @ 2.40GHz", 32, 135),
            (INTEL, 6, 143, "Intel(R) Xeon(R) Platinum 8480+", 112, 350),
            (INTEL, 6, 143, "Intel(R) Xeon(R) Gold 6430", 64, 270),
            (INTEL, 6, 143, "Intel(R) Xeon(R) Silver 4410Y", 24, 150),
            (INTEL, 6, 207, "INTEL(R) XEON(R) PLATINUM 8592+", 128, 350),
            (INTEL, 6, 173, "Intel(R) Xeon(R) 6980P", 256, 500),
            (INTEL, 6, 173, "Intel(R) Xeon(R) 6787P", 172, 350),
            (INTEL, 6, 175, "Intel(R) Xeon(R) 6780E", 144, 330),
            (AMD, 23, 1, "AMD EPYC 7601 32-Core Processor", 64, 180),
            (AMD, 23, 49, "AMD EPYC 7742 64-Core Processor", 128, 225),
            (AMD, 23, 49, "AMD EPYC 7502 32-Core Processor", 64, 180),
            (AMD, 23, 49, "AMD EPYC 7302 16-Core Processor", 32, 155),
            (AMD, 25, 1, "AMD EPYC 7763 64-Core Processor", 128, 280),
            (AMD, 25, 1, "AMD EPYC 7543 32-Core Processor", 64, 225),
            (AMD, 25, 1, "AMD EPYC 7313 16-Core Processor", 32, 155),
            (AMD, 25, 17, "AMD EPYC 9654 96-Core Processor", 192, 360),
            (AMD, 25, 17, "AMD EPYC 9354 32-Core Processor", 64, 280),
            (AMD, 25, 160, "AMD EPYC 9754 128-Core Processor", 256, 360),
            (AMD, 26, 2, "AMD EPYC 9755 128-Core Processor", 256, 500),
            (AMD, 26, 2, "AMD EPYC 9355 32-Core Processor", 64, 280),
        ],
    )  # fmt: skip
    def test_full_load_is_the_tdp_within_the_stated_range(self, vendor, family, model, name, threads, tdp_w):
        power = cpu_power(x86(vendor, family, model, name, threads), 1)
        assert power.relative_uncertainty == 0.3
        assert power.idle_w + power.per_core_w * threads == pytest.approx(tdp_w, rel=0.3)
        assert 0.15 < power.idle_w / tdp_w < 0.4
        assert "guess" not in power.basis

    def test_each_socket_draws(self):
        name = "Intel(R) Xeon(R) Platinum 8480+"
        one = cpu_power(x86(INTEL, 6, 143, name, 112, 1), 1)
        two = cpu_power(x86(INTEL, 6, 143, name, 224, 2), 1)
        assert two.idle_w == pytest.approx(2 * one.idle_w)
        assert two.per_core_w == pytest.approx(one.per_core_w)
        assert two.basis == "Intel Xeon (Sapphire Rapids or newer); 2 sockets of 112 logical cores"

    @pytest.mark.parametrize(
        ("part", "threads", "tdp_w", "sockets"),
        [("0xd0c", 80, 210, 1), ("0xd0c", 128, 250, 1), ("0xd0c", 160, 420, 2), ("0xd4f", 144, 500, 2)],
    )
    def test_arm(self, part, threads, tdp_w, sockets):
        power = cpu_power(arm(part, threads), 1)
        assert power.idle_w + power.per_core_w * threads == pytest.approx(tdp_w, rel=0.3)
        assert f"{sockets} socket" in power.basis

    def test_ampere_one(self):
        assert "AmpereOne" in cpu_power(arm("0xac3", 192, "0xc0"), 1).basis


class TestVirtualMachines:
    def test_idle_power_is_its_part_of_a_socket(self):
        name = "Intel(R) Xeon(R) CPU @ 2.70GHz"
        small = cpu_power(x86(INTEL, 6, 143, name, 8, flags="fpu hypervisor"), 1)
        whole = cpu_power(x86(INTEL, 6, 143, name, 112), 1)
        assert small.idle_w == pytest.approx(whole.idle_w * 8 / 112)
        assert small.per_core_w == pytest.approx(whole.per_core_w)
        assert small.relative_uncertainty == 0.4
        assert small.basis == (
            "Intel Xeon (Sapphire Rapids or newer); a virtual machine with 8 logical cores of sockets of 112"
        )

    def test_what_it_says_of_its_sockets_plays_no_part(self):
        one, many = (
            cpu_power(x86(AMD, 25, 1, "AMD EPYC-Milan Processor", 16, n, flags="hypervisor"), 1)
            for n in (1, 16)
        )
        assert one == many

    def test_a_masked_number_is_seen_through_by_what_the_cpu_can_do(self):
        power = cpu_power(x86(INTEL, 6, 167, "Intel(R) Xeon(R) Processor", 2, flags="hypervisor amx_tile"), 1)
        assert power.basis.startswith("Intel Xeon (Sapphire Rapids or newer)")
        assert power.relative_uncertainty == 0.4

    @pytest.mark.parametrize(
        ("vendor", "family", "model", "name", "found"),
        [
            (INTEL, 6, 134, "Intel Xeon Processor (Icelake)", "Ice Lake"),
            (AMD, 23, 99, "AMD EPYC-Rome Processor", "Rome"),
            (AMD, 6, 6, "AMD EPYC-Genoa Processor", "Genoa"),
            (AMD, 6, 6, "AMD EPYC-Milan-v2 Processor", "Milan"),
            (AMD, 6, 6, "AMD EPYC-Turin Processor", "Turin"),
        ],
    )
    def test_names_of_emulators(self, vendor, family, model, name, found):
        assert found in cpu_power(x86(vendor, family, model, name, 4, flags="hypervisor"), 1).basis

    def test_arm_does_not_say_that_it_is_one(self):
        part, whole = cpu_power(arm("0xd40", 4), 1), cpu_power(arm("0xd40", 64), 1)
        assert part.idle_w == pytest.approx(whole.idle_w / 16)
        assert part.relative_uncertainty == 0.4
        assert "virtual" not in part.basis


class TestOthers:
    @pytest.mark.parametrize(
        ("vendor", "name", "threads", "found", "least_w", "most_w"),
        [
            # The range from the maker's base power to the limit of a long boost.
            (INTEL, "Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", 8, "little power", 15, 25),
            (INTEL, "11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz", 8, "little power", 12, 28),
            (INTEL, "13th Gen Intel(R) Core(TM) i5-1340P", 16, "little power", 28, 64),
            (INTEL, "Intel(R) Core(TM) Ultra 7 165U", 14, "little power", 15, 57),
            (INTEL, "Intel(R) Core(TM) 7 150U", 12, "little power", 15, 55),
            (INTEL, "Intel(R) Core(TM) m3-7Y30 CPU @ 1.00GHz", 4, "little power", 5, 20),
            (INTEL, "Intel(R) Core(TM) i7-8750H CPU @ 2.20GHz", 12, "Core, laptop;", 45, 60),
            (INTEL, "Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz", 16, "Core, laptop;", 45, 65),
            (INTEL, "Intel(R) Core(TM) Ultra 7 155H", 22, "Core, laptop;", 28, 115),
            (INTEL, "Intel(R) Core(TM) Ultra 9 275HX", 24, "Core, laptop;", 55, 160),
            (INTEL, "Intel(R) Core(TM) i9-9900K CPU @ 3.60GHz", 16, "desktop", 95, 160),
            (INTEL, "13th Gen Intel(R) Core(TM) i9-13900K", 32, "desktop", 125, 253),
            (INTEL, "12th Gen Intel(R) Core(TM) i7-12700", 20, "desktop", 65, 180),
            (INTEL, "Intel(R) Core(TM) i5-10400F CPU @ 2.90GHz", 12, "desktop", 65, 134),
            (INTEL, "Intel(R) Core(TM) Ultra 9 285K", 24, "desktop", 125, 250),
            (INTEL, "Intel(R) Xeon(R) E-2388G CPU @ 3.20GHz", 16, "desktop", 95, 160),
            (INTEL, "Intel(R) Xeon(R) CPU E3-1270 v6 @ 3.80GHz", 8, "desktop", 72, 110),
            (INTEL, "Intel(R) Xeon(R) W-1290P CPU @ 3.70GHz", 20, "desktop", 125, 254),
            (INTEL, "Intel(R) Xeon(R) CPU D-1541 @ 2.10GHz", 16, "Xeon D", 45, 65),
            (AMD, "AMD Ryzen 7 PRO 5850U with Radeon Graphics", 16, "Ryzen, laptop", 15, 45),
            (AMD, "AMD Ryzen 9 7945HX with Radeon Graphics", 32, "Ryzen, laptop", 55, 75),
            (AMD, "AMD Ryzen AI 9 HX 370 w/ Radeon 890M", 24, "Ryzen, laptop", 28, 55),
            (AMD, "AMD RYZEN AI MAX+ 395 w/ Radeon 8060S", 32, "Ryzen, laptop", 55, 120),
            (AMD, "AMD Ryzen 9 5950X 16-Core Processor", 32, "Ryzen, desktop", 105, 170),
            (AMD, "AMD Ryzen 5 3600 6-Core Processor", 12, "Ryzen, desktop", 65, 105),
            (AMD, "AMD Ryzen Threadripper PRO 5995WX 64-Cores", 128, "Threadripper", 280, 400),
        ],
    )  # fmt: skip
    def test_laptops_and_desktops(self, vendor, name, threads, found, least_w, most_w):
        power = cpu_power(x86(vendor, 6, 250, name, threads), 1)
        assert found in power.basis
        assert least_w <= power.idle_w + power.per_core_w * threads <= most_w
        assert power.relative_uncertainty == (0.3 if found == "Threadripper" else 0.4)

    def test_large_ones_of_the_desktop_that_are_servers(self):
        power = cpu_power(x86(INTEL, 6, 85, "Intel(R) Core(TM) i9-10980XE CPU @ 3.00GHz", 36), 1)
        assert "Skylake" in power.basis

    @pytest.mark.parametrize(
        ("cpuinfo", "found"),
        [
            ("", "CPU of an unknown family; 1 socket of 12 logical cores"),
            (
                "processor\t: 0\ncpu\t\t: POWER9\n",
                "CPU of an unknown family; 1 socket of 1 logical cores",
            ),
            (x86(INTEL, 6, 250, "Intel(R) Xeon(R) 9 of the year 2040", 8), "Xeon of an unknown family"),
            (x86(AMD, 99, 1, "AMD EPYC 99999", 8), "EPYC of an unknown family"),
            (x86(INTEL, 6, 250, "Intel(R) N100", 4), "small Intel"),
            (
                x86(AMD, 15, 107, "QEMU Virtual CPU version 2.5+", 2, flags="hypervisor"),
                "unknown family; a virtual machine with 2",
            ),
            (x86(INTEL, 6, 94, "Intel Core Processor (Skylake, IBRS)", 4), "unknown family"),
            (arm("0xd08", 4), "unknown family; 1 socket of 4"),
        ],
    )
    def test_the_unknown_is_a_guess_that_says_so(self, cpuinfo, found):
        power = cpu_power(cpuinfo, 12)
        assert power.basis.startswith("a guess for ")
        assert found in power.basis
        assert power.relative_uncertainty == 0.6
        assert power.per_core_w > 0

    def test_apple(self):
        assert "Apple" in cpu_power(arm("0x025", 8, "0x61"), 1).basis

    def test_this_machine(self):
        power = cpu_power(Path("/proc/cpuinfo").read_text(), 1)
        assert 0 < power.idle_w < 2000
        assert 0 < power.per_core_w < 50


class TestSource:
    @pytest.fixture
    def cpu_info(self, tmp_path: Path) -> Path:
        path = tmp_path / "cpuinfo"
        path.write_text(x86(INTEL, 6, 143, "Intel(R) Xeon(R) Platinum 8480+", 112))
        return path

    def set_busy(self, tmp_path: Path, seconds: float) -> CpuTimes:
        (tmp_path / "stat").write_text(f"cpu  {round(seconds * 100)} 0 0 9 9 0 0 0 0 0\n")
        return CpuTimes(tmp_path / "stat")

    def source(self, tmp_path, clock, cpu_info, idle_w=None, per_core_w=None) -> CpuEstimateSource:
        return CpuEstimateSource(idle_w, per_core_w, clock, self.set_busy(tmp_path, 10.0), cpu_info)

    def test_energy_of_the_machines_own_model(self, tmp_path, cpu_info):
        clock = FakeClock()
        source = self.source(tmp_path, clock, cpu_info)
        (component,) = source.components
        self.set_busy(tmp_path, 13.0)
        clock.advance(2.0)
        model = cpu_power(cpu_info.read_text(), 1)
        reading = source.read(component)
        assert reading.energy_j == pytest.approx(model.idle_w * 2.0 + model.per_core_w * 3.0)
        assert reading.at_s == clock.monotonic_s()
        assert component.quality is Quality.ESTIMATED
        assert component.relative_uncertainty == 0.3
        assert component.resolution_s == 0.01
        for part in ("105 W + 2.19 W per busy core", "± 30%", "Sapphire Rapids", "1 socket of 112"):
            assert part in component.detail

    def test_what_is_configured_wins_and_its_error_is_not_known(self, tmp_path, cpu_info):
        clock = FakeClock()
        source = self.source(tmp_path, clock, cpu_info, idle_w=0.0, per_core_w=12.0)
        (component,) = source.components
        self.set_busy(tmp_path, 11.0)
        clock.advance(2.0)
        assert source.read(component).energy_j == pytest.approx(12.0)
        assert component.relative_uncertainty is None
        assert "as configured" in component.detail
        assert "Sapphire" not in component.detail

    def test_one_configured_value_beside_the_tables_other(self, tmp_path, cpu_info):
        model = cpu_power(cpu_info.read_text(), 1)
        for configured, expected_j in (
            ({"idle_w": 50.0}, 50.0 * 2.0 + model.per_core_w),
            ({"per_core_w": 7.0}, model.idle_w * 2.0 + 7.0),
        ):
            clock = FakeClock()
            source = self.source(tmp_path, clock, cpu_info, **configured)
            (component,) = source.components
            self.set_busy(tmp_path, 11.0)
            clock.advance(2.0)
            assert source.read(component).energy_j == pytest.approx(expected_j)
            assert component.relative_uncertainty == 0.3
            assert "as configured" in component.detail

    def test_without_the_file_it_is_a_guess(self, tmp_path):
        source = self.source(tmp_path, FakeClock(), tmp_path / "none")
        assert source.components[0].relative_uncertainty == 0.6
        assert "guess" in source.components[0].detail

    def test_the_configuration_asks_for_the_table(self):
        estimate = PowerConfig().estimate
        assert (estimate.idle_w, estimate.per_core_w) == (None, None)
        given = PowerConfig.model_validate({"estimate": {"idle_w": 0, "per_core_w": 3.5}}).estimate
        assert (given.idle_w, given.per_core_w) == (0.0, 3.5)
