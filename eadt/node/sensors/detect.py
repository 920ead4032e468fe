"""Chooses this node's power sources, and says in sentences which, and why not the others."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eadt.adapters.nvml import Nvml, NvmlGpu
from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.config import PowerConfig
from eadt.errors import EadtError, EnvironmentFailure
from eadt.node.card_states import CardStates, CountForeign, nvml_looks
from eadt.node.deadline import DeviceCall
from eadt.node.sensors.base import Component, PowerSource, UnmeasuredSource, unknown_gpu
from eadt.node.sensors.estimate import CpuEstimateSource
from eadt.node.sensors.nvml import NvmlSource
from eadt.node.sensors.rapl import POWERCAP_ROOT, RaplSource
from eadt.node.sensors.simulated import SimulatedGpuSource
from eadt.node.utilisation import PROC_STAT, CpuTimes, machine_id

NVML_DEADLINE_S = 60.0
"""Waking up a driver that sleeps takes seconds per card; one that takes longer than this hangs."""

_CLOSING_DEADLINE_S = 1.0
_AMD_FIX = "EADT has no sensor for AMD GPUs yet; `rocm-smi --showpower` shows their power."
_FORCED_FIX = "Set power.source to auto, or to a source that this machine has (`eadt doctor` lists them)."


@dataclass(frozen=True)
class Host:
    """Where the sensors are looked for; tests pass folders of their own."""

    powercap_root: Path = POWERCAP_ROOT
    proc_stat: Path = PROC_STAT
    device_root: Path = Path("/dev")
    kfd_root: Path = Path("/sys/class/kfd/kfd/topology/nodes")


@dataclass
class SourceSelection:
    """The sources of one node.

    Attributes:
        sources: What the meter reads.
        chosen: One sentence per metered component.
        not_chosen: One sentence per source that was looked for and is not used, with the reason and the
            fix.
        simulated: The simulated GPUs, to be told their utilisation; ``None`` where there are none.
    """

    sources: list[PowerSource] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)
    not_chosen: list[str] = field(default_factory=list)
    simulated: SimulatedGpuSource | None = None

    @property
    def components(self) -> list[Component]:
        """All metered components, unknown ones included."""
        return [component for source in self.sources for component in source.components]

    def as_dicts(self) -> list[dict[str, Any]]:
        """The components as plain values, for the ledger's ``node`` row."""
        return [component.as_dict() for component in self.components]

    def gpus(self) -> dict[str, NvmlGpu]:
        """The cards that NVML knows, by component; calls to them may block."""
        return {
            name: gpu
            for source in self.sources
            if isinstance(source, NvmlSource)
            for name, gpu in source.gpus.items()
        }

    def card_states(self, count_foreign: CountForeign, clock: Clock = SYSTEM_CLOCK) -> CardStates:
        """What looks at how the cards do; of cards that NVML does not know, everything is unknown."""
        return CardStates(nvml_looks(self.gpus(), count_foreign), clock)

    def close(self) -> None:
        """Close all sources; one that fails or hangs does not keep the others open."""
        for source in self.sources:
            # A thread of its own: a driver that hangs may hang here too.
            closing = threading.Thread(target=self._close, args=(source,), name="eadt-close", daemon=True)
            closing.start()
            closing.join(_CLOSING_DEADLINE_S)

    def _close(self, source: PowerSource) -> None:
        try:
            source.close()
        except EadtError as error:
            self.not_chosen.append(f"closing failed: {error.what}")

    def _add(self, source: PowerSource) -> None:
        self.sources.append(source)
        self.chosen.extend(component.detail for component in source.components)


