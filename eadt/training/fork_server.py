"""A warm process that forks engines: torch, DeepSpeed and transformers are imported once a node.

Started by the node agent as ``python -m eadt.training.fork_server``, with the address and key of the
agent's channel in its environment. It never touches a device, so its children may. One request
a message: ``("fork", EngineSpec, log_path)`` answers ``("forked", engine_id, pid)``; when a child
ends, ``("exit", engine_id, status)`` follows, status negative for a signal.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import select
import signal
import sys
from multiprocessing.connection import Client, Connection

from eadt.clock import SYSTEM_CLOCK, monotonic_s
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
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        signal.set_wakeup_fd(self._wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's affair

    def serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._agent.fileno(), self._wake_read], [], [])
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

    def _fork(self, spec: EngineSpec, log_path: str) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                self._agent.close()
                _die_with(parent)
                log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.environ.update(spec.env)
                from eadt.training.engine import run_engine

                status = run_engine(spec, Client(self._address, authkey=self._key))
            finally:
                # No clean-up of the parent's objects: they are not ours.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        self._engines[pid] = spec.engine_id
        self._agent.send(("forked", spec.engine_id, pid))

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
                with contextlib.suppress(OSError):
                    self._agent.send(("exit", engine_id, os.waitstatus_to_exitcode(status)))

    def _end(self) -> None:
        """The agent has gone: let engines save their state, then end what is left."""
        deadline = monotonic_s() + END_GRACE_S
        while self._engines and monotonic_s() < deadline:
            self._reap()
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
