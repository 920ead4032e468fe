"""The engine pool with a real fork server, engines and sockets: no engine is forgotten, whatever breaks."""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from eadt.clock import monotonic_s
from eadt.config import config_from_dict
from eadt.control.batch import plan_batch
from eadt.errors import EnvironmentFailure
from eadt.training import engine_log
from eadt.training.engine_pool import EnginePool
from eadt.training.engine_spec import ComputeShare, EngineSpec, TrainingJob
from tests.unit.engine_functions import Wreck

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 60.0

Event = tuple[str, dict[str, Any]]


class Engines:
    """A pool and what its engines have said, each engine's apart.

    Attributes:
        on_event: Called before an event is kept, in the pool's thread; may raise.
    """

    def __init__(self, folder: Path) -> None:
        env = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
        self.folder = folder
        self.pool = EnginePool(folder, self._keep, env)
        self.on_event: Callable[[str, str], None] = lambda engine_id, kind: None
        self._said: dict[str, queue.SimpleQueue[Event]] = {}
        self._number = 0

    def _keep(self, engine_id: str, kind: str, values: dict[str, Any]) -> None:
        try:
            self.on_event(engine_id, kind)
        finally:
            self._said[engine_id].put((kind, values))

    def start(self, do: str = "wait", **changes: Any) -> str:
        """Ask for an engine; returns its id."""
        self._number += 1
        engine_id = f"engine-{self._number}"
        self._said[engine_id] = queue.SimpleQueue()
        training = config_from_dict(
            {
                "training": {
                    "train_function": "tests.unit.engine_functions:train",
                    "train_function_args": {"do": do},
                    "train_batch_size": 1,
                    "max_steps": 1,
                }
            }
        ).training
        spec = EngineSpec(
            engine_id=engine_id, generation=1, rank=0, node_id="here", node_ip="127.0.0.1",
            job=TrainingJob(training, {}, 1, "fp32", 1), batch=plan_batch(1, 1, 1), share=ComputeShare(),
        )  # fmt: skip
        self.pool.fork(replace(spec, **changes))
        return engine_id

    def next(self, engine_id: str) -> Event:
        try:
            return self._said[engine_id].get(timeout=DEADLINE_S)
        except queue.Empty:
            raise AssertionError(f"{engine_id} says no more") from None

    def until(self, engine_id: str, wanted: str) -> dict[str, Any]:
        while True:
            kind, values = self.next(engine_id)
            if kind == wanted:
                return values

    def to_the_end(self, engine_id: str) -> list[Event]:
        """All that comes, to the exit."""
        events = [self.next(engine_id)]
        while events[-1][0] != "exit":
            events.append(self.next(engine_id))
        return events

    def nothing_follows(self, engine_id: str) -> bool:
        return self._said[engine_id].empty()


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline_s = monotonic_s() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert monotonic_s() < deadline_s, otherwise
        pause.wait(0.01)


def stop_process(pid: int) -> None:
    """Stop a process, and return when all of its threads stand still."""
    os.kill(pid, signal.SIGSTOP)
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    wait_until(lambda: all(") T " in (thread / "stat").read_text() for thread in threads), "it goes on")


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    engines = Engines(tmp_path_factory.mktemp("pool"))
    engines.pool.start()
    engines.pool.wait_warm(120)
    yield engines
    engines.pool.stop()


@pytest.fixture
def engines(warm: Engines) -> Iterator[Engines]:
    yield warm
    warm.on_event = lambda engine_id, kind: None
    for engine_id in warm.pool.live():
        warm.pool.kill(engine_id)
    wait_until(lambda: not warm.pool.live(), "engines live on")


def test_events_and_commands_go_both_ways_in_order_and_the_end_is_told_last(engines: Engines) -> None:
    engine = engines.start()
    for number in range(100):  # most of them before it has connected
        engines.pool.send(engine, "say", number)
    pid = engines.until(engine, "waiting")["pid"]
    assert engines.pool.pid(engine) == pid
    assert engines.pool.live() == [engine]
    assert [engines.until(engine, "said")["what"] for _ in range(100)] == list(range(100))
    engines.pool.send(engine, "end")
    assert engines.next(engine) == ("exit", {"status": 0, "log_tail": ""})
    assert engines.pool.live() == []
    assert engines.pool.pid(engine) is None


