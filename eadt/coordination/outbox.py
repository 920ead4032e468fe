"""What a node has to say to the coordinator, in order and in numbered batches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from eadt.clock import monotonic_s

logger = logging.getLogger(__name__)

Item = tuple[Any, ...]
"""An engine's event (engine_id, kind, values), or a row of the record alone."""

_PACE_S = 0.5
_RETRY_S = 0.5
_NOT_URGENT = frozenset({"step", "use"})
"""Events that are only written down. Each delivery costs both sides about a millisecond of CPU time."""

_MOST_ROWS = 20_000
"""Rows kept while nobody takes them: days of a node's intervals. Beyond it the oldest are dropped."""


class Outbox:
    """Delivers from a thread of its own: at once what the run may wait for, the rest every ``pace_s``.

    A batch that could not be delivered is delivered again under the same number, so that the receiver can
    tell it from the next; an error never ends the thread. Engines' events are never dropped.

    Args:
        deliver: Gets a batch's number (from 1) and its items; blocks until they have arrived, raises where
            they have not, or not surely.
        pace_s: Shortest time between deliveries of items that nobody waits for, in s.
        most_rows: Rows that are kept while nothing can be delivered.
        retry_s: Pause after a failed delivery, in s.
    """

    def __init__(
        self,
        deliver: Callable[[int, list[Item]], None],
        pace_s: float = _PACE_S,
        *,
        most_rows: int = _MOST_ROWS,
        retry_s: float = _RETRY_S,
    ) -> None:
        self._deliver = deliver
        self._pace_s = pace_s
        self._most_rows = most_rows
        self._retry_s = retry_s
        self._items: list[Item] = []
        self._num_rows = 0
        self._changed = threading.Condition()
        self._is_urgent = False
        self._is_delivering = False
        self._is_closed = threading.Event()
        self._number = 0
        self._delivered_at_s = float("-inf")
        self.num_dropped = 0

    def start(self) -> None:
        """Begin to deliver; the thread ends with the process, or with :meth:`close`."""
        threading.Thread(target=self._run, name="eadt-outbox", daemon=True).start()

    def put(self, item: Item) -> None:
        """Deliver this after everything before it. Does not block."""
        with self._changed:
            self._items.append(item)
            if len(item) == 1:
                self._num_rows += 1
                if self._num_rows > self._most_rows:
                    self._drop_oldest_row()
            elif item[1] not in _NOT_URGENT:
                self._is_urgent = True
            self._changed.notify_all()

    def _drop_oldest_row(self) -> None:
        del self._items[next(place for place, item in enumerate(self._items) if len(item) == 1)]
        self._num_rows -= 1
        self.num_dropped += 1

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is delivered; returns whether it was, within the time."""
        with self._changed:
            self._is_urgent = bool(self._items)
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._items and not self._is_delivering, timeout_s)

    def close(self) -> None:
        """End the thread; what was not delivered is given up."""
        self._is_closed.set()
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while not self._is_closed.is_set():
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._is_closed.is_set())
                left_s = self._delivered_at_s + self._pace_s - monotonic_s()
                self._changed.wait_for(lambda: self._is_urgent or self._is_closed.is_set(), max(0.0, left_s))
                items, self._items, self._num_rows = self._items, [], 0
                self._is_urgent, self._is_delivering = False, True
            self._number += 1
            self._deliver_surely(items)
            with self._changed:
                self._delivered_at_s, self._is_delivering = monotonic_s(), False
                self._changed.notify_all()

    def _deliver_surely(self, items: list[Item]) -> None:
        is_failing = False
        while not self._is_closed.is_set():
            try:
                self._deliver(self._number, items)
            except Exception as error:
                if not is_failing:
                    logger.warning(
                        "EADT-349: %d items are not delivered yet, they are kept: %s", len(items), error
                    )
                is_failing = True
                self._is_closed.wait(self._retry_s)
            else:
                return
