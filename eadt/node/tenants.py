"""Who else trains on this machine, and which part of its CPU work is this run's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from eadt.adapters.nvml import ComputeProcess

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class OwnFraction:
    """Which part of the machine's CPU work was this run's, since the last time it was asked.

    Attributes:
        fraction: Of the cpu and dram energy, this run's part; ``None``: the run is alone, all is its own.
        tenants: The others, by name (``run demo-1a2b``, ``Ray worker Trainer``); empty when alone.
        own_cpu_s: CPU seconds of this run's processes.
        foreign_fraction: Fraction of the machine's CPU time that was neither this run's nor a tenant's nor
            the system's; ``None``: not known.
    """

    fraction: float | None
    tenants: tuple[str, ...]
    own_cpu_s: float
    foreign_fraction: float | None


def write_tenant(folder: Path, run_id: str, node: str, proc: Path = PROC) -> None:
    """Register the calling process as the agent of a run: writes ``folder/tenant.json``."""
    raise NotImplementedError


def remove_tenant(folder: Path) -> None:
    """Take the registration back. Idempotent."""
    raise NotImplementedError


class Tenants:
    """See the module. Thread-safe.

    Args:
        shared_memory_dir: Where the agents of all runs have their folders.
        run_id: This run.
        own_pids: Process numbers on this machine that are this run's besides its agents and what they
            started: hosts, coordinator, driver. Published in ``tenant.json``, so that other runs know.
        proc: The ``/proc`` to read.
    """

    def __init__(
        self,
        shared_memory_dir: Path,
        run_id: str,
        own_pids: Callable[[], Collection[int]],
        proc: Path = PROC,
    ) -> None:
        raise NotImplementedError

    @property
    def can_see_machine(self) -> bool:
        """Whether all processes of the machine are visible, or only this container's or this user's."""
        raise NotImplementedError

    def start(self) -> None:
        """Count from now on. Reads ``/proc`` once."""
        raise NotImplementedError

    def own_fraction(self) -> OwnFraction:
        """This run's part since the last call (or :meth:`start`). A few ms; raises nothing."""
        raise NotImplementedError

    def own_tree(self) -> frozenset[int]:
        """Process numbers of this run on this machine, now."""
        raise NotImplementedError

    def cpu_seconds_of(self, pids: Collection[int]) -> dict[int, float]:
        """CPU seconds, since their start, of processes with all that they started; without those gone."""
        raise NotImplementedError

    def foreign_on_card(self, processes: Collection[ComputeProcess], num_own_engines: int) -> int:
        """How many of a card's processes are not this run's; see :func:`foreign_on_card`."""
        raise NotImplementedError


def foreign_on_card(
    processes: Collection[ComputeProcess],
    own_pids: Collection[int],
    titles: Mapping[int, str],
    num_own_engines: int,
    *,
    can_see_machine: bool,
) -> int:
    """How many of a card's compute processes are not this run's."""
    raise NotImplementedError
