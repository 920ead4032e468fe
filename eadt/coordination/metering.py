"""Which node books which piece of hardware: only what is the run's own, and each piece once. Pure.

A run's own are the nodes on which it has hosts and, of their GPUs, those that its hosts were given. Several
Ray nodes on one machine see the same hardware; then one of them books it, and keeps it while it can.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from eadt.coordination.nodes import NodeInfo
from eadt.coordination.placement import Host


@dataclass(frozen=True)
class Metered:
    """What one node books.

    Attributes:
        components: Names of its components.
        unknown_gpus: GPUs that its hosts were given and that none of its sensors knows, as Ray names them.
        own_pids: Processes there that are the run's, besides the agent and what it started.
    """

    components: tuple[str, ...] = ()
    unknown_gpus: tuple[str, ...] = ()
    own_pids: tuple[int, ...] = ()


def component_of(gpu_id: str, identities: Mapping[str, str]) -> str | None:
    """The component that measures a GPU, by the index or UUID that Ray names it by.

    Args:
        gpu_id: Ray's name of it.
        identities: What each component of the node really is.
    """
    if f"gpu{gpu_id}" in identities:
        return f"gpu{gpu_id}"
    return next((name for name, identity in identities.items() if identity == gpu_id), None)


def unknown_name(gpu_id: str) -> str:
    """What a GPU is called that no sensor knows."""
    return f"gpu{gpu_id}" if gpu_id.isdigit() else f"gpu-{gpu_id}"


def elect(
    nodes: Mapping[str, NodeInfo],
    hosts: Iterable[Host],
    before: Mapping[str, Metered],
    own_pids: Mapping[str, Collection[int]] | None = None,
) -> dict[str, Metered]:
    """What each node books from now on.

    Args:
        nodes: The nodes that answer.
        hosts: The run's hosts.
        before: What each booked until now: who has a piece of hardware keeps it.
        own_pids: By node, processes of the run that are no hosts: coordinator, supervisor, driver.
    """
    of_node: dict[str, list[Host]] = {}
    for host in hosts:
        if host.node_id in nodes:
            of_node.setdefault(host.node_id, []).append(host)
    wanted = {node_id: _wanted(nodes[node_id], own) for node_id, own in of_node.items()}
    taken: set[str] = set()
    elected: dict[str, list[str]] = {node_id: [] for node_id in nodes}
    for is_holder in (True, False):
        for node_id, names in wanted.items():
            held = before.get(node_id, Metered()).components
            for name in names:
                identity = nodes[node_id].identities[name]
                if (name in held) is is_holder and identity not in taken:
                    taken.add(identity)
                    elected[node_id].append(name)
    return {
        node_id: Metered(
            components=tuple(name for name in info.identities if name in elected[node_id]),
            unknown_gpus=tuple(
                dict.fromkeys(
                    gpu_id
                    for host in of_node.get(node_id, ())
                    for gpu_id in host.gpu_ids
                    if component_of(gpu_id, info.identities) is None
                )
            ),
            own_pids=tuple(
                sorted(
                    {
                        *(host.pid for host in of_node.get(node_id, ()) if host.pid),
                        *(own_pids or {}).get(node_id, ()),
                    }
                )
            ),
        )
        for node_id, info in nodes.items()
    }


def _wanted(info: NodeInfo, hosts: Collection[Host]) -> list[str]:
    """Components of a node that are the run's: its CPU, and the cards that its hosts were given."""
    given = {component_of(gpu_id, info.identities) for host in hosts for gpu_id in host.gpu_ids}
    return [
        name
        for name in info.identities
        if not name.startswith("gpu") or name in given or name in info.pretended
    ]


def booking_nodes(
    nodes: Mapping[str, NodeInfo], metered: Mapping[str, Metered], node_ids: Iterable[str]
) -> list[str]:
    """The nodes that book the hardware of ``node_ids``: themselves, or others on their machines."""
    meant_ids = set(node_ids)
    meant = {
        identity
        for node_id in meant_ids
        if node_id in nodes
        for identity in nodes[node_id].identities.values()
    }
    return [
        node_id
        for node_id, booked in metered.items()
        if node_id in nodes
        and (
            any(nodes[node_id].identities[name] in meant for name in booked.components)
            or (booked.unknown_gpus and node_id in meant_ids)
        )
    ]
