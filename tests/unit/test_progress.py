"""A long call is waited for as long as bytes move, and no longer. The clock is fake; the loop is real."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from eadt.coordination.progress import StalledError, while_it_moves
from eadt.errors import EnvironmentFailure
from eadt.testing.clock import FakeClock

LOOK_S = 5.0


class Transfer:
    """A call whose progress is scripted: at each look another number, and the time of a look goes by."""

    def __init__(self, moved: Callable[[int], int], ends_after: int | None = None) -> None:
        self.clock = FakeClock()
        self.num_looks = 0
        self._moved = moved
        self._ends_after = ends_after
        self._ended = asyncio.Event()
        self.was_cancelled = False

    async def call(self) -> str:
        try:
            await self._ended.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return "done"

    async def moved(self) -> int:
        self.num_looks += 1
        self.clock.advance(LOOK_S)
        if self.num_looks == self._ends_after:
            self._ended.set()
        return self._moved(self.num_looks)

    async def wait(self) -> str:
        return await while_it_moves(self.call(), self.moved, clock=self.clock, stall_s=60.0, look_s=0.0)


async def run(transfer: Callable[[], Transfer]) -> tuple[str | StalledError, Transfer]:
    made = transfer()
    try:
        return await made.wait(), made
    except StalledError as error:
        await asyncio.sleep(0)
        return error, made


def test_a_call_that_moves_may_take_as_long_as_it_likes() -> None:
    result, transfer = asyncio.run(run(lambda: Transfer(lambda look: look, ends_after=1000)))
    assert result == "done"
    assert transfer.clock.monotonic_s() >= 1000.0 + 1000 * LOOK_S


def test_a_call_that_moves_nothing_is_given_up() -> None:
    result, transfer = asyncio.run(run(lambda: Transfer(lambda look: min(look, 100))))
    assert isinstance(result, StalledError)
    assert (result.code, result.exit_status) == ("EADT-356", 3)
    assert "60 s" in result.what
    # What moved until then is not held against it: the time counts from the last byte.
    assert transfer.num_looks == 100 + 60 / LOOK_S
    assert transfer.was_cancelled


def test_a_slow_one_that_moves_now_and_then_is_not_given_up() -> None:
    result, _ = asyncio.run(run(lambda: Transfer(lambda look: look // 11, ends_after=200)))
    assert result == "done"


def test_no_answer_about_progress_is_no_progress() -> None:
    def silent(look: int) -> int:
        raise EnvironmentFailure("a node agent does not answer", code="EADT-336")

    result, transfer = asyncio.run(run(lambda: Transfer(silent)))
    assert isinstance(result, StalledError)
    assert transfer.num_looks == 60 / LOOK_S


def test_an_error_of_the_call_is_its_own() -> None:
    async def fail() -> str:
        raise EnvironmentFailure("no space", code="EADT-351")

    async def moved() -> int:
        return 0

    with pytest.raises(EnvironmentFailure) as caught:
        asyncio.run(while_it_moves(fail(), moved, look_s=0.0))
    assert caught.value.code == "EADT-351"
