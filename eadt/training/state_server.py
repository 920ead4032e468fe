"""Serves this node's slots to the engines of other nodes, over the network, streamed.

Runs inside the node agent. Whoever connects proves knowledge of the run's key (the HMAC challenge
of :mod:`multiprocessing.connection`) and may read slots below one folder, nothing else.
"""

from __future__ import annotations

from multiprocessing.connection import Connection, Listener
from pathlib import Path

from eadt.training.channel import accept_in_background
from eadt.training.state import StateLayout, StateSlot


class StateServer:
    """A listener thread and one thread per connected engine, all daemons. Start with :meth:`start`."""

    def __init__(self, folders: list[Path], host: str, authkey: bytes) -> None:
        self._folders = [folder.resolve() for folder in folders]
        self._host = host
        self._authkey = authkey
        self._listener: Listener | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that other nodes connect to; valid after :meth:`start`."""
        assert self._listener is not None, "not started"
        host, port = self._listener.address
        return str(host), int(port)

    def start(self) -> None:
        """Begin to listen. Does not block."""
        self._listener = Listener((self._host, 0), backlog=64, authkey=self._authkey)
        accept_in_background(self._listener, self._serve, "eadt-state-server")

    def stop(self) -> None:
        """Stop listening; transfers under way end with their connections."""
        if self._listener is not None:
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
        except (EOFError, OSError):
            return  # the engine is done, or gone
        finally:
            connection.close()
            for slot in slots.values():
                slot.close()

    def _open(self, path: str, layout: StateLayout) -> StateSlot:
        if Path(path).resolve().parent not in self._folders:
            raise PermissionError(f"{path} is not a slot of this run")
        return StateSlot(path, layout, writable=False)
