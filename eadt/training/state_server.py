"""Serves this node's slots to the engines of other nodes, over the network, streamed.

Runs inside the node agent. Whoever connects proves knowledge of the run's key (see
:mod:`eadt.training.listener`) and may read slots below one folder, nothing else.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

from eadt.training.listener import KeyedListener
from eadt.training.state import StateLayout, StateSlot


class StateServer:
    """A listener thread and one thread per connected engine, all daemons. Start with :meth:`start`.

    Args:
        folders: Where slots may be read.
        host: Address to listen at.
        authkey: The run's key.
        handshake_s: How long a peer may take to prove that it knows the key.
        max_strangers: Peers that may be at that at one time; further ones wait.
    """

    def __init__(
        self,
        folders: list[Path],
        host: str,
        authkey: bytes,
        *,
        handshake_s: float = 5.0,
        max_strangers: int = 64,
    ) -> None:
        self._folders = [folder.resolve() for folder in folders]
        self._listener = KeyedListener(
            (host, 0),
            authkey,
            self._serve,
            "eadt-state-server",
            handshake_s=handshake_s,
            max_strangers=max_strangers,
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that other nodes connect to; valid after :meth:`start`."""
        return self._listener.address

    def start(self) -> None:
        """Begin to listen. Does not block."""
        self._listener.start()

    def stop(self) -> None:
        """Stop listening; transfers under way end with their connections."""
        self._listener.close()

    def _serve(self, connection: Connection) -> None:
        slots: dict[str, StateSlot] = {}
        try:
            while True:
                path, layout, row, start, stop = connection.recv()
                slot = slots.get(path)
                if slot is None:
                    slot = slots[path] = self._open(path, layout)
                connection.send_bytes(slot.row(row)[start:stop].data.cast("B"))
        except (EOFError, ConnectionError, TimeoutError):
            return  # the engine is done, or gone
        finally:
            for slot in slots.values():
                slot.close()

    def _open(self, path: str, layout: StateLayout) -> StateSlot:
        if Path(path).resolve().parent not in self._folders:
            raise PermissionError(f"{path} is not a slot of this run")
        return StateSlot(path, layout, writable=False)
