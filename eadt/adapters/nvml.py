"""NVIDIA's management library (NVML) in EADT's units and errors.

Owns: the calls into ``pynvml`` (package ``nvidia-ml-py``), the translation of its error codes, and the
only mW and mJ in EADT. Must not: keep a handle at module level, decide anything, or start anything when
imported. The library object can be passed in, so that :class:`eadt.testing.fake_nvml.FakeNvml` drives
this same code.

NVML counts references: every :meth:`Nvml.open` is paired with one :meth:`Nvml.close`.
"""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from typing import Any

from eadt.errors import (
    DevicePermissionError,
    DeviceUnsupportedError,
    EadtError,
    TransientDeviceError,
)

_MILLI = 1000.0

_COMPUTE_MODES = {0: "default", 1: "exclusive_thread", 2: "prohibited", 3: "exclusive_process"}
_VIRTUALISATION_MODES = {0: "none", 1: "passthrough", 2: "vgpu", 3: "host_vgpu", 4: "host_vsga"}

# Bits of nvmlClocksEventReasons (nvml.h), in our words. Not throttling, and so in none of them: an idle GPU
# (0x1), clocks that somebody set (0x2, 0x100), and the pace of other cards in a sync boost group (0x10).
_THROTTLE_BITS = {0x04: "power_cap", 0x20: "heat", 0x40: "heat", 0x80: "power_brake"}
_HARDWARE_SLOWDOWN_BIT = 0x08  # set beside the bits that say why; alone, it is a draw that rose too fast
_NO_THROTTLE_BITS = 0x01 | 0x02 | 0x10 | 0x100