@pytest.mark.parametrize("stranger", [b"", b"GET / HTTP/1.0\r\n\r\n"])
def test_a_stranger_at_the_agents_socket_does_not_keep_engines_out(engines: Engines, stranger: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(f"\0{engines.pool._address}")
        line.sendall(stranger)
        engine = engines.start()
        engines.until(engine, "waiting")


@pytest.mark.parametrize(
    ("do", "cause", "text"),
    [
        ("send_wreck", "error", "cannot be read (ModuleNotFoundError: no module of that name here)"),
        ("send_no_event", "error", "cannot be read (TypeError"),
        ("send_tensor", "user", "EADT-231: validation['loss'] is a torch.Tensor"),
        ("fail_at_once", "error", "ValueError: of no use"),
    ],
)
def test_what_cannot_be_told_fails_the_engine_and_says_why(
    engines: Engines, do: str, cause: str, text: str
) -> None:
    other = engines.start()
    engines.until(other, "waiting")
    events = engines.to_the_end(engines.start(do))
    [error] = [values for kind, values in events if kind == "error"]
    assert error["cause"] == cause
    assert text in error["text"]
    assert events[-1][1]["status"] != 0
    engines.pool.send(other, "say", "still here")
    assert engines.until(other, "said")["what"] == "still here"


def test_a_handler_that_raises_fails_the_engine_that_it_was_called_for(engines: Engines) -> None:
    other = engines.start()
    engines.until(other, "waiting")

    def refuse(engine_id: str, kind: str) -> None:
        if engine_id != other and kind != "error":
            raise OSError("the books are closed")  # what a broken line raises, too

    engines.on_event = refuse
    events = engines.to_the_end(engines.start())  # its exit is told though that raises again
    assert [kind for kind, _ in events] == ["waiting", "error", "exit"]
    assert events[1][1] == {
        "cause": "error",
        "text": "the engine's event 'waiting' could not be handled (OSError: the books are closed)",
    }
    assert events[2][1]["status"] == -signal.SIGKILL
    engines.pool.send(other, "say", "still here")
    assert engines.until(other, "said")["what"] == "still here"


def test_a_command_that_cannot_be_sent_fails_the_engine(engines: Engines) -> None:
    engine = engines.start()
    engines.pool.send(engine, "say", lambda: None)
    events = engines.to_the_end(engine)
    [error] = [values for kind, values in events if kind == "error"]
    assert "the command 'say' cannot be sent" in error["text"]


def test_what_an_engine_said_before_it_died_comes_before_its_end(engines: Engines) -> None:
    def read_slowly(engine_id: str, kind: str) -> None:
        if kind == "first":
            wait_until(lambda: engines.pool.pid(engine_id) is None, "it does not die")

    engines.on_event = read_slowly
    events = engines.to_the_end(engines.start("say_much_and_die"))
    assert events.pop(0)[0] == "first"
    assert [values["number"] for kind, values in events[:-1]] == list(range(100))
    assert events[-1][1]["status"] == -signal.SIGKILL


def test_an_engine_that_fails_before_its_line_is_looked_at_says_why_all_the_same(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = engines.pool._serve_engine
    pause = threading.Event()

    def serve_late(connection: Connection, engine_id: str) -> None:
        for _ in range(50):  # half a second, in which an engine that waited for nobody would have ended
            if engine_id not in engines.pool._engines:
                break
            pause.wait(0.01)
        serve(connection, engine_id)

    monkeypatch.setattr(engines.pool, "_serve_engine", serve_late)
    assert [kind for kind, _ in engines.to_the_end(engines.start("fail_at_once"))] == ["error", "exit"]


def test_a_line_that_a_child_holds_open_does_not_hide_the_engines_end(engines: Engines) -> None:
    events = engines.to_the_end(engines.start("leave_the_line_to_a_child"))
    assert [kind for kind, _ in events] == ["before", "exit"]


def test_an_engine_that_takes_no_commands_holds_up_nobody(engines: Engines) -> None:
    stopped, other = engines.start(), engines.start()
    pid = engines.until(stopped, "waiting")["pid"]
    engines.until(other, "waiting")
    stop_process(pid)
    for _ in range(64):  # more than the socket holds
        engines.pool.send(stopped, "say", "x" * (1 << 16))
    engines.pool.send(other, "say", "still here")
    assert engines.until(other, "said")["what"] == "still here"
    engines.pool.kill(stopped)
    assert engines.to_the_end(stopped)[-1][1]["status"] == -signal.SIGKILL


def test_killing_an_engine_whose_process_is_not_known_yet_takes_effect_when_it_is(engines: Engines) -> None:
    server = engines.pool._process
    assert server is not None
    stop_process(server.pid)  # so that it is not known for sure
    try:
        engine = engines.start()
        engines.pool.kill(engine)
        assert engines.pool.pid(engine) is None
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert engines.to_the_end(engine)[-1] == ("exit", {"status": -signal.SIGKILL, "log_tail": ""})


def test_a_specification_that_cannot_be_sent_ends_the_engine_at_once(engines: Engines) -> None:
    engine = engines.start(env={"x": lambda: None})
    error, end = engines.to_the_end(engine)
    assert error[1]["cause"] == "user"
    assert end[1]["status"] == 1


def test_a_specification_that_cannot_be_read_ends_its_engine_only(engines: Engines) -> None:
    other = engines.start()
    engine = engines.start(env={"x": Wreck()})
    [end] = engines.to_the_end(engine)
    assert end[1]["status"] == 1
    assert "no module of that name here" in end[1]["log_tail"]
    engines.until(other, "waiting")


def test_an_engine_that_prints_without_end_fills_no_disk_and_keeps_its_last_words(engines: Engines) -> None:
    engine = engines.start("print_without_end")
    log = engines.folder / "logs" / f"{engine}.log"
    for _ in range(64):
        mib = engines.until(engine, "printed")["mib"]
        if mib % 8 == 7:  # else it would be done before the first look
            wait_until(lambda: log.stat().st_size <= engine_log.LIMIT_BYTES, "the log is not cut")
        assert log.stat().st_size <= engine_log.LIMIT_BYTES + (9 << 20)
        engines.pool.send(engine, "go_on")
    engines.until(engine, "waiting")
    assert engines.pool.log_tail(engine).endswith("x\nthe last line\n")
    assert log.stat().st_blocks * 512 <= engine_log.LIMIT_BYTES + (9 << 20)


def test_logs_of_engines_that_ended_long_ago_are_removed(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eadt.training.engine_pool._KEPT_LOGS", 2)
    ended = []
    for _ in range(4):
        ended.append(engines.start("fail_at_once"))
        assert "of no use" in engines.to_the_end(ended[-1])[-1][1]["log_tail"]
    logs = engines.folder / "logs"
    assert [(logs / f"{engine}.log").exists() for engine in ended] == [False, False, True, True]
    assert (logs / "fork-server.log").exists()


def test_when_the_fork_server_dies_every_engine_has_an_end_and_the_next_one_a_new_fork_server(
    engines: Engines,
) -> None:
    running = engines.start()
    pid = engines.until(running, "waiting")["pid"]
    server = engines.pool._process
    assert server is not None
    stop_process(server.pid)
    never_forked = engines.start()
    os.kill(server.pid, signal.SIGKILL)
    for engine in (running, never_forked):
        events = engines.to_the_end(engine)
        assert {"cause": "killed", "text": "the engines' fork server ended with status -9"} in [
            values for kind, values in events if kind == "error"
        ]
        assert events[-1][1]["status"] == -signal.SIGKILL
        assert engines.nothing_follows(engine)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}/status"), "an engine outlived its fork server")

    engine = engines.start()
    engines.until(engine, "waiting")
    assert engines.pool._process is not server


def test_a_fork_server_that_does_not_come_up_ends_what_waits_for_it(tmp_path: Path) -> None:
    engines = Engines(tmp_path)
    engines.pool._env["PYTHONHOME"] = str(tmp_path)  # Python itself does not start
    engines.pool.start()
    with pytest.raises(EnvironmentFailure, match="encodings") as caught:
        engines.pool.wait_warm(600)
    assert caught.value.code == "EADT-339"
    error, end = engines.to_the_end(engines.start())  # by another one, which fails likewise
    assert error[1]["text"] == "the engines' fork server ended with status 1"
    assert end[1]["status"] == -signal.SIGKILL
    assert "encodings" in end[1]["log_tail"]
    engines.pool.stop()
    with pytest.raises(EnvironmentFailure, match="EADT-339"):
        engines.start()
