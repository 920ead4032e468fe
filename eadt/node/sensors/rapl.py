"""CPU and memory energy from RAPL, through Linux's powercap files (Intel, and AMD from Zen on).

Which zones are read (kernel documentation, "Power Capping Framework"): the packages and, besides them,
``dram``. ``core`` and ``uncore`` are parts of their package, ``psys`` contains packages and more, and
``intel-rapl-mmio`` shows the same packages a second time: adding any of them would count joules twice.
AMD has no ``dram`` zone.
"""

from __future__ import annotations

import os
from pathlib import Path

from eadt.clock import Clock
from eadt.errors import DevicePermissionError, DeviceUnsupportedError, TransientDeviceError
from eadt.node.sensors.base import Component, Reading
from eadt.node.utilisation import machine_id
from eadt.units import Quality

POWERCAP_ROOT = Path("/sys/class/powercap")

# The counters are updated about every millisecond (Intel SDM, volume 3, "RAPL Interfaces"); over 100 ms that
# is 1 % at most.
_RESOLUTION_S = 1e-3
_WINDOW_S = 0.1
# No maker states an error. Khan et al., "RAPL in Action" (ACM TOMPECS 2018), find packages of Intel servers
# close to the plug's power: 5 % is our guess; AMD's counters are a model, of which less is known. Desrochers
# et al., "A Validation of DRAM RAPL Power Measurements" (MEMSYS 2016), find constant offsets, largest on idle
# memory: 20 % is our guess.
_UNCERTAINTY = {"cpu": 0.05, "dram": 0.20}

# No zone of the kind draws more: twice the largest server package, and 24 DIMMs of 16 W. Above it, a counter
# that went backwards was reset rather than wrapped around; and after `range / this` seconds (some minutes)
# it may have wrapped more than once: both are gaps.
_GREATEST_POWER_W = {"cpu": 1000.0, "dram": 400.0}


class _Zone:
    """One RAPL counter, unwrapped: 32 bits of about 15 to 61 µJ, so it wraps within minutes to hours."""

    def __init__(self, folder: Path, greatest_power_w: float, clock: Clock) -> None:
        self.folder = folder
        self._greatest_power_w = greatest_power_w
        self._clock = clock
        self._range_j = int((folder / "max_energy_range_uj").read_text()) / 1e6
        self._file_descriptor: int | None = os.open(folder / "energy_uj", os.O_RDONLY | os.O_CLOEXEC)
        self.is_live = self._read_raw_j() > 0.0
        # Where the counter stood at the last reading; None before the first, which may come much later.
        self._last: tuple[float, float] | None = None
        self._total_j = 0.0
        # Counts how often the counter began anew, as far as can be told.
        self.series = 0

    def _read_raw_j(self) -> float:
        if self._file_descriptor is None:
            raise OSError("the counter's file is closed")
        return int(os.pread(self._file_descriptor, 32, 0)) / 1e6

    def total_j(self) -> float:
        """J since the first reading, comparable within a series.

        Raises:
            TransientDeviceError: It cannot be read now; it goes on nevertheless.
        """
        try:
            raw_j = self._read_raw_j()
        except (OSError, ValueError) as error:
            raise TransientDeviceError(
                f"RAPL counter {self.folder.name} could not be read: {error}", code="EADT-343"
            ) from error
        now_s = self._clock.monotonic_s()
        last, self._last = self._last, (now_s, raw_j)
        if last is None:
            return self._total_j
        elapsed_s, grown_j = now_s - last[0], raw_j - last[1]
        most_j = self._greatest_power_w * elapsed_s
        if grown_j < 0.0:
            grown_j += self._range_j
        # The small allowance is for two readings within the counter's own step of 1 ms.
        if grown_j < 0.0 or grown_j > most_j + 2.0 or most_j > self._range_j:
            # It was reset, or not read for so long that it may have wrapped around more than once.
            self.series += 1
        else:
            self._total_j += grown_j
        return self._total_j

    def close(self) -> None:
        if self._file_descriptor is not None:
            os.close(self._file_descriptor)
            self._file_descriptor = None


