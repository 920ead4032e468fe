"""What the coordinator knows of a node, and what it may ask of that node's agent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from eadt.training.checkpoint import Manifest, Shard
from eadt.training.engine_spec import EngineSpec
from eadt.training.state import Span, StateLayout
from eadt.units import Quality

if TYPE_CHECKING:
    from eadt.coordination.metering import Metered


@dataclass(frozen=True)
class NodeInfo:
    """Facts about a node, told by its agent when it starts.

    Attributes:
        node_id: Ray's id.
        ip: Address that other nodes reach it at.
        hostname: For people.
        cores: CPU cores that training may use, by the machine's numbers.
        num_gpus: GPUs of the node.
        state_address: Host and port of its state server.
        slot_paths: Its state slots, by number.
        identities: What each energy component really is, equal on all Ray nodes of one machine.
        pretended: Components that are simulated cards: they are its own though Ray gave none.
        honest_window_s: Shortest window over which its sensors are right, in s.
        notes: What the user should know of its sensors: (code, text).
        data_path: Folder of the prepared data set there; empty without one.
    """

    node_id: str
    ip: str
    hostname: str
    cores: tuple[int, ...]
    num_gpus: int
    state_address: tuple[str, int]
    slot_paths: tuple[str, ...]
    identities: dict[str, str]
    pretended: frozenset[str] = frozenset()
    honest_window_s: float = 0.0
    notes: tuple[tuple[str, str], ...] = ()
    data_path: str = ""


class NodeTime:
    """Turns a node's monotonic times into session time, without any wall clock.

    A message that was sent at ``t`` of the node's clock arrived at ``s`` of ours: the two clocks differ by
    ``s - t``, less the time on the way. The least difference seen so far is the best; it is too large by the
    shortest way, some milliseconds.
    """

    def __init__(self) -> None:
        self._difference_s: float | None = None

    def heard(self, sent_s: float, received_s: float) -> None:
        """A message of the node has come.

        Args:
            sent_s: When it was sent, node time in s.
            received_s: When it arrived, session time in s.
        """
        difference_s = received_s - sent_s
        if self._difference_s is None or difference_s < self._difference_s:
            self._difference_s = difference_s

    def session_s(self, node_s: float) -> float:
        """A node time as session time; as it is while nothing was heard."""
        return node_s + (self._difference_s or 0.0)


@dataclass(frozen=True)
class NodeReading:
    """What a node's meter says now.

    Attributes:
        power_w: Mean power over the window that was asked for, in W, of the devices that train and that this
            node books: cards with engines, or the CPU of a node without. Unknown: ``None``.
        quality: How far ``power_w`` can be trusted.
    """

    power_w: float | None
    quality: Quality


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

    def set_use(self, use: str) -> None:
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

    def set_metered(self, metered: Metered) -> None:
        """What the node books from now on."""
        ...

    async def write_shard(
        self, step: int, index: int, slot: int, layout: StateLayout, spans: Sequence[Span], attempt: str
    ) -> Shard:
        """Write this node's part of a saved state to the storage."""
        ...

    async def restore(self, manifest: Manifest, shards: Sequence[int], slot: int) -> list[Span]:
        """Read shards of a checkpoint from the storage into a slot."""
        ...