# What the caller does about each NVML code. Codes that are not listed may pass: retry.
_PERMISSION_CODES = ("NVML_ERROR_NO_PERMISSION",)
_UNSUPPORTED_CODES = (
    "NVML_ERROR_INVALID_ARGUMENT",
    "NVML_ERROR_NOT_SUPPORTED",
    "NVML_ERROR_NOT_FOUND",
    "NVML_ERROR_DRIVER_NOT_LOADED",
    "NVML_ERROR_LIBRARY_NOT_FOUND",
    "NVML_ERROR_FUNCTION_NOT_FOUND",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH",
    "NVML_ERROR_ARGUMENT_VERSION_MISMATCH",
    "NVML_ERROR_DEPRECATED",
    "NVML_ERROR_GPU_NOT_FOUND",
)
# What every call answers after the driver was restarted or crashed, until the library is opened anew.
_GONE_CODES = (
    "NVML_ERROR_UNINITIALIZED",
    "NVML_ERROR_DRIVER_NOT_LOADED",
    "NVML_ERROR_GPU_IS_LOST",
    "NVML_ERROR_UNKNOWN",
)
# More references to the library than this are nobody's in one process.
_MOST_REFERENCES = 64
_FIXES = {
    "NVML_ERROR_DRIVER_NOT_LOADED": "Load the NVIDIA driver (`nvidia-smi` must work); in a container, start "
    "it with the NVIDIA runtime.",
    "NVML_ERROR_LIBRARY_NOT_FOUND": "Install the NVIDIA driver; in a container, start it with the NVIDIA "
    "runtime and the `utility` driver capability.",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "The driver was updated while it was loaded: reboot, or reload it.",
    "NVML_ERROR_GPU_IS_LOST": "The GPU fell off the bus: drain the node and reboot it.",
    "NVML_ERROR_RESET_REQUIRED": "Drain the node, then `nvidia-smi --gpu-reset`.",
    "NVML_ERROR_NO_PERMISSION": "Run the node agent as root or with CAP_SYS_ADMIN (in Kubernetes: a "
    "privileged node agent), or go on without this.",
}


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Device memory of one GPU, in bytes."""

    used_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class ComputeProcess:
    """A process that computes on a card.

    Attributes:
        pid: Its number as the driver gives it: in a container often the machine's, not the container's.
        used_bytes: Device memory that it holds; ``None`` where the driver does not say.
    """

    pid: int
    used_bytes: int | None


class NvmlGpu:
    """One GPU. Made by :meth:`Nvml.gpu`; valid until the library is closed, also after it was opened anew.

    NVML answers within milliseconds, but where the driver hangs, so does the call: whoever must not wait
    calls from a thread of its own. All methods are thread-safe, as NVML is.
    Every reading raises :class:`DeviceUnsupportedError`, :class:`DevicePermissionError` or
    :class:`TransientDeviceError`; none answers 0 for something it does not know.
    """

    def __init__(self, nvml: Nvml, index: int, handle: Any) -> None:
        self.index = index
        self._nvml = nvml
        self._name = f"GPU {index}"
        self._handle = handle
        self._opening = nvml.opening
        self._uuid: str | None = None

    def _call(self, function: str, *args: Any) -> Any:
        if self._opening != self._nvml.opening:
            opening = self._nvml.opening
            self._handle = self._nvml.handle(self.index, self._uuid)
            self._opening = opening
        return self._nvml.call(function, self._handle, *args, of=self._name)

    def _supports(self, function: str) -> bool:
        """Whether a reading works now; one that fails in passing counts as supported."""
        try:
            self._call(function)
        except (DeviceUnsupportedError, DevicePermissionError):
            return False
        except TransientDeviceError:
            return True
        return True

    def name(self) -> str:
        """Marketing name, such as ``NVIDIA H100 80GB HBM3``."""
        return _text(self._call("nvmlDeviceGetName"))

    def uuid(self) -> str:
        """The UUID that ``CUDA_VISIBLE_DEVICES`` takes, ``GPU-...``."""
        if self._uuid is None:
            self._uuid = _text(self._call("nvmlDeviceGetUUID"))
        return self._uuid

    def supports_energy_counter(self) -> bool:
        """Whether :meth:`energy_j` works (Volta and newer, not on most vGPUs)."""
        return self._supports("nvmlDeviceGetTotalEnergyConsumption")

    def energy_j(self) -> float:
        """Energy of the whole card since the driver was loaded, in J.

        The counter advances about every 100 ms, so a difference over less than 5 s is coarse.
        """
        return float(self._call("nvmlDeviceGetTotalEnergyConsumption")) / _MILLI

    def supports_power(self) -> bool:
        """Whether :meth:`power_w` works."""
        return self._supports("nvmlDeviceGetPowerUsage")

    def power_w(self) -> float:
        """Power of the whole card in W, averaged by the driver over a part of the last second."""
        return float(self._call("nvmlDeviceGetPowerUsage")) / _MILLI

    def supports_power_limit(self) -> bool:
        """Whether a power limit can be read; setting it needs privilege besides."""
        return self._supports("nvmlDeviceGetPowerManagementLimit")

    def power_limit_w(self) -> float:
        """The power limit in force, in W."""
        return float(self._call("nvmlDeviceGetPowerManagementLimit")) / _MILLI

    def default_power_limit_w(self) -> float:
        """The power limit that the card boots with, in W."""
        return float(self._call("nvmlDeviceGetPowerManagementDefaultLimit")) / _MILLI

    def power_limit_range_w(self) -> tuple[float, float]:
        """Least and greatest power limit that the card takes, in W."""
        least, greatest = self._call("nvmlDeviceGetPowerManagementLimitConstraints")
        return float(least) / _MILLI, float(greatest) / _MILLI

    def set_power_limit_w(self, power_limit_w: float) -> None:
        """Set the power limit, in W; nothing is written when it is in force already.

        Raises:
            DeviceUnsupportedError: The limit is outside the card's range (it is never clamped), or the
                card has no settable limit.
            DevicePermissionError: Setting needs root or CAP_SYS_ADMIN.
        """
        least, greatest = self.power_limit_range_w()
        if not least <= power_limit_w <= greatest:
            raise DeviceUnsupportedError(
                f"GPU {self.index} takes a power limit from {least:g} to {greatest:g} W, "
                f"not {power_limit_w:g} W",
                code="EADT-344",
                means="The limit was left as it is.",
                fix=f"Choose a limit between {least:g} and {greatest:g} W.",
            )
        wanted_mw = round(power_limit_w * _MILLI)
        if round(self.power_limit_w() * _MILLI) != wanted_mw:
            self._call("nvmlDeviceSetPowerManagementLimit", wanted_mw)

    def utilisation_fraction(self) -> float:
        """Fraction of the last sampling period in which a kernel ran; unsupported under MIG."""
        return float(self._call("nvmlDeviceGetUtilizationRates").gpu) / 100.0

    def memory(self) -> GpuMemory:
        """Device memory in use and in all."""
        memory = self._call("nvmlDeviceGetMemoryInfo")
        return GpuMemory(used_bytes=int(memory.used), total_bytes=int(memory.total))

    def temperature_c(self) -> float:
        """Temperature of the GPU's core, in °C."""
        return float(self._call("nvmlDeviceGetTemperature", self._nvml.constant("NVML_TEMPERATURE_GPU")))

    def sm_clock_mhz(self) -> float:
        """Present clock of the SMs, in MHz."""
        return float(self._call("nvmlDeviceGetClockInfo", self._nvml.constant("NVML_CLOCK_SM")))

    def max_sm_clock_mhz(self) -> float:
        """Highest clock of the SMs that the card can have, in MHz."""
        return float(self._call("nvmlDeviceGetMaxClockInfo", self._nvml.constant("NVML_CLOCK_SM")))

    def throttle_reasons(self) -> frozenset[str]:
        """Why the driver or the card slows the SMs now; empty when it does not.

        ``heat``, ``power_cap`` (the power limit), ``power_brake`` (the power supply's or the chassis'
        signal), ``hardware`` (a slowdown of the hardware that gives no closer reason) and ``other``.
        """
        try:
            bits = int(self._call("nvmlDeviceGetCurrentClocksEventReasons"))
        except DeviceUnsupportedError:  # drivers before 535 know it by its older name
            bits = int(self._call("nvmlDeviceGetCurrentClocksThrottleReasons"))
        reasons = {reason for bit, reason in _THROTTLE_BITS.items() if bits & bit}
        if bits & _HARDWARE_SLOWDOWN_BIT and not reasons & {"heat", "power_brake"}:
            reasons.add("hardware")
        if bits & ~(_NO_THROTTLE_BITS | _HARDWARE_SLOWDOWN_BIT | sum(_THROTTLE_BITS)):
            reasons.add("other")
        return frozenset(reasons)

    def compute_processes(self) -> list[ComputeProcess]:
        """Processes with a compute context on the card, clients of MPS and its server included."""
        processes = {process.pid: process for process in self._call("nvmlDeviceGetComputeRunningProcesses")}
        with contextlib.suppress(DeviceUnsupportedError, DevicePermissionError):
            for process in self._call("nvmlDeviceGetMPSComputeRunningProcesses"):
                processes.setdefault(process.pid, process)
        return [
            ComputeProcess(
                pid=int(process.pid),
                used_bytes=None if process.usedGpuMemory is None else int(process.usedGpuMemory),
            )
            for process in processes.values()
        ]

    def compute_mode(self) -> str:
        """``default``, ``exclusive_process``, ``prohibited`` or ``exclusive_thread``."""
        mode = int(self._call("nvmlDeviceGetComputeMode"))
        return _COMPUTE_MODES.get(mode, f"unknown ({mode})")

    def mig_enabled(self) -> bool:
        """Whether the card is cut into MIG instances; its energy is then that of all of them."""
        try:
            current, _pending = self._call("nvmlDeviceGetMigMode")
        except DeviceUnsupportedError:
            return False
        return int(current) == 1

    def virtualisation(self) -> str:
        """``none``, ``passthrough``, ``vgpu``, ``host_vgpu`` or ``host_vsga``."""
        try:
            mode = int(self._call("nvmlDeviceGetVirtualizationMode"))
        except DeviceUnsupportedError:
            return "none"
        return _VIRTUALISATION_MODES.get(mode, f"unknown ({mode})")


