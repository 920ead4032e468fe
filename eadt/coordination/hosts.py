"""The hosts of the present worker group: where they are, and when they were last heard of."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from eadt.clock import monotonic_s
from eadt.coordination.placement import Host

HOST_BEAT_S = 2.0
"""How often a host says that it is there."""

_BEAT_AGE_S = 2.5 * HOST_BEAT_S
"""A host that was heard of this lately holds its resources."""


class HostTable:
    """Hosts by world rank. A group that is still assembling has fewer than its size."""

    def __init__(self) -> None:
        self._hosts: dict[int, Host] = {}
        self._beats: dict[int, float] = {}
        self._has_group_changed = False

    @property
    def hosts(self) -> list[Host]:
        """Those that have come."""
        return list(self._hosts.values())

    @property
    def node_ids(self) -> set[str]:
        """Nodes with a host."""
        return {host.node_id for host in self._hosts.values()}

    @property
    def group_size(self) -> int:
        """Hosts that the present group has when it is complete; 0 without any."""
        return next((host.group_size for host in self._hosts.values()), 0)

    @property
    def is_complete(self) -> bool:
        """Whether there is a group, and all its hosts have come."""
        return 0 < self.group_size <= len(self._hosts)

    def register(self, host: Host) -> None:
        """A host has come; hosts of an earlier worker group are forgotten."""
        kept = {rank: other for rank, other in self._hosts.items() if other.group_size == host.group_size}
        if self._hosts and not kept:
            self._has_group_changed = True
        self._hosts = {**kept, host.world_rank: host}

    def beat(self, world_rank: int) -> None:
        """A host is there."""
        self._beats[world_rank] = monotonic_s()

    def lose_node(self, node_id: str) -> None:
        """A node has gone with its hosts; the rest count as a smaller group."""
        rest = [host for host in self._hosts.values() if host.node_id != node_id]
        self._hosts = {
            rank: replace(host, world_rank=rank, group_size=len(rest)) for rank, host in enumerate(rest)
        }

    def clear(self) -> None:
        """No host is there."""
        self._hosts = {}

    def num_holding(self, node_ids: Collection[str], *, group_is_up: bool) -> int:
        """Hosts on these nodes that hold resources: all of a group that is up, else those heard of lately."""
        now_s = monotonic_s()
        return sum(
            host.node_id in node_ids
            and (group_is_up or now_s - self._beats.get(rank, float("-inf")) < _BEAT_AGE_S)
            for rank, host in self._hosts.items()
        )

    def take_group_change(self) -> bool:
        """Whether the worker group has been replaced since this was last asked."""
        changed, self._has_group_changed = self._has_group_changed, False
        return changed
