"""A call that may hang in a driver, asked of a thread of its own and waited for only so long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from eadt.errors import TransientDeviceError

_Answer = TypeVar("_Answer")


class _Asked(Generic[_Answer]):
    """One call under way."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.answer: _Answer | None = None
        self.failure: Exception | None = None


class DeviceCall(Generic[_Answer]):
    """A question to a device. Thread-safe; at most one call of it is under way, however long that hangs.

    Args:
        call: Asks the device; may block for ever.
        what: What it asks, for the message.
        deadline_s: How long a caller waits, in s.
    """

    def __init__(self, call: Callable[[], _Answer], what: str, deadline_s: float) -> None:
        self._call = call
        self._what = what
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._asked: _Asked[_Answer] | None = None

    def ask(self) -> _Answer:
        """The answer; blocks for ``deadline_s`` at most.

        Raises:
            TransientDeviceError: EADT-343, it did not answer in time.
            Exception: What the call raised.
        """
        with self._lock:
            asked = self._asked
            if asked is None:
                asked = self._asked = _Asked()
                threading.Thread(target=self._run, args=(asked,), name="eadt-ask", daemon=True).start()
        if not asked.is_over.wait(self._deadline_s):
            raise TransientDeviceError(
                f"{self._what} was not answered within {self._deadline_s:g} s", code="EADT-343"
            )
        if asked.failure is not None:
            raise asked.failure
        return asked.answer  # type: ignore[return-value]

    def _run(self, asked: _Asked[_Answer]) -> None:
        try:
            asked.answer = self._call()
        except Exception as error:
            asked.failure = error
        with self._lock:
            self._asked = None
        asked.is_over.set()