def detect_sources(
    config: PowerConfig,
    clock: Clock = SYSTEM_CLOCK,
    *,
    nvml: Nvml | None = None,
    gpus: Sequence[int | str] | None = None,
    host: Host | None = None,
) -> SourceSelection:
    """Look for sensors and choose: NVML for GPUs, RAPL or else the estimate for the CPU.

    Reads only; takes a few milliseconds, half a second where the NVIDIA driver has to wake up.

    Args:
        config: ``power`` of the run's configuration. ``source: nvml`` demands readable GPUs, ``rapl``
            readable CPU counters (GPUs are then left out), ``estimate`` takes the CPU model alone, and
            ``simulated`` adds pretended GPUs to the CPU's best source.
        clock: Source of time.
        nvml: The library to use; by default the real one.
        gpus: Which GPUs to meter, by NVML index or UUID; ``None`` means all, and ``()`` none.
        host: Where to look.

    Raises:
        EnvironmentFailure: The source that the configuration demands is not there.
    """
    host = host or Host()
    selection = SourceSelection()
    wanted = config.source
    try:
        if wanted == "simulated":
            _add_simulated(selection, config, clock, host)
        elif wanted in ("auto", "nvml") and (gpus is None or len(gpus) > 0):
            _add_nvidia_gpus(selection, nvml or Nvml(), gpus, clock, host, demanded=wanted == "nvml")
            _add_amd_gpus(selection, gpus, clock, host)
        elif wanted in ("rapl", "estimate"):
            selection.not_chosen.append(f"GPUs are not metered, since power.source is {wanted}")
        _add_cpu(selection, config, clock, host)
    except BaseException:
        selection.close()
        raise
    return selection


def _add_simulated(selection: SourceSelection, config: PowerConfig, clock: Clock, host: Host) -> None:
    settings = config.simulated
    selection.simulated = SimulatedGpuSource(
        num_gpus=settings.num_gpus,
        idle_w=settings.idle_w,
        max_w=settings.max_w,
        seed=settings.seed,
        clock=clock,
        cpu_times=CpuTimes(host.proc_stat),
    )
    selection._add(selection.simulated)


def _add_nvidia_gpus(
    selection: SourceSelection,
    nvml: Nvml,
    wanted: Sequence[int | str] | None,
    clock: Clock,
    host: Host,
    *,
    demanded: bool,
) -> None:
    def look() -> NvmlSource:
        nvml.open()
        found = nvml.gpus()
        return NvmlSource(
            nvml,
            [gpu for gpu in found if wanted is None or gpu.index in wanted or gpu.uuid() in wanted],
            clock,
        )

    try:
        source = DeviceCall(look, "the NVIDIA driver's list of GPUs", NVML_DEADLINE_S).ask()
    except EadtError as error:
        if demanded:
            raise _demanded_missing("nvml", error) from error
        selection.not_chosen.append(_sentence("GPUs through NVML", error))
        _add_gpus_without_nvml(selection, clock, host, error)
        return
    if demanded and source.num_readable == 0:
        none = "no GPU of this node is to be metered"
        reason = "no GPU of this node can be read" if source.components else none
        nvml.close()
        raise _demanded_missing("nvml", reason)
    if not source.components:
        selection.not_chosen.append("GPUs through NVML: the driver is here but no GPU is to be metered.")
        nvml.close()
        return
    selection._add(source)
    selection.not_chosen.extend(
        f"{component.detail}. On a vGPU the host alone can measure: run EADT's node agent there."
        for component in source.components
        if component.quality is None
    )


def _add_gpus_without_nvml(selection: SourceSelection, clock: Clock, host: Host, error: EadtError) -> None:
    """GPUs that the kernel shows but NVML does not: they draw power, so they are unknown, not absent."""
    paths = sorted(host.device_root.glob("nvidia[0-9]*"), key=lambda path: int(path.name[len("nvidia") :]))
    components = [
        unknown_gpu(
            f"gpu{position}",
            f"{path.name} is there, but NVML is not ({error.what})",
            f"{machine_id() or 'machine'}/{path.name}",
        )
        for position, path in enumerate(paths)
    ]
    if components:
        selection._add(UnmeasuredSource(components, clock))


