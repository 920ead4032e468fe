"""A door that opens to whoever knows a key, whatever else knocks: scanners, probes, the silent and the lost.

Owns accepting and the proof of the key (the HMAC challenge of :mod:`multiprocessing.connection`, which
``Client(address, authkey=key)`` answers). Must not know what is said afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

logger = logging.getLogger(__name__)

_BACKLOG = 256
_RETRY_S = 0.1
"""Pause after an accept that failed: with too many open files it would fail again at once."""

_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
"""In s, s and tries: a peer whose machine has gone is noticed after a minute."""


class KeyedListener:
    """A listening thread, and a thread for each connection; all are daemons. Start with :meth:`start`.

    No peer can hold up another one: the key is proved in the connection's own thread, within a time.

    Args:
        address: Host and port (0: any free one), or a name of the abstract Unix namespace.
        key: What a peer must know.
        serve: Gets each connection that has proved it, in that connection's thread; the connection is
            closed when it returns. What it raises is logged.
        name: Of its threads, and in the log.
        handshake_s: How long a peer may take to prove the key.
        max_strangers: Peers that may be at it at one time; further ones wait to be accepted.
    """

    def __init__(
        self,
        address: tuple[str, int] | str,
        key: bytes,
        serve: Callable[[Connection], None],
        name: str,
        *,
        handshake_s: float = 5.0,
        max_strangers: int = 64,
    ) -> None:
        self._asked_address = address
        self._key = key
        self._serve = serve
        self._name = name
        self._handshake_s = handshake_s
        self._places = threading.BoundedSemaphore(max_strangers)
        self._closed = threading.Event()
        self._logged: set[str] = set()
        self._socket: socket.socket | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of a TCP listener; valid after :meth:`start`."""
        assert self._socket is not None, "not started"
        host, port = self._socket.getsockname()[:2]
        return str(host), int(port)

    def start(self) -> None:
        """Begin to listen. Does not block."""
        if isinstance(self._asked_address, str):
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(f"\0{self._asked_address}")
            listening.listen(_BACKLOG)
        else:
            listening = socket.create_server(self._asked_address, backlog=_BACKLOG)
        self._socket = listening
        threading.Thread(target=self._accept, args=(listening,), name=self._name, daemon=True).start()

    def close(self) -> None:
        """Stop listening; connections that are being served go on. Idempotent."""
        self._closed.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the thread in accept
            self._socket.close()

    def _accept(self, listening: socket.socket) -> None:
        while not self._closed.is_set():
            self._places.acquire()
            accepted: socket.socket | None = None
            try:
                accepted, _ = listening.accept()
                threading.Thread(target=self._admit, args=(accepted,), name=self._name, daemon=True).start()
            except (OSError, RuntimeError) as error:  # no file, no thread, or a peer that has gone already
                if accepted is not None:
                    accepted.close()
                self._places.release()
                if not self._closed.wait(_RETRY_S):
                    self._log_once("could not accept a connection", error)

    def _admit(self, accepted: socket.socket) -> None:
        """One connection, from its proof of the key to its end."""
        accepted.setblocking(True)
        connection = Connection(accepted.detach())
        try:
            if not self._proves_key(connection):
                return
            if not isinstance(self._asked_address, str):
                _keep_alive(connection)
            self._serve(connection)
        except Exception:
            logger.exception("%s: a connection is given up", self._name)
        finally:
            connection.close()

    def _proves_key(self, connection: Connection) -> bool:
        try:
            with _deadline(connection, self._handshake_s):
                deliver_challenge(connection, self._key)
                answer_challenge(connection, self._key)
        except Exception as error:  # whatever a stranger sends, and a lack of threads
            self._log_once("a stranger was turned away", error)
            return False
        finally:
            self._places.release()
        return True

    def _log_once(self, what: str, error: Exception) -> None:
        if what not in self._logged:
            self._logged.add(what)
            logger.warning("%s: %s (%r); further ones are not logged", self._name, what, error)


def hang_up(connection: Connection, how: int = socket.SHUT_RDWR) -> None:
    """End a connection that another thread uses: that thread finds it ended. From any thread, idempotent.

    Args:
        connection: A connection over a socket.
        how: ``SHUT_RD`` lets what has arrived be read first.
    """
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as shared:
        shared.shutdown(how)


@contextlib.contextmanager
def _deadline(connection: Connection, seconds: float) -> Iterator[None]:
    """End the connection where this takes longer. A timeout of its socket would begin anew with each byte."""
    timer = threading.Timer(seconds, hang_up, (connection,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # else it might meet another connection under the same file number


def _keep_alive(connection: Connection) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as shared:
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            shared.setsockopt(socket.IPPROTO_TCP, option, value)