class RaplSource:
    """``cpu``: the sum of the packages; ``dram``: the sum of the memory zones, where there are any.

    Raises:
        DeviceUnsupportedError: There are no RAPL zones, or their counters stand still at zero (as in many
            virtual machines).
        DevicePermissionError: The counters are there, but only root may read them.
    """

    def __init__(self, clock: Clock, powercap_root: Path = POWERCAP_ROOT) -> None:
        self._clock = clock
        packages, memories = _find_zones(powercap_root)
        if not packages:
            raise DeviceUnsupportedError(
                f"there are no RAPL zones under {powercap_root}",
                code="EADT-342",
                means="The CPU's energy is estimated.",
                fix="On bare metal: `modprobe intel_rapl_msr`. Virtual machines rarely show RAPL.",
            )
        self._zones_of: dict[str, tuple[Component, list[_Zone]]] = {}
        try:
            self._add("cpu", packages, f"RAPL counters of {len(packages)} CPU package(s)")
            if memories:
                self._add("dram", memories, f"RAPL counters of {len(memories)} memory zone(s)")
        except BaseException:
            self.close()
            raise
        self._components = tuple(component for component, _zones in self._zones_of.values())

    def _add(self, name: str, folders: list[Path], detail: str) -> None:
        component = Component(
            name,
            "rapl",
            Quality.MEASURED,
            f"{name}: {detail}",
            f"{machine_id() or 'machine'}/{name}",
            resolution_s=_RESOLUTION_S,
            honest_window_s=_WINDOW_S,
            relative_uncertainty=_UNCERTAINTY[name],
            greatest_power_w=_GREATEST_POWER_W[name] * len(folders),
        )
        zones: list[_Zone] = []
        self._zones_of[name] = (component, zones)
        for folder in folders:
            try:
                zones.append(_Zone(folder, _GREATEST_POWER_W[name], self._clock))
            except PermissionError as error:
                raise DevicePermissionError(
                    f"{folder}/energy_uj may be read by root only",
                    code="EADT-345",
                    means="The CPU's energy is estimated instead of measured.",
                    fix="As root, until the next boot: `chmod o+r /sys/class/powercap/intel-rapl*/energy_uj "
                    "/sys/class/powercap/intel-rapl*/max_energy_range_uj` (closed since CVE-2020-8694: "
                    "readers may learn about other programs' work); in a container, mount "
                    "/sys/class/powercap and give CAP_DAC_READ_SEARCH.",
                ) from error
            except (OSError, ValueError) as error:
                raise DeviceUnsupportedError(
                    f"RAPL zone {folder} cannot be read: {error}", code="EADT-342"
                ) from error
        if not all(zone.is_live for zone in zones):
            raise DeviceUnsupportedError(
                f"the RAPL counters of {name} stand still at zero",
                code="EADT-342",
                means="The CPU's energy is estimated.",
                fix="A hypervisor hides the real counters: measure on the host.",
            )

    @property
    def components(self) -> tuple[Component, ...]:
        """See :class:`eadt.node.sensors.PowerSource`."""
        return self._components

    def read(self, component: Component) -> Reading:
        """See :class:`eadt.node.sensors.PowerSource`."""
        _component, zones = self._zones_of[component.name]
        energy_j, failure = 0.0, None
        # Every zone is read even after one failed: each keeps its own place in its own counter.
        for zone in zones:
            try:
                energy_j += zone.total_j()
            except TransientDeviceError as error:
                failure = error
        at_s = self._clock.monotonic_s()
        if failure is not None:
            return Reading(component, at_s, failure=failure)
        return Reading(component, at_s, energy_j=energy_j, series=sum(zone.series for zone in zones))

    def close(self) -> None:
        """See :class:`eadt.node.sensors.PowerSource`."""
        for _component, zones in self._zones_of.values():
            for zone in zones:
                zone.close()


def _find_zones(powercap_root: Path) -> tuple[list[Path], list[Path]]:
    """Folders of the package zones and of the memory zones."""
    packages: list[Path] = []
    memories: list[Path] = []
    for folder in sorted(powercap_root.glob("intel-rapl:*")):
        try:
            name = (folder / "name").read_text().strip()
        except OSError:
            continue
        if name.startswith("package"):
            packages.append(folder)
        elif name == "dram":
            memories.append(folder)
    return packages, memories
