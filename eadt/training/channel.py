"""An engine's line to its node agent: messages out at any time, commands in without blocking."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from typing import Any

Message = tuple[Any, ...]


class AgentGoneError(RuntimeError):
    """The node agent closed the line: it died or has given this engine up."""


class EngineChannel:
    """Wraps the connection; a daemon thread receives. Sending is safe from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._commands: deque[Message] = deque()
        self._arrived = threading.Condition()
        self._open = True
        self._sending = threading.Lock()

    def start(self) -> None:
        """Begin to receive; the thread ends with the line."""
        threading.Thread(target=self._receive, name="eadt-commands", daemon=True).start()

    @property
    def is_open(self) -> bool:
        """Whether the agent is still there."""
        return self._open

    def send(self, kind: str, **values: Any) -> None:
        """Send an event; drops it when the agent has gone, since nobody could act on it."""
        with self._sending:
            try:
                self._connection.send((kind, values))
            except OSError:
                self._open = False

    def poll(self, *kinds: str) -> Message | None:
        """The next command of one of these kinds, or ``None``. Does not block."""
        with self._arrived:
            return self._take(kinds)

    def wait(self, *kinds: str) -> Message:
        """Block until a command of one of these kinds arrives; others stay.

        Raises:
            AgentGoneError: The line was closed meanwhile.
        """
        with self._arrived:
            while True:
                command = self._take(kinds)
                if command is not None:
                    return command
                if not self._open:
                    raise AgentGoneError("the node agent has gone")
                self._arrived.wait()

    def _take(self, kinds: tuple[str, ...]) -> Message | None:
        for command in self._commands:
            if command[0] in kinds:
                self._commands.remove(command)
                return command
        return None

    def _receive(self) -> None:
        try:
            while True:
                command = self._connection.recv()
                with self._arrived:
                    self._commands.append(command)
                    self._arrived.notify_all()
        except (EOFError, OSError):
            with self._arrived:
                self._open = False
                self._arrived.notify_all()


def accept_in_background(listener: Listener, serve: Callable[[Connection], None], name: str) -> None:
    """Accept connections until the listener is closed; each is served in a daemon thread of its own."""

    def accept() -> None:
        while True:
            try:
                connection = listener.accept()
            except (AuthenticationError, EOFError, ConnectionError):
                continue  # a stranger, or one that went away again
            except OSError:
                return  # closed
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, name=name, daemon=True).start()
