"""Which host runs which rank, on which device and with which share. Pure.

A device is a GPU, or the training cores of a CPU node. Ranks fill the devices evenly, in the order
of the hosts' Ray ranks, so that rank 0 stays where it is whenever it can.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from eadt.control.setpoint import Setpoint
from eadt.training.engine_spec import ComputeShare


@dataclass(frozen=True)
class Host:
    """A Ray Train worker: a place where one engine may run.

    Attributes:
        world_rank: Its rank in Ray Train's worker group.
        group_size: Workers in that group.
        node_id: Its Ray node.
        gpu_ids: GPUs that Ray gave it, as it names them; empty on a CPU node.
        pid: Its process on that node; 0 where there is none.
    """

    world_rank: int
    group_size: int
    node_id: str
    gpu_ids: tuple[str, ...] = ()
    pid: int = 0

    @property
    def device(self) -> tuple[str, str]:
        """Identifies the device: node and GPU, or the node's cores."""
        return self.node_id, ",".join(self.gpu_ids) or "cpu"


@dataclass(frozen=True)
class Seat:
    """One rank's place.

    Attributes:
        rank: Rank in the generation.
        host: The host that it runs for.
        index_on_device: Number among the ranks that share the device, from 0.
    """

    rank: int
    host: Host
    index_on_device: int


@dataclass(frozen=True)
class Placement:
    """The seats of a generation, by rank."""

    seats: tuple[Seat, ...] = field(default_factory=tuple)

    @property
    def num_workers(self) -> int:
        """Ranks that are placed."""
        return len(self.seats)

    @property
    def node_ids(self) -> list[str]:
        """Nodes that take part, in rank order, each once."""
        return list(dict.fromkeys(seat.host.node_id for seat in self.seats))

    @property
    def num_devices(self) -> int:
        """Devices that take part."""
        return len({seat.host.device for seat in self.seats})

    @property
    def shares_a_device(self) -> bool:
        """Whether two ranks run on one device."""
        return any(seat.index_on_device for seat in self.seats)


def place(
    hosts: Iterable[Host], setpoint: Setpoint, feasible: Collection[int], excluded_nodes: Collection[str] = ()
) -> Placement:
    """Seat as many ranks as the setpoint asks for, or the most that hosts and batch allow.

    Args:
        hosts: All hosts there are.
        setpoint: Asks for ``num_workers``, at most ``workers_per_gpu`` a device.
        feasible: Worker counts that can hold the global batch.
        excluded_nodes: Nodes that are being drained.

    Returns:
        The placement; without seats where not even the smallest feasible count fits.
    """
    usable = sorted(
        (host for host in hosts if host.node_id not in excluded_nodes), key=lambda host: host.world_rank
    )
    taken: dict[tuple[str, str], int] = {}
    chosen: list[tuple[Host, int]] = []
    # Level by level, so that every device has its first rank before any has its second.
    for level in range(setpoint.workers_per_gpu):
        for host in usable:
            if taken.get(host.device, 0) == level and not any(host is other for other, _ in chosen):
                taken[host.device] = level + 1
                chosen.append((host, level))
    wanted = max((count for count in feasible if count <= min(setpoint.num_workers, len(chosen))), default=0)
    seats = sorted(chosen[:wanted], key=lambda item: item[0].world_rank)
    return Placement(tuple(Seat(rank, host, index) for rank, (host, index) in enumerate(seats)))


def cpu_share(percentage: int, cores: Sequence[int], index_on_device: int) -> ComputeShare:
    """Turn a share of a node's training cores into threads, affinity and pacing.

    A share of 50 % of 4 cores is two threads on two cores of their own; 85 % of 2 cores is two
    threads that compute 85 % of the time, since a fraction of a core cannot be pinned.

    Args:
        percentage: Share of the cores, 1 to 100 %.
        cores: Cores that training may use on this node, by the machine's numbers.
        index_on_device: Number among the engines on this node; spreads them over the cores.
    """
    wanted = percentage / 100 * len(cores)
    num_threads = max(1, math.ceil(wanted - 1e-9))
    first = index_on_device * num_threads
    return ComputeShare(
        percentage=percentage,
        cores=tuple(sorted({cores[(first + offset) % len(cores)] for offset in range(num_threads)})),
        num_threads=num_threads,
        duty_fraction=min(1.0, wanted / num_threads),
    )
