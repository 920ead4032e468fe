"""What this machine can measure and control, in sentences, for ``eadt doctor``.

Owns: looking. Must not: change anything on the machine, start a process, or need a GPU, a cluster or a
network. Every answer that is not "ok" names its fix.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from eadt.adapters.nvml import Nvml, NvmlGpu
from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.config import ElasticConfig, MpsConfig, PowerConfig, RunConfig
from eadt.errors import DevicePermissionError, EadtError
from eadt.node.deadline import DeviceCall
from eadt.node.sensors import NVML_DEADLINE_S, Host, RaplSource, detect_sources
from eadt.node.utilisation import (
    cgroup_core_limit,
    cgroup_memory_limit_bytes,
    num_cores,
    usable_cores,
)
from eadt.units import format_bytes

State = Literal["ok", "degraded", "missing"]

# The bit of CAP_SYS_ADMIN in /proc/self/status (linux/capability.h): what NVML's setters ask for.
_CAP_SYS_ADMIN = 1 << 21
_DEFAULT_MPS_PIPE_DIRECTORY = "/tmp/nvidia-mps"
_NO_GPU_FIX = "In a container, ask for GPUs (`--gpus all`, or `nvidia.com/gpu` in the pod's limits)."
# Below this an optimizer state of even a small model does not fit, and the spill file on disk is used.
_SMALL_SHARED_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class Capability:
    """One thing that EADT measures or controls, or needs.

    Attributes:
        name: Short and stable, such as ``nvml`` or ``power_limit``.
        state: ``ok``; ``degraded``: EADT works around it and says so; ``missing``: the lever or sensor is
            off. None of them prevents training.
        detail: What was found.
        fix: What to do about it; empty where nothing needs to be done.
    """

    name: str
    state: State
    detail: str
    fix: str = ""

    def as_dict(self) -> dict[str, str]:
        """Plain values, for ``-o json``."""
        return asdict(self)


def survey(
    config: RunConfig | None = None,
    *,
    clock: Clock = SYSTEM_CLOCK,
    nvml: Nvml | None = None,
    host: Host | None = None,
) -> list[Capability]:
    """Look at this machine. Reads only; takes as long as a sleeping GPU driver does to wake up.

    A driver that hangs is given up after :data:`NVML_DEADLINE_S`, and that is what is found.

    Args:
        config: Says which power source, folder for shared memory and MPS directory the run would use;
            ``None`` stands for the defaults.
        clock: Source of time.
        nvml: The library to use; by default the real one.
        host: Where to look for sensors.
    """
    host = host or Host()
    nvml = nvml or Nvml()
    power = config.power if config else PowerConfig()
    mps = config.mps if config else MpsConfig()
    elastic = config.elastic if config else ElasticConfig()
    gpus = _gpus_in_time(nvml)
    has_gpu = gpus[0].state != "missing"
    return [
        *gpus,
        _rapl(clock, host),
        *_power_source(power, clock, nvml, host),
        *(_mps(mps) if has_gpu else [_no_mps()]),
        _shared_memory(elastic.shared_memory_dir or "/dev/shm"),
        _cores(),
        _memory(),
        Capability("compiler", "ok", f"{_compiler()}; not needed: DeepSpeed's own operators are left out"),
    ]


def _gpus_in_time(nvml: Nvml) -> list[Capability]:
    try:
        return DeviceCall(lambda: _gpus(nvml), "what NVML can do here", NVML_DEADLINE_S).ask()
    except EadtError as error:
        fix = "The driver hangs: drain the node and reboot it (`dmesg | grep -i xid` may say why)."
        return [Capability("nvml", "missing", f"no NVIDIA GPU can be measured: {error.what}", fix)]


def _gpus(nvml: Nvml) -> list[Capability]:
    try:
        nvml.open()
    except EadtError as error:
        return [Capability("nvml", "missing", f"no NVIDIA GPU can be measured: {error.what}", error.fix)]
    try:
        gpus = nvml.gpus()
        if not gpus:
            return [Capability("nvml", "missing", "the NVIDIA driver is here, but shows no GPU", _NO_GPU_FIX)]
        names = ", ".join(f"GPU {gpu.index}: {_gpu_name(gpu)}" for gpu in gpus)
        nvml_found = Capability("nvml", "ok", f"driver {nvml.driver_version()}; {names}")
        return [nvml_found, _energy_counter(gpus), _power_limit(gpus)]
    except EadtError as error:
        return [Capability("nvml", "degraded", f"NVML answers only in part: {error.what}", error.fix)]
    finally:
        nvml.close()


def _gpu_name(gpu: NvmlGpu) -> str:
    name = gpu.name()
    try:
        mode = gpu.compute_mode()
        remarks = ["MIG on"] if gpu.mig_enabled() else []
        remarks += ["vGPU"] if gpu.virtualisation() == "vgpu" else []
        remarks += [f"compute mode {mode}"] if mode != "default" else []
    except EadtError:
        remarks = []
    return f"{name} ({', '.join(remarks)})" if remarks else name


def _energy_counter(gpus: list[NvmlGpu]) -> Capability:
    without = [gpu for gpu in gpus if not gpu.supports_energy_counter()]
    if not without:
        return Capability("energy_counter", "ok", f"{len(gpus)} of {len(gpus)} GPUs have an energy counter")
    blind = [gpu.index for gpu in without if not gpu.supports_power()]
    detail = f"{len(gpus) - len(without)} of {len(gpus)} GPUs have an energy counter"
    if blind:
        return Capability(
            "energy_counter",
            "missing",
            f"{detail}; the energy of GPUs {blind} is unknown: they show no power either",
            "On a vGPU the host alone can measure: run EADT's node agent there.",
        )
    return Capability(
        "energy_counter",
        "degraded",
        f"{detail}; for the others power is integrated, less exactly",
        "Cards before Volta have none; on newer ones, update the driver.",
    )


def _power_limit(gpus: list[NvmlGpu]) -> Capability:
    settable = [gpu for gpu in gpus if gpu.supports_power_limit()]
    if not settable:
        return Capability(
            "power_limit", "missing", "no GPU shows a power limit", "On a vGPU, set it on the host."
        )
    ranges: list[str] = []
    for gpu in settable:
        try:
            least_w, greatest_w = gpu.power_limit_range_w()
            ranges.append(f"GPU {gpu.index}: {least_w:g} to {greatest_w:g} W, now {gpu.power_limit_w():g} W")
        except EadtError as error:
            ranges.append(f"GPU {gpu.index}: {error.what}")
    detail = "; ".join(ranges)
    if _is_privileged():
        return Capability("power_limit", "ok", f"{detail}; this process has the privilege to set it")
    return Capability(
        "power_limit",
        "degraded",
        f"{detail}; can be read, but this process may not set it: training runs uncapped",
        "Run the node agent as root or with CAP_SYS_ADMIN (in Kubernetes: a privileged node agent).",
    )


def _is_privileged() -> bool:
    # NVML has no question for this, and trying would be a write.
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) & _CAP_SYS_ADMIN)
    except (OSError, ValueError, IndexError):
        return False
    return False


def _rapl(clock: Clock, host: Host) -> Capability:
    try:
        source = RaplSource(clock, host.powercap_root)
    except DevicePermissionError as error:
        return Capability("rapl", "degraded", f"{error.what}. {error.means}", error.fix)
    except EadtError as error:
        return Capability("rapl", "missing", f"{error.what}. {error.means}".rstrip(), error.fix)
    names = ", ".join(component.name for component in source.components)
    source.close()
    return Capability("rapl", "ok", f"CPU energy counters can be read ({names})")


def _power_source(config: PowerConfig, clock: Clock, nvml: Nvml, host: Host) -> list[Capability]:
    try:
        selection = detect_sources(config, clock, nvml=nvml, host=host)
    except EadtError as error:
        return [Capability("power_source", "missing", error.what, error.fix)]
    selection.close()
    qualities = {component.quality for component in selection.components}
    state: State = "ok" if qualities == {"measured"} else "degraded"
    if qualities == {None}:
        state = "missing"
    fix = "" if state == "ok" else "See nvml and rapl above, or state your machine's model in power.estimate."
    found = [Capability("power_source", state, "; ".join(selection.chosen), fix)]
    unknown = [component.detail for component in selection.components if component.quality is None]
    if unknown:
        found.append(Capability("unmeasured", "missing", "; ".join(unknown), " ".join(selection.not_chosen)))
    return found


def _no_mps() -> Capability:
    return Capability(
        "mps",
        "missing",
        "no NVIDIA GPU, so no MPS: a worker's share of a CPU node is set by threads and affinity",
        "Nothing to do on a CPU node.",
    )


def _mps(config: MpsConfig) -> list[Capability]:
    binary = shutil.which("nvidia-cuda-mps-control")
    directory = Path(
        config.pipe_directory or os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or _DEFAULT_MPS_PIPE_DIRECTORY
    )
    found = [
        Capability("mps_binary", "ok", f"{binary}")
        if binary
        else Capability(
            "mps_binary",
            "missing",
            "nvidia-cuda-mps-control is not on the PATH: GPU shares cannot be set by EADT's own daemon",
            "It comes with the NVIDIA driver; in a container, ask for the driver's `compute` and `utility` "
            "capabilities.",
        )
    ]
    control = directory / "control"
    if not control.exists():
        start = f"CUDA_MPS_PIPE_DIRECTORY={directory} nvidia-cuda-mps-control -d"
        fix = f"On the node, as the job's user: `{start}`."
        found.append(Capability("mps_daemon", "missing", f"no MPS daemon listens in {directory}", fix))
    elif _has_listener(control):
        found.append(Capability("mps_daemon", "ok", f"an MPS daemon listens in {directory}"))
    else:
        found.append(
            Capability(
                "mps_daemon",
                "degraded",
                f"{control} is there, but no process of this container listens on it",
                "Fine if the daemon runs in another container of this node; else remove the stale folder "
                "and start the daemon: with it there, CUDA fails (error 805).",
            )
        )
    return found


def _has_listener(socket_path: Path) -> bool:
    # Asking the kernel's list instead of connecting: a connection would show in the daemon's log.
    try:
        return any(
            line.split()[-1] == str(socket_path)
            for line in Path("/proc/net/unix").read_text().splitlines()[1:]
        )
    except OSError:
        return False


def _shared_memory(path: str) -> Capability:
    folder = Path(path)
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Capability(
            "shared_memory",
            "missing",
            f"{folder}: {error.strerror or error}: the state is handed over through a file on disk",
            "Set elastic.shared_memory_dir to a folder on a tmpfs.",
        )
    detail = f"{folder}: {format_bytes(usage.free)} free of {format_bytes(usage.total)}"
    if not os.access(folder, os.W_OK):
        return Capability("shared_memory", "missing", f"{detail}, not writable", "Make it writable.")
    if usage.free < _SMALL_SHARED_MEMORY_BYTES:
        return Capability(
            "shared_memory",
            "degraded",
            f"{detail}: a larger optimizer state goes through a file on disk, so resizes take longer",
            "Docker: `--shm-size=16g`. Kubernetes: mount an emptyDir with `medium: Memory` at /dev/shm.",
        )
    return Capability("shared_memory", "ok", detail)


def _cores() -> Capability:
    total, usable, limit = num_cores(), usable_cores(), cgroup_core_limit()
    if usable >= total:
        return Capability("cores", "ok", f"{total} cores, all usable")
    why = f"the container's limit is {limit:g}" if limit is not None and limit <= usable else "by affinity"
    return Capability(
        "cores",
        "degraded",
        f"{usable:g} of {total} cores are usable ({why}); an estimate of CPU power covers all {total}",
        "Set resources.training_cores_per_node to what the container has.",
    )


def _memory() -> Capability:
    memory = psutil.virtual_memory()
    limit_bytes = cgroup_memory_limit_bytes()
    detail = f"{format_bytes(memory.available)} available of {format_bytes(memory.total)}"
    if limit_bytes is not None and limit_bytes < memory.total:
        detail += f"; this container may use {format_bytes(limit_bytes)}"
    return Capability("memory", "ok", detail)


def _compiler() -> str:
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    return f"C compiler {found}" if found else "no C compiler"
