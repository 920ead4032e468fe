"""An engine's line to its node agent: messages out at any time, commands in without blocking."""

from __future__ import annotations

import pickle
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from multiprocessing.connection import Connection
from typing import Any

from eadt.errors import ConfigError

Message = tuple[Any, ...]

_PLAIN = (str, bytes, int, float, type(None))


class AgentGoneError(RuntimeError):
    """The node agent closed the line: it died or has given this engine up."""


class EngineChannel:
    """Wraps the connection; a daemon thread receives. Sending is safe from any thread.

    A command that cannot be read is raised where commands are taken: the engine must not go on without it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._commands: deque[Message] = deque()
        self._arrived = threading.Condition()
        self._open = True
        self._failure: Exception | None = None
        self._sending = threading.Lock()

    def start(self) -> None:
        """Begin to receive; the thread ends with the line."""
        threading.Thread(target=self._receive, name="eadt-commands", daemon=True).start()

    @property
    def is_open(self) -> bool:
        """Whether the agent is still there."""
        return self._open

    def send(self, kind: str, **values: Any) -> None:
        """Send an event; drops it when the agent has gone, since nobody could act on it.

        Raises:
            ConfigError: EADT-231, a value is a tensor or another thing that is no plain data.
        """
        for where, value in _not_plain(values, kind):
            raise ConfigError(
                f"{where} is a {type(value).__module__}.{type(value).__name__}, "
                "but an engine tells plain data only: numbers, text, and lists and dictionaries of them",
                code="EADT-231",
                fix="take .item() of a tensor or a number of numpy, or .tolist(), before it is told or kept",
            )
        with self._sending:
            try:
                self._connection.send((kind, values))
            except OSError:
                self._open = False

    def poll(self, *kinds: str) -> Message | None:
        """The next command of one of these kinds, or ``None``. Does not block.

        Raises:
            RuntimeError: A command could not be read.
        """
        with self._arrived:
            return self._take(kinds)

    def wait(self, *kinds: str) -> Message:
        """Block until a command of one of these kinds arrives; others stay.

        Raises:
            AgentGoneError: The line was closed meanwhile.
            RuntimeError: A command could not be read.
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
        if self._failure is not None:
            raise RuntimeError("a command of the node agent cannot be read") from self._failure
        for command in self._commands:
            if command[0] in kinds:
                self._commands.remove(command)
                return command
        return None

    def _receive(self) -> None:
        while True:
            try:
                content = self._connection.recv_bytes()
            except (EOFError, OSError):
                with self._arrived:
                    self._open = False
                    self._arrived.notify_all()
                return
            try:
                command = pickle.loads(content)
            except Exception as error:
                with self._arrived:
                    self._failure = error
                    self._arrived.notify_all()
                return
            with self._arrived:
                self._commands.append(command)
                self._arrived.notify_all()


def _not_plain(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """What in a value is no plain data, each with its place."""
    if isinstance(value, _PLAIN):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, Sequence | Set):
        for index, item in enumerate(value):
            yield from _not_plain(item, f"{where}[{index}]")
    elif is_dataclass(value) and type(value).__module__.startswith("eadt."):
        for field in fields(value):
            yield from _not_plain(getattr(value, field.name), f"{where}.{field.name}")
    else:
        yield where, value
