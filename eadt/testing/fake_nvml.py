"""A stateful stand-in for the ``pynvml`` module: one table row per GPU, in pynvml's own vocabulary.

It answers in mW and mJ, raises pynvml's own error classes, and keeps what is set, so that the adapter
:class:`eadt.adapters.nvml.Nvml` runs unchanged on it. Every injected fault that fires is recorded in
:attr:`FakeNvml.fired`, for tests to assert.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

from eadt.clock import Clock
from eadt.testing.clock import FakeClock


@dataclass
class FakeGpu:
    """State of one pretended GPU. Powers in W here; the fake's functions answer in mW.

    Attributes:
        power_w: What it draws now.
        energy_j: Value of its energy counter.
        has_energy_counter: Whether the counter exists (false: before Volta).
        has_power: Whether the power reading exists (false: most vGPUs).
        has_power_limit: Whether the limit can be read.
        event_reasons: Bits of ``nvmlClocksEventReason*``.
        processes: Number and bytes of each process that computes on it; bytes ``None``: not said.
        mps_processes: The same for clients of MPS; ``None``: the card has no MPS.
        integrated_at_s: Up to when ``energy_j`` is; the fake's own.
    """

    name: str = "Fake H100"
    uuid: str = "GPU-00000000-0000-0000-0000-000000000000"
    power_w: float = 100.0
    energy_j: float = 5000.0
    has_energy_counter: bool = True
    has_power: bool = True
    has_power_limit: bool = True
    power_limit_w: float = 700.0
    default_power_limit_w: float = 700.0
    power_limit_range_w: tuple[float, float] = (200.0, 700.0)
    utilisation_percentage: int = 50
    used_bytes: int = 4 << 30
    total_bytes: int = 80 << 30
    compute_mode: int = 0
    mig_enabled: bool = False
    virtualisation_mode: int = 0
    temperature_c: int = 55
    sm_clock_mhz: int = 1500
    max_sm_clock_mhz: int = 1980
    event_reasons: int = 0
    processes: list[tuple[int, int | None]] = field(default_factory=list)
    mps_processes: list[tuple[int, int | None]] | None = field(default_factory=list)
    integrated_at_s: float | None = field(default=None, init=False, repr=False, compare=False)


@dataclass
class _Fault:
    code: int
    index: int | None
    remaining: int | None


class Hang:
    """A call that does not return until it is released. ``reached`` is set once a caller hangs in it."""

    def __init__(self, function: str, index: int | None) -> None:
        self.function = function
        self.index = index
        self.reached = threading.Event()
        self._released = threading.Event()

    def release(self) -> None:
        """Let whoever hangs go on; the call then answers, and later calls do not hang."""
        self._released.set()

    def wait(self) -> None:
        """What the fake's function does."""
        if not self._released.is_set():
            self.reached.set()
            self._released.wait()


class _Handle(int):
    """A GPU's index, with the load of the driver that it belongs to."""

    load = 0


