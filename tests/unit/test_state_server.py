"""The state server and its door, on real sockets: strangers of all kinds hold up nobody."""

from __future__ import annotations

import logging
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection
from pathlib import Path

import numpy as np
import pytest

from eadt.training.listener import KeyedListener
from eadt.training.state import SavedState, StateLayout, StatePart, StateReader, StateSlot
from eadt.training.state_server import StateServer

KEY = b"k" * 32
LAYOUT = StateLayout(("weight",), ((8,),), ("fp32",))
DEADLINE_S = 20.0
NEVER_S = 600.0
"""A time for the handshake that no test waits for."""


@pytest.fixture
def slot_path(tmp_path: Path) -> Path:
    path = tmp_path / "slot-0"
    slot = StateSlot(path, LAYOUT, writable=True)
    slot.row("fp32")[:] = np.arange(8)
    slot.close()
    return path


@pytest.fixture
def serve(slot_path: Path) -> Iterator[Callable[..., StateServer]]:
    servers: list[StateServer] = []

    def start(**options: float) -> StateServer:
        server = StateServer([slot_path.parent], "127.0.0.1", KEY, **options)  # type: ignore[arg-type]
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop()


def knock(server: StateServer) -> socket.socket:
    return socket.create_connection(server.address, timeout=DEADLINE_S)


def read_over_network(server: StateServer, slot_path: Path) -> list[float]:
    """What an engine of another node reads; within the deadline, or this raises."""
    out = np.zeros(8, dtype=np.float32)
    part = StatePart("there", str(slot_path), server.address, ((0, 8),))
    reader = StateReader(SavedState(1, {}, LAYOUT, (part,)), "here", KEY)
    failures: list[Exception] = []

    def read() -> None:
        try:
            reader.read("fp32", 0, out)
        except Exception as error:
            failures.append(error)

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    reading.join(DEADLINE_S)
    assert not reading.is_alive(), "the server does not answer"
    assert not failures, failures
    reader.close()
    return [float(value) for value in out]


def say_http(stranger: socket.socket) -> None:
    stranger.sendall(b"GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n")


def say_huge(stranger: socket.socket) -> None:
    stranger.sendall(struct.pack("!iQ", -1, 1 << 60))


def say_half(stranger: socket.socket) -> None:
    stranger.sendall(struct.pack("!i", 20) + b"half")


def reset(stranger: socket.socket) -> None:
    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stranger.close()


def go_away(stranger: socket.socket) -> None:
    stranger.close()


def say_nothing(stranger: socket.socket) -> None:
    del stranger


STRANGERS = [say_http, say_huge, say_half, reset, go_away, say_nothing]


@pytest.mark.parametrize("behave", STRANGERS)
def test_a_stranger_does_not_keep_engines_from_reading(
    behave: Callable[[socket.socket], None], serve: Callable[..., StateServer], slot_path: Path
) -> None:
    server = serve(handshake_s=NEVER_S)
    stranger = knock(server)
    behave(stranger)
    assert read_over_network(server, slot_path) == list(range(8))
    stranger.close()


def test_silent_strangers_are_sent_away_after_some_time(serve: Callable[..., StateServer]) -> None:
    stranger = knock(serve(handshake_s=0.05))
    assert stranger.recv(4)  # the challenge
    while stranger.recv(256):
        pass
    stranger.close()


def test_a_stranger_that_drips_bytes_gains_no_time(serve: Callable[..., StateServer]) -> None:
    stranger = knock(serve(handshake_s=0.5))
    stranger.sendall(struct.pack("!i", 250))
    stranger.settimeout(0.05)
    for _ in range(249):  # 12 s, were each byte to begin the time anew
        try:
            stranger.sendall(b"x")
            if stranger.recv(256) == b"":
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    else:
        pytest.fail("it was let to go on")
    stranger.close()


def test_more_silent_strangers_than_places_hold_others_up_for_no_longer_than_they_may_stay(
    serve: Callable[..., StateServer], slot_path: Path
) -> None:
    server = serve(handshake_s=0.2, max_strangers=2)
    strangers = [knock(server) for _ in range(6)]
    assert read_over_network(server, slot_path) == list(range(8))
    for stranger in strangers:
        stranger.close()