class Nvml:
    """The library. Opening it twice is harmless; so is closing it twice.

    Args:
        library: An object with ``pynvml``'s functions and constants; ``None`` imports ``pynvml`` when
            :meth:`open` is called.

    Attributes:
        opening: Counts how often the library was opened; handles belong to one opening.
    """

    def __init__(self, library: Any | None = None) -> None:
        self._library = library
        self._is_open = False
        self._num_references = 1
        self._gone_codes: frozenset[int] = frozenset()
        self._permission_codes: frozenset[int] = frozenset()
        self._unsupported_codes: frozenset[int] = frozenset()
        self._fix_by_code: dict[int, str] = {}
        self.opening = 0

    def open(self) -> None:
        """Load and initialise NVML.

        Raises:
            DeviceUnsupportedError: No NVML library or no driver: this machine has no usable NVIDIA GPU.
            DevicePermissionError: The driver refuses this process.
            TransientDeviceError: Anything else.
        """
        if self._is_open:
            return
        if self._library is None:
            try:
                self._library = importlib.import_module("pynvml")
            except ImportError as error:
                raise DeviceUnsupportedError(
                    "the Python package nvidia-ml-py (pynvml) is not installed",
                    code="EADT-340",
                    means="NVIDIA GPUs cannot be measured or controlled.",
                    fix="pip install nvidia-ml-py",
                ) from error
        self._read_codes()
        self.call("nvmlInit", of="NVML")
        self._is_open = True
        self.opening += 1

    def seems_gone(self, error: EadtError) -> bool:
        """Whether a call failed as all do after a restart of the driver; :meth:`reopen` may then help."""
        return getattr(error.__cause__, "value", None) in self._gone_codes

    def reopen(self) -> None:
        """Shut the library down and initialise it again, as after a restart of the driver.

        The library only begins anew when nobody in the process holds it: the references of others are given
        back too, and taken again. Every :class:`NvmlGpu` of this object finds its handle anew, by UUID.

        Raises:
            EadtError: As :meth:`open`; it can be tried again.
        """
        num_held = 0
        with contextlib.suppress(EadtError):
            while num_held < _MOST_REFERENCES:
                self.call("nvmlShutdown", of="NVML")
                num_held += 1
        # A try that failed after the shutdown left nothing to count for the next one.
        self._num_references = max(self._num_references, num_held)
        self._is_open = False
        for _ in range(self._num_references):
            self.call("nvmlInit", of="NVML")
        self._num_references = 1
        self._is_open = True
        self.opening += 1

    def close(self) -> None:
        """Give the library back. Handles from before are dead."""
        if not self._is_open:
            return
        self._is_open = False
        self.call("nvmlShutdown", of="NVML")

    def num_gpus(self) -> int:
        """GPUs that this process may see through NVML; ``CUDA_VISIBLE_DEVICES`` plays no part."""
        return int(self.call("nvmlDeviceGetCount", of="NVML"))

    def gpu(self, index: int) -> NvmlGpu:
        """The GPU at NVML's index (order of the PCI bus)."""
        return NvmlGpu(self, index, self.handle(index))

    def handle(self, index: int, uuid: str | None = None) -> Any:
        """NVML's handle of a GPU, valid for this opening: by UUID where that is known, else by index."""
        if uuid is not None:
            return self.call("nvmlDeviceGetHandleByUUID", uuid, of=f"GPU {index}")
        return self.call("nvmlDeviceGetHandleByIndex", index, of=f"GPU {index}")

    def gpus(self) -> list[NvmlGpu]:
        """All GPUs, in NVML's order."""
        return [self.gpu(index) for index in range(self.num_gpus())]

    def driver_version(self) -> str:
        """Version of the NVIDIA driver."""
        return _text(self.call("nvmlSystemGetDriverVersion", of="NVML"))

    def constant(self, name: str) -> int:
        """The value of one of the library's constants."""
        return int(getattr(self._library, name))

    def call(self, function: str, *args: Any, of: str) -> Any:
        """Call one NVML function; ``of`` names the device in an error's text."""
        target = getattr(self._library, function, None)
        if target is None:
            raise DeviceUnsupportedError(
                f"{of}: {function} is not in the installed nvidia-ml-py",
                code="EADT-342",
                fix="Update nvidia-ml-py.",
            )
        try:
            return target(*args)
        except self._library.NVMLError as error:  # type: ignore[union-attr]
            raise self._translated(error, function, of) from error

    def _read_codes(self) -> None:
        def codes(names: tuple[str, ...]) -> frozenset[int]:
            return frozenset(
                int(getattr(self._library, name)) for name in names if hasattr(self._library, name)
            )

        self._permission_codes = codes(_PERMISSION_CODES)
        self._unsupported_codes = codes(_UNSUPPORTED_CODES)
        self._gone_codes = codes(_GONE_CODES)
        self._fix_by_code = {
            int(getattr(self._library, name)): fix
            for name, fix in _FIXES.items()
            if hasattr(self._library, name)
        }

    def _translated(self, error: Exception, function: str, of: str) -> EadtError:
        code = int(getattr(error, "value", -1))
        fix = self._fix_by_code.get(code, "")
        what = f"{of}: {function} failed: {error}"
        if code in self._permission_codes:
            return DevicePermissionError(
                what, code="EADT-341", means="This reading or lever is off.", fix=fix
            )
        if code in self._unsupported_codes:
            is_start = function == "nvmlInit"
            return DeviceUnsupportedError(
                what,
                code="EADT-340" if is_start else "EADT-342",
                means="NVIDIA GPUs cannot be measured."
                if is_start
                else "This reading or lever does not exist here.",
                fix=fix,
            )
        return TransientDeviceError(
            what, code="EADT-343", means="It is tried again at the next sample.", fix=fix
        )


def _text(value: Any) -> str:
    # Bindings before 12 answer bytes.
    return value.decode() if isinstance(value, bytes) else str(value)
