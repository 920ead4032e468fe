"""Chooses this node's power sources, and says in sentences which, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eadt.adapters.nvml import Nvml
from eadt.clock import SYSTEM_CLOCK, Clock
from eadt.config import PowerConfig
from eadt.errors import EadtError, EnvironmentFailure
from eadt.node.sensors.base import Component, PowerSource, UnmeasuredSource
from eadt.node.sensors.estimate import CpuEstimateSource
from eadt.node.sensors.nvml import NvmlSource
from eadt.node.sensors.rapl import POWERCAP_ROOT, RaplSource
from eadt.node.sensors.simulated import SimulatedGpuSource
from eadt.node.utilisation import PROC_STAT, CpuTimes, machine_id

_FORCED_FIX = "Set power.source to auto, or to a source that this machine has (`eadt doctor` lists them)."


@dataclass(frozen=True)
class Host:
    """Where the sensors are looked for; tests pass folders of their own."""

    powercap_root: Path = POWERCAP_ROOT
    proc_stat: Path = PROC_STAT
    device_root: Path = Path("/dev")


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

    def close(self) -> None:
        """Close all sources; a source that fails to close does not keep the others open."""
        for source in self.sources:
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
            _add_gpus(selection, nvml or Nvml(), gpus, clock, host, demanded=wanted == "nvml")
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


def _add_gpus(
    selection: SourceSelection,
    nvml: Nvml,
    wanted: Sequence[int | str] | None,
    clock: Clock,
    host: Host,
    *,
    demanded: bool,
) -> None:
    try:
        nvml.open()
        found = nvml.gpus()
        chosen = (
            found if wanted is None else [gpu for gpu in found if gpu.index in wanted or gpu.uuid() in wanted]
        )
        source = NvmlSource(nvml, chosen, clock)
    except EadtError as error:
        if demanded:
            raise _demanded_missing("nvml", error) from error
        selection.not_chosen.append(_sentence("GPUs through NVML", error))
        _add_unreadable_gpus(selection, clock, host)
        return
    if demanded and source.num_readable == 0:
        reason = "no GPU of this node is to be metered" if not chosen else "no GPU of this node can be read"
        nvml.close()
        raise _demanded_missing("nvml", reason)
    if not chosen:
        selection.not_chosen.append("GPUs through NVML: the driver is here but no GPU is to be metered.")
        nvml.close()
        return
    selection._add(source)


def _add_unreadable_gpus(selection: SourceSelection, clock: Clock, host: Host) -> None:
    """GPUs that the kernel shows but NVML does not: they draw power, so they are unknown, not absent."""
    names = sorted(path.name for path in host.device_root.glob("nvidia[0-9]*"))
    if names:
        components = [
            Component(
                name=f"gpu{position}",
                source="none",
                quality=None,
                detail=f"gpu{position}: /dev/{name} is there, but NVML is not; its energy is unknown",
                identity=f"{machine_id() or 'machine'}/{name}",
            )
            for position, name in enumerate(names)
        ]
        selection._add(UnmeasuredSource(components, clock))
    if (host.device_root / "kfd").exists():
        selection.not_chosen.append(
            "AMD GPUs: /dev/kfd is there, but EADT has no sensor for them: their energy is in no number."
        )


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
