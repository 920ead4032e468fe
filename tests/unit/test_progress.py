"""A long call is waited for as long as bytes move, and no longer. The clock is fake; the loop is real."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from eadt import actors
from eadt.coordination.progress import STALL_S, StalledError, while_it_moves
from eadt.errors import EnvironmentFailure
from eadt.node.agent import NodeAgent, agent_settings
from eadt.testing.clock import FakeClock
from eadt.training.checkpoint import CheckpointStore
from eadt.training.state import StateSlot
from tests.unit.keeping import LAYOUT, NUM, make_config, make_settings

LOOK_S = 5.0


class Transfer:
    """A call whose progress is scripted: at each look another number, and the time of a look goes by."""

    def __init__(self, moved: Callable[[int], int], ends_after: int | None = None) -> None:
        self.clock = FakeClock()
        self.num_looks = 0
        self._moved = moved
        self._ends_after = ends_after
        self._ended = asyncio.Event()
        self.was_cancelled = self.was_given_up = False

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
        made.was_given_up = made.was_cancelled  # by then, and not only as the loop ends
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
    assert transfer.was_given_up


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


# -- what is asked of a node ---------------------------------------------------------------------------------


class Method:
    """A method of an actor's handle; what it returns is awaited, as Ray's references are."""

    def __init__(self, function: Callable[..., Awaitable[Any]]) -> None:
        self.remote = function


class Handle:
    """A node agent's actor, whose transfers go as a :class:`Transfer` does."""

    def __init__(self, transfer: Transfer) -> None:
        async def call(*arguments: object) -> str:
            return await transfer.call()

        async def moved() -> int:
            return await transfer.moved()

        self.write_shard = self.restore = Method(call)
        self.moved_bytes = Method(moved)


@pytest.mark.parametrize("name", ["write_shard", "restore"])
@pytest.mark.parametrize("moves", [True, False])
def test_a_nodes_transfers_are_bounded_by_progress_and_not_in_all(
    monkeypatch: pytest.MonkeyPatch, name: str, moves: bool
) -> None:
    async def work() -> Transfer:
        transfer = Transfer(lambda look: look if moves else 0, ends_after=1000 if moves else None)
        waiting = partial(while_it_moves, clock=transfer.clock, look_s=0.0)
        monkeypatch.setattr(actors, "while_it_moves", waiting)
        client: Any = actors.RayNodeClient(Handle(transfer))
        arguments = {"write_shard": (1, 0, 0, None, [], "a"), "restore": (None, [0], 0)}[name]
        if moves:
            assert await getattr(client, name)(*arguments) == "done"
        else:
            with pytest.raises(StalledError):
                await getattr(client, name)(*arguments)
        return transfer

    async def bounded() -> Transfer:
        async with asyncio.timeout(20):
            return await work()

    seconds = asyncio.run(bounded()).clock.monotonic_s() - 1000.0
    assert seconds == (1000 * LOOK_S if moves else STALL_S + LOOK_S)


def test_a_node_tells_the_bytes_that_went_and_came(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, elastic={"shared_memory_dir": str(tmp_path / "memory")})
    config = make_config(tmp_path, elastic={"shared_memory_dir": str(tmp_path / "memory")})
    agent = NodeAgent(agent_settings(config, settings, "node0", "127.0.0.1"), print, print)
    folder = tmp_path / "memory" / "eadt-demo-1-node0"
    folder.mkdir(parents=True)
    StateSlot(folder / "slot-0", LAYOUT, writable=True).close()
    assert agent.moved_bytes == 0
    shard = agent.write_shard(5, 0, 0, LAYOUT, [(0, NUM)], "a")
    assert agent.moved_bytes == LAYOUT.num_bytes
    store = CheckpointStore(settings.storage_path, "demo-1")
    manifest = store.publish(5, LAYOUT, {}, [shard], "final", {}).manifest
    agent.restore(manifest, [0], 1)
    assert agent.moved_bytes == 2 * LAYOUT.num_bytes
