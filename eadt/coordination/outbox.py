"""What a node has to say to the coordinator, in order and in batches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from eadt.clock import monotonic_s

Item = tuple[Any, ...]
"""An engine's event (engine_id, kind, values), or a ledger row alone."""

_PACE_S = 0.5
_NOT_URGENT = frozenset({"step", "phase"})
"""Events that are only written down. Each delivery costs both sides about a millisecond of CPU time."""


class Outbox:
    """Delivers from a thread of its own: at once what the run may wait for, the rest every ``pace_s``.

    Args:
        deliver: Gets the next items; blocks until they have arrived.
        pace_s: Shortest time between deliveries of items that nobody waits for, in s.
    """

    def __init__(self, deliver: Callable[[list[Item]], None], pace_s: float = _PACE_S) -> None:
        self._deliver = deliver
        self._pace_s = pace_s
        self._items: list[Item] = []
        self._changed = threading.Condition()
        self._is_urgent = False
        self._is_delivering = False
        self._delivered_at_s = float("-inf")

    def start(self) -> None:
        """Begin to deliver; the thread ends with the process."""
        threading.Thread(target=self._run, name="eadt-outbox", daemon=True).start()

    def put(self, item: Item) -> None:
        """Deliver this after everything before it. Does not block."""
        with self._changed:
            self._items.append(item)
            if len(item) > 1 and item[1] not in _NOT_URGENT:
                self._is_urgent = True
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is delivered; returns whether it was, within the time."""
        with self._changed:
            self._is_urgent = bool(self._items)
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._items and not self._is_delivering, timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items)
                left_s = self._delivered_at_s + self._pace_s - monotonic_s()
                self._changed.wait_for(lambda: self._is_urgent, max(0.0, left_s))
                items, self._items = self._items, []
                self._is_urgent, self._is_delivering = False, True
            self._deliver(items)
            with self._changed:
                self._delivered_at_s, self._is_delivering = monotonic_s(), False
                self._changed.notify_all()
