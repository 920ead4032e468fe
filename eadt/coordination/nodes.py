"""What the coordinator knows of a node, and what it may ask of that node's agent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eadt.training.checkpoint import Manifest, Shard
from eadt.training.engine_spec import EngineSpec
from eadt.training.state import Span, StateLayout
from eadt.units import Quality


@dataclass(frozen=True)
class NodeInfo:
    """Facts about a node, told by its agent when it starts.

    Attributes:
        node_id: Ray's id.
        ip: Address that other nodes reach it at.
        hostname: For people.
        num_cores: CPU cores that training may use.
        num_gpus: GPUs of the node.
        state_address: Host and port of its state server.
        slot_paths: Its state slots, by number.
        anchor: Its clocks at one moment: ``monotonic_s`` and ``unix_s``.
        sources: What measures its energy: ``component``, ``source``, ``quality``.
        identities: What each energy component really is, equal on all Ray nodes of one machine.
        data_path: Folder of the prepared data set there; empty without one.
    """

    node_id: str
    ip: str
    hostname: str
    num_cores: int
    num_gpus: int
    state_address: tuple[str, int]
    slot_paths: tuple[str, ...]
    anchor: dict[str, float]
    sources: list[dict[str, Any]]
    identities: dict[str, str]
    data_path: str = ""

    def unix_s(self, monotonic_s: float) -> float:
        """A time of that node's monotonic clock as wall-clock time."""
        return self.anchor["unix_s"] + monotonic_s - self.anchor["monotonic_s"]


@dataclass(frozen=True)
class NodeReading:
    """What a node's meter says now.

    Attributes:
        power_w: Mean power of the training devices over the window that was asked for, in W; unknown:
            ``None``. Zero on a Ray node whose machine another Ray node measures.
        quality: How far ``power_w`` can be trusted.
        energy_j: Energy of all components that this node books, since its agent's start, in J; unknown:
            ``None``.
    """

    power_w: float | None
    quality: Quality
    energy_j: float | None


class NodeClient(Protocol):
    """The line to one node agent.

    The plain methods return at once, and what comes of them arrives as events. The coroutines
    raise :class:`eadt.errors.EnvironmentFailure` when the node does not answer.
    """

    def fork(self, specs: Sequence[EngineSpec]) -> None:
        """Start engines."""
        ...

    def send(self, engine_ids: Sequence[str], *command: Any) -> None:
        """Send a command to engines."""
        ...

    def kill(self, engine_ids: Sequence[str]) -> None:
        """End engines at once."""
        ...

    def set_phase(self, phase: str) -> None:
        """Book the node's energy under this use from now on."""
        ...

    async def ping(self, timeout_s: float) -> None:
        """Return when the node answers."""
        ...

    async def available_bytes(self) -> int:
        """Memory that new engines could take there."""
        ...

    async def reserve(self, num_bytes: int) -> str:
        """Make room for state there; returns a sentence when it had to go to disk."""
        ...

    def set_booked(self, components: Sequence[str]) -> None:
        """Which of its energy components the node books."""
        ...

    async def write_shard(
        self, step: int, index: int, slot: int, layout: StateLayout, spans: Sequence[Span], attempt: str
    ) -> Shard:
        """Write this node's part of a saved state to the storage."""
        ...

    async def restore(self, manifest: Manifest, shards: Sequence[int], slot: int) -> list[Span]:
        """Read shards of a checkpoint from the storage into a slot."""
        ...