def test_strangers_are_bounded_and_a_connection_that_is_served_takes_none_of_their_places(
    slot_path: Path, serve: Callable[..., StateServer]
) -> None:
    server = serve(handshake_s=NEVER_S, max_strangers=1)
    engines = [Client(server.address, authkey=KEY) for _ in range(3)]
    for engine in engines:
        engine.send((str(slot_path), LAYOUT, "fp32", 2, 4))
        assert engine.recv_bytes() == np.array([2, 3], dtype=np.float32).tobytes()
    stranger, waiting = knock(server), knock(server)
    assert stranger.recv(4)
    waiting.settimeout(0.2)
    with pytest.raises(TimeoutError):
        waiting.recv(4)  # it is not even challenged while the other one has the place
    stranger.close()
    waiting.settimeout(DEADLINE_S)
    assert waiting.recv(4)
    waiting.close()
    for engine in engines:
        engine.close()


def test_one_that_knows_another_key_is_turned_away_and_said_once(
    serve: Callable[..., StateServer], slot_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with pytest.raises(Exception, match=r"rejected|digest|closed|reset|^$"):
                Client(server.address, authkey=b"another")
        assert read_over_network(server, slot_path) == list(range(8))
    told = [record for record in caplog.records if "stranger" in record.getMessage()]
    assert len(told) == 1


def test_a_request_that_makes_no_sense_ends_its_own_connection_and_is_logged(
    serve: Callable[..., StateServer], slot_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()
    requests = ["hello", (str(slot_path), LAYOUT, "no row", 0, 8), ("/etc/passwd", LAYOUT, "fp32", 0, 8)]
    for request in requests:
        engine = Client(server.address, authkey=KEY)
        engine.send(request)
        with pytest.raises((EOFError, ConnectionError)):
            engine.recv_bytes()
        engine.close()
    engine = Client(server.address, authkey=KEY)
    engine.send_bytes(b"no pickle")
    with pytest.raises((EOFError, ConnectionError)):
        engine.recv_bytes()
    engine.close()
    assert read_over_network(server, slot_path) == list(range(8))
    assert sum("is given up" in record.getMessage() for record in caplog.records) == 4


def test_stopping_frees_the_port_at_once(serve: Callable[..., StateServer], slot_path: Path) -> None:
    server = serve()
    read_over_network(server, slot_path)  # by then it waits for the next one
    address = server.address
    listening = {thread for thread in threading.enumerate() if thread.name == "eadt-state-server"}
    server.stop()
    for thread in listening:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    socket.create_server(address).close()


def test_a_lack_of_open_files_is_no_end_of_listening(tmp_path: Path) -> None:
    """In a process of its own, whose limit of open files is reached while a peer waits."""
    script = f"""
import logging, os, resource, socket, threading
from multiprocessing.connection import Client
from eadt.training.listener import KeyedListener
listener = KeyedListener(("127.0.0.1", 0), {KEY!r}, lambda c: c.send("served"), "door")
listener.start()
address = listener.address
peer = socket.socket()
limit = len(os.listdir("/proc/self/fd")) + 8
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
files = []
try:
    while True:
        files.append(open("/dev/null"))
except OSError:
    pass
peer.connect(address)
seen = threading.Event()
class Seen(logging.Handler):
    def emit(self, record):
        if "could not accept" in record.getMessage():
            seen.set()
logging.getLogger("eadt.training.listener").addHandler(Seen())
assert seen.wait({DEADLINE_S}), "the accept did not fail"
while files:
    files.pop().close()
peer.close()
client = Client(address, authkey={KEY!r})
assert client.poll({DEADLINE_S}) and client.recv() == "served"
print("fine")
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=3 * DEADLINE_S
    )
    assert result.stdout.strip() == "fine", result.stderr


def test_a_peer_whose_machine_vanishes_is_noticed_by_keepalive() -> None:
    options: list[int] = []
    served = threading.Event()

    def look(connection: Connection) -> None:
        with socket.socket(fileno=os.dup(connection.fileno())) as shared:
            options.append(shared.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            options.append(shared.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE))
        served.set()

    listener = KeyedListener(("127.0.0.1", 0), KEY, look, "door")
    listener.start()
    client = Client(listener.address, authkey=KEY)
    assert served.wait(DEADLINE_S)
    client.close()
    listener.close()
    assert options[0] == 1
    assert options[1] <= 60
