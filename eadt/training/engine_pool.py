"""One node's engines: starts the fork server, forks engines, carries messages both ways.

Used by the node agent, and directly by tests and benchmarks that need engines without Ray. Events
reach one callback, from several threads, in each engine's own order.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from eadt.errors import EnvironmentFailure
from eadt.training.channel import accept_in_background
from eadt.training.engine_spec import EngineSpec
from eadt.training.fork_server import ADDRESS_ENV, KEY_ENV

EventCallback = Callable[[str, str, dict[str, Any]], None]
"""Called with (engine_id, kind, values)."""

_LOG_TAIL_BYTES = 4000


class EnginePool:
    """The engines of one node. Thread-safe.

    Args:
        folder: This node's own folder for sockets and logs; made if missing.
        on_event: Gets what engines send, and ``exit`` with ``status`` and ``log_tail`` at their end.
        env: Environment of the fork server, over the present one.
    """

    def __init__(self, folder: Path, on_event: EventCallback, env: dict[str, str]) -> None:
        self._folder = folder
        self._on_event = on_event
        self._env = env
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._engines: dict[str, Connection] = {}
        self._pids: dict[str, int] = {}
        self._backlog: dict[str, list[tuple[Any, ...]]] = {}
        self._fork_server: Connection | None = None
        self._fork_server_up = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: Listener | None = None

    def start(self) -> None:
        """Start the fork server. Does not wait for its imports: see :meth:`wait_warm`."""
        logs = self._folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        # A path for the socket would be too long below deep folders (108 bytes).
        address = f"\0eadt-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener = Listener(address, family="AF_UNIX", backlog=256, authkey=self._key)
        accept_in_background(self._listener, self._receive, "eadt-engines")
        environment = {**os.environ, **self._env, ADDRESS_ENV: address[1:], KEY_ENV: self._key.hex()}
        with (logs / "fork-server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "eadt.training.fork_server"],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def wait_warm(self, timeout_s: float) -> None:
        """Block until the fork server can fork at once.

        Raises:
            EnvironmentFailure: EADT-339, it did not come up; the message ends with its log.
        """
        step_s = 0.1
        for _ in range(max(1, int(timeout_s / step_s))):
            if self._fork_server_up.wait(step_s):
                return
            if self._process is not None and self._process.poll() is not None:
                break
        raise EnvironmentFailure(
            "the engines' fork server did not start on this node",
            code="EADT-339",
            means="no training engine can run here",
            fix="its log ends with: " + self.log_tail("fork-server"),
        )

    def fork(self, spec: EngineSpec) -> None:
        """Start an engine; its events follow. Returns at once."""
        with self._lock:
            self._backlog.setdefault(spec.engine_id, [])
            server = self._fork_server
        if server is None:
            raise EnvironmentFailure("the fork server is not up", code="EADT-339")
        server.send(("fork", spec, str(self._log_path(spec.engine_id))))

    def send(self, engine_id: str, *command: Any) -> None:
        """Send a command to an engine, as soon as it has connected; ignored once it has ended."""
        with self._lock:
            connection = self._engines.get(engine_id)
            if connection is None:
                if engine_id in self._backlog:
                    self._backlog[engine_id].append(command)
                return
            with contextlib.suppress(OSError):
                connection.send(command)

    def kill(self, engine_id: str, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal to an engine; ignored once it has ended."""
        with self._lock:
            pid = self._pids.get(engine_id)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal_number)

    def pid(self, engine_id: str) -> int | None:
        """Process number of a live engine."""
        with self._lock:
            return self._pids.get(engine_id)

    def live(self) -> list[str]:
        """Engines that were forked and have not ended."""
        with self._lock:
            return list(self._pids)

    def stop(self, timeout_s: float = 5.0) -> None:
        """End all engines and the fork server."""
        for engine_id in self.live():
            self.kill(engine_id)
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout_s)
        if self._listener is not None:
            self._listener.close()

    def log_tail(self, engine_id: str) -> str:
        """The end of an engine's output."""
        path = self._log_path(engine_id)
        if not path.exists():
            return ""
        return path.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")

    def _log_path(self, engine_id: str) -> Path:
        return self._folder / "logs" / f"{engine_id}.log"

    def _receive(self, connection: Connection) -> None:
        engine_id: str | None = None
        try:
            kind, first = connection.recv()
            if kind == "fork_server":
                self._serve_fork_server(connection)
                return
            engine_id = str(first["engine_id"])
            with self._lock:
                self._engines[engine_id] = connection
                for command in self._backlog.pop(engine_id, []):
                    connection.send(command)
            while True:
                kind, values = connection.recv()
                self._on_event(engine_id, kind, values)
        except (EOFError, OSError):
            return
        finally:
            if engine_id is not None:
                with self._lock:
                    self._engines.pop(engine_id, None)

    def _serve_fork_server(self, connection: Connection) -> None:
        self._fork_server = connection
        self._fork_server_up.set()
        while True:
            kind, engine_id, number = connection.recv()
            if kind == "forked":
                with self._lock:
                    self._pids[engine_id] = number
            else:
                with self._lock:
                    self._pids.pop(engine_id, None)
                    self._backlog.pop(engine_id, None)
                self._on_event(engine_id, "exit", {"status": number, "log_tail": self.log_tail(engine_id)})
