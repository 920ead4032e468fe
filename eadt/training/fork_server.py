"""A warm process that forks engines: torch, DeepSpeed and transformers are imported once a node.

Started by the node agent as ``python -m eadt.training.fork_server``, with the address and key of the
agent's channel in its environment. It never touches a device, so its children may. One request
a message: ``("fork", engine_id, pickled EngineSpec, log_path)`` answers ``("forked", engine_id, pid)``;
when a child ends, or cannot be made, ``("exit", engine_id, status)`` follows, status negative for a
signal. It also keeps the files of its children's output from growing without end.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import select
import signal
import sys
import traceback
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, NoReturn

from eadt.clock import SYSTEM_CLOCK, monotonic_s
from eadt.training import engine_log
from eadt.training.engine_spec import EngineSpec

ADDRESS_ENV = "EADT_AGENT_SOCKET"
KEY_ENV = "EADT_AGENT_KEY"
# The last one alone pulls in torch's compiler, 1.5 s in every engine otherwise.
PRELOADED = (
    "torch",
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "eadt.training.engine",
)
END_GRACE_S = 20.0
"""How long engines may take to save their state when the agent has gone."""

_LOG_LOOK_S = 0.5
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Import what engines need, then serve until the agent goes."""
    address, key = "\0" + os.environ.pop(ADDRESS_ENV), bytes.fromhex(os.environ.pop(KEY_ENV))
    # A CUDA query in this process would make CUDA unusable in its children: ask NVML instead.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for name in PRELOADED:
        importlib.import_module(name)
    _preload_model_code()
    # Else a collection in a child walks, and so copies, everything that was imported here.
    gc.collect()
    gc.freeze()
    agent = Client(address, authkey=key)
    agent.send(("fork_server", os.getpid()))
    _Server(agent, address, key).serve()


def _preload_model_code() -> None:
    model_type = os.environ.get("EADT_PRELOAD_MODEL_TYPE")
    if model_type:
        with contextlib.suppress(ImportError):  # unknown types are imported by the engine itself
            importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


class _Server:
    def __init__(self, agent: Connection, address: str, key: bytes) -> None:
        self._agent = agent
        self._address = address
        self._key = key
        self._engines: dict[int, str] = {}
        self._logs: dict[int, Path] = {}
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        signal.set_wakeup_fd(self._wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's affair

    def serve(self) -> None:
        while True:
            timeout_s = _LOG_LOOK_S if self._engines else None
            ready, _, _ = select.select([self._agent.fileno(), self._wake_read], [], [], timeout_s)
            self._bound_logs()
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
                self._reap()
            if self._agent.fileno() in ready:
                try:
                    kind, *arguments = self._agent.recv()
                except (EOFError, OSError):
                    self._end()
                    return
                assert kind == "fork", kind
                self._fork(*arguments)

    def _fork(self, engine_id: str, spec: bytes, log_path: str) -> None:
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            with contextlib.suppress(OSError):
                Path(log_path).write_text(f"no process could be made: {error}\n")
            self._say("exit", engine_id, 1)
            return
        if pid == 0:
            self._become_engine(parent, engine_id, spec, log_path)
        self._engines[pid] = engine_id
        self._logs[pid] = Path(log_path)
        self._say("forked", engine_id, pid)

    def _become_engine(self, parent: int, engine_id: str, content: bytes, log_path: str) -> NoReturn:
        """In the child: run the engine, and end with it."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._agent.close()
            _die_with(parent)
            log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            spec: EngineSpec = pickle.loads(content)
            os.environ.update(spec.env)
            from eadt.training.engine import run_engine

            agent = Client(self._address, authkey=self._key)
            agent.send(("engine", engine_id))
            agent.recv()  # the agent knows this line now, and tells no end of ours before what is said on it
            status = run_engine(spec, agent)
        except BaseException:
            traceback.print_exc()
        finally:
            # No clean-up of the parent's objects: they are not ours.
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> None:
        while self._engines:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            engine_id = self._engines.pop(pid, None)
            if engine_id is not None:
                del self._logs[pid]
                self._say("exit", engine_id, os.waitstatus_to_exitcode(status))

    def _say(self, *message: Any) -> None:
        with contextlib.suppress(OSError):  # the agent has gone: the next look finds it out
            self._agent.send(message)

    def _bound_logs(self) -> None:
        for path in self._logs.values():
            engine_log.bound(path)

    def _end(self) -> None:
        """The agent has gone: let engines save their state, then end what is left."""
        deadline = monotonic_s() + END_GRACE_S
        while self._engines and monotonic_s() < deadline:
            self._reap()
            self._bound_logs()
            SYSTEM_CLOCK.sleep(0.05)
        for pid in self._engines:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl took hold
        os._exit(1)


if __name__ == "__main__":
    main()
