"""A node's outbox: order, and what does not wait."""

from __future__ import annotations

import queue
import threading

from eadt.coordination.outbox import Item, Outbox

SOON_S = 20.0
LONG_S = 3600.0
"""A pace that no test waits for."""


class Receiver:
    """Gets what is delivered, batch by batch."""

    def __init__(self, pace_s: float = LONG_S) -> None:
        self.batches: queue.Queue[list[Item]] = queue.Queue()
        self.numbers: list[int] = []
        self.outbox = Outbox(self._take, pace_s)
        self.outbox.start()

    def _take(self, number: int, items: list[Item]) -> None:
        self.numbers.append(number)
        self.batches.put(items)

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
    assert receiver.numbers == [1, 2, 3]


def test_a_batch_that_was_not_taken_comes_again_under_its_number_and_nothing_is_lost() -> None:
    taken: queue.Queue[tuple[int, list[Item]]] = queue.Queue()
    failures = [RuntimeError("a defect in the receiver"), ConnectionError("it is away")]
    tries: list[int] = []

    def deliver(number: int, items: list[Item]) -> None:
        tries.append(number)
        if failures:
            raise failures.pop()
        taken.put((number, items))

    outbox = Outbox(deliver, LONG_S, retry_s=0.01)
    outbox.start()
    outbox.put(("engine", "saved", {}))
    assert taken.get(timeout=SOON_S) == (1, [("engine", "saved", {})])
    outbox.put(("engine", "exit", {}))
    assert taken.get(timeout=SOON_S) == (2, [("engine", "exit", {})])
    assert tries == [1, 1, 1, 2]


def test_rows_that_nobody_takes_are_bounded_the_oldest_go_and_events_stay() -> None:
    release, taken = threading.Event(), queue.Queue()

    def deliver(number: int, items: list[Item]) -> None:
        release.wait(SOON_S)
        taken.put(items)

    outbox = Outbox(deliver, 0.0, most_rows=3)
    outbox.start()
    outbox.put(("engine", "saved", {}))
    while outbox.flush(0.01):  # until the thread holds the first batch
        pass
    outbox.put(("engine", "loaded", {}))
    for number in range(10):
        outbox.put((number,))
    assert outbox.num_dropped == 7
    release.set()
    taken.get(timeout=SOON_S)
    assert taken.get(timeout=SOON_S) == [("engine", "loaded", {}), (7,), (8,), (9,)]


def test_close_gives_up_what_cannot_be_delivered() -> None:
    tried = threading.Event()

    def deliver(number: int, items: list[Item]) -> None:
        tried.set()
        raise ConnectionError("the coordinator has gone")

    outbox = Outbox(deliver, retry_s=LONG_S)
    outbox.start()
    outbox.put(("engine", "exit", {}))
    assert tried.wait(SOON_S)
    assert not outbox.flush(0.05)
    outbox.close()
    assert outbox.flush(SOON_S)
