"""One node's engines: starts the fork server, forks engines, carries messages both ways.

Used by the node agent, and directly by tests and benchmarks that need engines without Ray. Events
reach one callback, from several threads, in each engine's own order; ``exit`` is the last one, and
comes for every engine that was asked for, whatever happens to it, its line or the fork server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from eadt.errors import EnvironmentFailure
from eadt.training.channel import Message
from eadt.training.engine_log import log_path, tail
from eadt.training.engine_spec import EngineSpec
from eadt.training.fork_server import ADDRESS_ENV, KEY_ENV
from eadt.training.listener import KeyedListener, hang_up

logger = logging.getLogger(__name__)

EventCallback = Callable[[str, str, dict[str, Any]], None]
"""Called with (engine_id, kind, values)."""

_KEPT_LOGS = 32
"""Logs of engines that have ended; older ones are removed."""


@dataclass
class _Engine:
    """An engine that was asked for, until its end has been told.

    Attributes:
        commands: What it is to be told, in order; ``None`` ends the telling.
        connection: Its line; ``None`` before it has said hello, and after the line's last event.
        pid: Its process; ``None`` before it is known, and after its end.
        signal_number: A signal to send it as soon as its process is known.
        status: With what it ended; ``None`` while it lives.
    """

    commands: SimpleQueue[Message | None] = field(default_factory=SimpleQueue)
    connection: Connection | None = None
    pid: int | None = None
    signal_number: int | None = None
    status: int | None = None


class EnginePool:
    """The engines of one node. Thread-safe; no method waits for an engine.

    A fork server that has ended takes its engines with it; the next fork starts another one.

    Args:
        folder: This node's own folder on disk, for logs; made if missing.
        on_event: Gets what engines send, and ``exit`` with ``status`` and ``log_tail`` at their end. An
            engine whose event makes it raise is ended, with an ``error`` event that says so.
        env: Environment of the fork server, over the present one.
    """

    def __init__(self, folder: Path, on_event: EventCallback, env: dict[str, str]) -> None:
        self._logs = folder / "logs"
        self._on_event = on_event
        self._env = env
        self._key = secrets.token_bytes(32)
        # A path for the socket would be too long below deep folders (108 bytes).
        self._address = f"eadt-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener = KeyedListener(self._address, self._key, self._serve, "eadt-engines")
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._engines: dict[str, _Engine] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._fork_server: Connection | None = None
        self._fork_server_line: threading.Thread | None = None
        self._asking = threading.Lock()
        self._queued: list[Message] = []
        self._ended_logs: deque[Path] = deque()
        self._is_open = False

    def start(self) -> None:
        """Start the fork server. Does not wait for its imports: see :meth:`wait_warm`."""
        self._logs.mkdir(parents=True, exist_ok=True)
        self._listener.start()
        with self._lock:
            self._is_open = True
            self._start_fork_server()

    def wait_warm(self, timeout_s: float) -> None:
        """Block until the fork server can fork at once.

        Raises:
            EnvironmentFailure: EADT-339, it did not come up; the message ends with its log.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._fork_server or not self._process, timeout_s)
            if self._fork_server is not None:
                return
        raise EnvironmentFailure(
            "the engines' fork server did not start on this node",
            code="EADT-339",
            means="no training engine can run here",
            fix="its log ends with: " + self.log_tail("fork-server"),
        )

    def fork(self, spec: EngineSpec) -> None:
        """Start an engine, at the latest when the fork server is up; its events follow. Returns at once.

        Raises:
            EnvironmentFailure: EADT-339, the pool was not started, or is stopped.
        """
        engine_id = spec.engine_id
        with self._lock:
            if not self._is_open:
                raise EnvironmentFailure("no engines are started on this node now", code="EADT-339")
            self._engines[engine_id] = _Engine()
        try:
            content = pickle.dumps(spec)
        except Exception as error:
            self._emit(engine_id, "error", cause="user", text=f"what an engine is told at its start: {error}")
            self._end(engine_id, 1)
            return
        request = ("fork", engine_id, content, str(log_path(self._logs, engine_id)))
        with self._lock:
            server = self._fork_server
            if engine_id not in self._engines:
                return  # the fork server has ended just now, and this engine with it
            if server is None:
                self._queued.append(request)
                if self._process is None:
                    self._start_fork_server()
        if server is not None:
            self._ask(server, request)

    def send(self, engine_id: str, *command: Any) -> None:
        """Send a command to an engine, as soon as it has connected; ignored once it has ended."""
        with self._lock:
            engine = self._engines.get(engine_id)
        if engine is not None:
            engine.commands.put(command)

    def kill(self, engine_id: str, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal to an engine, as soon as it has a process; ignored once it has ended."""
        with self._lock:
            engine = self._engines.get(engine_id)
            if engine is None:
                return
            if engine.pid is None:
                engine.signal_number = signal_number
            else:
                _signal(engine.pid, signal_number)

    def pid(self, engine_id: str) -> int | None:
        """Process number of a live engine."""
        with self._lock:
            engine = self._engines.get(engine_id)
            return engine.pid if engine is not None else None

    def live(self) -> list[str]:
        """Engines that were forked and have not ended."""
        with self._lock:
            return [engine_id for engine_id, engine in self._engines.items() if engine.pid is not None]

    def stop(self, timeout_s: float = 5.0) -> None:
        """End all engines and the fork server. Idempotent."""
        with self._lock:
            self._is_open = False
            process = self._process
        for engine_id in self.live():
            self.kill(engine_id)
        if process is not None:
            process.kill()
            process.wait(timeout_s)
        self._listener.close()

    def log_tail(self, engine_id: str) -> str:
        """The end of an engine's output."""
        return tail(log_path(self._logs, engine_id))

    # -- the fork server ---------------------------------------------------------------------------

    def _start_fork_server(self) -> None:
        """Begin another fork server; the lock is held."""
        environment = {**os.environ, **self._env, ADDRESS_ENV: self._address, KEY_ENV: self._key.hex()}
        with log_path(self._logs, "fork-server").open("ab") as log:
            process = self._process = subprocess.Popen(
                [sys.executable, "-m", "eadt.training.fork_server"],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        threading.Thread(target=self._watch, args=(process,), name="eadt-fork-server", daemon=True).start()

    def _ask(self, server: Connection, request: Message) -> None:
        with self._asking, contextlib.suppress(OSError):  # it has ended: so the engine has, see _watch
            server.send(request)

    def _serve_fork_server(self, connection: Connection, pid: int) -> None:
        """Carry what a fork server says, until it or its line ends; the other one ends then too."""
        with self._changed:
            process = self._process
            if process is None or process.pid != pid:
                return
            self._fork_server, self._fork_server_line = connection, threading.current_thread()
            queued, self._queued = self._queued, []
            self._changed.notify_all()
        try:
            for request in queued:
                self._ask(connection, request)
            while True:
                kind, engine_id, number = connection.recv()
                if kind == "forked":
                    self._forked(engine_id, number)
                else:
                    self._end(engine_id, number)
        except (EOFError, OSError):
            return
        finally:
            process.kill()

    def _forked(self, engine_id: str, pid: int) -> None:
        with self._lock:
            engine = self._engines[engine_id]
            engine.pid = pid
            if engine.signal_number is not None:
                _signal(pid, engine.signal_number)

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """When a fork server has ended, its engines have too, and those that it was to fork never come."""
        status = process.wait()
        with self._lock:
            line = self._fork_server_line
        if line is not None:
            line.join()  # it may have said how some of them ended
        with self._changed:
            self._process = self._fork_server = self._fork_server_line = None
            self._queued.clear()
            self._changed.notify_all()
            lost = [engine_id for engine_id, engine in self._engines.items() if engine.status is None]
            is_open = self._is_open
        if not is_open:
            return
        logger.error("the fork server has ended with status %d, and %d engines with it", status, len(lost))
        for engine_id in lost:
            text = f"the engines' fork server ended with status {status}"
            self._emit(engine_id, "error", cause="killed", text=text)
            self._end(engine_id, -signal.SIGKILL)

    # -- engines -------------------------------------------------------------------------------------

    def _serve(self, connection: Connection) -> None:
        kind, who = connection.recv()
        if kind == "fork_server":
            self._serve_fork_server(connection, who)
        else:
            self._serve_engine(connection, who)

    def _serve_engine(self, connection: Connection, engine_id: str) -> None:
        """Carry events and commands, until the line ends."""
        with self._lock:
            engine = self._engines.get(engine_id)
            if engine is None or engine.connection is not None:
                return  # nobody waits for it any more
            engine.connection = connection
        telling = threading.Thread(target=self._tell, args=(engine_id, engine, connection), daemon=True)
        try:
            with contextlib.suppress(OSError):
                connection.send("welcome")
            telling.start()
            failure = self._carry_events(connection, engine_id)
            if failure is not None:
                self._fail(engine_id, failure)
        finally:
            hang_up(connection)
            engine.commands.put(None)
            if telling.is_alive():
                telling.join()
            with self._lock:
                engine.connection = None
            self._settle(engine_id)

    def _carry_events(self, connection: Connection, engine_id: str) -> str | None:
        """Hand on what an engine says; returns at the line's end, or why it cannot go on."""
        while True:
            try:
                content = connection.recv_bytes()
            except (EOFError, OSError):
                return None
            try:
                kind, values = pickle.loads(content)
            except Exception as error:
                logger.exception("an event of %s", engine_id)
                return f"an event of the engine cannot be read ({_named(error)})"
            try:
                self._on_event(engine_id, kind, values)
            except Exception as error:
                logger.exception("the event %r of %s", kind, engine_id)
                return f"the engine's event {kind!r} could not be handled ({_named(error)})"

    def _tell(self, engine_id: str, engine: _Engine, connection: Connection) -> None:
        """Send commands; an engine that does not take them holds up nobody else."""
        while (command := engine.commands.get()) is not None:
            try:
                connection.send(command)
            except OSError:
                return  # it has ended
            except Exception as error:
                logger.exception("the command %r to %s", command[0], engine_id)
                self._fail(engine_id, f"the command {command[0]!r} cannot be sent ({_named(error)})")
                return

    def _fail(self, engine_id: str, text: str) -> None:
        """End an engine with which we cannot go on; its ``exit`` follows."""
        self._emit(engine_id, "error", cause="error", text=text)
        self.kill(engine_id)

    def _end(self, engine_id: str, status: int) -> None:
        """An engine's process has ended."""
        with self._lock:
            engine = self._engines.get(engine_id)
            if engine is None or engine.status is not None:
                return
            engine.status, engine.pid = status, None
            if engine.connection is not None:
                hang_up(engine.connection, socket.SHUT_RD)  # what it has said is still read, and then no more
        self._settle(engine_id)

    def _settle(self, engine_id: str) -> None:
        """Tell an engine's end, once its process has ended and its last event has been told."""
        with self._lock:
            engine = self._engines.get(engine_id)
            if engine is None or engine.status is None or engine.connection is not None:
                return
            del self._engines[engine_id]
        log = log_path(self._logs, engine_id)
        text = tail(log if log.exists() else log_path(self._logs, "fork-server"))
        self._drop_old_logs(log)
        self._emit(engine_id, "exit", status=engine.status, log_tail=text)

    def _drop_old_logs(self, ended: Path) -> None:
        with self._lock:
            self._ended_logs.append(ended)
            while len(self._ended_logs) > _KEPT_LOGS:
                with contextlib.suppress(OSError):
                    self._ended_logs.popleft().unlink(missing_ok=True)

    def _emit(self, engine_id: str, kind: str, **values: Any) -> None:
        """Tell an event of our own; nothing can be done about a callback that fails at it."""
        try:
            self._on_event(engine_id, kind, values)
        except Exception:
            logger.exception("the event %r of %s could not be handled", kind, engine_id)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
