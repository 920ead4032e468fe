"""A node's outbox: order, and what does not wait."""

from __future__ import annotations

import queue

from eadt.coordination.outbox import Item, Outbox

SOON_S = 20.0
LONG_S = 3600.0
"""A pace that no test waits for."""


class Receiver:
    """Gets what is delivered, batch by batch."""

    def __init__(self, pace_s: float = LONG_S) -> None:
        self.batches: queue.Queue[list[Item]] = queue.Queue()
        self.outbox = Outbox(self.batches.put, pace_s)
        self.outbox.start()

    def next(self) -> list[Item]:
        return self.batches.get(timeout=SOON_S)


def step(number: int) -> Item:
    return ("engine", "step", {"step": number})


def test_what_nobody_waits_for_is_delivered_with_the_next_thing_that_somebody_does() -> None:
    receiver = Receiver()
    receiver.outbox.put(step(1))
    assert receiver.next() == [step(1)]  # nothing was delivered before: it need not wait
    receiver.outbox.put(step(2))
    receiver.outbox.put(({"type": "energy"},))
    receiver.outbox.put(("engine", "saved", {}))
    assert receiver.next() == [step(2), ({"type": "energy"},), ("engine", "saved", {})]
    assert receiver.batches.empty()


def test_what_nobody_waits_for_is_delivered_after_a_while() -> None:
    receiver = Receiver(pace_s=0.02)
    for number in range(3):
        receiver.outbox.put(step(number))
        assert receiver.next() == [step(number)]


def test_flush_delivers_everything_and_then_returns() -> None:
    receiver = Receiver()
    receiver.outbox.put(step(1))
    receiver.next()
    receiver.outbox.put(step(2))
    assert receiver.outbox.flush(SOON_S)
    assert receiver.batches.get_nowait() == [step(2)]
    assert receiver.outbox.flush(SOON_S)  # with nothing to deliver
    receiver.outbox.put(step(3))
    receiver.outbox.put(("engine", "exit", {}))
    assert receiver.next() == [step(3), ("engine", "exit", {})]