def _add_amd_gpus(
    selection: SourceSelection, wanted: Sequence[int | str] | None, clock: Clock, host: Host
) -> None:
    """AMD's GPUs, from the kernel's list: no sensor of EADT's reads them, so they are unknown, not absent."""
    num_before = sum(component.is_gpu for component in selection.components)
    found = [
        (num_before + position, identity) for position, identity in enumerate(_amd_identities(host.kfd_root))
    ]
    components = [
        unknown_gpu(f"gpu{index}", "it is AMD's, and EADT has no sensor for those", identity)
        for index, identity in found
        if wanted is None or index in wanted or identity in wanted
    ]
    if components:
        selection._add(UnmeasuredSource(components, clock))
        names = ", ".join(component.name for component in components)
        selection.not_chosen.append(f"AMD GPUs ({names}): their energy is unknown. {_AMD_FIX}")
    elif not found and (host.device_root / "kfd").exists():
        selection.not_chosen.append(
            f"AMD GPUs: /dev/kfd is there, but not which GPUs: their energy is in no number. {_AMD_FIX}"
        )


def _amd_identities(kfd_root: Path) -> list[str]:
    """One name for each GPU in the kernel's topology (linux: drivers/gpu/drm/amd/amdkfd/kfd_topology.c)."""
    identities: list[str] = []
    for folder in sorted(kfd_root.glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            gpu_id = (folder / "gpu_id").read_text().strip()
            properties = dict(
                line.split(" ", 1) for line in (folder / "properties").read_text().splitlines() if " " in line
            )
            # A node without vector units, or with the id 0, is a CPU.
            if int(gpu_id) == 0 or int(properties.get("simd_count", "0")) == 0:
                continue
        except (OSError, ValueError):
            continue
        unique_id = properties.get("unique_id", "0").strip()
        # Consumer cards have no unique id; theirs is only unique on this machine.
        on_machine = f"{machine_id() or 'machine'}/kfd-{gpu_id}"
        identities.append(on_machine if unique_id == "0" else f"amd-{unique_id}")
    return identities


def _add_cpu(selection: SourceSelection, config: PowerConfig, clock: Clock, host: Host) -> None:
    if config.source != "estimate":
        try:
            selection._add(RaplSource(clock, host.powercap_root))
            return
        except EadtError as error:
            if config.source == "rapl":
                raise _demanded_missing("rapl", error) from error
            selection.not_chosen.append(_sentence("CPU through RAPL", error))
    try:
        selection._add(
            CpuEstimateSource(
                idle_w=config.estimate.idle_w,
                per_core_w=config.estimate.per_core_w,
                clock=clock,
                cpu_times=CpuTimes(host.proc_stat),
            )
        )
    except (EadtError, OSError) as error:
        if config.source == "estimate":
            raise _demanded_missing("estimate", error) from error
        selection.not_chosen.append(_sentence("CPU by estimate", error))
        unknown = Component(
            name="cpu",
            source="none",
            quality=None,
            detail="cpu: neither measured nor estimated; its energy is unknown",
            identity=f"{machine_id() or 'machine'}/cpu",
        )
        selection._add(UnmeasuredSource([unknown], clock))


def _demanded_missing(source: str, reason: Exception | str) -> EnvironmentFailure:
    fix = f"{reason.fix} Or: {_FORCED_FIX}" if isinstance(reason, EadtError) and reason.fix else _FORCED_FIX
    what = reason.what if isinstance(reason, EadtError) else str(reason)
    return EnvironmentFailure(
        f"power.source is {source}, but this node has no such source: {what}",
        code="EADT-346",
        means="Nothing was started.",
        fix=fix,
    )


def _sentence(name: str, error: Exception) -> str:
    if not isinstance(error, EadtError):
        return f"{name}: {error}."
    return f"{name}: {error.what}." + (f" {error.fix}" if error.fix else "")