@dataclass
class FakeNvml:
    """Pass it as ``Nvml(library=FakeNvml(...))``. Energy counters follow ``clock`` and ``power_w``.

    Args:
        gpus: The GPUs, in NVML's order.
        clock: What the energy counters advance by.
        privileged: Whether a power limit may be set.
        driver_loaded: False makes ``nvmlInit`` fail as on a machine without a driver.
    """

    gpus: list[FakeGpu] = field(default_factory=lambda: [FakeGpu()])
    clock: Clock = field(default_factory=FakeClock)
    privileged: bool = True
    driver_loaded: bool = True
    calls: Counter[str] = field(default_factory=Counter)
    fired: list[tuple[str, int]] = field(default_factory=list)

    NVMLError = pynvml.NVMLError

    def __post_init__(self) -> None:
        self.num_inits = 0
        self._faults: dict[str, list[_Fault]] = {}
        self._hangs: list[Hang] = []
        # Counts loads of the driver; what was initialised under another one answers nothing any more.
        self._load = self._initialised_load = 0
        self._integrating = threading.Lock()
        for gpu in self.gpus:
            gpu.integrated_at_s = self.clock.monotonic_s()

    def __getattr__(self, name: str) -> Any:
        # Only the constants come from pynvml; a function that the fake lacks must not reach a driver.
        if name.startswith("NVML_"):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def fail(self, function: str, code: int, *, index: int | None = None, times: int | None = None) -> None:
        """Make ``function`` raise NVML error ``code``, for one GPU or all, ``times`` times or for good."""
        self._faults.setdefault(function, []).append(_Fault(code, index, times))

    def hang(self, function: str, *, index: int | None = None) -> Hang:
        """Make ``function`` hang, for one GPU or all, until the answer's ``release`` is called."""
        hang = Hang(function, index)
        self._hangs.append(hang)
        return hang

    def unload_driver(self) -> None:
        """As ``rmmod nvidia`` below running programs, or a crash of the driver."""
        self.driver_loaded = False

    def load_driver(self) -> None:
        """The driver is there again: counters at zero; handles and initialisations from before are dead."""
        self.driver_loaded = True
        self._load += 1
        for gpu in self.gpus:
            self._integrate(gpu)
            gpu.energy_j = 0.0

    def _integrate(self, gpu: FakeGpu) -> None:
        with self._integrating:
            now_s = self.clock.monotonic_s()
            gpu.energy_j += gpu.power_w * (
                now_s - (now_s if gpu.integrated_at_s is None else gpu.integrated_at_s)
            )
            gpu.integrated_at_s = now_s

    def _enter(self, function: str, index: int | None = None) -> None:
        self.calls[function] += 1
        if self.num_inits == 0 and function != "nvmlInit":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        if function not in ("nvmlInit", "nvmlShutdown"):
            if not self.driver_loaded:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
            if self._initialised_load != self._load:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
        for hang in self._hangs:
            if hang.function == function and hang.index in (None, index):
                hang.wait()
        for fault in self._faults.get(function, ()):
            if fault.index in (None, index) and fault.remaining != 0:
                if fault.remaining is not None:
                    fault.remaining -= 1
                self.fired.append((function, fault.code))
                raise pynvml.NVMLError(fault.code)

    def _gpu(self, function: str, handle: int, supported: bool = True) -> FakeGpu:
        self._enter(function, handle)
        if isinstance(handle, _Handle) and handle.load != self._load:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
        if not supported:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        gpu = self.gpus[handle]
        self._integrate(gpu)
        return gpu

    def nvmlInit(self) -> None:
        """Count a reference, as NVML does."""
        self._enter("nvmlInit")
        if not self.driver_loaded:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        if self.num_inits == 0:
            self._initialised_load = self._load
        self.num_inits += 1

    def nvmlShutdown(self) -> None:
        """Give a reference back."""
        self._enter("nvmlShutdown")
        self.num_inits -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        """A made-up version."""
        self._enter("nvmlSystemGetDriverVersion")
        return "999.00.fake"

    def nvmlDeviceGetCount(self) -> int:
        """Number of GPUs."""
        self._enter("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        """The handle is the index."""
        self._enter("nvmlDeviceGetHandleByIndex", index)
        if not 0 <= index < len(self.gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._handle(index)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        """As by index."""
        found = [index for index, gpu in enumerate(self.gpus) if gpu.uuid == uuid]
        self._enter("nvmlDeviceGetHandleByUUID", found[0] if found else None)
        if not found:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return self._handle(found[0])

    def _handle(self, index: int) -> int:
        handle = _Handle(index)
        handle.load = self._load
        return handle

    def nvmlDeviceGetName(self, handle: int) -> str:
        """Marketing name."""
        return self._gpu("nvmlDeviceGetName", handle).name

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        """UUID."""
        return self._gpu("nvmlDeviceGetUUID", handle).uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        """mJ since the driver was loaded."""
        supported = self.gpus[handle].has_energy_counter
        return round(self._gpu("nvmlDeviceGetTotalEnergyConsumption", handle, supported).energy_j * 1000)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        """Draw in mW."""
        return round(self._gpu("nvmlDeviceGetPowerUsage", handle, self.gpus[handle].has_power).power_w * 1000)

    def nvmlDeviceGetPowerManagementLimit(self, handle: int) -> int:
        """Limit in force in mW."""
        supported = self.gpus[handle].has_power_limit
        return round(self._gpu("nvmlDeviceGetPowerManagementLimit", handle, supported).power_limit_w * 1000)

    def nvmlDeviceGetPowerManagementDefaultLimit(self, handle: int) -> int:
        """Limit at boot in mW."""
        supported = self.gpus[handle].has_power_limit
        gpu = self._gpu("nvmlDeviceGetPowerManagementDefaultLimit", handle, supported)
        return round(gpu.default_power_limit_w * 1000)

    def nvmlDeviceGetPowerManagementLimitConstraints(self, handle: int) -> list[int]:
        """Least and greatest limit in mW."""
        supported = self.gpus[handle].has_power_limit
        gpu = self._gpu("nvmlDeviceGetPowerManagementLimitConstraints", handle, supported)
        return [round(limit_w * 1000) for limit_w in gpu.power_limit_range_w]

    def nvmlDeviceSetPowerManagementLimit(self, handle: int, limit_mw: int) -> None:
        """Set the limit; needs privilege; outside the range is an invalid argument."""
        gpu = self._gpu("nvmlDeviceSetPowerManagementLimit", handle, self.gpus[handle].has_power_limit)
        if not self.privileged:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        least_w, greatest_w = gpu.power_limit_range_w
        if not least_w * 1000 <= limit_mw <= greatest_w * 1000:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        gpu.power_limit_w = limit_mw / 1000

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        """Percentages; not supported under MIG, as on real cards."""
        gpu = self._gpu("nvmlDeviceGetUtilizationRates", handle, not self.gpus[handle].mig_enabled)
        return SimpleNamespace(gpu=gpu.utilisation_percentage, memory=gpu.utilisation_percentage // 2)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        """Bytes used, free and total."""
        gpu = self._gpu("nvmlDeviceGetMemoryInfo", handle)
        return SimpleNamespace(
            used=gpu.used_bytes, free=gpu.total_bytes - gpu.used_bytes, total=gpu.total_bytes
        )

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        """°C; there is but one sensor."""
        assert sensor == pynvml.NVML_TEMPERATURE_GPU, sensor
        return self._gpu("nvmlDeviceGetTemperature", handle).temperature_c

    def nvmlDeviceGetClockInfo(self, handle: int, clock: int) -> int:
        """MHz; of the SMs only."""
        assert clock == pynvml.NVML_CLOCK_SM, clock
        return self._gpu("nvmlDeviceGetClockInfo", handle).sm_clock_mhz

    def nvmlDeviceGetMaxClockInfo(self, handle: int, clock: int) -> int:
        """MHz; of the SMs only."""
        assert clock == pynvml.NVML_CLOCK_SM, clock
        return self._gpu("nvmlDeviceGetMaxClockInfo", handle).max_sm_clock_mhz

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        """Bits; drivers before 535 lack it (:meth:`fail` it with ``NVML_ERROR_FUNCTION_NOT_FOUND``)."""
        return self._gpu("nvmlDeviceGetCurrentClocksEventReasons", handle).event_reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        """The same bits under the older name."""
        return self._gpu("nvmlDeviceGetCurrentClocksThrottleReasons", handle).event_reasons

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        """Processes with a compute context."""
        return _processes(self._gpu("nvmlDeviceGetComputeRunningProcesses", handle).processes)

    def nvmlDeviceGetMPSComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        """Clients of MPS."""
        supported = self.gpus[handle].mps_processes is not None
        gpu = self._gpu("nvmlDeviceGetMPSComputeRunningProcesses", handle, supported)
        return _processes(gpu.mps_processes or [])

    def nvmlDeviceGetComputeMode(self, handle: int) -> int:
        """Compute mode."""
        return self._gpu("nvmlDeviceGetComputeMode", handle).compute_mode

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        """Current and pending MIG mode."""
        enabled = int(self._gpu("nvmlDeviceGetMigMode", handle).mig_enabled)
        return [enabled, enabled]

    def nvmlDeviceGetVirtualizationMode(self, handle: int) -> int:
        """Virtualisation mode."""
        return self._gpu("nvmlDeviceGetVirtualizationMode", handle).virtualisation_mode


def _processes(processes: list[tuple[int, int | None]]) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=used_bytes) for pid, used_bytes in processes]
